"""Points x (N, D), labels -> the weighted mean of each cluster (K, D), fp32.

Members come in compressed sparse rows, one program sums one cluster's members over one chunk of columns: no atomics, a fixed
order. A cluster of more than PIECE members is summed in pieces of PIECE, and a second kernel adds those in fp64, so that
10^6 members cost neither accuracy nor balance. A cluster of one is its member, bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfold.ops.triton import tiles
from pyfold.ops.triton.kernels.problems import (
    DTYPE,
    address,
    aligned,
    cluster_members,
    negative_zero,
    per_cluster,
    size,
    starts,
    table,
)

FIELDS = tl.constexpr(6)  # x, its row stride, D, first point, first cluster, result
PIECE = 512


@triton.jit
def _slot(begin, first, PIECE: tl.constexpr):
    """Where the piece that begins at member ``begin`` leaves its sum: a last piece and the next cluster's first may share
    begin // PIECE, but only one of two pieces there is its cluster's first."""
    return 2 * (begin // PIECE) + (begin != first).to(tl.int64)


@triton.jit
def _sum_pieces(
    problems, order, offsets, first_piece, cluster_of_piece, problem_of_cluster, weights, sums, masses, n_clusters, width,
    PIECE: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, WEIGHTED: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Σ w x and Σ w of one piece over one chunk of columns; the mean at once where the cluster is one piece."""
    cluster = tl.load(cluster_of_piece + tl.program_id(0))
    if cluster < n_clusters:  # the number of pieces is known only here; the host launches the most there can be
        MULTIPLE: tl.constexpr = (128 // IN.primitive_bitwidth) if ALIGNED else 1
        problem = problems + tl.load(problem_of_cluster + cluster) * FIELDS
        x = address(problem, 0, IN, ALIGNED)
        stride = size(problem, 1, MULTIPLE)
        d = size(problem, 2, MULTIPLE).to(tl.int32)
        first_point = tl.load(problem + 3)
        first = tl.load(offsets + cluster)
        last = tl.load(offsets + cluster + 1)
        piece = tl.load(first_piece + cluster)
        n_pieces = tl.load(first_piece + cluster + 1) - piece
        begin = first + (tl.program_id(0) - piece) * PIECE
        end = tl.minimum(begin + PIECE, last)
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = columns < d
        nothing = negative_zero([BLOCK_M, BLOCK_D])  # 0.0 would turn a lone -0.0 into 0.0
        acc = nothing
        mass = tl.zeros([BLOCK_M], tl.float64)
        for at in range(begin, end, BLOCK_M):
            members = at + tl.arange(0, BLOCK_M)
            valid = members < end
            points = tl.load(order + members, mask=valid, other=0)
            mask = valid[:, None] & inside[None, :]
            row = tl.load(x + (points - first_point)[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            if WEIGHTED:
                weight = tl.load(weights + points, mask=valid, other=0.0).to(tl.float32)
                weight = tl.where(valid & (last - first == 1), 1.0, weight)  # w x / w may differ from x
                mass += weight.to(tl.float64)
                row = weight[:, None] * row
            acc += tl.where(mask, row, nothing)
        if BLOCK_M == 1:
            total = tl.reshape(acc, [BLOCK_D])
        else:
            total = tl.sum(acc, 0)
        if WEIGHTED:
            whole = tl.sum(mass)
        else:
            whole = (end - begin).to(tl.float64)
        if n_pieces == 1:
            out = address(problem, 5, OUT, ALIGNED) + (cluster - tl.load(problem + 4)) * d
            tl.store(out + columns, tl.div_rn(total, whole.to(tl.float32)).to(OUT), mask=inside)
        else:
            slot = _slot(begin, first, PIECE)
            tl.store(sums + slot * width + columns, total, mask=inside)
            tl.store(masses + slot, whole)


@triton.jit
def _add_pieces(
    problems, offsets, first_piece, longest, problem_of_cluster, sums, masses, width,
    PIECE: tl.constexpr, OUT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The mean of one cluster of several pieces over one chunk of columns."""
    cluster = tl.load(longest + tl.program_id(0))
    n_pieces = tl.load(first_piece + cluster + 1) - tl.load(first_piece + cluster)
    if n_pieces > 1:
        problem = problems + tl.load(problem_of_cluster + cluster) * FIELDS
        d = tl.load(problem + 2).to(tl.int32)
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        first = tl.load(offsets + cluster)
        acc = tl.zeros([BLOCK_P, BLOCK_D], tl.float64)
        mass = tl.zeros([BLOCK_P], tl.float64)
        for at in range(0, n_pieces, BLOCK_P):
            pieces = at + tl.arange(0, BLOCK_P)
            valid = pieces < n_pieces
            slot = _slot(first + pieces * PIECE, first, PIECE)
            inside = valid[:, None] & (columns < d)[None, :]
            acc += tl.load(sums + slot[:, None] * width + columns[None, :], mask=inside, other=0.0)
            mass += tl.load(masses + slot, mask=valid, other=0.0)
        out = tl.load(problem + 5).to(tl.pointer_type(OUT)) + (cluster - tl.load(problem + 4)) * d
        tl.store(out + columns, (tl.sum(acc, 0) / tl.sum(mass)).to(OUT), mask=columns < d)


def segment_means(
    xs: list[Tensor], labels: list[Tensor], weights: list[Tensor | None], outs: list[Tensor], *, ascending: bool
) -> None:
    """Weighted mean of each cluster's rows into ``outs`` (K, D). ``ascending``: every sum in member order, in one piece."""
    device = xs[0].device
    n_clusters = [out.shape[0] for out in outs]
    first_point, first_cluster = starts([x.shape[0] for x in xs]), starts(n_clusters)
    n, k = first_point[-1], first_cluster[-1]
    width = max(x.shape[1] for x in xs)
    order, offsets = cluster_members(labels, n_clusters)
    problems = table(
        [[x.data_ptr() for x in xs], [x.stride(0) for x in xs], [x.shape[1] for x in xs], first_point[:-1], first_cluster[:-1],
         [out.data_ptr() for out in outs]], device,
    )  # fmt: skip
    problem_of_cluster = per_cluster(list(range(len(xs))), n_clusters, device)

    piece = triton.next_power_of_2(n) if ascending else PIECE
    sizes = offsets.diff()
    first_piece = torch.zeros(k + 1, dtype=torch.int64, device=device)
    torch.cumsum((sizes + piece - 1) // piece, 0, out=first_piece[1:])
    n_pieces = k + n // piece  # at most
    cluster_of_piece = torch.searchsorted(first_piece[1:], torch.arange(n_pieces, device=device), right=True)
    n_split = min(k, n // (piece + 1))  # clusters of several pieces, at most
    n_slots = 2 * (n // piece + 1) if n_split else 1
    sums = torch.empty((n_slots, width), dtype=torch.float32, device=device)
    masses = torch.empty(n_slots, dtype=torch.float64, device=device)

    tile = tiles.segment_rows(n // k, width, ascending=ascending)
    chunks = triton.cdiv(width, tile.columns)
    out = DTYPE[outs[0].dtype]
    weighted = any(w is not None for w in weights)
    given = [
        torch.ones(x.shape[0], dtype=torch.float64, device=device) if w is None else w for x, w in zip(xs, weights, strict=True)
    ]
    flat_weights = torch.cat(given) if weighted else masses
    _sum_pieces[(n_pieces, chunks)](
        problems, order, offsets, first_piece, cluster_of_piece, problem_of_cluster, flat_weights, sums, masses, k, width,
        PIECE=piece, IN=DTYPE[xs[0].dtype], OUT=out, WEIGHTED=weighted, ALIGNED=aligned(xs) and aligned(outs),
        BLOCK_M=tile.rows, BLOCK_D=tile.columns, **tile.options(),
    )  # fmt: skip
    if n_split:
        longest = torch.topk(sizes, n_split).indices
        columns = tiles.up_to(128, width)
        _add_pieces[(n_split, triton.cdiv(width, columns))](
            problems, offsets, first_piece, longest, problem_of_cluster, sums, masses, width,
            PIECE=piece, OUT=out, BLOCK_P=16, BLOCK_D=columns,
        )  # fmt: skip


def update(xs: list[Tensor], labels: list[Tensor], n_clusters: list[int], weights: list[Tensor | None]) -> list[Tensor]:
    """Weighted mean of each cluster's points: Σ_{i∈c} w_i x_i / Σ_{i∈c} w_i, (K, D) in fp32."""
    if len({x.dtype for x in xs}) > 1:
        return [update([x], [y], [k], [w])[0] for x, y, k, w in zip(xs, labels, n_clusters, weights, strict=True)]
    sizes = [k * x.shape[1] for k, x in zip(n_clusters, xs, strict=True)]
    flat = torch.empty(sum(sizes), dtype=torch.float32, device=xs[0].device)
    centroids = [part.view(k, -1) for part, k in zip(flat.split(sizes), n_clusters, strict=True)]
    segment_means(xs, labels, weights, centroids, ascending=False)
    return centroids
