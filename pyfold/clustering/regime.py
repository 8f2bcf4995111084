"""Shapes and free memory -> which regime a k-means call takes, what it costs, and why. No data is read.

*gram*: G = x xᵀ once, O(N² D), then every pass is O(N²) whatever D is; Ward and Hartigan exist only here. *direct*: passes over
the points, O(N K D) each. The model counts FLOPs, bytes and scratch, and divides by the rates in ``RATES``, the only place that
knows how fast a machine is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyfold import ops
from pyfold.clustering import seeds
from pyfold.errors import PyfoldError

INITS = ("ward", "k-means++", "random")
REFINEMENTS = ("auto", "hartigan", "lloyd", None)
SHARE = 0.8  # of the free bytes: the rest is for the caller, the allocator and what the model leaves out
ITERATIONS = 20  # Lloyd passes taken for granted: the true number is known only afterwards
# Scratch of the cpu kernels at most, on any engine: columns in a panel, bytes of panels packed together, rows of ``assign``.
_PANEL, _PACKED, _ROWS = 512, 40 * 2**20, 384


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, a CPU with one thread.

    However many threads there are: the way chosen, and with it the result, must not depend on them.
    """

    gram: float  # FLOP, half product, fp32
    gram_low: float  # the same for fp16 and bf16
    assign: float  # FLOP, fp32
    assign_low: float
    points: float  # points assigned, whatever D and K
    bandwidth: float  # bytes
    lloyd: float  # entries of G in a Lloyd pass
    ward: float  # entries of G in a whole Ward clustering
    hartigan: float  # entries of G in a whole Hartigan refinement
    trials: float  # distances to candidates of k-means++
    seeds: float  # seeds, whatever N: the calls that make one


# cpu: one thread of a Xeon with AMX (CPU seconds of a busy machine). cuda: an H100's data sheet, not measured yet.
RATES = {
    "cpu": Rates(
        gram=3e11,
        gram_low=3e11,  # of fp16; bf16 takes half the time
        assign=2.7e11,
        assign_low=2.7e11,
        points=1e7,
        bandwidth=1.0e10,
        lloyd=6e8,
        ward=9e7,
        hartigan=1.5e8,
        trials=3.5e8,
        seeds=1.6e4,
    ),
    "cuda": Rates(
        gram=4e13,
        gram_low=4e14,
        assign=4e13,
        assign_low=3e14,
        points=1e10,
        bandwidth=2.5e12,
        lloyd=5e11,
        ward=3e10,
        hartigan=5e10,
        trials=5e10,
        seeds=2e4,
    ),
}


@dataclass(frozen=True)
class Problem:
    """What the model sees of a clustering problem, or of ``batch`` equal ones."""

    n: int
    d: int
    n_clusters: int
    dtype: torch.dtype = torch.float32
    batch: int = 1


@dataclass(frozen=True)
class Estimate:
    """A way to do it: FLOPs, bytes moved, bytes of memory beside the input, seconds (on a CPU: of one thread)."""

    regime: str
    init: str
    refine: str | None
    flops: float
    bytes: float
    memory: float
    seconds: float

    def __str__(self) -> str:
        how = f"{self.regime}: {self.init}, {self.refine or 'no'} refinement"
        return (
            f"{how:<42} {self.flops:9.2e} FLOP  {self.bytes:9.2e} bytes moved  "
            f"{self.memory / 2**20:10,.1f} MiB  {self.seconds:9.3g} s"
        )


@dataclass(frozen=True)
class Explanation:
    """What a call takes, what it refuses, and why."""

    problem: Problem
    device: str
    backend: str
    taken: Estimate
    refused: Estimate | None
    why: str

    def __str__(self) -> str:
        p = self.problem
        batch = f"{p.batch} x " if p.batch > 1 else ""
        lines = [
            f"{batch}N={p.n}, D={p.d}, K={p.n_clusters}, {str(p.dtype).removeprefix('torch.')} "
            f"on {self.device}{', seconds of one thread' if self.device == 'cpu' else ''}: {self.why}",
            f"takes    {self.taken}  [{self.backend}]",
        ]
        if self.refused is not None:
            lines.append(f"refuses  {self.refused}")
        return "\n".join(lines)


def estimate(
    problem: Problem, regime: str, init: str, refine: str | None, *, max_iter: int, n_init: int, rates: Rates
) -> Estimate:
    """Cost of one way to cluster."""
    n, d, k, batch = problem.n, problem.d, problem.n_clusters, problem.batch
    low = problem.dtype in (torch.float16, torch.bfloat16)
    features = n * d * problem.dtype.itemsize
    starts = n_init if init in ("k-means++", "random") else 1
    passes = min(max_iter, ITERATIONS) if refine == "lloyd" or (refine == "hartigan" and init != "ward") else 0
    gram_rate, assign_rate = (rates.gram_low, rates.assign_low) if low else (rates.gram, rates.assign)

    flops, moved, seconds = 0.0, 5.0 * features, 5 * features / rates.bandwidth  # frame, centroids and inertia
    panels = -(-d // _PANEL) * _PANEL
    memory = 4.0 * n * d + 4.0 * k * d + 24.0 * n  # an fp32 copy, which only features that lie well do without; centroids
    grams, of_points = (1, n) if regime == "gram" else (0, 0)  # how many, and of how many points each
    if init == "k-means++":
        if regime == "direct":
            grams, of_points = -(-k // seeds.ROUND) * starts, seeds.sample_size(n, k)
        candidates = float(of_points) * seeds.trials(k) * k * starts
        seconds += candidates / rates.trials + k * starts / rates.seeds
        moved += 4 * candidates
    entries = float(of_points) ** 2
    flops += grams * entries * d
    moved += grams * 16 * entries  # cleared, written, mirrored
    seconds += grams * (entries * d / gram_rate + 16 * entries / rates.bandwidth)
    memory += 4 * entries
    if grams:
        a_panel = 8.0 * of_points * _PANEL
        memory += min(max(_PACKED, a_panel), a_panel * panels / _PANEL)
    if regime == "gram":
        looks = passes * starts
        seconds += looks * entries / rates.lloyd
        if init == "ward":
            seconds += entries / rates.ward
            looks += 2
        if refine == "hartigan":
            seconds += entries * starts / rates.hartigan
            looks += starts
        moved += 4 * entries * looks
    else:
        looks = max(1, passes) * starts
        flops += 2.0 * n * k * d * looks
        seconds += looks * (2.0 * n * k * d / assign_rate + n / rates.points + 2 * features / rates.bandwidth)
        moved += 2.0 * features * looks
        memory += 4.0 * k * panels + 4.0 * _ROWS * (k + _PANEL)  # packed centroids; products and points of a thread
    return Estimate(regime, init, refine, flops * batch, moved * batch, memory * batch, seconds * batch)


def choose(
    problem: Problem,
    *,
    init: str | None,
    refine: str | None,
    max_iter: int,
    n_init: int,
    rates: Rates,
    bytes_free: int,
) -> tuple[Estimate, Estimate | None, str]:
    """The way to take, the way refused, and why.

    Parameters
    ----------
    problem : Problem
    init : str or None
        One of ``INITS``, "given" for given centroids; None: Ward where G fits, k-means++ elsewhere.
    refine : str or None
        One of ``REFINEMENTS``; "auto": Hartigan over G, Lloyd on the points.
    max_iter, n_init : int
    rates : Rates
    bytes_free : int

    Raises
    ------
    PyfoldError
        A ValueError: if Ward or Hartigan is asked for and the Gram matrix does not fit.
    """

    def way(regime: str) -> Estimate:
        is_gram = regime == "gram"
        start = init or ("ward" if is_gram else "k-means++")
        how = refine if refine != "auto" else "hartigan" if is_gram else "lloyd"
        return estimate(problem, regime, start, how, max_iter=max_iter, n_init=n_init, rates=rates)

    gram = way("gram")
    fits = gram.memory / problem.batch <= SHARE * bytes_free
    need = f"{gram.memory / problem.batch:,.0f} bytes for G, {bytes_free:,} are free, of which {SHARE:.0%} may be used"
    if init == "ward" or refine == "hartigan":
        what = "init 'ward'" if init == "ward" else "refine 'hartigan'"
        if not fits:
            raise PyfoldError(
                f"{what}: expected memory for the Gram matrix of {problem.n} points, got {need}; "
                "use init='k-means++' and refine='lloyd'"
            )
        return gram, None, f"{what} needs G"
    direct = way("direct")
    if not fits:
        return direct, gram, f"G does not fit: {need}"
    if init is None:
        return gram, direct, "G fits, and Ward starts better than seeds"
    # The same refinement on both sides: Hartigan's longer way to a lower inertia is no reason to avoid G.
    lloyd = [
        estimate(problem, regime, init, refine and "lloyd", max_iter=max_iter, n_init=n_init, rates=rates).seconds
        for regime in ("gram", "direct")
    ]
    if lloyd[0] < lloyd[1]:
        return gram, direct, f"passes over G cost less: {lloyd[0]:.3g} s against {lloyd[1]:.3g} s"
    return direct, gram, f"passes over the points cost less: {lloyd[1]:.3g} s against {lloyd[0]:.3g} s"


def rates_of(device: torch.device) -> Rates:
    return RATES["cpu" if device.type == "cpu" else "cuda"]


def bytes_free(device: torch.device) -> int:
    """Memory that a call can allocate: the device's, or the host's within the control group's limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = _field(Path("/proc/meminfo"), "MemAvailable:") * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no such controller, or "max"
        return free
    return min(free, limit - used + _field(group / "memory.stat", "inactive_file"))


def backend_of(regime: str, backend: str, device: torch.device) -> str:
    """Which backends run a regime's ops: one name, or several joined by +."""
    names = ("gram", "ward", "hartigan", "lloyd") if regime == "gram" else ("assign", "update")
    return "+".join(dict.fromkeys(ops.resolve(backend, device, op) for op in names))


def explain(
    x: Any,
    n_clusters: int | Sequence[int],
    *,
    init: Any = None,
    refine: str | None = "auto",
    n_init: int = 1,
    max_iter: int = 300,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Explanation | list[Explanation]:
    """What :func:`pyfold.kmeans` with these arguments would take, with predicted cost, and why.

    ``kmeans``'s weights, tol and seed are not among them: they do not change what is taken.

    Parameters
    ----------
    x : Tensor, ndarray, list of these, or a shape
        As for ``kmeans``; or (N, D), (B, N, D), with ``dtype`` and ``device``. Values are not read.
    n_clusters : int, or one for each problem of a list

    Returns
    -------
    Explanation; a list for a list
        Printable. ``taken`` and ``refused`` hold regime, init, refine, flops, bytes, memory and seconds (on a CPU: of one
        thread, whatever number will run, so that the choice does not depend on it).

    Raises
    ------
    TypeError, ValueError
        As ``kmeans`` would.
    """
    from pyfold.clustering.problems import check_options, shapes_of

    kind = check_options(init, refine, n_init, max_iter)
    problems, where, listed = shapes_of(x, n_clusters, dtype, torch.device(device))
    if where.type == "cuda" and not torch.cuda.is_available():
        raise PyfoldError(f"device: expected one that torch can use here, got {where}, and there is no CUDA device")
    explanations = []
    for problem in problems:
        taken, refused, why = choose(
            problem,
            init=kind,
            refine=refine,
            max_iter=max_iter,
            n_init=n_init,
            rates=rates_of(where),
            bytes_free=bytes_free(where),
        )
        explanations.append(Explanation(problem, str(where), backend_of(taken.regime, backend, where), taken, refused, why))
    return explanations if listed else explanations[0]


def _field(path: Path, name: str) -> int:
    """A number from a file of ``name value`` lines."""
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(name))
