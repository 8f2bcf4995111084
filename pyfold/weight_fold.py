"""A group folded by its weights: read in pieces, clustered by their Gram matrix, written merged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from pyfold import ops
from pyfold.budget import GroupBudget
from pyfold.clustering import Clustering
from pyfold.errors import PyfoldError
from pyfold.families import FoldGroup
from pyfold.io.safetensors import TensorInfo
from pyfold.reads import Read, gram_reads, merge_reads, strips_of, vector_read
from pyfold.report import GroupReport
from pyfold.stages import Block, Stages
from pyfold.variance import Sketch


@dataclass(frozen=True)
class WeightFold:
    """Read a group, cluster its units, write its members merged.

    Weights are ``held`` from the one to the other, or, where they are cut, read again. With the ``gain`` of its norm, a
    group's output keeps the variance that it has behind that.
    """

    group: FoldGroup
    tensors: tuple[TensorInfo, ...]
    n_clusters: int
    gain: TensorInfo | None
    cut: GroupBudget
    stages: Stages
    held: dict[str, tuple[Read, Tensor]] = field(default_factory=dict)

    def run(self) -> GroupReport:
        group, stages = self.group, self.stages
        sketch = self._sketch()
        with stages.device.group(group.name):
            clusters = self._clusters(sketch)
            ratio = sketch.ratio(clusters.labels, clusters.n_clusters) if sketch else None
            del sketch
            scale = ratio**-0.5 if ratio else 1.0
            for info in self.tensors:
                width = self.n_clusters if info.name in group.consumers else info.n_parameters // group.width
                stages.write(info.name, self._merged(info, clusters, scale), width, self._room)
        return GroupReport.of(group, clusters, output_variance=ratio)

    def _sketch(self) -> Sketch | None:
        """Of the group, if its output is to keep its variance."""
        if self.gain is None:
            return None
        [(_, values)] = self.stages.take([vector_read(self.gain)])
        sketch = Sketch(self.group, values[0].clone(), self.stages.backend)
        self.stages.pool.give_back(values)
        return sketch

    def _room(self) -> int:
        """Bytes for what waits to be written."""
        return self.cut.behind - sum(values.nbytes for _, values in self.held.values())

    def _clusters(self, sketch: Sketch | None) -> Clustering:
        """By the group's Gram matrix: in memory, or, strip by strip, in a file; the sketch is made as weights go by."""
        group, cut, stages, device = self.group, self.cut, self.stages, self.stages.device
        largest = max(read.nbytes for read in gram_reads(group, self.tensors, cut, 0))
        stages.wait(self._room() - largest)
        with nullcontext() if cut.strip is None else ops.GramFile(stages.output.scratch(), group.width) as file:
            for begin, end in strips_of(group, cut):
                device.strip(end - begin, group.width - begin)
                for read, values in stages.take(gram_reads(group, self.tensors, cut, begin)):
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
                    return device.cluster(self.n_clusters, file)
                except ValueError as error:
                    raise PyfoldError(f"{self.tensors[0].path}: {group.name} cannot be clustered: {error}") from None

    def _merged(self, info: TensorInfo, clusters: Clustering, scale: float) -> Iterator[Block]:
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
            yield Block(merged.values, read.rows.start if consumer else 0, read.columns.start, merged.settle)
            del merged

    def _let_go(self, name: str) -> Iterator[tuple[Read, Tensor]]:
        yield self.held.pop(name)
