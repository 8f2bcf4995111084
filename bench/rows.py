"""N, D and a seed -> fp32 rows to cluster, of three kinds: fitted to a real network, i.i.d. Gaussian, planted near-duplicates.

The fitted rows copy the FFN features of SmolLM2-135M, ``[gate_proj row i | up_proj row i | down_proj column i]`` (N = 1536,
D = 1728), layers 5, 15 and 25 averaged. Measured there, and printed beside the model by ``python bench/fit_rows.py``:

* norms: log-normal; ``LOG_NORM_SIGMA`` is the standard deviation of log ‖x_i‖, ``RMS`` the geometric mean of ‖x_i‖ / √D;
* directions: the eigenvalues of the Gram matrix of the norm-normalised rows follow i.i.d. noise (Marchenko and Pastur 1967)
  under a few directions that share ``SIGNAL_SHARE`` of the energy in proportion to ``rank^-SPECTRUM_EXPONENT``. The two
  constants minimise the squared error of the log-eigenvalues at ranks 1, 2, 3, 5, 9, 17 ... 1025, on a grid (12 % rms error
  or less).

The model knows no pairs: the nearest neighbours of real rows are nearer (median cosine 0.11, 90th percentile 0.17) than those
of the fitted ones (0.09 and 0.10).
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG_NORM_SIGMA = 0.08
RMS = 0.19
SIGNAL_SHARE = 0.3
SPECTRUM_EXPONENT = 0.6
PLANTED_NOISE = 0.1


def make_rows(kind: str, n: int, d: int, n_clusters: int, seed: int = 0) -> Tensor:
    """(N, D) float32 rows of ``kind`` fitted, gaussian or planted; only planted ones depend on ``n_clusters``."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "fitted":
        return _fitted(n, d, generator)
    if kind == "gaussian":
        return torch.randn(n, d, generator=generator)
    if kind == "planted":
        return _planted(n, d, n_clusters, generator)
    raise ValueError(f"kind: expected fitted, gaussian or planted, got '{kind}'")


def make_labels(n: int, n_clusters: int, generator: torch.Generator) -> Tensor:
    """(N,) int64, shuffled: one point in each of K clusters, the other N - K anywhere."""
    labels = torch.cat([torch.arange(n_clusters), torch.randint(n_clusters, (n - n_clusters,), generator=generator)])
    return labels[torch.randperm(n, generator=generator)]


def _fitted(n: int, d: int, generator: torch.Generator) -> Tensor:
    # The signal's directions are coordinate axes: noise is isotropic, so a rotation would change no distance, only cost one.
    signal = torch.arange(1, d + 1, dtype=torch.float64) ** -SPECTRUM_EXPONENT
    variance = (1 - SIGNAL_SHARE) + SIGNAL_SHARE * d * signal / signal.sum()
    x = torch.randn(n, d, generator=generator).mul_(variance.sqrt().float())
    norms = RMS * d**0.5 * torch.exp(LOG_NORM_SIGMA * torch.randn(n, generator=generator))
    return x.mul_((norms / torch.linalg.vector_norm(x, dim=1))[:, None])


def _planted(n: int, d: int, n_clusters: int, generator: torch.Generator) -> Tensor:
    labels = make_labels(n, n_clusters, generator)
    centres = torch.randn(n_clusters, d, generator=generator)
    return torch.randn(n, d, generator=generator).mul_(PLANTED_NOISE).add_(centres[labels])
