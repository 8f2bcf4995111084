"""What every launcher shares: lists of problems in, the tables that a kernel reads them from out.

A kernel solves a whole list in one launch: it reads addresses and sizes from an int64 table, one row a problem. Points and
clusters of all problems are numbered through, so that outputs are slices of one tensor.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# The interpreter (TRITON_INTERPRET=1) keeps bfloat16 as bit patterns and multiplies those; kernels widen there, which is exact.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Clusters(NamedTuple):
    """Compressed sparse rows: cluster c holds the points ``order[offsets[c] : offsets[c + 1]]``, ascending; N and K summed."""

    order: Tensor
    offsets: Tensor


def starts(sizes: list[int]) -> list[int]:
    """Where each problem's slice of a concatenated tensor begins, and the end of the last."""
    return list(accumulate(sizes, initial=0))


def table(columns: list[list[int]], device: torch.device) -> Tensor:
    """One row a problem, one column a field."""
    return torch.tensor(columns, dtype=torch.int64).T.contiguous().to(device, non_blocking=True)


def aligned(tensors: list[Tensor], *sizes: int) -> bool:
    """Whether every row begins at a multiple of 16 bytes: the kernel then takes 16-byte accesses."""
    return all(
        t.data_ptr() % 16 == 0 and all(size * t.element_size() % 16 == 0 for size in (t.stride(0), t.shape[1], *sizes))
        for t in tensors
    )


def cluster_members(labels: list[Tensor], n_clusters: list[int]) -> Clusters:
    """Counting sort of all problems at once; no host synchronisation."""
    first = starts(n_clusters)
    total = first[-1]
    # Radix sort takes one pass a byte: int16 keys, where they do, sort in a quarter of the time of int64 ones.
    dtype = torch.int16 if total < 2**15 else torch.int32
    keys = torch.cat([(label + base).to(dtype) for label, base in zip(labels, first, strict=False)])
    ordered, order = torch.sort(keys, stable=True)
    bounds = torch.arange(total + 1, dtype=dtype, device=keys.device)
    return Clusters(order, torch.searchsorted(ordered, bounds))


def per_cluster(values: list[int], n_clusters: list[int], device: torch.device) -> Tensor:
    """values[p] for every cluster of problem p, int32."""
    if len(values) == 1:
        return torch.full((n_clusters[0],), values[0], dtype=torch.int32, device=device)
    repeats = torch.tensor(n_clusters, device=device)
    return torch.repeat_interleave(torch.tensor(values, dtype=torch.int32, device=device), repeats, output_size=sum(n_clusters))


@triton.jit
def address(problem, FIELD: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer from the table."""
    pointer = tl.load(problem + FIELD).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def size(problem, FIELD: tl.constexpr, MULTIPLE: tl.constexpr):
    """A size or stride from the table, int64."""
    return tl.multiple_of(tl.load(problem + FIELD), MULTIPLE)


@triton.jit
def negative_zero(SHAPE: tl.constexpr):
    """-0.0, the neutral element of addition: 0.0 + -0.0 is 0.0. (The compiler reads the literal -0.0 as 0.0.)"""
    return tl.full(SHAPE, -(2**31), tl.int32).to(tl.float32, bitcast=True)
