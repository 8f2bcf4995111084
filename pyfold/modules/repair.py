"""A folded module's statistics and consumers, set right on images: real ones or synthesised.

Re-estimation: every BatchNorm remembers what it sees now. Ridge: every convolution and linear layer that reads folded units is
regressed, in the order in which they run, on what the dense one gave to the same images,

    W = (A + λ s I)⁻¹ (B + λ s W_folded),    A = Σ p pᵀ, B = Σ p tᵀ,

with p the patches that the folded layer reads, once all before it are repaired, t what the dense layer, its rows merged, makes
of what it reads (both less their means, where a bias can give them back), and s the mean of A's diagonal: shrunk to the folded
layer, so that few images do little harm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyfold.errors import PyfoldError
from pyfold.modules.inversion import batch_norms
from pyfold.progress import Progress


class Target(NamedTuple):
    """Of a layer: what its dense one computes, with rows merged as the folded one's are, and columns as they were. ``centred``:
    a constant beside the output costs nothing, since a bias, or the mean of a BatchNorm, takes it."""

    weight: Tensor
    bias: Tensor | None
    centred: bool


RIDGE = 0.02
_BATCH = 128
_PATCH_NUMBERS = 1 << 25  # of patches at once: 128 MiB


@torch.no_grad()
def reestimate(module: nn.Module, batches: Sequence[Tensor]) -> None:
    """Every BatchNorm remembers mean and variance of what it sees on all batches, those before it normalising by the batch."""
    with _on_batches(module, remember=True):
        for batch in batches:
            module(batch)


@contextmanager
def _on_batches(module: nn.Module, *, remember: bool) -> Iterator[None]:
    """BatchNorms normalise by the batch; all else as in evaluation. ``remember``: and keep the mean over batches."""
    layers = batch_norms(module)
    before = [(each, each.momentum, each.training) for each in layers]
    for each in layers:
        each.train()
        each.momentum = None if remember else 0.0
        if remember:
            each.reset_running_stats()
    try:
        yield
    finally:
        for each, momentum, training in before:
            each.momentum = momentum
            each.train(training)


@torch.no_grad()
def regress(
    dense: nn.Module,
    folded: nn.Module,
    targets: Mapping[str, Target],
    batches: Sequence[Tensor],
    *,
    ridge: float = RIDGE,
    progress: Progress | None = None,
) -> None:
    """Regress layers of ``folded`` on what ``dense`` gave.

    ``targets``: by name of a layer that reads folded units, in the order in which they run.
    """
    for done, (name, target) in enumerate(targets.items()):
        layer, source = _regressed(folded, name), _regressed(dense, name)
        size = layer.weight[0].numel()
        gram, cross = torch.zeros(size, size), torch.zeros(size, len(layer.weight))
        read, wanted, count = torch.zeros(size), torch.zeros(len(layer.weight)), 0
        for batch in batches:
            had = _input(dense, source, batch)
            if had is None:
                break
            want = _apply(source, had, target.weight, target.bias).float()
            with _on_batches(folded, remember=False):
                seen = _input(folded, layer, batch)
            assert seen is not None
            for patches, part in zip(_patches(layer, seen), want.split(_images_at_once(layer, seen)), strict=True):
                outputs = part.movedim(1, 0).flatten(1)
                gram.addmm_(patches, patches.T)
                cross.addmm_(patches, outputs.T)
                read, wanted, count = read + patches.sum(1), wanted + outputs.sum(1), count + patches.shape[1]
        if not count:
            continue  # forward uses the weight without running the layer
        if target.centred:
            gram.addr_(read, read, alpha=-1 / count)
            cross.addr_(read, wanted, alpha=-1 / count)
        shrink = ridge * float(gram.diagonal().mean()) + torch.finfo(torch.float32).tiny
        gram.diagonal().add_(shrink)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed:
            raise PyfoldError(f"{name}: what it reads is not finite, or too much alike to be regressed on; use more images")
        solved = torch.cholesky_solve(cross + shrink * layer.weight.float().flatten(1).T, factor).T
        layer.weight.copy_(solved.view_as(layer.weight))
        if layer.bias is not None:
            layer.bias.copy_((wanted - solved @ read) / count)
        if progress:
            progress(done + 1, len(targets), "regressing consumers, layers")


def _regressed(module: nn.Module, name: str) -> nn.Conv2d | nn.Linear:
    layer = module.get_submodule(name)
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    return layer


class _Reached(Exception):
    """The layer that was waited for."""


def _input(module: nn.Module, layer: nn.Module, batch: Tensor) -> Tensor | None:
    """What a layer reads, None where it does not run; what comes behind it does not run."""
    seen: list[Tensor] = []

    def reached(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Reached

    hook = layer.register_forward_pre_hook(reached)
    try:
        module(batch)
    except _Reached:
        pass
    finally:
        hook.remove()
    return seen[0] if seen else None


def _apply(layer: nn.Conv2d | nn.Linear, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias).flatten(0, -2)
    return layer._conv_forward(x, weight, bias)


def _images_at_once(layer: nn.Conv2d | nn.Linear, x: Tensor) -> int:
    if isinstance(layer, nn.Linear):
        return max(1, x.flatten(0, -2).shape[0])
    return max(1, _PATCH_NUMBERS // (layer.weight[0].numel() * x.shape[-1] * x.shape[-2]))


def _patches(layer: nn.Conv2d | nn.Linear, x: Tensor) -> Iterator[Tensor]:
    """(size, positions) of so many images at once: columns that the layer's weight, (K, size), is multiplied by."""
    if isinstance(layer, nn.Linear):
        yield x.flatten(0, -2).T.float()
        return
    padded, mode = layer._reversed_padding_repeated_twice, layer.padding_mode
    for part in x.float().split(_images_at_once(layer, x)):
        around = F.pad(part, padded, mode="constant" if mode == "zeros" else mode)
        yield F.unfold(around, layer.kernel_size, layer.dilation, 0, layer.stride).movedim(1, 0).flatten(1)


def split(images: Tensor, size: int = _BATCH) -> list[Tensor]:
    """Batches of about the same size, none far smaller: a BatchNorm counts each as much."""
    return list(images.tensor_split(max(1, round(len(images) / size))))
