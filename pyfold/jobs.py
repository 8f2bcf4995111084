"""The work of a fold, cut into jobs: a fold group, or some of the other tensors. Each ends as a line of the journal.

While one is computed, the next tensors are read ahead and what has been made is written behind, hashing included. A job depends
on nothing but the source, so any process can do any of them, in any order, to the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfold import ops
from pyfold.budget import PIECE, Budget, GroupBudget
from pyfold.clustering import cluster
from pyfold.errors import PyfoldError
from pyfold.families import FoldGroup
from pyfold.io.checkpoint import Checkpoint
from pyfold.io.flow import Ahead, Behind
from pyfold.io.output import Output
from pyfold.io.safetensors import ITEM_SIZE, Reader, TensorInfo, as_bytes, torch_dtype
from pyfold.plan import Plan
from pyfold.report import GroupReport
from pyfold.trace import Trace

_RECORDED = 1 << 28  # bytes of tensors outside the groups that are written between two lines of the journal
# Bytes of source weights that are done since the last call, and what is at work.
Advance = Callable[[int, str], None]


@dataclass(frozen=True)
class Job:
    """What is finished at once: tensors to be copied, or to be folded as one group into so many clusters."""

    tensors: tuple[TensorInfo, ...]
    group: FoldGroup | None = None
    n_clusters: int = 0


class Finished(NamedTuple):
    """A job that is on the disk: name -> SHA-256 of the tensors read and of those written; a group's report."""

    source: dict[str, str]
    result: dict[str, str]
    group: GroupReport | None

    def to_dict(self) -> dict[str, Any]:
        """As a line of the journal."""
        return {"source": self.source, "result": self.result, "group": self.group and vars(self.group)}

    @staticmethod
    def from_dict(entry: dict[str, Any]) -> Finished:
        return Finished(entry["source"], entry["result"], entry["group"] and GroupReport(**entry["group"]))


def make_jobs(checkpoint: Checkpoint, plan: Plan, finished: Iterable[str] = ()) -> list[Job]:
    """Every job of a plan but those of tensors ``finished``: groups in layer order, then the other tensors."""
    done = set(finished)
    folded = {name for group, _ in plan.groups for name in group.tensors}
    jobs = [
        Job(tuple(checkpoint.tensors[name] for name in group.tensors), group, k)
        for group, k in plan.groups
        if not done.issuperset(group.tensors)
    ]
    batch: list[TensorInfo] = []
    for name, info in checkpoint.tensors.items():
        if name not in folded and name not in done:
            batch.append(info)
        if sum(one.nbytes for one in batch) >= _RECORDED:
            jobs.append(Job(tuple(batch)))
            batch = []
    return [*jobs, Job(tuple(batch))] if batch else jobs


def traffic(jobs: Iterable[Job], budget: Budget) -> int:
    """Bytes that the jobs read."""
    return sum(read.info.nbytes if read.rows is None else read.nbytes for job in jobs for read in _reads(job, budget))


def run_jobs(
    jobs: list[Job],
    output: Output,
    plan: Plan,
    budget: Budget,
    backend: str,
    *,
    record: Callable[[Finished], None],
    advance: Advance,
    trace: Trace,
) -> None:
    """Do the jobs, in order. ``record`` is called, from another thread, with each that is on the disk."""
    with Reader() as reader, Behind() as behind:
        reads = ((read.nbytes, partial(_perform, reader, read, trace)) for job in jobs for read in _reads(job, budget))
        with Ahead(reads, budget.ahead) as ahead:
            stages = _Stages(ahead, behind, output, plan, backend, advance, trace)
            for job in jobs:
                source: dict[str, str] = {}
                result: dict[str, str] = {}
                if job.group:
                    report = _fold(job, job.group, budget.groups[job.group.name], stages, source, result)
                else:
                    report = None
                    _copy(job, budget.behind, stages, source, result)
                behind.put(0, partial(_settle, output, record, Finished(source, result, report), trace))


def _settle(output: Output, record: Callable[[Finished], None], finished: Finished, trace: Trace) -> None:
    with trace("sync"):
        output.sync()
        record(finished)


class _Read(NamedTuple):
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
        return self.rows.start * self.width + self.columns.start if self.rows else 0

    @property
    def last(self) -> bool:
        return not self.rows or self.rows.stop * self.width == self.info.n_parameters


class _Piece(NamedTuple):
    """What was read (rows, columns); the SHA-256 of its tensor where that is known by now."""

    values: Tensor
    sha256: str | None


def _reads(job: Job, budget: Budget) -> Iterator[_Read]:
    """All that a job reads, in the order in which it takes it."""
    if job.group is None:
        for info in job.tensors:
            yield from _chunks(info)
        return
    cut = budget.groups[job.group.name]
    for begin, _ in _strips(job.group, cut):
        yield from _gram_reads(job.group, job.tensors, cut, begin)
    if cut.features:
        for info in job.tensors:
            yield from _merge_reads(job.group, info, cut)


def _chunks(info: TensorInfo) -> Iterator[_Read]:
    """A tensor from its first to its last byte."""
    digest, step = hashlib.sha256(), PIECE // ITEM_SIZE[info.dtype]
    for begin in range(0, max(info.n_parameters, 1), step):
        yield _Read(info, range(begin, min(begin + step, info.n_parameters)), range(1), 1, digest)


def _gram_reads(group: FoldGroup, members: Iterable[TensorInfo], cut: GroupBudget, begin: int) -> Iterator[_Read]:
    """For the rows of G from unit ``begin`` on; in the group's own order, which fixes the order of summation."""
    for info in members:
        if begin == 0 and not _in_order(group, info, cut):
            yield _Read(info)
        yield from _blocks(group, info, cut, begin)


def _merge_reads(group: FoldGroup, info: TensorInfo, cut: GroupBudget) -> Iterator[_Read]:
    yield from _blocks(group, info, cut)
    if not _in_order(group, info, cut):
        yield _Read(info)


def _blocks(group: FoldGroup, info: TensorInfo, cut: GroupBudget, begin: int = 0) -> Iterator[_Read]:
    """A member from unit ``begin`` on, so many features at a time: rows of a consumer, columns of a producer."""
    units, extent = range(begin, group.width), info.n_parameters // group.width
    step, consumer = cut.features or extent, info.name in group.consumers
    digest = hashlib.sha256() if begin == 0 and _in_order(group, info, cut) else None
    for first in range(0, extent, step):
        features = range(first, min(first + step, extent))
        rows, columns = (features, units) if consumer else (units, features)
        yield _Read(info, rows, columns, group.width if consumer else extent, digest)


def _in_order(group: FoldGroup, info: TensorInfo, cut: GroupBudget) -> bool:
    """Whether the blocks of a member follow one another in its bytes."""
    return info.name in group.consumers or cut.features is None or cut.features >= info.n_parameters // group.width


def _strips(group: FoldGroup, cut: GroupBudget) -> list[tuple[int, int]]:
    """Rows of G that are computed together: all of it, where it is held in memory."""
    return [(0, group.width)] if cut.strip is None else list(ops.strips(group.width, cut.strip))


def _perform(reader: Reader, read: _Read, trace: Trace) -> _Piece:
    name = read.info.name
    if read.rows is None:
        with trace("hash", tensor=name):
            return _Piece(torch.empty(0), _sha256(reader, read.info))
    with trace("read", tensor=name):
        values = reader.block(read.info, read.rows, read.columns, read.width)
    if read.digest is None:
        return _Piece(values, None)
    with trace("hash", tensor=name):
        read.digest.update(as_bytes(values))
    return _Piece(values, read.digest.hexdigest() if read.last else None)


def _sha256(reader: Reader, info: TensorInfo) -> str:
    """Of a tensor on the disk."""
    digest = hashlib.sha256()
    for _, piece in reader.chunks(info, PIECE):
        digest.update(as_bytes(piece))
    return digest.hexdigest()


class _Block(NamedTuple):
    """What is written (rows, columns), and from which row and column on."""

    values: Tensor
    row: int
    column: int


class _Stages(NamedTuple):
    """Between what is read and what is written."""

    ahead: Ahead[_Piece]
    behind: Behind
    output: Output
    plan: Plan
    backend: str
    advance: Advance
    trace: Trace

    def dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = torch_dtype(self.plan.tensors[name][0])
        return dtype

    def take(self, reads: Iterable[_Read], source: dict[str, str]) -> Iterator[tuple[_Read, Tensor]]:
        """What the reader makes of ``reads``, finite. A tensor read again must be what it was."""
        for read in reads:
            with self.trace("wait for the reader"):
                values, sha256 = self.ahead.take()
            if sha256 and source.setdefault(read.info.name, sha256) != sha256:
                raise PyfoldError(f"{read.info.path}: changed while it was being folded; fold it again")
            if read.rows is not None:
                self.check_finite(read, values, "in the source")
                yield read, values
            del values

    def write(self, name: str, blocks: Iterable[_Block], width: int, result: dict[str, str], room: Callable[[], int]) -> None:
        """Have a tensor of so many columns written behind, block by block, while what waits to be written has ``room``."""
        digest, in_order = hashlib.sha256(), True
        for block in blocks:
            in_order = in_order and block.values.shape[1] == width
            self.behind.put(block.values.nbytes, partial(self._write, name, block, width, digest if in_order else None))
            del block
            self.wait(room())
        self.behind.put(0, partial(self._note, name, digest if in_order else None, result))

    def wait(self, n_bytes: int) -> None:
        """Until no more than so many bytes are left to be written."""
        with self.trace("wait for the writer"):
            self.behind.wait(max(0, n_bytes))

    def _write(self, name: str, block: _Block, width: int, digest: Any) -> None:
        if digest:
            with self.trace("hash", tensor=name):
                digest.update(as_bytes(block.values))
        with self.trace("write", tensor=name):
            self.output.write(name, block.values, block.row, block.column, width)

    def _note(self, name: str, digest: Any, result: dict[str, str]) -> None:
        if digest is None:
            with self.trace("hash", tensor=name), Reader() as reader:
                result[name] = _sha256(reader, self.output.place(name))
        else:
            result[name] = digest.hexdigest()

    def check_finite(self, read: _Read, values: Tensor, what: str) -> None:
        if values.dtype not in ops.FLOATS:
            return
        bad = ops.first_nonfinite(values, backend=self.backend)
        if bad is not None:
            row, column = divmod(bad, values.shape[1])
            at, value = read.begin + row * read.width + column, values.flatten()[bad].item()
            raise PyfoldError(f"{read.info.path}: tensor '{read.info.name}' holds {value} {what} at element {at}")


def _copy(job: Job, room: int, stages: _Stages, source: dict[str, str], result: dict[str, str]) -> None:
    """Stream tensors outside every folded group through, in pieces."""

    def blocks(info: TensorInfo) -> Iterator[_Block]:
        to = stages.dtype(info.name)
        for read, values in stages.take(_chunks(info), source):
            stages.advance(read.nbytes, "other weights")
            if to != values.dtype:
                values = values.to(to)
                stages.check_finite(read, values, f"as {to}")
            yield _Block(values, read.begin, 0)

    for info in job.tensors:
        stages.write(info.name, blocks(info), 1, result, lambda: room)


def _fold(
    job: Job, group: FoldGroup, cut: GroupBudget, stages: _Stages, source: dict[str, str], result: dict[str, str]
) -> GroupReport:
    """Read a group, cluster its units, write its members merged.

    Weights are held from the one to the other, or, where they are cut, read again.
    """
    k = job.n_clusters
    held: dict[str, tuple[_Read, Tensor]] = {}

    def room() -> int:
        return cut.behind - sum(values.nbytes for _, values in held.values())

    with _gram(job, group, cut, stages, source, held, room) as gram, stages.trace("cluster", group=group.name):
        try:
            clusters = cluster(gram=gram, n_clusters=k, overwrite_gram=True, backend=stages.backend)
        except ValueError as error:
            raise PyfoldError(f"{job.tensors[0].path}: {group.name} cannot be clustered: {error}") from None
        del gram

    def merged(info: TensorInfo) -> Iterator[_Block]:
        consumer, to = info.name in group.consumers, stages.dtype(info.name)
        reads = stages.take(_merge_reads(group, info, cut), source) if cut.features else (held.pop(info.name) for _ in range(1))
        for read, values in reads:
            with stages.trace("merge", tensor=info.name):
                merge = ops.merge_columns if consumer else ops.merge_rows
                block = merge(values, clusters.labels, k, dtype=to, backend=stages.backend)
            del values
            stages.check_finite(read, block, "folded")
            assert read.rows is not None
            yield _Block(block, read.rows.start if consumer else 0, read.columns.start)
            del block

    for info in job.tensors:
        width = k if info.name in group.consumers else info.n_parameters // group.width
        stages.write(info.name, merged(info), width, result, room)
    return GroupReport(
        name=group.name,
        layer=group.layer,
        width=group.width,
        folded_width=k,
        inertia=clusters.inertia,
        ward_inertia=clusters.ward_inertia,
        total_inertia=clusters.total_inertia,
        n_moves=clusters.n_moves,
        n_singletons=int((torch.bincount(clusters.labels) == 1).sum()),
    )


@contextmanager
def _gram(
    job: Job,
    group: FoldGroup,
    cut: GroupBudget,
    stages: _Stages,
    source: dict[str, str],
    held: dict[str, tuple[_Read, Tensor]],
    room: Callable[[], int],
) -> Iterator[Tensor | ops.GramFile]:
    """The Gram matrix of a group, in memory or, strip by strip, in a file. Whole weights are ``held`` from here on."""
    largest = max(read.nbytes for read in _gram_reads(group, job.tensors, cut, 0))
    stages.wait(room() - largest)
    with nullcontext() if cut.strip is None else ops.GramFile(stages.output.scratch(), group.width) as file:
        for begin, end in _strips(group, cut):
            strip = torch.empty((end - begin, group.width - begin), dtype=torch.float32)
            accumulate = False
            for read, values in stages.take(_gram_reads(group, job.tensors, cut, begin), source):
                name = read.info.name
                with stages.trace("gram", tensor=name):
                    consumer = name in group.consumers
                    ops.gram(
                        values, rows=len(strip), out=strip, accumulate=accumulate, transposed=consumer, backend=stages.backend
                    )
                accumulate = True
                if cut.features is None:
                    held[name] = (read, values)
                if begin == 0:
                    stages.advance(read.nbytes, group.name)
                del values
                stages.wait(room() - largest)
            if file:
                with stages.trace("spill", rows=len(strip)):
                    file.write(strip)
                del strip
        yield file or strip
