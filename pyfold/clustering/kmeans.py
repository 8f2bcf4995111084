"""k-means: problems in, one each or many at once -> frame -> regime -> start -> refinement -> labels and centroids.

Every op is called once a pass for all problems of a regime that are not finished, so many small problems cost few launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyfold import ops
from pyfold.clustering import regime, seeds
from pyfold.clustering.differences import assign, drowned, settle, sharpened, squared_distances, total
from pyfold.clustering.frame import Framed, frame_all, frame_of, largest
from pyfold.clustering.partition import canonical, fill_empty, labels_of
from pyfold.clustering.problems import Given, check_options, read


@dataclass(frozen=True)
class KMeansResult:
    """A partition of N points into K clusters, and how it was found.

    Attributes
    ----------
    labels : (N,), int64
        Cluster of each point, none empty. Clusters are numbered in the order of their first member (among points of positive
        weight).
    centroids : (K, D), float32, or float64 for float64 points
        Weighted mean of each cluster's points.
    inertia : float
        ``Σ w_i ‖x_i − centroid‖²`` of these labels and centroids, summed in fp64.
    n_iter : int
        Lloyd passes, the one that changed nothing included; Hartigan's moves, and one for the look that found none.
    init, refine, regime, backend : str
        What was taken; ``init`` is "given" for given centroids, ``refine`` None for no refinement.

    For a batch (B, N, D) labels, centroids, inertia and n_iter have a leading dimension B.
    """

    labels: Any
    centroids: Any
    inertia: Any
    n_iter: Any
    init: str
    refine: str | None
    regime: str
    backend: str


class _Found(NamedTuple):
    labels: Tensor
    centroids: Tensor  # in the frame
    inertia: float
    n_iter: int


@dataclass(frozen=True)
class _Run:
    """How a group of problems is solved."""

    regime: str
    init: str
    refine: str | None
    n_init: int
    max_iter: int
    tol: float
    seed: int
    backend: str


def kmeans(
    x: Any,
    n_clusters: int | Sequence[int],
    *,
    init: Any = None,
    refine: str | None = "auto",
    n_init: int = 1,
    max_iter: int = 300,
    tol: float = 1e-4,
    weights: Any = None,
    seed: int = 0,
    backend: str = "auto",
) -> KMeansResult | list[KMeansResult]:
    """Partition points into clusters of least squared distance to their mean.

    Parameters
    ----------
    x : Tensor or ndarray, (N, D) or (B, N, D); or a list of (N_i, D_i)
        float64, float32, float16 or bfloat16. Computed in fp32; float64 is centred and scaled in fp64 before it is rounded.
    n_clusters : int, or one for each problem of a list
        K, 1 <= K <= N (points of weight 0 do not count).
    init : None, "ward", "k-means++", "random", or Tensor or ndarray (K, D); for a batch or list, one for each problem
        None: Ward's method where the Gram matrix fits the memory, k-means++ elsewhere; the result says which.
        "k-means++" is greedy as scikit-learn's, over the Gram matrix or over samples (:mod:`pyfold.clustering.seeds`).
    refine : "auto", "hartigan", "lloyd" or None
        "auto": Hartigan over the Gram matrix, Lloyd on the points. Hartigan needs the Gram matrix; it ends at a fixed point,
        and after a start other than Ward's it follows Lloyd.
    n_init : int
        Starts from different seeds, of which the one of least inertia is kept; Ward and given centroids start once.
    max_iter : int
        Lloyd passes at most.
    tol : float
        Lloyd on the points also stops when the centroids move by ``Σ ‖Δc‖² <= tol`` times the mean variance of the features,
        as scikit-learn's; 0 runs to a fixed point, as do passes over a Gram matrix, which are cheap, always.
    weights : Tensor or ndarray, (N,) or (B, N); or a list
        At least 0, the positive ones within a factor of 1e6. Points of weight 0 join the nearest cluster at the end.
    seed : int
        Of the random draws.
    backend : str
        ``auto``, or a name from :func:`pyfold.ops.backends`.

    Returns
    -------
    KMeansResult; a list for a list
        NumPy arrays for NumPy arrays, tensors on the same device for tensors.

    Raises
    ------
    TypeError, ValueError
        For a wrong dtype, shape, device, value or option, and where Ward or Hartigan is asked for and the Gram matrix does not
        fit the memory; says what was expected and given.

    Notes
    -----
    Which regime a call takes, and why: :func:`pyfold.explain`. An empty cluster gets the point that is farthest from its
    centroid; duplicates are split only where there are fewer distinct points than clusters.

    The same call gives the same bits on every run of one backend, on any number of threads, as long as it takes the same
    regime: where the Gram matrix does not fit the memory that is free, it takes the other (``regime`` of the result says
    which; init "ward" or refine "hartigan" pins G, and raises where it does not fit).

    Ward, the default, costs O(N² (D + 1)) and 4 N² bytes: made for folding, where K is a large share of N. For few clusters of
    many points (N = 8000, D = 2, K = 8: 2 s against 0.05 s), init "k-means++" is the one to take.

    Points are told apart as far as fp32, after centring, represents them: 1e-7 of their reach.
    """
    kind = check_options(init, refine, n_init, max_iter, tol, seed)
    given, form = read(x, n_clusters, weights, init)
    device = given[0].x.device
    rates, free = regime.rates_of(device), regime.bytes_free(device)
    groups: dict[_Run, list[list[int]]] = {}
    room: dict[_Run, float] = {}
    for i, one in enumerate(given):
        n, d = one.x.shape
        problem = regime.Problem(n, d, one.n_clusters, one.x.dtype)
        way, _, _ = regime.choose(
            problem, init=kind, refine=refine, max_iter=max_iter, n_init=n_init, rates=rates, bytes_free=free
        )
        restarts = n_init if way.init in ("k-means++", "random") else 1
        run = _Run(way.regime, way.init, way.refine, restarts, max_iter, float(tol), int(seed), backend)
        # Together as far as the memory goes.
        if run not in groups or room[run] < way.memory:
            groups.setdefault(run, []).append([])
            room[run] = regime.SHARE * free
        groups[run][-1].append(i)
        room[run] -= way.memory
    solved: dict[int, KMeansResult] = {}
    for run, parts in groups.items():
        for part in parts:
            solved.update(zip(part, _solve([given[i] for i in part], run), strict=True))
    results = [solved[i] for i in range(len(given))]
    if form == "list":
        return results
    return results[0] if form == "one" else _stacked(results, given[0])


def nearest(x: Tensor, centroids: Tensor, backend: str) -> Tensor:
    """Labels of points; any float dtypes and magnitudes."""
    frame = frame_of(centroids, x.dtype)
    means = frame.enter(centroids, largest(centroids)).float().contiguous()
    return assign(frame.enter(x, largest(x)), means, backend)[0]


def _solve(given: list[Given], run: _Run) -> list[KMeansResult]:
    """Problems that go the same way, together."""
    framed = frame_all([one.x for one in given], [one.magnitude for one in given], run.backend)
    ks = [one.n_clusters for one in given]
    ws = None
    if any(one.weights is not None for one in given):
        ones = [torch.ones(len(one.x), dtype=torch.float64, device=one.x.device) for one in given]
        ws = [w if one.weights is None else one.weights for one, w in zip(given, ones, strict=True)]
    starts = [
        None if one.init is None else f.frame.enter(one.init, largest(one.init)) for one, f in zip(given, framed, strict=True)
    ]
    best = _best(framed, ks, ws, starts, run)
    blurred = []
    if run.regime == "gram" or run.init == "k-means++":
        for i, (f, one, k) in enumerate(zip(framed, best, ks, strict=True)):
            n, d = f.y.shape
            unit = 1.0 if ws is None else float(ws[i].max())
            mass = n if ws is None else total(ws[i] / unit)
            if drowned(one.inertia / unit, mass * d * f.variance, (n - k) / n):
                blurred.append(i)
    if blurred:
        again = _best(
            [framed[i] for i in blurred],
            [ks[i] for i in blurred],
            None if ws is None else [ws[i] for i in blurred],
            [starts[i] for i in blurred],
            run,
            sharp=True,
        )
        for i, one in zip(blurred, again, strict=True):
            best[i] = min(best[i], one, key=lambda found: found.inertia)
    name = regime.backend_of(run.regime, run.backend, given[0].x.device)
    return [_result(*one, run, name) for one in zip(given, framed, best, strict=True)]


def _best(
    framed: list[Framed],
    ks: list[int],
    ws: list[Tensor] | None,
    starts: list[Tensor | None],
    run: _Run,
    sharp: bool = False,
) -> list[_Found]:
    """The best of all starts; ``sharp`` where inner products do not tell the points apart."""
    ys = [f.y for f in framed]
    grams = ops.gram(ys, backend=run.backend) if run.regime == "gram" else None
    if grams is not None and sharp:
        grams = [sharpened(*one) for one in zip(grams, ys, strict=True)]
    best: list[_Found] = []
    for restart in range(run.n_init):
        rngs = [np.random.default_rng((run.seed, restart)) for _ in framed]
        if grams is None:
            labels, n_iter, centroids = _on_points(framed, ks, ws, starts, rngs, run, sharp)
            numbered = [canonical(label) for label in labels]
            centroids = [mean[_sources(new, old, k)] for mean, new, old, k in zip(centroids, numbered, labels, ks, strict=True)]
            labels = numbered
        else:
            labels, n_iter = _over_gram(grams, ys, ks, ws, starts, rngs, run)
            labels = [canonical(label) for label in labels]
            centroids = ops.update(ys, labels, ks, weights=ws, backend=run.backend)
        inertias = [
            total(squared_distances(y, label, mean) * (1.0 if ws is None else ws[i]))
            for i, (y, label, mean) in enumerate(zip(ys, labels, centroids, strict=True))
        ]
        found = [_Found(*one) for one in zip(labels, centroids, inertias, n_iter, strict=True)]
        best = [min(pair, key=lambda one: one.inertia) for pair in zip(best or found, found, strict=True)]
    return best


def _over_gram(
    grams: list[Tensor],
    ys: list[Tensor],
    ks: list[int],
    ws: list[Tensor] | None,
    starts: list[Tensor | None],
    rngs: list[np.random.Generator],
    run: _Run,
) -> tuple[list[Tensor], list[int]]:
    """Labels of each problem, and passes made, over Gram matrices."""
    n_iter = [0] * len(grams)
    if run.init == "ward":
        joins = ops.ward(grams, ks, weights=ws, backend=run.backend)
        labels = [labels_of(one, len(y)) for one, y in zip(joins, ys, strict=True)]
    elif run.init == "given":
        found = [assign(y, start, run.backend) for y, start in zip(ys, starts, strict=True) if start is not None]
        labels = [fill_empty(*one, y, k) for one, y, k in zip(found, ys, ks, strict=True)]
    else:
        labels = []
        for i, (g, y, k) in enumerate(zip(grams, ys, ks, strict=True)):
            w = None if ws is None else ws[i]
            chosen = seeds.greedy(g, k, w, rngs[i]) if run.init == "k-means++" else seeds.at_random(len(y), k, w, rngs[i])
            labels.append(fill_empty(*seeds.nearest(g, chosen.to(y.device)), y, k))
    if run.refine == "lloyd" or (run.refine == "hartigan" and run.init != "ward"):
        active = list(range(len(grams)))
        while active:
            passed = ops.lloyd(
                [grams[i] for i in active],
                [labels[i] for i in active],
                [ks[i] for i in active],
                weights=None if ws is None else [ws[i] for i in active],
                backend=run.backend,
            )
            moved = []
            for i, one in zip(active, passed, strict=True):
                n_iter[i] += 1
                after = fill_empty(*one, ys[i], ks[i])
                if not torch.equal(after, labels[i]) and n_iter[i] < run.max_iter:
                    moved.append(i)
                labels[i] = after
            active = moved
    if run.refine == "hartigan":
        refined = ops.hartigan(grams, labels, ks, weights=ws, backend=run.backend)
        labels = [one for one, _ in refined]
        n_iter = [passes + len(gains) + 1 for passes, (_, gains) in zip(n_iter, refined, strict=True)]
    return labels, n_iter


def _on_points(
    framed: list[Framed],
    ks: list[int],
    ws: list[Tensor] | None,
    starts: list[Tensor | None],
    rngs: list[np.random.Generator],
    run: _Run,
    sharp: bool,
) -> tuple[list[Tensor], list[int], list[Tensor]]:
    """Labels of each problem, Lloyd passes made, and the means of the clusters, on the points themselves."""
    ys = [f.y for f in framed]
    centroids = []
    for i, (y, k, start) in enumerate(zip(ys, ks, starts, strict=True)):
        w = None if ws is None else ws[i]
        if start is not None:
            centroids.append(start)
        elif run.init == "k-means++":
            centroids.append(seeds.kmeans_pp(y, k, w, rngs[i], run.backend, sharp))
        else:
            centroids.append(y[seeds.at_random(len(y), k, w, rngs[i]).to(y.device)].float())
    max_iter = 1 if run.refine is None else run.max_iter
    labels: list[Tensor | None] = [None] * len(ys)
    n_iter = [0] * len(ys)
    active = list(range(len(ys)))
    while active:
        found = ops.assign([ys[i] for i in active], [centroids[i] for i in active], backend=run.backend)
        moved = []
        for i, one in zip(active, found, strict=True):
            n_iter[i] += 1
            after = fill_empty(*settle(ys[i], centroids[i], *one), ys[i], ks[i])
            before = labels[i]
            if before is None or not torch.equal(after, before):
                moved.append(i)
            labels[i] = after
        if not moved:
            break
        means = ops.update(
            [ys[i] for i in moved],
            [label for i in moved if (label := labels[i]) is not None],
            [ks[i] for i in moved],
            weights=None if ws is None else [ws[i] for i in moved],
            backend=run.backend,
        )
        active = []
        for i, mean in zip(moved, means, strict=True):
            shift = total((mean - centroids[i]).square_())
            centroids[i] = mean
            if shift > run.tol * framed[i].variance and n_iter[i] < max_iter:
                active.append(i)
    done = [label for label in labels if label is not None]
    return done, n_iter if run.refine else [0] * len(ys), centroids


def _sources(new: Tensor, old: Tensor, n_clusters: int) -> Tensor:
    """(K,) the old number of each new cluster."""
    return torch.empty(n_clusters, dtype=torch.int64, device=new.device).scatter_(0, new, old)


def _result(given: Given, framed: Framed, found: _Found, run: _Run, backend: str) -> KMeansResult:
    labels, centroids = found.labels, framed.frame.leave(found.centroids)
    if given.kept is not None:
        idle = torch.ones(len(given.every), dtype=torch.bool, device=labels.device)
        idle[given.kept] = False
        every = torch.empty(len(given.every), dtype=torch.int64, device=labels.device)
        every[given.kept] = labels
        every[idle] = nearest(given.every[idle], centroids, run.backend)
        labels = every
    return KMeansResult(
        labels=given.out(labels),
        centroids=given.out(centroids if given.x.dtype == torch.float64 else centroids.float()),
        inertia=framed.frame.area(found.inertia),
        n_iter=found.n_iter,
        init=run.init,
        refine=run.refine,
        regime=run.regime,
        backend=backend,
    )


def _stacked(results: list[KMeansResult], like: Given) -> KMeansResult:
    """One result for a batch."""

    def stack(name: str) -> Any:
        values = [torch.as_tensor(getattr(one, name)) for one in results]
        return like.out(torch.stack(values).to(like.x.device))

    many = {name: stack(name) for name in ("labels", "centroids", "n_iter")}
    inertia = like.out(torch.tensor([one.inertia for one in results], dtype=torch.float64, device=like.x.device))
    return replace(results[0], inertia=inertia, **many)
