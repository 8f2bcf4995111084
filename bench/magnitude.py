"""Structured magnitude pruning, for comparison: units with the largest rows stay, at the widths that folding would choose."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyfold.modules import folding, repair
from pyfold.modules.fold import _widths_for
from pyfold.modules.groups import unit_groups
from pyfold.modules.units import Axis, trace


def prune(module: nn.Module, example: Tensor, target_params: int, norm: int, images: Tensor | None) -> nn.Module:
    """A copy with fewer units; with ``images``, its layers regressed on what the dense ones gave, and statistics set right."""
    traced = trace(module, (example,))
    groups, _ = unit_groups(traced)
    state = folding.state_of(module)
    names = {name for name, _ in module.named_parameters()}
    kept: dict[Axis, Tensor] = {}
    for group, k in zip(groups, _widths_for(traced, state, groups, names, target_params), strict=True):
        rows = [axis for axis in group.places if group.roles[axis] == "out"]
        parts = [folding.along(state[axis.name], traced, axis)[group.places[axis]].flatten(1) for axis in rows]
        size = torch.cat(parts, 1).norm(norm, 1)
        stays = torch.zeros(group.width, dtype=torch.bool)
        stays[size.topk(k).indices] = True
        for axis, places in group.places.items():
            kept.setdefault(axis, torch.ones(len(traced.axes[axis]), dtype=torch.bool))[places[~stays]] = False
    pruned, rows_only = {}, dict(state)
    for axis, stays in kept.items():
        index = stays.nonzero().flatten()
        pruned[axis.name] = pruned.get(axis.name, state[axis.name]).index_select(axis.dim, index)
        if traced.roles[axis] != "in":
            rows_only[axis.name] = rows_only[axis.name].index_select(axis.dim, index)
    out = folding.with_state(module, pruned)
    if images is None:
        return out
    normalised = {producer.rows.name for producer, _ in folding.normalised(traced)}
    targets = {}
    for axis in kept:
        if traced.roles[axis] == "in":
            prefix = axis.name.rpartition(".")[0]
            bias = rows_only.get(f"{prefix}.bias")
            targets[prefix] = repair.Target(rows_only[axis.name], bias, axis.name in normalised or bias is not None)
    repair.regress(module, out.eval(), targets, images)
    return out
