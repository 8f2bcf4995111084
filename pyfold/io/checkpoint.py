"""A Hugging Face checkpoint as a source: a folder or a hub id -> its config and every tensor's place. Reads headers only."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyfold.errors import PyfoldError
from pyfold.io import pytorch, safetensors
from pyfold.io.safetensors import MAX_HEADER, TensorInfo
from pyfold.io.strict_json import parse

INDEX = "model.safetensors.index.json"
Header = Callable[[Path], dict[str, TensorInfo]]
# Single file, index of shards, what reads a header: in the order in which transformers looks for them.
FORMATS: tuple[tuple[str, str, Header], ...] = (
    ("model.safetensors", INDEX, safetensors.read_header),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", pytorch.read_header),
)
# What config.json may not hold as anything else.
_KINDS = {"model_type": str, "architectures": list, "auto_map": dict, "per_layer_config": dict, "quantization_config": dict}
# Files beside the weights that a loader needs, or a licence asks to keep.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)


@dataclass(frozen=True)
class Checkpoint:
    """Where everything of a checkpoint is.

    Attributes
    ----------
    path : Path
        The folder.
    config : dict
        config.json as it stands.
    tensors : dict of str to TensorInfo
        In natural order of the names, whatever the shard layout.
    hub_id : str or None
        The id it was asked for by, if it was.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    hub_id: str | None

    @property
    def n_parameters(self) -> int:
        return sum(info.n_parameters for info in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def companions(self) -> list[Path]:
        """Tokenizer, generation config, chat template and licence files, sorted by name."""
        found = {file for pattern in COMPANIONS for file in self.path.glob(pattern) if file.is_file()}
        return sorted(found)


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Resolve a folder or a Hugging Face model id and read its headers.

    Raises
    ------
    PyfoldError
        If there is no such checkpoint, a shard is missing, a header is corrupt, index and shards disagree, a file of it leads
        elsewhere (see :func:`_check_link`), or the weights are quantised.
    """
    path, hub_id = _resolve(source)
    for pattern in ("config.json", "README.md", "*.py", *COMPANIONS):
        for file in path.glob(pattern):
            _check_link(file)
    config = read_json(path / "config.json")
    for key, kind in _KINDS.items():
        if not isinstance(config.get(key, kind()), kind) and config[key] is not None:
            raise PyfoldError(f"{path / 'config.json'}: expected {kind.__name__} for {key}, got {config[key]!r:.60}")
    config = {key: value for key, value in config.items() if value is not None or key not in ("auto_map", "per_layer_config")}
    for target in (config.get("auto_map") or {}).values():
        for name in target if isinstance(target, list) else [target]:
            if name is not None and not re.fullmatch(
                r"(\S+--)?[\w-]+\.\w+", str(name)
            ):  # the module is a file beside config.json
                raise PyfoldError(f"{path / 'config.json'}: expected MODULE.CLASS in auto_map, got {name!r:.60}")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown method")
        raise PyfoldError(
            f"{path / 'config.json'}: the weights are quantised (quantization_config: {method}); fold the full-precision "
            "checkpoint and quantise the result"
        )
    tensors = _tensors(path)
    ordered = {name: tensors[name] for name in sorted(tensors, key=natural)}
    return Checkpoint(path, config, ordered, hub_id)


def natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key that puts layers.2 before layers.10: numbers by length, then by digits. The name itself parts 2 from 02."""
    parts = ((part, part.lstrip("0")) for part in re.split(r"([0-9]+)", name) if part)
    return [(len(number), number) if part[0] in "0123456789" else (-1, part) for part, number in parts], name


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises
    ------
    PyfoldError
        If the file is missing or holds something else.
    """
    if not path.is_file():  # a named pipe would keep a reader waiting for ever
        raise PyfoldError(f"{path}: no such file; a checkpoint folder has one")
    if path.stat().st_size > MAX_HEADER:
        raise PyfoldError(f"{path}: more than {MAX_HEADER} bytes, which no checkpoint's JSON has")
    try:
        value = parse(path.read_bytes())
    except ValueError as error:
        raise PyfoldError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise PyfoldError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _resolve(source: str | Path) -> tuple[Path, str | None]:
    path = Path(source)
    if path.is_dir():
        return path, None
    if path.exists():
        raise PyfoldError(f"{path}: expected a checkpoint folder, got a file")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith("."):
        raise PyfoldError(f"{source}: no such folder, and not a Hugging Face model id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["config.json", "*.py", *COMPANIONS, "README.md"]
    try:
        cached = Path(snapshot_download(str(source), allow_patterns=patterns, local_files_only=True))
        if _format(cached):
            return cached, str(source)
    except LocalEntryNotFoundError:
        pass
    except HFValidationError:
        raise PyfoldError(f"{source}: no such folder, and not a Hugging Face model id (owner/name)") from None
    try:
        for weights in (["*.safetensors", INDEX], ["pytorch_model*.bin", "pytorch_model.bin.index.json"]):
            path = Path(snapshot_download(str(source), allow_patterns=[*patterns, *weights]))
            if _format(path):
                break
        return path, str(source)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PyfoldError(f"{source}: no such folder here, and not to be had from the Hugging Face hub: {reason}") from None


def _format(path: Path) -> tuple[str, str, Header] | None:
    """The first format whose single file or index a folder holds."""
    return next((names for names in FORMATS if (path / names[0]).is_file() or (path / names[1]).is_file()), None)


def _tensors(path: Path) -> dict[str, TensorInfo]:
    found = _format(path)
    if found is None:
        names = " and no ".join(name for single, index, _ in FORMATS for name in (index, single))
        raise PyfoldError(f"{path}: no {names}; a checkpoint folder has one of them")
    single, index, read_header = found
    if (path / single).is_file():
        _check_link(path / single)
        return read_header(path / single)
    _check_link(path / index)
    weight_map = read_json(path / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PyfoldError(f"{path / index}: no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or set(shard) & set("/\\\0"):
            raise PyfoldError(f"{path / index}: '{shard}' (of tensor '{name}') is not the name of a shard beside it")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not os.path.isfile(path / shard):  # also for a name that is too long to be one, where Path.is_file raises
            raise PyfoldError(f"{path / shard}: missing, though {index} lists it; download it again")
        _check_link(path / shard)
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in read_header(path / shard).items():
            if weight_map.get(name) != shard:
                raise PyfoldError(f"{path / shard}: tensor '{name}' is absent from {index}; download the index again")
            tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors:
            raise PyfoldError(f"{path / shard}: tensor '{name}' is not in it, though {index} says so; download it again")
    return tensors


def _check_link(file: Path) -> None:
    """Refuse a symbolic link out of a checkpoint: a stranger's folder could have any file of this machine copied into a result.

    A link may lead to a file below the checkpoint's own folder; and from ``REPO/snapshots/REVISION/`` into ``REPO/blobs/``, as
    the Hugging Face cache lays them out. The folders themselves may lie behind links.
    """
    folder, target = file.parent.resolve(), Path(os.path.realpath(file))
    snapshots = next((parent for parent in folder.parents if parent.name == "snapshots"), None)
    allowed = [folder] if snapshots is None else [folder, snapshots.parent / "blobs"]
    if not any(place in target.parents for place in allowed):
        raise PyfoldError(f"{file}: a symbolic link out of the checkpoint, to {target}; put the file itself in its place")
