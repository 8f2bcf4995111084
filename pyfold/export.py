"""A checkpoint, folded or not, written as what a serving stack reads."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from pyfold.errors import PyfoldError
from pyfold.io.checkpoint import INDEX, Checkpoint, open_checkpoint
from pyfold.io.destination import Destination, sync_folder
from pyfold.io.output import Output
from pyfold.io.safetensors import Reader, torch_dtype
from pyfold.plan import DTYPES, parse_size, split_shards
from pyfold.progress import Progress
from pyfold.report import how_to_load

Format = Literal["hf-stock", "gguf"]
FORMATS = ("hf-stock", "gguf")
GGUF_DTYPES = {**DTYPES, "q8_0": "Q8_0"}


@dataclass(frozen=True)
class ExportReport:
    """What :func:`export_checkpoint` wrote.

    Attributes
    ----------
    path : Path
    architecture : str
        What the engine takes it for: ``model_type``, or llama.cpp's name.
    n_tensors, n_parameters, n_bytes : int
        Of weights.
    types : dict of str to int
        How many tensors there are of each type.
    notes : list of str
        What was not done as asked, and why; what engines would like otherwise.
    seconds : float
    """

    path: Path
    architecture: str
    n_tensors: int
    n_parameters: int
    n_bytes: int
    types: dict[str, int]
    notes: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"path": str(self.path)}


def export_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    to: Format,
    dtype: str = "keep",
    multiple_of: int | None = None,
    tp: int | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a checkpoint in another format; one tensor at a time is in memory, and nothing is at ``destination`` until all is.

    Parameters
    ----------
    source : str or Path
        Checkpoint folder or Hugging Face model id; what ``fold_checkpoint`` wrote, or any of its families.
    destination : str or Path
        The folder; of ``gguf`` the file.
    to : {"hf-stock", "gguf"}
        ``hf-stock``: an ordinary checkpoint, layers that differ made alike by zeros, without loss. ``gguf``: for llama.cpp;
        layers of one width become the architecture that they are, layers that differ ``deci``.
    dtype : {"keep", "float32", "float16", "bfloat16", "q8_0"}
        Of the weights; ``q8_0``, and float32 for vectors whatever it says: of ``gguf``.
    multiple_of, tp : int, optional
        Of ``hf-stock``: the width is made a multiple; ``tp``: of 128 for each of so many devices, which share the heads.
    max_shard_size : int or str
        Of ``hf-stock``: largest file of weights.
    overwrite : bool
        Replace what is there, once the new one is complete.
    progress : callable, optional
        Called as ``progress(bytes_done, bytes_total, what)``.

    Raises
    ------
    ValueError
        If the format cannot say such a checkpoint; says why.
    """
    if to not in FORMATS:
        raise PyfoldError(f"to: expected one of {', '.join(FORMATS)}, got '{to}'")
    dtypes = GGUF_DTYPES if to == "gguf" else DTYPES
    if dtype not in dtypes:
        raise PyfoldError(f"dtype: expected one of {', '.join(dtypes)} for {to}, got '{dtype}'")
    for name, value in (("multiple_of", multiple_of), ("tp", tp)):
        if value is not None and (to == "gguf" or value < 1):
            raise PyfoldError(f"{name}: expected a positive number, with to='hf-stock', got {value}")
    if to == "gguf":
        return _gguf(source, Path(destination), dtype, overwrite, progress)
    return _stock(source, Path(destination), dtype, multiple_of, tp, max_shard_size, overwrite, progress)


def _gguf(source: str | Path, path: Path, dtype: str, overwrite: bool, progress: Progress | None) -> ExportReport:
    try:
        from pyfold.deliver import gguf
    except ImportError as error:
        raise PyfoldError(f"to gguf: cannot be imported ({error}); run pip install 'pyfold[gguf]'") from None
    began = time.perf_counter()
    if path.is_dir() or (path.exists() and not overwrite):
        raise PyfoldError(f"{path}: {'a folder; name a file' if path.is_dir() else 'exists; --overwrite replaces it'}")
    if not path.parent.is_dir():
        raise PyfoldError(f"{path.parent}: no such folder")
    checkpoint = open_checkpoint(source)
    model = gguf.Model.of(checkpoint)
    places = gguf.places(model, GGUF_DTYPES[dtype])
    sizes = {name: gguf.size(place.type, checkpoint.tensors[name].shape) for name, place in places.items()}
    part, done = path.with_name(f"{path.name}.part"), 0
    try:
        writer = gguf.open_writer(part, model, places)
        try:
            with Reader() as reader:
                for name, place in places.items():
                    if progress:
                        progress(done, sum(sizes.values()), "writing")
                    writer.write_tensor_data(gguf.converted(reader.read(checkpoint.tensors[name]), place))
                    done += sizes[name]
        finally:
            writer.close()
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)
    odd = [name for name, place in places.items() if dtype == "q8_0" and place.type == "F16"]
    return ExportReport(
        path=path,
        architecture=model.architecture,
        n_tensors=len(places),
        n_parameters=sum(checkpoint.tensors[name].n_parameters for name in places),
        n_bytes=sum(sizes.values()),
        types=dict(sorted(Counter(place.type for place in places.values()).items())),
        notes=[f"{len(odd)} matrices, as {odd[0]}, are F16: their rows are no multiple of 32, which Q8_0 wants"] if odd else [],
        seconds=time.perf_counter() - began,
    )


def _stock(
    source: str | Path,
    path: Path,
    dtype: str,
    multiple_of: int | None,
    tp: int | None,
    max_shard_size: int | str,
    overwrite: bool,
    progress: Progress | None,
) -> ExportReport:
    from pyfold.deliver import stock

    began = time.perf_counter()
    limit = parse_size(max_shard_size)
    checkpoint = open_checkpoint(source)
    found = stock.padded(checkpoint, multiple_of, tp)
    to = DTYPES[dtype]
    tensors = {name: (to or info.dtype, found.shapes[name]) for name, info in checkpoint.tensors.items()}
    shards = split_shards(tensors, limit)
    n_bytes = sum(prod(shape) * torch_dtype(kind).itemsize for kind, shape in tensors.values())
    files = [checkpoint.path / "config.json", *{info.path for info in checkpoint.tensors.values()}, *checkpoint.companions()]
    config = found.config
    if to:
        config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    with Destination(path, files, overwrite=overwrite, n_bytes=n_bytes) as stage:
        stage.begin({"export": "hf-stock"})
        done = 0
        with Output(stage.folder, tensors, shards, frozenset()) as output, Reader() as reader:
            for name, (kind, shape) in tensors.items():
                if progress:
                    progress(done, checkpoint.nbytes, "writing")
                tensor = stock.filled(reader.read(checkpoint.tensors[name]).to(torch_dtype(kind)), shape)
                matrix = tensor.view(-1, shape[-1] if len(shape) > 1 else tensor.numel())
                output.write(name, matrix, 0, 0, matrix.shape[1])
                done += checkpoint.tensors[name].nbytes
        _write_rest(stage, checkpoint, config, shards, n_bytes, found.n_parameters)
        stage.commit()
    return ExportReport(
        path=path,
        architecture=str(config["model_type"]),
        n_tensors=len(tensors),
        n_parameters=found.n_parameters,
        n_bytes=n_bytes,
        types=dict(sorted(Counter(kind for kind, _ in tensors.values()).items())),
        notes=found.notes,
        seconds=time.perf_counter() - began,
    )


def _write_rest(
    stage: Destination, checkpoint: Checkpoint, config: dict[str, Any], shards: dict[str, list[str]], n_bytes: int, n: int
) -> None:
    """Tokenizer and licences, custom code that is not pyfold's, model card, index and config."""
    from pyfold.deliver import huggingface

    copied = {file.name: file for file in checkpoint.companions()}
    copied |= {name: checkpoint.path / name for name in ("README.md", *huggingface.modules(config))}
    for name, file in copied.items():
        if file.is_file():
            shutil.copyfile(file, stage.folder / name)
    card = stage.folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="surrogateescape")
        text = text.replace(how_to_load("PATH", "per-layer"), how_to_load("PATH", "stock"))
        card.write_text(text, encoding="utf-8", errors="surrogateescape")
    if len(shards) > 1:
        weight_map = {name: shard for shard, names in shards.items() for name in names}
        index = {"metadata": {"total_parameters": n, "total_size": n_bytes}, "weight_map": weight_map}
        stage.write_text(INDEX, json.dumps(index, indent=2) + "\n")
    stage.write_text("config.json", json.dumps(config, indent=2) + "\n")
