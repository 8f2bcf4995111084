"""Pictures of what bench_cnn.py measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot, ticker

REGRESSED = ("dir", "data")
Curve = Sequence[tuple[float, float]]


def accuracies(file: Path, title: str, dense: float, curves: Mapping[str, Curve]) -> None:
    """Accuracy against the share of parameters removed; what is compared with is dashed."""
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    colours = dict(zip(dict.fromkeys(name.rpartition(", ")[2] for name in curves), pyplot.cm.tab10.colors, strict=False))
    marks = dict(zip(dict.fromkeys(name.partition(", ")[0] for name in curves), "osD^v", strict=False))
    for name, points in curves.items():
        method, repair = name.partition(", ")[0], name.rpartition(", ")[2]
        style = "-" if method == "fold" else "--"
        axes = panels[int(repair in REGRESSED)]
        axes.plot(*zip(*points, strict=True), style, marker=marks[method], markersize=4, color=colours[repair], label=name)
    for axes, what in zip(panels, ("weights and statistics", "consumers regressed"), strict=True):
        axes.axhline(dense, color="black", linewidth=0.8, label=f"dense, {dense:.1f}")
        axes.set(title=f"{title}: {what}", xlabel="parameters removed, %", ylabel="accuracy, %")
        axes.legend(fontsize=7, ncols=2)
    panels[0].set_ylim(0, None)
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
        panel.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        for axis in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
            axis(ticker.FormatStrFormatter("%g"))
    panels[0, 0].set_ylabel("variance behind it, x the dense one's")
    panels[0, -1].legend(fontsize=8)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
