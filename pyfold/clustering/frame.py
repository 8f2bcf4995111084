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

import torch
from torch import Tensor

from pyfold import ops
from pyfold.clustering.differences import squared_distances, total

COMFORTABLE = 2.0**30  # largest magnitude between this and its inverse: squares are summed far inside fp32's range
FAR = 2.0**40  # points beyond, which had no say in the frame, are drawn in to it: from there all centroids are in one place
_ELEMENTS = 2**20  # of scratch at a time
_SAMPLE = 2**22  # values that are enough to place an origin and a tolerance: the mean need not be exact, only near


@dataclass(frozen=True)
class Frame:
    """``point = shift + 2^exponent y``; shift None is the origin."""

    shift: Tensor | None
    exponent: int

    def enter(self, x: Tensor, magnitude: float) -> Tensor:
        """x, of that largest magnitude -> y, in fp32, with every row drawn in to ``FAR`` that is beyond; x itself where that
        changes nothing and no dtype wider than fp32 has to be narrowed."""
        if self.shift is None and self.exponent == 0 and x.dtype != torch.float64 and magnitude < FAR:
            return x
        y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        unit = math.ldexp(1.0, -self.exponent)
        origin = None if self.shift is None else self.shift * unit
        rows = max(1, _ELEMENTS // x.shape[1])
        for out, chunk in zip(y.split(rows), x.split(rows), strict=True):
            scaled = chunk.double().mul_(unit) if chunk.dtype != torch.float64 else chunk * unit
            if origin is not None:
                scaled.sub_(origin)
            if not largest(scaled) < FAR:
                scaled.clamp_(-1e300, 1e300)
                scaled *= (FAR / scaled.abs().amax(1, keepdim=True)).clamp_max_(1.0)
            out.copy_(scaled)
        return y

    def leave(self, y: Tensor) -> Tensor:
        """y -> x, in fp64; y itself where the frame changes nothing."""
        if self.shift is None and self.exponent == 0:
            return y
        unit = math.ldexp(1.0, self.exponent)
        if self.shift is None:
            return y.double() * unit
        return (y.double() / 2 + self.shift / unit / 2) * unit * 2  # halves: 2^exponent y alone may be beyond fp64

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
    ys = [frame.enter(*one) for frame, one in zip(frames, zip(xs, magnitudes, strict=True), strict=True)]
    means, variances = _moments(ys, backend)
    for i, (frame, x, mean) in enumerate(zip(frames, xs, means, strict=True)):
        if x.dtype != torch.float64 and total(mean.square()) > variances[i] * x.shape[1]:
            frames[i] = Frame(frame.leave(mean[0]).double(), frame.exponent)
            ys[i] = torch.empty(0)  # free the uncentred copy, if it is one
            ys[i] = frames[i].enter(x, magnitudes[i])
    return [Framed(y, frame, variance) for y, frame, variance in zip(ys, frames, variances, strict=True)]


def frame_of(centroids: Tensor, dtype: torch.dtype) -> Frame:
    """A frame for assigning points of a dtype to given centroids; it depends on the centroids alone."""
    magnitude = largest(centroids)
    frame = _unit_frame(centroids.double(), magnitude)
    gaps = frame.enter(centroids.double(), magnitude)
    spread, shift = total(gaps.double().square()), frame.shift
    assert shift is not None
    middle = total((shift * math.ldexp(1.0, -frame.exponent)).square()) * len(centroids)
    if middle <= spread and dtype != torch.float64:
        return Frame(None, 0 if 1 / COMFORTABLE < magnitude < COMFORTABLE else frame.exponent)
    return Frame(shift, min(1023, max(-1022, frame.exponent + exponent_of(largest(gaps)))))


def largest(x: Tensor) -> float:
    """Largest magnitude; NaN or infinite if any value is."""
    low, high = x.aminmax()
    return max(abs(float(low)), abs(float(high)))


def exponent_of(magnitude: float) -> int:
    """e with 2^e <= magnitude < 2^(e+1), as far as 2^e and 2^-e are both fp64 numbers; 0 for 0."""
    return max(-1022, math.frexp(magnitude)[1] - 1) if magnitude else 0


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
