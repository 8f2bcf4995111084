"""What a fold will do, before a weight is read: widths, output tensors and shards, from headers and options alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from math import floor, prod

from pyfold.errors import PyfoldError
from pyfold.families import FoldGroup
from pyfold.families.attention import Attention
from pyfold.io.checkpoint import Checkpoint
from pyfold.io.safetensors import ITEM_SIZE

DTYPES = {"keep": None, "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Plan:
    """A fold's shape.

    Attributes
    ----------
    groups : list of (FoldGroup, int)
        The groups to fold and the width K each gets.
    widths : dict of int to int
        Width of every layer afterwards, folded or not.
    tensors : dict of str to (dtype, shape)
        Every output tensor, in natural order.
    shards : dict of str to list of str
        Output file -> its tensors.
    notes : list of str
        What the options changed that the user should see (rounding).
    room : int
        Parameters that the folded groups may keep together.
    heads : list of (Attention, int)
        The attention to fold and the KV heads that each gets.
    kv_heads : dict of int to int
        KV heads of every layer afterwards, where any are folded.
    """

    groups: list[tuple[FoldGroup, int]]
    widths: dict[int, int]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    shards: dict[str, list[str]]
    notes: list[str]
    room: int = 0
    heads: list[tuple[Attention, int]] = field(default_factory=list)
    kv_heads: dict[int, int] = field(default_factory=dict)

    @property
    def uniform(self) -> bool:
        """All layers at one width, and one number of heads: the source's own architecture can say it."""
        return len(set(self.widths.values())) == 1 and len(set(self.kv_heads.values())) <= 1

    @property
    def folds(self) -> list[str]:
        """Names of all that is folded, in order: of each layer its heads first."""
        heads = [(attention.layer, 0, attention.name) for attention, _ in self.heads]
        groups = [(group.layer, 1, group.name) for group, _ in self.groups]
        return [name for _, _, name in sorted(heads + groups)]

    @property
    def n_parameters(self) -> int:
        return sum(prod(shape) for _, shape in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(tensor) for tensor in self.tensors.values())


def make_plan(
    checkpoint: Checkpoint,
    groups: list[FoldGroup],
    attention: list[Attention] | None = None,
    *,
    ratio: float | Mapping[int, float] | None = None,
    heads_ratio: float = 0,
    width: int | None = None,
    target_params: int | str | None = None,
    target_bytes: int | str | None = None,
    widths: Mapping[int, int] | None = None,
    layers: str | Iterable[int] | None,
    multiple_of: int | None,
    dtype: str,
    max_shard_size: int | str,
) -> Plan:
    """Options and headers -> a plan. Arguments as in :func:`pyfold.fold_checkpoint`; ``widths``, and ``ratio`` if it is a
    mapping: of each layer that is folded.

    Raises
    ------
    PyfoldError
        For an option out of range, or one that no group can satisfy.
    """
    if dtype not in DTYPES:
        raise PyfoldError(f"dtype: expected one of {', '.join(DTYPES)}, got '{dtype}'")
    asked = [ratio, width, target_params, target_bytes]
    if sum(one is not None for one in asked) != 1:
        raise PyfoldError(
            "give one of ratio (the share of units to remove), width (the units to keep), target_params, target_bytes"
        )
    if multiple_of is not None and multiple_of < 1:
        raise PyfoldError(f"multiple_of: expected a positive number, got {multiple_of}")
    chosen = set(parse_layers(layers, len(groups)))
    folded = [group for group in groups if group.layer in chosen]
    room = None
    if target_params is not None or target_bytes is not None:
        room = _room(checkpoint, folded, target_params, target_bytes, dtype)
    notes: list[str] = []
    folds = []
    for group in folded:
        if widths is not None:
            exact = rounded = widths[group.layer]
        else:
            share = None if room is None else Fraction(room, sum(_parameters(checkpoint, group) for group in folded))
            own = ratio[group.layer] if isinstance(ratio, Mapping) else ratio
            exact = rounded = target_width(group, own, width, share)
            if multiple_of is not None:
                rounded = round_to_multiple(exact, multiple_of, group)
            if share is not None and rounded > exact:  # a target is not to be passed
                rounded -= multiple_of or 0
                if rounded < 1:
                    raise PyfoldError(
                        f"multiple_of: {multiple_of} is more than the {exact} units that the target leaves {group.name}"
                    )
        if rounded != exact:
            notes.append(
                f"{group.name}: width {exact} rounded to {rounded}, a multiple of {multiple_of}: "
                f"{1 - rounded / group.width:.1%} of its units go"
            )
        folds.append((group, rounded))
    if room is None:
        room = sum(_parameters(checkpoint, group) // group.width * k for group, k in folds)
    heads, kv_heads = _heads(attention or [], chosen, heads_ratio)
    targets: dict[str, tuple[FoldGroup | Attention, int]] = {name: (group, k) for group, k in folds for name in group.tensors}
    targets |= {name: (one, k) for one, k in heads for name in one.names}
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, info in checkpoint.tensors.items():
        to = DTYPES[dtype] if DTYPES[dtype] and info.dtype in _FLOATS else info.dtype
        shape = info.shape
        if name in targets:
            one, k = targets[name]
            shape = one.shape_at(k, name, shape)
        tensors[name] = (str(to), shape)
    widths = {group.layer: group.width for group in groups} | {group.layer: k for group, k in folds}
    return Plan(folds, widths, tensors, split_shards(tensors, parse_size(max_shard_size)), notes, room, heads, kv_heads)


def _heads(attention: list[Attention], chosen: set[int], ratio: float) -> tuple[list[tuple[Attention, int]], dict[int, int]]:
    """Attention of the layers chosen, with the KV heads that it gets, and those of every layer afterwards."""
    if not 0 <= ratio < 1:
        raise PyfoldError(f"heads_ratio: expected a number in [0, 1), got {ratio:g}")
    folds = []
    for one in attention:
        k = floor((1 - Fraction(repr(float(ratio)))) * one.n_groups)
        if one.layer in chosen and k < 1:
            raise PyfoldError(
                f"heads_ratio: {ratio:g} leaves none of the {one.n_groups} KV heads of {one.name}; use at most "
                f"{1 - 1 / one.n_groups:.6g}"
            )
        if one.layer in chosen and k < one.n_groups:
            folds.append((one, k))
    return folds, {one.layer: one.n_groups for one in attention} | {one.layer: k for one, k in folds}


def target_width(group: FoldGroup, ratio: float | None, width: int | None, share: Fraction | None = None) -> int:
    """K = floor((1 - ratio) N) exactly (0.1 means 1/10), or floor(share N), or the width asked for."""
    n = group.width
    if share is not None:
        return max(1, min(n, floor(share * n)))
    if ratio is None:
        assert width is not None
        if not 1 <= width <= n:
            raise PyfoldError(f"width: expected 1 to {n} (the width of {group.name}), got {width}")
        return width
    if not 0 <= ratio < 1:
        raise PyfoldError(f"ratio: expected a number in [0, 1), got {ratio:g}")
    k = floor((1 - Fraction(repr(float(ratio)))) * n)
    if k < 1:
        raise PyfoldError(f"ratio: {ratio:g} leaves no unit of the {n} of {group.name}; use at most {1 - 1 / n:g}")
    return k


def round_to_multiple(k: int, multiple: int, group: FoldGroup) -> int:
    """The multiple nearest to ``k`` (the larger of two) that fits the group."""
    largest = group.width // multiple * multiple
    if largest == 0:
        raise PyfoldError(f"multiple_of: {multiple} is more than the {group.width} units of {group.name}")
    return min(max((k + multiple // 2) // multiple * multiple, multiple), largest)


def least_parameters(checkpoint: Checkpoint, plan: Plan, multiple_of: int) -> int:
    """Of the folded groups at their least widths."""
    return sum(_parameters(checkpoint, group) // group.width * min(multiple_of, group.width) for group, _ in plan.groups)


def _parameters(checkpoint: Checkpoint, group: FoldGroup) -> int:
    return sum(checkpoint.tensors[name].n_parameters for name in group.tensors)


def _room(
    checkpoint: Checkpoint, groups: list[FoldGroup], target_params: int | str | None, target_bytes: int | str | None, dtype: str
) -> int:
    """Parameters that are left for the groups within a target for the whole result; at least a unit for each."""
    names = {name for group in groups for name in group.tensors}
    to = DTYPES[dtype]
    sizes = {name: ITEM_SIZE[to if to and info.dtype in _FLOATS else info.dtype] for name, info in checkpoint.tensors.items()}
    if target_params is not None:
        what, unit, target = "target_params", "parameters", parse_size(target_params, "target_params")
        sizes = dict.fromkeys(sizes, 1)
    else:
        assert target_bytes is not None
        what, unit, target = "target_bytes", "bytes", parse_size(target_bytes, "target_bytes")
    size = max(sizes[name] for name in names)
    others = sum(sizes[name] * info.n_parameters for name, info in checkpoint.tensors.items() if name not in names)
    room = (target - others) // size
    least = sum(_parameters(checkpoint, group) // group.width for group in groups)
    if room < least:
        raise PyfoldError(
            f"{what}: {target:,} {unit} are fewer than {others + least * size:,}, what is left with one unit in each group"
        )
    return room


def parse_layers(layers: str | Iterable[int] | None, n_layers: int) -> list[int]:
    """``"5-27"``, ``"0,2,5-9"``, numbers, or None for all -> sorted layer numbers."""
    if layers is None:
        return list(range(n_layers))
    if isinstance(layers, str):
        chosen: set[int] = set()
        for part in layers.split(","):
            match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part)
            if not match or int(match[1]) > int(match[2] or match[1]):
                raise PyfoldError(f"layers: expected numbers and ranges as in 0,2,5-9, got '{layers}'")
            first, last = int(match[1]), int(match[2] or match[1])
            chosen.update((first, last), range(first, min(last, n_layers) + 1))
    else:
        chosen = set(layers)
        if not all(isinstance(layer, int) for layer in chosen):
            raise PyfoldError(f"layers: expected integers, got {sorted(chosen, key=str)}")
    unknown = sorted(layer for layer in chosen if not 0 <= layer < n_layers)
    if unknown or not chosen:
        found = f"there is no layer {unknown[0]}" if unknown else "none were given"
        raise PyfoldError(f"layers: {found}; this model has layers 0 to {n_layers - 1}")
    return sorted(chosen)


def ratios_by_layer(ratio: Mapping[str, float], n_layers: int) -> dict[int, float]:
    """``{"0-9": 0.1, "10,12": 0.3}`` -> the ratio of each layer that is folded."""
    found: dict[int, float] = {}
    for layers, share in ratio.items():
        for layer in parse_layers(str(layers), n_layers):
            if layer in found:
                raise PyfoldError(f"ratio: layer {layer} is there twice, the second time in '{layers}'")
            found[layer] = float(share)
    if not found:
        raise PyfoldError("ratio: expected a number, or numbers by layers, got none")
    return dict(sorted(found.items()))


def parse_size(size: int | str, what: str = "max_shard_size") -> int:
    """Bytes from a number or ``"5GB"``, ``"500MB"``, ``"2GiB"``."""
    if isinstance(size, int):
        n_bytes = size
    else:
        match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)(i?)B?\s*", str(size), re.IGNORECASE)
        if not match:
            raise PyfoldError(f"{what}: expected a size as in 5GB or 500MiB, got '{size}'")
        power = " KMGT".index(match[2].upper() or " ")
        n_bytes = int(Fraction(match[1]) * (1024 if match[3] else 1000) ** power)
    if n_bytes < 1:
        raise PyfoldError(f"{what}: expected at least 1 byte, got {size}")
    return n_bytes


def parse_time(time: str, what: str) -> float:
    """Seconds from ``"90s"``, ``"10min"``, ``"1.5h"`` or a number of them."""
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*(s|min|h)?\s*", time)
    if not match:
        raise PyfoldError(f"{what}: expected a time as in 90s, 10min or 2h, got '{time}'")
    return float(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2] or "s"]


def split_shards(tensors: Mapping[str, tuple[str, tuple[int, ...]]], limit: int) -> dict[str, list[str]]:
    """Tensors in order into files of at most ``limit`` bytes (a larger tensor alone in its own), named as transformers does."""
    shards: list[list[str]] = []
    room = 0
    for name, tensor in tensors.items():
        size = _nbytes(tensor)
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _nbytes(tensor: tuple[str, tuple[int, ...]]) -> int:
    return prod(tensor[1]) * ITEM_SIZE[tensor[0]]
