"""A module in, a smaller ordinary module out: units found, clustered, merged, and what that did to activations repaired."""

from __future__ import annotations

import fnmatch
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyfold.clustering import Clustering, cluster_each
from pyfold.errors import PyfoldError
from pyfold.modules import folding, inversion
from pyfold.modules import repair as repairs
from pyfold.modules.groups import UnitGroup, moved, unit_groups
from pyfold.modules.modes import evaluating
from pyfold.modules.units import Axis, Traced, trace
from pyfold.progress import Progress, bar
from pyfold.report import FoldReport, GroupReport, peak_rss_bytes

Repair = Literal["ar", "dir", "data"]
_REPAIRS = (None, "ar", "dir", "data")


def fold_model(
    module: nn.Module,
    *,
    example_inputs: Any,
    ratio: float | None = None,
    target_params: int | None = None,
    layers: str | Sequence[str] | None = None,
    repair: Repair | None = "ar",
    data: Tensor | Iterable[Any] | None = None,
    compensate: bool = True,
    n_images: int = 256,
    steps: int = 60,
    seed: int = 0,
    save_images: str | Path | None = None,
    backend: str = "auto",
    progress: Progress | bool = False,
) -> tuple[nn.Module, FoldReport]:
    """Fold the channels and hidden units of a module, without data unless ``repair="data"``.

    Parameters
    ----------
    module : nn.Module
        On the CPU; left untouched. It runs on ``example_inputs`` to show which of its parameters belong together.
    example_inputs : Tensor or sequence
        What ``module(*example_inputs)`` takes; a tensor alone is one input. Few and small is fast.
    ratio : float
        Share of the units of each group to remove, 0 to 1: K = floor((1 − ratio) N).
    target_params : int
        Instead of ``ratio``: the same share of every group, so that at most so many parameters are left.
    layers : str or sequence of str
        Fold only groups of which a layer's name matches one of these patterns, ``"layer3.*"``; None: all that can be.
    repair : {"ar", "dir", "data"} or None
        ``ar``: Fold-AR, closed form: BatchNorm's weight makes up for the variance that averaging takes (Wang et al. 2025,
        section 4.3). ``dir``: statistics and consumers set right on images synthesised from the module's own BatchNorms.
        ``data``: the same on ``data``. None: averages only, whose variance is less.
    data : Tensor, (B, ...), or iterable of such, or of pairs that begin with one
        For ``repair="data"``; a DataLoader is one. All of it is held in memory, and what a few layers give on it.
    compensate : bool
        With ``dir`` and ``data``: regress the layers that read folded units, too: ``nn.Linear``, ``nn.Conv2d`` without groups.
    n_images, steps, seed : int
        Of ``dir``: images, steps of descent, and what they begin with.
    save_images : path, optional
        Of ``dir``: a picture file for the images, as a grid to look at; needs ``pip install pillow``.
    backend : str
        One of :func:`pyfold.ops.backends`.
    progress : bool or callable
        True: a bar on stderr while images are made and layers regressed. A callable gets work done, work in all, and its name.

    Returns
    -------
    (nn.Module, FoldReport)
        The module with smaller layers; and what was folded, with notes on what could not be and why.

    Raises
    ------
    ValueError
        If nothing can be folded, an option is out of range, or the module's forward takes units for a fixed number of them.
    TypeError
        If ``module`` is no module.
    """
    began = time.perf_counter()
    inputs = _checked(module, example_inputs, ratio, target_params, repair, data, save_images, n_images, steps)
    with evaluating(module):
        traced = trace(module, _copied(inputs))
    every, refused = unit_groups(traced)
    groups = _chosen(every, refused, layers)
    state = folding.state_of(module)
    names = {name for name, _ in module.named_parameters()}
    if ratio is None:
        assert target_params is not None
        widths = _widths_for(traced, state, groups, names, target_params)
    else:
        widths = _widths(groups, ratio)
    clusters = clustered(traced, state, groups, widths, backend)
    labels = {number: each.labels for number, each in clusters.items()}
    where = moved(traced, groups, labels)
    folded = merge(module, traced, groups, labels, closed_form=repair == "ar")
    _check_runs(module, folded, inputs)
    notes = [f"not folded: {name}: {reason}" for name, reason in refused.items()]
    if repair in ("dir", "data") and clusters:
        with _shown(progress) as show:
            if data is None:
                shape = tuple(inputs[0].shape[1:])
                images = inversion.invert(module, shape, n_images=n_images, steps=steps, seed=seed, progress=show)
                if save_images is not None:
                    inversion.save_grid(images, save_images)
            else:
                images = _tensor_of(data)
            targets, left_out = _targets(module, traced, state, where) if compensate else ({}, [])
            notes += left_out
            with evaluating(module), evaluating(folded):
                repairs.regress(module, folded, targets, images, norms(traced, state, where), progress=show)
    report = _report(module, folded, groups, clusters, notes, time.perf_counter() - began, backend)
    return folded, report


def _checked(
    module: nn.Module,
    example_inputs: Any,
    ratio: float | None,
    target_params: int | None,
    repair: str | None,
    data: Any,
    save_images: str | Path | None,
    n_images: int,
    steps: int,
) -> tuple[Any, ...]:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}; checkpoints: pyfold.fold_checkpoint")
    if (ratio is None) == (target_params is None):
        raise PyfoldError("fold_model: expected either ratio= or target_params=")
    if ratio is not None and not 0 <= ratio < 1:
        raise PyfoldError(f"ratio: expected at least 0 and less than 1, got {ratio}")
    if repair not in _REPAIRS:
        raise PyfoldError(f"repair: expected one of {', '.join(map(repr, _REPAIRS))}, got {repair!r}")
    if save_images is not None and repair != "dir":
        raise PyfoldError('save_images: expected with repair="dir", which makes images')
    if (repair == "data") != (data is not None):
        raise PyfoldError('data: expected with repair="data", and only then')
    devices = {str(tensor.device) for tensor in chain(module.parameters(), module.buffers())} - {"cpu"}
    if devices:
        raise PyfoldError(
            f"module: expected on the CPU, got {', '.join(sorted(devices))}; fold module.cpu(), then move the result"
        )
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise PyfoldError(f"{name}: expected finite values")
    if not isinstance(example_inputs, (Tensor, list, tuple)):
        raise TypeError(f"example_inputs: expected a tensor, or a sequence of inputs, got {type(example_inputs).__name__}")
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if repair in ("dir", "data") and not (len(inputs) == 1 and isinstance(inputs[0], Tensor) and inputs[0].is_floating_point()):
        raise PyfoldError(f'repair="{repair}": expected a module of one floating-point tensor, got {len(inputs)} inputs')
    if repair == "dir" and inputs[0].dtype != torch.float32:
        raise PyfoldError(f'repair="dir": expected a float32 module and input, got {inputs[0].dtype}; fold module.float()')
    if n_images < 2 or steps < 1:
        raise PyfoldError(f"n_images, steps: expected at least 2 and 1, got {n_images} and {steps}")
    return inputs


def _shown(progress: Progress | bool) -> AbstractContextManager[Progress | None]:
    if progress is True:
        return bar("")
    return nullcontext(progress or None)


def _copied(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """For a module that may write into them."""
    return tuple(each.clone() if isinstance(each, Tensor) else each for each in inputs)


def _chosen(groups: list[UnitGroup], refused: dict[str, str], layers: str | Sequence[str] | None) -> list[UnitGroup]:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    if not groups:
        raise PyfoldError(f"module: nothing to fold. {reasons or 'It has no hidden convolution or linear layer'}")
    if layers is None:
        return groups
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        if not any(_matches(group, [pattern]) for group in groups):
            raise PyfoldError(
                f"layers: '{pattern}' matches none of {', '.join(group.name for group in groups)}. {reasons}".strip()
            )
    tied = {group.tied for group in groups if _matches(group, patterns)}
    return [group for group in groups if group.tied in tied]


def _matches(group: UnitGroup, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(layer, pattern) for layer in group.name.split("+") for pattern in patterns)


def clustered(
    traced: Traced, state: folding.State, groups: Sequence[UnitGroup], widths: Sequence[int], backend: str = "auto"
) -> dict[int, Clustering]:
    """By number, of the groups that lose units, all of them as one ragged batch."""
    fewer = [number for number, group in enumerate(groups) if widths[number] < group.width]
    features = [folding.features(traced, state, groups[number]) for number in fewer]
    return dict(zip(fewer, cluster_each(features, [widths[number] for number in fewer], backend=backend), strict=True))


def _widths(groups: Sequence[UnitGroup], ratio: float) -> list[int]:
    return [max(1, int((1 - ratio) * group.width + 1e-9)) for group in groups]


def _widths_for(traced: Traced, state: folding.State, groups: list[UnitGroup], names: set[str], target: int) -> list[int]:
    """Of the least share removed everywhere that leaves at most ``target`` parameters."""

    def left(ratio: float) -> int:
        return folding.parameters_after(traced, state, groups, _widths(groups, ratio), names)

    if left(1.0) > target:
        raise PyfoldError(f"target_params: {target:,} is less than the {left(1.0):,} that are left with one unit in each group")
    low, high = 0.0, 1.0
    if left(0.0) <= target:
        return _widths(groups, 0.0)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if left(middle) <= target else (middle, high)
    return _widths(groups, high)


def merge(
    module: nn.Module, traced: Traced, groups: Sequence[UnitGroup], labels: folding.Labels, *, closed_form: bool
) -> nn.Module:
    """A copy with each cluster's units merged; ``closed_form``: variances repaired."""
    state, where = folding.state_of(module), moved(traced, groups, labels)
    merged = folding.merged_state(traced, folding.normalised_rows(traced, state, where), where)
    if closed_form:
        merged = folding.rescaled(traced, state, merged, where, groups, labels)
    types = {name: tensor.dtype for name, tensor in state.items()}
    return folding.with_state(module, {name: tensor.to(types.get(name, tensor.dtype)) for name, tensor in merged.items()})


def _targets(
    module: nn.Module, traced: Traced, state: folding.State, where: dict[Axis, Tensor]
) -> tuple[dict[str, repairs.Target], list[str]]:
    """Layers to regress: those that read folded units, run once, and have no groups; and of the others, why not."""
    rows = {**state, **folding.merged_state(traced, folding.normalised_rows(traced, state, where), where, rows_only=True)}
    normalised = {producer.rows.name for producer, _ in folding.normalised(traced)}
    targets: dict[str, repairs.Target] = {}
    notes = []
    reads = dict.fromkeys(axis.name for axis in traced.axes if axis in where and traced.roles[axis] == "in")
    uses = Counter(id(tensor) for _, tensor in module.named_parameters(remove_duplicate=False))
    for name in reads:
        prefix = name.rpartition(".")[0]
        layer = module.get_submodule(prefix)
        if name in traced.repeated or any(uses[id(tensor)] > 1 for tensor in layer.parameters(recurse=False)):
            notes.append(f"not regressed: {prefix}: what it holds is used more than once")
        elif isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1):
            bias = None if layer.bias is None else rows[f"{prefix}.bias"]
            targets[prefix] = repairs.Target(rows[name], bias, name in normalised or layer.bias is not None)
        else:
            notes.append(f"not regressed: {prefix}: only nn.Linear, and nn.Conv2d without groups, are")
    return targets, notes


def norms(traced: Traced, state: folding.State, where: dict[Axis, Tensor]) -> dict[str, repairs.Norm]:
    """Of BatchNorms whose channels were folded: what became of them."""
    found = {}
    for each in traced.normalisations:
        if (to := where.get(Axis(each.mean, 0))) is not None:
            own = each.producer is not None and each.producer.rows in where
            factor = folding.row_factors(state, each, to) if own else torch.ones(len(to))
            found[each.mean.rpartition(".")[0]] = repairs.Norm(to, factor)
    return found


def _tensor_of(data: Tensor | Iterable[Any]) -> Tensor:
    every = [data] if isinstance(data, Tensor) else data
    batches = [batch[0] if isinstance(batch, (tuple, list)) and batch else batch for batch in every]
    tensors = [batch for batch in batches if isinstance(batch, Tensor)]
    if not tensors or len(tensors) < len(batches):
        raise PyfoldError("data: expected a tensor, or batches that are tensors or begin with one")
    images = torch.cat(tensors)
    if len(images) < 2:
        raise PyfoldError(f"data: expected two samples at least, got {len(images)}")
    if not bool(torch.isfinite(images).all()):
        raise PyfoldError("data: expected finite values")
    return images


def _check_runs(module: nn.Module, folded: nn.Module, inputs: tuple[Any, ...]) -> None:
    advice = "its forward takes units for a fixed number of them; leave their layers out with layers="
    with torch.no_grad(), evaluating(module), evaluating(folded):
        try:
            after = folded(*_copied(inputs))
        except (RuntimeError, ValueError, IndexError) as error:
            raise PyfoldError(f"the folded module does not run ({error}): {advice}") from error
        before = module(*_copied(inputs))
    if isinstance(before, Tensor) and before.shape != after.shape:
        raise PyfoldError(f"the folded module gives {tuple(after.shape)} instead of {tuple(before.shape)}: {advice}")


def _report(
    module: nn.Module,
    folded: nn.Module,
    groups: Sequence[UnitGroup],
    clusters: dict[int, Clustering],
    notes: list[str],
    seconds: float,
    backend: str,
) -> FoldReport:
    def size(of: nn.Module) -> tuple[int, int]:
        every = [*of.parameters(), *of.buffers()]
        return sum(each.numel() for each in of.parameters()), sum(each.numel() * each.element_size() for each in every)

    before, after = size(module), size(folded)
    return FoldReport(
        path=None,
        profile="module",
        backend=next((each.backend for each in clusters.values()), backend),
        groups=[GroupReport.of(groups[number], each) for number, each in clusters.items()],
        parameters_before=before[0],
        parameters_after=after[0],
        bytes_before=before[1],
        bytes_after=after[1],
        notes=notes,
        seconds=seconds,
        peak_rss_bytes=peak_rss_bytes(),
    )
