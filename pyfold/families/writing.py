"""Text that a decoder writes itself, at temperature 1: the next token of every sequence at once.

Layers are transformers' own, their weights in memory or, where there is no room for all, read again for every token. What is
drawn hangs on one number for each token, so that a text does not depend on how many are written together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from pyfold.families.activations import CPU, EMBEDDING, HEAD, NORM, decoder, layer_parameters, put
from pyfold.families.base import prefix_of
from pyfold.io.checkpoint import Checkpoint
from pyfold.io.safetensors import Reader

_ATTENTION = "pyfold_last_token"


class WritingBytes(NamedTuple):
    """Memory: of what is always there, of all layers, of the largest, of a sequence's keys and values, and of all of it."""

    fixed: int
    layers: int
    layer: int
    keys: int
    sequence: int


def writing_bytes(checkpoint: Checkpoint, length: int) -> WritingBytes:
    """Of a Writer."""
    config, layers = checkpoint.config, layer_parameters(checkpoint)
    item = dtype_of(checkpoint).itemsize
    fixed = item * (checkpoint.n_parameters - sum(layers))
    largest = max(info.nbytes for info in checkpoint.tensors.values())  # as it is read
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    keys = 2 * item * length * len(layers) * heads * head
    return WritingBytes(fixed + largest, item * sum(layers), item * max(layers), keys, keys + 5 * 4 * config["vocab_size"])


def dtype_of(checkpoint: Checkpoint) -> torch.dtype:
    """In which text is written: fp32 for a checkpoint that has it, else bf16."""
    return torch.float32 if any(info.dtype == "F32" for info in checkpoint.tensors.values()) else torch.bfloat16


class Writer:
    """Writes texts of ``length`` tokens on a device; with ``resident`` all layers stay in its memory."""

    def __init__(self, checkpoint: Checkpoint, length: int, *, resident: bool, device: torch.device = CPU) -> None:
        _register_attention()
        self._model = decoder(checkpoint, attention=_ATTENTION)
        self._tensors, self._length, self._resident = checkpoint.tensors, length, resident
        self._dtype, self._device = dtype_of(checkpoint), device
        self._prefix = prefix_of(checkpoint)
        rotary = type(self._model.rotary_emb)(config=self._model.config)
        self._rotation = [part.to(device, self._dtype) for part in rotary(torch.empty(1), torch.arange(length)[None])]
        with Reader() as reader:
            self._embedding = self._read(reader, self._prefix + EMBEDDING)
            self._head = self._read(reader, HEAD) if HEAD in self._tensors else self._embedding
            put(self._model.norm, "weight", self._read(reader, self._prefix + NORM))
            if resident:
                for i in range(len(self._model.layers)):
                    self._load(reader, i)

    def write(self, begin: int, draws: Tensor) -> Iterator[Tensor]:
        """The tokens (sequences,) of one place after another, ``begin`` first; ``draws`` in [0, 1): (sequences, length - 1)."""
        seen = _seen(len(self._model.layers), self._length)
        draws = draws.to(self._device)
        tokens = torch.full((len(draws),), begin, device=self._device)
        yield tokens.cpu()
        with Reader() as reader:
            for place in range(self._length - 1):
                with torch.inference_mode():  # not while the caller has the tokens
                    tokens = _at(draws[:, place], self._logits(tokens, place, seen, reader))
                yield tokens.cpu()

    def _logits(self, tokens: Tensor, place: int, seen: Any, reader: Reader) -> Tensor:
        hidden = self._embedding[tokens][:, None]
        rotation = tuple(part[:, place : place + 1] for part in self._rotation)
        for i, layer in enumerate(self._model.layers):
            with self._loaded(reader, i):
                hidden = layer(hidden, attention_mask=None, past_key_values=seen, position_embeddings=rotation)
        return linear(self._model.norm(hidden[:, 0]), self._head).float()

    @contextmanager
    def _loaded(self, reader: Reader, i: int) -> Iterator[None]:
        if not self._resident:
            self._load(reader, i)
        yield
        if not self._resident:
            self._model.layers[i].to("meta")

    def _load(self, reader: Reader, i: int) -> None:
        layer, at = self._model.layers[i], f"{self._prefix}layers.{i}."
        for name, _ in list(layer.named_parameters()):
            put(layer, name, self._read(reader, at + name))

    def _read(self, reader: Reader, name: str) -> Tensor:
        return reader.read(self._tensors[name]).to(self._device, self._dtype)


def _at(draws: Tensor, logits: Tensor) -> Tensor:
    """The tokens at which the distributions' cumulative sums pass the numbers drawn."""
    sums = logits.softmax(-1).cumsum(-1)
    found = torch.searchsorted(sums, draws[:, None] * sums[:, -1:], right=True)[:, 0]
    return found.clamp_(max=logits.shape[1] - 1)


def _seen(n_layers: int, length: int) -> Any:
    """Keys and values of up to so many tokens, written in place: a cache that grows is copied at every token."""
    from transformers.cache_utils import Cache, StaticLayer

    class Seen(StaticLayer):
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            n = int(self.cumulative_length)
            return keys[:, :, :n], values[:, :, :n]

    return Cache(layers=[Seen(max_cache_len=length) for _ in range(n_layers)])


def _register_attention() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attend_from_last_token)


def _attend_from_last_token(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """All that is there may be seen. Heads that share keys are as many queries of one head, so that no key is copied."""
    sequences, heads, _, size = query.shape
    together = query.view(sequences, key.shape[1], -1, size)
    seen = torch.nn.functional.scaled_dot_product_attention(together, key, value, scale=scaling)
    return seen.reshape(sequences, 1, heads, size), None
