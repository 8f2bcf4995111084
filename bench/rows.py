"""N, D and a seed -> fp32 rows to cluster.

Rows to fold, of three kinds: fitted to a real network, i.i.d. Gaussian, planted near-duplicates. Points in many clusters, of
two: a mixture of Gaussians, and one with SIFT's marks (non-negative integers, skewed, one norm), fitted to nothing.

The fitted rows copy the FFN features of SmolLM2-135M, ``[gate_proj row i | up_proj row i | down_proj column i]`` (N = 1536,
D = 1728), layers 5, 15 and 25 averaged. Measured there, and printed beside the model by ``python bench/fit_rows.py``:

* norms: log-normal; ``LOG_NORM_SIGMA`` is the standard deviation of log ‖x_i‖, ``RMS`` the geometric mean of ‖x_i‖ / √D;
* directions: low rank plus isotropic noise. The noise alone gives the bulk of the eigenvalues of the norm-normalised rows'
  Gram matrix (Marchenko and Pastur 1967). ``SIGNAL_SHARE`` of the energy lies in ``SIGNAL_RANK`` x D directions, the j-th in
  proportion to ``j^-SPECTRUM_EXPONENT``; a row's loadings on them are Gaussian times log-normal (``LOADING_SIGMA``), because
  with Gaussian ones no two rows come as near as real ones do. Chosen on a grid, for the log-eigenvalues at ranks 1, 2, 3, 5,
  9 ... 1025 (13 % rms error) and the cosines to the nearest neighbour (median and 90th percentile: real 0.09 to 0.14 and 0.14
  to 0.20, fitted 0.09 and 0.15).

That gives folded inertia within 2 % of the layers' mean at K/N = 0.5 and 0.8. Larger N and D keep these constants: there the
rows are an extrapolation, not a fit.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG_NORM_SIGMA = 0.08
RMS = 0.19
SIGNAL_SHARE = 0.1
SIGNAL_RANK = 0.05
SPECTRUM_EXPONENT = 0.6
LOADING_SIGMA = 0.9
PLANTED_NOISE = 0.1
KINDS = ("fitted", "gaussian", "planted")
POINT_KINDS = ("mixture", "SIFT-like")


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


def make_points(kind: str, n: int, d: int, n_clusters: int, seed: int = 0) -> Tensor:
    """(N, D) float32 points of ``kind`` mixture or SIFT-like, around centres of log-normal popularity; neighbours overlap."""
    generator = torch.Generator().manual_seed(seed)
    # As many centres as clusters would make SIFT-like k-means a matter of luck: two random starts end 4 % apart.
    n_centres = 4 * n_clusters if kind == "SIFT-like" else n_clusters
    popularity = torch.exp(0.5 * torch.randn(n_centres, generator=generator))
    labels = torch.multinomial(popularity, n, replacement=True, generator=generator)
    noise = torch.randn(n, d, generator=generator)
    if kind == "mixture":
        return noise.add_((0.35 * torch.randn(n_centres, d, generator=generator))[labels])
    if kind != "SIFT-like":
        raise ValueError(f"kind: expected mixture or SIFT-like, got '{kind}'")
    centres = torch.empty(n_centres, d).exponential_(generator=generator).pow_(1.5)
    x = noise.mul_(0.6).exp_().mul_(centres[labels])
    # As SIFT: norm 512, no entry above a fifth of it, whole numbers.
    x = torch.nn.functional.normalize(x).clamp_(max=0.2)
    return torch.nn.functional.normalize(x).mul_(512).round_()


def make_labels(n: int, n_clusters: int, generator: torch.Generator) -> Tensor:
    """(N,) int64, shuffled: one point in each of K clusters, the other N - K anywhere."""
    labels = torch.cat([torch.arange(n_clusters), torch.randint(n_clusters, (n - n_clusters,), generator=generator)])
    return labels[torch.randperm(n, generator=generator)]


def _fitted(n: int, d: int, generator: torch.Generator) -> Tensor:
    # The signal's directions are coordinate axes: noise is isotropic, so a rotation would change no distance, only cost one.
    rank = max(1, round(SIGNAL_RANK * d))
    share = torch.arange(1, rank + 1, dtype=torch.float64) ** -SPECTRUM_EXPONENT
    amplitude = (SIGNAL_SHARE * d * share / share.sum()).sqrt().float()
    # Divided by exp(sigma²), the root mean square of the log-normal: loadings of unit variance.
    spread = torch.exp(LOADING_SIGMA * torch.randn(n, rank, generator=generator) - LOADING_SIGMA**2)
    x = torch.randn(n, d, generator=generator).mul_((1 - SIGNAL_SHARE) ** 0.5)
    x[:, :rank] += torch.randn(n, rank, generator=generator).mul_(spread).mul_(amplitude)
    norms = RMS * d**0.5 * torch.exp(LOG_NORM_SIGMA * torch.randn(n, generator=generator))
    return x.mul_((norms / torch.linalg.vector_norm(x, dim=1))[:, None])


def _planted(n: int, d: int, n_clusters: int, generator: torch.Generator) -> Tensor:
    labels = make_labels(n, n_clusters, generator)
    centres = torch.randn(n_clusters, d, generator=generator)
    return torch.randn(n, d, generator=generator).mul_(PLANTED_NOISE).add_(centres[labels])
