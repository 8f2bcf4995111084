"""Units -> fold groups: those that the same parameters make and read, and so can stand for one another.

Which of a group's units become one is a matter of labels; where they then lie is not: along every axis the first unit of each
cluster keeps its place among those that stay, so that whatever moves numbers (concatenation, flattening) does it as before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyfold.modules.units import Axis, Traced


@dataclass(frozen=True)
class UnitGroup:
    """Units of one kind.

    Attributes
    ----------
    name : str
        Of the layers that make them.
    layer : int
        Its number among the groups.
    units : list of int
        In the order in which they lie.
    places : dict of Axis to Tensor, (N, m), int64
        Along each axis the indices of every unit; m > 1 where a unit has several (flattened maps, channel multipliers).
    roles : dict of Axis to str
    tied : int
        Groups of one number keep as many units each as the others: those of a grouped convolution.
    """

    name: str
    layer: int
    units: list[int]
    places: dict[Axis, Tensor]
    roles: dict[Axis, str]
    tied: int

    @property
    def width(self) -> int:
        return len(self.units)


def unit_groups(traced: Traced) -> tuple[list[UnitGroup], dict[str, str]]:
    """The groups that can be folded, in the order in which the module makes them; and of layers that cannot, by name, why."""
    slots: dict[int, dict[Axis, list[int]]] = defaultdict(lambda: defaultdict(list))
    for axis, along in traced.axes.items():
        for index, unit in enumerate(along.tolist()):
            slots[unit][axis].append(index)
    alike: dict[tuple[tuple[Axis, int], ...], list[int]] = defaultdict(list)
    for unit, at in slots.items():
        alike[tuple((axis, len(indices)) for axis, indices in at.items())].append(unit)
    groups: list[UnitGroup] = []
    refused: dict[str, str] = {}
    for kind, members in alike.items():
        axes = [axis for axis, _ in kind]
        made = [axis for axis in axes if traced.roles[axis] == "out"]
        name = "+".join(dict.fromkeys(_layer(axis) for axis in made))
        if not made:
            continue
        units = [unit for unit in members if unit not in traced.pinned]
        if len(units) < len(members):
            refused[name] = next(traced.pinned[unit] for unit in members if unit in traced.pinned)
        elif len(units) == 1:
            continue  # one unit has nobody to stand for it
        if not any(traced.roles[axis] == "in" for axis in axes):
            refused.setdefault(name, "no layer reads them")
        elif len(units) > 1:
            by_place = {unit: slots[unit][made[0]] for unit in units}
            units.sort(key=by_place.__getitem__)
            places = {axis: torch.tensor([slots[unit][axis] for unit in units]) for axis in axes}
            groups.append(UnitGroup(name, len(groups), units, places, {axis: traced.roles[axis] for axis in axes}, len(groups)))
    return _tie(groups, traced, refused), refused


def _layer(axis: Axis) -> str:
    return axis.name.rpartition(".")[0] or axis.name


def _tie(groups: list[UnitGroup], traced: Traced, refused: dict[str, str]) -> list[UnitGroup]:
    """Groups of a grouped convolution's blocks: as many units in each, or none is folded."""
    of = {unit: number for number, group in enumerate(groups) for unit in group.units}
    tied = list(range(len(groups)))
    blocks: dict[tuple[str, int], list[Axis]] = defaultdict(list)
    for axis in traced.axes:
        if axis.block is not None:
            blocks[axis.name, axis.dim].append(axis)
    unequal = set()
    for (name, _), axes in blocks.items():
        found = [[of.get(unit) for unit in traced.axes[axis].tolist()] for axis in axes]
        members = [{each for each in numbers if each is not None} for numbers in found]
        # One group, all of the block's units, in every block: else blocks could end with different widths.
        whole = all(len(set(numbers)) == 1 and numbers[0] is not None for numbers in found)
        same = {number for numbers in members for number in numbers}
        if not whole or len({groups[number].width for number in same}) > 1:
            unequal |= {(number, name) for number in same}
        for number in same:
            tied = [min(same) if each == tied[number] else each for each in tied]
    for number, name in unequal:
        refused.setdefault(groups[number].name, f"the groups of {name} would not stay of one width")
    bad = {tied[number] for number, _ in unequal}
    return [
        replace(group, layer=layer, tied=kind)
        for layer, (group, kind) in enumerate(
            (group, kind) for group, kind in zip(groups, tied, strict=True) if kind not in bad
        )
    ]


def moved(traced: Traced, groups: Sequence[UnitGroup], labels: Mapping[int, Tensor]) -> dict[Axis, Tensor]:
    """Along each axis that is folded, where every index goes: (size,), int64, counted without those that go.

    ``labels``: by number of the group, of each unit its cluster; clusters are numbered in the order of their first units.
    """
    axes: dict[Axis, Tensor] = {}
    for number, label in labels.items():
        clusters = int(label.max()) + 1
        first = torch.full((clusters,), len(label)).scatter_reduce(0, label, torch.arange(len(label)), "amin")
        for axis, places in groups[number].places.items():
            to = axes.setdefault(axis, torch.arange(len(traced.axes[axis])))
            to[places] = places[first[label]]
    return {axis: to.unique(return_inverse=True)[1] for axis, to in axes.items()}
