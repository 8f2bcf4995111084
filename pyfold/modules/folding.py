"""Labels -> a smaller module: rows averaged, columns summed, BatchNorm inside the picture."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from pyfold import ops
from pyfold.modules.groups import UnitGroup
from pyfold.modules.norms import SHARE, WeightedLayerNorm
from pyfold.modules.units import Axis, Normalisation, Producer, Traced

State = dict[str, Tensor]
Labels = Mapping[int, Tensor]  # by number of a group, of each of its units the cluster


def state_of(module: nn.Module) -> State:
    """Parameters and buffers by name, as they are."""
    return {name: tensor.detach() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


def normalised(traced: Traced) -> Iterator[tuple[Producer, Normalisation]]:
    """BatchNorms that alone read what one layer makes, with that layer."""
    for each in traced.normalisations:
        if each.producer is not None:
            yield each.producer, each


def deviation(state: State, each: Normalisation) -> Tensor:
    """What a BatchNorm divides by, (N,) fp32."""
    return (state[each.var].float() + each.eps).sqrt()


def normalised_rows(traced: Traced, state: State, where: Mapping[Axis, Tensor]) -> State:
    """The same function with BatchNorms that have one weight γ_c, and divide by 1, for units that ``moved`` joins with others.

    γ_c is the root mean square of their weights; rows, biases and means take what is left, (γ_i / γ_c) / σ_i. The mean of such
    rows is what makes the mean of the units' outputs, and γ_c² the mean of their variances.
    """
    state = dict(state)
    for producer, each in normalised(traced):
        if producer.rows not in where:
            continue
        to = where[producer.rows]
        joined = to.bincount()[to] > 1
        common, factor = _gains(state, each, to)[0], row_factors(state, each, to)
        rows = state[producer.rows.name].float()
        state[producer.rows.name] = rows * factor.view(-1, *[1] * (rows.dim() - 1))
        for name in (producer.bias, each.mean):
            if name is not None:
                state[name] = state[name].float() * factor
        state[each.var] = torch.where(joined, 1 - each.eps, state[each.var].float())
        if each.weight is not None:
            state[each.weight] = torch.where(joined, common, state[each.weight].float())
    return state


def row_factors(state: State, each: Normalisation, to: Tensor) -> Tensor:
    """(N,): what ``normalised_rows`` multiplies the rows by that a BatchNorm reads, for units that go ``to`` one another."""
    return torch.where(to.bincount()[to] > 1, _gains(state, each, to)[1] / deviation(state, each), 1.0)


def _gains(state: State, each: Normalisation, to: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) of every unit: the root mean square of the BatchNorm's weights in its cluster, and its own as a multiple of that."""
    if each.weight is None:
        return torch.ones(len(to)), torch.ones(len(to))
    weight = state[each.weight].float()
    counts = to.bincount()
    common = (torch.zeros(len(counts)).index_add_(0, to, weight.square()) / counts).sqrt()[to]
    return common, torch.where(common > 0, weight / common, 1.0)


def _factors(traced: Traced, state: State) -> dict[Axis, Tensor]:
    """What BatchNorm multiplies a layer's rows by, γ / σ, (N,)."""
    factors = {}
    for producer, each in normalised(traced):
        weight = torch.ones(()) if each.weight is None else state[each.weight].float()
        factors[producer.rows] = weight / deviation(state, each)
    return factors


def features(traced: Traced, state: State, group: UnitGroup) -> Tensor:
    """(N, D) float32: the rows that make a unit, as BatchNorm scales them, what stands beside it, and the columns that read it,
    over what their own BatchNorm divides by: else the layers that give most would speak for all."""
    scaled, gains = dict(state), {}
    for producer, each in normalised(traced):
        rows = state[producer.rows.name].float()
        scaled[producer.rows.name] = rows / deviation(state, each).view(-1, *[1] * (rows.dim() - 1))
        if each.weight is not None:
            gains[producer.rows] = state[each.weight].float()
    left_out = {name for each in traced.normalisations for name in (each.mean, each.var)}
    left_out |= {producer.bias for producer, _ in normalised(traced) if producer.bias is not None}
    parts = []
    for axis, places in group.places.items():
        if axis.name not in left_out:
            values = along(scaled[axis.name], traced, axis)
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
    for axis in traced.layer_norms:
        if axis in where:
            counts = where[axis].bincount().to(state[axis.name].dtype)
            merged[f"{axis.name.rpartition('.')[0]}.{SHARE}"] = counts / len(where[axis])
    return merged


def _merge(tensor: Tensor, dim: int, to: Tensor, role: str) -> Tensor:
    clusters = int(to.max()) + 1
    if role == "in":
        columns = tensor.movedim(dim, -1)
        flat = ops.merge_columns(_as_merged(columns.reshape(-1, len(to))), to, clusters)
        return flat.view(*columns.shape[:-1], clusters).movedim(-1, dim)
    rows = tensor.movedim(dim, 0)
    flat = ops.merge_rows(_as_merged(rows.reshape(len(to), -1)), to, clusters)
    return flat.view(clusters, *rows.shape[1:]).movedim(0, dim)


def _as_merged(tensor: Tensor) -> Tensor:
    return (tensor.float() if tensor.dtype == torch.float64 else tensor).contiguous()


def rescaled(
    traced: Traced, state: State, merged: State, where: Mapping[Axis, Tensor], groups: Sequence[UnitGroup], labels: Labels
) -> State:
    """Fold-AR: the merged state with variances as they are after averaging.

    A mean of N_c rows whose outputs have variance 1 and correlation E[c] on average has variance ``1/s²``,
    ``s = N_c / √(N_c + (N_c² − N_c) E[c])``; with white inputs correlations are the cosines of the rows, and s is
    ``1 / ‖mean of unit rows‖`` (Wang et al. 2025, section 4.3); of rows u_i that BatchNorm weighs by γ_i, γ_c their root mean
    square, it is ``1 / ‖mean of (γ_i / γ_c) u_i‖``. BatchNorm's weight is multiplied by s. One that reads a sum of layers (a
    residual stream) instead remembers the variance ``‖mean of σ_i unit rows‖²``, of the rows of all those layers.

    ``state``: as the module holds it.
    """
    merged, gains = dict(merged), _factors(traced, state)
    for producer, each in normalised(traced):
        if producer.rows in where:
            to = where[producer.rows]
            rows = along(state[producer.rows.name], traced, producer.rows)
            length = _mean_length(rows, _gains(state, each, to)[1], to)
            scale = torch.where(to.bincount() > 1, 1 / length, 1.0)
            if each.weight is not None:
                merged[each.weight] = (merged[each.weight].float() * scale).to(merged[each.weight].dtype)
            else:
                merged[each.var] = ((merged[each.var].float() + each.eps) / scale**2 - each.eps).clamp_min(0)
    for each in traced.normalisations:
        for number, label in labels.items() if each.producer is None else ():
            axis = Axis(each.var, 0)
            if (places := groups[number].places.get(axis)) is None:
                continue
            made = [axis for axis in groups[number].places if traced.roles[axis] == "out"]
            outputs = [along(state[axis.name], traced, axis) * gains.get(axis, torch.ones(1))[:, None] for axis in made]
            rows = torch.cat(
                [part[groups[number].places[axis]].flatten(1) for axis, part in zip(made, outputs, strict=True)], 1
            )
            counts = label.bincount()
            variances = merged[each.var].clone()
            for at in places.T:
                length = _mean_length(rows, deviation(state, each)[at], label)
                into = torch.zeros_like(counts).scatter_(0, label, where[axis][at])
                variances[into[counts > 1]] = (length.square() - each.eps)[counts > 1].clamp_min(0).to(variances.dtype)
            merged[each.var] = variances
    return merged


def _mean_length(rows: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
    """‖mean of scaled unit rows‖ of every cluster, (K,)."""
    unit = scale[:, None] * rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return (
        ops.merge_rows(unit.contiguous(), labels, int(labels.max()) + 1).norm(dim=1).clamp_min(1e-3 * float(scale.abs().max()))
    )


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
    for name, share in state.items():
        path, _, own = name.rpartition(".")
        if own == SHARE and isinstance(layer := out.get_submodule(path), nn.LayerNorm):
            _exchange(out, layer, WeightedLayerNorm(layer, share))
    for layer in out.modules():
        _resize(layer)
    return out


def _exchange(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)


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
