"""A fold through a GPU that is emulated, by the CUDA kernels themselves, compiled for the host: strips, panels, clustering."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tensors_of, tiny_checkpoint, tree
from emulated_gpu import EmulatedGpu
from test_budget import least
from test_cuda_backend import backend, on_host, pytestmark  # noqa: F401

from pyfold import fold_checkpoint
from pyfold.errors import PyfoldError
from pyfold.ops import cuda


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_fold_by_the_cuda_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """In several panels of features and of rows: the clusters of the reference, its values within rounding."""
    source = tiny_checkpoint(tmp_path / "src", dtype=dtype, width=100, n_layers=2, mlp_bias=True)
    reference = fold_checkpoint(source, tmp_path / "reference", ratio=0.25, backend="reference", dtype="float32")
    monkeypatch.setattr(cuda, "PANEL", 32)  # rows
    for features in ("pyfold.device.PANEL", "pyfold.gpu_budget.PANEL"):
        monkeypatch.setattr(features, 16)
    EmulatedGpu("kernels", monkeypatch, cuda)

    def fold(name: str, memory: int | str | None) -> list[str]:
        report = fold_checkpoint(
            source, tmp_path / name, ratio=0.25, dtype="float32", device="cuda", gpu_memory=memory, overwrite=True
        )
        for group, exact in zip(report.groups, reference.groups, strict=True):
            assert group.inertia == pytest.approx(exact.inertia, rel=1e-5)
        expected = tensors_of(tmp_path / "reference")
        for tensor, values in tensors_of(tmp_path / name).items():
            torch.testing.assert_close(values, expected[tensor], rtol=1e-5, atol=1e-5)
        return report.backend

    with pytest.raises(PyfoldError) as refused:
        fold("none", "1MiB")
    fewest = least(str(refused.value))
    assert fold("whole", None) == "reference", "all of it on the device"
    assert fold("strips", fewest).startswith("reference+cpu")
    assert fold("higher", fewest + 12 * 1024).startswith("reference+cpu")
    assert tree(tmp_path / "strips") == tree(tmp_path / "higher")
