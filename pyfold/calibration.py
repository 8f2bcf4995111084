"""Tokens on which units are seen at work: text that the model writes itself, kept beside the result, or a file's.

What a model writes from nothing but its first token shows which of its units matter, and needs no data.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyfold import __version__, evaluate
from pyfold.errors import PyfoldError
from pyfold.families.writing import Writer, writing_bytes
from pyfold.io.checkpoint import Checkpoint
from pyfold.processor import Processor
from pyfold.progress import Progress

LENGTH = 256  # tokens of a sequence: a model writes as many steps, whatever it writes
SEQUENCES = 192
_FEWEST = 16  # sequences: with fewer there is nothing to hold out
_SPAN, _DISTINCT = 8, 0.5  # tokens in a row that were not there before: in text nearly all
CACHE = ".pyfold-calibration.json"


class Cache:
    """A JSON file of what takes long to find and depends on nothing but its key."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def get(self, what: str, key: dict[str, Any]) -> Any:
        """None where there is none, or it is of another key, or the file is not one of ours."""
        kept = self._read().get(what)
        return kept.get("value") if isinstance(kept, dict) and kept.get("key") == key else None

    def put(self, what: str, key: dict[str, Any], value: Any) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._file.with_name(f"{self._file.name}.tmp")
        kept = self._read() | {what: {"key": key, "value": value}}
        temporary.write_text(json.dumps(kept), encoding="utf-8")
        temporary.replace(self._file)

    def _read(self) -> dict[str, Any]:
        try:
            kept = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return kept if isinstance(kept, dict) else {}


@dataclass(frozen=True)
class Calibration:
    """(sequences, LENGTH) tokens, int64, and where they are from: ``self`` or ``file NAME``."""

    tokens: Tensor
    source: str

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values that say which tokens these are."""
        sha256 = hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()
        return {"calibration": self.source, "calibration_tokens": self.tokens.numel(), "calibration_sha256": sha256}


def calibrate(
    checkpoint: Checkpoint,
    text: str,
    cache: Cache,
    stamps: dict[str, list[int]],
    processor: Processor,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Tokens of the file ``text``, or, for ``self``, what the model writes, from ``cache`` if it is of the same files.

    ``stamps`` tells the source's files from others.

    Raises
    ------
    PyfoldError
        If there is no tokenizer, a text is too short, or a model repeats itself, or does not fit.
    """
    room = processor.room()
    tokenizer = evaluate.load_tokenizer(checkpoint.path)
    if text != "self":
        return Calibration(_read(Path(text), tokenizer), f"file {Path(text).name}")
    key = {
        "pyfold": __version__,
        "sources": stamps,
        "sequences": SEQUENCES,
        "length": LENGTH,
        "seed": seed,
        "torch": torch.__version__,
        **processor.identity,
    }
    kept = cache.get("tokens", key)
    with suppress(TypeError, ValueError, RuntimeError, OverflowError):  # not as it was kept: it is written anew
        tokens = torch.tensor(kept, dtype=torch.int64).view(SEQUENCES, LENGTH)
        if int(tokens.min()) >= 0 and int(tokens.max()) < checkpoint.config["vocab_size"]:
            return Calibration(tokens, "self")
    tokens = _written(checkpoint, tokenizer, processor, room, seed, progress)
    cache.put("tokens", key, tokens.tolist())
    return Calibration(tokens, "self")


def _read(file: Path, tokenizer: Any) -> Tensor:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PyfoldError(f"{file}: not UTF-8 text ({error})") from None
    except OSError as error:
        raise PyfoldError(f"{file}: cannot read the calibration text: {error.strerror}") from None
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = LENGTH - len(begin)
    ids = tokenizer(text, return_tensors="pt", verbose=False, add_special_tokens=False).input_ids[0][: SEQUENCES * body]
    n = len(ids) // body
    if n < _FEWEST:
        raise PyfoldError(f"{file}: calibration takes at least {_FEWEST * body} tokens of text, got {len(ids)}")
    return torch.cat([torch.tensor(begin, dtype=torch.int64).expand(n, -1), ids[: n * body].view(n, body)], 1)


def _written(
    checkpoint: Checkpoint, tokenizer: Any, processor: Processor, room: int, seed: int, progress: Progress | None
) -> Tensor:
    """From the beginning token on, past the ends of texts. The first tokens drawn are as spread as can be."""
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is None:
        raise PyfoldError("calibration: the tokenizer has no token to begin a text with; give a text with --calibration FILE")
    resident, wave = way(checkpoint, processor, room)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(SEQUENCES, LENGTH - 1, generator=generator)
    draws[:, 0] = (draws[:, 0] + torch.randperm(SEQUENCES, generator=generator)) / SEQUENCES
    writer = Writer(checkpoint, LENGTH, resident=resident, device=processor.device)
    waves: list[Tensor] = []
    for part in draws.split(wave):
        places = []
        for tokens in writer.write(begin, part):
            places.append(tokens)
            if progress:
                progress(len(waves) * wave * LENGTH + len(places) * len(part), SEQUENCES * LENGTH, "writing text, tokens")
        waves.append(torch.stack(places, 1))
    tokens = torch.cat(waves)
    spans = tokens.unfold(1, _SPAN, 1).flatten(0, 1)
    distinct = len(torch.unique(spans, dim=0)) / len(spans)
    if distinct < _DISTINCT:
        raise PyfoldError(
            f"calibration: the model repeats itself ({1 - distinct:.0%} of {_SPAN} tokens in a row are there twice); give a "
            "text with --calibration FILE, or fold by weights alone with --metric weight"
        )
    return tokens


def way(checkpoint: Checkpoint, processor: Processor, room: int) -> tuple[bool, int]:
    """Whether all layers are in memory, and how many sequences are written together, where so many bytes are left."""
    takes = writing_bytes(checkpoint, LENGTH)
    for resident, held in ((True, takes.fixed + takes.layers), (False, takes.fixed + takes.layer)):
        wave = (room - held) // takes.sequence
        if wave >= min(_FEWEST, SEQUENCES):
            return resident, min(wave, SEQUENCES)
    least = takes.fixed + takes.layer + _FEWEST * takes.sequence
    raise processor.refusal(
        f"writing calibration text takes at least {least / 2**20:.0f} MiB ({least:,} bytes)",
        room,
        "; give a text with --calibration FILE",
    )
