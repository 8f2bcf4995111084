"""A group, or a layer's heads, folded by function: read whole, seen on tokens that have come through all layers before, or on
noise, written folded, and passed by the tokens as it now is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pyfold.budget import GroupBudget
from pyfold.errors import PyfoldError
from pyfold.families import FoldGroup
from pyfold.families.activations import Activations
from pyfold.families.attention import Attention
from pyfold.families.noise import Noise
from pyfold.function_metric import fold_units, moments
from pyfold.head_folding import fold_heads
from pyfold.io.safetensors import TensorInfo
from pyfold.processor import Processor
from pyfold.reads import Read, gram_reads, whole_read
from pyfold.report import GroupReport
from pyfold.stages import Block, Stages


class ByFunction(NamedTuple):
    """The function metric: what the groups read, of tokens what the loss on them knows of each layer's units, whether consumers
    make up for what is lost by ridge regression, and what all of it is computed on."""

    activations: Activations | Noise
    information: list[Tensor] | None
    ridge: bool
    processor: Processor


@dataclass(frozen=True)
class UnitsFold:
    """A group's units."""

    group: FoldGroup
    tensors: tuple[TensorInfo, ...]
    n_clusters: int
    cut: GroupBudget
    stages: Stages
    function: ByFunction

    def run(self) -> GroupReport:
        group, stages, (activations, information, ridge, processor) = self.group, self.stages, self.function
        weights = _Weights(group.name, stages, gram_reads(group, self.tensors, self.cut, 0))
        mlp = activations.mlp(group.layer, weights.values)
        with stages.trace("activations", group=group.name):
            seen = moments((mlp.units(x) for x in activations.inputs(group.layer)), processor.backend)
        del mlp
        processor.release()
        [consumer] = (weights.values[name].to(processor.device).float() for name in group.consumers)
        stages.wait(0)  # for what was folded before: now most is in memory
        with stages.trace("fold", group=group.name), weights.refused():
            folded = fold_units(
                consumer,
                seen,
                self.n_clusters,
                ridge=ridge,
                backend=processor.backend,
                information=None if information is None else information[group.layer],
            )
        del seen, consumer
        processor.release()
        columns, kept = folded.consumer.cpu(), folded.kept.cpu()
        weights.write(lambda name, values: columns if name in group.consumers else values[kept], self.cut.behind)
        with stages.trace("feed", group=group.name):
            activations.feed(activations.mlp(group.layer, weights.values))
        return GroupReport.of(group, folded.clusters, output_error=folded.error, ridge=folded.ridge)


@dataclass(frozen=True)
class HeadsFold:
    """A layer's KV groups; ``room``: bytes for what waits to be written."""

    attention: Attention
    tensors: tuple[TensorInfo, ...]
    n_clusters: int
    room: int
    stages: Stages
    function: ByFunction

    def run(self) -> GroupReport:
        attention, stages, activations = self.attention, self.stages, self.function.activations
        assert isinstance(activations, Activations), "heads are not folded on noise"
        weights = _Weights(attention.name, stages, map(whole_read, self.tensors))
        with stages.trace("fold", group=attention.name), weights.refused():
            folded = fold_heads(
                attention,
                weights.values,
                partial(activations.before_attention, attention.layer),
                partial(activations.said, attention.layer),
                self.n_clusters,
                backend=stages.backend,
            )
        weights.write(folded.tensors.get, self.room)
        with stages.trace("feed", group=attention.name):
            activations.attend(attention.layer, weights.values)
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


class _Weights:
    """What is folded together, read whole: its tensors by name in ``values``, those of the source until others are written."""

    def __init__(self, name: str, stages: Stages, reads: Iterable[Read]) -> None:
        self._name, self._stages = name, stages
        self._reads: dict[str, Read] = {}
        self.values: dict[str, Tensor] = {}
        for read, values in stages.take(reads):
            self._reads[read.info.name], self.values[read.info.name] = read, values.view(read.info.shape)
            stages.advance(read.nbytes, name)

    @contextmanager
    def refused(self) -> Iterator[None]:
        """What numbers do not allow is said of the checkpoint."""
        try:
            yield
        except (ValueError, LinAlgError) as error:
            path = next(iter(self._reads.values())).info.path
            raise PyfoldError(f"{path}: {self._name} cannot be folded: {str(error).splitlines()[0]}") from None

    def write(self, made: Callable[[str, Tensor], Tensor], room: int) -> None:
        """Have what is ``made`` of each tensor, given its name and its values, written in the place of it."""
        stages = self._stages
        for name, values in self.values.items():
            changed = made(name, values).to(stages.dtype(name))
            if changed is not values:
                stages.pool.give_back(values)
            self.values[name] = changed
            block = changed.view(len(changed), -1)
            stages.check_finite(self._reads[name], block, "folded")
            stages.write(name, [Block(block, 0, 0, lambda: None)], block.shape[1], lambda: room)
