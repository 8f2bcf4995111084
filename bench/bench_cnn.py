"""Accuracy of convolutional networks with 10 to 70 % of their parameters folded away, repair by repair, and magnitude pruning.

Run by hand: ``pytest bench/bench_cnn.py --data DIR [--scale small]``. DIR holds CIFAR-10 checkpoints with ``cifar_models.py``,
the 10,000 test images and 4,000 training images as JPEGs, and 1,017 lossless test images. Every group of channels loses the
same share, so that the share of parameters asked for is removed. Synthesised images depend on the dense network alone: made
once for each seed, used at every share. Pruning keeps, of the same widths, the units whose rows have the largest L1 or L2 norm,
and gets the same repair. Accuracies in percent; ``lost`` against the dense network, in points.
"""

from __future__ import annotations

import copy
import io
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import magnitude
import numpy as np
import pytest
import torch
from conftest import Report
from report import Row
from torch import Tensor, nn

import pyfold
from pyfold.modules.inversion import invert

SHARES = (0.1, 0.25, 0.5, 0.7)
ASKED = {"resnet18_half_cifar10": {"dir": (0.6, 1.8, 5.5, 11.0), "ar": (None, 3.0, 7.5, 18.0)}}


@dataclass(frozen=True)
class Sizes:
    """Test images, or None for all; training images for repair; synthesised images, steps, and seeds."""

    tested: int | None
    data: int
    images: int
    steps: int
    seeds: int


SIZES = {"full": Sizes(None, 512, 256, 60, 3), "small": Sizes(300, 64, 32, 5, 1)}
NETS = {"resnet18_half_cifar10": "jpeg", "vgg11bn_cifar10": "jpeg", "resnet56a_akamaster": "lossless"}


@dataclass(frozen=True)
class Net:
    """A network, its test images and labels, and training images."""

    name: str
    module: nn.Module
    images: Tensor
    labels: Tensor
    training: Tensor

    def accuracy(self, module: nn.Module) -> float:
        with torch.no_grad():
            right = [module(part).argmax(1) for part in self.images.split(500)]
        return 100 * float((torch.cat(right) == self.labels).float().mean())


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """``cifar_models.py`` of the folder that --data names."""
    folder = request.config.getoption("--data")
    if not folder:
        pytest.skip("--data names no folder")
    sys.path.insert(0, folder)
    yield import_module("cifar_models")
    sys.path.remove(folder)


@pytest.fixture(scope="module", params=NETS)
def net(request: pytest.FixtureRequest, models: ModuleType, report: Report) -> Net:
    folder, name = Path(request.config.getoption("--data")), request.param
    module, norm = models.load(name)
    if NETS[name] == "jpeg":
        images, labels = _jpegs(folder / "cifar10_test_jpeg.npz")
    else:
        file = np.load(folder / "cifar10_test.npz")
        images, labels = file["images"], file["labels"]
    training, _ = _jpegs(folder / "cifar10_train_jpeg_4k.npz")
    order = np.random.default_rng(0).permutation(len(images))[: report.sizes.tested]  # they come sorted by class
    some = np.random.default_rng(1).permutation(len(training))[: report.sizes.data]
    return Net(name, module, _scaled(images[order], norm), torch.tensor(labels[order]).long(), _scaled(training[some], norm))


def test_accuracy(net: Net, report: Report) -> None:
    sizes, example = report.sizes, net.images[:1]
    dense = net.accuracy(net.module)
    parameters = sum(each.numel() for each in net.module.parameters())
    synthesised = []
    for seed in range(sizes.seeds):
        start = time.perf_counter()
        synthesised.append(invert(net.module, example.shape[1:], n_images=sizes.images, steps=sizes.steps, seed=seed))
        report.notes.append(f"{net.name}: images of seed {seed} in {time.perf_counter() - start:.0f} s.")
    rows = report.tables.setdefault(f"{net.name}, dense {dense:.2f} of {len(net.images)} images", [])
    lost: dict[tuple[str, float], float] = {}
    for share in SHARES:
        fold = partial(pyfold.fold_model, net.module, example_inputs=example, target_params=int((1 - share) * parameters))
        on = {"dir": synthesised, "data": [net.training]}
        methods: dict[str, list[Callable[[], nn.Module]]] = {
            "none": [lambda fold=fold: fold(repair=None)[0]],
            "ar": [lambda fold=fold: fold(repair="ar")[0]],
        }
        for source, sets in on.items():
            for compensate in (False, True):
                name = f"{source}{'' if compensate else ', statistics only'}"
                methods[name] = [partial(_repaired, fold, images, compensate) for images in sets[: None if compensate else 1]]
        for norm in (1, 2):
            prune = partial(magnitude.prune, net.module, example, int((1 - share) * parameters), norm)
            methods[f"L{norm}, none"] = [partial(prune, None)]
            for source, sets in on.items():
                methods[f"L{norm}, {source}"] = [partial(prune, sets[0])]
        for name, makes in methods.items():
            start = time.perf_counter()
            made = [make() for make in makes]
            seconds = (time.perf_counter() - start) / len(made)
            left = [sum(each.numel() for each in module.parameters()) for module in made]
            assert max(left) <= (1 - share) * parameters
            reached = [net.accuracy(module.eval()) for module in made]
            lost[name, share] = dense - float(np.mean(reached))
            asked = ASKED.get(net.name, {}).get(name)
            limit = asked[SHARES.index(share)] if asked else None
            row: Row = {"removed": f"{100 * (1 - left[0] / parameters):.1f} %", "method": name}
            row |= {"accuracy": float(np.mean(reached)), "lost": lost[name, share], "asked": limit and f"<= {limit}"}
            row |= {"spread": float(np.ptp(reached)) if len(reached) > 1 else None, "seconds": seconds}
            rows.append(row)
    if sizes.tested is None:
        error = 100 * (dense / 100 * (1 - dense / 100) / len(net.images)) ** 0.5
        report.notes.append(f"{net.name}: standard error of an accuracy {error:.2f} points.")


def _repaired(fold: Callable[..., tuple[nn.Module, object]], images: Tensor, compensate: bool) -> nn.Module:
    return fold(repair="data", data=images, compensate=compensate)[0]


def _jpegs(file: Path) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    packed = np.load(file)
    blob, offsets = packed["bytes"].tobytes(), packed["offsets"]
    parts = (blob[begin:end] for begin, end in pairwise(offsets))
    return np.stack([np.asarray(Image.open(io.BytesIO(part)).convert("RGB")) for part in parts]), packed["labels"]


def _scaled(images: np.ndarray, norm: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    mean, deviation = (torch.tensor(each).view(1, 3, 1, 1) for each in norm)
    return (torch.from_numpy(copy.copy(images)).permute(0, 3, 1, 2).float() / 255 - mean) / deviation
