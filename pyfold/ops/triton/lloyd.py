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
from pyfold.ops.triton.problems import cluster_members, starts, table

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
    W = tl.sum(mass, 1)
    last = first + count - 1
    tl.store(row_clusters + last, cluster, mask=count > 0)
    tl.store(factors + cluster, (-2.0 / W).to(tl.float32), mask=cluster < n_clusters)
    tl.store(biases + cluster, (tl.sum(total, 1) / (W * W)).to(tl.float32), mask=cluster < n_clusters)
