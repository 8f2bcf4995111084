"""Rows x (N, D) -> means (K, D), and columns x (H, N) -> sums (H, K), of the members of each cluster.

Everything is read once, summed in fp32 in ascending member order and rounded once; a cluster of one keeps its bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyfold.ops.triton import tiles
from pyfold.ops.triton.kernels.problems import DTYPE, cluster_members, negative_zero
from pyfold.ops.triton.kernels.update import segment_means


@triton.jit
def _sum_columns(
    x, order, offsets, scale, out, h, n_clusters, stride,
    IN: tl.constexpr, OUT: tl.constexpr, SCALED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Every cluster's sum in BLOCK_H rows. The gathers take single elements: the first brings a sector from memory, the others
    find it in L1, which is why one program does the whole row."""
    rows = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    row = x + rows.to(tl.int64)[:, None] * stride
    for begin in range(0, n_clusters, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        first = tl.load(offsets + k, mask=k < n_clusters, other=0)
        count = tl.load(offsets + k + 1, mask=k < n_clusters, other=0) - first
        nothing = negative_zero([BLOCK_H, BLOCK_K])  # 0.0 would turn a lone -0.0 into 0.0
        acc = nothing
        for at in range(0, tl.max(count)):
            member = tl.load(order + first + at, mask=at < count, other=0)
            inside = (rows < h)[:, None] & (at < count)[None, :]
            value = tl.load(row + member[None, :], mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
            if SCALED:
                value *= tl.load(scale + member, mask=at < count, other=0.0)[None, :]
            acc += tl.where(inside, value, nothing)
        inside = (rows < h)[:, None] & (k < n_clusters)[None, :]
        tl.store(out + rows.to(tl.int64)[:, None] * n_clusters + k[None, :], acc.to(OUT), mask=inside)


def merge_rows(x: Tensor, labels: Tensor, n_clusters: int, weights: Tensor | None, out: Tensor) -> None:
    """out (K, D) = (UᵀWU)⁻¹ UᵀW x, with one-hot U (N x K)."""
    segment_means([x], [labels], [weights], [out], ascending=True)


def merge_columns(x: Tensor, labels: Tensor, n_clusters: int, scale: Tensor | None, out: Tensor) -> None:
    """out (H, K) = x diag(scale) U, with one-hot U (N x K)."""
    order, offsets = cluster_members([labels], [n_clusters])
    tile = tiles.segment_columns(n_clusters)
    _sum_columns[(triton.cdiv(x.shape[0], tile.rows),)](
        x, order, offsets, x if scale is None else scale, out, x.shape[0], n_clusters, x.stride(0),
        IN=DTYPE[x.dtype], OUT=DTYPE[out.dtype], SCALED=scale is not None, BLOCK_H=tile.rows, BLOCK_K=tile.columns,
        **tile.options(),
    )  # fmt: skip
