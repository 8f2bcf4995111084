"""How much of a GPU's memory a fold takes, before a weight is read.

Weights go through it in panels of their features. A group whose Gram matrix has room there, with what clusters it, is clustered
there; of another, strips are computed there, kept in a file and clustered on the host. As that may round otherwise, what is
clustered on the host belongs to the identity of a run; nothing else of the budget does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pyfold.errors import PyfoldError
from pyfold.families import FoldGroup
from pyfold.io.checkpoint import Checkpoint
from pyfold.io.safetensors import ITEM_SIZE, torch_dtype
from pyfold.ops import cuda
from pyfold.plan import Plan

# Features that go up, are multiplied and are added to G at a time, whatever the budget: that fixes the order of summation. At
# LLaMA-7B's width a panel of fp16 is 22 MB, enough for a bus to run at its speed, and two of them are little beside G.
PANEL = 1024
_MERGING = 64  # bytes a unit: its label, and what sorts units by cluster
_CUBLAS = 32 << 20  # what cuBLAS works in on an H100; on others less
# Of small tensors: those of the inertia alone are six of 8 MiB, for every two of which torch reserves 20; and it rounds all
# that is larger up to 2 MiB.
_SLACK = 80 << 20
OVERHEAD = _CUBLAS + _SLACK  # whatever the group
FUNCTION_OVERHEAD = OVERHEAD + _CUBLAS  # gradients are computed in another thread, which has a workspace of its own


@dataclass(frozen=True)
class Buffers:
    """What a group takes on the device, in bytes.

    Attributes
    ----------
    width : int
        N.
    gram : int
        All of G, or the rows of it in hand.
    up, down : int
        Each of two buffers for what goes there, and comes from there.
    nbytes : int
        All that grows with the group, at its peak.
    """

    width: int
    gram: int
    up: int
    down: int
    nbytes: int

    @property
    def peak(self) -> int:
        """What torch reserves at most."""
        return self.nbytes + OVERHEAD


def buffers(group: FoldGroup, k: int, checkpoint: Checkpoint, plan: Plan, strip: int | None) -> Buffers:
    """Of a group with so many bytes of G in hand; None: all of G, clustered there."""
    n = group.width
    members = [checkpoint.tensors[name] for name in group.tensors]
    panels = {info.name: min(PANEL, info.n_parameters // n) for info in members}
    up = max(n * panels[info.name] * ITEM_SIZE[info.dtype] for info in members)
    down = max(k * panels[info.name] * ITEM_SIZE[plan.tensors[info.name][0]] for info in members)
    product = max(cuda.gram_bytes(n, torch_dtype(info.dtype)) for info in members)
    gram = 4 * n * n if strip is None else strip
    clustering = gram + cuda.clustering_bytes(n, k) if strip is None else 0
    return Buffers(n, gram, up, down, max(gram + 2 * up + product, clustering, 2 * (up + down) + _MERGING * n))


def strip_limits(checkpoint: Checkpoint, plan: Plan, gpu_memory: int, *, spills: bool) -> dict[str, int | None]:
    """For every group the bytes of G that there is room for; None: all of it, and clustering.

    Raises
    ------
    PyfoldError
        If a group does not fit; names the least that would do.
    """
    limits: dict[str, int | None] = {}
    needs: dict[str, int] = {}
    for group, k in plan.groups:
        whole = buffers(group, k, checkpoint, plan, None)
        least = buffers(group, k, checkpoint, plan, row_of_panels(group))
        needs[group.name] = min(whole.peak, least.peak) if spills else whole.peak
        most = buffers(group, k, checkpoint, plan, gpu_memory)  # so large that the peak is while it is there
        left = min(gpu_memory - (most.peak - most.gram), whole.gram)
        limits[group.name] = None if whole.peak <= gpu_memory else left
    _check(needs, gpu_memory)
    return limits


def by_function(plan: Plan, gpu_memory: int, beside: Mapping[str, int]) -> dict[str, Buffers]:
    """Of every group folded by function, with all that is ``beside`` what kernels work in.

    Raises
    ------
    PyfoldError
        If a group does not fit; names the least that would do.
    """
    takes = {}
    for group, k in plan.groups:
        n = group.width
        kernels = max(cuda.clustering_bytes(n, k), cuda.gram_bytes(n, torch.bfloat16))
        takes[group.name] = Buffers(n, 4 * n * n, 0, 0, beside[group.name] + kernels + FUNCTION_OVERHEAD - OVERHEAD)
    _check({name: buffers.peak for name, buffers in takes.items()}, gpu_memory)
    return takes


def _check(needs: Mapping[str, int], gpu_memory: int) -> None:
    name = max(needs, key=lambda name: needs[name])
    if gpu_memory < needs[name]:
        raise PyfoldError(
            f"gpu_memory: {name} needs at least {needs[name] / 2**20:.0f} MiB ({needs[name]:,} bytes), "
            f"got {gpu_memory / 2**20:.0f} MiB"
        )


def row_of_panels(group: FoldGroup) -> int:
    """Bytes of the lowest strip: what the kernels multiply at a time, so that no product's shape depends on the budget."""
    return cuda.PANEL * 4 * group.width
