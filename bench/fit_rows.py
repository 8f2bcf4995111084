"""A LLaMA-like checkpoint -> what ``rows.py`` was fitted to, and how its rows compare at the same shape.

Run by hand: ``python bench/fit_rows.py CHECKPOINT [LAYER ...]``; prints norms, eigenvalues and folded inertia, real and fitted.
"""

from __future__ import annotations

import sys

import torch
from rows import make_rows
from safetensors import safe_open
from torch import Tensor

import pyfold
from pyfold.io.checkpoint import Checkpoint, open_checkpoint

RANKS = (1, 2, 3, 5, 9, 17, 33, 65, 129, 257, 513, 1025)
KEEP = (0.5, 0.8)


def features(checkpoint: Checkpoint, layer: int) -> Tensor:
    """(N, 3 H) float32: each intermediate unit's gate and up rows and its down column."""

    def read(projection: str) -> Tensor:
        name = f"model.layers.{layer}.mlp.{projection}.weight"
        with safe_open(checkpoint.tensors[name].path, "pt") as file:
            return file.get_tensor(name).float()

    return torch.cat([read("gate_proj"), read("up_proj"), read("down_proj").T], dim=1)


def describe(name: str, x: Tensor) -> None:
    """Print one row set's norms, eigenvalues of the normalised Gram matrix (their mean is 1), neighbours and folded inertia."""
    n, d = x.shape
    norms = torch.linalg.vector_norm(x.double(), dim=1)
    cosines = (x.double() / norms[:, None]) @ (x.double() / norms[:, None]).T
    eigenvalues = torch.linalg.eigvalsh(cosines).flip(0)
    nearest = cosines.fill_diagonal_(-1).max(1).values.quantile(torch.tensor([0.5, 0.9], dtype=torch.float64))
    print(f"{name}: N {n}, D {d}")
    print(f"  rms {float(norms.log().mean().exp()) / d**0.5:.3f}, sigma of log norm {float(norms.log().std()):.3f}")
    print("  eigenvalue at rank " + ", ".join(f"{rank}: {float(eigenvalues[rank - 1]):.2f}" for rank in RANKS if rank <= n))
    print(f"  cosine to the nearest neighbour: median {nearest[0]:.3f}, 90th percentile {nearest[1]:.3f}")
    for keep in KEEP:
        result = pyfold.cluster(x, n_clusters=round(keep * n))
        ward, refined = result.ward_inertia / result.total_inertia, result.inertia / result.total_inertia
        print(f"  K/N {keep}: Ward inertia / energy {ward:.4f}, refined {refined:.4f}, {result.n_moves} moves")


def main() -> None:
    checkpoint = open_checkpoint(sys.argv[1])
    layers = [int(layer) for layer in sys.argv[2:]] or [5, 15, 25]
    for layer in layers:
        real = features(checkpoint, layer)
        describe(f"layer {layer}", real)
    n, d = real.shape
    describe("fitted", make_rows("fitted", n, d, n))


if __name__ == "__main__":
    main()
