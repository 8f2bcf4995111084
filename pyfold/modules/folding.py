"""Labels -> a smaller module: rows averaged, columns summed, BatchNorm inside the picture."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pyfold import ops
from pyfold.modules.groups import UnitGroup
from pyfold.modules.units import Axis, Normalised, Traced

State = dict[str, Tensor]


def state_of(module: nn.Module) -> State:
    """Parameters and buffers by name, as they are."""
    return {name: tensor.detach() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


def affine(state: State, each: Normalised) -> tuple[Tensor, Tensor, Tensor]:
    """What a BatchNorm does: x -> weight (x - mean) / deviation + shift; (weight, deviation, shift), fp32."""
    deviation = (state[each.var].float() + each.eps).sqrt()
    weight = torch.ones_like(deviation) if each.weight is None else state[each.weight].float()
    shift = torch.zeros_like(deviation) if each.shift is None else state[each.shift].float()
    return weight, deviation, shift


def normalised_rows(traced: Traced, state: State, where: Mapping[Axis, Tensor] | None = None) -> State:
    """The state with rows, biases and means divided by the deviation that their BatchNorm divides by: the same function.

    ``where``: only those that ``moved`` joins with others; None: all.
    """
    state = dict(state)
    for each in traced.normalised:
        _, deviation, _ = affine(state, each)
        if where is not None:
            if each.rows not in where:
                continue
            to = where[each.rows]
            deviation = deviation.where(to.bincount()[to] > 1, 1.0)
        rows = state[each.rows.name].float()
        state[each.rows.name] = rows / deviation.view(-1, *[1] * (rows.dim() - 1))
        if each.bias is not None:
            state[each.bias] = state[each.bias].float() / deviation
        state[each.mean] = state[each.mean].float() / deviation
        var = state[each.var].float()
        state[each.var] = torch.where(deviation == 1, var, (var + each.eps) / deviation**2 - each.eps)
    return state


def features(traced: Traced, state: State, group: UnitGroup) -> Tensor:
    """(N, D) float32: the rows that make a unit, as BatchNorm scales them, what stands beside it, the columns that read it."""
    normalised = normalised_rows(traced, state)
    gains = {each.rows: affine(state, each)[0] for each in traced.normalised}
    inside = {name for each in traced.normalised for name in (each.mean, each.var, each.bias)}
    parts = []
    for axis, places in group.places.items():
        if axis.name in inside or axis.name in traced.statistics:
            continue
        values = along(normalised[axis.name], traced, axis)
        if axis in gains:
            values = values * gains[axis][:, None]
        parts.append(values[places].reshape(len(places), -1))
    return torch.cat(parts, 1)


def along(tensor: Tensor, traced: Traced, axis: Axis) -> Tensor:
    """(size, ...) float32: a parameter, what lies at an index of its axis in one row."""
    if axis.block is not None:
        tensor = _block(tensor, traced, axis)
    return tensor.float().movedim(axis.dim, 0).flatten(1) if tensor.dim() > 1 else tensor.float()[:, None]


def _block(tensor: Tensor, traced: Traced, axis: Axis) -> Tensor:
    rows = len(traced.axes[Axis(axis.name, 0, axis.block)])
    return tensor[axis.block * rows : (axis.block + 1) * rows]  # type: ignore[operator]


def merged_state(traced: Traced, state: State, where: Mapping[Axis, Tensor], *, rows_only: bool = False) -> State:
    """Of every parameter and buffer that changes: rows and riders averaged, columns summed; or, ``rows_only``, as they were."""
    by_name: dict[str, list[Axis]] = defaultdict(list)
    for axis in where:
        by_name[axis.name].append(axis)
    merged = {}
    for name, axes in by_name.items():
        tensor = state[name]
        blocks = sorted({axis.block for axis in axes if axis.block is not None})
        whole = [axis for axis in axes if axis.block is None]
        if blocks:
            every = range(max(axis.block for axis in traced.axes if axis.name == name and axis.block is not None) + 1)
            parts = []
            for block in every:
                part = _block(tensor, traced, Axis(name, 0, block))
                for axis in axes:
                    if axis.block == block and not (rows_only and traced.roles[axis] == "in"):
                        part = _merge(part, axis.dim, where[axis], traced.roles[axis])
                parts.append(part)
            tensor = torch.cat(parts)
        for axis in whole:
            if not (rows_only and traced.roles[axis] == "in"):
                tensor = _merge(tensor, axis.dim, where[axis], traced.roles[axis])
        merged[name] = tensor.to(state[name].dtype)
    return merged


def _merge(tensor: Tensor, dim: int, to: Tensor, role: str) -> Tensor:
    clusters = int(to.max()) + 1
    if role == "in":
        columns = tensor.movedim(dim, -1)
        flat = ops.merge_columns(columns.reshape(-1, len(to)).contiguous(), to, clusters)
        return flat.view(*columns.shape[:-1], clusters).movedim(-1, dim)
    rows = tensor.movedim(dim, 0)
    flat = ops.merge_rows(rows.reshape(len(to), -1).contiguous(), to, clusters)
    return flat.view(clusters, *rows.shape[1:]).movedim(0, dim)


def scales(traced: Traced, state: State, where: Mapping[Axis, Tensor]) -> State:
    """Fold-AR: of each BatchNorm's weight, what its merged channels have to be multiplied by, (K,).

    A mean of N_c rows whose outputs have variance 1 and correlation E[c] on average has variance
    ``1/s²``, ``s = N_c / √(N_c + (N_c² − N_c) E[c])``; with white inputs correlations are the cosines of the rows, and s is
    ``1 / ‖mean of unit rows‖`` (Wang et al. 2025, section 4.3).
    """
    out = {}
    for each in traced.normalised:
        if each.rows in where and each.weight is not None:
            to = where[each.rows]
            rows = along(state[each.rows.name], traced, each.rows)
            unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
            length = ops.merge_rows(unit, to, int(to.max()) + 1).norm(dim=1)
            counts = to.bincount()
            out[each.weight] = torch.where(counts > 1, 1 / length.clamp_min(1e-3), 1.0)
    return out


def with_state(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of ``module`` that holds ``state`` where it has other sizes, and says so in its layers' attributes."""
    copied = {
        id(tensor): state[name] for name, tensor in [*module.named_parameters(), *module.named_buffers()] if name in state
    }
    memo = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        if (new := copied.get(id(tensor))) is not None:
            new = new.clone().contiguous()
            memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    out = copy.deepcopy(module, memo)
    for layer in out.modules():
        _resize(layer)
    return out


def _resize(layer: nn.Module) -> None:
    if isinstance(layer, nn.modules.conv._ConvNd):
        rows, columns = layer.weight.shape[:2]
        if layer.transposed:
            layer.in_channels, layer.out_channels = rows, columns * layer.groups
        else:
            if layer.groups == layer.in_channels and layer.groups > 1:
                layer.groups = rows * layer.groups // layer.out_channels
            layer.in_channels, layer.out_channels = columns * layer.groups, rows
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
        if (each := layer.weight if layer.weight is not None else layer.running_mean) is not None:
            layer.num_features = len(each)
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = len(layer.weight)
    elif isinstance(layer, nn.Embedding):
        layer.embedding_dim = layer.weight.shape[1]


def parameters_after(traced: Traced, state: State, groups: Sequence[UnitGroup], widths: Sequence[int], names: set[str]) -> int:
    """Parameters of ``names`` that are left at these widths."""
    less: dict[Axis, int] = defaultdict(int)
    for group, k in zip(groups, widths, strict=True):
        for axis, places in group.places.items():
            less[axis] += (group.width - k) * places.shape[1]
    total = 0
    for name in names:
        sizes = list(state[name].shape)
        axes = [axis for axis in less if axis.name == name]
        blocks = {axis.block for axis in axes}
        for dim in {axis.dim for axis in axes}:
            gone = [less[axis] for axis in axes if axis.dim == dim]
            sizes[dim] -= sum(gone) if dim == 0 or None in blocks else gone[0]
        total += torch.Size(sizes).numel()
    return total
