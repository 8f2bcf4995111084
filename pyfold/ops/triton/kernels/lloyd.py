"""Gram matrix G (N, N), labels -> the nearest cluster of every point and its squared distance: one Lloyd pass, one read of G.

G is symmetric, so S_ic = Σ_{j∈c} w_j G_ij is a sum of *rows* j of G: a program owns a block of points (columns), walks down the
rows sorted by cluster with one fp32 sum a point in registers, and at a cluster's last row turns the sum into the score
T_c / W_c² − 2 S_ic / W_c and keeps the least. Reads are contiguous, nothing is gathered, N and K are not bounded by shared memory,
and sums run in ascending member order. The rows are split between programs at cluster boundaries.

T_c must be known first and needs the entries inside the clusters only, Σ_c |c|²: read once more than the one pass, which is
nothing for K ≈ N/2 and 1/K of G for equal clusters; at K = 1 that is a second read. A cluster's rows are never shared
between programs, so clusters of many thousand rows leave most of a GPU idle. K ≪ N is what ``assign`` is for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfold.ops.triton import tiles
from pyfold.ops.triton.kernels.problems import address, aligned, cluster_members, size, starts, table

FIELDS = tl.constexpr(5)  # Gram matrix, N, K, first point, first cluster


@triton.jit
def _own_sums(problems, order, offsets, labels, weights, sums, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """w_i S_ic of each point with its own cluster, in fp64, in cluster order."""
    problem = problems + tl.program_id(1) * FIELDS
    gram = tl.load(problem).to(tl.pointer_type(tl.float32))
    n = tl.load(problem + 1)
    first_point = tl.load(problem + 3)
    positions = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = positions < n
    points = tl.load(order + first_point + positions, mask=valid, other=0)
    cluster = tl.load(labels + points, mask=valid, other=0) + tl.load(problem + 4)
    first = tl.load(offsets + cluster, mask=valid, other=0)
    count = tl.load(offsets + cluster + 1, mask=valid, other=0) - first
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float64)
    for at in range(0, tl.max(count), BLOCK_M):
        member = at + tl.arange(0, BLOCK_M)
        inside = member[None, :] < count[:, None]
        others = tl.load(order + first[:, None] + member[None, :], mask=inside, other=0)
        entry = tl.load(gram + (points - first_point)[:, None] * n + (others - first_point), mask=inside, other=0.0)
        acc += entry.to(tl.float64) * tl.load(weights + others, mask=inside, other=0.0)
    tl.store(sums + first_point + positions, tl.sum(acc, 1) * tl.load(weights + points, mask=valid, other=0.0), mask=valid)


@triton.jit
def _totals(
    order, offsets, weights, sums, row_weights, row_clusters, factors, biases, n_clusters, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Per row of G in cluster order: its weight and, on the last of cluster c, −2 / W_c, T_c / W_c² and c (elsewhere 0, inf, −1)."""
    cluster = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = tl.load(offsets + cluster, mask=cluster < n_clusters, other=0)
    count = tl.load(offsets + cluster + 1, mask=cluster < n_clusters, other=0) - first
    mass = tl.zeros([BLOCK_K, BLOCK_M], tl.float64)
    total = tl.zeros([BLOCK_K, BLOCK_M], tl.float64)
    for at in range(0, tl.max(count), BLOCK_M):
        member = at + tl.arange(0, BLOCK_M)
        inside = member[None, :] < count[:, None]
        position = first[:, None] + member[None, :]
        weight = tl.load(weights + tl.load(order + position, mask=inside, other=0), mask=inside, other=0.0)
        mass += weight
        total += tl.load(sums + position, mask=inside, other=0.0)
        tl.store(row_weights + position, weight.to(tl.float32), mask=inside)
        tl.store(row_clusters + position, -1, mask=inside & (member[None, :] < count[:, None] - 1))
    W = tl.where(count > 0, tl.sum(mass, 1), 1.0)
    last = first + count - 1
    tl.store(row_clusters + last, cluster, mask=count > 0)
    tl.store(factors + cluster, (-2.0 / W).to(tl.float32), mask=cluster < n_clusters)
    tl.store(biases + cluster, (tl.sum(total, 1) / (W * W)).to(tl.float32), mask=cluster < n_clusters)


@triton.jit
def _least_scores(
    problems, order, labels, bounds, row_weights, row_clusters, factors, biases, least, nearest, own, n_points,
    ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Least score of a block of points over one split of the clusters, and the score of the cluster each point is in."""
    MULTIPLE: tl.constexpr = 4 if ALIGNED else 1
    index = tl.program_id(2)
    split = tl.program_id(1)
    problem = problems + index * FIELDS
    gram = address(problem, 0, tl.float32, ALIGNED)
    n = size(problem, 1, MULTIPLE)
    first_point = tl.load(problem + 3)
    first_cluster = tl.load(problem + 4)
    points = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = points < n
    bounds += (index * (tl.num_programs(1) + 1) + split) * 2
    begin = tl.load(bounds)
    end = tl.load(bounds + 2)
    label = tl.load(labels + first_point + points, mask=valid, other=0) + first_cluster
    acc = tl.zeros([BLOCK_N], tl.float32)
    best = tl.full([BLOCK_N], float("inf"), tl.float32)
    kept = tl.full([BLOCK_N], float("inf"), tl.float32)
    chosen = tl.zeros([BLOCK_N], tl.int32)
    for at in range(begin, end, UNROLL):
        for step in tl.static_range(UNROLL):  # no branch and no store in here, so that UNROLL rows are in flight
            position = at + step
            row = tl.load(order + position, mask=position < end, other=first_point) - first_point
            weight = tl.load(row_weights + position, mask=position < end, other=0.0)
            cluster = tl.load(row_clusters + position, mask=position < end, other=-1)
            factor = tl.load(factors + cluster, mask=cluster >= 0, other=0.0)
            bias = tl.load(biases + cluster, mask=cluster >= 0, other=float("inf"))
            acc += weight * tl.load(gram + row * n + points, mask=valid, other=0.0)
            score = acc * factor + bias
            kept = tl.where(cluster == label, score, kept)
            chosen = tl.where(score < best, cluster, chosen)
            best = tl.minimum(best, score)
            acc = tl.where(cluster >= 0, 0.0, acc)
    at_point = split.to(tl.int64) * n_points + first_point + points
    tl.store(least + at_point, best, mask=valid)
    tl.store(nearest + at_point, chosen, mask=valid)
    first, last = tl.load(bounds + 1), tl.load(bounds + 3)
    tl.store(own + first_point + points, kept, mask=valid & (label >= first) & (label < last))


@triton.jit
def _choose(
    problems, least, nearest, own, labels, n_points, chosen, distances, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The best of the splits: a point stays where it is unless another cluster is strictly nearer."""
    problem = problems + tl.program_id(1) * FIELDS
    gram = tl.load(problem).to(tl.pointer_type(tl.float32))
    n = tl.load(problem + 1)
    first_point = tl.load(problem + 3)
    points = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = points < n
    best = tl.load(own + first_point + points, mask=valid, other=0.0)
    label = tl.load(labels + first_point + points, mask=valid, other=0)
    for split in range(SPLITS):
        at_point = first_point + points + split * n_points
        low = tl.load(least + at_point, mask=valid, other=0.0)
        label = tl.where(low < best, tl.load(nearest + at_point, mask=valid, other=0) - tl.load(problem + 4), label)
        best = tl.minimum(best, low)
    norm = tl.load(gram + points.to(tl.int64) * (n + 1), mask=valid, other=0.0)
    tl.store(chosen + first_point + points, label, mask=valid)
    tl.store(distances + first_point + points, tl.maximum(norm + best, 0.0), mask=valid)


def lloyd(
    grams: list[Tensor], labels: list[Tensor], n_clusters: list[int], weights: list[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Nearest cluster and d²(i, c) = G_ii − 2 S_ic / W_c + T_c / W_c² to it; ties stay, then go to the lowest index."""
    device = grams[0].device
    n = [gram.shape[0] for gram in grams]
    first_point, first_cluster = starts(n), starts(n_clusters)
    n_points, k = first_point[-1], first_cluster[-1]
    problems = table([[gram.data_ptr() for gram in grams], n, n_clusters, first_point[:-1], first_cluster[:-1]], device)
    order, offsets = cluster_members(labels, n_clusters)
    before, w = torch.cat(labels), torch.cat(weights)
    sums = torch.empty_like(w)
    _own_sums[(triton.cdiv(max(n), 32), len(grams))](problems, order, offsets, before, w, sums, BLOCK_N=32, BLOCK_M=8)
    row_weights, own, distances = torch.empty((3, n_points), dtype=torch.float32, device=device)
    row_clusters = torch.empty(n_points, dtype=torch.int32, device=device)
    factors, biases = torch.empty((2, k), dtype=torch.float32, device=device)
    _totals[(triton.cdiv(k, 32),)](
        order, offsets, w, sums, row_weights, row_clusters, factors, biases, k, BLOCK_K=32, BLOCK_M=8
    )

    tile = tiles.lloyd(max(n))
    blocks = [triton.cdiv(points, tile.columns) for points in n]
    splits = tiles.lloyd_splits(sum(blocks), max(n), tiles.chip(device).n_sms)
    # Split s of N rows begins at the first cluster that begins at or after row s N / splits.
    cuts = [base + part * points // splits for base, points in zip(first_point, n, strict=False) for part in range(splits + 1)]
    edges = torch.searchsorted(offsets, torch.tensor(cuts, device=device))
    bounds = torch.stack([offsets[edges], edges], 1)
    least = torch.empty((splits, n_points), dtype=torch.float32, device=device)
    nearest = torch.empty((splits, n_points), dtype=torch.int32, device=device)
    _least_scores[(max(blocks), splits, len(grams))](
        problems, order, before, bounds, row_weights, row_clusters, factors, biases, least, nearest, own, n_points,
        ALIGNED=aligned(grams), BLOCK_N=tile.columns, UNROLL=tile.depth, **tile.options(),
    )  # fmt: skip
    chosen = torch.empty_like(before)
    _choose[(triton.cdiv(max(n), 128), len(grams))](
        problems, least, nearest, own, before, n_points, chosen, distances, SPLITS=splits, BLOCK_N=128
    )
    return list(zip(chosen.split(n), distances.split(n), strict=True))
