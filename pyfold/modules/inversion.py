"""A trained network with BatchNorm -> images that give every BatchNorm the statistics it was trained on: no data needed.

Deep inversion (Yin et al. 2020, "Dreaming to Distill"): images are parameters, and gradient descent on them makes mean and
deviation of every BatchNorm's input those that it remembers, under a prior that neighbouring pixels are alike and, where the
network ends in classes, a term by which each image belongs to one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyfold.errors import PyfoldError
from pyfold.modules.modes import evaluating
from pyfold.progress import Progress

CLASS_WEIGHT, SMOOTH_WEIGHT = 0.1, 0.01
LEARNING_RATE = 0.1


def batch_norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Those that remember statistics."""
    every = [each for each in module.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    return [each for each in every if each.running_mean is not None]


def invert(
    module: nn.Module,
    shape: Sequence[int],
    *,
    n_images: int = 256,
    steps: int = 100,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Tensor:
    """Images that the module takes for what it was trained on.

    Parameters
    ----------
    module : nn.Module
        With BatchNorm layers that remember statistics; its output may be class scores, (B, classes).
    shape : sequence of int
        Of one image, (C, H, W); or of whatever one input is.
    n_images, steps, batch_size, seed : int
        Images in all; steps of Adam for each batch; images that match the statistics together.

    Returns
    -------
    Tensor, (n_images, *shape), float32

    Raises
    ------
    PyfoldError
        If no BatchNorm remembers statistics, or the module gives no finite output.
    """
    layers = batch_norms(module)
    if not layers:
        raise PyfoldError(
            'repair="dir": the module has no BatchNorm with statistics to invert; use repair="ar", "data" or None'
        )
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []

    def match(layer: nn.modules.batchnorm._BatchNorm, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        dims = [dim for dim in range(x.dim()) if dim != 1]
        mean, var = x.mean(dims), x.var(dims, unbiased=False)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        deviation = (layer.running_var + layer.eps).sqrt()
        far = ((mean - layer.running_mean) / deviation).square() + ((var + layer.eps).sqrt() / deviation - 1).square()
        found.append(far.mean())

    done: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(match) for layer in layers]
    wanted = [(each, each.requires_grad) for each in module.parameters()]
    try:
        for each, _ in wanted:
            each.requires_grad_(False)
        with evaluating(module), torch.enable_grad():
            for begin in range(0, n_images, batch_size):
                count = min(batch_size, n_images - begin)
                start = torch.randn((count, *shape), generator=generator)
                images = _smooth(start).to(device).requires_grad_()
                classes: Tensor | None = None
                optimizer = torch.optim.Adam([images], lr=LEARNING_RATE)
                for step in range(steps):
                    optimizer.param_groups[0]["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
                    found.clear()
                    output = module(images.clone())
                    loss = torch.stack(found).sum() + SMOOTH_WEIGHT * _roughness(images)
                    if isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] > 1:
                        if classes is None:
                            classes = torch.arange(count, device=device) % output.shape[1]
                        loss = loss + CLASS_WEIGHT * F.cross_entropy(output, classes)
                    if not torch.isfinite(loss):
                        raise PyfoldError('repair="dir": the module gives no finite output on synthesised images')
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    if progress:
                        progress(begin * steps + (step + 1) * count, n_images * steps, "synthesising images, steps")
                done.append(images.detach())
    finally:
        for hook in hooks:
            hook.remove()
        for each, before in wanted:
            each.requires_grad_(before)
    return torch.cat(done)


def save_grid(images: Tensor, file: str | Path) -> None:
    """Write images (N, C, H, W), C = 1 or 3, to a picture file as a grid, each channel from its least to its greatest value."""
    try:
        from PIL import Image
    except ImportError as error:
        raise PyfoldError("save_images: needs pip install pillow") from error
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise PyfoldError(f"save_images: expected images of 1 or 3 channels, got {tuple(images.shape[1:])}")
    least, greatest = images.amin((0, 2, 3), keepdim=True), images.amax((0, 2, 3), keepdim=True)
    pixels = ((images - least) / (greatest - least).clamp_min(1e-12) * 255).round().to(torch.uint8)
    count, channels, height, width = pixels.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    filled = torch.zeros((rows * columns, channels, height + 1, width + 1), dtype=torch.uint8)
    filled[:count, :, :height, :width] = pixels
    grid = filled.view(rows, columns, channels, height + 1, width + 1).permute(0, 3, 1, 4, 2)
    picture = grid.reshape(rows * (height + 1), columns * (width + 1), channels).expand(-1, -1, 3).contiguous().numpy()
    Image.fromarray(picture).save(file)


def _smooth(images: Tensor) -> Tensor:
    """Noise whose neighbours are alike, as pixels of a photograph are: amplitudes fall with frequency."""
    if images.dim() != 4:
        return images
    height, width = images.shape[-2:]
    y, x = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    spectrum = torch.fft.rfft2(images) / (y.square() + x.square()).sqrt().clamp_min(1 / max(height, width))
    smooth = torch.fft.irfft2(spectrum, s=(height, width))
    return smooth / smooth.std()


def _roughness(images: Tensor) -> Tensor:
    """Mean squared difference of neighbours."""
    if images.dim() != 4:
        return images.new_zeros(())
    return images.diff(dim=-1).square().mean() + images.diff(dim=-2).square().mean()
