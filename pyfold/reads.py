"""What a job reads, in the order in which it takes it: whole tensors, or pieces of them, each with what its hash takes.

Reader and job both follow these lists, so what is read ahead is what will be asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfold import ops
from pyfold.budget import PIECE, GroupBudget
from pyfold.families import FoldGroup
from pyfold.io.safetensors import ITEM_SIZE, Reader, TensorInfo, as_bytes
from pyfold.trace import Trace


class Read(NamedTuple):
    """Some rows and columns of a tensor, taken for a matrix of so many columns; without rows all of it, for its hash alone."""

    info: TensorInfo
    rows: range | None = None
    columns: range = range(0)
    width: int = 0
    digest: Any = None  # where reads follow one another in the tensor's bytes: of those so far

    @property
    def nbytes(self) -> int:
        return PIECE if self.rows is None else len(self.rows) * len(self.columns) * ITEM_SIZE[self.info.dtype]

    @property
    def begin(self) -> int:
        """The first element."""
        return self.rows.start * self.width + self.columns.start if self.rows else 0

    @property
    def last(self) -> bool:
        return not self.rows or self.rows.stop * self.width == self.info.n_parameters


class Piece(NamedTuple):
    """What was read (rows, columns); the SHA-256 of its tensor where that is known by now."""

    values: Tensor
    sha256: str | None


def perform(reader: Reader, read: Read, trace: Trace) -> Piece:
    """Read and hash."""
    name = read.info.name
    if read.rows is None:
        with trace("hash", tensor=name):
            return Piece(torch.empty(0), sha256_of(reader, read.info))
    with trace("read", tensor=name):
        values = reader.block(read.info, read.rows, read.columns, read.width)
    if read.digest is None:
        return Piece(values, None)
    with trace("hash", tensor=name):
        read.digest.update(as_bytes(values))
    return Piece(values, read.digest.hexdigest() if read.last else None)


def sha256_of(reader: Reader, info: TensorInfo) -> str:
    """Of a tensor on the disk."""
    digest = hashlib.sha256()
    for _, piece in reader.chunks(info, PIECE):
        digest.update(as_bytes(piece))
    return digest.hexdigest()


def copy_reads(info: TensorInfo) -> Iterator[Read]:
    """A tensor from its first to its last byte, in pieces."""
    digest, step = hashlib.sha256(), PIECE // ITEM_SIZE[info.dtype]
    for begin in range(0, max(info.n_parameters, 1), step):
        yield Read(info, range(begin, min(begin + step, info.n_parameters)), range(1), 1, digest)


def vector_read(info: TensorInfo) -> Read:
    """A small tensor that another job copies, and hashes."""
    return Read(info, range(1), range(info.n_parameters), info.n_parameters)


def whole_read(info: TensorInfo) -> Read:
    """A tensor at once."""
    return Read(info, range(info.n_parameters), range(1), 1, hashlib.sha256())


def strips_of(group: FoldGroup, cut: GroupBudget) -> list[tuple[int, int]]:
    """Rows of G that are computed together: all of it, where it is held in memory."""
    return [(0, group.width)] if cut.strip is None else list(ops.strips(group.width, cut.strip))


def gram_reads(group: FoldGroup, members: Iterable[TensorInfo], cut: GroupBudget, begin: int) -> Iterator[Read]:
    """For the rows of G from unit ``begin`` on; in the group's own order, which fixes the order of summation."""
    for info in members:
        if begin == 0 and not _in_order(group, info, cut):
            yield Read(info)
        yield from _blocks(group, info, cut, begin)


def merge_reads(group: FoldGroup, info: TensorInfo, cut: GroupBudget) -> Iterator[Read]:
    """A member for merging, where it is not held since the Gram matrix."""
    yield from _blocks(group, info, cut)
    if not _in_order(group, info, cut):
        yield Read(info)


def _blocks(group: FoldGroup, info: TensorInfo, cut: GroupBudget, begin: int = 0) -> Iterator[Read]:
    """A member from unit ``begin`` on, so many features at a time: rows of a consumer, columns of a producer."""
    units, extent = range(begin, group.width), info.n_parameters // group.width
    step, consumer = cut.features or extent, info.name in group.consumers
    digest = hashlib.sha256() if begin == 0 and _in_order(group, info, cut) else None
    for first in range(0, extent, step):
        features = range(first, min(first + step, extent))
        rows, columns = (features, units) if consumer else (units, features)
        yield Read(info, rows, columns, group.width if consumer else extent, digest)


def _in_order(group: FoldGroup, info: TensorInfo, cut: GroupBudget) -> bool:
    """Whether the blocks of a member follow one another in its bytes."""
    return info.name in group.consumers or cut.features is None or cut.features >= info.n_parameters // group.width
