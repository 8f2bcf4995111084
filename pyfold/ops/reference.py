"""Plain torch: the definition of correct, on any device. Sums are fp64; nothing here is fast."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pyfold.ops import Joins

_THRESHOLD = 1e-6
_ROUNDING = 1e-9


def gram(x: Tensor, out: Tensor, accumulate: bool, transposed: bool) -> None:
    rows = (x.T if transposed else x).double()
    product = rows @ rows.T
    out.copy_(out.double() + product if accumulate else product)


def ward(gram: Tensor, n_clusters: int, weights: Tensor) -> Joins:
    from pyfold.ops import Joins

    n = gram.shape[0]
    w = weights.clone()
    g = gram.double()
    norms = g.diagonal()
    cost = (norms[:, None] + norms[None, :] - 2 * g).clamp_min(0) * (w[:, None] * w[None, :] / (w[:, None] + w[None, :]))
    cost.fill_diagonal_(torch.inf)
    joins = []
    for _ in range(n - n_clusters):
        a, b = sorted(divmod(int(cost.argmin()), n))
        height = float(cost[a, b])
        alive = torch.isfinite(cost[a]) & torch.isfinite(cost[b])
        row = ((w[a] + w) * cost[a] + (w[b] + w) * cost[b] - w * height) / (w[a] + w[b] + w)
        row = torch.where(alive, row.clamp_min(0), torch.inf)
        cost[a] = cost[:, a] = torch.inf
        cost[b] = cost[:, b] = row
        w[b] += w[a]
        joins.append((a, b, height))
    lo, hi, heights = zip(*joins, strict=True) if joins else ((), (), ())
    return Joins(
        torch.tensor(lo, dtype=torch.int64, device=gram.device),
        torch.tensor(hi, dtype=torch.int64, device=gram.device),
        torch.tensor(heights, dtype=torch.float64, device=gram.device),
    )


def hartigan(gram: Tensor, labels: Tensor, n_clusters: int, weights: Tensor, max_moves: int) -> tuple[Tensor, Tensor]:
    labels = labels.clone()
    g = gram.double()
    norms = g.diagonal()
    points = torch.arange(len(labels), device=labels.device)
    gains: list[float] = []
    while len(gains) < max_moves and n_clusters > 1:
        member = torch.nn.functional.one_hot(labels, n_clusters).double() * weights[:, None]
        mass = member.sum(0)
        sums = g @ member
        totals = (member * sums).sum(0)
        distance = (norms[:, None] - 2 * sums / mass + totals / mass**2).clamp_min(0)
        own = mass[labels]
        saved = weights * own / (own - weights) * distance[points, labels]
        entry = weights[:, None] * mass / (mass + weights[:, None]) * distance
        entry[points, labels] = torch.inf
        alone = torch.bincount(labels, minlength=n_clusters)[labels] == 1
        gain = torch.where(alone, -torch.inf, saved - entry.min(1).values)
        gain = torch.where(gain > _THRESHOLD * weights * norms + _ROUNDING * saved, gain, -torch.inf)
        best = int(gain.argmax())
        if not gain[best] > 0:
            break
        gains.append(float(gain[best]))
        labels[best] = entry[best].argmin()
    return labels, torch.tensor(gains, dtype=torch.float64)


def merge_rows(x: Tensor, labels: Tensor, n_clusters: int, weights: Tensor | None, out: Tensor) -> None:
    w = torch.ones(len(labels), dtype=torch.float64, device=x.device) if weights is None else weights
    sums = torch.zeros((n_clusters, x.shape[1]), dtype=torch.float64, device=x.device)
    sums.index_add_(0, labels, x.double() * w[:, None])
    mass = torch.zeros(n_clusters, dtype=torch.float64, device=x.device).index_add_(0, labels, w)
    out.copy_(sums / mass[:, None])
    alone = torch.bincount(labels, minlength=n_clusters)[labels] == 1
    out[labels[alone]] = x[alone].to(out.dtype)


def merge_columns(x: Tensor, labels: Tensor, n_clusters: int, scale: Tensor | None, out: Tensor) -> None:
    columns = x.double() if scale is None else x.double() * scale
    sums = torch.zeros((x.shape[0], n_clusters), dtype=torch.float64, device=x.device)
    out.copy_(sums.index_add_(1, labels, columns))


def first_nonfinite(x: Tensor) -> int | None:
    bad = (~torch.isfinite(x.flatten())).nonzero()
    return int(bad[0]) if len(bad) else None
