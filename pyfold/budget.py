"""How much memory a fold takes, before a weight is read, and how a group is cut so that it takes no more than it may.

A group in hand is its Gram matrix, its weights, and what the kernels work in. Weights that do not fit beside the rest are read
in pieces of their features, once for the Gram matrix and once for merging, and the result is the same to the bit.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from math import prod

from pyfold.errors import PyfoldError
from pyfold.families import FoldGroup
from pyfold.io.checkpoint import Checkpoint
from pyfold.io.safetensors import ITEM_SIZE, TensorInfo
from pyfold.plan import Plan

PANEL = 512  # features: what the Gram kernels sum at a time, so that cutting between panels changes no bit
PIECE = 1 << 24  # bytes of a tensor outside the groups that are in hand
_PACKED = 40 << 20  # of panels packed by the Gram kernel, unless one panel is more
_PACKED_ITEM = 6  # bytes of a packed number
_CLUSTERING = 3200  # bytes per unit that Ward, Hartigan and their results take beside G (measured: 3100)
_COPYING = 3 * PIECE  # a piece as read, as converted, and as it is being read
_SLACK = 24 << 20  # stacks of threads, small tensors, what the allocator keeps


@dataclass(frozen=True)
class GroupBudget:
    """How a group is folded, in bytes.

    Attributes
    ----------
    features : int or None
        Of its weights in hand at once; None for whole weights, held from the Gram matrix to merging.
    nbytes : int
        Its peak, beside the process and what is read ahead.
    behind : int
        What the weights held and the results not yet written may take together.
    """

    features: int | None
    nbytes: int
    behind: int


@dataclass(frozen=True)
class Budget:
    """In bytes: what interpreter and imports hold, what groups take, what may be read ahead, and copied but not written."""

    process: int
    groups: dict[str, GroupBudget]
    ahead: int
    behind: int

    @property
    def peak(self) -> int:
        """Bytes at most: VmHWM of the process."""
        return self.process + max([_COPYING + self.behind, *(group.nbytes for group in self.groups.values())]) + self.ahead


def return_memory_at_once() -> None:
    """Keep the allocator from holding freed tensors: glibc learns to take up to 32 MiB from a heap that has holes later."""
    libc = ctypes.CDLL(None)
    m_mmap_threshold = -3
    if hasattr(libc, "mallopt"):
        libc.mallopt(m_mmap_threshold, 1 << 20)


def make_budget(checkpoint: Checkpoint, plan: Plan, host_memory: int, process: int) -> Budget:
    """Cut every group so that the process stays below ``host_memory`` bytes, no finer than that takes.

    What is left goes to reading ahead, then to writing behind: no more than the largest tensor read at once, and the largest
    group folded.

    Raises
    ------
    PyfoldError
        If a group does not fit however finely it is cut; names the least that would do.
    """
    room = host_memory - process
    cuts: dict[str, int | None] = {}
    for group, k in plan.groups:
        finest = group_bytes(group, k, checkpoint, PANEL)
        if finest > room:
            raise _too_little(host_memory, finest + process, group)
        most = max(checkpoint.tensors[name].n_parameters // group.width for name in group.tensors)
        sizes = [None, *range(-(-most // PANEL) * PANEL, 0, -PANEL)]
        cuts[group.name] = next(size for size in sizes if group_bytes(group, k, checkpoint, size) <= room)
    if room < _COPYING:
        raise _too_little(host_memory, _COPYING + process)
    takes = {group.name: group_bytes(group, k, checkpoint, cuts[group.name]) for group, k in plan.groups}
    pieces, results = [2 * PIECE], [2 * PIECE]
    for group, _ in plan.groups:
        pieces += [_piece_bytes(checkpoint.tensors[name], group.width, cuts[group.name]) for name in group.tensors]
        results.append(sum(prod(plan.tensors[name][1]) * ITEM_SIZE[plan.tensors[name][0]] for name in group.tensors))
    ahead = min(room - max([_COPYING, *takes.values()]), max(pieces))
    behind = min(room - ahead - max([_COPYING, *(takes[name] for name, cut in cuts.items() if cut)]), max(results))
    groups = {}
    for group, _ in plan.groups:
        name, cut = group.name, cuts[group.name]
        whole = sum(checkpoint.tensors[member].nbytes for member in group.tensors)
        groups[name] = GroupBudget(cut, takes[name] + behind, behind) if cut else GroupBudget(None, takes[name], whole)
    return Budget(process, groups, ahead, behind)


def _too_little(host_memory: int, least: int, group: FoldGroup | None = None) -> PyfoldError:
    needs = f"needs at least {least / 2**20:.0f} MiB ({least:,} bytes), got {host_memory / 2**20:.0f} MiB"
    if group is None:
        return PyfoldError(f"host_memory: {needs}")
    return PyfoldError(f"host_memory: {group.name} {needs}; its Gram matrix alone takes {4 * group.width**2 / 2**20:.0f}")


def _piece_bytes(info: TensorInfo, width: int, features: int | None) -> int:
    extent = info.n_parameters // width
    return width * min(extent, features or extent) * ITEM_SIZE[info.dtype]


def group_bytes(group: FoldGroup, k: int, checkpoint: Checkpoint, features: int | None) -> int:
    """Peak of folding a group with so many features of a weight in hand."""
    n = group.width
    whole, pieces, merged = 0, 0, 0
    for name in group.tensors:
        info = checkpoint.tensors[name]
        extent = prod(info.shape) // n
        piece = n * min(extent, features or extent) * ITEM_SIZE[info.dtype]
        whole += info.nbytes
        pieces = max(pieces, piece)
        merged = max(merged, k * min(extent, features or extent) * 4)  # a result may be fp32
    in_hand = whole if features is None else pieces
    packed = max(_PACKED, _PACKED_ITEM * n * PANEL)
    return (
        max(4 * n * n + in_hand + packed, 4 * n * n + (whole if features is None else 0) + _CLUSTERING * n, in_hand + merged)
        + _SLACK
    )
