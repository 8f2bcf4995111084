"""Merging: rows of a cluster averaged, columns summed; and the check that weights are finite."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfold.ops import checks, registry


def merge_rows(
    x: Tensor,
    labels: Tensor,
    n_clusters: int,
    *,
    weights: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Weighted mean of the rows of each cluster: ``(UᵀWU)⁻¹ UᵀW x`` with one-hot U (N x K).

    Parameters
    ----------
    x : Tensor, (N, D) or (N,)
        float32, float16 or bfloat16; summed in fp32.
    labels : Tensor, (N,), int64
    weights : Tensor, (N,), float64, optional
    dtype : torch.dtype, optional
        Of the result; that of ``x`` by default. Rows alone in their cluster then keep their bits.
    out : Tensor, (K, D) or (K,), contiguous, optional
        Written in place, which spares the page faults of fresh memory.

    Returns
    -------
    Tensor, (K, D) or (K,)
    """
    matrix = x.unsqueeze(1) if x.dim() == 1 else x
    checks.matrix("x", matrix)
    labels = checks.labels(labels, matrix.shape[0], n_clusters, x)
    if weights is not None:
        weights = checks.weights(weights, x, matrix.shape[0])[1]
    out = checks.result(out, (n_clusters, *x.shape[1:]), dtype, x)
    merged = out.unsqueeze(1) if x.dim() == 1 else out
    registry.call("merge_rows", backend, x.device)(matrix, labels, n_clusters, weights, merged)
    return out


def merge_columns(
    x: Tensor,
    labels: Tensor,
    n_clusters: int,
    *,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sum of the (scaled) columns of each cluster: ``x diag(scale) U`` with one-hot U (N x K).

    Parameters
    ----------
    x : Tensor, (H, N)
        float32, float16 or bfloat16; summed in fp32.
    labels : Tensor, (N,), int64
    scale : Tensor, (N,), float32, optional
    dtype : torch.dtype, optional
        Of the result; that of ``x`` by default. Columns alone in their cluster then keep their bits.
    out : Tensor, (H, K), contiguous, optional
        Written in place, which spares the page faults of fresh memory.

    Returns
    -------
    Tensor, (H, K)
    """
    checks.matrix("x", x)
    labels = checks.labels(labels, x.shape[1], n_clusters, x)
    if scale is not None and (scale.dtype != torch.float32 or scale.shape != labels.shape):
        raise ValueError(f"scale: expected float32 of shape {tuple(labels.shape)}, got {scale.dtype} of {tuple(scale.shape)}")
    if scale is not None:
        checks.same_device("scale", scale, x)
    out = checks.result(out, (x.shape[0], n_clusters), dtype, x)
    registry.call("merge_columns", backend, x.device)(x, labels, n_clusters, scale, out)
    return out


def first_nonfinite(x: Tensor, *, backend: str = "auto") -> int | None:
    """Flat index of the first NaN or infinity in ``x`` (contiguous, any float dtype), or None."""
    checks.floats("x", x.dtype)
    return registry.call("first_nonfinite", backend, x.device)(x.contiguous())
