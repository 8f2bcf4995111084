"""A folded module's statistics and consumers, set right on images: real ones or synthesised.

Re-estimation: every BatchNorm remembers what it sees now. Ridge: every convolution and linear layer that reads folded units is
regressed, as it is reached, on what the dense one gave to the same images,

    W = (A + λ s I)⁻¹ (B + λ s W_folded),    A = Σ p pᵀ, B = Σ p tᵀ,

with p the patches that the folded layer reads, once all before it are repaired, t what the dense layer, its rows merged, makes
of what it reads (both less their means, where a bias can give them back), and s the mean of A's diagonal: shrunk to the folded
layer, so that few images do little harm.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
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
_PATCH_NUMBERS = 1 << 25  # of patches at once: 128 MiB


@torch.no_grad()
def reestimate(module: nn.Module, images: Tensor) -> None:
    """Every BatchNorm remembers mean and variance of what it sees on all images, those before it normalising by them."""
    with _remembering(module):
        module(images)


@contextmanager
def _remembering(module: nn.Module) -> Iterator[None]:
    """BatchNorms normalise by the batch and remember its statistics; all else as in evaluation."""
    before = [(each, each.momentum, each.training, each.track_running_stats) for each in batch_norms(module)]
    for each, _, _, _ in before:
        each.training = each.track_running_stats = True
        each.momentum = None
        each.reset_running_stats()
    try:
        yield
    finally:
        for each, momentum, training, tracking in before:
            each.momentum, each.training, each.track_running_stats = momentum, training, tracking


@torch.no_grad()
def regress(
    dense: nn.Module,
    folded: nn.Module,
    targets: Mapping[str, Target],
    images: Tensor,
    *,
    ridge: float = RIDGE,
    progress: Progress | None = None,
) -> None:
    """Regress layers of ``folded`` on what ``dense`` gave, and remember every BatchNorm's statistics, in one pass of both.

    A layer is regressed when it is reached, so that all behind it reads what it gives from then on. ``targets``: by name of a
    layer that reads folded units and runs once. Activations of all images are held together, of a few layers at a time.
    """
    done = 0
    if not targets:
        return reestimate(folded, images)
    with _inputs(dense, targets, images) as asked, ExitStack() as hooks:

        def reached(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], name: str) -> None:
            nonlocal done
            source, had = next(asked, ("nothing", images))
            if source != name:
                raise PyfoldError(
                    f"{name} runs in the folded module where {source} does in the dense one: set compensate=False"
                )
            assert isinstance(layer, (nn.Conv2d, nn.Linear))
            _regress(name, layer, _read(args, kwargs), had, dense.get_submodule(name), targets[name], ridge)
            done += 1
            if progress:
                progress(done, len(targets), "regressing consumers, layers")

        for name in targets:
            handle = folded.get_submodule(name).register_forward_pre_hook(partial(reached, name=name), with_kwargs=True)
            hooks.callback(handle.remove)
        with _remembering(folded):
            folded(images.clone())  # it may write into its input, and the dense one reads it too


def _read(args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Tensor:
    return args[0] if args else kwargs["input"]


def _regress(
    name: str, layer: nn.Conv2d | nn.Linear, seen: Tensor, had: Tensor, source: nn.Module, target: Target, ridge: float
) -> None:
    """``seen``, ``had``: what the layer and the dense one, ``source``, read of the same images."""
    size = layer.weight[0].numel()
    gram, cross = torch.zeros(size, size), torch.zeros(size, len(layer.weight))
    read, wanted, count = torch.zeros(size), torch.zeros(len(layer.weight)), 0
    shifts: tuple[Tensor, Tensor] | None = None  # about the means: sums of squares of what is far from 0 would cancel
    bias = None if target.bias is None else target.bias.float()
    for patches, part in zip(_patches(layer, seen), had.split(_images_at_once(layer, seen)), strict=True):
        outputs = _apply(source, part.float(), target.weight.float(), bias).movedim(1, 0).flatten(1)
        if target.centred:
            shifts = shifts or (patches.mean(1), outputs.mean(1))
            patches, outputs = patches - shifts[0][:, None], outputs - shifts[1][:, None]
        gram.addmm_(patches, patches.T)
        cross.addmm_(patches, outputs.T)
        read, wanted, count = read + patches.sum(1), wanted + outputs.sum(1), count + patches.shape[1]
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
        assert shifts is not None
        layer.bias.copy_(wanted / count + shifts[1] - solved @ (read / count + shifts[0]))


class _Stopped(Exception):
    """Nobody waits for what the module gives any more."""


@contextmanager
def _inputs(module: nn.Module, names: Iterable[str], images: Tensor) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """Name and input of each layer as it is reached: the module runs beside its reader, one layer ahead of it at most."""
    waiting: queue.Queue[tuple[str, Tensor] | BaseException | None] = queue.Queue(maxsize=1)
    stop = threading.Event()

    def reached(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], name: str) -> None:
        if stop.is_set():
            raise _Stopped
        waiting.put((name, _read(args, kwargs).clone()))  # which may be written into behind the layer

    def run() -> None:
        try:
            with torch.no_grad():
                module(images.clone())
            waiting.put(None)
        except BaseException as error:  # the reader raises it
            waiting.put(error)

    def taken() -> Iterator[tuple[str, Tensor]]:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    handles = [
        module.get_submodule(name).register_forward_pre_hook(partial(reached, name=name), with_kwargs=True) for name in names
    ]
    thread = threading.Thread(target=run, name="dense module")
    thread.start()
    try:
        yield taken()
    finally:
        stop.set()
        while thread.is_alive():
            with suppress(queue.Empty):
                waiting.get(timeout=0.01)
        for handle in handles:
            handle.remove()


def _apply(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias).flatten(0, -2)
    assert isinstance(layer, nn.Conv2d)
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
