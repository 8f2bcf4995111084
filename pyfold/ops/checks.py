"""What the ops of :mod:`pyfold.ops` demand of their arguments; every message says what was expected and what was given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pyfold.ops.gram_file import GramFile

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Ward's update multiplies fp32 costs by cluster weights: 4 N² times the largest squared norm must be representable.
LARGEST_SQUARED_NORM = 1e28
WIDEST_SPREAD = 1e6


def problems(name: str, x: Tensor | Sequence[Tensor]) -> tuple[list[Tensor], bool]:
    """The problems of a call, (B, ·, ·) as B views, and whether there was only one, not in a list."""
    if isinstance(x, Tensor):
        return ([x], True) if x.dim() != 3 else (list(x.unbind(0)), False)
    listed = list(x)
    if not listed:
        raise ValueError(f"{name}: expected at least one problem, got an empty list")
    for problem in listed[1:]:
        same_device(f"{name}[1:]", problem, listed[0])
    return listed, False


def per_problem(
    name: str, values: Tensor | Sequence[Tensor] | int | Sequence[int] | None, count: int, single: bool
) -> list[Any]:
    """One value for each problem: a number serves all, None stands for itself."""
    if single or values is None or isinstance(values, Integral):
        return [values] * count
    if not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        raise TypeError(f"{name}: expected one for each of {count} problems, got {values!r}")
    listed = list(values)
    if len(listed) != count:
        raise ValueError(f"{name}: expected one for each of {count} problems, got {len(listed)}")
    return listed


def floats(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {dtype}")


def matrix(name: str, x: Tensor) -> None:
    floats(name, x.dtype)
    if x.dim() != 2 or x.numel() == 0:
        raise ValueError(f"{name}: expected a non-empty matrix, got shape {tuple(x.shape)}")
    if x.stride(1) != 1 and x.shape[1] != 1:
        raise ValueError(f"{name}: expected contiguous rows, got strides {x.stride()}; call .contiguous()")


def gram(name: str, g: Tensor, n: int | None = None, rows: int | None = None) -> None:
    """A Gram matrix of n points, or its first rows."""
    if g.dtype != torch.float32:
        raise TypeError(f"{name}: expected float32, got {g.dtype}")
    if g.dim() != 2 or g.numel() == 0 or tuple(g.shape) != (rows or n or g.shape[1], n or g.shape[1]):
        raise ValueError(f"{name}: expected shape ({rows or n or 'N'}, {n or 'N'}), got {tuple(g.shape)}")
    if not g.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous matrix, got strides {g.stride()}")


def same_device(name: str, tensor: Tensor, like: Tensor | GramFile) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {tensor.device}")


def result(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype | None, x: Tensor) -> Tensor:
    """``out`` if it fits, else memory of that shape."""
    if out is None:
        floats("dtype", dtype or x.dtype)
        return torch.empty(shape, dtype=dtype or x.dtype, device=x.device)
    floats("out", out.dtype)
    same_device("out", out, x)
    if tuple(out.shape) != shape or not out.is_contiguous() or dtype not in (None, out.dtype):
        raise ValueError(
            f"out: expected contiguous {dtype or 'floats'} of shape {shape}, got {out.dtype} of {tuple(out.shape)}"
        )
    return out


def count(given: Any, n: int, what: str = "points", name: str = "n_clusters") -> None:
    if isinstance(given, bool) or not isinstance(given, Integral):
        raise TypeError(f"{name}: expected an integer, got {given!r}")
    if not 1 <= int(given) <= n:
        raise ValueError(f"{name}: expected 1 to {n} (the number of {what}), got {given}")


def labels(given: Tensor, n: int, n_clusters: int, like: Tensor | GramFile) -> Tensor:
    """A partition of n points into n_clusters clusters, none of them empty; contiguous."""
    if given.dtype != torch.int64 or tuple(given.shape) != (n,):
        raise ValueError(f"labels: expected int64 of shape ({n},), got {given.dtype} of {tuple(given.shape)}")
    same_device("labels", given, like)
    count(n_clusters, n)
    low, high = (int(v) for v in given.aminmax())
    if low < 0 or high >= n_clusters:
        raise ValueError(f"labels: expected values in [0, {n_clusters}), got {low} to {high}")
    empty = (torch.bincount(given, minlength=n_clusters) == 0).nonzero()
    if len(empty):
        raise ValueError(f"labels: expected every cluster to have a member, got none in cluster {int(empty[0])}")
    return given.contiguous()


def weights(given: Tensor | None, like: Tensor | GramFile, n: int | None = None) -> tuple[float, Tensor]:
    """The largest weight, and the weights in units of it: no op depends on their scale, but fp32 products do."""
    n = n or like.shape[0]
    if given is None:
        return 1.0, torch.ones(n, dtype=torch.float64, device=like.device)
    if tuple(given.shape) != (n,):
        raise ValueError(f"weights: expected shape ({n},), got {tuple(given.shape)}")
    same_device("weights", given, like)
    given = given.to(torch.float64)
    if not bool(torch.isfinite(given).all()) or not bool((given > 0).all()):
        raise ValueError("weights: expected positive finite values")
    unit = float(given.max())
    if float(given.min()) * WIDEST_SPREAD < unit:
        raise ValueError(f"weights: expected a spread of at most {WIDEST_SPREAD:g}, got {float(given.min()):g} to {unit:g}")
    return unit, (given / unit).contiguous()
