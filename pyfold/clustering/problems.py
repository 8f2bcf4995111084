"""The public edge of k-means: arrays, tensors, batches and lists -> checked problems; and results back as what came in."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyfold.clustering.frame import largest
from pyfold.clustering.regime import INITS, REFINEMENTS, Problem
from pyfold.ops import GramFile, checks

_DTYPES = (*checks.FLOATS, torch.float64)


@dataclass(frozen=True)
class Given:
    """One problem. Points of weight 0 are not in ``x``: they have a label in the result, but no say in it."""

    x: Tensor
    n_clusters: int
    weights: Tensor | None
    init: Tensor | None
    magnitude: float
    every: Tensor  # the points of weight 0 too
    kept: Tensor | None  # rows of ``every`` that are in ``x``; None: all
    is_numpy: bool

    def out(self, result: Tensor) -> Any:
        """The kind that came in."""
        return result.cpu().numpy() if self.is_numpy else result


def read(x: Any, n_clusters: Any, weights: Any, init: Any) -> tuple[list[Given], str]:
    """Checked problems, and whether they came as "one", "batch" or "list"."""
    arrays, form = _unpack(x)
    ks = _per_problem("n_clusters", n_clusters, len(arrays), form)
    ws = _per_problem("weights", weights, len(arrays), form)
    inits = _per_problem("init", None if isinstance(init, str) else init, len(arrays), form)
    if init is not None and not isinstance(init, str):
        inits = [tensor_of("init", one) for one in inits]
    given = [_problem(*problem) for problem in zip(arrays, ks, ws, inits, strict=True)]
    for problem in given[1:]:
        if problem.x.device != given[0].x.device:
            raise ValueError(f"x: expected every problem on {given[0].x.device}, got {problem.x.device}")
    return given, form


def shapes_of(x: Any, n_clusters: Any, dtype: torch.dtype, device: torch.device) -> tuple[list[Problem], torch.device, bool]:
    """What the cost model has to know of the arguments of ``kmeans``, or of a shape; the device; and whether it is a list."""
    if isinstance(x, Sequence) and x and all(isinstance(size, Integral) for size in x):
        shape, form = tuple(int(size) for size in x), "one"
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise ValueError(f"x: expected a shape (N, D) or (B, N, D) of positive sizes, got {shape}")
        if dtype not in _DTYPES:
            raise TypeError(f"dtype: expected a floating-point torch.dtype, got {dtype}")
        shapes = [((1, *shape)[-3:], dtype)]
    else:
        arrays, form = _unpack(x)
        batch = len(arrays) if form == "batch" else 1
        tensors = [tensor_of("x", array) for array in (arrays[:1] if form == "batch" else arrays)]
        shapes = [((batch, *tensor.shape), tensor.dtype) for tensor in tensors]
        device = tensors[0].device
    ks = _per_problem("n_clusters", n_clusters, len(shapes), form if form == "list" else "one")
    problems = []
    for ((batch, n, d), kind), k in zip(shapes, ks, strict=True):
        checks.count(k, n)
        problems.append(Problem(n, d, int(k), kind, batch))
    return problems, device, form == "list"


def check_options(init: Any, refine: Any, n_init: Any, max_iter: Any, tol: Any = 0.0, seed: Any = 0) -> str | None:
    """The kind of start: None, one of ``INITS``, or "given" for centroids."""
    if isinstance(init, str) and init not in INITS:
        raise ValueError(f"init: expected None, {', '.join(map(repr, INITS))} or centroids, got {init!r}")
    if refine not in REFINEMENTS:
        raise ValueError(f"refine: expected {', '.join(map(repr, REFINEMENTS))}, got {refine!r}")
    for name, value, least in (("n_init", n_init, 1), ("max_iter", max_iter, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name}: expected an integer, got {value!r}")
        if int(value) < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if not isinstance(tol, Real) or not 0 <= float(tol) < math.inf:
        raise ValueError(f"tol: expected a finite number of at least 0, got {tol!r}")
    return init if init is None or isinstance(init, str) else "given"


def tensor_of(name: str, array: Any) -> Tensor:
    """A tensor of a matrix of floating-point numbers, with contiguous rows; no copy where none is needed."""
    tensor = _numbers(name, array)
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected floating-point numbers, got {tensor.dtype}")
    if tensor.dim() != 2 or tensor.numel() == 0:
        raise ValueError(f"{name}: expected a non-empty matrix (N, D), got shape {tuple(tensor.shape)}")
    contiguous = tensor.shape[1] == 1 or tensor.stride(1) == 1
    return tensor if contiguous and tensor.stride(0) >= tensor.shape[1] else tensor.contiguous()


def weights_of(weights: Any, x: Tensor | GramFile) -> Tensor:
    """fp64 weights of the points of x; one may be 0."""
    w = _on("weights", _numbers("weights", weights), x)
    if tuple(w.shape) != (len(x),):
        raise ValueError(f"weights: expected shape ({len(x)},), got {tuple(w.shape)}")
    w = w.to(torch.float64)
    if not bool(torch.isfinite(w).all()) or bool((w < 0).any()) or not bool((w > 0).any()):
        raise ValueError(f"weights: expected finite values of at least 0, not all 0, got {float(w.min())} to {float(w.max())}")
    return w


def check_finite(x: Tensor) -> float:
    """The largest magnitude of x."""
    magnitude = largest(x)
    if not math.isfinite(magnitude):
        row, column = (~torch.isfinite(x)).nonzero()[0].tolist()
        raise ValueError(f"x: expected finite values, got {float(x[row, column])} at row {row}")
    return magnitude


def _numbers(name: str, array: Any) -> Tensor:
    """A dense tensor of real numbers, whatever the strides, byte order and flags of the array."""
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected every value, got a masked array; fill or drop what is masked")
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
            raise TypeError(f"{name}: expected floating-point numbers, got {array.dtype}")
        array = np.asarray(array, dtype=array.dtype.newbyteorder("="))
        if any(stride < 0 for stride in array.strides):
            array = np.ascontiguousarray(array)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing here writes to it
            array = torch.from_numpy(array)
    if not isinstance(array, Tensor):
        raise TypeError(f"{name}: expected a NumPy array or a torch tensor, got {type(array).__name__}")
    if array.is_complex():
        raise TypeError(f"{name}: expected real numbers, got {array.dtype}")
    if array.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {array.layout}")
    return array.detach()


def _unpack(x: Any) -> tuple[list[Any], str]:
    if isinstance(x, (list, tuple)):
        if not x:
            raise ValueError("x: expected at least one problem, got an empty list")
        return list(x), "list"
    if isinstance(x, (np.ndarray, Tensor)) and x.ndim == 3:
        if 0 in x.shape:
            raise ValueError(f"x: expected a non-empty (B, N, D) array, got shape {tuple(x.shape)}")
        return list(x), "batch"
    return [x], "one"


def _per_problem(name: str, values: Any, count: int, form: str) -> list[Any]:
    """One value for each problem; a batch has one K."""
    if form == "batch" and name == "n_clusters" and not isinstance(values, Integral):
        raise TypeError("n_clusters: expected one number for a batch; give a list of problems for several")
    return checks.per_problem(name, values, count, form == "one")


def _problem(array: Any, n_clusters: Any, weights: Any, init: Any) -> Given:
    every = tensor_of("x", array)
    magnitude = check_finite(every)
    x, kept = every, None
    if weights is not None:
        weights = weights_of(weights, every)
        if bool((weights == 0).any()):
            kept = weights.nonzero().flatten()
            x, weights = every[kept], weights[kept]
            magnitude = largest(x)
    checks.count(n_clusters, len(x), "points" if kept is None else "points of positive weight")
    if init is not None:
        init = _on("init", init, every).to(torch.float64)
        if tuple(init.shape) != (n_clusters, x.shape[1]):
            raise ValueError(f"init: expected centroids of shape {(n_clusters, x.shape[1])}, got {tuple(init.shape)}")
        if not math.isfinite(largest(init)):
            raise ValueError("init: expected finite values")
    return Given(x, int(n_clusters), weights, init, magnitude, every, kept, isinstance(array, np.ndarray))


def _on(name: str, tensor: Tensor, x: Tensor | GramFile) -> Tensor:
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected device {x.device}, got {tensor.device}")
    return tensor
