"""What feed-forward networks read where there is no text: Gaussian noise through the norm before them.

RMSNorm gives every input a root mean square of one and multiplies its features by its gain, whatever the layers before do. With
no more assumed than that all directions are alike, how units speak together, C = E[h hᵀ], follows from the weights. Their
contributions v ⊗ h then do not change with scale and sign between up and down, nor with where the gain is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from pyfold.families.activations import BATCH, BEFORE, CPU, Layers, Mlp, widest
from pyfold.io.checkpoint import Checkpoint

_SEQUENCES = 16  # of a batch, so that some can be held out
_A_UNIT = 4  # inputs, so that C has full rank


def noise_inputs(checkpoint: Checkpoint) -> int:
    """That every network is seen on."""
    return -(-_A_UNIT * widest(checkpoint) // BATCH) * BATCH


class Noise:
    """In the place of :class:`pyfold.families.activations.Activations`; no layer hears of the others.

    Parameters
    ----------
    checkpoint : Checkpoint
    seed : int
        Of the noise, which is the same for every layer.
    dtype : torch.dtype
        Of matrix products.
    device : torch.device
        Where they are computed.
    """

    def __init__(self, checkpoint: Checkpoint, seed: int, dtype: torch.dtype, device: torch.device = CPU) -> None:
        self._layers = Layers(checkpoint, 1, checkpoint.tensors.__getitem__, dtype, device)
        self._device = device
        self._hidden, self._seed = checkpoint.config["hidden_size"], seed
        self._batches = noise_inputs(checkpoint) // BATCH

    def close(self) -> None:
        """Close the files."""
        self._layers.close()

    def inputs(self, layer: int) -> Iterator[Tensor]:
        """What the network of a layer reads: batches (sequences, length, hidden)."""
        self._layers.load(layer, BEFORE)
        generator = torch.Generator().manual_seed(self._seed)
        for _ in range(self._batches):
            states = torch.randn(_SEQUENCES, BATCH // _SEQUENCES, self._hidden, generator=generator)
            yield self._layers.normed(layer, states.to(self._device))
        self._layers.drop(layer)

    def mlp(self, layer: int, weights: Mapping[str, Tensor]) -> Mlp:
        """The network of a layer from its tensors by name."""
        return self._layers.mlp(layer, weights)

    def feed(self, mlp: Mlp) -> None:
        """Nothing goes on to the next layer."""
