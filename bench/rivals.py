"""What folding of convolutional networks is compared with, at the widths that folding has, with the same repair.

Structured magnitude pruning keeps the units with the largest rows. Iterative feature merging (Chen et al. 2023, written from
its description) joins, again and again, the two units of a layer that are nearest to each other, rows and columns as they are,
in their mean, each counting for the units that are in it; they are then merged as folded units are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.cluster.hierarchy import linkage
from torch import Tensor, nn

from pyfold.modules import folding, repair
from pyfold.modules.fold import _targets, _widths_for, merge, norms
from pyfold.modules.groups import UnitGroup, moved, unit_groups
from pyfold.modules.modes import evaluating
from pyfold.modules.units import Axis, Traced, trace


class Units:
    """A network's groups, and how many units each keeps at so many parameters."""

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        self.module = module
        with evaluating(module):
            self.traced: Traced = trace(module, (example,))
        self.groups: list[UnitGroup] = unit_groups(self.traced)[0]
        self.state = folding.state_of(module)

    def widths(self, target_params: int) -> list[int]:
        names = {name for name, _ in self.module.named_parameters()}
        return _widths_for(self.traced, self.state, self.groups, names, target_params)

    def along(self, group: UnitGroup, axis: Axis) -> Tensor:
        return folding.along(self.state[axis.name], self.traced, axis)[group.places[axis]].flatten(1)


def prune(units: Units, target_params: int, norm: int, images: Tensor | None, *, compensate: bool = True) -> nn.Module:
    """A copy with fewer units; with ``images``, its layers regressed on what the dense ones gave, and statistics set right."""
    traced, state = units.traced, units.state
    kept: dict[Axis, Tensor] = {}
    for group, k in zip(units.groups, units.widths(target_params), strict=True):
        rows = [units.along(group, axis) for axis in group.places if group.roles[axis] == "out"]
        stays = torch.zeros(group.width, dtype=torch.bool)
        stays[torch.cat(rows, 1).norm(norm, 1).topk(k).indices] = True
        for axis, places in group.places.items():
            kept.setdefault(axis, torch.ones(len(traced.axes[axis]), dtype=torch.bool))[places[~stays]] = False
    pruned, rows_only = {}, dict(state)
    for axis, stays in kept.items():
        assert axis.block is None
        index = stays.nonzero().flatten()
        pruned[axis.name] = pruned.get(axis.name, state[axis.name]).index_select(axis.dim, index)
        if traced.roles[axis] != "in":
            rows_only[axis.name] = rows_only[axis.name].index_select(axis.dim, index)
    out = folding.with_state(units.module, pruned)
    normalised = {producer.rows.name for producer, _ in folding.normalised(traced)}
    targets = {}
    for axis in kept if compensate else ():
        if traced.roles[axis] == "in":
            prefix = axis.name.rpartition(".")[0]
            bias = rows_only.get(f"{prefix}.bias")
            targets[prefix] = repair.Target(rows_only[axis.name], bias, axis.name in normalised or bias is not None)
    left = {}
    for each in traced.normalisations:
        if (stays := kept.get(Axis(each.mean, 0))) is not None:
            to = torch.where(stays, stays.long().cumsum(0) - 1, -1)
            left[each.mean.rpartition(".")[0]] = repair.Norm(to, torch.ones(len(to)))
    return _repaired(units.module, out, targets, images, left)


def merge_features(units: Units, target_params: int, images: Tensor | None, *, compensate: bool = True) -> nn.Module:
    """Iterative feature merging."""
    labels = {
        number: _nearest_pairs(
            torch.cat([units.along(group, axis) for axis in group.places if group.roles[axis] != "rider"], 1), k
        )
        for number, (group, k) in enumerate(zip(units.groups, units.widths(target_params), strict=True))
        if k < group.width
    }
    out = merge(units.module, units.traced, units.groups, labels, closed_form=False)
    where = moved(units.traced, units.groups, labels)
    targets = _targets(units.module, units.traced, units.state, where)[0] if compensate else {}
    return _repaired(units.module, out, targets, images, norms(units.traced, units.state, where))


def _nearest_pairs(features: Tensor, k: int) -> Tensor:
    """Labels (N,) after N - K merges of the nearest pair; clusters are numbered in the order of their first units."""
    n = len(features)
    members: list[Sequence[int]] = [[unit] for unit in range(n)]
    gone = set()
    for merged, (left, right, _, _) in enumerate(linkage(features.double().numpy(), "centroid")[: n - k]):
        members.append([*members[int(left)], *members[int(right)]])
        gone |= {int(left), int(right)}
        assert len(members) == n + merged + 1
    labels = torch.empty(n, dtype=torch.int64)
    for label, each in enumerate(sorted((each for number, each in enumerate(members) if number not in gone), key=min)):
        labels[list(each)] = label
    return labels


def _repaired(
    module: nn.Module,
    out: nn.Module,
    targets: dict[str, repair.Target],
    images: Tensor | None,
    norms: dict[str, repair.Norm],
) -> nn.Module:
    if images is not None:
        with evaluating(module), evaluating(out):
            repair.regress(module, out, targets, images, norms)
    return out
