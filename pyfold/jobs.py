"""The work of a fold, cut into jobs: a fold group, or some of the other tensors. Each ends as a line of the journal.

While one is computed, the next tensors are read ahead and what has been made is written behind, hashing included. By weights
a job depends on nothing but the source, so any process can do any of them, in any order, to the same bytes; by function layers
come one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from pyfold.budget import Budget
from pyfold.device import OnGpu, OnHost
from pyfold.families import FoldGroup
from pyfold.families.attention import Attention
from pyfold.function_fold import ByFunction, HeadsFold, UnitsFold
from pyfold.io.checkpoint import Checkpoint
from pyfold.io.flow import Ahead, Behind
from pyfold.io.output import Output
from pyfold.io.safetensors import Reader, TensorInfo, torch_dtype
from pyfold.memory import Pool
from pyfold.plan import Plan
from pyfold.reads import Read, copy_reads, gram_reads, merge_reads, perform, strips_of, vector_read, whole_read
from pyfold.report import GroupReport
from pyfold.stages import Advance, Block, Stages
from pyfold.streams import Gpu
from pyfold.trace import Trace
from pyfold.weight_fold import WeightFold

_RECORDED = 1 << 28  # bytes of tensors outside the groups that are written between two lines of the journal


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
        device = OnGpu(gpu, budget.gpu, backend, pool) if gpu and not function else OnHost(backend, pool)
        reads = ((read.nbytes, partial(perform, reader, read, trace)) for job in jobs for read in reads_of(job, budget))
        with Ahead(reads, budget.ahead) as ahead:
            for job in jobs:
                stages = Stages(ahead, behind, output, plan, backend, advance, trace, pool, device)
                fold = _fold(job, budget, stages, function)
                if fold is None:
                    _copy(job, budget.behind, stages)
                report = fold.run() if fold else None
                behind.put(0, partial(settle, Finished(stages.source, stages.result, report)))


def _fold(job: Job, budget: Budget, stages: Stages, function: ByFunction | None) -> WeightFold | UnitsFold | HeadsFold | None:
    """What a job folds, and how; nothing where its tensors are copied."""
    if job.attention:
        assert function, "heads are folded by function"
        return HeadsFold(job.attention, job.tensors, job.n_clusters, budget.behind, stages, function)
    if job.group is None:
        return None
    cut = budget.groups[job.group.name]
    if function:
        return UnitsFold(job.group, job.tensors, job.n_clusters, cut, stages, function)
    return WeightFold(job.group, job.tensors, job.n_clusters, job.gain, cut, stages)


def _copy(job: Job, room: int, stages: Stages) -> None:
    """Stream tensors outside every folded group through, in pieces."""

    def blocks(info: TensorInfo) -> Iterator[Block]:
        to = stages.dtype(info.name)
        for read, values in stages.take(copy_reads(info)):
            stages.advance(read.nbytes, "other weights")
            converted = values
            if to != values.dtype:
                converted = stages.pool.empty(tuple(values.shape), to).copy_(values)
                stages.pool.give_back(values)
                stages.check_finite(read, converted, f"as {to}")
            del values
            yield Block(converted, read.begin, 0, lambda: None)
            del converted

    for info in job.tensors:
        same = stages.dtype(info.name) == torch_dtype(info.dtype)
        stages.write(info.name, blocks(info), 1, lambda: room, same=same)
