"""The fold, start to finish: checkpoint -> fold groups -> Gram matrix -> clusters -> merge -> new checkpoint.

One group is in memory at a time; every other tensor streams through in pieces. The peak does not grow with the layers. What is
finished goes into a journal beside the result, and the same command goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfold import __version__, ops
from pyfold.budget import PIECE, Budget, make_budget
from pyfold.clustering import cluster
from pyfold.clustering.regime import bytes_free
from pyfold.deliver import huggingface
from pyfold.errors import PyfoldError
from pyfold.families import FoldGroup, family_of
from pyfold.io.checkpoint import INDEX, Checkpoint, open_checkpoint
from pyfold.io.destination import Destination, sync_folder
from pyfold.io.safetensors import ITEM_SIZE, Reader, Shard, TensorInfo, as_bytes, torch_dtype
from pyfold.plan import Plan, make_plan, parse_size
from pyfold.report import FoldReport, GroupReport, peak_rss_bytes, rss_bytes

_RECORDED = 1 << 28  # bytes of tensors outside the groups that are written between two lines of the journal
# done, total, what: called as work proceeds, in bytes of source weights.
Progress = Callable[[int, int, str], None]


def fold_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    ratio: float | None = None,
    width: int | None = None,
    layers: str | Iterable[int] | None = None,
    multiple_of: int | None = None,
    dtype: str = "keep",
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    host_memory: int | str | None = None,
    backend: str = "auto",
    progress: Progress | None = None,
) -> FoldReport:
    """Fold the feed-forward layers of a checkpoint and write a smaller one.

    Parameters
    ----------
    src : str or Path
        A checkpoint folder (safetensors or pytorch_model.bin) or a Hugging Face model id.
    dst : str or Path
        Folder to write; must be absent or empty unless ``overwrite``.
    ratio : float, optional
        Share of the units of each folded group to remove, in [0, 1): K = floor((1 - ratio) N).
    width : int, optional
        Instead of ``ratio``: units to keep in each folded group.
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
    backend : str
        ``auto``, or a name from :func:`pyfold.ops.backends`.
    progress : callable, optional
        Called as ``progress(bytes_done, bytes_total, what)``.

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
    The bytes of the result depend on the source's files, the options, the backend and its SIMD level alone; a source asked for
    by a hub id is named as base_model in the model card.
    """
    started = time.perf_counter()
    checkpoint = open_checkpoint(src)
    family = family_of(checkpoint)
    plan = make_plan(
        checkpoint,
        family.fold_groups(checkpoint),
        ratio=ratio,
        width=width,
        layers=layers,
        multiple_of=multiple_of,
        dtype=dtype,
        max_shard_size=max_shard_size,
    )
    config = huggingface.patched_config(checkpoint, family, plan, dtype)
    backend = ops.resolve(backend)
    held = rss_bytes()
    limit = held + bytes_free(torch.device("cpu")) if host_memory is None else parse_size(host_memory, "host_memory")
    budget = make_budget(checkpoint, plan, limit, held)
    license = huggingface.source_license(checkpoint)
    options = {
        "ratio": None if ratio is None else float(ratio),
        "width": width,
        "layers": [group.layer for group, _ in plan.groups],
        "multiple_of": multiple_of,
        "dtype": dtype,
        "max_shard_size": parse_size(max_shard_size),
    }
    sources = [checkpoint.path / "config.json", *{info.path for info in checkpoint.tensors.values()}, *checkpoint.companions()]
    stamps = _stamps(sources)
    identity = {"pyfold": __version__, "options": options, "backend": backend, "sources": stamps}
    with Destination(Path(dst), sources, identity=identity, overwrite=overwrite, n_bytes=plan.nbytes) as stage:
        groups, hashes = _write_weights(checkpoint, plan, budget, stage, backend, progress)
        for file in checkpoint.companions():
            shutil.copyfile(file, stage.folder / file.name)
        for module in sorted(huggingface.modules(config)):
            if module == huggingface.MODELING:
                stage.write_text(module, huggingface.modeling_file(family))
            elif (checkpoint.path / module).is_file():
                shutil.copyfile(checkpoint.path / module, stage.folder / module)
        if len(plan.shards) > 1:
            stage.write_text(INDEX, _json(huggingface.index(plan)))
        stage.write_text("README.md", huggingface.model_card(checkpoint, family, plan, options, groups, license))
        stage.write_text("pyfold.json", _json(huggingface.identity(checkpoint, plan, options, backend, groups, *hashes)))
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
        )
        stage.write_text("pyfold-run.json", _json(_run_record(checkpoint, report)))
        changed = [name for name, stamp in _stamps(sources).items() if stamp != stamps[name]]
        if changed:
            raise PyfoldError(f"{checkpoint.path / changed[0]}: changed while it was being folded; fold it again")
        stage.commit()
    return report


class _Hashes(NamedTuple):
    """Name -> SHA-256 of the tensors read, and of those written."""

    source: dict[str, str]
    result: dict[str, str]

    def add(self, source: dict[str, str], result: dict[str, str]) -> None:
        self.source.update(source)
        self.result.update(result)


def _write_weights(
    checkpoint: Checkpoint, plan: Plan, budget: Budget, stage: Destination, backend: str, progress: Progress | None
) -> tuple[list[GroupReport], _Hashes]:
    """Fold every planned group and copy every other tensor. Returns the groups' reports and the tensors' hashes."""
    reports: dict[str, GroupReport] = {}
    hashes = _Hashes({}, {})
    for entry in stage.journal.done:  # of a run that was stopped
        if "group" in entry:
            reports[entry["group"]["name"]] = GroupReport(**entry["group"])
        if "sha256" in entry:
            hashes.add(**entry["sha256"])
    folded = {name for group, _ in plan.groups for name in group.tensors}
    done = sum(checkpoint.tensors[name].nbytes for name in hashes.source)
    with ExitStack() as stack:
        reader = stack.enter_context(Reader())
        writer = stack.enter_context(_Writer(stage.folder, plan, frozenset(hashes.source)))

        def record(new: _Hashes, **entry: Any) -> None:
            writer.sync()
            stage.journal.append({"sha256": new._asdict(), **entry})
            hashes.add(*new)

        for group, k in plan.groups:
            if group.name in reports:
                continue
            members = {name: checkpoint.tensors[name] for name in group.tensors}
            if progress:
                progress(done, checkpoint.nbytes, group.name)
            new = _Hashes({}, {})
            features = budget.groups[group.name].features
            reports[group.name] = _fold_group(group, k, members, features, reader, writer, new, backend)
            record(new, group=vars(reports[group.name]))
            done += sum(info.nbytes for info in members.values())
        others = [info for name, info in checkpoint.tensors.items() if name not in folded and name not in hashes.source]
        new, new_bytes = _Hashes({}, {}), 0
        for info in others:
            if progress:
                progress(done, checkpoint.nbytes, "other weights")
            _copy(info, reader, writer, new, backend)
            new_bytes += info.nbytes
            done += info.nbytes
            if new_bytes >= _RECORDED or info is others[-1]:
                record(new)
                new, new_bytes = _Hashes({}, {}), 0
        if progress:
            progress(done, checkpoint.nbytes, "done")
    return [reports[group.name] for group, _ in plan.groups], hashes


def _fold_group(
    group: FoldGroup,
    k: int,
    members: dict[str, TensorInfo],
    features: int | None,
    reader: Reader,
    writer: _Writer,
    hashes: _Hashes,
    backend: str,
) -> GroupReport:
    """Read a group, cluster its units, write its members merged.

    Weights are held from the one to the other, or, where ``features`` is given, read twice in pieces of so many features.
    """
    gram = torch.empty((group.width, group.width), dtype=torch.float32)
    held: dict[str, Tensor] = {}
    accumulate = False
    # In the group's own order, which fixes the order of summation whatever the shard layout.
    for name, info in members.items():
        spans = _spans(info, group, features)
        if len(spans) > 1:
            hashes.source[name] = _sha256(reader, info, backend)
        for span in spans:
            piece = _read(reader, info, group, span)
            if len(spans) == 1:
                hashes.source[name] = hashlib.sha256(as_bytes(piece)).hexdigest()
                _check_finite(info, piece, 0, backend)
            if features is None:
                held[name] = piece
            matrix = piece.unsqueeze(1) if piece.dim() == 1 else piece
            ops.gram(matrix, out=gram, accumulate=accumulate, transposed=name in group.consumers, backend=backend)
            accumulate = True
            del piece, matrix
    try:
        clusters = cluster(gram=gram, n_clusters=k, overwrite_gram=True, backend=backend)
    except ValueError as error:
        raise PyfoldError(f"{members[group.producers[0]].path}: {group.name} cannot be clustered: {error}") from None
    del gram
    for name, info in members.items():
        merge = ops.merge_columns if name in group.consumers else ops.merge_rows
        spans = _spans(info, group, features)
        for span in spans:
            piece = held.pop(name) if held else _read(reader, info, group, span)
            merged = merge(piece, clusters.labels, k, dtype=writer.dtype(name), backend=backend)
            del piece
            _check_finite(info, merged, 0, backend, "folded")
            writer.write_piece(name, merged, span[0], by_rows=name in group.consumers or merged.dim() == 1)
        whole = hashlib.sha256(as_bytes(merged)).hexdigest() if len(spans) == 1 else None
        hashes.result[name] = whole or _sha256(reader, writer.place(name), backend)
    return GroupReport(
        name=group.name,
        layer=group.layer,
        width=group.width,
        folded_width=k,
        inertia=clusters.inertia,
        ward_inertia=clusters.ward_inertia,
        total_inertia=clusters.total_inertia,
        n_moves=clusters.n_moves,
        n_singletons=int((torch.bincount(clusters.labels) == 1).sum()),
    )


def _spans(info: TensorInfo, group: FoldGroup, features: int | None) -> list[tuple[int, int]]:
    """The features of a member, cut."""
    extent = info.n_parameters // group.width
    step = features or extent
    return [(begin, min(begin + step, extent)) for begin in range(0, extent, step)]


def _read(reader: Reader, info: TensorInfo, group: FoldGroup, span: tuple[int, int]) -> Tensor:
    """Some features of a member: rows of a consumer, columns of a producer."""
    if span == (0, info.n_parameters // group.width):
        return reader.read(info)
    return reader.rows(info, *span) if info.name in group.consumers else reader.columns(info, *span)


def _sha256(reader: Reader, info: TensorInfo, backend: str) -> str:
    """Of a tensor on the disk, all of whose numbers must be finite."""
    digest = hashlib.sha256()
    for at, piece in reader.chunks(info):
        digest.update(as_bytes(piece))
        _check_finite(info, piece, at, backend)
    return digest.hexdigest()


def _copy(info: TensorInfo, reader: Reader, writer: _Writer, hashes: _Hashes, backend: str) -> None:
    """Stream a tensor outside every folded group through, in pieces."""
    read, written = hashlib.sha256(), hashlib.sha256()
    to = writer.dtype(info.name)
    if info.n_parameters == 0:
        writer.write(info.name, torch.empty(info.shape, dtype=to))
    for at, piece in reader.chunks(info, PIECE):
        read.update(as_bytes(piece))
        _check_finite(info, piece, at, backend)
        if to != piece.dtype:
            piece = piece.to(to)
            _check_finite(info, piece, at, backend, f"as {to}")
            written.update(as_bytes(piece))
        writer.write(info.name, piece, at)
    hashes.source[info.name] = read.hexdigest()
    hashes.result[info.name] = (read if to == torch_dtype(info.dtype) else written).hexdigest()


def _check_finite(info: TensorInfo, values: Tensor, at: int, backend: str, what: str = "") -> None:
    if values.dtype not in ops.FLOATS:
        return
    bad = ops.first_nonfinite(values, backend=backend)
    if bad is not None:
        value = values.flatten()[bad].item()
        raise PyfoldError(f"{info.path}: tensor '{info.name}' holds {value} {what or 'in the source'} at element {at + bad}")


class _Writer:
    """The planned output shards, open until each is complete."""

    def __init__(self, folder: Path, plan: Plan, written: frozenset[str]) -> None:
        """Tensors already ``written``, by a run that was stopped, are on the disk."""
        self._plan = plan
        self._shard_of = {name: shard for shard, names in plan.shards.items() for name in names}
        self._folder = folder
        self._written = written
        self._open: dict[str, Shard] = {}
        self._places: dict[str, TensorInfo] = {}
        self._closed = {shard for shard, names in plan.shards.items() if written.issuperset(names)}
        for shard in {self._shard_of[name] for name in written}:
            if not (folder / shard).exists():
                raise PyfoldError(f"{folder / shard}: written by a run that was stopped, and gone; remove {folder.parent}")

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        for shard in self._open.values():
            shard.close()
        if kind is None:
            assert self._closed == set(self._plan.shards), f"shards left incomplete: {set(self._plan.shards) - self._closed}"

    def dtype(self, name: str) -> torch.dtype:
        return torch_dtype(self._plan.tensors[name][0])

    def write(self, name: str, tensor: Tensor, at: int = 0) -> None:
        """Write a tensor, or the piece of it that starts at element ``at``."""
        shard_name = self._shard_of[name]
        self._shard(shard_name).write(name, tensor, at * ITEM_SIZE[self._plan.tensors[name][0]])
        self._settle(shard_name)

    def write_piece(self, name: str, tensor: Tensor, begin: int, *, by_rows: bool) -> None:
        """Write the rows, or else the columns, of a tensor that start at ``begin``."""
        if by_rows:
            return self.write(name, tensor, begin * (tensor.numel() // max(1, tensor.shape[0])))
        shard_name = self._shard_of[name]
        self._shard(shard_name).write_columns(name, tensor, begin)
        self._settle(shard_name)

    def place(self, name: str) -> TensorInfo:
        """Where in the result a tensor is."""
        return self._places[name]

    def _shard(self, shard_name: str) -> Shard:
        if shard_name not in self._open:
            layout = {member: self._plan.tensors[member] for member in self._plan.shards[shard_name]}
            shard = self._open[shard_name] = Shard(self._folder / shard_name, layout, self._written)
            self._places.update({member: shard.place(member) for member in layout})
        return self._open[shard_name]

    def _settle(self, shard_name: str) -> None:
        """Put a complete shard on the disk."""
        shard = self._open[shard_name]
        if shard.complete:
            shard.sync()
            self._open.pop(shard_name).close()
            self._closed.add(shard_name)

    def sync(self) -> None:
        """All that has been written outlives the machine once this returns."""
        for shard in self._open.values():
            shard.sync()
        sync_folder(self._folder)


def _stamps(files: Iterable[Path]) -> dict[str, list[int]]:
    """Size and time of change of every file, by its name."""
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)}


def _run_record(checkpoint: Checkpoint, report: FoldReport) -> dict[str, Any]:
    """pyfold-run.json: what depends on the run; not part of the result's identity."""
    return {
        "source": str(checkpoint.path.resolve()),
        "seconds": report.seconds,
        "peak_rss_bytes": report.peak_rss_bytes,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyfold": __version__,
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
