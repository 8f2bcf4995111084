"""What folding is compared with: selection of units, on the same text and at the same widths.

``python bench/selection.py SRC DST OPTION...`` is ``pyfold fold`` but for its choice: the units of most energy stay, the others
go, and the consumer shrinks by the same ridge regression to what is left of it. ``flap`` is FLAP (An et al., "Fluctuation-based
Adaptive Structured Pruning for Large Language Models", AAAI 2024) at given widths: the units that fluctuate most stay, and what
the others say on the mean becomes a bias.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyfold import cli, function_fold
from pyfold.clustering import Clustering
from pyfold.function_metric import Folded, Moments, compensate


def by_energy(consumer: Tensor, seen: Moments, n_clusters: int, *, ridge: bool, backend: str, **_: Any) -> Folded:
    """Instead of ``fold_units``."""
    energy = (seen.fitted + seen.held_out).diagonal() * consumer.square().sum(0)
    kept = energy.topk(n_clusters).indices.sort().values
    lost = float(energy.sum() - energy[kept].sum())
    labels = torch.zeros(len(energy), dtype=torch.int64)  # a partition that says nothing
    labels[kept] = torch.arange(n_clusters)
    clusters = Clustering(labels, n_clusters, lost, lost, float(energy.sum()), 0, backend)
    assert ridge
    return Folded(clusters, kept, *compensate(consumer, seen, kept, consumer[:, kept]))


def flap(model: Any, tokens: Tensor, widths: Mapping[int, int], batch: int = 8) -> None:
    """Prune the feed-forward networks of a model in place, by its fluctuations on tokens (sequences, length)."""
    sums: dict[int, list[Tensor]] = {layer: [] for layer in widths}

    def note(layer: int, said: Tensor) -> None:
        h = said.flatten(0, 1).double()
        sums[layer] = [new + old for new, old in zip((h.sum(0), h.square().sum(0)), sums[layer] or (0, 0), strict=True)]

    mlps = {layer: model.model.layers[layer].mlp for layer in widths}
    hooks = [
        mlp.down_proj.register_forward_pre_hook(lambda _, said, layer=layer: note(layer, said[0]))
        for layer, mlp in mlps.items()
    ]
    with torch.inference_mode():
        for part in tokens.split(batch):
            model.model(part)
    for hook in hooks:
        hook.remove()
    for layer, mlp in mlps.items():
        mean, square = (total / tokens.numel() for total in sums[layer])
        down = mlp.down_proj.weight.data
        fluctuation = (square - mean.square()) * down.double().square().sum(0)
        kept = torch.zeros(len(mean), dtype=torch.bool)
        kept[fluctuation.topk(widths[layer]).indices] = True
        mlp.down_proj.bias = torch.nn.Parameter(down[:, ~kept] @ mean[~kept].float())
        mlp.down_proj.weight = torch.nn.Parameter(down[:, kept])
        for producer in (mlp.gate_proj, mlp.up_proj):
            producer.weight = torch.nn.Parameter(producer.weight.data[kept])


if __name__ == "__main__":
    function_fold.fold_units = by_energy
    raise SystemExit(cli.main(["fold", *sys.argv[1:]]))
