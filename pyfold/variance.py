"""The variance of a gated network's output before and after its units are merged, from weights alone, as they stream by.

Behind an RMSNorm of gain g take inputs x = ±g, signs independent: their second moment is diag(g²), and rows of many features
make of them what is nearly Gaussian. A sketch is what gate and up make of some such inputs and, for the consumer V, how random
directions r of ±1 hear every unit: the mean of (r · V h)² over these is ‖V h‖². It is linear in the weights, so that of merged
units it is the members' means and sums, and no weight is looked at again.

The consumer scaled by the root of the ratio of both variances has the output's variance as it was, under this model. All of it
is scaled: what merged units lack, they cannot make up for alone (SmolLM2, layers 12 to 19, 20 %, 8 windows of 256: perplexity
3.60 x dense without repair, 3.65 so, 8.2 by merged units alone, 12 by their members' mean cosine, 2400 by the norms of rows).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from pyfold import ops
from pyfold.errors import PyfoldError
from pyfold.families import FoldGroup
from pyfold.io.checkpoint import Checkpoint
from pyfold.io.safetensors import ITEM_SIZE

_ACTS: Mapping[str, Callable[[Tensor], Tensor]] = {"silu": silu, "gelu": gelu}
_SAMPLES = 128  # inputs, and as many directions: of 2^14 products the variance, of both networks' on the same ones the ratio
_ROWS = 16  # inputs in hand in fp64: less memory than clustering took
_PANEL = 512  # features summed at a time: weights are cut to multiples of it


def variance_bytes(checkpoint: Checkpoint, group: FoldGroup) -> int:
    """That a sketch takes while weights go by.

    Raises
    ------
    PyfoldError
        For an activation that is not known here.
    """
    if group.act not in _ACTS:
        raise PyfoldError(
            f"{checkpoint.path / 'config.json'}: repair variance knows hidden_act {' and '.join(_ACTS)}, not '{group.act}'"
        )
    n = _SAMPLES + group.width
    item = max(ITEM_SIZE[checkpoint.tensors[name].dtype] for name in group.tensors)
    return 3 * 4 * _SAMPLES * n + item * _PANEL * n


class Sketch:
    """What N units say to some random inputs, and how some random directions hear them.

    Parameters
    ----------
    group : FoldGroup
        Its producers are gate and up.
    gain : Tensor, (D,)
    backend : str
        Of the products, on the host.
    """

    def __init__(self, group: FoldGroup, gain: Tensor, backend: str) -> None:
        signs = np.random.Generator(np.random.Philox(0)).integers(0, 2, (2, _SAMPLES, len(gain)), np.int8)
        self._inputs, self._directions = (torch.from_numpy(2 * part - 1) for part in signs)
        self._group, self._gain, self._backend = group, gain, backend
        self._products: dict[str, Tensor] = {}
        self._biases: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, first: int) -> None:
        """Features from ``first`` on of one of the group's tensors: (units, features), or (features, units) of a consumer."""
        if name in self._group.riders:
            self._biases[name] = values.flatten().double()
            return
        consumer = name in self._group.consumers
        extent = values.shape[0 if consumer else 1]
        for at in range(0, extent, _PANEL):
            panel = values[at : at + _PANEL] if consumer else values[:, at : at + _PANEL]
            features = slice(first + at, first + min(at + _PANEL, extent))
            drawn = (self._directions if consumer else self._inputs)[:, features].to(values.dtype)
            if not consumer:
                drawn = drawn * self._gain[features].to(values.dtype)
            both = torch.cat([drawn.T, panel], 1) if consumer else torch.cat([drawn, panel])
            made = self._products.get(name)
            self._products[name] = ops.gram(
                both, rows=_SAMPLES, out=made, accumulate=made is not None, transposed=consumer, backend=self._backend
            )

    def ratio(self, labels: Tensor, n_clusters: int) -> float:
        """Variance of the output with clusters merged, rows averaged and columns summed, over that of the output as it is; 1
        where that is 0."""
        size = torch.bincount(labels, minlength=n_clusters).double()
        act, [consumer] = _ACTS[self._group.act], self._group.consumers
        heard = self._products[consumer][:, _SAMPLES:].double()
        outputs: tuple[list[Tensor], list[Tensor]] = ([], [])
        for first in range(0, _SAMPLES, _ROWS):
            gate, up = (self._said(name, slice(first, first + _ROWS)) for name in self._group.producers)
            outputs[0].append(act(gate) * up @ heard.T)
            gate, up = (_summed(z, labels, n_clusters) / size for z in (gate, up))
            outputs[1].append(act(gate) * up @ _summed(heard, labels, n_clusters).T)
        whole, folded = (float(torch.cat(y).var(0, correction=0).sum()) for y in outputs)
        # Threads sum fp64 in other orders: in fp32 that cannot be seen.
        return float(np.float32(folded / whole)) if whole else 1.0

    def _said(self, producer: str, inputs: slice) -> Tensor:
        """What a producer makes of some inputs, (inputs, N), fp64."""
        z = self._products[producer][inputs, _SAMPLES:].double()
        bias = self._biases.get(producer.removesuffix("weight") + "bias")
        return z if bias is None else z + bias


def _summed(x: Tensor, labels: Tensor, n_clusters: int) -> Tensor:
    """Columns of each cluster."""
    return torch.zeros((len(x), n_clusters), dtype=x.dtype).index_add_(1, labels, x)
