"""The C++ kernels of ``pyfold._C``: validated tensors to addresses. Every op runs on ``torch.get_num_threads()`` threads and
gives the same bits on any number of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pyfold.ops.gram_file import GramFile

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

    def gram(self, xs: list[Tensor], outs: list[Tensor], accumulate: bool, transposed: bool) -> None:
        problems = []
        for x, out in zip(xs, outs, strict=True):
            d, n = x.shape if transposed else x.shape[::-1]
            problems.append((x.data_ptr(), _DTYPE[x.dtype], n, len(out), d, _row_stride(x), out.data_ptr()))
        _C.gram(self.simd, problems, accumulate, transposed, torch.get_num_threads())

    def ward(self, grams: list[Tensor], n_clusters: list[int], weights: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        joins = [_no_joins(len(g) - k) for g, k in zip(grams, n_clusters, strict=True)]
        problems = [
            (g.data_ptr(), len(g), k, w.data_ptr(), *(t.data_ptr() for t in made))
            for g, k, w, made in zip(grams, n_clusters, weights, joins, strict=True)
        ]
        _C.ward(self.simd, problems, torch.get_num_threads())
        return joins

    def ward_file(
        self, grams: list[GramFile], n_clusters: list[int], weights: list[Tensor]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        joins = [_no_joins(len(g) - k) for g, k in zip(grams, n_clusters, strict=True)]
        for g, k, w, made in zip(grams, n_clusters, weights, joins, strict=True):
            lo, hi, height = (t.data_ptr() for t in made)
            with g.scratch() as rows:
                _C.ward_file(self.simd, _file(g), rows.fileno(), k, w.data_ptr(), lo, hi, height, torch.get_num_threads())
        return joins

    def lloyd(
        self, grams: list[Tensor], labels: list[Tensor], n_clusters: list[int], weights: list[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        problems, moved = [], []
        for g, given, k, w in zip(grams, labels, n_clusters, weights, strict=True):
            moved.append((torch.empty_like(given), torch.empty(len(g), dtype=torch.float32, device="cpu")))
            problems.append((g.data_ptr(), len(g), k, given.data_ptr(), w.data_ptr(), *(t.data_ptr() for t in moved[-1])))
        _C.lloyd(self.simd, problems, torch.get_num_threads())
        return moved

    def hartigan(
        self, grams: list[Tensor], labels: list[Tensor], n_clusters: list[int], weights: list[Tensor], max_moves: int
    ) -> list[tuple[Tensor, Tensor]]:
        refined = [given.clone() for given in labels]
        problems = [
            (g.data_ptr(), len(g), k, moved.data_ptr(), w.data_ptr())
            for g, moved, k, w in zip(grams, refined, n_clusters, weights, strict=True)
        ]
        gains = _C.hartigan(self.simd, problems, max_moves, torch.get_num_threads())
        return [
            (moved, torch.tensor(gain, dtype=torch.float64, device="cpu")) for moved, gain in zip(refined, gains, strict=True)
        ]

    def hartigan_file(
        self, grams: list[GramFile], labels: list[Tensor], n_clusters: list[int], weights: list[Tensor], max_moves: int
    ) -> list[tuple[Tensor, Tensor]]:
        refined = []
        for g, given, k, w in zip(grams, labels, n_clusters, weights, strict=True):
            moved = given.clone()
            threads = torch.get_num_threads()
            gains = _C.hartigan_file(self.simd, _file(g), k, moved.data_ptr(), w.data_ptr(), max_moves, threads)
            refined.append((moved, torch.tensor(gains, dtype=torch.float64, device="cpu")))
        return refined

    def assign(self, xs: list[Tensor], centroids: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        problems, nearest = [], []
        for x, means in zip(xs, centroids, strict=True):
            nearest.append(
                (torch.empty(len(x), dtype=torch.int64, device="cpu"), torch.empty(len(x), dtype=torch.float32, device="cpu"))
            )
            points = (x.data_ptr(), _DTYPE[x.dtype], *x.shape, _row_stride(x))
            problems.append((*points, means.data_ptr(), len(means), *(t.data_ptr() for t in nearest[-1])))
        _C.assign(self.simd, problems, torch.get_num_threads())
        return nearest

    def update(
        self, xs: list[Tensor], labels: list[Tensor], n_clusters: list[int], weights: list[Tensor | None]
    ) -> list[Tensor]:
        means = [torch.empty((k, x.shape[1]), dtype=torch.float32, device="cpu") for x, k in zip(xs, n_clusters, strict=True)]
        for problem in zip(xs, labels, n_clusters, weights, means, strict=True):
            self.merge_rows(*problem)
        return means

    def merge_rows(self, x: Tensor, labels: Tensor, n_clusters: int, weights: Tensor | None, out: Tensor) -> None:
        labels = labels.contiguous()
        _C.merge_rows(
            self.simd,
            x.data_ptr(),
            _DTYPE[x.dtype],
            x.shape[0],
            x.shape[1],
            x.stride(0),
            labels.data_ptr(),
            n_clusters,
            0 if weights is None else weights.data_ptr(),
            out.data_ptr(),
            _DTYPE[out.dtype],
            torch.get_num_threads(),
        )

    def merge_columns(self, x: Tensor, labels: Tensor, n_clusters: int, scale: Tensor | None, out: Tensor) -> None:
        labels = labels.contiguous()
        scale = None if scale is None else scale.contiguous()
        _C.merge_columns(
            self.simd,
            x.data_ptr(),
            _DTYPE[x.dtype],
            x.shape[0],
            x.shape[1],
            x.stride(0),
            labels.data_ptr(),
            n_clusters,
            0 if scale is None else scale.data_ptr(),
            out.data_ptr(),
            _DTYPE[out.dtype],
            torch.get_num_threads(),
        )

    def first_nonfinite(self, x: Tensor) -> int | None:
        index = _C.first_nonfinite(self.simd, x.data_ptr(), _DTYPE[x.dtype], x.numel(), torch.get_num_threads())
        return None if index < 0 else index


def gather(gram: GramFile, rows: Tensor, columns: Tensor) -> Tensor:
    """(len(rows), len(columns)) entries of a matrix in a file; columns ascending."""
    out = torch.empty((len(rows), len(columns)), dtype=torch.float32, device="cpu")
    rows, columns = rows.contiguous(), columns.contiguous()
    _C.gather_file(_file(gram), rows.data_ptr(), len(rows), columns.data_ptr(), len(columns), out.data_ptr())
    return out


def _file(gram: GramFile) -> tuple[int, int, str, int, int]:
    return gram.fileno(), gram.row_bytes, str(gram.folder), gram.n, gram.diagonal().data_ptr()


def _no_joins(count: int) -> tuple[Tensor, Tensor, Tensor]:
    lo = torch.empty(count, dtype=torch.int64, device="cpu")
    return lo, torch.empty_like(lo), torch.empty(count, dtype=torch.float64, device="cpu")


def _row_stride(x: Tensor) -> int:
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]
