"""Repair of the weight metric without text: every folded layer's output keeps its variance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    FAMILIES,
    check_refused,
    load,
    patch_json,
    run_cli,
    stop_before,
    tensors_of,
    tiny_checkpoint,
    tree,
    write_synthetic,
)
from emulated_gpu import EmulatedGpu
from test_budget import OPTIONS, least

from pyfold import fold_checkpoint
from pyfold.errors import PyfoldError
from pyfold.families import FoldGroup
from pyfold.function_fold import UnitsFold
from pyfold.pipeline import prepare
from pyfold.variance import Sketch
from pyfold.weight_fold import WeightFold

GROUP = FoldGroup("mlp", 0, 0, "intermediate_size", ("gate.weight", "up.weight"), ("down",), ("up.bias",), "gain", "silu")


def ratio_of(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, labels: torch.Tensor, **more: torch.Tensor) -> float:
    sketch = Sketch(GROUP, more.pop("gain", torch.ones(gate.shape[1])), "auto")
    for name, values in {"gate.weight": gate, "up.weight": up, "down": down}.items():
        sketch.add(name, values, 0)
    for name, values in more.items():
        sketch.add(name.replace("_", "."), values[:, None], 0)
    return sketch.ratio(labels, int(labels.max()) + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_planted_pairs_lose_half(dtype: torch.dtype) -> None:
    """Pairs gate alike, and up rows and down columns of the two have nothing in common: E[silu² (u + u')²/4] |d + d'|² over
    E[silu²] (E[u²] |d|² + E[u'²] |d'|²) = 1/2, whatever the gain where neither gate nor up sees two features alike."""
    generator = torch.Generator().manual_seed(3)
    gate, up = torch.zeros(2, 128, 768)
    signs = torch.randint(0, 2, (128, 256), generator=generator) * 2.0 - 1
    gate[:, :256] = signs[:64].repeat(2, 1)
    up[:64, 256:512], up[64:, 512:] = signs[64:], signs[:64]
    down = torch.randn(768, 128, generator=generator)
    labels = torch.arange(64).repeat(2)
    found = ratio_of(gate.to(dtype), up.to(dtype), down.to(dtype), labels, gain=torch.full((768,), 1 / 16))
    assert found == pytest.approx(0.5, rel=0.05)


def test_what_folds_without_loss_loses_no_variance() -> None:
    generator = torch.Generator().manual_seed(3)
    gate, up = torch.randn(2, 20, 600, generator=generator).repeat(1, 2, 1)
    down, bias = torch.randn(600, 40, generator=generator), torch.randn(20, generator=generator).repeat(2)
    assert ratio_of(gate, up, down, torch.arange(20).repeat(2), up_bias=bias) == pytest.approx(1, abs=1e-6)
    assert ratio_of(gate, up, down, torch.arange(40), up_bias=bias) == 1


def output_variance(model: Any, layer: int) -> float:
    """Of what a layer adds to the stream, on Gaussian inputs to its norm."""
    block = model.model.layers[layer]
    x = torch.randn(4096, block.mlp.gate_proj.in_features, generator=torch.Generator().manual_seed(9))
    with torch.inference_mode():
        return float(block.mlp(block.post_attention_layernorm(x)).double().var(0).sum())


MODELS = [(family, {}) for family in FAMILIES] + [("llama", {"mlp_bias": True})]


@pytest.mark.parametrize(("family", "options"), MODELS, ids=[*FAMILIES, "biases"])
def test_every_layer_keeps_its_variance(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "src", family, hidden_size=192, width=300, **options)
    kept: dict[str, list[float]] = {}
    for repair in ("none", "variance"):
        report = fold_checkpoint(source, tmp_path / repair, ratio=0.4, repair=repair)
        models = load(source), load(tmp_path / repair)
        before, after = ([output_variance(model, layer) for layer in range(3)] for model in models)
        kept[repair] = [a / b for a, b in zip(after, before, strict=True)]
    print(kept)
    assert max(kept["none"]) < 0.8
    assert kept["variance"] == pytest.approx([1] * 3, abs=0.05)
    assert [group.output_variance for group in report.groups] == pytest.approx(kept["none"], rel=0.05)


def test_no_unit_removed_changes_no_bit(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "src", dtype=torch.bfloat16, mlp_bias=True)
    fold_checkpoint(source, tmp_path / "dst", ratio=0, repair="variance")
    before, after = tensors_of(source), tensors_of(tmp_path / "dst")
    assert all(torch.equal(before[name].view(torch.int16), after[name].view(torch.int16)) for name in before)


def test_only_the_consumer_is_scaled(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "src")
    for repair in ("none", "variance"):
        report = fold_checkpoint(source, tmp_path / repair, ratio=0.25, repair=repair)
    none, scaled = (tensors_of(tmp_path / repair) for repair in ("none", "variance"))
    for name, tensor in none.items():
        layer = int(name.split(".")[2]) if "down_proj" in name else None
        scale = 1.0 if layer is None else report.groups[layer].output_variance ** -0.5
        torch.testing.assert_close(scaled[name], tensor * scale, rtol=1e-5, atol=1e-7)
    record = json.loads((tmp_path / "variance" / "pyfold.json").read_text())
    assert record["options"]["repair"] == "variance"
    assert record["groups"][0]["output_variance"] == report.groups[0].output_variance


@pytest.mark.parametrize("slow", ["up", "kernels", "down"])
def test_the_result_does_not_depend_on_how_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
    """Weights whole or in pieces, G in memory or in strips, the threads; and on a GPU, emulated, the same numbers."""
    source = write_synthetic(tmp_path / "src", 1, 2100, 2200)
    monkeypatch.setattr("pyfold.pipeline.rss_bytes", lambda: 0)
    options: dict[str, Any] = {"ratio": 0.25, "repair": "variance"}
    fold_checkpoint(source, tmp_path / "whole", **options)
    with pytest.raises(PyfoldError) as refused:
        prepare(source, ratio=0.25, host_memory="1MiB", repair="variance", **OPTIONS)
    for more in (0, 24 << 20):
        memory = least(str(refused.value)) + more
        cut = prepare(source, ratio=0.25, host_memory=memory, repair="variance", **OPTIONS).budget.groups["layers.0.mlp"]
        assert cut.features
        torch.set_num_threads(1)
        fold_checkpoint(source, tmp_path / str(more), host_memory=memory, **options)
        torch.set_num_threads(2)
        assert tree(tmp_path / str(more)) == tree(tmp_path / "whole")
    gpu = EmulatedGpu(slow, monkeypatch)
    fold_checkpoint(source, tmp_path / "gpu", device="cuda", **options)
    hashes = [json.loads((tmp_path / name / "pyfold.json").read_text())["sha256"] for name in ("gpu", "whole")]
    assert hashes[0] == hashes[1]
    assert gpu.taken == 0


def test_bad_input(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "src")
    for options, words in (
        (["--metric", "function"], "repair: expected ridge or none of metric function, got 'variance'"),
        ([], "repair variance knows hidden_act silu and gelu, not 'relu6'"),
    ):
        if not options:
            patch_json(source / "config.json", hidden_act="relu6")
        done = run_cli("fold", source, tmp_path / "dst", "--ratio", "0.25", "--repair", "variance", *options)
        check_refused(done.returncode, done.stderr, [words])


@pytest.mark.parametrize(
    ("fold", "options"),
    [
        (WeightFold, {"repair": "variance"}),
        (UnitsFold, {"metric": "function", "calibration": "none"}),
    ],
    ids=["variance", "noise"],
)
def test_it_goes_on_where_it_was_stopped(
    fold: Any, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_checkpoint(tmp_path / "src")
    fold_checkpoint(source, tmp_path / "expected", ratio=0.25, **options)
    begun = stop_before(fold, 2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        fold_checkpoint(source, tmp_path / "dst", ratio=0.25, **options)
    fold_checkpoint(source, tmp_path / "dst", ratio=0.25, **options)
    assert tree(tmp_path / "dst") == tree(tmp_path / "expected")
    assert 3 < len(begun) < 6, "what was on the disk is not folded again"
