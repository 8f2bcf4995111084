"""Labels as such: from joins, in canonical order, with no cluster left empty."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfold import ops


def labels_of(joins: ops.Joins, n: int) -> Tensor:
    """The partition that a list of joins leaves, clusters numbered in the order of their first member."""
    root = torch.arange(n, device=joins.lo.device)
    root[joins.lo] = joins.hi  # a cluster enters another once, and never again
    for _ in range(n.bit_length()):  # chains of joins: each round halves the way to the root
        root = root[root]
    return canonical(root)


def canonical(labels: Tensor) -> Tensor:
    """The same partition, clusters renumbered 0..K-1 in the order of their first member. Labels are in [0, N)."""
    points = torch.arange(len(labels), device=labels.device)
    first = torch.full_like(labels, len(labels)).scatter_reduce_(0, labels, points, "amin")[labels]
    rank = torch.cumsum(first == points, 0) - 1
    return rank[first]


def fill_empty(labels: Tensor, distances: Tensor, points: Tensor, n_clusters: int) -> Tensor:
    """``labels`` with one point moved into each empty cluster: the farthest from its centroid first, no value twice.

    Parameters
    ----------
    labels : Tensor, (N,), int64
    distances : Tensor, (N,)
        Squared distance of each point to its centroid.
    points : Tensor, (N, D)
    n_clusters : int
        K <= N.

    Returns
    -------
    Tensor, (N,), int64
        Every cluster has a member. Only where fewer distinct points than clusters exist are duplicates split, by index.
        ``labels`` itself where nothing is empty.
    """
    n = len(labels)
    empty = (torch.bincount(labels, minlength=n_clusters) == 0).nonzero().flatten()
    if not len(empty):
        return labels
    order = torch.sort(distances, descending=True, stable=True).indices
    position = torch.empty_like(order)
    position[order] = torch.arange(n, device=order.device)
    # The nearest member of each cluster stays, so none becomes empty; at least N - (K - empty) >= empty points are left.
    stays = torch.full((n_clusters,), -1, device=order.device).scatter_reduce_(0, labels, position, "amax")
    movable = torch.ones(n, dtype=torch.bool, device=order.device)
    movable[stays[stays >= 0]] = False
    candidates = order[movable]
    for count in (2 * len(empty) + 64, len(candidates)):  # sorting all rows is for the rare case of many duplicates
        head = candidates[:count]
        _, value = torch.unique(points[head].float(), dim=0, return_inverse=True)
        distinct = head[torch.sort(_first_members(value, int(value.max()) + 1)).values]
        if len(distinct) >= len(empty):
            break
    others = candidates[~torch.isin(candidates, distinct)]
    filled = labels.clone()
    filled[torch.cat([distinct, others])[: len(empty)]] = empty
    return filled


def _first_members(labels: Tensor, n_clusters: int) -> Tensor:
    """(K,) the lowest index in each cluster."""
    first = torch.full((n_clusters,), len(labels), dtype=torch.int64, device=labels.device)
    return first.scatter_reduce_(0, labels, torch.arange(len(labels), device=labels.device), "amin")
