"""The work of a fold, cut into jobs: a fold group, or some of the other tensors. Each ends as a line of the journal.

While one is computed, the next tensors are read ahead and what has been made is written behind, hashing included. By weights
a job depends on nothing but the source, so any process can do any of them, in any order, to the same bytes; by function layers
come one after another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pyfold import ops
from pyfold.budget import Budget, GroupBudget
from pyfold.clustering import Clustering
from pyfold.device import Device, OnGpu, OnHost
from pyfold.errors import PyfoldError
from pyfold.families import FoldGroup
from pyfold.families.activations import Activations
from pyfold.families.attention import Attention
from pyfold.families.noise import Noise
from pyfold.function_metric import fold_units, moments
from pyfold.head_folding import fold_heads
from pyfold.io.checkpoint import Checkpoint
from pyfold.io.flow import Ahead, Behind
from pyfold.io.output import Output
from pyfold.io.safetensors import Reader, TensorInfo, as_bytes, torch_dtype
from pyfold.memory import Pool
from pyfold.plan import Plan
from pyfold.reads import (
    Piece,
    Read,
    copy_reads,
    gram_reads,
    merge_reads,
    perform,
    sha256_of,
    strips_of,
    vector_read,
    whole_read,
)
from pyfold.report import GroupReport
from pyfold.streams import Gpu
from pyfold.trace import Trace
from pyfold.variance import Sketch

_RECORDED = 1 << 28  # bytes of tensors outside the groups that are written between two lines of the journal
# Bytes of source weights that are done since the last call, and what is at work.
Advance = Callable[[int, str], None]


class ByFunction(NamedTuple):
    """The function metric: what the groups read, of tokens what the loss on them knows of each layer's units, and whether
    consumers make up for what is lost by ridge regression."""

    activations: Activations | Noise
    information: list[Tensor] | None
    ridge: bool


@dataclass(frozen=True)
class Job:
    """What is finished at once: tensors to be copied, or to be folded as one group, or as one layer's heads, into so many
    clusters. With the gain of its norm, a group's output keeps the variance that it has behind that."""

    tensors: tuple[TensorInfo, ...]
    group: FoldGroup | None = None
    n_clusters: int = 0
    attention: Attention | None = None
    gain: TensorInfo | None = None


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


def make_jobs(checkpoint: Checkpoint, plan: Plan, finished: Iterable[str] = (), *, keeps_variance: bool = False) -> list[Job]:
    """Every job of a plan but those of tensors ``finished``: in layer order heads, then the group, then the other tensors.
    ``keeps_variance``: consumers are scaled so that groups do."""
    tensors, done = checkpoint.tensors, set(finished)
    folds = {one.name: Job(tuple(tensors[name] for name in one.names), None, k, one) for one, k in plan.heads}
    for group, k in plan.groups:
        gain = tensors[group.gain] if keeps_variance else None
        folds[group.name] = Job(tuple(tensors[name] for name in group.tensors), group, k, gain=gain)
    folded = {info.name for job in folds.values() for info in job.tensors}
    jobs = [folds[name] for name in plan.folds if not done.issuperset(info.name for info in folds[name].tensors)]
    batch: list[TensorInfo] = []
    for name, info in tensors.items():
        if name not in folded and name not in done:
            batch.append(info)
        if sum(one.nbytes for one in batch) >= _RECORDED:
            jobs.append(Job(tuple(batch)))
            batch = []
    return [*jobs, Job(tuple(batch))] if batch else jobs


def reads_of(job: Job, budget: Budget) -> Iterator[Read]:
    """All that a job reads, in the order in which it takes it."""
    if job.attention:
        yield from map(whole_read, job.tensors)
        return
    if job.group is None:
        for info in job.tensors:
            yield from copy_reads(info)
        return
    cut = budget.groups[job.group.name]
    if job.gain:
        yield vector_read(job.gain)
    for begin, _ in strips_of(job.group, cut):
        yield from gram_reads(job.group, job.tensors, cut, begin)
    if cut.features:
        for info in job.tensors:
            yield from merge_reads(job.group, info, cut)


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
    gpu: Gpu | None = None,
    function: ByFunction | None = None,
) -> None:
    """Do the jobs, in order. ``record`` is called, from another thread, with each that is on the disk."""

    def settle(finished: Finished) -> None:
        with trace("sync"):
            output.sync()
            record(finished)

    with (
        Pool(budget.buffers, gpu.pin, gpu.unpin) if gpu else Pool(budget.buffers) as pool,
        Reader(pool) as reader,
        Behind() as behind,
    ):
        device = OnGpu(gpu, budget.gpu, backend, pool) if gpu else OnHost(backend, pool)
        reads = ((read.nbytes, partial(perform, reader, read, trace)) for job in jobs for read in reads_of(job, budget))
        with Ahead(reads, budget.ahead) as ahead:
            for job in jobs:
                stages = _Stages(ahead, behind, output, plan, backend, advance, trace, pool, device)
                report: GroupReport | None
                if job.attention and function:
                    report = _HeadsFold(job, job.attention, budget.behind, stages, function).run()
                elif job.group and function:
                    report = _FunctionFold(job, job.group, budget.groups[job.group.name], stages, function).run()
                elif job.group:
                    report = _Fold(job, job.group, budget.groups[job.group.name], stages).run()
                else:
                    report = None
                    _copy(job, budget.behind, stages)
                behind.put(0, partial(settle, Finished(stages.source, stages.result, report)))


class _Block(NamedTuple):
    """What is written (rows, columns), and from which row and column on; what to call before it is read."""

    values: Tensor
    row: int
    column: int
    settle: Callable[[], None]


@dataclass(frozen=True)
class _Stages:
    """Between what is read for a job and what is written, with the hashes of both."""

    ahead: Ahead[Piece]
    behind: Behind
    output: Output
    plan: Plan
    backend: str
    advance: Advance
    trace: Trace
    pool: Pool
    device: Device
    source: dict[str, str] = field(default_factory=dict)
    result: dict[str, str] = field(default_factory=dict)

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor of the result."""
        dtype: torch.dtype = torch_dtype(self.plan.tensors[name][0])
        return dtype

    def take(self, reads: Iterable[Read]) -> Iterator[tuple[Read, Tensor]]:
        """What the reader makes of ``reads``, finite. A tensor read again must be what it was."""
        for read in reads:
            with self.trace("wait for the reader"):
                values, sha256 = self.ahead.take()
            if sha256 and self.source.setdefault(read.info.name, sha256) != sha256:
                raise PyfoldError(f"{read.info.path}: changed while it was being folded; fold it again")
            if read.rows is not None:
                self.check_finite(read, values, "in the source")
                yield read, values
            del values

    def write(self, name: str, blocks: Iterable[_Block], width: int, room: Callable[[], int], *, same: bool = False) -> None:
        """Have a tensor of so many columns written behind, block by block, while what waits to be written has ``room``.

        Its hash is that of the ``same`` tensor in the source, or is taken as it is written, or, out of order, read back.
        """
        digest, in_order = None if same else hashlib.sha256(), True
        for block in blocks:
            in_order = in_order and block.values.shape[1] == width
            self.behind.put(block.values.nbytes, partial(self._write, name, block, width, digest if in_order else None))
            del block
            self.wait(room())
        if same:
            self.result[name] = self.source[name]
        else:
            self.behind.put(0, partial(self._note, name, digest if in_order else None))

    def wait(self, n_bytes: int) -> None:
        """Until no more than so many bytes are left to be written."""
        with self.trace("wait for the writer"):
            self.behind.wait(max(0, n_bytes))

    def _write(self, name: str, block: _Block, width: int, digest: Any) -> None:
        block.settle()
        if digest:
            with self.trace("hash", tensor=name):
                digest.update(as_bytes(block.values))
        with self.trace("write", tensor=name):
            self.output.write(name, block.values, block.row, block.column, width)
        self.pool.give_back(block.values)

    def _note(self, name: str, digest: Any) -> None:
        if digest:
            self.result[name] = digest.hexdigest()
        else:
            with self.trace("hash", tensor=name), Reader() as reader:
                self.result[name] = sha256_of(reader, self.output.place(name))

    def check_finite(self, read: Read, values: Tensor, what: str) -> None:
        if values.dtype not in ops.FLOATS:
            return
        bad = ops.first_nonfinite(values, backend=self.backend)
        if bad is not None:
            row, column = divmod(bad, values.shape[1])
            at, value = read.begin + row * read.width + column, values.flatten()[bad].item()
            raise PyfoldError(f"{read.info.path}: tensor '{read.info.name}' holds {value} {what} at element {at}")


def _copy(job: Job, room: int, stages: _Stages) -> None:
    """Stream tensors outside every folded group through, in pieces."""

    def blocks(info: TensorInfo) -> Iterator[_Block]:
        to = stages.dtype(info.name)
        for read, values in stages.take(copy_reads(info)):
            stages.advance(read.nbytes, "other weights")
            converted = values
            if to != values.dtype:
                converted = stages.pool.empty(tuple(values.shape), to).copy_(values)
                stages.pool.give_back(values)
                stages.check_finite(read, converted, f"as {to}")
            del values
            yield _Block(converted, read.begin, 0, lambda: None)
            del converted

    for info in job.tensors:
        same = stages.dtype(info.name) == torch_dtype(info.dtype)
        stages.write(info.name, blocks(info), 1, lambda: room, same=same)


@dataclass(frozen=True)
class _Fold:
    """Read a group, cluster its units, write its members merged.

    Weights are ``held`` from the one to the other, or, where they are cut, read again.
    """

    job: Job
    group: FoldGroup
    cut: GroupBudget
    stages: _Stages
    held: dict[str, tuple[Read, Tensor]] = field(default_factory=dict)

    def run(self) -> GroupReport:
        group, stages = self.group, self.stages
        sketch = self._sketch()
        with stages.device.group(group.name):
            clusters = self._clusters(sketch)
            ratio = sketch.ratio(clusters.labels, clusters.n_clusters) if sketch else None
            del sketch
            scale = ratio**-0.5 if ratio else 1.0
            for info in self.job.tensors:
                width = self.job.n_clusters if info.name in group.consumers else info.n_parameters // group.width
                stages.write(info.name, self._merged(info, clusters, scale), width, self._room)
        return _report(group, clusters, output_variance=ratio)

    def _sketch(self) -> Sketch | None:
        """Of the group, if its output is to keep its variance."""
        if self.job.gain is None:
            return None
        [(_, values)] = self.stages.take([vector_read(self.job.gain)])
        sketch = Sketch(self.group, values[0].clone(), self.stages.backend)
        self.stages.pool.give_back(values)
        return sketch

    def _room(self) -> int:
        """Bytes for what waits to be written."""
        return self.cut.behind - sum(values.nbytes for _, values in self.held.values())

    def _clusters(self, sketch: Sketch | None) -> Clustering:
        """By the group's Gram matrix: in memory, or, strip by strip, in a file; the sketch is made as weights go by."""
        group, cut, stages, device = self.group, self.cut, self.stages, self.stages.device
        largest = max(read.nbytes for read in gram_reads(group, self.job.tensors, cut, 0))
        stages.wait(self._room() - largest)
        with nullcontext() if cut.strip is None else ops.GramFile(stages.output.scratch(), group.width) as file:
            for begin, end in strips_of(group, cut):
                device.strip(end - begin, group.width - begin)
                for read, values in stages.take(gram_reads(group, self.job.tensors, cut, begin)):
                    assert read.rows is not None
                    name = read.info.name
                    with stages.trace("gram", tensor=name):
                        device.gram(values, transposed=name in group.consumers)
                    if sketch and begin == 0:
                        with stages.trace("sketch", tensor=name):
                            sketch.add(name, values, read.rows.start if name in group.consumers else read.columns.start)
                    if cut.features is None:
                        self.held[name] = (read, values)
                    else:
                        device.give_back(values)
                    if begin == 0:
                        stages.advance(read.nbytes, group.name)
                    del values
                    stages.wait(self._room() - largest)
                if file:
                    with stages.trace("spill", rows=end - begin):
                        device.spill(file)
            with stages.trace("cluster", group=group.name):
                try:
                    return device.cluster(self.job.n_clusters, file)
                except ValueError as error:
                    raise PyfoldError(f"{self.job.tensors[0].path}: {group.name} cannot be clustered: {error}") from None

    def _merged(self, info: TensorInfo, clusters: Clustering, scale: float) -> Iterator[_Block]:
        """A member with its clusters merged, as it is held or in pieces."""
        stages, consumer = self.stages, info.name in self.group.consumers
        again = stages.take(merge_reads(self.group, info, self.cut))
        for read, values in again if self.cut.features else self._let_go(info.name):
            check = partial(stages.check_finite, read, what="folded")
            with stages.trace("merge", tensor=info.name):
                merged = stages.device.merge(values, clusters, stages.dtype(info.name), check, consumer=consumer, scale=scale)
            stages.device.give_back(values)
            del values
            assert read.rows is not None
            yield _Block(merged.values, read.rows.start if consumer else 0, read.columns.start, merged.settle)
            del merged

    def _let_go(self, name: str) -> Iterator[tuple[Read, Tensor]]:
        yield self.held.pop(name)


@dataclass(frozen=True)
class _FunctionFold:
    """Read a group, see what its units do on tokens that have come through all layers before, or on noise, fold them by
    that."""

    job: Job
    group: FoldGroup
    cut: GroupBudget
    stages: _Stages
    function: ByFunction

    def run(self) -> GroupReport:
        group, stages, (activations, information, ridge) = self.group, self.stages, self.function
        weights: dict[str, Tensor] = {}
        reads: dict[str, Read] = {}
        for read, values in stages.take(gram_reads(group, self.job.tensors, self.cut, 0)):
            reads[read.info.name], weights[read.info.name] = read, values.view(read.info.shape)
            stages.advance(read.nbytes, group.name)
        mlp = activations.mlp(group.layer, weights)
        with stages.trace("activations", group=group.name):
            seen = moments((mlp.units(x) for x in activations.inputs(group.layer)), stages.backend)
        del mlp
        [consumer] = (weights[name].float() for name in group.consumers)
        stages.wait(0)  # for what was folded before: now most is in memory
        with stages.trace("fold", group=group.name):
            try:
                folded = fold_units(
                    consumer,
                    seen,
                    self.job.n_clusters,
                    ridge=ridge,
                    backend=stages.backend,
                    information=None if information is None else information[group.layer],
                )
            except (ValueError, LinAlgError) as error:
                raise _cannot_fold(self.job, group.name, error) from None
        del seen, consumer
        for name, values in weights.items():
            made = (folded.consumer if name in group.consumers else values[folded.kept]).to(stages.dtype(name))
            stages.pool.give_back(values)
            weights[name] = made
            block = made.view(len(made), -1)
            stages.check_finite(reads[name], block, "folded")
            stages.write(name, [_Block(block, 0, 0, lambda: None)], block.shape[1], lambda: self.cut.behind)
        with stages.trace("feed", group=group.name):
            activations.feed(activations.mlp(group.layer, weights))
        return _report(group, folded.clusters, output_error=folded.error, ridge=folded.ridge)


def _cannot_fold(job: Job, name: str, error: Exception) -> PyfoldError:
    return PyfoldError(f"{job.tensors[0].path}: {name} cannot be folded: {str(error).splitlines()[0]}")


@dataclass(frozen=True)
class _HeadsFold:
    """Read a layer's heads, see what they say on tokens that have come through all layers before, fold their KV groups."""

    job: Job
    attention: Attention
    room: int
    stages: _Stages
    function: ByFunction

    def run(self) -> GroupReport:
        attention, stages, activations = self.attention, self.stages, self.function.activations
        assert isinstance(activations, Activations), "heads are not folded on noise"
        weights: dict[str, Tensor] = {}
        reads: dict[str, Read] = {}
        for read, values in stages.take(map(whole_read, self.job.tensors)):
            reads[read.info.name], weights[read.info.name] = read, values.view(read.info.shape)
            stages.advance(read.nbytes, attention.name)
        with stages.trace("fold", group=attention.name):
            try:
                folded = fold_heads(
                    attention,
                    weights,
                    partial(activations.before_attention, attention.layer),
                    partial(activations.said, attention.layer),
                    self.job.n_clusters,
                    backend=stages.backend,
                )
            except (ValueError, LinAlgError) as error:
                raise _cannot_fold(self.job, attention.name, error) from None
        for name, values in weights.items():
            made = folded.tensors.get(name, values).to(stages.dtype(name))
            if name in folded.tensors:
                stages.pool.give_back(values)
            weights[name] = made
            block = made.view(len(made), -1)
            stages.check_finite(reads[name], block, "folded")
            stages.write(name, [_Block(block, 0, 0, lambda: None)], block.shape[1], lambda: self.room)
        with stages.trace("feed", group=attention.name):
            activations.attend(attention.layer, weights)
        return GroupReport(
            name=attention.name,
            layer=attention.layer,
            width=attention.n_groups,
            folded_width=len(folded.clusters),
            inertia=folded.distance,
            ward_inertia=folded.distance,
            total_inertia=float(attention.n_groups),
            n_moves=0,
            n_singletons=sum(len(members) == 1 for members in folded.clusters),
            output_error=folded.error,
            ridge=folded.ridge,
        )


def _report(group: FoldGroup, clusters: Clustering, **seen: float | None) -> GroupReport:
    """``seen``: what the function metric knows beside."""
    return GroupReport(
        name=group.name,
        layer=group.layer,
        width=group.width,
        folded_width=clusters.n_clusters,
        inertia=clusters.inertia,
        ward_inertia=clusters.ward_inertia,
        total_inertia=clusters.total_inertia,
        n_moves=clusters.n_moves,
        n_singletons=int((torch.bincount(clusters.labels) == 1).sum()),
        **seen,
    )
