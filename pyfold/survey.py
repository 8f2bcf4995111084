"""What each group is worth: its error at every width, in nats of the whole model's output, before a unit is removed.

The shape of a curve is the share of its output that a group loses as units go, least first, and the rest makes up for them. Its
scale is measured: the KL divergence of what the model says on text with that group alone folded from what it says as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pyfold import ops
from pyfold.errors import PyfoldError
from pyfold.families import FoldGroup
from pyfold.families.activations import CPU, Activations
from pyfold.function_metric import HELD_OUT, Moments, fold_units, gathered, moments
from pyfold.io.checkpoint import Checkpoint
from pyfold.io.safetensors import Reader
from pyfold.progress import Progress

MEASURED = 0.75  # of the units stay where a group's scale is measured
_SHRINK = 1.0  # λ of the curves: about what folding takes


def survey(
    checkpoint: Checkpoint,
    groups: Sequence[FoldGroup],
    tokens: Tensor,
    *,
    information: Sequence[Tensor],
    ridge: bool,
    backend: str,
    device: torch.device = CPU,
    progress: Progress | None = None,
) -> list[NDArray[np.float64]]:
    """Of each group, in layer order, its error with 1..N units, in nats per token. ``information``: of each layer's units."""
    probes = slice(HELD_OUT - 1, None, HELD_OUT)
    curves = []
    made = Activations(checkpoint, tokens, checkpoint.tensors.__getitem__, ops.product_dtype(backend), device)
    with Reader() as reader, closing(made) as activations:
        for i, group in enumerate(groups):
            if progress:
                progress(i, len(groups), f"surveying {group.name}")
            weights = {name: reader.read(checkpoint.tensors[name]) for name in group.tensors}
            mlp = activations.mlp(group.layer, weights)
            seen = moments((mlp.units(x) for x in activations.inputs(group.layer)), backend)
            k = max(1, int(MEASURED * group.width))
            del mlp
            [consumer] = (weights[name].to(device).float() for name in group.consumers)
            try:
                curve = lost_at_every_width(consumer, seen)
                folded = fold_units(consumer, seen, k, ridge=ridge, backend=backend, information=information[group.layer])
            except (ValueError, LinAlgError) as error:
                path = checkpoint.tensors[group.tensors[0]].path
                raise PyfoldError(f"{path}: {group.name} cannot be folded: {str(error).splitlines()[0]}") from None
            del seen
            mlp = activations.mlp(group.layer, weights)
            activations.fork(probes, mlp.kept(folded.kept, folded.consumer))
            activations.feed(mlp)
            curves.append(curve / curve[k - 1] if curve[k - 1] > 0 else curve)
        activations.finish()
        return [nats * curve for nats, curve in zip(activations.divergences(probes), curves, strict=True)]


def lost_at_every_width(consumer: Tensor, seen: Moments) -> NDArray[np.float64]:
    """Energy of the output (of a consumer (H, N), from N units) that is lost with 1..N units, the strongest first, where those
    regress the others: (N,).

    With C = L Lᵀ in that order what the first K leave of unit j is Σ_{m > K} L_jm², so that one factor has all K.
    """
    diagonal = seen.fitted.diagonal() + seen.held_out.diagonal()
    order = (diagonal * consumer.square().sum(0)).argsort(descending=True, stable=True)
    shrunk = gathered(seen, order, order)
    shrunk.diagonal().add_(_SHRINK * diagonal[order] + torch.finfo(shrunk.dtype).tiny)
    left = (consumer[:, order] @ torch.linalg.cholesky(shrunk)).square().sum(0).double()
    left = left.cpu()  # where sums of many go in one order
    lost: NDArray[np.float64] = (left.flip(0).cumsum(0).flip(0) - left).numpy()
    return lost.clip(min=0)
