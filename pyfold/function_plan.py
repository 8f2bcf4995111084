"""What the function metric knows before it folds: text, the information of the loss about units, and the widths.

All of it takes long to find, and is kept beside the result.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyfold import __version__, allocation, function_budget
from pyfold.calibration import Cache, Calibration, calibrate
from pyfold.families.activations import information
from pyfold.function_budget import INFORMING, SURVEYING
from pyfold.io.checkpoint import Checkpoint
from pyfold.plan import Plan
from pyfold.processor import Processor
from pyfold.progress import Progress
from pyfold.survey import survey


class Seen(NamedTuple):
    """Text, the information of the loss on it about each layer's units, and JSON values: what they are kept by."""

    text: Calibration
    information: list[Tensor]
    key: dict[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values that say what this is."""
        values = json.dumps([values.tolist() for values in self.information])
        return {**self.text.identity, "information_sha256": hashlib.sha256(values.encode()).hexdigest()}


def see(
    checkpoint: Checkpoint,
    text: str,
    cache: Cache,
    stamps: dict[str, list[int]],
    *,
    seed: int,
    processor: Processor,
    progress: Progress | None,
) -> Seen:
    """``text``: ``self`` or a file; ``stamps`` tells the source's files from others."""
    calibration = calibrate(checkpoint, text, cache, stamps, processor, seed=seed, progress=progress)
    key = {
        "pyfold": __version__,
        "sources": stamps,
        "calibration": calibration.identity["calibration_sha256"],
        "sequences": [INFORMING, SURVEYING],
        "backend": processor.backend,
        **processor.identity,
        "torch": torch.__version__,
    }
    known = cache.get("information", key)
    if not _numbers(known):
        function_budget.gradients(checkpoint, processor, processor.room())
        tokens = calibration.tokens[:INFORMING]
        found = information(checkpoint, tokens, processor.dtype, progress, processor.device)
        known = [values.tolist() for values in found]
        cache.put("information", key, known)
    return Seen(calibration, [torch.tensor(values) for values in known], key)


def find_widths(
    checkpoint: Checkpoint,
    plan: Plan,
    seen: Seen,
    cache: Cache,
    *,
    multiple_of: int,
    common: bool,
    ridge: bool,
    processor: Processor,
    progress: Progress | None,
) -> tuple[list[int], list[str]]:
    """Of the plan's groups those of least cost to the whole model in its room, or one in ``common``; what to say of it."""
    groups = [group for group, _ in plan.groups]
    key = seen.key | {"groups": [group.name for group in groups], "ridge": ridge}
    errors = cache.get("errors", key)
    if not _numbers(errors) or list(map(len, errors)) != [group.width for group in groups]:
        function_budget.survey(checkpoint, groups, processor, processor.room())
        tokens = seen.text.tokens[:SURVEYING]
        found = survey(
            checkpoint,
            groups,
            tokens,
            information=seen.information,
            ridge=ridge,
            backend=processor.backend,
            device=processor.device,
            progress=progress,
        )
        errors = [curve.tolist() for curve in found]
        cache.put("errors", key, errors)
    costs = [sum(checkpoint.tensors[name].n_parameters for name in group.tensors) // group.width for group in groups]
    curves = [allocation.Curve(np.array(curve), cost) for curve, cost in zip(errors, costs, strict=True)]
    best = allocation.allocate(curves, plan.room, multiple_of=multiple_of)
    notes = [
        f"widths by measured KL divergence, estimated to sum up to {allocation.total_error(curves, best):.4f} nats a token"
    ]
    if not common:
        return best, notes
    widths = [allocation.common_width(curves, plan.room, multiple_of=multiple_of)] * len(groups)
    return widths, [*notes, f"one width for all, {widths[0]}: estimated {allocation.total_error(curves, widths):.4f} nats"]


def _numbers(values: Any) -> bool:
    """Whether these are lists of numbers, as they were kept."""
    return isinstance(values, list) and all(
        isinstance(each, list) and all(isinstance(value, float) for value in each) for each in values
    )
