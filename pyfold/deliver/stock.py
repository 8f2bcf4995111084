"""Layers that differ -> one width and one number of heads for all, by zeros: the same function, of the source's own classes.

A unit whose rows and column are zero adds nothing; neither does a KV head whose values and columns of o_proj are zero, whatever
its queries attend to.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyfold.deliver import huggingface
from pyfold.errors import PyfoldError
from pyfold.families import family_of
from pyfold.families.attention import differ
from pyfold.io.checkpoint import Checkpoint, read_json

LIKED = 256  # what engines like widths to be a multiple of
LEAST_SAVED = 0.01


@dataclass(frozen=True)
class Padded:
    """What the padded checkpoint will be: its config, every tensor's shape, and what is to be said of it."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    notes: list[str]

    @property
    def n_parameters(self) -> int:
        return sum(map(prod, self.shapes.values()))


def padded(checkpoint: Checkpoint, multiple_of: int | None, tensor_parallel: int | None) -> Padded:
    """From headers alone.

    Raises
    ------
    PyfoldError
        If the model has no such config, ``tensor_parallel`` does not divide its heads, or so many zeros would be written that
        less than 1 % of the parameters that it was folded from are saved.
    """
    family = family_of(checkpoint)
    groups, attention = family.fold_groups(checkpoint), family.attention(checkpoint)
    heads = max(each.n_groups for each in attention)
    alike = {(each.n_queries, each.head_dim) for each in attention}
    if len(alike) > 1:
        raise PyfoldError(
            f"{checkpoint.path}: layers with unequal numbers of query heads for a KV head; no zeros make them alike"
        )
    if tensor_parallel and heads % tensor_parallel:
        raise PyfoldError(f"tp: {tensor_parallel} devices do not share {heads} KV heads evenly")
    multiple = multiple_of or (128 * tensor_parallel if tensor_parallel else 1)
    width = -(-max(group.width for group in groups) // multiple) * multiple
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    for group in groups:
        shapes |= {name: group.shape_at(width, name, shapes[name]) for name in group.tensors}
    for each in attention:
        shapes |= {name: each.shape_at(heads, name, shapes[name]) for name in each.names}
    settings = {groups[0].width_key: width}
    if differ(checkpoint.config):
        settings |= attention[0].config(heads) | {"head_dim": attention[0].head_dim}
    found = Padded(huggingface.stock_config(checkpoint, family, settings), shapes, [])
    before = _folded_from(checkpoint.path)
    if before and found.n_parameters > (1 - LEAST_SAVED) * before:
        raise PyfoldError(
            f"{checkpoint.path}: one width of {width} and {heads} KV heads for all layers would leave {found.n_parameters:,} "
            f"of {before:,} parameters, less than 1 % saved; fold all layers alike, or keep them apart (--to gguf)"
        )
    zeros = found.n_parameters - checkpoint.n_parameters
    if zeros:
        found.notes.append(f"{zeros:,} zeros ({zeros / found.n_parameters:.1%} of the result) make all layers {width} wide")
    if width % LIKED:
        found.notes.append(f"{width} is no multiple of {LIKED}, which engines like: --multiple-of {LIKED}, or --tp N")
    return found


def _folded_from(folder: Path) -> int | None:
    """How many parameters the source of a fold had."""
    if not (folder / "pyfold.json").is_file():
        return None
    before = (read_json(folder / "pyfold.json").get("parameters") or {}).get("before")
    return before if isinstance(before, int) else None


def filled(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """With zeros behind, up to ``shape``."""
    if tensor.shape == shape:
        return tensor
    out = torch.zeros(shape, dtype=tensor.dtype)
    out[tuple(slice(size) for size in tensor.shape)] = tensor
    return out
