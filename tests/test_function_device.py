"""The function metric on a GPU, without one: the host's numbers, no tensor in the wrong place, the memory planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tensors_of, tiny_checkpoint, with_tokenizer
from emulated_gpu import EmulatedGpu
from emulated_tensors import emulated
from test_budget import least
from test_function_forecast import OPTIONS as FUNCTION
from test_function_forecast import llama_7b

from pyfold import fold_checkpoint, function_budget
from pyfold.errors import PyfoldError
from pyfold.forecast import forecast
from pyfold.gpu_budget import FUNCTION_OVERHEAD
from pyfold.pipeline import prepare
from pyfold.report import forecast_table

LEVEL = "baseline"
OPTIONS = FUNCTION | {"backend": f"cpu:{LEVEL}"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(tiny_checkpoint(tmp_path_factory.mktemp("source") / "src"))


@pytest.mark.parametrize("options", [{}, {"allocate": "auto"}, {"calibration": "none"}, {"repair": "none"}], ids=str)
def test_a_fold_on_a_gpu(source: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"metric": "function", "ratio": 0.25, **options}
    fold_checkpoint(source, tmp_path / "host", backend=f"cpu:{LEVEL}", **given)
    with emulated(monkeypatch, LEVEL):
        report = fold_checkpoint(source, tmp_path / "gpu", device="cuda", backend=f"cpu:{LEVEL}", **given)
    assert report.gpu
    assert 0 < report.gpu.peak < report.gpu.planned == 1 << 30
    expected, found = (tensors_of(tmp_path / name) for name in ("host", "gpu"))
    assert found.keys() == expected.keys()
    for name, values in found.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("shapes", "given"),
    [
        ({"width": 1000, "hidden_size": 256}, {}),
        ({"width": 900, "hidden_size": 512}, {"allocate": "auto"}),
        ({"width": 3000, "hidden_size": 64}, {"calibration": "none"}),
    ],
    ids=["gradients", "survey", "noise"],
)
def test_memory_of_a_gpu_is_as_planned(
    shapes: dict[str, int], given: dict[str, Any], whole_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = with_tokenizer(tiny_checkpoint(tmp_path / "src", **shapes))
    options = {"calibration": whole_text, **given}
    with emulated(monkeypatch, LEVEL) as gpu:
        prepared = prepare(source, ratio=0.25, host_memory=None, device="cuda", **OPTIONS | options)
        processor, checkpoint = prepared.processor, prepared.checkpoint
        needs = [prepared.budget.gpu_peak - FUNCTION_OVERHEAD]
        if prepared.text != "none":
            needs.append(function_budget.gradients(checkpoint, processor, processor.room()))
        if prepared.auto:
            groups = [group for group, _ in prepared.plan.groups]
            needs.append(function_budget.survey(checkpoint, groups, processor, processor.room()))
        same = {"metric": "function", "backend": f"cpu:{LEVEL}", **options}
        fold_checkpoint(source, tmp_path / "dst", ratio=0.25, device="cuda", **same)
    print(f"{gpu.peak() / 2**20:.1f} of {max(needs) / 2**20:.1f} MiB; planned {[round(n / 2**20, 1) for n in needs]}")
    attends = prepared.text != "none"
    assert 0.6 * max(needs) <= gpu.peak() <= (1.15 if attends else 1) * max(needs), "attention is not fused there"


def test_llama_7b_fits_in_4_gib_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With products in bf16, as they are there."""
    EmulatedGpu("up", monkeypatch)
    monkeypatch.setattr("pyfold.ops.product_dtype", lambda backend: torch.bfloat16)
    source = llama_7b(tmp_path / "src")
    given: dict[str, Any] = {"ratio": 0.2, "device": "cuda", "host_memory": "4GiB", **OPTIONS}
    found = forecast(prepare(source, gpu_memory="4GiB", **given))
    print(forecast_table(found))
    assert [phase.name for phase in found.phases] == ["writing text", "gradients", "folding"]
    assert all(phase.gpu_memory <= 4 << 30 for phase in found.phases if phase.gpu_memory)
    assert found.gpu_peak == max(phase.gpu_memory for phase in found.phases if phase.gpu_memory) > 2 << 30
    assert found.peak < 3 << 30
    with pytest.raises(PyfoldError, match=r"gpu_memory: layers\.0\.mlp needs at least") as refused:
        prepare(source, gpu_memory="1GiB", **given)
    at_least = prepare(source, gpu_memory=least(str(refused.value)), **given)
    with pytest.raises(PyfoldError, match=r"gpu_memory: writing calibration text takes at least .* give a text with"):
        forecast(at_least)
    with pytest.raises(PyfoldError, match="heads_ratio: heads are folded on the CPU, got device cuda"):
        prepare(source, heads_ratio=0.5, **given)
