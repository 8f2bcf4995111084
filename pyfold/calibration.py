"""Tokens on which units are seen at work: text that the model writes itself, kept beside the result, or a file's.

What a model writes from nothing but its first token shows which of its units matter, and needs no data.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyfold import evaluate
from pyfold.errors import PyfoldError
from pyfold.io.checkpoint import Checkpoint

LENGTH = 256  # tokens of a sequence: a model writes as many steps, whatever it writes
SEQUENCES = 96
_WAVE = 48  # sequences that are written together; what they have seen takes memory
_FEWEST = 16  # sequences: with fewer there is nothing to hold out
_SPAN, _DISTINCT = 8, 0.5  # tokens in a row that were not there before: in text nearly all
_SEED = 0
CACHE = ".pyfold-calibration.json"


@dataclass(frozen=True)
class Calibration:
    """(sequences, LENGTH) tokens, int64, and where they are from: ``self`` or a file's name."""

    tokens: Tensor
    source: str

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values that say which tokens these are."""
        sha256 = hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()
        return {"calibration": self.source, "calibration_tokens": self.tokens.numel(), "calibration_sha256": sha256}


def calibrate(checkpoint: Checkpoint, text: str, cache: Path, stamps: dict[str, list[int]], room: int) -> Calibration:
    """Tokens of the file ``text``, or, for ``self``, what the model writes, from ``cache`` if it is of the same files.

    ``stamps`` tells the source's files from others; ``room``: bytes that writing may take.

    Raises
    ------
    PyfoldError
        If there is no tokenizer, a text is too short, or a model repeats itself, or does not fit.
    """
    if text != "self":
        return Calibration(_read(Path(text), evaluate.load_tokenizer(checkpoint.path)), Path(text).name)
    key = {"sources": stamps, "sequences": SEQUENCES, "length": LENGTH, "seed": _SEED, "torch": torch.__version__}
    try:
        kept = json.loads(cache.read_text(encoding="utf-8"))
        if kept["key"] == key:
            return Calibration(torch.tensor(kept["tokens"], dtype=torch.int64).view(SEQUENCES, LENGTH), "self")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        pass  # none, or not one of ours: it is written anew
    needs = _writing_bytes(checkpoint)
    if needs > room:
        raise PyfoldError(
            f"host_memory: to write its calibration text the whole model is in memory, {needs / 2**20:.0f} MiB, and "
            f"{room / 2**20:.0f} are left; give a text with --calibration FILE"
        )
    model, tokenizer = evaluate.load_model(checkpoint.path)
    tokens = _write(model, tokenizer)
    cache.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache.with_name(f"{cache.name}.tmp")
    temporary.write_text(json.dumps({"key": key, "tokens": tokens.tolist()}), encoding="utf-8")
    temporary.replace(cache)
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


def _write(model: Any, tokenizer: Any) -> Tensor:
    """From the beginning token on, at temperature 1, past the ends of texts."""
    from transformers import GenerationConfig

    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is None:
        raise PyfoldError("calibration: the tokenizer has no token to begin a text with; give a text with --calibration FILE")
    # Of the model's own settings none is taken: it may be set to be sure of itself.
    model.generation_config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=LENGTH - 1, disable_compile=True)
    first = torch.full((_WAVE, 1), begin)
    waves = []
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(_SEED)
        for _ in range(SEQUENCES // _WAVE):
            cache = prepare_writing(model)
            waves.append(model.generate(first, attention_mask=torch.ones_like(first), past_key_values=cache).clone())
    tokens = torch.cat(waves)
    spans = tokens.unfold(1, _SPAN, 1).flatten(0, 1)
    distinct = len(torch.unique(spans, dim=0)) / len(spans)
    if distinct < _DISTINCT:
        raise PyfoldError(
            f"calibration: the model repeats itself ({1 - distinct:.0%} of {_SPAN} tokens in a row are there twice); give a "
            "text with --calibration FILE, or fold by weights alone with --metric weight"
        )
    return tokens


def prepare_writing(model: Any) -> Any:
    """Have a model take a token of each sequence at a time; returns where it keeps keys and values of up to LENGTH of them.

    They are written in place: a cache that grows is copied at every token.
    """
    from transformers import AttentionInterface
    from transformers.cache_utils import Cache, StaticLayer

    class Seen(StaticLayer):
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            n = int(self.cumulative_length)
            return keys[:, :, :n], values[:, :, :n]

    AttentionInterface.register("pyfold_last_token", _attend_from_last_token)
    model.set_attn_implementation("pyfold_last_token")
    return Cache(layers=[Seen(max_cache_len=LENGTH) for _ in range(model.config.num_hidden_layers)])


def _attend_from_last_token(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """All that is there may be seen. Heads that share keys are as many queries of one head, so that no key is copied."""
    sequences, heads, _, size = query.shape
    together = query.view(sequences, key.shape[1], -1, size)
    seen = torch.nn.functional.scaled_dot_product_attention(together, key, value, scale=scaling)
    return seen.reshape(sequences, 1, heads, size), None


def _writing_bytes(checkpoint: Checkpoint) -> int:
    """fp32 weights, keys and values of a wave, logits and their copies."""
    config = checkpoint.config
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    cached = 2 * 4 * _WAVE * LENGTH * config["num_hidden_layers"] * heads * head
    return 4 * checkpoint.n_parameters + cached + 6 * 4 * _WAVE * config["vocab_size"]
