"""Which backend runs an op. Nothing falls back silently: a backend asked for by name runs or raises with the reason.

A backend is an object with one method per op. ``auto`` takes the first of the device's list that is available:
CPU tensors ``cpu`` -> ``reference``; other devices ``reference``. ``cpu:avx2`` pins the SIMD level, which reproduces the
bytes of a machine that has no better one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pyfold.errors import PyfoldError
from pyfold.ops import cpu, reference

_ORDER = {"cpu": ("cpu", "reference")}


def backends() -> dict[str, str | None]:
    """Every backend by name, with the reason why it cannot run here, or None where it can."""
    return {"cpu": cpu.unavailable(), "reference": None}


def resolve(backend: str, device: torch.device | str = "cpu") -> str:
    """The full name of the backend that ``backend`` means on ``device``: ``cpu:avx512``, ``reference``.

    Raises
    ------
    PyfoldError
        A ValueError: if there is no such backend, or it cannot run here or on this device; says why.
    """
    device = torch.device(device)
    reasons = backends()
    if backend == "auto":
        backend = next(name for name in _ORDER.get(device.type, ("reference",)) if reasons[name] is None)
    name, _, level = backend.partition(":")
    if name not in reasons:
        raise PyfoldError(f"backend: expected auto, {', '.join(reasons)}, got '{backend}'")
    if reasons[name] is not None:
        raise PyfoldError(f"backend '{name}' cannot run here: {reasons[name]}")
    if name == "reference":
        return name
    if device.type != "cpu":
        raise PyfoldError(f"backend 'cpu' cannot run on {device} tensors; use auto or reference")
    levels = cpu.simd_levels()
    if level and level not in levels:
        raise PyfoldError(f"backend '{backend}': this build and CPU have the SIMD levels {', '.join(levels)}")
    return f"cpu:{level or levels[0]}"


def call(op: str, backend: str, device: torch.device) -> Callable[..., Any]:
    """The implementation of ``op`` by ``backend`` on ``device``."""
    name = resolve(backend, device)
    return getattr(reference if name == "reference" else cpu.CpuBackend(name.partition(":")[2]), op)
