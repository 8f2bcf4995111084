"""A folded module's statistics and consumers, set right on images: real ones or synthesised.

Statistics: every BatchNorm remembers what it sees now, less what the images did to the dense one's,

    mean = m + Σ f_i (μ_i − m_i) / n,    variance = v / (Σ (v_i / σ_i²) / n),

m and v being what the folded module gives on the images, m_i and v_i what the dense one gives in the n channels that went
there, times f_i; μ_i and σ_i² are what those remember of training. What is odd about the images is so in both modules, and
cancels: a layer that folding did not touch remembers what it did. Ridge: every convolution and linear layer that reads folded
units is regressed, as it is reached, on what the dense one gave to the same images,

    W = (A + λ s I)⁻¹ (B + λ s W_folded),    A = Σ p pᵀ, B = Σ p tᵀ,

with p the patches that the folded layer reads, once all before it are repaired, t what the dense layer, its rows merged, makes
of what it reads (both less their means, where a bias can give them back), and s the mean of A's diagonal: shrunk to the folded
layer, so that few images do little harm.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyfold.errors import PyfoldError
from pyfold.progress import Progress


class Target(NamedTuple):
    """Of a layer: what its dense one computes, with rows merged as the folded one's are, and columns as they were. ``centred``:
    a constant beside the output costs nothing, since a bias, or the mean of a BatchNorm, takes it."""

    weight: Tensor
    bias: Tensor | None
    centred: bool


class Norm(NamedTuple):
    """Of a BatchNorm: into which of the folded one's channels each of the dense one's goes, (N,), -1 for none; and what it is
    multiplied by there, (N,)."""

    to: Tensor
    factor: Tensor


RIDGE = 0.02
_MOST = 4.0  # times that images may be wrong about a variance; further off, they say nothing of the channel
_PATCH_NUMBERS = 1 << 25  # of patches at once: 128 MiB


def _remembering(module: nn.Module) -> dict[str, _BatchNorm]:
    """By name, the BatchNorms that remember statistics."""
    every = {name: each for name, each in module.named_modules() if isinstance(each, _BatchNorm)}
    return {name: each for name, each in every.items() if each.running_mean is not None}


@torch.no_grad()
def regress(
    dense: nn.Module,
    folded: nn.Module,
    targets: Mapping[str, Target],
    images: Tensor,
    norms: Mapping[str, Norm] | None = None,
    *,
    ridge: float = RIDGE,
    progress: Progress | None = None,
) -> None:
    """Regress layers of ``folded`` on what ``dense`` gave, and remember every BatchNorm's statistics, in one pass of both.

    A layer is regressed when it is reached, so that all behind it reads what it gives from then on. ``targets``: by name of a
    layer that reads folded units and runs once. ``norms``: by name of a BatchNorm; the others have the dense one's channels.
    Activations of all images are held together, of a few layers at a time.
    """
    done, remembering = 0, _remembering(folded)
    found: dict[str, list[Tensor]] = {}
    with _seen(dense, targets, remembering, images) as asked, ExitStack() as hooks:

        def dense_at(name: str) -> Tensor:
            source, had = next(asked, ("nothing", images))
            if source != name:
                raise PyfoldError(
                    f"{name} runs in the folded module where {source} does in the dense one: set compensate=False"
                )
            return had

        def reached(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], name: str) -> None:
            nonlocal done
            assert isinstance(layer, (nn.Conv2d, nn.Linear))
            _regress(name, layer, _read(args, kwargs), dense_at(name), dense.get_submodule(name), targets[name], ridge)
            done += 1
            if progress:
                progress(done, len(targets), "regressing consumers, layers")

        def remember(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], name: str) -> None:
            now, source = _statistics(_read(args, kwargs)), dense.get_submodule(name)
            found.setdefault(name, []).append(_corrected(now, dense_at(name), source, norms.get(name) if norms else None))
            _set_statistics(layer, found[name][-1])

        for name in [*targets, *remembering]:
            hook = partial(reached if name in targets else remember, name=name)
            hooks.callback(folded.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True).remove)
        folded(images.clone())  # it may write into its input, and the dense one reads it too
    for name, runs in found.items():
        _set_statistics(remembering[name], torch.stack(runs).mean(0))


def _statistics(x: Tensor) -> Tensor:
    """(2, N): means and variances of channels, dimension 1."""
    dims = [dim for dim in range(x.dim()) if dim != 1]
    return torch.stack((x.float().mean(dims), x.float().var(dims, unbiased=False)))


def _corrected(now: Tensor, had: Tensor, source: nn.Module, norm: Norm | None) -> Tensor:
    """What the folded BatchNorm shall remember, (2, K), of what it and the dense one, ``source``, have seen."""
    assert isinstance(source, _BatchNorm)
    assert source.running_mean is not None
    assert source.running_var is not None
    to, factor = norm or Norm(torch.arange(had.shape[1]), torch.ones(had.shape[1]))
    shift = factor * (source.running_mean.float() - had[0])
    wrong = (had[1] + source.eps) / (source.running_var.float() + source.eps)
    stays, zeros = to >= 0, now.new_zeros(now.shape[1])
    counts = zeros.index_add(0, to[stays], torch.ones_like(shift[stays]))
    shift, wrong = (zeros.index_add(0, to[stays], each[stays]) / counts for each in (shift, wrong))
    return torch.stack((now[0] + shift, (now[1] + source.eps) / wrong.clamp(1 / _MOST, _MOST) - source.eps)).clamp_min(
        torch.tensor([[-torch.inf], [0.0]])
    )


def _set_statistics(layer: nn.Module, found: Tensor) -> None:
    assert isinstance(layer, _BatchNorm)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.copy_(found[0])
    layer.running_var.copy_(found[1])


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
def _seen(
    module: nn.Module, layers: Iterable[str], norms: Iterable[str], images: Tensor
) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """Name, and input of each layer, or statistics of each BatchNorm's, as it is reached: the module runs beside its reader,
    one layer ahead of it at most."""
    waiting: queue.SimpleQueue[tuple[str, Tensor] | BaseException | None] = queue.SimpleQueue()
    room, stop = threading.Semaphore(1), threading.Event()

    def reached(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], name: str) -> None:
        room.acquire()
        if stop.is_set():
            raise _Stopped
        waiting.put((name, _read(args, kwargs).clone()))  # which may be written into behind the layer

    def normalised(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], name: str) -> None:
        waiting.put((name, _statistics(_read(args, kwargs))))

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
            if item[0] in layers:
                room.release()
            yield item

    layers = set(layers)
    handles = [
        module.get_submodule(name).register_forward_pre_hook(partial(hook, name=name), with_kwargs=True)
        for hook, names in ((reached, layers), (normalised, norms))
        for name in names
    ]
    thread = threading.Thread(target=run, name="dense module")
    thread.start()
    try:
        yield taken()
    finally:
        stop.set()
        room.release()
        thread.join()
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
