"""The fold, start to finish: checkpoint -> fold groups -> Gram matrix -> clusters -> merge -> new checkpoint.

One group is in memory at a time; every other tensor streams through in pieces. The peak does not grow with the layers. What is
finished goes into a journal beside the result, and the same command goes on from there.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from pyfold import __version__, distributed, function_budget, function_plan, ops
from pyfold.budget import Budget, make_budget, packed_bytes
from pyfold.calibration import CACHE, Cache
from pyfold.clustering.regime import bytes_free
from pyfold.deliver import huggingface
from pyfold.errors import PyfoldError
from pyfold.families import Family, attention, family_of
from pyfold.families.activations import Activations, decoder
from pyfold.families.noise import Noise
from pyfold.function_fold import ByFunction
from pyfold.io.checkpoint import INDEX, Checkpoint, open_checkpoint
from pyfold.io.destination import Destination
from pyfold.io.output import Output
from pyfold.io.safetensors import TensorInfo
from pyfold.jobs import Finished, make_jobs, run_jobs
from pyfold.plan import Plan, least_parameters, make_plan, parse_size, ratios_by_layer
from pyfold.processor import Processor
from pyfold.progress import Progress
from pyfold.report import FoldReport, GpuReport, GroupReport, peak_rss_bytes, rss_bytes
from pyfold.streams import open_device
from pyfold.trace import Trace
from pyfold.variance import variance_bytes

METRICS = ("weight", "function")
REPAIRS = {"weight": ("none", "variance"), "function": ("ridge", "none")}  # of each metric, its default first
ALLOCATIONS = ("uniform", "auto")
PROFILES = ("per-layer", "stock")


def fold_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    ratio: float | Mapping[str, float] | None = None,
    width: int | None = None,
    target_params: int | str | None = None,
    target_bytes: int | str | None = None,
    heads_ratio: float = 0,
    allocate: str = "uniform",
    profile: str = "per-layer",
    layers: str | Iterable[int] | None = None,
    multiple_of: int | None = None,
    dtype: str = "keep",
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    host_memory: int | str | None = None,
    device: str = "cpu",
    gpu_memory: int | str | None = None,
    backend: str = "auto",
    metric: str = "weight",
    calibration: str | Path = "self",
    repair: str | None = None,
    seed: int = 0,
    trace: str | Path | None = None,
    ray: Literal[True] | str | None = None,
    progress: Progress | None = None,
    planned: Callable[[str], None] | None = None,
) -> FoldReport:
    """Fold the feed-forward layers of a checkpoint, and heads if asked to, and write a smaller one.

    Parameters
    ----------
    src : str or Path
        A checkpoint folder (safetensors or pytorch_model.bin) or a Hugging Face model id.
    dst : str or Path
        Folder to write; must be absent or empty unless ``overwrite``.
    ratio : float or dict of str to float, optional
        Share of the units of each folded group to remove, in [0, 1): K = floor((1 - ratio) N). Or such shares by layers, as in
        ``{"5-9": 0.1, "10-27": 0.3}``; the other layers are left.
    width : int, optional
        Instead of ``ratio``: units to keep in each folded group.
    target_params, target_bytes : int or str, optional
        Instead of ``ratio``: what the whole result may have at most, as in ``"110M"`` or ``"220MB"``.
    heads_ratio : float
        Share of the KV heads of each layer to remove with their query heads, in [0, 1): floor((1 - heads_ratio) n) stay (metric
        function, repair ridge, on the CPU).
    allocate : str
        ``uniform``: the same share of every group. ``auto``: what has to go goes where it does the least harm, as measured by
        the KL divergence of the whole model's output with one group folded (metric function).
    profile : str
        ``per-layer``: layers may differ in width. ``stock``: one width for all, so that the result loads without custom code.
    layers : str or iterable of int, optional
        Layers to fold, as in ``"5-27"`` or ``"0,2,5-9"``; all by default.
    multiple_of : int, optional
        Round each width to the nearest multiple.
    dtype : str
        ``keep``, ``float32``, ``float16`` or ``bfloat16`` for every floating-point tensor of the result.
    max_shard_size : int or str
        Largest file of weights, as in ``"5GB"``.
    overwrite : bool
        Replace a checkpoint at ``dst``; the old one survives until the new one is complete.
    host_memory : int or str, optional
        Bytes this process may take at most, interpreter and imports included, as in ``"2GiB"``; by default what is free.
        Weights that do not fit are read in pieces; the result is the same.
    device : str
        What computes: ``cpu``, ``cuda`` or ``cuda:N``. The result of a GPU differs from a CPU's within rounding.
    gpu_memory : int or str, optional
        Bytes of the GPU that tensors may take at most, beside its context and libraries; by default what is free. A Gram matrix
        that does not fit is computed in strips there and clustered on the host, which may change the result within rounding.
    backend : str
        ``auto``, or a name from :func:`pyfold.ops.backends`, of what computes on the host.
    metric : str
        ``weight``: units are alike if their weights are, and merge to their mean. ``function``: if what they say on some tokens
        is, and the strongest stands for the others, whose consumers make up for the rest; layer by layer.
    calibration : str or Path
        What units of the function metric are seen on: ``self``, text that the model writes itself (and that is kept in
        ``DST.pyfold-calibration.json``), a file of text, or ``none``: Gaussian noise through the norm before them.
    repair : str, optional
        Of the function metric: ``ridge``, consumers are regressed on the units that stay, by default, or ``none``. Of the
        weight metric: ``none``, by default, or ``variance``, consumers are scaled so that their output keeps the variance that
        it has on noise through the norm before the units.
    seed : int
        Of the text that the model writes itself, or of the noise.
    trace : str or Path, optional
        File to write a timeline of reading, computing and writing to, which Perfetto opens (Chrome's trace event format).
    ray : True or str, optional
        Fold the groups as tasks on Ray, to the same bytes: on the cluster at an address; for True on the one that RAY_ADDRESS
        names or that runs here, else on this machine. All nodes must see source and destination. ``host_memory`` is then for
        each task.
    progress : callable, optional
        Called as ``progress(done, total, what)``: bytes of source weights, or what ``what`` names behind a comma.
    planned : callable, optional
        Called with the profile of the result, ``stock`` or ``per-layer``, before a weight is read.

    Returns
    -------
    FoldReport

    Raises
    ------
    PyfoldError
        A ValueError: for a bad option or a bad source, in one line that names file and tensor. ``dst`` is then untouched.
    OSError
        If reading or writing fails. ``dst`` is then untouched, and the same call continues where this one stopped.

    Notes
    -----
    Features of unit i: its gate and up rows, their biases, its down column. Clusters: :func:`pyfold.cluster`. Merge: rows are
    averaged, columns summed (Wang et al., "Forget the Data and Fine-Tuning! Just Fold the Network to Compress", ICLR 2025).
    The function metric: :mod:`pyfold.function_metric`; its result also depends on torch and its threads, and on a GPU on
    gradients that are not the same to the bit from run to run. They are kept beside ``dst``, so that a run can go on.
    The bytes of the result depend on the source's files, the options, the backend and its SIMD level alone; with a GPU, on its
    kind, the versions of torch and CUDA, the workspace that CUBLAS_WORKSPACE_CONFIG gives cuBLAS, and which groups the host
    clusters, all of which the record names. A source asked for by a hub id is named as base_model in
    the model card.
    """
    started = time.perf_counter()
    if ray:
        if metric != "weight":
            raise PyfoldError(
                "ray: layers are folded one after another in the function metric, and not as tasks; use metric weight"
            )
        if device != "cpu":
            raise PyfoldError(f"ray: tasks compute on CPUs, got device {device}")
        distributed.require_ray()
    prepared = prepare(
        src,
        ratio=ratio,
        width=width,
        target_params=target_params,
        target_bytes=target_bytes,
        heads_ratio=heads_ratio,
        allocate=allocate,
        profile=profile,
        layers=layers,
        multiple_of=multiple_of,
        dtype=dtype,
        max_shard_size=max_shard_size,
        host_memory=host_memory,
        device=device,
        gpu_memory=gpu_memory,
        backend=backend,
        metric=metric,
        calibration=calibration,
        repair=repair,
        seed=seed,
        beside=distributed.WORKER if ray else 0,
    )
    checkpoint, family = prepared.checkpoint, prepared.family
    companions = checkpoint.companions()
    sources = [checkpoint.path / "config.json", *{info.path for info in checkpoint.tensors.values()}, *companions]
    if trace is not None and Path(trace).exists() and Path(trace).resolve() in {file.resolve() for file in sources}:
        raise PyfoldError(f"{trace}: the trace would replace a file of the source; choose another")
    stamps = _stamps(sources)
    license = huggingface.source_license(checkpoint)
    n_bytes = prepared.plan.nbytes + prepared.budget.spilled
    with Trace(trace) as timeline, Destination(Path(dst), sources, overwrite=overwrite, n_bytes=n_bytes) as stage:
        seen = None
        stage.check(_identity(prepared, stamps))
        if planned:
            alike = prepared.plan.uniform and (allocate == "uniform" or profile == "stock")
            planned("stock" if alike else "per-layer")
        if prepared.text not in (None, "none"):
            with prepared.processor.at_work():
                seen, prepared = _see(prepared, str(calibration), Path(dst).absolute(), stamps, seed, progress)
        plan, options = prepared.plan, prepared.options
        backend, gpu = prepared.computed_by, prepared.processor.gpu
        config = huggingface.patched_config(checkpoint, family, plan, dtype)
        stage.begin(_identity(prepared, stamps))
        groups, source, result = _write_weights(prepared, stage, progress, timeline, ray, seen)
        for file in companions:
            shutil.copyfile(file, stage.folder / file.name)
        for module in sorted(huggingface.modules(config)):
            if module == huggingface.MODELING:
                stage.write_text(module, huggingface.modeling_file(family))
            elif (checkpoint.path / module).is_file():
                shutil.copyfile(checkpoint.path / module, stage.folder / module)
        if len(plan.shards) > 1:
            stage.write_text(INDEX, _json(huggingface.index(plan)))
        stage.write_text("README.md", huggingface.model_card(checkpoint, family, plan, options, groups, license))
        stage.write_text("pyfold.json", _json(huggingface.identity(checkpoint, plan, options, backend, groups, source, result)))
        stage.write_text("config.json", _json(config))
        report = FoldReport(
            path=Path(dst),
            profile="stock" if plan.uniform else "per-layer",
            backend=backend,
            groups=groups,
            parameters_before=checkpoint.n_parameters,
            parameters_after=plan.n_parameters,
            bytes_before=checkpoint.nbytes,
            bytes_after=plan.nbytes,
            notes=plan.notes,
            seconds=time.perf_counter() - started,
            peak_rss_bytes=peak_rss_bytes(),
            gpu=GpuReport(gpu.name, gpu.peak(), prepared.gpu_peak, gpu.held) if gpu else None,
        )
        stage.write_text("pyfold-run.json", _json(_run_record(checkpoint, report)))
        changed = [name for name, stamp in _stamps(sources).items() if stamp != stamps[name]]
        if changed:
            raise PyfoldError(f"{checkpoint.path / changed[0]}: changed while it was being folded; fold it again")
        with timeline("commit"):
            stage.commit()
    return report


@dataclass(frozen=True)
class Prepared:
    """A fold before a weight is read: what, to what, in how much memory, what computes (beside the host's ``backend``), the
    options on which its bytes depend, and, by function, the text: ``self``, a file, or ``none``."""

    checkpoint: Checkpoint
    family: Family
    plan: Plan
    budget: Budget
    processor: Processor
    backend: str
    options: dict[str, Any]
    text: str | None
    auto: bool
    profile: str
    replan: Callable[[Mapping[int, int]], tuple[Plan, Budget]]

    @property
    def gpu_peak(self) -> int:
        """Bytes of a GPU that can be taken at most: by function the limit, for torch keeps what it may need again."""
        return self.processor.limit if self.text else self.budget.gpu_peak or 0

    @property
    def computed_by(self) -> str:
        """The backends on whose numbers the result depends."""
        if self.processor.gpu is None:
            return self.backend
        on_host = self.budget.clustered_on_host or self.options.get("repair") == "variance"
        return f"{self.processor.backend}+{self.backend}" if on_host else self.processor.backend


def prepare(
    src: str | Path,
    *,
    ratio: float | Mapping[str, float] | None,
    width: int | None,
    target_params: int | str | None = None,
    target_bytes: int | str | None = None,
    heads_ratio: float = 0,
    allocate: str = "uniform",
    profile: str = "per-layer",
    layers: str | Iterable[int] | None,
    multiple_of: int | None,
    dtype: str,
    max_shard_size: int | str,
    host_memory: int | str | None,
    device: str = "cpu",
    gpu_memory: int | str | None = None,
    backend: str,
    metric: str = "weight",
    calibration: str | Path = "self",
    repair: str | None = None,
    seed: int = 0,
    beside: int = 0,
) -> Prepared:
    """Read headers, settle every option. Arguments and errors as in :func:`fold_checkpoint`.

    ``beside``: bytes that the process that folds holds and this one does not.
    """
    for what, given, known in (
        ("metric", metric, METRICS),
        ("allocate", allocate, ALLOCATIONS),
        ("profile", profile, PROFILES),
    ):
        if given not in known:
            raise PyfoldError(f"{what}: expected {' or '.join(known)}, got '{given}'")
    repair = REPAIRS[metric][0] if repair is None else repair
    if repair not in REPAIRS[metric]:
        raise PyfoldError(f"repair: expected {' or '.join(REPAIRS[metric])} of metric {metric}, got '{repair}'")
    if allocate == "auto" and metric != "function":
        raise PyfoldError("allocate: auto measures on text what each group is worth; it needs metric function")
    if allocate == "auto" and width is not None:
        raise PyfoldError("allocate: auto finds the widths; give ratio, target_params or target_bytes")
    if not 0 <= seed < 1 << 63:
        raise PyfoldError(f"seed: expected 0 to 2^63 - 1, got {seed}")
    targets = {"target_params": target_params, "target_bytes": target_bytes}
    if heads_ratio and any(target is not None for target in targets.values()):
        raise PyfoldError("heads_ratio: a target is for the feed-forward layers; give ratio or width")
    if metric == "weight" and str(calibration) not in ("self", "none"):
        raise PyfoldError(f"calibration: {calibration} is for metric function; the weight metric sees no text")
    noise = metric == "function" and str(calibration) == "none"
    if heads_ratio and (metric != "function" or repair != "ridge" or noise):
        raise PyfoldError(
            "heads_ratio: heads are folded by what they do on text, and o_proj regressed; it needs metric function, repair "
            f"ridge and calibration self, or a file, got {metric}, {repair} and {calibration}"
        )
    if noise and allocate == "auto":
        raise PyfoldError("allocate: auto measures on text what each group is worth; it needs calibration self, or a file")
    if metric == "function" and str(calibration) not in ("self", "none") and not Path(calibration).is_file():
        raise PyfoldError(f"{calibration}: cannot read the calibration text: there is no such file")
    if heads_ratio and device != "cpu":
        raise PyfoldError(f"heads_ratio: heads are folded on the CPU, got device {device}")
    if device == "cpu" and gpu_memory is not None:
        raise PyfoldError("gpu_memory: needs device cuda, got device cpu")
    checkpoint = open_checkpoint(src)
    family = family_of(checkpoint)
    groups = family.fold_groups(checkpoint)
    share: float | dict[int, float] | None
    if isinstance(ratio, Mapping):
        if layers is not None:
            raise PyfoldError("layers: a ratio by layers says which already; give one of them")
        share = ratios_by_layer(ratio, len(groups))
        layers = list(share)
    else:
        share = None if ratio is None else float(ratio)
    planned = partial(
        make_plan,
        checkpoint,
        groups,
        family.attention(checkpoint) if heads_ratio or attention.differ(checkpoint.config) else [],
        heads_ratio=heads_ratio,
        ratio=share,
        width=width,
        target_params=target_params,
        target_bytes=target_bytes,
        layers=layers,
        multiple_of=multiple_of,
        dtype=dtype,
        max_shard_size=max_shard_size,
    )
    plan = planned()
    least = least_parameters(checkpoint, plan, multiple_of or 1)
    if allocate == "auto" and least > plan.room:
        raise PyfoldError(
            f"allocate: {multiple_of or 1} units a group have {least:,} parameters, and there is room for {plan.room:,}"
        )
    if plan.heads:
        huggingface.patched_config(checkpoint, family, plan, dtype)  # before anything long: what no config can say
    if profile == "stock" and not plan.uniform:
        raise PyfoldError("profile: stock is one width, and one number of heads, for all layers; fold all of them alike")
    options: dict[str, Any] = {
        "ratio": {str(layer): one for layer, one in share.items()} if isinstance(share, dict) else share,
        "width": width,
        **{what: parse_size(given, what) for what, given in targets.items() if given is not None},
        "layers": [group.layer for group, _ in plan.groups],
        "multiple_of": multiple_of,
        "dtype": dtype,
        "max_shard_size": parse_size(max_shard_size),
    }
    backend = ops.resolve(backend)
    gpu = open_device(device)
    if metric == "function":
        decoder(checkpoint)  # what it imports is there when memory is measured
    held = rss_bytes() + beside
    limit = held + bytes_free(torch.device("cpu")) if host_memory is None else parse_size(host_memory, "host_memory")
    processor = Processor(backend, limit)
    if gpu:
        processor = Processor(gpu.backend, gpu.free() if gpu_memory is None else parse_size(gpu_memory, "gpu_memory"), gpu)
    in_layers = None
    if repair == "variance":
        options |= {"repair": repair}
        in_layers = {group.name: variance_bytes(checkpoint, group) for group, _ in plan.groups}
        if gpu:  # the sketch is made on the host
            in_layers = {group.name: in_layers[group.name] + packed_bytes(group.width) for group, _ in plan.groups}
    if metric == "function":
        options |= {"metric": metric, "repair": repair}
        if noise:
            options |= {"calibration": "none"}
        if str(calibration) in ("self", "none"):
            options |= {"seed": seed}
        if allocate == "auto":
            options |= {"allocate": allocate}
        if plan.heads:
            options |= {"heads_ratio": float(heads_ratio)}
        widths = {group.name: group.width if allocate == "auto" else k for group, k in plan.groups}  # auto: up to all units
        needs = function_budget.on_noise if noise else function_budget.folding
        in_layers = {group.name: needs(checkpoint, group, widths[group.name], processor.dtype) for group, _ in plan.groups}
        heads = function_budget.folding_heads(checkpoint, plan.heads)
        in_layers = {name: max(heads, nbytes) for name, nbytes in in_layers.items()}
    budgeted = partial(
        make_budget,
        checkpoint,
        spills=backend.startswith("cpu"),
        gpu_memory=processor.limit if gpu else None,
        beside=in_layers,
        by_function=metric == "function",
    )
    budget = budgeted(plan, limit, held)

    def replan(widths: Mapping[int, int]) -> tuple[Plan, Budget]:
        plan = planned(widths=widths)
        return plan, budgeted(plan, limit, held)

    if gpu:
        options |= {"device": gpu.name, "libraries": gpu.libraries, "clustered_on_host": budget.clustered_on_host}
    text, auto = str(calibration) if metric == "function" else None, allocate == "auto"
    return Prepared(checkpoint, family, plan, budget, processor, backend, options, text, auto, profile, replan)


def _see(
    prepared: Prepared, text: str, dst: Path, stamps: dict[str, list[int]], seed: int, progress: Progress | None
) -> tuple[function_plan.Seen, Prepared]:
    """What the function metric needs, and the fold with what follows from it: the widths, if they are to be found."""
    checkpoint, plan, options = prepared.checkpoint, prepared.plan, prepared.options
    cache = Cache(dst.with_name(dst.name + CACHE))
    seen = function_plan.see(checkpoint, text, cache, stamps, seed=seed, processor=prepared.processor, progress=progress)
    options = options | seen.identity
    if not prepared.auto:
        return seen, replace(prepared, options=options)
    widths, notes = function_plan.find_widths(
        checkpoint,
        plan,
        seen,
        cache,
        multiple_of=options["multiple_of"] or 1,
        common=prepared.profile == "stock",
        ridge=options["repair"] == "ridge",
        processor=prepared.processor,
        progress=progress,
    )
    plan, budget = prepared.replan({group.layer: width for (group, _), width in zip(plan.groups, widths, strict=True)})
    plan = replace(plan, notes=plan.notes + notes)
    return seen, replace(prepared, plan=plan, budget=budget, options=options | {"widths": widths})


def _write_weights(
    prepared: Prepared,
    stage: Destination,
    progress: Progress | None,
    trace: Trace,
    ray: Literal[True] | str | None,
    seen: function_plan.Seen | None,
) -> tuple[list[GroupReport], dict[str, str], dict[str, str]]:
    """Do every job that no earlier run has done. Returns the groups' reports, the hashes of what was read and written."""
    checkpoint, plan = prepared.checkpoint, prepared.plan
    reports: dict[str, GroupReport] = {}
    source: dict[str, str] = {}
    result: dict[str, str] = {}

    def note(finished: Finished) -> None:
        source.update(finished.source)
        result.update(finished.result)
        if finished.group:
            reports[finished.group.name] = finished.group

    def record(finished: Finished) -> None:
        stage.journal.append(finished.to_dict())
        note(finished)

    for entry in stage.journal.done:  # of a run that was stopped
        if "result" in entry:
            note(Finished.from_dict(entry))
    done = sum(checkpoint.tensors[name].nbytes for name in source)

    def advance(n_bytes: int, what: str) -> None:
        nonlocal done
        done += n_bytes
        if progress:
            progress(done, checkpoint.nbytes, what)

    jobs = make_jobs(checkpoint, plan, source, keeps_variance=prepared.options.get("repair") == "variance")
    finished = frozenset(source)
    limited = prepared.processor.at_work() if prepared.text else prepared.processor.limited()
    with limited, Output(stage.folder, plan.tensors, plan.shards, finished) as output:
        function = _by_function(prepared, output, seen, finished) if "metric" in prepared.options else None
        if ray:
            run = partial(distributed.run_jobs, ray if isinstance(ray, str) else None)
        else:
            run = partial(run_jobs, gpu=prepared.processor.gpu, function=function)
        with closing(function.activations) if function else nullcontext():
            run(jobs, output, plan, prepared.budget, prepared.backend, record=record, advance=advance, trace=trace)
    assert result.keys() == plan.tensors.keys(), f"not written: {plan.tensors.keys() - result.keys()}"
    advance(0, "done")
    return [reports[name] for name in plan.folds], source, result


def _by_function(prepared: Prepared, output: Output, seen: function_plan.Seen | None, finished: frozenset[str]) -> ByFunction:
    """Without what was seen of text, on noise. Tensors ``finished`` by a run that was stopped are seen as they were folded."""

    def place(name: str) -> TensorInfo:
        return output.place(name) if name in finished else prepared.checkpoint.tensors[name]

    checkpoint, processor, options = prepared.checkpoint, prepared.processor, prepared.options
    ridge = options["repair"] == "ridge"
    if seen is None:
        noise = Noise(checkpoint, options["seed"], processor.dtype, processor.device)
        return ByFunction(noise, None, ridge, processor)
    activations = Activations(checkpoint, seen.text.tokens, place, processor.dtype, processor.device)
    return ByFunction(activations, seen.information, ridge, processor)


def _identity(prepared: Prepared, stamps: dict[str, list[int]]) -> dict[str, Any]:
    """JSON values on which the bytes of the result depend."""
    return {"pyfold": __version__, "options": prepared.options, "backend": prepared.computed_by, "sources": stamps}


def _stamps(files: Iterable[Path]) -> dict[str, list[int]]:
    """Size and time of change of every file, by its name."""
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)}


def _run_record(checkpoint: Checkpoint, report: FoldReport) -> dict[str, Any]:
    """pyfold-run.json: what depends on the run; not part of the result's identity."""
    return {
        "source": str(checkpoint.path.resolve()),
        "seconds": report.seconds,
        "peak_rss_bytes": report.peak_rss_bytes,
        **({"gpu": vars(report.gpu)} if report.gpu else {}),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyfold": __version__,
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
