"""Which backend runs an op. Nothing falls back silently: a backend asked for by name runs or raises with the reason.

A backend is a module with one function per op that it has, and ``unavailable()``. ``auto`` takes the first of the device's
list that can run here and has the op. ``cpu:avx2`` pins the SIMD level, which reproduces the bytes of a machine that has no
better one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pyfold.errors import PyfoldError
from pyfold.ops import cpu, cuda, reference, triton

_BACKENDS = {"cpu": cpu, "cuda": cuda, "triton": triton, "reference": reference}
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


def backends() -> dict[str, str | None]:
    """Every backend by name, with the reason why it cannot run here, or None where it can."""
    return {name: module.unavailable() for name, module in _BACKENDS.items()}


def resolve(backend: str, device: torch.device | str = "cpu", op: str | None = None) -> str:
    """The full name of the backend that ``backend`` means on ``device``: ``cpu:avx512``, ``reference``.

    Parameters
    ----------
    backend : str
        ``auto``, or a name from :func:`backends`.
    device : torch.device or str
        Where the tensors are.
    op : str, optional
        An op that it must have.

    Raises
    ------
    PyfoldError
        A ValueError: if there is no such backend, or it cannot run here, on this device or this op; says why.
    """
    device = torch.device(device)
    if backend == "auto":
        backend = next(name for name in _ORDER.get(device.type, ("reference",)) if _refusal(name, device, op) is None)
    name, _, level = backend.partition(":")
    if name not in _BACKENDS:
        raise PyfoldError(f"backend: expected auto, {', '.join(_BACKENDS)}, got '{backend}'")
    refusal = _refusal(name, device, op)
    if refusal is not None:
        raise PyfoldError(f"backend '{name}' cannot run {refusal}")
    if name != "cpu":
        return name
    levels = cpu.simd_levels()
    if level and level not in levels:
        raise PyfoldError(f"backend '{backend}': this build and CPU have the SIMD levels {', '.join(levels)}")
    return f"cpu:{level or levels[0]}"


def call(op: str, backend: str, device: torch.device) -> Callable[..., Any]:
    """The implementation of ``op`` by ``backend`` on ``device``."""
    name, _, level = resolve(backend, device, op).partition(":")
    return getattr(cpu.CpuBackend(level) if name == "cpu" else _BACKENDS[name], op)


def product_dtype(backend: str) -> torch.dtype:
    """In which matrix products are to be computed beside a resolved ``backend``: bf16 where the processor multiplies it."""
    return torch.bfloat16 if backend in ("cpu:amx", "cpu:avx512bf16", "cuda") else torch.float32


def _refusal(name: str, device: torch.device, op: str | None) -> str | None:
    """Why a backend cannot run, in words that follow 'cannot run'; None if it can."""
    module = _BACKENDS[name]
    reason = module.unavailable()
    if reason is not None:
        return f"here: {reason}"
    runs_on = ("cpu" if triton.interpreted() else "cuda") if name == "triton" else name
    if name != "reference" and device.type != runs_on:
        return f"on {device} tensors; use auto or reference"
    if op is not None and not hasattr(cpu.CpuBackend if name == "cpu" else module, op):
        return f"{op}: it does not have this op; use auto or reference"
    return None
