"""A comparison -> a PNG: perplexity against parameters, a labelled point for each checkpoint (pip install 'pyfold[plot]')."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyfold.errors import PyfoldError

if TYPE_CHECKING:
    from pyfold.compare import Measured

_FIRST, _OTHER = "#c2410c", "#1d4ed8"
# Where a label may go, in points from its mark: right beside it, then with a line to it.
_SIDES = ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1))
_PLACES = [(reach, reach * x, reach * y) for reach in (8, 20, 34, 50) for x, y in _SIDES]
_LINE = {"arrowstyle": "-", "color": "#6b6b6b", "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4}
_LONGEST = 40


class Picture:
    """A PNG that is to be written.

    Raises
    ------
    PyfoldError
        Before anything is measured: if matplotlib is not installed, or the file cannot be written as a PNG.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() != ".png":
            raise PyfoldError(f"{path}: a picture is written as PNG; name a file that ends in .png")
        if self.path.is_dir():
            raise PyfoldError(f"{path}: expected a file, got a folder")
        if not self.path.parent.is_dir():
            raise PyfoldError(f"{path}: there is no folder {self.path.parent}")
        try:
            import matplotlib.backends.backend_agg  # noqa: F401
        except ImportError as error:
            raise PyfoldError(f"--picture: matplotlib cannot be imported ({error}); run pip install 'pyfold[plot]'") from None

    def draw(self, rows: Sequence[Measured]) -> None:
        """Write it, complete or not at all."""
        data = io.BytesIO()
        figure_of(rows).savefig(data, format="png", metadata={"Software": None})
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            partial.write_bytes(data.getvalue())
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)


def figure_of(rows: Sequence[Measured]) -> Any:
    """The matplotlib figure. What has no finite perplexity is named below the axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    figure = Figure(figsize=(8, 5), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    unit, size = ("billions", 1e9) if max(row.parameters for row in rows) >= 1e9 else ("millions", 1e6)
    names = _names(rows)
    points = [(row.parameters / size, row.perplexity) if math.isfinite(row.perplexity) else None for row in rows]
    heights = [point[1] for point in points if point]
    log = bool(heights) and max(heights) > 3 * min(heights)
    if log:
        axes.set_yscale("log")
        span = max(heights) / min(heights)
        ticks = (1, 1.5, 2, 3, 4, 5, 7) if span < 10 else (1, 2, 5) if span < 100 else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=ticks, numticks=20))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    axes.set_ylabel("perplexity per token" + (", log scale" if log else ""))
    missing = ", ".join(f"{name} ({row.perplexity})" for name, row, point in zip(names, rows, points, strict=True) if not point)
    axes.set_xlabel(f"parameters, {unit}" + (f"\nno finite perplexity: {missing}" if missing else ""), parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(0.14, 0.16)
    for number, point in enumerate(points):
        if point:
            axes.plot(*point, "o" if number else "D", color=_OTHER if number else _FIRST, markersize=6)
    if points[0]:
        axes.axhline(points[0][1], color=_FIRST, linewidth=0.7, linestyle=(0, (2, 3)), zorder=0.9)
        names[0] += " (reference)"
        names[1:] = [f"{name}, {row.ratio:.2f} x" for name, row in zip(names[1:], rows[1:], strict=True)]
    _label(figure, axes, [(name, point) for name, point in zip(names, points, strict=True) if point])
    return figure


def _names(rows: Sequence[Measured]) -> list[str]:
    """The last part of each source where those differ, else all of it."""
    whole = [row.source for row in rows]
    last = [Path(source).name or source for source in whole]
    names = last if len(set(last)) == len(set(whole)) else whole
    half = _LONGEST // 2
    return [name if len(name) <= _LONGEST else f"{name[:half]}…{name[-half:]}" for name in names]


def _label(figure: Any, axes: Any, labels: list[tuple[str, tuple[float, float]]]) -> None:
    """Put each label where it covers no mark, no other label and not the first one's line, if there is such a place."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # settles where the axes are
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()
    marks = [axes.transData.transform(point) for _, point in labels]
    taken = [Bbox.from_extents(x - 11, y - 11, x + 11, y + 11) for x, y in marks]
    inside = axes.get_window_extent()
    for line in axes.lines[len(labels) :]:
        y = axes.transData.transform((0, line.get_ydata()[0]))[1]
        taken.append(Bbox.from_extents(inside.x0, y - 2, inside.x1, y + 2))
    for name, point in labels:
        for reach, x, y in _PLACES:
            label = axes.annotate(
                name,
                point,
                (x, y),
                textcoords="offset points",
                ha=("center", "left", "right")[(x > 0) - (x < 0)],
                va=("center", "bottom", "top")[(y > 0) - (y < 0)],
                fontsize=8,
                parse_math=False,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
                arrowprops=_LINE if reach > 8 or x * y else None,
            )
            label.update_positions(renderer)
            box = Text.get_window_extent(label).padded(3)  # without the line to it
            free = not any(box.overlaps(other) for other in taken)
            if free and inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1:
                break
            if (reach, x, y) != _PLACES[-1]:
                label.remove()
        taken.append(box)
