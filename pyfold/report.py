"""What a fold did, as numbers; nothing here depends on time except the fields that say so."""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyfold.clustering import Clustering
    from pyfold.compare import Measured
    from pyfold.families import FoldGroup
    from pyfold.forecast import Forecast
    from pyfold.function_forecast import Phase
    from pyfold.modules.groups import UnitGroup


@dataclass(frozen=True)
class GroupReport:
    """One folded group.

    Attributes
    ----------
    name : str
    layer : int
    width, folded_width : int
        Units before and after: N and K.
    inertia : float
        Within-cluster sum of squares of the features, after refinement.
    ward_inertia : float
        The same before refinement.
    total_inertia : float
        Sum of squares of the features. (Of heads these three are: how far those that go attend from where they are taken in,
        in sum, twice; and how many there were.)
    n_moves : int
        Units that the refinement moved.
    n_singletons : int
        Units that stayed alone; in the weight metric without repair bit for bit.
    output_error : float or None
        Of the function metric: the share of the output's energy that is lost, on tokens held out.
    ridge : float or None
        Of ridge regression: its λ.
    output_variance : float or None
        Of the weight metric's repair: what folding left of the output's variance on noise, before the consumer was scaled.
    """

    name: str
    layer: int
    width: int
    folded_width: int
    inertia: float
    ward_inertia: float
    total_inertia: float
    n_moves: int
    n_singletons: int
    output_error: float | None = None
    ridge: float | None = None
    output_variance: float | None = None

    @staticmethod
    def of(group: FoldGroup | UnitGroup, clusters: Clustering, **seen: float | None) -> GroupReport:
        """``seen``: what is known beside clusters."""
        return GroupReport(
            name=group.name,
            layer=group.layer,
            width=group.width,
            folded_width=clusters.n_clusters,
            inertia=clusters.inertia,
            ward_inertia=clusters.ward_inertia,
            total_inertia=clusters.total_inertia,
            n_moves=clusters.n_moves,
            n_singletons=int((clusters.labels.bincount() == 1).sum()),
            **seen,
        )


@dataclass(frozen=True)
class GpuReport:
    """The memory of a GPU, in bytes.

    Attributes
    ----------
    name : str
    peak : int
        What torch reserved at most.
    planned : int
        The most that it could have been.
    held : int
        What context and libraries, and other processes, held before the first tensor.
    """

    name: str
    peak: int
    planned: int
    held: int


@dataclass(frozen=True)
class FoldReport:
    """The result of :func:`pyfold.fold_checkpoint` and :func:`pyfold.fold_model`.

    Attributes
    ----------
    path : Path or None
        Where the result is; None: in memory.
    profile : str
        ``stock`` (the source's own architecture) or ``per-layer`` (needs ``trust_remote_code=True``); ``module`` in memory.
    backend : str
        Backend and SIMD level.
    groups : list of GroupReport
    parameters_before, parameters_after : int
    bytes_before, bytes_after : int
        Of the weights.
    notes : list of str
        What the options changed (rounding to a multiple).
    seconds : float
    peak_rss_bytes : int
        Highest resident memory of this process so far.
    gpu : GpuReport or None
    """

    path: Path | None
    profile: str
    backend: str
    groups: list[GroupReport]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    notes: list[str]
    seconds: float
    peak_rss_bytes: int
    gpu: GpuReport | None = None

    @property
    def removed_share(self) -> float:
        """Share of all parameters that went."""
        return 1 - self.parameters_after / self.parameters_before

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        plain = {**asdict(self), "removed_share": self.removed_share}
        if self.path is not None:
            plain |= {"path": str(self.path), "how_to_load": how_to_load(self.path, self.profile)}
        return plain


def how_to_load(path: Path | str, profile: str) -> str:
    """The line of Python that loads a result."""
    trust = "" if profile == "stock" else ", trust_remote_code=True"
    return f'AutoModelForCausalLM.from_pretrained("{path}"{trust})'


def peak_rss_bytes() -> int:
    """Highest resident set of this process so far (VmHWM)."""
    return _status("VmHWM:")


def rss_bytes() -> int:
    """Resident set of this process now (VmRSS)."""
    return _status("VmRSS:")


def _status(field: str) -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))
    except (FileNotFoundError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def summary(report: FoldReport) -> str:
    """The report as a person reads it at the end of a fold."""
    head = f"{'group':<16}{'width':>7}{'folded':>8}{'inertia':>9}{'refined':>9}{'moved':>7}{'alone':>7}"
    seen = any(group.output_error is not None for group in report.groups)
    lines = [head + (f"{'lost':>9}{'ridge':>7}" if seen else "")]
    for group in report.groups:
        total = group.total_inertia or 1.0
        lines.append(
            f"{group.name:<16}{group.width:>7}{group.folded_width:>8}{group.ward_inertia / total:>9.2%}"
            f"{group.inertia / total:>9.2%}{group.n_moves:>7}{group.n_singletons:>7}"
            + (f"{group.output_error:>9.2%}{group.ridge or 0:>7}" if group.output_error is not None else "")
        )
    lines += [
        "",
        f"parameters  {report.parameters_before:,} -> {report.parameters_after:,}  ({report.removed_share:.2%} of all removed)",
        f"bytes       {report.bytes_before:,} -> {report.bytes_after:,}",
        f"time        {report.seconds:.1f} s, peak memory {report.peak_rss_bytes / 2**20:.0f} MiB, backend {report.backend}",
        *([_gpu_line(report.gpu)] if report.gpu else []),
        *(f"note        {note}" for note in report.notes),
    ]
    if report.path is None:
        return "\n".join(lines)
    lines.append(f"written     {report.path}")
    if report.profile == "stock":
        lines.append("profile     stock: all layers alike, loads anywhere without custom code")
    else:
        lines.append("profile     per-layer: layers differ, loads with the modeling file in the folder")
    lines.append(f"load with   {how_to_load(report.path, report.profile)}")
    return "\n".join(lines)


def _gpu_line(gpu: GpuReport) -> str:
    return (
        f"GPU         peak memory {gpu.peak / 2**20:.0f} MiB of {gpu.planned / 2**20:.0f} planned, beside "
        f"{gpu.held / 2**20:.0f} held before the first tensor: {gpu.name}"
    )


def forecast_table(forecast: Forecast) -> str:
    """A forecast as a person reads it; neighbouring groups that take the same share a line."""
    heads = {"groups": -34, "width": 7, "folded": 8, "weights": 18, "Gram matrix": 14, "MiB": 7, "GFLOP": 9, "seconds": 9}
    rows = [
        (
            group.width,
            group.folded_width,
            f"{group.features} features" if group.features else "whole",
            f"{group.rows} rows" if group.rows else "whole",
            f"{group.memory / 2**20:.0f}",
            f"{group.flops / 1e9:.0f}",
            f"{group.seconds:.2f}",
        )
        for group in forecast.groups
    ]
    lines = ["".join(f"{head:{'<' if width < 0 else '>'}{abs(width)}}" for head, width in heads.items())]
    for row, same in groupby(range(len(rows)), key=rows.__getitem__):
        first, *others = (forecast.groups[i].name for i in same)
        names = f"{first} to {others[-1]}" if others else first
        cells = zip(row, list(heads.values())[1:], strict=True)
        lines.append(f"{names:<34}" + "".join(f"{cell:>{width}}" for cell, width in cells))
    several = len(forecast.phases) > 1
    if several:
        lines = [*_phase_lines(forecast.phases), "", *lines]
    to_fold = " to fold" if several else ""
    where = f" ({max(forecast.phases, key=lambda phase: phase.memory).name})" if several else ""
    mib = {what: getattr(forecast, what) / 2**20 for what in ("peak", "process", "ahead", "spare")}
    on_gpu = []
    if forecast.gpu_peak is not None:
        peak, held = forecast.gpu_peak / 2**20, (forecast.gpu_held or 0) / 2**20
        on_gpu = [f"GPU memory  {peak:.0f} MiB at the peak, beside {held:.0f} held before the first tensor"]
    lines += [
        "",
        f"memory      {mib['peak']:.0f} MiB at the peak{where}, of which interpreter and imports {mib['process']:.0f}, "
        f"read ahead {mib['ahead']:.0f}, buffers to be used again {mib['spare']:.0f}",
        *on_gpu,
        f"work        {forecast.flops / 1e12:.2f} TFLOP{to_fold}; {forecast.bytes_read:,} bytes read, "
        f"{forecast.bytes_written:,} written",
        f"seconds     {forecast.seconds:.1f}{to_fold and ', folding'}, limited by {forecast.limited_by}; alone: "
        f"computing {forecast.computing:.1f}, "
        f"reading and writing {forecast.reading_and_writing:.1f}, hashing {forecast.hashing:.1f}"
        + (f", copying to and from the GPU {forecast.copying:.1f}" if on_gpu else ""),
        f"disk        {forecast.disk_needed:,} bytes needed, {forecast.disk_free:,} free",
    ]
    return "\n".join(lines)


def _phase_lines(phases: Sequence[Phase]) -> list[str]:
    on_gpu = any(each.gpu_memory for each in phases)
    lines = [f"{'phase':<34}{'MiB':>7}{' of the GPU' * on_gpu}{'seconds':>10}{'bytes read':>22}"]
    for each in phases:
        there = f"{(each.gpu_memory or 0) / 2**20:>11.0f}" if on_gpu else ""
        line = f"{each.name:<34}{each.memory / 2**20:>7.0f}{there}{each.seconds:>10.1f}{each.bytes_read:>22,}"
        lines.append(f"{line}  {each.how}".rstrip())
    return lines


def comparison_table(rows: Sequence[Measured]) -> str:
    """Checkpoints as a person compares them: a line for one, a table for several; accuracies with standard errors."""
    first = rows[0]
    windows = "context" if first.windows is None else f"{first.windows} windows of"
    how = f"over {first.n_tokens} tokens, {windows} {first.context}"
    columns = {task: headline(metrics) for task, metrics in first.tasks.items()}
    heads = [f"{task} {metric}" for task, metric in columns.items()]
    scores = [[_score(row.tasks[task], metric) for task, metric in columns.items()] for row in rows]
    if len(rows) == 1:
        lines = [f"perplexity {first.perplexity:.4f} {how}: {first.source}"]
        return "\n".join(lines + [f"{head} {score}" for head, score in zip(heads, scores[0], strict=True)])
    cells = [["checkpoint", "parameters", "bytes", "perplexity", "x first", *heads]]
    for row, shown in zip(rows, scores, strict=True):
        cells.append([row.source, f"{row.parameters:,}", f"{row.bytes:,}", f"{row.perplexity:.4f}", f"{row.ratio:.3f}", *shown])
    name, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
    lines = [
        f"{line[0]:<{name}}" + "".join(f"{cell:>{width + 2}}" for cell, width in zip(line[1:], widths, strict=True))
        for line in cells
    ]
    return "\n".join([*lines, "", f"perplexity {how}"])


def headline(metrics: dict[str, float]) -> str:
    """The metric to show of a task: normalised accuracy, accuracy, or the first it has."""
    return next((name for name in ("acc_norm", "acc") if name in metrics), next(iter(metrics)))


def _score(metrics: dict[str, float], name: str) -> str:
    error = metrics.get(f"{name}_stderr")
    share = name.startswith(("acc", "exact_match"))
    scale = 100 if share else 1
    return f"{scale * metrics[name]:.2f}" + (f" ± {scale * error:.2f}" if error is not None else "") + (" %" if share else "")
