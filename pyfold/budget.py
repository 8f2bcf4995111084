"""How much memory a fold takes, before a weight is read, and how a group is cut so that it takes no more than it may.

A group in hand is its Gram matrix, its weights, and what the kernels work in. Weights that do not fit beside the rest are read
in pieces of their features, once for the Gram matrix and once for merging. A Gram matrix that does not fit is computed in
strips of its rows, for each of which the weights are read, and kept in a file. The result is the same to the bit.

Where a GPU computes, what it takes is cut first (``gpu_budget``), and G is here only in a file.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch

from pyfold import gpu_budget, ops
from pyfold.errors import PyfoldError
from pyfold.families import FoldGroup
from pyfold.gpu_budget import Buffers
from pyfold.io.checkpoint import Checkpoint
from pyfold.io.safetensors import ITEM_SIZE, TensorInfo
from pyfold.plan import Plan

PANEL = 512  # features: what the Gram kernels sum at a time, so that cutting between panels changes no bit
PIECE = 1 << 24  # bytes of a tensor outside the groups that are in hand
_PACKED = 40 << 20  # of panels packed by the Gram kernel, unless one panel is more
_PACKED_ITEM = 8  # bytes of a packed number at most: fp16 on AMX, two operands of two bf16 parts
_CLUSTERING = 3200  # bytes per unit that Ward, Hartigan and their results take beside G (measured: 3100)
_TURNED = 1 << 22  # of a strip on its way to the file
_SPILLED_PIECE = 4 * PANEL  # features at most, where G is in a file: more would make the strips lower
_STRIP_ROWS = 2048  # lower strips are worse than smaller pieces
_SLACK = 32 << 20  # stacks of threads, what a write goes through, small tensors, what the allocator keeps
_COPYING = 4 * PIECE + (8 << 20)  # a piece as read, as converted to twice its size, as being read; what a write goes through


@dataclass(frozen=True)
class GroupBudget:
    """How a group is folded, in bytes.

    Attributes
    ----------
    features : int or None
        Of its weights in hand at once; None for whole weights, held from the Gram matrix to merging.
    strip : int or None
        Of the rows of G that are computed at once; None for all of G, in memory.
    nbytes : int
        Its peak, beside the process and what is read ahead.
    behind : int
        What the weights held and the results not yet written may take together.
    spilled : int
        Of disk, while G is in a file: G, and the rows that Ward joins.
    """

    features: int | None
    strip: int | None
    nbytes: int
    behind: int
    spilled: int = 0


@dataclass(frozen=True)
class Budget:
    """In bytes.

    Attributes
    ----------
    process : int
        What interpreter and imports hold.
    groups : dict of str to GroupBudget
    ahead : int
        What may be read ahead.
    behind : int
        What may be copied and not yet written.
    spare : int
        What may lie idle, to be used again, beyond that.
    kernels : int
        What the kernels allocate while tensors may lie idle, and what is small. Where a GPU computes, none does while the host
        clusters: what is pinned is dear to make.
    gpu : dict of str to Buffers
        What each group takes on the GPU, where there is one.
    """

    process: int
    groups: dict[str, GroupBudget]
    ahead: int
    behind: int
    spare: int
    kernels: int
    gpu: dict[str, Buffers]

    @property
    def spilled(self) -> int:
        """Bytes of disk at most that Gram matrices take beside the result, while they are needed."""
        return max((group.spilled for group in self.groups.values()), default=0)

    @property
    def peak(self) -> int:
        """Bytes at most: VmHWM of the process."""
        return self.process + self.kernels + self.buffers

    @property
    def gpu_peak(self) -> int | None:
        """Bytes at most that torch reserves on the GPU."""
        return max((buffers.peak for buffers in self.gpu.values()), default=None)

    @property
    def clustered_on_host(self) -> list[str]:
        """Groups whose strips a GPU computes and that are clustered here, on which the result depends."""
        return [name for name in self.gpu if self.groups[name].strip is not None]

    @property
    def buffers(self) -> int:
        """What tensors that are read, computed with or written may take together with those that lie idle."""
        busiest = max([_COPYING + self.behind, *(group.nbytes for group in self.groups.values())])
        return busiest - self.kernels + self.ahead + self.spare


def return_memory_at_once() -> None:
    """Keep the allocator from holding freed tensors: glibc learns to take up to 32 MiB from a heap that has holes later."""
    libc = ctypes.CDLL(None)
    m_mmap_threshold = -3
    if hasattr(libc, "mallopt"):
        libc.mallopt(m_mmap_threshold, 1 << 20)


def make_budget(
    checkpoint: Checkpoint,
    plan: Plan,
    host_memory: int,
    process: int,
    *,
    spills: bool = True,
    gpu_memory: int | None = None,
    beside: Mapping[str, int] | None = None,
    by_function: bool = False,
) -> Budget:
    """Cut every group so that the process stays below ``host_memory`` bytes, no finer than that takes.

    With ``spills`` a Gram matrix may go to a file, which the backend must be able to cluster. With ``gpu_memory`` a GPU
    computes, and takes no more than that. ``beside``: bytes of what else is in memory while a group is folded, by its name;
    with ``by_function`` of all but its weights, which are whole, and what the kernels work in: with ``gpu_memory`` that is on
    the GPU.

    What is left goes to reading ahead, then to writing behind: no more than the largest tensor read at once, and the largest
    group folded.

    Raises
    ------
    PyfoldError
        If a group does not fit however finely it is cut; names the least that would do.
    """
    room = host_memory - process
    others = beside or dict.fromkeys((group.name for group, _ in plan.groups), 0)
    gpu: dict[str, Buffers] = {}
    if by_function and gpu_memory is not None:
        gpu = gpu_budget.by_function(plan, gpu_memory, others)
        reading = reading_bytes(checkpoint)  # before groups are folded
        others = {group.name: max(reading, _results(group, k, checkpoint)) for group, k in plan.groups}
    if by_function or gpu_memory is None:
        spills = spills and not by_function
        ways = {name: _Way(gpu=False, spills=spills, beside=n, by_function=by_function) for name, n in others.items()}
    else:
        limits = gpu_budget.strip_limits(checkpoint, plan, gpu_memory, spills=spills)
        ways = {name: _Way(gpu=True, spills=n is not None, strip=n, beside=others[name]) for name, n in limits.items()}
    leasts = {group.name: _least(group, k, checkpoint, ways[group.name]) for group, k in plan.groups}
    name = max(leasts, key=lambda name: leasts[name])
    if room < max(leasts[name], _COPYING):
        needs = max(leasts[name], _COPYING) + process
        raise PyfoldError(
            f"host_memory: {name} needs at least {needs / 2**20:.0f} MiB ({needs:,} bytes), got {host_memory / 2**20:.0f} MiB"
        )
    takes = {group.name: _cut(group, k, checkpoint, room, ways[group.name]) for group, k in plan.groups}
    pieces, results = [2 * PIECE], [2 * PIECE]
    for group, _ in plan.groups:
        features = takes[group.name].features
        pieces += [_piece_bytes(checkpoint.tensors[name], group.width, features) for name in group.tensors]
        results.append(sum(prod(plan.tensors[name][1]) * ITEM_SIZE[plan.tensors[name][0]] for name in group.tensors))
    ahead = min(room - max([_COPYING, *(cut.nbytes for cut in takes.values())]), max(pieces))
    behind = min(room - ahead - max([_COPYING, *(cut.nbytes for cut in takes.values() if cut.features)]), max(results))
    groups = {
        name: replace(cut, nbytes=cut.nbytes + behind, behind=behind) if cut.features else cut for name, cut in takes.items()
    }
    kernels = max(
        _kernel_bytes(group, k, takes[group.name].strip, ways[group.name].gpu) + ways[group.name].beside
        for group, k in plan.groups
    )
    kernels += _SLACK
    gpu |= {
        group.name: gpu_budget.buffers(group, k, checkpoint, plan, takes[group.name].strip)
        for group, k in plan.groups
        if ways[group.name].gpu
    }
    budget = Budget(process, groups, ahead, behind, 0, kernels, gpu)
    return replace(budget, spare=min(host_memory - budget.peak, max(pieces)))


@dataclass(frozen=True)
class _Way:
    """Whether a GPU computes a group's Gram matrix, whether that may lie in a file, how many bytes of it a GPU has room for
    (None: all); bytes of what else is in memory, and whether the group is folded by function."""

    gpu: bool
    spills: bool
    strip: int | None = None
    beside: int = 0
    by_function: bool = False

    @property
    def panel(self) -> int:
        """Features by which weights are cut."""
        return gpu_budget.PANEL if self.gpu else PANEL

    def least_strip(self, group: FoldGroup) -> int:
        return gpu_budget.row_of_panels(group) if self.gpu else ops.LEAST_ROWS * 4 * group.width


def _least(group: FoldGroup, k: int, checkpoint: Checkpoint, way: _Way) -> int:
    """Bytes with which the group can be folded in some way."""
    if way.by_function:
        return function_bytes(group, k, checkpoint, way.beside)
    strips = ([None] if way.strip is None else []) + ([way.least_strip(group)] if way.spills else [])
    pieces = (None, way.panel)
    return way.beside + min(
        group_bytes(group, k, checkpoint, features, strip, gpu=way.gpu) for features in pieces for strip in strips
    )


def _cut(group: FoldGroup, k: int, checkpoint: Checkpoint, room: int, way: _Way) -> GroupBudget:
    """The best way to fold a group in so many bytes, which must do for one."""
    n, panel = group.width, way.panel
    whole = sum(checkpoint.tensors[name].nbytes for name in group.tensors)
    if way.by_function:
        return GroupBudget(None, None, function_bytes(group, k, checkpoint, way.beside), whole)
    most = max(checkpoint.tensors[name].n_parameters // n for name in group.tensors)
    sizes = range(-(-most // panel) * panel, 0, -panel)
    for features in (None, *sizes) if way.strip is None else ():
        nbytes = group_bytes(group, k, checkpoint, features, gpu=way.gpu) + way.beside
        if nbytes <= room:
            return GroupBudget(features, None, nbytes, whole if features is None else 0)
    least = way.least_strip(group)
    for features in (size for size in sizes if size <= _SPILLED_PIECE):
        piece = max(_piece_bytes(checkpoint.tensors[name], n, features) for name in group.tensors)
        left = room - way.beside - group_bytes(group, k, checkpoint, features, least, gpu=way.gpu)
        strip = least + max(0, left - 2 * piece)  # one read ahead, one written behind
        if way.strip is not None:
            strip = min(strip, way.strip)
        if strip >= min(n, _STRIP_ROWS) * 4 * n or strip == way.strip:
            break
    disk = ops.disk_bytes(n, k)
    nbytes = group_bytes(group, k, checkpoint, features, strip, gpu=way.gpu) + way.beside
    return GroupBudget(features, strip, nbytes, 0, disk)


def _piece_bytes(info: TensorInfo, width: int, features: int | None) -> int:
    extent = info.n_parameters // width
    return width * min(extent, features or extent) * ITEM_SIZE[info.dtype]


def group_bytes(
    group: FoldGroup, k: int, checkpoint: Checkpoint, features: int | None, strip: int | None = None, *, gpu: bool = False
) -> int:
    """Peak of folding a group with so many features of a weight in hand, and so many bytes of G, or all of it.

    With ``gpu`` all of G is not here, and beside what is in hand something is still being copied up.
    """
    n = group.width
    whole, pieces, merged = 0, 0, 0
    for name in group.tensors:
        info = checkpoint.tensors[name]
        extent = prod(info.shape) // n
        whole += info.nbytes
        pieces = max(pieces, _piece_bytes(info, n, features))
        merged = max(merged, k * min(extent, features or extent) * 4)  # a result may be fp32
    in_hand, kept = (whole, whole) if features is None else (pieces, 0)
    if strip is None:
        gram = clustered = 0 if gpu else 4 * n * n
    else:
        gram, clustered = strip + _TURNED, 0
    if gpu:
        in_hand += pieces
    packed = 0 if gpu else packed_bytes(n)
    return max(gram + in_hand + packed, clustered + kept + _clustering(n, k, strip), in_hand + merged) + _SLACK


def function_bytes(group: FoldGroup, k: int, checkpoint: Checkpoint, beside: int) -> int:
    """Peak of folding a group by function, where all but its weights and what kernels work in takes ``beside``."""
    whole = sum(checkpoint.tensors[name].nbytes for name in group.tensors)
    return whole + _kernel_bytes(group, k, None, gpu=False) + beside + _SLACK


def reading_bytes(checkpoint: Checkpoint) -> int:
    """Where a GPU computes by function: any tensor as it is read, and converted."""
    return 2 * max(info.nbytes for info in checkpoint.tensors.values())


def _results(group: FoldGroup, k: int, checkpoint: Checkpoint) -> int:
    """What comes of a group folded by function on a GPU: consumers in fp32, and all as it is written, in fp32 at most."""
    parameters = {name: checkpoint.tensors[name].n_parameters // group.width * k for name in group.tensors}
    return 4 * (sum(parameters.values()) + sum(parameters[name] for name in group.consumers))


def _kernel_bytes(group: FoldGroup, k: int, strip: int | None, gpu: bool) -> int:
    """What the kernels of a group allocate while tensors may lie idle."""
    if gpu:
        return 0 if strip is None else _TURNED
    return max(packed_bytes(group.width), _clustering(group.width, k, strip))


def packed_bytes(n: int) -> int:
    """What a Gram product of N units takes beside its operands."""
    return max(_PACKED, _PACKED_ITEM * n * PANEL)


def _clustering(n: int, k: int, strip: int | None) -> int:
    return _CLUSTERING * n if strip is None else ops.clustering_bytes(n, k, torch.get_num_threads())
