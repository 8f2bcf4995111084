"""LayerNorm of units of which some stand for several."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SHARE = "share"  # what its buffer is called


class WeightedLayerNorm(nn.Module):
    """LayerNorm over the last dimension as if each unit were there as often as it stood before folding.

    ``y = (x − μ) / √(v + eps) · weight + bias``, ``μ = Σ s_i x_i``, ``v = Σ s_i (x_i − μ)²``: ``s_i`` is the number of units
    that unit i stands for, over their number in all. A LayerNorm of fewer units would count each once.

    Parameters
    ----------
    source : nn.LayerNorm
        Its weight, bias and eps are taken over.
    share : Tensor, (K,), float
        s, which sum to 1.
    """

    def __init__(self, source: nn.LayerNorm, share: Tensor) -> None:
        super().__init__()
        self.eps, self.weight, self.bias = source.eps, source.weight, source.bias
        self.training = source.training
        self.register_buffer(SHARE, share.clone())

    def forward(self, x: Tensor) -> Tensor:
        share = self.share
        assert isinstance(share, Tensor)
        centred = x - (x * share).sum(-1, keepdim=True)
        y = centred * torch.rsqrt((centred.square() * share).sum(-1, keepdim=True) + self.eps) * self.weight
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"
