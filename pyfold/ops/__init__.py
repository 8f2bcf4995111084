"""The numeric kernels: one schema per op, checked here once; backends in ``registry``.

Shapes: B batch, N points, D features, K clusters, H hidden. Tensors in, tensors out; ``backend`` is ``"auto"`` or a name
from :func:`pyfold.ops.registry.backends`. The same inputs give bitwise the same outputs on every run of one backend.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyfold.ops import registry
from pyfold.ops.registry import backends, resolve

__all__ = [
    "Joins",
    "backends",
    "first_nonfinite",
    "gram",
    "hartigan",
    "inertia",
    "merge_columns",
    "merge_rows",
    "resolve",
    "ward",
]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Ward's update multiplies fp32 costs by cluster weights: 4 N² times the largest squared norm must be representable.
LARGEST_SQUARED_NORM = 1e28
WIDEST_SPREAD = 1e6


class Joins(NamedTuple):
    """Joins in height order: cluster ``lo[s]`` enters ``hi[s]``, which keeps its index, at ``height[s]`` more inertia."""

    lo: Tensor
    hi: Tensor
    height: Tensor


def gram(
    x: Tensor, *, out: Tensor | None = None, accumulate: bool = False, transposed: bool = False, backend: str = "auto"
) -> Tensor:
    """Gram matrix of the rows of ``x``, in fp32: ``G = x xᵀ``.

    Parameters
    ----------
    x : Tensor, (N, D) or, if ``transposed``, (D, N)
        float32, float16 or bfloat16; contiguous rows. Low-precision products are exact; sums are fp32 (reference: fp64).
    out : Tensor, (N, N), float32, optional
        Written in place. Both triangles are valid afterwards.
    accumulate : bool
        Add to ``out`` instead of replacing it. On ``cpu`` the sum runs over panels of 512 columns in order, so feeding a
        matrix in pieces of a multiple of 512 columns gives the same bits as feeding it whole.
    backend : str

    Returns
    -------
    Tensor, (N, N), float32

    Raises
    ------
    TypeError, ValueError
        For another dtype, shape or stride.
    """
    _check_matrix("x", x)
    n = x.shape[1] if transposed else x.shape[0]
    if out is None:
        if accumulate:
            raise ValueError("gram: accumulate=True needs out=, the matrix to add to")
        out = torch.empty((n, n), dtype=torch.float32, device=x.device)
    else:
        _check_gram("out", out, n)
        _check_device("out", out, x)
        if out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            raise ValueError("out: expected memory of its own, got that of x")
    registry.call("gram", backend, x.device)(x, out, accumulate, transposed)
    return out


def ward(gram: Tensor, n_clusters: int, *, weights: Tensor | None = None, backend: str = "auto") -> Joins:
    """Greedy agglomeration by Ward's criterion until ``n_clusters`` are left.

    Joining a and b adds ``W_a W_b / (W_a + W_b) ‖c_a − c_b‖²`` to the inertia (Ward 1963).

    Parameters
    ----------
    gram : Tensor, (N, N), float32
        Symmetric. Its lower triangle is scratch during the call and equals the upper one again afterwards.
    n_clusters : int
        K, 1 <= K <= N.
    weights : Tensor, (N,), float64, optional
        Positive point weights; ones by default.

    Returns
    -------
    Joins
        N - K joins in non-decreasing height (up to fp32 rounding).
    """
    _check_gram("gram", gram)
    n = gram.shape[0]
    _check_count(n_clusters, n)
    unit, w = _weights(weights, gram)
    lo, hi, height = registry.call("ward", backend, gram.device)(gram, n_clusters, w)
    return Joins(lo, hi, height * unit)


def hartigan(
    gram: Tensor,
    labels: Tensor,
    n_clusters: int,
    *,
    weights: Tensor | None = None,
    max_moves: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Refine a partition by moving one point at a time, the move that lowers the inertia most first (Hartigan 1975).

    Parameters
    ----------
    gram : Tensor, (N, N), float32
    labels : Tensor, (N,), int64
        In [0, K), every cluster non-empty. Not modified.
    max_moves : int, optional
        Stop early; by default only at a fixed point, where no move gains more than 1e-6 of the point's own energy.

    Returns
    -------
    labels : Tensor, (N,), int64
    gains : Tensor, (moves,), float64
        What each move took off the inertia, in order; all positive.
    """
    _check_gram("gram", gram)
    n = gram.shape[0]
    _check_count(n_clusters, n)
    _check_labels(labels, n, n_clusters)
    limit = torch.iinfo(torch.int64).max if max_moves is None else max_moves
    unit, w = _weights(weights, gram)
    refined, gains = registry.call("hartigan", backend, gram.device)(gram, labels.contiguous(), n_clusters, w, limit)
    return refined, gains * unit


def merge_rows(
    x: Tensor,
    labels: Tensor,
    n_clusters: int,
    *,
    weights: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Weighted mean of the rows of each cluster: ``(UᵀWU)⁻¹ UᵀW x`` with one-hot U (N x K).

    Parameters
    ----------
    x : Tensor, (N, D) or (N,)
        float32, float16 or bfloat16; summed in fp32.
    labels : Tensor, (N,), int64
    weights : Tensor, (N,), float64, optional
    dtype : torch.dtype, optional
        Of the result; that of ``x`` by default. Rows alone in their cluster then keep their bits.
    out : Tensor, (K, D) or (K,), contiguous, optional
        Written in place, which spares the page faults of fresh memory.

    Returns
    -------
    Tensor, (K, D) or (K,)
    """
    matrix = x.unsqueeze(1) if x.dim() == 1 else x
    _check_matrix("x", matrix)
    _check_labels(labels, matrix.shape[0], n_clusters)
    if weights is not None:
        weights = _weights(weights, x, matrix.shape[0])[1]
    out = _result(out, (n_clusters, *x.shape[1:]), dtype, x)
    merged = out.unsqueeze(1) if x.dim() == 1 else out
    registry.call("merge_rows", backend, x.device)(matrix, labels, n_clusters, weights, merged)
    return out


def merge_columns(
    x: Tensor,
    labels: Tensor,
    n_clusters: int,
    *,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sum of the (scaled) columns of each cluster: ``x diag(scale) U`` with one-hot U (N x K).

    Parameters
    ----------
    x : Tensor, (H, N)
        float32, float16 or bfloat16; summed in fp32.
    labels : Tensor, (N,), int64
    scale : Tensor, (N,), float32, optional
    dtype : torch.dtype, optional
        Of the result; that of ``x`` by default. Columns alone in their cluster then keep their bits.
    out : Tensor, (H, K), contiguous, optional
        Written in place, which spares the page faults of fresh memory.

    Returns
    -------
    Tensor, (H, K)
    """
    _check_matrix("x", x)
    _check_labels(labels, x.shape[1], n_clusters)
    if scale is not None and (scale.dtype != torch.float32 or scale.shape != labels.shape):
        raise ValueError(f"scale: expected float32 of shape {tuple(labels.shape)}, got {scale.dtype} of {tuple(scale.shape)}")
    out = _result(out, (x.shape[0], n_clusters), dtype, x)
    registry.call("merge_columns", backend, x.device)(x, labels, n_clusters, scale, out)
    return out


def first_nonfinite(x: Tensor, *, backend: str = "auto") -> int | None:
    """Flat index of the first NaN or infinity in ``x`` (contiguous, any float dtype), or None."""
    _check_float("x", x.dtype)
    return registry.call("first_nonfinite", backend, x.device)(x.contiguous())


def inertia(gram: Tensor, labels: Tensor, n_clusters: int, weights: Tensor | None = None) -> float:
    """Within-cluster sum of squares of a partition, from the Gram matrix, in fp64.

    ``Σ w_i G_ii − Σ_c T_c / W_c`` with ``T_c = Σ_{i,j∈c} w_i w_j G_ij``.
    """
    unit, w = _weights(weights, gram)
    order = torch.argsort(labels, stable=True)
    total = float((w * gram.diagonal().double()).sum())
    # Clusters of equal size go together, as (clusters, size, size) blocks of G.
    sizes = torch.bincount(labels, minlength=n_clusters)
    starts = torch.cumsum(sizes, 0) - sizes
    for size in torch.unique(sizes[sizes > 0]).tolist():
        of_size = starts[sizes == size]
        for chunk in of_size.split(max(1, 2**20 // size**2)):
            members = order[chunk[:, None] + torch.arange(size, device=order.device)]
            block = gram[members[:, :, None], members[:, None, :]].double()
            member_weights = w[members]
            mass = torch.einsum("ci,cij,cj->c", member_weights, block, member_weights)
            total -= float((mass / member_weights.sum(1)).sum())
    return max(total, 0.0) * unit


def _check_float(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {dtype}")


def _check_matrix(name: str, x: Tensor) -> None:
    _check_float(name, x.dtype)
    if x.dim() != 2 or x.numel() == 0:
        raise ValueError(f"{name}: expected a non-empty matrix, got shape {tuple(x.shape)}")
    if x.stride(1) != 1 and x.shape[1] != 1:
        raise ValueError(f"{name}: expected contiguous rows, got strides {x.stride()}; call .contiguous()")


def _check_gram(name: str, gram: Tensor, n: int | None = None) -> None:
    if gram.dtype != torch.float32:
        raise TypeError(f"{name}: expected float32, got {gram.dtype}")
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0 or (n is not None and gram.shape[0] != n):
        raise ValueError(f"{name}: expected shape ({n or 'N'}, {n or 'N'}), got {tuple(gram.shape)}")
    if not gram.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous matrix, got strides {gram.stride()}")


def _check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {tensor.device}")


def _result(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype | None, x: Tensor) -> Tensor:
    if out is None:
        _check_float("dtype", dtype or x.dtype)
        return torch.empty(shape, dtype=dtype or x.dtype, device=x.device)
    _check_float("out", out.dtype)
    _check_device("out", out, x)
    if tuple(out.shape) != shape or not out.is_contiguous() or dtype not in (None, out.dtype):
        raise ValueError(
            f"out: expected contiguous {dtype or 'floats'} of shape {shape}, got {out.dtype} of {tuple(out.shape)}"
        )
    return out


def _check_count(n_clusters: int, n: int) -> None:
    if not 1 <= n_clusters <= n:
        raise ValueError(f"n_clusters: expected 1 to {n} (the number of points), got {n_clusters}")


def _check_labels(labels: Tensor, n: int, n_clusters: int) -> None:
    if labels.dtype != torch.int64 or tuple(labels.shape) != (n,):
        raise ValueError(f"labels: expected int64 of shape ({n},), got {labels.dtype} of {tuple(labels.shape)}")
    _check_count(n_clusters, n)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= n_clusters:
        raise ValueError(f"labels: expected values in [0, {n_clusters}), got {low} to {high}")
    empty = (torch.bincount(labels, minlength=n_clusters) == 0).nonzero()
    if len(empty):
        raise ValueError(f"labels: expected every cluster to have a member, got none in cluster {int(empty[0])}")


def _weights(weights: Tensor | None, like: Tensor, n: int | None = None) -> tuple[float, Tensor]:
    """The largest weight, and the weights in units of it: no op depends on their scale, but fp32 products do."""
    n = n or like.shape[0]
    if weights is None:
        return 1.0, torch.ones(n, dtype=torch.float64, device=like.device)
    if tuple(weights.shape) != (n,):
        raise ValueError(f"weights: expected shape ({n},), got {tuple(weights.shape)}")
    weights = weights.to(torch.float64)
    if not bool(torch.isfinite(weights).all()) or not bool((weights > 0).all()):
        raise ValueError("weights: expected positive finite values")
    unit = float(weights.max())
    if float(weights.min()) * WIDEST_SPREAD < unit:
        raise ValueError(f"weights: expected a spread of at most {WIDEST_SPREAD:g}, got {float(weights.min()):g} to {unit:g}")
    return unit, (weights / unit).contiguous()
