"""How much memory the phases of a fold by function take beside the process, text apart: gradients, the survey, folding."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyfold import function_metric, head_folding
from pyfold.budget import function_bytes
from pyfold.calibration import LENGTH, SEQUENCES
from pyfold.families import FoldGroup
from pyfold.families.activations import BATCH, attending_bytes, information_bytes, saying_bytes
from pyfold.families.attention import Attention
from pyfold.io.checkpoint import Checkpoint
from pyfold.processor import Processor
from pyfold.survey import MEASURED

INFORMING, SURVEYING = 64, 64  # sequences of the text that are enough for the information, and for the widths


def gradients(checkpoint: Checkpoint, processor: Processor, room: int) -> int:
    """Raises PyfoldError where it is more than the ``room`` that is left."""
    needs = information_bytes(checkpoint, LENGTH, processor.dtype)
    return _within("gradients for the function metric", needs, processor, room)


def survey(checkpoint: Checkpoint, groups: Sequence[FoldGroup], processor: Processor, room: int) -> int:
    """Of finding widths: hidden states, also of forks that have one group folded, and a group in hand, or logits. Raises
    PyfoldError where it is more than the ``room`` that is left."""
    dtype = processor.dtype
    states = _states(checkpoint, SURVEYING + len(groups) * (SURVEYING // function_metric.HELD_OUT))
    takes = [saying_bytes(checkpoint, dtype)]
    for group in groups:
        k, n, hidden = max(1, int(MEASURED * group.width)), group.width, checkpoint.config["hidden_size"]
        curve = 4 * (4 * n * n + 3 * hidden * n)  # C twice, and in order, its factor; the consumer, in order, times that
        takes.append(function_bytes(group, k, checkpoint, max(curve, _at_work(checkpoint, group, k, dtype))))
    return _within("groups, to be surveyed for --allocate auto,", states + max(takes), processor, room)


def folding(checkpoint: Checkpoint, group: FoldGroup, k: int, dtype: torch.dtype) -> int:
    """While a group is folded, beside its weights and what kernels work in: hidden states, and what is done with both."""
    return _states(checkpoint, SEQUENCES) + _at_work(checkpoint, group, k, dtype)


def folding_heads(checkpoint: Checkpoint, heads: Sequence[tuple[Attention, int]]) -> int:
    """While the heads of a layer are folded, all of them into so many groups; 0 without heads."""
    takes = (head_folding.nbytes(attention, checkpoint.config["hidden_size"]) for attention, _ in heads)
    return max((_states(checkpoint, SEQUENCES) + nbytes for nbytes in takes), default=0)


def on_noise(checkpoint: Checkpoint, group: FoldGroup, k: int, dtype: torch.dtype) -> int:
    """The same where units are seen on noise: there are no states, but batches."""
    hidden: int = checkpoint.config["hidden_size"]
    return 3 * 4 * BATCH * hidden + function_metric.nbytes(group.width, k, hidden, dtype.itemsize)


def _states(checkpoint: Checkpoint, sequences: int) -> int:
    hidden: int = checkpoint.config["hidden_size"]
    return 4 * sequences * LENGTH * hidden


def _at_work(checkpoint: Checkpoint, group: FoldGroup, k: int, dtype: torch.dtype) -> int:
    hidden = checkpoint.config["hidden_size"]
    attending = 3 * dtype.itemsize * hidden * group.width + attending_bytes(checkpoint, dtype)
    return max(attending, function_metric.nbytes(group.width, k, hidden, dtype.itemsize))


def _within(what: str, needs: int, processor: Processor, room: int) -> int:
    if needs > room:
        raise processor.refusal(f"{what} take {needs / 2**20:.0f} MiB ({needs:,} bytes)", room)
    return needs
