"""Pictures of what bench_cnn.py measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

Curve = Sequence[tuple[float, float]]


def accuracies(file: Path, title: str, dense: float, curves: Mapping[str, Curve]) -> None:
    """Accuracy against the share of parameters removed; what is compared with is dashed."""
    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    axes.axhline(dense, color="black", linewidth=0.8, label=f"dense, {dense:.1f}")
    colours = dict(zip(dict.fromkeys(name.rpartition(", ")[2] for name in curves), pyplot.cm.tab10.colors, strict=False))
    marks = dict(zip(dict.fromkeys(name.partition(", ")[0] for name in curves), "osD^v", strict=False))
    for name, points in curves.items():
        method, repair = name.partition(", ")[0], name.rpartition(", ")[2]
        style = "-" if method == "fold" else "--"
        axes.plot(*zip(*points, strict=True), style, marker=marks[method], markersize=4, color=colours[repair], label=name)
    axes.set(title=title, xlabel="parameters removed, %", ylabel="accuracy, %", ylim=(0, None))
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def variances(file: Path, title: str, shares: Mapping[float, Mapping[str, Sequence[float]]]) -> None:
    """Each layer's variance over the dense one's, repair by repair, one panel for each share removed."""
    figure, panels = pyplot.subplots(
        1, len(shares), figsize=(5 * len(shares), 4), layout="constrained", sharey=True, squeeze=False
    )
    for panel, (share, repairs) in zip(panels[0], shares.items(), strict=True):
        panel.axhspan(0.8, 1.25, color="0.9")
        panel.axhline(1, color="black", linewidth=0.8)
        for name, ratios in repairs.items():
            panel.plot(range(1, len(ratios) + 1), ratios, marker="o", markersize=3, label=name)
        panel.set(title=f"{title}, {share:.0%} removed", xlabel="BatchNorm", yscale="log")
    panels[0, 0].set_ylabel("variance behind it, x the dense one's")
    panels[0, -1].legend(fontsize=8)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
