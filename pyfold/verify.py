"""A folded checkpoint against what its fold recorded: hashes, names, shapes, index, config, and that it loads."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyfold.deliver.huggingface import has_own_modeling_file
from pyfold.errors import PyfoldError
from pyfold.families import FAMILIES
from pyfold.io.checkpoint import Checkpoint, open_checkpoint, read_json
from pyfold.io.safetensors import Reader, as_bytes
from pyfold.progress import Progress


@dataclass(frozen=True)
class Verification:
    """What was found in order."""

    n_tensors: int
    n_bytes: int


def verify_checkpoint(path: str | Path, *, progress: Progress | None = None) -> Verification:
    """Check a result of :func:`pyfold.fold_checkpoint`; reads every byte of its weights once, and holds few of them.

    Parameters
    ----------
    path : str or Path
        The folder.
    progress : callable, optional
        Called as ``progress(bytes_done, bytes_total, what)``.

    Raises
    ------
    PyfoldError
        For the first thing that is not as the fold left it: names file and tensor.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise PyfoldError(f"{folder}: no such folder")
    if not (folder / "pyfold.json").is_file():
        raise PyfoldError(f"{folder / 'pyfold.json'}: missing; only what pyfold folded can be verified")
    recorded = read_json(folder / "pyfold.json").get("sha256")
    if not isinstance(recorded, dict):
        raise PyfoldError(f"{folder / 'pyfold.json'}: holds no sha256 of the tensors; fold it again with this version")
    checkpoint = open_checkpoint(folder)
    for name in sorted(recorded.keys() ^ checkpoint.tensors.keys()):
        where = "is missing" if name in recorded else "is not the fold's"
        raise PyfoldError(f"{folder}: tensor '{name}' {where}")
    _check_loads(checkpoint)
    done = 0
    with Reader() as reader:
        for name, info in checkpoint.tensors.items():
            if progress:
                progress(done, checkpoint.nbytes, "verifying")
            digest = hashlib.sha256()
            for _, piece in reader.chunks(info):
                digest.update(as_bytes(piece))
            if digest.hexdigest() != recorded[name]:
                raise PyfoldError(f"{info.path}: tensor '{name}' is not what was written (its SHA-256 differs); fold it again")
            done += info.nbytes
    return Verification(len(recorded), checkpoint.nbytes)


def _check_loads(checkpoint: Checkpoint) -> None:
    """What transformers makes of config.json, without memory for weights, has the checkpoint's names and shapes."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = has_own_modeling_file(checkpoint.path, FAMILIES)
    try:
        config: Any = AutoConfig.from_pretrained(str(checkpoint.path), trust_remote_code=trust)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    except (OSError, ValueError, TypeError, IndexError, RuntimeError, StrictDataclassError) as error:
        raise PyfoldError(f"{checkpoint.path}: transformers cannot load it: {str(error).strip().splitlines()[0]}") from None
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, parameter in model.named_parameters():
        if name not in checkpoint.tensors and name not in tied:
            raise PyfoldError(f"{checkpoint.path}: tensor '{name}' is missing; transformers would make it up")
        if name in checkpoint.tensors and checkpoint.tensors[name].shape != tuple(parameter.shape):
            found, expected = list(checkpoint.tensors[name].shape), list(parameter.shape)
            raise PyfoldError(f"{checkpoint.tensors[name].path}: tensor '{name}': expected shape {expected}, got {found}")
