"""Units folded by what they do on some tokens, not by their weights: the function metric, and consumers that make up for it.

All of it is in C = Σ h hᵀ over tokens, h what the units say, and V, the consumer's columns. Unit i contributes v_i ⊗ h_i, so
the Gram matrix of contributions is C ∘ (VᵀV): its diagonal is the error of dropping a unit. A cluster's strongest member stands
for it; the others' columns are regressed on it, v_j C_ij / C_ii. The consumer then shrinks to that by ridge regression, on all
units kept:

    W = argmin ‖V h − W h_S‖² + λ ‖(W − W_0) D^½‖²,  D = diag(C_SS)

with λ the best on tokens held out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from pyfold import ops
from pyfold.clustering import Clustering, cluster
from pyfold.families.activations import BATCH

LAMBDAS = (0.03, 0.1, 0.3, 1.0, 3.0)
HELD_OUT = 8  # of so many sequences, one
_ROWS = 1 << 8  # of C that are summed at a time


class Moments(NamedTuple):
    """``Σ h hᵀ`` over tokens, (N, N) fp32: those that consumers are fitted to, and those held out."""

    fitted: Tensor
    held_out: Tensor

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Entries (n,) of their sum."""
        return self.fitted[rows, columns] + self.held_out[rows, columns]


class Folded(NamedTuple):
    """Units (K,), int64, that stand for the clusters; the consumer's columns for them, (H, K) fp32; how well they do.

    ``ridge`` is λ, or None without regression; ``error`` the share of the output's energy that is lost, on tokens held out.
    """

    clusters: Clustering
    kept: Tensor
    consumer: Tensor
    ridge: float | None
    error: float


def nbytes(n: int, k: int, hidden: int, item: int) -> int:
    """That folding N units takes beside the weights and what kernels work in: C twice, and with it a network whose numbers take
    ``item`` bytes and what its units say of a batch; or the consumer, and the Gram matrix or the regression."""
    consumer, columns = 4 * hidden * n, 4 * hidden * k
    seeing = 3 * item * hidden * n + BATCH * (4 * item * n + 3 * 4 * hidden)
    solving = max(4 * k * (n + k) + 2 * columns, 2 * 4 * k * k + 3 * columns)
    measuring = 4 * k * k + 3 * columns + 2 * consumer
    return 2 * 4 * n * n + 3 * 4 * _ROWS * n + max(seeing, consumer + max(4 * n * n, solving, measuring))


def moments(said: Iterable[Tensor], backend: str) -> Moments:
    """Of what N units say: batches (sequences, length, N), fp32 or bf16."""
    sums: list[Tensor | None] = [None, None]
    n = 0
    for h in said:
        held = torch.arange(n, n + len(h), device=h.device) % HELD_OUT == HELD_OUT - 1
        n += len(h)
        for i, part in enumerate((h[~held], h[held])):
            if len(part):
                sums[i] = ops.gram(
                    part.flatten(0, 1), transposed=True, out=sums[i], accumulate=sums[i] is not None, backend=backend
                )
    fitted, held_out = sums
    assert fitted is not None, "no tokens"
    assert held_out is not None, f"{n} sequences are too few to hold one out"
    return Moments(fitted, held_out)


def gathered(parts: Sequence[Tensor], rows: Tensor, columns: Tensor) -> Tensor:
    """``(Σ parts)[rows][:, columns]``, without all of the sum in memory."""
    found = parts[0].new_empty(len(rows), len(columns))
    for into, some in zip(found.split(_ROWS), rows.split(_ROWS), strict=True):
        into.copy_(reduce(torch.add, (part[some] for part in parts))[:, columns])
    return found


def fold_units(
    consumer: Tensor, seen: Moments, n_clusters: int, *, ridge: bool, backend: str, information: Tensor | None = None
) -> Folded:
    """Fold the N units of a consumer (H, N), fp32, into K. ``information``: of the loss about each unit, (N,), in any unit.

    Raises ValueError where C says nothing.
    """
    n = len(seen.fitted)
    gram = _contributions(consumer, seen, backend)
    if information is not None:
        gain = _gains(gram.diagonal(), information.to(gram.device))
        gram.mul_(gain).mul_(gain[:, None])
    energy = gram.diagonal().clone()
    scale = float(energy.max())
    if not 0 < scale < float("inf"):
        raise ValueError(f"the units' activations have energies up to {scale:g}")
    clusters = cluster(gram=gram.div_(scale), n_clusters=n_clusters, overwrite_gram=True, backend=backend)
    del gram
    kept = _strongest(energy, clusters.labels, n_clusters)
    stands = kept[clusters.labels]
    share = seen.at(stands, torch.arange(n, device=stands.device)) / seen.at(stands, stands).clamp(
        min=torch.finfo(torch.float32).tiny
    )
    folded = ops.merge_columns(consumer, clusters.labels, n_clusters, scale=share, backend=backend)
    if not ridge or n_clusters == n:
        return Folded(clusters, kept, folded, None, _lost(consumer, kept, folded, seen.held_out))
    return Folded(clusters, kept, *compensate(consumer, seen, kept, folded))


def compensate(consumer: Tensor, seen: Moments, kept: Tensor, folded: Tensor) -> tuple[Tensor, float, float]:
    """Columns (H, K) for the units kept by ridge regression toward ``folded``, the λ that does best on tokens held out, and the
    share of the output's energy that is lost on them."""
    whole, errors = _energy(consumer, seen.held_out), {}
    for lam, fit in _regressed(consumer, [seen.fitted], kept, folded, LAMBDAS):
        errors[lam] = _share(_energy(_missed(consumer, kept, fit), seen.held_out), whole)
        del fit  # before there is another
    best = min(errors, key=lambda lam: errors[lam])
    [(_, fit)] = _regressed(consumer, seen, kept, folded, (best,))
    return fit, best, errors[best]


def _contributions(consumer: Tensor, seen: Moments, backend: str) -> Tensor:
    """``C ∘ (VᵀV)``."""
    gram = ops.gram(consumer, transposed=True, backend=backend)
    for rows, fitted, held_out in zip(gram.split(_ROWS), *(part.split(_ROWS) for part in seen), strict=True):
        rows.mul_(fitted + held_out)
    return gram


def _gains(energy: Tensor, information: Tensor) -> Tensor:
    """By which units are to be scaled so that their energies become ``energy / mean + information / mean``, half of each."""
    shares = [values / values.mean().clamp(min=torch.finfo(values.dtype).tiny) for values in (energy, information)]
    both = shares[0] + shares[1]
    return (both / energy.clamp(min=torch.finfo(energy.dtype).tiny)).sqrt().nan_to_num(0, 0, 0)


def _strongest(energy: Tensor, labels: Tensor, n_clusters: int) -> Tensor:
    """Of each cluster the member of most energy, the first among equals."""
    n = len(labels)
    most = energy.new_zeros(n_clusters).scatter_reduce(0, labels, energy, "amax")
    candidates = torch.where(energy == most[labels], torch.arange(n, device=labels.device), n)
    return labels.new_full((n_clusters,), n).scatter_reduce(0, labels, candidates, "amin")


def _regressed(
    consumer: Tensor, parts: Sequence[Tensor], kept: Tensor, folded: Tensor, lambdas: Iterable[float]
) -> Iterator[tuple[float, Tensor]]:
    """The ridge solutions (H, K) on C, the sum of parts, each with its λ; solved in units of equal energy, where they are well
    conditioned."""
    cross = gathered(parts, torch.arange(consumer.shape[1], device=kept.device), kept)
    square = cross[kept]
    scale = square.diagonal().clamp(min=torch.finfo(square.dtype).tiny).sqrt()
    square.div_(scale).div_(scale[:, None])
    right = (consumer @ cross).div_(scale)
    del cross
    diagonal = square.diagonal().clone()
    for lam in lambdas:
        square.diagonal().copy_(diagonal + lam)
        yield lam, _solved(square, (folded * scale).mul_(lam).add_(right)).div_(scale)


def _solved(square: Tensor, right: Tensor) -> Tensor:
    """``right square⁻¹``, in the place of ``right``: ``cholesky_solve`` would copy both."""
    factor, solution = torch.linalg.cholesky(square), right.T
    torch.linalg.solve_triangular(factor, solution, upper=False, out=solution)
    torch.linalg.solve_triangular(factor.T, solution, upper=True, out=solution)
    return right


def _lost(consumer: Tensor, kept: Tensor, folded: Tensor, c: Tensor) -> float:
    """``Σ ‖V h − W h_S‖² / Σ ‖V h‖²``."""
    return _share(_energy(_missed(consumer, kept, folded), c), _energy(consumer, c))


def _missed(consumer: Tensor, kept: Tensor, folded: Tensor) -> Tensor:
    """Columns (H, N) for what the units kept do not say."""
    missed = consumer.clone()
    missed[:, kept] -= folded
    return missed


def _energy(v: Tensor, c: Tensor) -> float:
    """``Σ ‖V h‖²``."""
    products = (v @ c).mul_(v)
    return sum(float(rows.double().sum()) for rows in products.split(_ROWS))  # a sum in fp64 would copy all of it


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
