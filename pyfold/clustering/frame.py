"""Features of any size and place -> numbers whose fp32 products can be trusted, and centroids back again.

k-means does not depend on the origin or the unit, but fp32 inner products do: squares overflow at 1e19 and vanish at 1e-19, and
where the mean is large beside the spread, distances are small differences of large numbers. So points = shift + 2^exponent y,
and y is clustered. Scaling by a power of two is exact. y is x itself, without a copy, where x is fp32, fp16 or bf16, of
ordinary size (``COMFORTABLE``) and its mean holds less energy than its spread (at most one of 24 bits lost). Otherwise y is an
fp32 copy; fp64 features, which need one anyway, are always centred, in fp64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyfold import ops

COMFORTABLE = 2.0**30  # largest magnitude between this and its inverse: squares are summed far inside fp32's range
_ELEMENTS = 2**20  # of scratch at a time
_SAMPLE = 2**22  # values that are enough to place an origin and a tolerance: the mean need not be exact, only near


@dataclass(frozen=True)
class Frame:
    """``point = shift + 2^exponent y``; shift None is the origin."""

    shift: Tensor | None
    exponent: int

    def enter(self, x: Tensor) -> Tensor:
        """x -> y, in fp32; x itself where the frame changes nothing and no dtype wider than fp32 has to be narrowed."""
        if self.shift is None and self.exponent == 0 and x.dtype != torch.float64:
            return x
        y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        unit = math.ldexp(1.0, -self.exponent)
        origin = None if self.shift is None else self.shift * unit
        rows = max(1, _ELEMENTS // x.shape[1])
        for out, chunk in zip(y.split(rows), x.split(rows), strict=True):
            scaled = chunk.double().mul_(unit) if chunk.dtype != torch.float64 else chunk * unit
            out.copy_(scaled if origin is None else scaled.sub_(origin))
        return y

    def leave(self, y: Tensor) -> Tensor:
        """y -> x, in fp64; y itself where the frame changes nothing."""
        if self.shift is None and self.exponent == 0:
            return y
        x = y.double() * math.ldexp(1.0, self.exponent)
        return x if self.shift is None else x + self.shift

    def area(self, squared: float) -> float:
        """A sum of squared distances, in the unit of the points."""
        unit = math.ldexp(1.0, self.exponent)
        return squared * unit * unit


@dataclass(frozen=True)
class Framed:
    """Features ready for the ops."""

    y: Tensor
    frame: Frame
    variance: float  # of y, mean over the features: what scikit-learn's tol is relative to


def frame_all(xs: list[Tensor], magnitudes: list[float], backend: str) -> list[Framed]:
    """A frame for each problem of finite values, of which ``magnitudes`` are the largest."""
    frames = [_unit_frame(x, magnitude) for x, magnitude in zip(xs, magnitudes, strict=True)]
    ys = [frame.enter(x) for frame, x in zip(frames, xs, strict=True)]
    means, variances = _moments(ys, backend)
    for i, (frame, x, mean) in enumerate(zip(frames, xs, means, strict=True)):
        if x.dtype != torch.float64 and total(mean.square()) > variances[i] * x.shape[1]:
            frames[i] = Frame(frame.leave(mean[0]).double(), frame.exponent)
            ys[i] = torch.empty(0)  # free the uncentred copy, if it is one
            ys[i] = frames[i].enter(x)
    return [Framed(y, frame, variance) for y, frame, variance in zip(ys, frames, variances, strict=True)]


def frame_of(centroids: Tensor, x: Tensor) -> Frame:
    """A frame for assigning x to given centroids; its origin depends on the centroids alone."""
    middle = centroids.double().mean(0)
    gap = centroids.double() - middle
    far = total(middle.square()) * len(centroids) > total(gap.square())
    shift = middle if far or x.dtype == torch.float64 else None
    reach = max(largest(x), largest(centroids))
    if shift is not None:
        reach = max(largest(centroids - middle), *(largest(chunk - middle) for chunk in x.split(2**14)))
    return Frame(shift, 0 if 1 / COMFORTABLE < reach < COMFORTABLE else exponent_of(reach))


def largest(x: Tensor) -> float:
    """Largest magnitude; NaN or infinite if any value is."""
    low, high = x.aminmax()
    return max(abs(float(low)), abs(float(high)))


def exponent_of(magnitude: float) -> int:
    """e with 2^e <= magnitude < 2^(e+1), as far as 2^e and 2^-e are both fp64 numbers; 0 for 0."""
    return max(-1022, math.frexp(magnitude)[1] - 1) if magnitude else 0


def squared_distances(y: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """(N,) fp32, each point to the centroid of its cluster, from differences: exactly 0 where they are equal."""
    distances = torch.empty(len(y), dtype=torch.float32, device=y.device)
    rows = max(1, _ELEMENTS // y.shape[1])
    for out, points, label in zip(distances.split(rows), y.split(rows), labels.split(rows), strict=True):
        torch.sum((points - centroids[label]).square_(), 1, out=out)
    return distances


def total(values: Tensor) -> float:
    """Sum in fp64, the same bits on any number of threads, which torch's own sum on a CPU is not."""
    if values.device.type == "cpu":
        return float(np.sum(values.numpy(), dtype=np.float64))
    return float(values.sum(dtype=torch.float64))


def _unit_frame(x: Tensor, magnitude: float) -> Frame:
    if x.dtype != torch.float64 and 1 / COMFORTABLE < magnitude < COMFORTABLE:
        return Frame(None, 0)
    exponent = exponent_of(magnitude)
    if x.dtype != torch.float64:
        return Frame(None, exponent)
    # Scaled before they are summed, or 1e308 overflows; by NumPy on a CPU, which adds row after row on any number of threads.
    unit = math.ldexp(1.0, -exponent)
    middle = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    for chunk in x.split(max(1, _ELEMENTS // x.shape[1])):
        scaled = chunk * unit
        middle += torch.from_numpy(scaled.numpy().sum(0)) if x.device.type == "cpu" else scaled.sum(0)
    return Frame(middle / len(x) / unit, exponent)


def _moments(ys: list[Tensor], backend: str) -> tuple[list[Tensor], list[float]]:
    """(1, D) mean of each problem, and the mean variance of its features; from every so many rows where there are many."""
    samples = [y[:: -(-y.numel() // _SAMPLE)] for y in ys]
    one = [torch.zeros(len(sample), dtype=torch.int64, device=sample.device) for sample in samples]
    means = ops.update(samples, one, [1] * len(ys), backend=backend)
    spreads = [total(squared_distances(*problem)) for problem in zip(samples, one, means, strict=True)]
    return means, [spread / sample.numel() for spread, sample in zip(spreads, samples, strict=True)]
