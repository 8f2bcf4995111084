"""Accuracy of convolutional networks with 10 to 70 % of their parameters folded away, repair by repair, and its rivals.

Run by hand: ``pytest bench/bench_cnn.py --data DIR [--scale small] [-k NETWORK]``; half an hour for each network. DIR holds
CIFAR-10 checkpoints with ``cifar_models.py``, the 10,000 test images and 4,000 training images as JPEGs, and 1,017 lossless
test images. Every group of channels loses the same share, so that the share of parameters asked for is removed. Synthesised
images depend on the dense network alone: made once for each seed, used at every share. What it is compared with
(``rivals.py``) has the same widths and gets the same repair: ``statistics`` alone, or consumers regressed as well. Accuracies
in percent, of folding with ``dir`` the mean over seeds, of rivals the first; ``lost`` against the dense network, in points.
Seconds of rivals are without tracing.
"""

from __future__ import annotations

import copy
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import plots
import pytest
import rivals
import torch
from conftest import REPORTS, Report
from report import RESULTS, Row
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pyfold
from pyfold.modules.fold import clustered
from pyfold.modules.groups import moved
from pyfold.modules.inversion import invert
from pyfold.modules.units import Axis

SHARES = (0.1, 0.25, 0.5, 0.7)
ASKED = {"resnet18_half_cifar10": {"fold, dir": (0.6, 1.8, 5.5, 11.0), "fold, ar": (None, 3.0, 7.5, 18.0)}}
PLOTTED = (0.5, 0.7)
VARIED = ("fold, none", "fold, ar", "fold, dir statistics", "fold, dir", "fold, data")


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
    report: Report
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
    """Each with a report, and a file of results, of its own."""
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
    own = Report(f"cnn-{name}", report.sizes)
    request.config.stash[REPORTS].append(own)
    return Net(
        name, own, module, _scaled(images[order], norm), torch.tensor(labels[order]).long(), _scaled(training[some], norm)
    )


def test_accuracy(net: Net) -> None:
    report = net.report
    sizes, example = report.sizes, net.images[:1]
    units = rivals.Units(net.module, example)
    dense = net.accuracy(net.module)
    parameters = _parameters(net.module)
    synthesised, inverted = [], []
    for seed in range(sizes.seeds):
        start = time.perf_counter()
        synthesised.append(invert(net.module, example.shape[1:], n_images=sizes.images, steps=sizes.steps, seed=seed))
        inverted.append(time.perf_counter() - start)
    on = {"dir": synthesised, "data": [net.training]}
    rows = report.tables.setdefault(f"{net.name}, dense {dense:.2f} of {len(net.images)} images", [])
    smaller = report.tables.setdefault(f"{net.name}, size and time", [])
    varied = report.tables.setdefault(f"{net.name}, variance behind BatchNorms, x the dense one's", [])
    curves: dict[str, list[tuple[float, float]]] = {}
    ratios: dict[float, dict[str, list[float]]] = {}
    for share in SHARES:
        target = int((1 - share) * parameters)
        fold = partial(pyfold.fold_model, net.module, example_inputs=example, target_params=target)
        methods: dict[str, list[Callable[[], nn.Module]]] = {
            "fold, none": [lambda fold=fold: fold(repair=None)[0]],
            "fold, ar": [lambda fold=fold: fold(repair="ar")[0]],
        }
        for name, make in {
            "fold": lambda images, compensate, fold=fold: fold(repair="data", data=images, compensate=compensate)[0],
            "L1": partial(_pruned, units, target, 1),
            "L2": partial(_pruned, units, target, 2),
            "IFM": partial(_merged, units, target),
        }.items():
            if name != "fold":
                methods[f"{name}, none"] = [partial(make, None, False)]
            for source, sets in on.items():
                methods[f"{name}, {source} statistics"] = [partial(make, sets[0], False)]
                methods[f"{name}, {source}"] = [
                    partial(make, images, True) for images in (sets if name == "fold" else sets[:1])
                ]
        seconds = {}
        for name, makes in methods.items():
            start = time.perf_counter()
            made = [make().eval() for make in makes]
            seconds[name] = (time.perf_counter() - start) / len(made)
            assert max(map(_parameters, made)) <= target
            reached = [net.accuracy(module) for module in made]
            curves.setdefault(name, []).append((100 * share, float(np.mean(reached))))
            limit = ASKED.get(net.name, {}).get(name, (None,) * len(SHARES))[SHARES.index(share)]
            row: Row = {"removed": f"{100 * (1 - _parameters(made[0]) / parameters):.1f} %", "method": name}
            row |= {
                "accuracy": float(np.mean(reached)),
                "lost": dense - float(np.mean(reached)),
                "asked": limit and f"<= {limit}",
            }
            row |= {"spread": float(np.ptp(reached)) if len(reached) > 1 else None, "seconds": seconds[name]}
            rows.append(row)
            if share in PLOTTED and name in VARIED:
                found = ratios.setdefault(share, {})[name] = _variances(net, units, target, made[0])
                about: Row = {"removed": f"{share:.0%}", "method": name, "least": min(found), "median": float(np.median(found))}
                varied.append(about | {"most": max(found), "asked": "0.8 to 1.25" if name == "fold, dir" else None})
            if name == "fold, ar":
                smaller.append({"removed": f"{share:.0%}", **_speed(net, made[0]), "AR s": seconds[name]})
        smaller[-1] |= {"DIR s, images included": float(np.mean(inverted)) + seconds["fold, dir"]}
    if sizes.tested is None:
        error = 100 * (dense / 100 * (1 - dense / 100) / len(net.images)) ** 0.5
        report.notes.append(f"{net.name}: standard error of an accuracy {error:.2f} points.")
    report.complete = True
    folder = RESULTS if sizes.tested is None else Path(tempfile.mkdtemp(prefix="cnn-"))
    plots.accuracies(folder / f"cnn-{net.name}-accuracy.png", net.name, dense, curves)
    plots.variances(folder / f"cnn-{net.name}-variance.png", net.name, ratios)
    report.notes.append(f"{net.name}: pictures in {folder.relative_to(RESULTS.parent) if folder == RESULTS else folder}.")


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_seconds_at_full_width(name: str, report: Report) -> None:
    """Networks of ImageNet's size with random weights: time alone."""
    from transformers import ResNetConfig, ResNetForImageClassification

    shape = {
        "resnet18": {"depths": [2, 2, 2, 2], "layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]},
        "resnet50": {"depths": [3, 4, 6, 3], "layer_type": "bottleneck", "hidden_sizes": [256, 512, 1024, 2048]},
    }
    config = ResNetConfig(embedding_size=64, num_labels=1000, **shape[name])
    module, rows = ResNetForImageClassification(config).eval(), report.tables.setdefault("random weights, 50 % removed", [])
    start = time.perf_counter()
    folded, found = pyfold.fold_model(
        module, example_inputs=torch.zeros(1, 3, 64, 64), target_params=_parameters(module) // 2, repair="ar"
    )
    rows.append({"network": name, "million parameters": found.parameters_before / 1e6, "AR s": time.perf_counter() - start})
    assert _parameters(folded) <= _parameters(module) // 2


def _parameters(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


def _pruned(units: rivals.Units, target: int, norm: int, images: Tensor | None, compensate: bool) -> nn.Module:
    return rivals.prune(units, target, norm, images, compensate=compensate)


def _merged(units: rivals.Units, target: int, images: Tensor | None, compensate: bool) -> nn.Module:
    return rivals.merge_features(units, target, images, compensate=compensate)


@torch.no_grad()
def _variances(net: Net, units: rivals.Units, target: int, folded: nn.Module) -> list[float]:
    """Of each BatchNorm's output over test images, channel by channel of the dense network; the mean over the mean."""
    clusters = clustered(units.traced, units.state, units.groups, units.widths(target))
    where = moved(units.traced, units.groups, {number: each.labels for number, each in clusters.items()})
    found: dict[str, list[Tensor]] = {}

    def seen(_: nn.Module, __: object, output: Tensor, name: str) -> None:
        found.setdefault(name, []).append(output.var((0, 2, 3)))

    for module in (net.module, folded):
        hooks = [
            each.register_forward_hook(partial(seen, name=name))
            for name, each in module.named_modules()
            if isinstance(each, nn.BatchNorm2d)
        ]
        module(net.images[:500])
        for hook in hooks:
            hook.remove()
    ratios = []
    for name, (dense, after) in found.items():
        to = where.get(Axis(f"{name}.weight", 0), torch.arange(len(after)))
        ratios.append(float(after[to].mean() / dense.mean()))
    return ratios


@torch.no_grad()
def _speed(net: Net, folded: nn.Module) -> Row:
    """Operations of one image, and milliseconds of one at a time and of a hundred, turn about, each the best of seven."""
    row: Row = {}
    flops = []
    for module in (net.module, folded):
        with FlopCounterMode(display=False) as counter:
            module(net.images[:1])
        flops.append(counter.get_total_flops())
    row |= {"MFLOPs": flops[1] / 1e6, "x dense": flops[1] / flops[0]}
    for count in (1, 100):
        best = [float("inf")] * 2
        for _ in range(7):
            for which, module in enumerate((net.module, folded)):
                start = time.perf_counter()
                module(net.images[:count])
                best[which] = min(best[which], time.perf_counter() - start)
        row |= {f"ms, {count}": 1e3 * best[1], f"x dense, {count}": best[1] / best[0]}
    return row


def _jpegs(file: Path) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    packed = np.load(file)
    blob, offsets = packed["bytes"].tobytes(), packed["offsets"]
    parts = (blob[begin:end] for begin, end in pairwise(offsets))
    return np.stack([np.asarray(Image.open(io.BytesIO(part)).convert("RGB")) for part in parts]), packed["labels"]


def _scaled(images: np.ndarray, norm: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    mean, deviation = (torch.tensor(each).view(1, 3, 1, 1) for each in norm)
    return (torch.from_numpy(copy.copy(images)).permute(0, 3, 1, 2).float() / 255 - mean) / deviation
