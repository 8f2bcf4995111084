"""Gram matrix G (N, N), labels -> the nearest cluster of every point and its squared distance: one Lloyd pass, one read of G.

G is symmetric, so S_ic = Σ_{j∈c} w_j G_ij is a sum of *rows* j of G: a program owns a block of points (columns), walks down the
rows sorted by cluster with one fp32 sum a point in registers, and at a cluster's last row turns the sum into the score
T_c / W_c² − 2 S_ic / W_c and keeps the least. Reads are contiguous, nothing is gathered, shared memory bounds neither
N nor K, and sums run in ascending member order. The rows are split between programs at cluster boundaries.

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
from pyfold.ops.triton.kernels.problems import address, aligned, cluster_members, negative_zero, size, starts, table

FIELDS = tl.constexpr(5)  # Gram matrix, N, K, first point, first cluster


@triton.jit
def _row(tile, steps, step: tl.constexpr, nothing):
    """One row of a tile. A thread holds whole columns of it and x + -0.0 is x, so this compiles to nothing."""
    return tl.sum(tl.where(steps == step, tile, nothing), 0, keep_dims=True)


@triton.jit
def _own_sums(problems, order, offsets, labels, weights, sums, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr):
    """S_ic of each point with its own cluster, in the very steps of ``_least_scores``: to the bit what that will find."""
    problem = problems + tl.program_id(1) * FIELDS
    gram = tl.load(problem).to(tl.pointer_type(tl.float32))
    n = tl.load(problem + 1)
    first_point = tl.load(problem + 3)
    positions = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    valid = positions < n
    points = tl.load(order + first_point + positions, mask=valid, other=0)
    cluster = tl.load(labels + points, mask=valid, other=0) + tl.load(problem + 4)
    first = tl.load(offsets + cluster, mask=valid, other=0)
    count = tl.load(offsets + cluster + 1, mask=valid, other=0) - first
    acc = tl.zeros([1, BLOCK_N], tl.float32)
    steps = tl.arange(0, UNROLL)[:, None]
    nothing = negative_zero([UNROLL, BLOCK_N])
    for at in range(0, tl.max(count), UNROLL):
        inside = at + steps < count
        members = tl.load(order + first + at + steps, mask=inside, other=0)
        tile = tl.load(gram + (members - first_point) * n + (points - first_point), mask=inside, other=0.0)
        weight = tl.load(weights + members, mask=inside, other=0.0).to(tl.float32)
        for step in tl.static_range(UNROLL):
            acc = tl.fma(_row(weight, steps, step, nothing), _row(tile, steps, step, nothing), acc)
    tl.store(sums + points, acc, mask=valid)


@triton.jit
def _totals(
    order,
    offsets,
    weights,
    sums,
    row_weights,
    row_factors,
    row_biases,
    row_clusters,
    n_clusters,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Per row in cluster order: its weight and, on cluster c's last, −2 / W_c, T_c / W_c² and c (elsewhere 0, inf, −1)."""
    cluster = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = tl.load(offsets + cluster, mask=cluster < n_clusters, other=0)
    count = tl.load(offsets + cluster + 1, mask=cluster < n_clusters, other=0) - first
    mass = tl.zeros([BLOCK_K, BLOCK_M], tl.float64)
    total = tl.zeros([BLOCK_K, BLOCK_M], tl.float64)
    for at in range(0, tl.max(count), BLOCK_M):
        member = at + tl.arange(0, BLOCK_M)
        inside = member[None, :] < count[:, None]
        position = first[:, None] + member[None, :]
        point = tl.load(order + position, mask=inside, other=0)
        weight = tl.load(weights + point, mask=inside, other=0.0)
        mass += weight
        total += weight * tl.load(sums + point, mask=inside, other=0.0)
        tl.store(row_weights + position, weight.to(tl.float32), mask=inside)
        others = inside & (member[None, :] < count[:, None] - 1)
        tl.store(row_factors + position, 0.0, mask=others)
        tl.store(row_biases + position, float("inf"), mask=others)
        tl.store(row_clusters + position, -1, mask=others)
    W = tl.where(count > 0, tl.sum(mass, 1), 1.0)
    last = first + count - 1
    tl.store(row_factors + last, (-2.0 / W).to(tl.float32), mask=count > 0)
    tl.store(row_biases + last, (tl.sum(total, 1) / (W * W)).to(tl.float32), mask=count > 0)
    tl.store(row_clusters + last, cluster, mask=count > 0)


@triton.jit
def _least_scores(
    problems, order, bounds, row_weights, row_factors, row_biases, row_clusters, least, nearest, n_points,
    ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Least score of a block of points over one split of the clusters: UNROLL rows of G at a time, then one after another.

    All of a point's values are (1, BLOCK_N), so that they have the layout of the tile's rows and stay in their threads.
    """
    MULTIPLE: tl.constexpr = 4 if ALIGNED else 1
    index = tl.program_id(2)
    split = tl.program_id(1)
    problem = problems + index * FIELDS
    gram = address(problem, 0, tl.float32, ALIGNED)
    n = size(problem, 1, MULTIPLE)
    first_point = tl.load(problem + 3)
    points = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    valid = points < n
    bounds += index * (tl.num_programs(1) + 1) + split
    begin = tl.load(bounds)
    end = tl.load(bounds + 1)
    acc = tl.zeros([1, BLOCK_N], tl.float32)
    best = tl.full([1, BLOCK_N], float("inf"), tl.float32)
    chosen = tl.zeros([1, BLOCK_N], tl.int32)
    steps = tl.arange(0, UNROLL)[:, None]
    nothing = negative_zero([UNROLL, BLOCK_N])
    for at in range(begin, end, UNROLL):
        inside = at + steps < end
        rows = tl.load(order + at + steps, mask=inside, other=first_point) - first_point
        tile = tl.load(gram + rows * n + points, mask=inside & valid, other=0.0)
        for step in tl.static_range(UNROLL):
            position = at + step
            weight = tl.load(row_weights + position, mask=position < end, other=0.0)
            factor = tl.load(row_factors + position, mask=position < end, other=0.0)
            bias = tl.load(row_biases + position, mask=position < end, other=float("inf"))
            cluster = tl.load(row_clusters + position, mask=position < end, other=-1)
            acc = tl.fma(tl.broadcast_to(weight, acc.shape), _row(tile, steps, step, nothing), acc)
            score = tl.fma(acc, tl.broadcast_to(factor, acc.shape), tl.broadcast_to(bias, acc.shape))
            chosen = tl.where(score < best, cluster, chosen)
            best = tl.minimum(best, score)
            acc = tl.where(cluster >= 0, 0.0, acc)
    at_point = first_point + points + split * n_points
    tl.store(least + at_point, best, mask=valid)
    tl.store(nearest + at_point, chosen, mask=valid)


@triton.jit
def _choose(
    problems, offsets, labels, sums, row_factors, row_biases, least, nearest, n_points, chosen, distances,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The best of the splits: a point stays where it is unless another cluster is strictly nearer."""
    problem = problems + tl.program_id(1) * FIELDS
    gram = tl.load(problem).to(tl.pointer_type(tl.float32))
    n = tl.load(problem + 1)
    first_point = tl.load(problem + 3)
    first_cluster = tl.load(problem + 4)
    points = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = points < n
    label = tl.load(labels + first_point + points, mask=valid, other=0)
    last = tl.load(offsets + first_cluster + label + 1, mask=valid, other=1) - 1
    factor = tl.load(row_factors + last, mask=valid, other=0.0)
    bias = tl.load(row_biases + last, mask=valid, other=0.0)
    best = tl.fma(tl.load(sums + first_point + points, mask=valid, other=0.0), factor, bias)
    for split in range(SPLITS):
        at_point = first_point + points + split * n_points
        low = tl.load(least + at_point, mask=valid, other=0.0)
        label = tl.where(low < best, tl.load(nearest + at_point, mask=valid, other=0) - first_cluster, label)
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
    sums, row_weights, row_factors, row_biases, distances = torch.empty((5, n_points), dtype=torch.float32, device=device)
    row_clusters = torch.empty(n_points, dtype=torch.int32, device=device)
    _own_sums[(triton.cdiv(max(n), 128), len(grams))](problems, order, offsets, before, w, sums, BLOCK_N=128, UNROLL=8)
    _totals[(triton.cdiv(k, 32),)](
        order, offsets, w, sums, row_weights, row_factors, row_biases, row_clusters, k, BLOCK_K=32, BLOCK_M=8
    )

    tile = tiles.lloyd(max(n))
    blocks = [triton.cdiv(points, tile.columns) for points in n]
    splits = tiles.lloyd_splits(sum(blocks), max(n), tiles.chip(device).n_sms)
    # Split s of N rows begins with the first cluster that begins at or after row s N / splits.
    cuts = [base + part * points // splits for base, points in zip(first_point, n, strict=False) for part in range(splits + 1)]
    bounds = offsets[torch.searchsorted(offsets, torch.tensor(cuts, device=device))]
    least = torch.empty((splits, n_points), dtype=torch.float32, device=device)
    nearest = torch.empty((splits, n_points), dtype=torch.int32, device=device)
    _least_scores[(max(blocks), splits, len(grams))](
        problems, order, bounds, row_weights, row_factors, row_biases, row_clusters, least, nearest, n_points,
        ALIGNED=aligned(grams), BLOCK_N=tile.columns, UNROLL=tile.depth, **tile.options(),
    )  # fmt: skip
    chosen = torch.empty_like(before)
    _choose[(triton.cdiv(max(n), 128), len(grams))](
        problems, offsets, before, sums, row_factors, row_biases, least, nearest, n_points, chosen, distances,
        SPLITS=splits, BLOCK_N=128,
    )  # fmt: skip
    return list(zip(chosen.split(n), distances.split(n), strict=True))
