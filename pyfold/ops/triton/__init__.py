"""The Triton backend: assign, update, lloyd and the merges on NVIDIA GPUs, or on the CPU in Triton's interpreter.

triton is imported when an op first runs: most users of a CPU never need it, and some platforms lack it.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor


def unavailable() -> str | None:
    """Why this backend cannot run, or None."""
    if find_spec("triton") is None:
        return "triton is not installed; run pip install triton"
    if not torch.cuda.is_available() and not interpreted():
        return "no CUDA device is visible; TRITON_INTERPRET=1 in the environment runs the kernels on the CPU, slowly"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def assign(xs: list[Tensor], centroids: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    from pyfold.ops.triton.kernels.assign import assign

    return assign(xs, centroids)


def update(xs: list[Tensor], labels: list[Tensor], n_clusters: list[int], weights: list[Tensor | None]) -> list[Tensor]:
    from pyfold.ops.triton.kernels.update import update

    return update(xs, labels, n_clusters, weights)


def lloyd(
    grams: list[Tensor], labels: list[Tensor], n_clusters: list[int], weights: list[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    from pyfold.ops.triton.kernels.lloyd import lloyd

    return lloyd(grams, labels, n_clusters, weights)


def merge_rows(x: Tensor, labels: Tensor, n_clusters: int, weights: Tensor | None, out: Tensor) -> None:
    from pyfold.ops.triton.kernels.merge import merge_rows

    merge_rows(x, labels, n_clusters, weights, out)


def merge_columns(x: Tensor, labels: Tensor, n_clusters: int, scale: Tensor | None, out: Tensor) -> None:
    from pyfold.ops.triton.kernels.merge import merge_columns

    merge_columns(x, labels, n_clusters, scale, out)
