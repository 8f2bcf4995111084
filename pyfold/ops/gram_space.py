"""Clustering through the Gram matrix: features -> G, then Ward, Lloyd and Hartigan on G alone.

One problem, or a list of problems of any sizes, which the backends solve together; or one whose G lies in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from pyfold.errors import PyfoldError
from pyfold.memory import empty
from pyfold.ops import checks, cpu, registry
from pyfold.ops.gram_file import GramFile

_BLOCK = 2**20  # entries of G in hand for the inertia


class Joins(NamedTuple):
    """Joins in height order: cluster ``lo[s]`` enters ``hi[s]``, which keeps its index, at ``height[s]`` more inertia."""

    lo: Tensor
    hi: Tensor
    height: Tensor


@overload
def gram(
    x: Tensor,
    *,
    rows: int | None = ...,
    out: Tensor | None = ...,
    accumulate: bool = ...,
    transposed: bool = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def gram(
    x: Sequence[Tensor],
    *,
    rows: int | Sequence[int] | None = ...,
    out: Sequence[Tensor] | None = ...,
    accumulate: bool = ...,
    transposed: bool = ...,
    backend: str = ...,
) -> list[Tensor]: ...
def gram(
    x: Tensor | Sequence[Tensor],
    *,
    rows: int | Sequence[int] | None = None,
    out: Tensor | Sequence[Tensor] | None = None,
    accumulate: bool = False,
    transposed: bool = False,
    backend: str = "auto",
) -> Tensor | list[Tensor]:
    """Gram matrix of the rows of ``x``, in fp32: ``G = x xᵀ``.

    Parameters
    ----------
    x : Tensor, (N, D) or, if ``transposed``, (D, N); or a list of such
        float32, float16 or bfloat16; contiguous rows. Low-precision products are exact; sums are fp32 (reference: fp64).
    rows : int, or one for each problem, optional
        R: only the first R rows of G, all N by default. On ``cpu`` and ``reference`` each entry has the bits it has in the
        whole of G, so that of ``x[i:]`` they are a strip of it, from the diagonal to the right. On ``cuda`` they are products
        of the same shapes where i is a multiple of 1024, and R is or reaches the end: the same bits if cuBLAS picks the same
        kernel also where rows of ``out`` lie nearer to one another, which no GPU has shown yet.
    out : Tensor, (R, N), float32, optional; one for each problem
        Written in place. Both triangles of its first R columns are valid afterwards.
    accumulate : bool
        Add to ``out`` instead of replacing it. On ``cpu`` the sum runs over panels of 512 columns in order, so feeding a
        matrix in pieces of a multiple of 512 columns gives the same bits as feeding it whole.
    backend : str

    Returns
    -------
    Tensor, (R, N), float32; a list for a list

    Raises
    ------
    TypeError, ValueError
        For another dtype, shape or stride.
    """
    xs, single = checks.problems("x", x)
    outs = checks.per_problem("out", out, len(xs), single)
    heights = checks.per_problem("rows", rows, len(xs), single)
    for i, (problem, height, given) in enumerate(zip(xs, heights, outs, strict=True)):
        checks.matrix("x", problem)
        n = problem.shape[1] if transposed else problem.shape[0]
        if height is not None:
            checks.count(height, n, name="rows")
        if given is None:
            if accumulate:
                raise ValueError("gram: accumulate=True needs out=, the matrix to add to")
            shape = (height or n, n)
            on_host = problem.device.type == "cpu"
            outs[i] = empty(shape, torch.float32) if on_host else torch.empty(shape, dtype=torch.float32, device=problem.device)
            continue
        checks.gram("out", given, n, height)
        checks.same_device("out", given, problem)
        if given.untyped_storage().data_ptr() == problem.untyped_storage().data_ptr():
            raise ValueError("out: expected memory of its own, got that of x")
    registry.call("gram", backend, xs[0].device)(xs, outs, accumulate, transposed)
    return outs[0] if single else outs


@overload
def ward(gram: Tensor | GramFile, n_clusters: int, *, weights: Tensor | None = ..., backend: str = ...) -> Joins: ...
@overload
def ward(
    gram: Sequence[Tensor],
    n_clusters: int | Sequence[int],
    *,
    weights: Sequence[Tensor] | None = ...,
    backend: str = ...,
) -> list[Joins]: ...
def ward(
    gram: Tensor | GramFile | Sequence[Tensor],
    n_clusters: int | Sequence[int],
    *,
    weights: Tensor | Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> Joins | list[Joins]:
    """Greedy agglomeration by Ward's criterion until ``n_clusters`` are left.

    Joining a and b adds ``W_a W_b / (W_a + W_b) ‖c_a − c_b‖²`` to the inertia (Ward 1963).

    Parameters
    ----------
    gram : Tensor, (N, N), float32; a list of such; or GramFile
        Symmetric. Its lower triangle is scratch during the call and equals the upper one again afterwards; a file is only read.
    n_clusters : int, or one for each problem
        K, 1 <= K <= N.
    weights : Tensor, (N,), float64, optional
        Positive point weights; ones by default.

    Returns
    -------
    Joins; a list for a list
        N - K joins in non-decreasing height (up to fp32 rounding).
    """
    grams, counts, units, ws, single = _gram_problems(gram, n_clusters, weights)
    found = _op("ward", backend, grams[0])(grams, counts, ws)
    joins = [Joins(lo, hi, height * unit) for (lo, hi, height), unit in zip(found, units, strict=True)]
    return joins[0] if single else joins


@overload
def lloyd(
    gram: Tensor, labels: Tensor, n_clusters: int, *, weights: Tensor | None = ..., backend: str = ...
) -> tuple[Tensor, Tensor]: ...
@overload
def lloyd(
    gram: Sequence[Tensor],
    labels: Sequence[Tensor],
    n_clusters: int | Sequence[int],
    *,
    weights: Sequence[Tensor] | None = ...,
    backend: str = ...,
) -> list[tuple[Tensor, Tensor]]: ...
def lloyd(
    gram: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    n_clusters: int | Sequence[int],
    *,
    weights: Tensor | Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor] | list[tuple[Tensor, Tensor]]:
    """One pass of Lloyd's algorithm over a Gram matrix: every point to the nearest of the partition's centroids.

    ``d²(i, c) = G_ii − 2 S_ic / W_c + T_c / W_c²`` with ``S_ic = Σ_{j∈c} w_j G_ij`` and ``T_c = Σ_{i∈c} w_i S_ic``, at least 0.

    Parameters
    ----------
    gram : Tensor, (N, N), float32; or a list of such
    labels : Tensor, (N,), int64
        In [0, K), every cluster non-empty. Not modified.
    n_clusters : int, or one for each problem
    weights : Tensor, (N,), float64, optional

    Returns
    -------
    labels : Tensor, (N,), int64
        A point stays where it is unless another centroid is strictly nearer; among equals the lowest index. Clusters may come
        out empty.
    distances : Tensor, (N,), float32
        Squared distance to the centroid chosen.
    """
    grams, counts, _, ws, single = _gram_problems(gram, n_clusters, weights)
    given = _labels(labels, grams, counts, single)
    moved = registry.call("lloyd", backend, grams[0].device)(grams, given, counts, ws)
    return moved[0] if single else moved


@overload
def hartigan(
    gram: Tensor | GramFile,
    labels: Tensor,
    n_clusters: int,
    *,
    weights: Tensor | None = ...,
    max_moves: int | None = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def hartigan(
    gram: Sequence[Tensor],
    labels: Sequence[Tensor],
    n_clusters: int | Sequence[int],
    *,
    weights: Sequence[Tensor] | None = ...,
    max_moves: int | None = ...,
    backend: str = ...,
) -> list[tuple[Tensor, Tensor]]: ...
def hartigan(
    gram: Tensor | GramFile | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    n_clusters: int | Sequence[int],
    *,
    weights: Tensor | Sequence[Tensor] | None = None,
    max_moves: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor] | list[tuple[Tensor, Tensor]]:
    """Refine a partition by moving one point at a time, the move that lowers the inertia most first (Hartigan 1975).

    Parameters
    ----------
    gram : Tensor, (N, N), float32; a list of such; or GramFile
    labels : Tensor, (N,), int64
        In [0, K), every cluster non-empty. Not modified.
    n_clusters : int, or one for each problem
    weights : Tensor, (N,), float64, optional
    max_moves : int, optional
        Stop early; by default only at a fixed point, where no move gains more than 1e-6 of the point's own energy.

    Returns
    -------
    labels : Tensor, (N,), int64
    gains : Tensor, (moves,), float64
        What each move took off the inertia, in order; all positive.
    """
    grams, counts, units, ws, single = _gram_problems(gram, n_clusters, weights)
    given = _labels(labels, grams, counts, single)
    limit = torch.iinfo(torch.int64).max if max_moves is None else max_moves
    found = _op("hartigan", backend, grams[0])(grams, given, counts, ws, limit)
    refined = [(moved, gains * unit) for (moved, gains), unit in zip(found, units, strict=True)]
    return refined[0] if single else refined


def inertia(gram: Tensor | GramFile, labels: Tensor, n_clusters: int, weights: Tensor | None = None) -> float:
    """Within-cluster sum of squares of a partition, from the Gram matrix, in fp64.

    ``Σ w_i G_ii − Σ_c T_c / W_c`` with ``T_c = Σ_{i,j∈c} w_i w_j G_ij``.
    """
    unit, w = checks.weights(weights, gram)
    order = torch.argsort(labels, stable=True)
    total = float((w * gram.diagonal().double()).sum())
    # Clusters of equal size go together, as (clusters, size, size) blocks of G; large ones by some of their rows.
    sizes = torch.bincount(labels, minlength=n_clusters)
    starts = torch.cumsum(sizes, 0) - sizes
    for size in torch.unique(sizes[sizes > 0]).tolist():
        of_size = starts[sizes == size]
        for chunk in of_size.split(max(1, _BLOCK // size**2)):
            members = order[chunk[:, None] + torch.arange(size, device=order.device)]
            mass = torch.zeros(len(chunk), dtype=torch.float64, device=order.device)
            for rows in members.split(max(1, _BLOCK // size), dim=1):
                mass += torch.einsum("ci,cij,cj->c", w[rows], _block(gram, rows, members).double(), w[members])
            total -= float((mass / w[members].sum(1)).sum())
    return max(total, 0.0) * unit


def _block(gram: Tensor | GramFile, rows: Tensor, columns: Tensor) -> Tensor:
    """(clusters, rows, columns) of G."""
    if isinstance(gram, GramFile):
        return torch.stack([cpu.gather(gram, *places) for places in zip(rows, columns, strict=True)])
    return gram[rows[:, :, None], columns[:, None, :]]


def _op(op: str, backend: str, gram: Tensor | GramFile) -> Callable[..., Any]:
    """The implementation of an op for G in memory or in a file."""
    if not isinstance(gram, GramFile):
        return registry.call(op, backend, gram.device)
    name = registry.resolve("cpu" if backend == "auto" else backend)
    if not name.startswith("cpu"):
        raise PyfoldError(f"backend '{name}' cannot run {op} on a Gram matrix in a file; use auto or cpu")
    return registry.call(f"{op}_file", name, gram.device)


def _gram_problems(
    gram: Tensor | GramFile | Sequence[Tensor],
    n_clusters: int | Sequence[int],
    weights: Tensor | Sequence[Tensor] | None,
) -> tuple[list[Any], list[int], list[float], list[Tensor], bool]:
    """Checked: the Gram matrices, the cluster counts, the units of the weights, the weights, and whether it is one problem."""
    grams: list[Any]
    if isinstance(gram, GramFile):
        gram.check_complete()
        grams, single = [gram], True
    else:
        grams, single = checks.problems("gram", gram)
    counts = checks.per_problem("n_clusters", n_clusters, len(grams), single)
    units, ws = [], []
    for g, k, w in zip(grams, counts, checks.per_problem("weights", weights, len(grams), single), strict=True):
        if isinstance(g, Tensor):
            checks.gram("gram", g)
        checks.count(k, g.shape[0])
        unit, scaled = checks.weights(w, g)
        units.append(unit)
        ws.append(scaled)
    return grams, counts, units, ws, single


def _labels(labels: Tensor | Sequence[Tensor], grams: list[Tensor], counts: list[int], single: bool) -> list[Tensor]:
    given = checks.per_problem("labels", labels, len(grams), single)
    return [checks.labels(one, len(g), k, g) for one, g, k in zip(given, grams, counts, strict=True)]
