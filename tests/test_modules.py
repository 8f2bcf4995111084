"""Modules folded in memory: units found in any graph, duplicates folded without loss, repairs that do what they say."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pyfold
from pyfold.clustering import cluster, cluster_each
from pyfold.modules import inversion, repair
from pyfold.modules.fold import merge
from pyfold.modules.groups import unit_groups
from pyfold.modules.units import trace


def remember(module: nn.Module, x: Tensor) -> None:
    """Statistics of x in every BatchNorm."""
    for each in module.modules():
        if isinstance(each, nn.modules.batchnorm._BatchNorm):
            each.reset_running_stats()
            each.momentum = None
    module.train()(x)
    module.eval()


class Residual(nn.Module):
    """A convolutional network of any blocks."""

    def __init__(self, blocks: list[str], width: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.kinds, channels = blocks, width
        self.layers = nn.ModuleList()
        for kind in blocks:
            block = nn.ModuleDict()
            if kind == "residual":
                block["a"], block["an"] = nn.Conv2d(channels, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
                block["b"], block["bn"] = nn.Conv2d(12, channels, 1), nn.BatchNorm2d(channels)
            elif kind == "preactivation":
                block["an"], block["a"] = nn.BatchNorm2d(channels), nn.Conv2d(channels, 8, 3, padding=1)
                block["bn"], block["b"] = nn.BatchNorm2d(8), nn.Conv2d(8, channels, 3, padding=1)
            elif kind == "concatenation":
                block["a"] = nn.Conv2d(channels, 6, 3, padding=1, padding_mode="reflect")
                channels += 6
            elif kind == "depthwise":
                block["a"], block["an"] = nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.BatchNorm2d(channels)
                block["b"] = nn.Conv2d(channels, channels, 1)
            elif kind == "multiplied":
                block["a"] = nn.Conv2d(channels, 2 * channels, 3, padding=1, groups=channels)
                block["b"] = nn.Conv2d(2 * channels, channels, 1)
            elif kind == "grouped":
                block["a"], block["b"] = nn.Conv2d(channels, 16, 1), nn.Conv2d(16, 24, 3, padding=1, groups=4)
                block["bn"], block["c"] = nn.BatchNorm2d(24), nn.Conv2d(24, channels, 1)
            elif kind == "gated":
                block["a"], block["p"] = nn.Conv2d(channels, 4, 1), nn.PReLU(4)
                block["b"] = nn.Conv2d(4, channels, 1)
            elif kind == "attended":
                block["a"] = nn.Conv2d(channels, 1, 3, padding=1)
            elif kind == "transposed":
                block["a"], block["b"] = nn.ConvTranspose2d(channels, 6, 2, stride=2), nn.Conv2d(6, channels, 2, stride=2)
            elif kind == "layer norm":
                block["a"], block["norm"], block["b"] = nn.Conv2d(channels, 9, 1), nn.LayerNorm(9), nn.Linear(9, channels)
            self.layers.append(block)
        self.head = nn.Sequential(nn.Linear(channels * 4, 20), nn.GELU(), nn.Linear(20, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        for kind, block in zip(self.kinds, self.layers, strict=True):
            if kind == "residual":
                x = F.relu(x + block["bn"](block["b"](F.relu(block["an"](block["a"](x))))))
            elif kind == "preactivation":
                x = x + block["b"](F.relu(block["bn"](block["a"](F.relu(block["an"](x))))))
            elif kind == "concatenation":
                x = torch.cat([x, torch.tanh(block["a"](x))], 1)
            elif kind == "depthwise":
                x = x + block["b"](F.relu6(block["an"](block["a"](x))))
            elif kind == "multiplied":
                x = x + block["b"](F.silu(block["a"](x)))
            elif kind == "grouped":
                x = x + block["c"](F.relu(block["bn"](block["b"](F.relu(block["a"](x))))))
            elif kind == "gated":
                x = x * torch.sigmoid(block["b"](block["p"](block["a"](x.mean((2, 3), keepdim=True)))))
            elif kind == "attended":
                x = torch.sigmoid(block["a"](x)) * x + torch.where(x > 0, x, 0.1 * x)
            elif kind == "transposed":
                x = x + block["b"](F.relu(block["a"](x)))
            elif kind == "layer norm":
                x = x + block["b"](F.gelu(block["norm"](block["a"](x).permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


KINDS = ["residual", "preactivation", "concatenation", "depthwise", "multiplied", "grouped", "gated", "attended", "transposed"]
KINDS += ["layer norm"]


def randomised(module: nn.Module, seed: int) -> nn.Module:
    """With norms that do something, as a trained one's."""
    generator = torch.Generator().manual_seed(seed)
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d):
            for tensor in (each.weight, each.bias, each.running_mean):
                tensor.data = torch.randn(tensor.shape, generator=generator)
            each.running_var.data = 0.5 + torch.rand(each.running_var.shape, generator=generator)
        elif isinstance(each, nn.LayerNorm):
            for tensor in (each.weight, each.bias):
                tensor.data = torch.randn(tensor.shape, generator=generator)
    return module.eval()


def with_duplicates(module: nn.Module, inputs: tuple[Tensor, ...], seed: int):
    """Units of every group made equal to others of it, at random; the groups' labels say which."""
    traced = trace(module, inputs)
    groups, refused = unit_groups(traced)
    generator = torch.Generator().manual_seed(seed)
    state, labels = dict(module.state_dict()), {}
    widths = {}
    for number, group in enumerate(groups):
        k = widths.setdefault(group.tied, max(1, group.width * 2 // 3))
        of = torch.cat([torch.arange(k), torch.randint(k, (group.width - k,), generator=generator)])
        _, inverse = of.unique(return_inverse=True)
        labels[number] = inverse
        first = torch.stack([(inverse == cluster).nonzero()[0, 0] for cluster in range(k)])[inverse]
        for axis, places in group.places.items():
            if group.roles[axis] != "in":
                lies = slice(None)
                if axis.block is not None:
                    rows = len(traced.axes[axis])
                    lies = slice(axis.block * rows, (axis.block + 1) * rows)
                part = state[axis.name][lies].movedim(axis.dim, 0)
                part[places] = part[places[first]].clone()
    return traced, groups, refused, labels


@given(blocks=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4), seed=st.integers(0, 1000), closed_form=st.booleans())
@settings(max_examples=40, deadline=None)
def test_duplicates_fold_without_loss(blocks: list[str], seed: int, closed_form: bool) -> None:
    torch.manual_seed(seed)
    module = randomised(Residual(blocks), seed)
    x = torch.randn(2, 3, 8, 8)
    traced, groups, _, labels = with_duplicates(module, (x[:1],), seed)
    before = copy.deepcopy(module.state_dict())
    folded = merge(module, traced, groups, labels, closed_form=closed_form)
    assert sum(p.numel() for p in folded.parameters()) < 0.8 * sum(p.numel() for p in module.parameters())
    expected = module(x).detach()
    assert torch.allclose(folded(x), expected, atol=1e-4 * float(expected.abs().max()))
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_groups(kind: str) -> None:
    """Nothing that could be folded is left out: every convolution is, but what is the output's or the input's."""
    module = Residual([kind]).eval()
    groups, refused = unit_groups(trace(module, (torch.zeros(1, 3, 8, 8),)))
    made = {layer for group in groups for layer in group.name.split("+")}
    layers = {name for name, each in module.named_modules() if isinstance(each, (nn.Linear, nn.modules.conv._ConvNd))}
    assert layers - made == {"head.2"} | ({"layers.0.a"} if kind == "attended" else set())  # one channel has no other
    assert refused == {"head.2": "they are the module's output"}


def test_ratio_zero_is_the_identity() -> None:
    module = randomised(Residual(KINDS), 0)
    folded, report = pyfold.fold_model(module, ratio=0.0, example_inputs=torch.zeros(1, 3, 8, 8))
    for (name, one), other in zip(module.state_dict().items(), folded.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert report.groups == []
    assert report.removed_share == 0


@pytest.mark.parametrize("repair_with", [None, "ar"])
def test_fold_and_parameters(repair_with: str | None) -> None:
    module = randomised(Residual(KINDS), 1).train()
    total = sum(p.numel() for p in module.parameters())
    x = torch.randn(1, 3, 8, 8)
    folded, report = pyfold.fold_model(module, target_params=total // 2, example_inputs=x, repair=repair_with)
    left = sum(p.numel() for p in folded.parameters())
    assert 0.4 * total < left <= total // 2
    assert (report.parameters_before, report.parameters_after) == (total, left)
    assert folded.training
    assert folded.eval()(x).isfinite().all()
    convolution = folded.layers[5]["b"]
    assert convolution.weight.shape == (convolution.out_channels, convolution.in_channels // 4, 3, 3)
    folded(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in folded.parameters())


def test_merged_channels_have_variance_one_on_white_inputs() -> None:
    """Fold-AR's scale: with white inputs a merged channel's normalised output has the variance that its members' had."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)).eval()
    x = torch.randn(64, 4, 32, 32)
    remember(module, x)
    traced = trace(module, (x[:1],))
    groups, _ = unit_groups(traced)
    labels = {0: torch.tensor([0, 1, 0, 2, 2, 2])}
    folded = merge(module, traced, groups, labels, closed_form=True)
    var = folded[1](folded[0](x)).detach().var((0, 2, 3))
    assert torch.allclose(var, torch.ones(3), atol=0.05)
    plain = merge(module, traced, groups, labels, closed_form=False)
    assert float(plain[1](plain[0](x)).detach().var((0, 2, 3)).min()) < 0.8


def test_a_stream_keeps_the_variance_that_it_will_have() -> None:
    """A BatchNorm that reads a residual stream: with white inputs it remembers the variance of the merged channels."""

    class Preactivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 6, 1, bias=False), nn.Conv2d(4, 6, 1, bias=False)
            self.norm, self.out = nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(self.a(x[:, :, ::2]) + self.b(x[:, :, 1::2])))

    torch.manual_seed(0)
    module = Preactivation().eval()
    x = torch.randn(64, 4, 32, 32)
    remember(module, x)
    traced = trace(module, (x[:1],))
    groups, _ = unit_groups(traced)
    assert [group.name for group in groups] == ["a+b"]
    folded = merge(module, traced, groups, {0: torch.tensor([0, 1, 0, 2, 2, 2])}, closed_form=True)
    remembered = folded.norm.running_var.clone()
    remember(folded, x)
    assert torch.allclose(remembered, folded.norm.running_var, rtol=0.05)


def test_a_layer_that_runs_twice() -> None:
    """Its BatchNorms differ, so its rows are not normalised, and it is not regressed on one of its inputs."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.shared, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.one, self.two = nn.BatchNorm1d(8), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.one(self.shared(torch.relu(self.a(x)))))
            return self.out(torch.relu(self.two(self.shared(x))))

    torch.manual_seed(0)
    module, x = Twice().train(), torch.randn(256, 6)
    module(x)
    module.eval()
    traced, groups, _, labels = with_duplicates(module, (x[:2],), 0)
    assert [each.producer for each in traced.normalisations] == [None, None]
    expected = module(x)
    assert torch.allclose(merge(module, traced, groups, labels, closed_form=True)(x), expected, atol=1e-4)
    folded, _ = pyfold.fold_model(module, ratio=0.5, example_inputs=x[:2], repair="data", data=x)
    assert folded(x).isfinite().all()


def test_vit_feed_forward() -> None:
    """transformers' ViT: its feed-forward units fold; what attention and LayerNorm take together stays, and is said."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    module, x = ViTForImageClassification(config).eval(), torch.randn(2, 3, 32, 32)
    folded, report = pyfold.fold_model(module, ratio=0.5, example_inputs=x[:1])
    assert [(group.width, group.folded_width) for group in report.groups] == [(64, 32)] * 2
    assert any("layer_norm" in note for note in report.notes)
    assert folded(x).logits.shape == module(x).logits.shape


class Odd(nn.Module):
    """What cannot be folded, and has to be said."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b, self.free = kind, nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 16, 1)
        self.out = nn.Conv2d(16, 12, 1)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.kind == "padded":
            x = F.pad(x, (0, 0, 0, 0, 2, 2))[:, 2:10]
        elif self.kind == "halves":
            x = torch.cat(x.chunk(2, 1)[::-1], 1)
        elif self.kind == "shuffled":
            x = x.view(-1, 2, 4, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        elif self.kind == "normalised together":
            x = self.norm(x)
        elif self.kind == "unknown":
            x = x.sort(1).values
        elif self.kind == "constant":
            x = x * torch.arange(8.0).view(8, 1, 1)
        elif self.kind == "softmax":
            x = x.softmax(1)
        elif self.kind == "written into":
            y = torch.zeros_like(x)
            y[:, :4] = x[:, 4:]
            x = y + x
        elif self.kind == "numpy":
            x = torch.from_numpy(x.detach().numpy() * 2)
        return self.out(F.relu(self.free(self.b(x))))


@pytest.mark.parametrize(
    "kind", ["padded", "halves", "shuffled", "normalised together", "unknown", "constant", "softmax", "written into", "numpy"]
)
def test_what_cannot_be_folded_is_left_alone(kind: str) -> None:
    module, x = Odd(kind).eval(), torch.randn(1, 3, 4, 4)
    folded, report = pyfold.fold_model(module, ratio=0.5, example_inputs=x)
    assert {group.name for group in report.groups} == {"b", "free"}
    assert any(note.startswith("not folded: a: ") for note in report.notes), report.notes
    assert folded(x).shape == module(x).shape


def test_a_width_written_into_forward_is_refused() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).mean((2, 3)).view(-1, 8))

    with pytest.raises(ValueError, match=r"does not run .* leave their layers out with layers="):
        pyfold.fold_model(Fixed(), ratio=0.5, example_inputs=torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either ratio= or target_params="),
        ({"ratio": 0.5, "target_params": 10}, "either ratio= or target_params="),
        ({"ratio": 1.0}, "ratio: expected at least 0 and less than 1, got 1.0"),
        ({"target_params": 3}, "target_params: 3 is less than"),
        ({"ratio": 0.5, "repair": "best"}, "repair: expected one of None, 'ar', 'dir', 'data', got 'best'"),
        ({"ratio": 0.5, "repair": "data"}, 'data: expected with repair="data"'),
        ({"ratio": 0.5, "layers": "nowhere*"}, "layers: 'nowhere\\*' matches none of stem"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pyfold.fold_model(Residual(["residual"]), example_inputs=torch.zeros(1, 3, 8, 8), **options)


def test_bad_modules() -> None:
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got str"):
        pyfold.fold_model("resnet", ratio=0.5, example_inputs=torch.zeros(1))
    with pytest.raises(ValueError, match="nothing to fold"):
        pyfold.fold_model(nn.Linear(3, 2), ratio=0.5, example_inputs=torch.zeros(1, 3))
    broken = Residual(["residual"])
    with torch.no_grad():
        broken.stem.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"stem.weight: expected finite values"):
        pyfold.fold_model(broken, ratio=0.5, example_inputs=torch.zeros(1, 3, 8, 8))
    mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="no BatchNorm with statistics to invert"):
        pyfold.fold_model(mlp, ratio=0.5, example_inputs=torch.zeros(1, 4), repair="dir")


def test_layers_by_pattern() -> None:
    module = Residual(["residual", "residual"]).eval()
    _, report = pyfold.fold_model(module, ratio=0.5, example_inputs=torch.zeros(1, 3, 8, 8), layers="layers.1.a")
    assert [(group.name, group.width, group.folded_width) for group in report.groups] == [("layers.1.a", 12, 6)]


def test_saved_and_loaded(tmp_path) -> None:
    module, x = randomised(Residual(KINDS), 2), torch.randn(2, 3, 8, 8)
    folded, _ = pyfold.fold_model(module, ratio=0.4, example_inputs=x[:1])
    pyfold.save_model(folded, tmp_path / "folded")
    loaded = pyfold.load_model(module, tmp_path / "folded")
    for (name, one), other in zip(folded.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert torch.allclose(loaded(x), folded(x), atol=1e-5)
    with pytest.raises(ValueError, match="wrong architecture"):
        pyfold.load_model(Residual(["residual"]), tmp_path / "folded")
    with pytest.raises(ValueError, match="not what save_model writes"):
        pyfold.load_model(module, tmp_path)
    (tmp_path / "folded" / "model.safetensors").write_bytes(b"\1" * 100)
    with pytest.raises(ValueError, match="not what save_model writes"):
        pyfold.load_model(module, tmp_path / "folded")


def test_exported() -> None:
    """A folded module is an ordinary one: torch.export takes it."""
    module, x = randomised(Residual(KINDS), 3), torch.randn(1, 3, 8, 8)
    folded, _ = pyfold.fold_model(module, ratio=0.4, example_inputs=x)
    program = torch.export.export(folded, (x,))
    assert torch.allclose(program.module()(x), folded(x), atol=1e-5)


@pytest.mark.parametrize("kind", ["residual", "grouped", "layer norm"])
def test_exported_to_onnx(kind: str, tmp_path: Path) -> None:
    """And ONNX's own runtime gives the same numbers, for any batch."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module, x = randomised(Residual([kind]), 3), torch.randn(2, 3, 8, 8)
    folded, _ = pyfold.fold_model(module, ratio=0.4, example_inputs=x[:1])
    batch = {0: torch.export.Dim("batch")}
    torch.onnx.export(folded, (x,), tmp_path / "net.onnx", dynamo=True, dynamic_shapes=(batch,), verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    more = torch.randn(5, 3, 8, 8)
    (found,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
    assert torch.allclose(torch.from_numpy(found), folded(more), atol=1e-4)


@pytest.fixture(scope="module")
def digits():
    """A small network trained on scikit-learn's digits; images and labels that it did not see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "bench")
        from digits_net import trained
    return trained()


def accuracy(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((module(images).argmax(1) == labels).float().mean())


def test_repairs_help(digits) -> None:
    module, images, labels = digits
    dense = accuracy(module, images, labels)
    assert dense > 0.95
    reached = {}
    for ratio in (0.5, 0.75):
        options = {"ratio": ratio, "example_inputs": images[:1]}
        folded = {
            "none": pyfold.fold_model(module, **options, repair=None)[0],
            "ar": pyfold.fold_model(module, **options, repair="ar")[0],
            "dir": pyfold.fold_model(module, **options, repair="dir", n_images=64, steps=40)[0],
            "data": pyfold.fold_model(module, **options, repair="data", data=images[:256])[0],
        }
        reached[ratio] = {name: accuracy(each, images, labels) for name, each in folded.items()}
    assert reached[0.75]["none"] < reached[0.75]["ar"] < reached[0.75]["dir"] < reached[0.75]["data"], reached
    assert reached[0.5]["none"] < reached[0.5]["dir"], reached
    assert min(reached[0.5]["dir"], reached[0.5]["data"]) > dense - 0.05, reached


def test_inversion_finds_the_statistics(digits) -> None:
    module, _, _ = digits
    seen: list[Tensor] = []
    hook = module[4].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = inversion.invert(module, (1, 8, 8), n_images=64, steps=60, seed=1)
    noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        module(found), module(noise)
    hook.remove()
    far = [((each.mean((0, 2, 3)) - module[4].running_mean) / module[4].running_var.sqrt()).abs().mean() for each in seen[-2:]]
    assert far[0] < 0.2 < far[1], far
    assert torch.equal(found, inversion.invert(module, (1, 8, 8), n_images=64, steps=60, seed=1))
    assert all(p.requires_grad for p in module.parameters())


def test_regression_on_data_that_determines_it() -> None:
    """Where folded units say all that the dense ones do, the dense output comes back."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    x = torch.randn(512, 6)
    folded, _ = pyfold.fold_model(module, ratio=0.5, example_inputs=x[:1], layers="0", repair=None)
    assert not torch.allclose(folded(x), module(x), atol=5e-2)
    target = repair.Target(module[1].weight.detach(), module[1].bias.detach(), True)
    repair.regress(module, folded, {"1": target}, x, ridge=1e-9)
    assert torch.allclose(folded(x), module(x), atol=2e-3)


def test_what_is_odd_about_images_cancels() -> None:
    """Images that are brighter than, and half as varied as, those of training: what folding did not touch is as it was, and
    what it did touch remembers what it does on images like those of training."""
    torch.manual_seed(0)
    module = nn.Sequential(
        *[nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.Conv2d(12, 4, 3)]
    )
    x = torch.randn(64, 3, 12, 12)
    remember(module, x)
    folded, _ = pyfold.fold_model(
        module, ratio=0.5, example_inputs=x[:1], layers="2", repair="data", data=0.5 * x + 0.3, compensate=False
    )
    assert torch.allclose(folded[1].running_mean, module[1].running_mean, atol=1e-5)
    assert torch.allclose(folded[1].running_var, module[1].running_var, rtol=1e-3)
    mean, var = folded[3].running_mean.clone(), folded[3].running_var.clone()
    assert not torch.allclose(mean, module[3].running_mean[:6], atol=1e-2)
    expected = copy.deepcopy(folded)
    remember(expected, x)
    assert torch.allclose(mean, expected[3].running_mean, atol=1e-2)
    assert torch.allclose(var, expected[3].running_var, rtol=1e-2)


def test_groups_cluster_together_as_they_do_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(shape, generator=generator) for shape in ((40, 9), (7, 300), (120, 33))]
    ks = [20, 7, 31]
    for x, k, found in zip(xs, ks, cluster_each(xs, ks), strict=True):
        alone = cluster(x, n_clusters=k)
        assert torch.equal(found.labels, alone.labels)
        assert (found.inertia, found.ward_inertia, found.n_moves) == (alone.inertia, alone.ward_inertia, alone.n_moves)
    assert cluster_each([], []) == []


def test_images_are_saved_as_a_grid(digits, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    module, images, _ = digits
    options = {"ratio": 0.5, "example_inputs": images[:1], "n_images": 10, "steps": 2}
    with pytest.raises(ValueError, match="save_images: expected with"):
        pyfold.fold_model(module, **options, repair="ar", save_images=tmp_path / "grid.png")
    pyfold.fold_model(module, **options, repair="dir", save_images=tmp_path / "grid.png")
    with image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (4 * 9, 3 * 9)
        assert grid.convert("L").getextrema() == (0, 255)


def test_a_bar_says_how_far_it_is(digits, capsys) -> None:
    module, images, _ = digits
    options = {"ratio": 0.5, "example_inputs": images[:1], "n_images": 10, "steps": 2}
    pyfold.fold_model(module, **options, repair="dir")
    assert capsys.readouterr().err == ""
    pyfold.fold_model(module, **options, repair="dir", progress=True)
    shown = capsys.readouterr().err
    assert "synthesising images: 100%" in shown
    assert "regressing consumers: 100%" in shown
    calls = []
    pyfold.fold_model(module, **options, repair="dir", progress=lambda *call: calls.append(call))
    assert calls[1] == (20, 20, "synthesising images, steps")
    assert calls[-1][0] == calls[-1][1]


def test_one_image_is_no_data(digits) -> None:
    module, images, _ = digits
    with pytest.raises(ValueError, match="data: expected two samples at least, got 1"):
        pyfold.fold_model(module, ratio=0.5, example_inputs=images[:1], repair="data", data=images[:1])


def test_a_module_that_fails_on_images_leaves_no_thread(digits) -> None:
    """Its error comes out, whether the dense module or the folded one raises it."""
    module, images, _ = digits
    threads = threading.active_count()
    for data in (images[:4].repeat(1, 2, 1, 1), images[:4, :, :1, :1, None]):
        with pytest.raises(RuntimeError):
            pyfold.fold_model(module, ratio=0.5, example_inputs=images[:1], repair="data", data=data)
        assert threading.active_count() == threads


class Of(nn.Module):
    """A forward function of parts."""

    def __init__(self, forward, **parts) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def conv(n_in: int, n_out: int, **options) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, padding=1, **options)


def tied_norms() -> nn.Module:
    module = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 5))
    module[4].weight = module[1].weight
    return module


def tied_biases() -> nn.Module:
    module = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 5))
    module[3].bias = module[0].bias
    return module


def shared(m, x):
    return m.c(F.relu(m.n(m.a(x))) + F.relu(m.n(m.b(x))))


def with_position(m, x):
    return m.b(F.relu(m.a(x).flatten(2).transpose(1, 2) + m.p)) + m.p.square().sum(-1).mean()


ODD = {
    "a BatchNorm of two layers": lambda: Of(shared, a=conv(3, 8), b=conv(3, 8), n=nn.BatchNorm2d(8), c=conv(8, 5)),
    "a BatchNorm twice": lambda: Of(
        lambda m, x: m.c(m.n(m.b(F.relu(m.n(m.a(x)))))), a=conv(3, 8), b=conv(8, 8), n=nn.BatchNorm2d(8), c=conv(8, 5)
    ),
    "two BatchNorms of one weight": tied_norms,
    "two layers of one bias": tied_biases,
    "shuffled": lambda: nn.Sequential(conv(3, 8), nn.ChannelShuffle(2), conv(8, 5)),
    "rolled": lambda: Of(lambda m, x: m.b(m.a(x).roll(3, 1)), a=conv(3, 8), b=conv(8, 5)),
    "rolled in space": lambda: Of(lambda m, x: m.b(F.relu(m.a(x).roll(3, 2))), a=conv(3, 8), b=conv(8, 5)),
    "a weight both ways": lambda: Of(
        lambda m, x: F.conv_transpose2d(F.relu(m.a(x)), m.a.weight) + m.b(F.relu(m.a(x))).mean(), a=conv(3, 8), b=conv(8, 5)
    ),
    "a parameter used whole": lambda: Of(with_position, a=conv(3, 8), b=nn.Linear(8, 5), p=nn.Parameter(torch.randn(1, 64, 8))),
    "a scalar": lambda: Of(
        lambda m, x: m.b(F.relu(m.a(x)) * torch.sigmoid(m.g).exp() * torch.tensor(2.0)) / x.max(),
        a=conv(3, 8),
        b=conv(8, 5),
        g=nn.Parameter(torch.ones(())),
    ),
    "InstanceNorm": lambda: nn.Sequential(conv(3, 8), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), conv(8, 5)),
    "normalised along channels": lambda: Of(lambda m, x: m.b(F.normalize(m.a(x), dim=1)), a=conv(3, 8), b=conv(8, 5)),
    "a call that no rule knows": lambda: Of(
        lambda m, x: m.b(m.a(x) * m.a(x).mean(axis=1, keepdim=True) + x.var((2, 3), True, True).mean()),
        a=conv(3, 8),
        b=conv(8, 5),
    ),
    "depthwise": lambda: nn.Sequential(
        *[conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8, groups=8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 5)]
    ),
}


@pytest.mark.parametrize("closed_form", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_duplicates_in_odd_modules_fold_without_loss_or_not_at_all(name: str, closed_form: bool) -> None:
    torch.manual_seed(0)
    module = randomised(ODD[name](), 0)
    x = torch.randn(2, 3, 8, 8)
    traced, groups, refused, labels = with_duplicates(module, (x[:1],), 0)
    assert groups or refused
    folded = merge(module, traced, groups, labels, closed_form=closed_form)
    expected = module(x).detach()
    assert torch.allclose(folded(x), expected, atol=1e-4 * float(expected.abs().max()))
    if name in ("rolled in space", "a scalar", "InstanceNorm", "depthwise"):
        assert groups


def repaired(module: nn.Module, x: Tensor, **options) -> nn.Module:
    return pyfold.fold_model(module, ratio=0.25, example_inputs=x[:1], repair="data", data=x, **options)[0]


def test_what_a_module_does_in_place_changes_nothing() -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 3, 8, 8)
    parts = {"a": conv(3, 8), "n": nn.BatchNorm2d(8), "b": conv(8, 8), "s": conv(8, 8, bias=False), "c": conv(8, 5)}
    outputs = []
    for inplace in (False, True):

        def forward(m, x, inplace=inplace):
            x = x.div_(3) if inplace else x / 3
            h = m.n(m.a(x))
            s = m.s(h)
            h = F.relu(h, inplace=inplace)
            h = h.add_(s) if inplace else h + s
            return m.c(F.relu(m.b(h), inplace=inplace))

        before = x.clone()
        folded = repaired(randomised(Of(forward, **copy.deepcopy(parts)), 0), x)
        assert torch.equal(x, before)
        outputs.append(folded(x.clone()))
    assert torch.allclose(*outputs, atol=1e-5)


@torch.no_grad()
def test_modules_of_other_types_and_far_from_zero() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    module = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    module[0].bias.data += 4
    dense = module(x)
    assert float((repaired(module, x)(x) - dense).square().mean()) < 0.2 * float(dense.var())
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        folded = repaired(copy.deepcopy(module).to(dtype), x.to(dtype))
        assert {each.dtype for each in folded.parameters()} == {dtype}
        assert float((folded(x.to(dtype)).float() - dense).square().mean()) < 0.2 * float(dense.var())


def test_a_folded_module_that_runs_other_layers_is_refused() -> None:
    """Not waited for for ever."""
    torch.manual_seed(0)
    calls = []

    def forward(m, x):
        calls.append(m.a.out_features)
        h = F.relu(m.a(x))
        return m.b(h) if m.a.out_features == 8 else m.b(h) + m.c(h)

    x = torch.randn(8, 4)
    module = Of(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 3), c=nn.Linear(8, 3))
    traced = trace(module, (x[:1],))
    assert "c.weight" not in {axis.name for axis in traced.axes}
    target = repair.Target(module.c.weight.detach(), module.c.bias.detach(), True)
    folded = copy.deepcopy(module)
    folded.function = lambda m, x: m.c(F.relu(m.a(x)))
    with pytest.raises(ValueError, match="c runs in the folded module where nothing does in the dense one"):
        repair.regress(module, folded, {"c": target}, x)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"repair": "dir", "n_images": 1}, "n_images, steps: expected at least 2 and 1"),
        ({"repair": "dir", "steps": 0}, "n_images, steps: expected at least 2 and 1"),
        ({"repair": "data", "data": [()]}, "data: expected a tensor, or batches"),
        ({"repair": "data", "data": torch.full((4, 1, 8, 8), float("nan"))}, "data: expected finite"),
        ({"example_inputs": {"x": 1}}, "example_inputs: expected a tensor, or a sequence"),
    ],
)
def test_options_out_of_range(digits, options, said: str) -> None:
    module, images, _ = digits
    with pytest.raises((ValueError, TypeError), match=said):
        pyfold.fold_model(module, **{"ratio": 0.5, "example_inputs": images[:1], **options})


def test_layers_that_are_not_regressed_are_named() -> None:
    convolutions = [nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3)]
    module = nn.Sequential(*convolutions, nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)).eval()
    x = torch.randn(9, 3, 8)
    report = pyfold.fold_model(module, ratio=0.5, example_inputs=x[:2], repair="data", data=x)[1]
    assert "not regressed: 3: only nn.Linear, and nn.Conv2d without groups, are" in report.notes
