"""The C++ kernels of ``pyfold._C``: validated tensors to addresses. Every op runs on ``torch.get_num_threads()`` threads and
gives the same bits on any number of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pyfold.ops import Joins

try:
    from pyfold import _C

    _import_error: str | None = None
except ImportError as error:
    _import_error = f"the extension pyfold._C is not built ({error}); run pip install ."

_DTYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def unavailable() -> str | None:
    """Why this backend cannot run, or None."""
    return _import_error


def simd_levels() -> list[str]:
    """SIMD levels that this build has and this CPU runs, best first."""
    return list(_C.simd_levels())


class CpuBackend:
    """The ops of :mod:`pyfold.ops` at one SIMD level."""

    def __init__(self, simd: str) -> None:
        self.simd = simd

    def gram(self, x: Tensor, out: Tensor, accumulate: bool, transposed: bool) -> None:
        if not accumulate:
            out.zero_()
        d, n = x.shape if transposed else x.shape[::-1]
        threads = torch.get_num_threads()
        stride = x.stride(0) if x.shape[0] > 1 else x.shape[1]
        _C.gram(self.simd, x.data_ptr(), _DTYPE[x.dtype], n, d, stride, transposed, out.data_ptr(), threads)
        _C.mirror(self.simd, out.data_ptr(), n, threads)

    def ward(self, gram: Tensor, n_clusters: int, weights: Tensor) -> Joins:
        from pyfold.ops import Joins

        n = gram.shape[0]
        lo = torch.empty(n - n_clusters, dtype=torch.int64)
        hi = torch.empty_like(lo)
        height = torch.empty(n - n_clusters, dtype=torch.float64)
        _C.ward(
            self.simd,
            gram.data_ptr(),
            n,
            n_clusters,
            weights.data_ptr(),
            lo.data_ptr(),
            hi.data_ptr(),
            height.data_ptr(),
            torch.get_num_threads(),
        )
        return Joins(lo, hi, height)

    def hartigan(self, gram: Tensor, labels: Tensor, n_clusters: int, weights: Tensor, max_moves: int) -> tuple[Tensor, Tensor]:
        labels = labels.clone()
        gains = _C.hartigan(
            self.simd,
            gram.data_ptr(),
            gram.shape[0],
            n_clusters,
            labels.data_ptr(),
            weights.data_ptr(),
            max_moves,
            torch.get_num_threads(),
        )
        return labels, torch.tensor(gains, dtype=torch.float64)

    def merge_rows(self, x: Tensor, labels: Tensor, n_clusters: int, weights: Tensor | None, out: Tensor) -> None:
        offsets, members = _clusters(labels, n_clusters)
        _C.merge_rows(
            self.simd,
            x.data_ptr(),
            _DTYPE[x.dtype],
            x.shape[1],
            x.stride(0),
            n_clusters,
            offsets.data_ptr(),
            members.data_ptr(),
            0 if weights is None else weights.data_ptr(),
            out.data_ptr(),
            _DTYPE[out.dtype],
            torch.get_num_threads(),
        )

    def merge_columns(self, x: Tensor, labels: Tensor, n_clusters: int, scale: Tensor | None, out: Tensor) -> None:
        offsets, members = _clusters(labels, n_clusters)
        _C.merge_columns(
            self.simd,
            x.data_ptr(),
            _DTYPE[x.dtype],
            x.shape[0],
            x.shape[1],
            x.stride(0),
            n_clusters,
            offsets.data_ptr(),
            members.data_ptr(),
            0 if scale is None else scale.contiguous().data_ptr(),
            out.data_ptr(),
            _DTYPE[out.dtype],
            torch.get_num_threads(),
        )

    def first_nonfinite(self, x: Tensor) -> int | None:
        index = _C.first_nonfinite(self.simd, x.data_ptr(), _DTYPE[x.dtype], x.numel(), torch.get_num_threads())
        return None if index < 0 else index


def _clusters(labels: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
    """Compressed sparse rows of a partition: offsets (K + 1,) and the members of each cluster in ascending order."""
    labels = labels.contiguous()
    offsets, members = torch.empty(n_clusters + 1, dtype=torch.int64), torch.empty_like(labels)
    _C.sort_labels(labels.data_ptr(), len(labels), n_clusters, offsets.data_ptr(), members.data_ptr())
    return offsets, members
