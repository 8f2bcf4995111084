"""A checkpoint, folded or not, written as what a serving stack reads."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pyfold.errors import PyfoldError
from pyfold.io.checkpoint import open_checkpoint
from pyfold.io.destination import sync_folder
from pyfold.io.safetensors import Reader
from pyfold.progress import Progress

Format = Literal["gguf"]
FORMATS = ("gguf",)
# --dtype -> the type in a GGUF file
DTYPES = {"keep": None, "float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}


@dataclass(frozen=True)
class ExportReport:
    """What :func:`export_checkpoint` wrote.

    Attributes
    ----------
    path : Path
    architecture : str
        What the engine takes it for.
    n_tensors, n_bytes : int
        Of weights.
    types : dict of str to int
        How many tensors there are of each type.
    notes : list of str
        What was not done as asked, and why.
    seconds : float
    """

    path: Path
    architecture: str
    n_tensors: int
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
    to: Format = "gguf",
    dtype: str = "keep",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a checkpoint in another format; one tensor at a time is in memory, and nothing is at ``destination`` until all is.

    Parameters
    ----------
    source : str or Path
        Checkpoint folder or Hugging Face model id; what ``fold_checkpoint`` wrote, or any of its families.
    destination : str or Path
        The file.
    to : {"gguf"}
        ``gguf``: for llama.cpp. Layers of one width become the architecture that they are, layers that differ ``deci``.
    dtype : {"keep", "float32", "float16", "bfloat16", "q8_0"}
        Of matrices; vectors are float32.
    overwrite : bool
        Replace a file that is there, once the new one is complete.
    progress : callable, optional
        Called as ``progress(bytes_done, bytes_total, what)``.

    Raises
    ------
    ValueError
        If the engine cannot run such a checkpoint; says why.
    """
    try:
        from pyfold.deliver import gguf
    except ImportError as error:
        raise PyfoldError(f"to gguf: cannot be imported ({error}); run pip install 'pyfold[gguf]'") from None
    began, path = time.perf_counter(), Path(destination)
    if to not in FORMATS:
        raise PyfoldError(f"to: expected one of {', '.join(FORMATS)}, got '{to}'")
    if dtype not in DTYPES:
        raise PyfoldError(f"dtype: expected one of {', '.join(DTYPES)}, got '{dtype}'")
    if path.is_dir() or (path.exists() and not overwrite):
        raise PyfoldError(f"{path}: {'a folder; name a file' if path.is_dir() else 'exists; --overwrite replaces it'}")
    if not path.parent.is_dir():
        raise PyfoldError(f"{path.parent}: no such folder")
    checkpoint = open_checkpoint(source)
    model = gguf.Model.of(checkpoint)
    places = gguf.places(model, DTYPES[dtype])
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
    types = [place.type for place in places.values()]
    odd = [name for name, place in places.items() if dtype == "q8_0" and place.type == "F16"]
    notes = [f"{len(odd)} matrices, as {odd[0]}, are F16: their rows are no multiple of 32, which Q8_0 wants"] if odd else []
    return ExportReport(
        path=path,
        architecture=model.architecture,
        n_tensors=len(places),
        n_bytes=sum(sizes.values()),
        types={kind: types.count(kind) for kind in sorted(set(types))},
        notes=notes,
        seconds=time.perf_counter() - began,
    )
