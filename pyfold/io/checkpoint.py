"""A Hugging Face checkpoint as a source: a folder or a hub id -> its config and every tensor's place. Reads headers only."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyfold.errors import PyfoldError
from pyfold.io.safetensors import TensorInfo, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
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
        If there is no such checkpoint, a shard is missing, a header is corrupt, index and shards disagree, or the weights are
        quantised.
    """
    path, hub_id = _resolve(source)
    config = read_json(path / "config.json")
    for key, kind in (("model_type", str), ("auto_map", dict), ("per_layer_config", dict), ("quantization_config", dict)):
        if not isinstance(config.get(key, kind()), kind) and config[key] is not None:
            raise PyfoldError(f"{path / 'config.json'}: expected {kind.__name__} for {key}, got {config[key]!r:.60}")
    config = {key: value for key, value in config.items() if value is not None or key not in ("auto_map", "per_layer_config")}
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown method")
        raise PyfoldError(
            f"{path / 'config.json'}: the weights are quantised (quantization_config: {method}); fold the full-precision "
            "checkpoint and quantise the result"
        )
    if (path / SINGLE).exists():  # what transformers opens where there are both
        tensors = read_header(path / SINGLE)
    elif (path / INDEX).exists():
        tensors = _sharded(path)
    else:
        raise PyfoldError(f"{path}: no {INDEX} and no {SINGLE}; convert the checkpoint to safetensors first")
    ordered = {name: tensors[name] for name in sorted(tensors, key=natural)}
    return Checkpoint(path, config, ordered, hub_id)


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises
    ------
    PyfoldError
        If the file is missing or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PyfoldError(f"{path}: no such file; a checkpoint folder has one") from None
    except (ValueError, RecursionError) as error:
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

    patterns = ["config.json", "*.safetensors", INDEX, "*.py", *COMPANIONS, "README.md"]
    try:
        cached = Path(snapshot_download(str(source), allow_patterns=patterns, local_files_only=True))
        if (cached / INDEX).exists() or (cached / SINGLE).exists():
            return cached, str(source)
    except LocalEntryNotFoundError:
        pass
    except HFValidationError:
        raise PyfoldError(f"{source}: no such folder, and not a Hugging Face model id (owner/name)") from None
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns)), str(source)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PyfoldError(f"{source}: no such folder here, and not to be had from the Hugging Face hub: {reason}") from None


def _sharded(path: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PyfoldError(f"{path / INDEX}: no weight_map")
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        if Path(shard).name != shard:
            raise PyfoldError(f"{path / INDEX}: '{shard}' is not the name of a shard beside it")
        if not (path / shard).exists():
            raise PyfoldError(f"{path / shard}: missing, though {INDEX} lists it; download it again")
        for name, info in read_header(path / shard).items():
            if weight_map.get(name) != shard:
                raise PyfoldError(f"{path / shard}: tensor '{name}' is absent from {INDEX}; download the index again")
            tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors:
            raise PyfoldError(f"{path / shard}: tensor '{name}' is not in it, though {INDEX} says so; download it again")
    return tensors
