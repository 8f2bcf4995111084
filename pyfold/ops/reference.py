"""Plain torch: the definition of correct, on any device. Sums are fp64; nothing here is fast. Problems come in lists."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

_THRESHOLD = 1e-6
_ROUNDING = 1e-9


def unavailable() -> None:
    """Runs everywhere."""


def _each(n_lists: int) -> Callable[[Callable[..., Any]], Callable[..., list[Any]]]:
    """One problem -> a list of problems: the first ``n_lists`` arguments become lists, the others serve every problem."""

    def listed(solve: Callable[..., Any]) -> Callable[..., list[Any]]:
        @wraps(solve)
        def all_of_them(*args: Any) -> list[Any]:
            return [solve(*problem, *args[n_lists:]) for problem in zip(*args[:n_lists], strict=True)]

        return all_of_them

    return listed


@_each(2)
def gram(x: Tensor, out: Tensor, accumulate: bool, transposed: bool) -> None:
    rows = (x.T if transposed else x).double()
    product = rows[: len(out)] @ rows.T
    out.copy_(out.double() + product if accumulate else product)


@_each(3)
def ward(gram: Tensor, n_clusters: int, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
    return (
        torch.tensor(lo, dtype=torch.int64, device=gram.device),
        torch.tensor(hi, dtype=torch.int64, device=gram.device),
        torch.tensor(heights, dtype=torch.float64, device=gram.device),
    )


def _squared_distances(gram: Tensor, labels: Tensor, n_clusters: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    """From every point to every centroid of a partition (N, K), and the weight of each cluster."""
    g = gram.double()
    member = torch.nn.functional.one_hot(labels, n_clusters).double() * weights[:, None]
    mass = member.sum(0)
    sums = g @ member
    totals = (member * sums).sum(0)
    return (g.diagonal()[:, None] - 2 * sums / mass + totals / mass**2).clamp_min(0), mass


@_each(4)
def lloyd(gram: Tensor, labels: Tensor, n_clusters: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    distance, _ = _squared_distances(gram, labels, n_clusters, weights)
    own = distance.gather(1, labels[:, None])[:, 0]
    nearest = distance.min(1).values
    first = (distance == nearest[:, None]).long().argmax(1)
    return torch.where(nearest < own, first, labels), nearest.float()


@_each(4)
def hartigan(gram: Tensor, labels: Tensor, n_clusters: int, weights: Tensor, max_moves: int) -> tuple[Tensor, Tensor]:
    labels = labels.clone()
    norms = gram.diagonal().double()
    points = torch.arange(len(labels), device=labels.device)
    gains: list[float] = []
    while len(gains) < max_moves and n_clusters > 1:
        distance, mass = _squared_distances(gram, labels, n_clusters, weights)
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
    return labels, torch.tensor(gains, dtype=torch.float64, device=labels.device)


@_each(2)
def assign(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    means = centroids.double()
    labels, distances = [], []
    for chunk in x.split(1024):
        rows = chunk.double()
        distance = rows.square().sum(1)[:, None] - 2 * rows @ means.T + means.square().sum(1)
        nearest = distance.min(1).values
        labels.append((distance == nearest[:, None]).long().argmax(1))
        distances.append(nearest.clamp_min(0).float())
    return torch.cat(labels), torch.cat(distances)


@_each(4)
def update(x: Tensor, labels: Tensor, n_clusters: int, weights: Tensor | None) -> Tensor:
    out = torch.empty((n_clusters, x.shape[1]), dtype=torch.float32, device=x.device)
    merge_rows(x, labels, n_clusters, weights, out)
    return out


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
