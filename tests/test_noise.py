"""The function metric without text: exact symmetries, and what is assumed of a layer's input."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, load, logits, prompt, tiny_checkpoint, tiny_model, tree

from pyfold import fold_checkpoint
from pyfold.families.noise import Noise
from pyfold.function_metric import moments
from pyfold.io.checkpoint import open_checkpoint


def moved(model: Any, seed: int = 0) -> Any:
    """The same model with scale and sign moved from down to up, unit by unit, and the gain of the norm into gate and up."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer in model.model.layers:
            mlp, norm = layer.mlp, layer.post_attention_layernorm
            n = mlp.up_proj.out_features
            scale = torch.exp(torch.randn(n, generator=generator)) * torch.randn(n, generator=generator).sign()
            mlp.up_proj.weight.mul_(scale[:, None])
            if mlp.up_proj.bias is not None:
                mlp.up_proj.bias.mul_(scale)
            mlp.down_proj.weight.div_(scale)
            for producer in (mlp.gate_proj, mlp.up_proj):
                producer.weight.mul_(norm.weight)
            norm.weight.fill_(1.0)
    return model


MODELS = [(family, {}) for family in FAMILIES] + [("llama", {"mlp_bias": True, "attention_bias": True})]
IDS = [*FAMILIES, "llama-biases"]


@pytest.mark.parametrize(("family", "options"), MODELS, ids=IDS)
def test_symmetries_are_exact(family: str, options: dict[str, Any]) -> None:
    model = tiny_model(family, **options)
    expected, found = logits(model.double(), prompt()), logits(moved(model), prompt())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("repair", ["none", "ridge"])
@pytest.mark.parametrize(("family", "options"), MODELS, ids=IDS)
def test_a_fold_does_not_see_them(family: str, options: dict[str, Any], repair: str, tmp_path: Path) -> None:
    """Whatever the scale and sign of up, wherever the gain: the same units stay, and the result says the same."""
    model = tiny_model(family, **options)
    said = []
    for name, one in (("plain", model), ("moved", moved(model))):
        one.save_pretrained(tmp_path / name)
        fold_checkpoint(
            tmp_path / name,
            tmp_path / f"{name}-folded",
            ratio=0.25,
            metric="function",
            calibration="none",
            repair=repair,
            backend="cpu:avx2",
        )
        said.append(logits(load(tmp_path / f"{name}-folded"), prompt()))
    assert not torch.allclose(said[0], logits(model, prompt()), atol=1e-2)
    torch.testing.assert_close(said[1], said[0], rtol=1e-3, atol=1e-3)


def test_noise_is_white_behind_its_gain(tmp_path: Path) -> None:
    """Units say of it what they say of N(0, diag(g²)): their second moments, against samples of another seed, in fp64."""
    folder = tiny_checkpoint(tmp_path / "src", hidden_size=256, width=40)
    checkpoint = open_checkpoint(folder)
    noise = Noise(checkpoint, 5, torch.float32)  # not the seed of the weights
    mlp = load(folder).model.layers[1].mlp.double()
    gain = load(folder).model.layers[1].post_attention_layernorm.weight.double()
    weights = {f"model.layers.1.mlp.{name}": tensor.float() for name, tensor in mlp.state_dict().items()}
    seen = moments((noise.mlp(1, weights).units(x) for x in noise.inputs(1)), "auto")
    n = sum(x.shape[:2].numel() for x in noise.inputs(1))
    x = gain * torch.randn(1 << 16, 256, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        h = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    expected = h.T @ h / len(h)
    found = (seen.fitted + seen.held_out).double() / n
    scale = expected.diagonal().sqrt()
    off = ((found - expected) / scale / scale[:, None]).abs()
    assert float(off.mean()) < 0.05
    assert float((found.diagonal() / expected.diagonal()).mean()) == pytest.approx(1, abs=0.03)


def test_units_that_differ_by_a_symmetry_are_one(tmp_path: Path) -> None:
    """Copies of units, scaled and turned between up and down, fold without loss; by their weights they do not."""
    model = tiny_model("llama", width=48)
    with torch.no_grad():
        for layer in model.model.layers:
            mlp = layer.mlp
            scale = torch.linspace(-3, 3, 24)
            mlp.gate_proj.weight[24:] = mlp.gate_proj.weight[:24]
            mlp.up_proj.weight[24:] = mlp.up_proj.weight[:24] * scale[:, None]
            mlp.down_proj.weight[:, 24:] = mlp.down_proj.weight[:, :24] / scale
    model.save_pretrained(tmp_path / "src")
    expected = logits(model, prompt())
    off = {}
    for metric in ("weight", "function"):
        fold_checkpoint(
            tmp_path / "src", tmp_path / metric, width=24, metric=metric, calibration="none", repair="none", backend="cpu:avx2"
        )
        off[metric] = float((logits(load(tmp_path / metric), prompt()) - expected).abs().max())
    assert off["function"] < 1e-3 < 0.1 < off["weight"], off


def test_the_same_bytes_and_no_text(tmp_path: Path) -> None:
    """A checkpoint without a tokenizer; nothing is kept beside the result."""
    source = tiny_checkpoint(tmp_path / "src", mlp_bias=True)
    folds = []
    for name in "ab":
        fold_checkpoint(source, tmp_path / name, ratio=0.25, metric="function", calibration="none", seed=3)
        folds.append(tree(tmp_path / name))
    assert folds[0] == folds[1]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "b", "src"]
    options = json.loads((tmp_path / "a" / "pyfold.json").read_text())["options"]
    assert (options["calibration"], options["seed"]) == ("none", 3)
    assert "on Gaussian noise" in (tmp_path / "a" / "README.md").read_text()
