"""Tensors that say they are on a GPU, without one: for tests of what torch computes there, where, and in how many bytes.

Each holds its values on the host. What is asked of tensors there and tensors here together fails, as on a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from pyfold.ops import cpu, registry

_setup_privateuseone_for_python_backend("emulated")  # a device that torch knows, and that has no kernels of its own
DEVICE = torch.device("emulated", 0)
_COPIES = ("aten::_to_copy", "aten::copy_")


class There(torch.Tensor):
    """A tensor on the GPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> There:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    def __float__(self) -> float:
        return float(self.item())

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"There({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func}: not emulated here")


class EmulatedTensors(TorchDispatchMode):
    """While this is the mode. ``most``: bytes that were on the GPU at once."""

    def __init__(self) -> None:
        super().__init__()
        self.taken, self.most = 0, 0
        self._storages: set[int] = set()
        self.allowed: Callable[[], bool] = lambda: True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = any(isinstance(tensor, There) for tensor in tensors)
        if there and name not in _COPIES:
            assert all(isinstance(tensor, There) or tensor.dim() == 0 for tensor in tensors), (
                f"{name} of tensors here and there"
            )
        if name == "aten::copy_":
            there = isinstance(args[0], There)
        if (device := kwargs.get("device")) is not None:
            there = torch.device(device).type == DEVICE.type
            kwargs["device"] = torch.device("cpu")
        first = args[0] if args else None
        args, kwargs = tree_map(lambda x: x.held if isinstance(x, There) else x, (args, kwargs))
        found = func(*args, **kwargs)
        if there and isinstance(first, There) and found is first.held:
            return first
        return tree_map(self._put, found) if there else found

    def _put(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        storage = value.untyped_storage()
        if storage._cdata not in self._storages:
            assert self.allowed(), "where no limit is set, or in another queue"
            self._storages.add(storage._cdata)
            self.taken += storage.nbytes()
            self.most = max(self.most, self.taken)
            weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())
        return There(value)

    def _drop(self, storage: int, n_bytes: int) -> None:
        self._storages.discard(storage)
        self.taken -= n_bytes


class Kernels:
    """A backend of the host that takes tensors there."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def unavailable(self) -> None:
        """Runs everywhere."""

    def __getattr__(self, op: str) -> Callable[..., Any]:
        kernel = getattr(self._backend, op)

        def run(*args: Any) -> Any:
            kinds = {isinstance(leaf, There) for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
            assert len(kinds) == 1, f"{op} of tensors here and there"
            there = True in kinds
            found = kernel(*tree_map(lambda x: x.held if isinstance(x, There) else x, args))
            return tree_map(lambda x: x.to(DEVICE) if isinstance(x, torch.Tensor) else x, found) if there else found

        return run


class TorchGpu:
    """As :class:`pyfold.streams.Gpu`, as far as what is computed by torch needs it."""

    name, held, backend, device = "emulated", 0, "reference", DEVICE
    libraries = "torch 1, CUDA 2"
    memory = 1 << 30

    def __init__(self, tensors: EmulatedTensors) -> None:
        self._tensors = tensors
        self.limit: int | None = None
        self.limits: list[int] = []
        tensors.allowed = lambda: self.limit is not None and self.is_computing
        self.is_computing = False

    @contextmanager
    def limited(self, n_bytes: int) -> Iterator[None]:
        self.limits.append(n_bytes)
        self.limit = n_bytes
        yield
        self.limit = None

    @contextmanager
    def computing(self) -> Iterator[None]:
        self.is_computing = True
        yield
        self.is_computing = False

    def release(self) -> None:
        """Nothing is kept."""

    def free(self) -> int:
        return self.memory

    def peak(self) -> int:
        return self._tensors.most

    pin: Callable[[torch.Tensor], None] = staticmethod(lambda block: None)
    unpin: Callable[[torch.Tensor], None] = staticmethod(lambda block: None)


@contextmanager
def emulated(monkeypatch: pytest.MonkeyPatch, level: str) -> Iterator[TorchGpu]:
    """A GPU that ``--device cuda`` finds, with the host's kernels of a SIMD level."""
    monkeypatch.setitem(registry._BACKENDS, "reference", Kernels(cpu.CpuBackend(level)))  # the one of tensors of any device
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # which tensors of a class of their own do not know
    before = torch._C._only_lift_cpu_tensors()  # torch.tensor() then makes its values here and copies them, which is emulated
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with EmulatedTensors() as tensors:
            gpu = TorchGpu(tensors)
            monkeypatch.setattr("pyfold.pipeline.open_device", lambda name: None if name == "cpu" else gpu)
            yield gpu
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
