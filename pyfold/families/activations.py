"""Hidden states of calibration tokens at one place of a decoder, brought forward layer by layer as layers are folded.

One decoder layer is in memory at a time, as transformers runs it, in fp32, and of the tokens no more than their hidden states:
4 x tokens x hidden bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div, linear

from pyfold.errors import PyfoldError
from pyfold.io.checkpoint import Checkpoint
from pyfold.io.safetensors import Reader, TensorInfo

BATCH = 1 << 12  # tokens that go through a layer together
_LOGITS = 1 << 8  # tokens whose logits are in memory together
_HEAD, _EMBEDDING, _NORM = "lm_head.weight", "embed_tokens.weight", "norm.weight"
_FED = ("gate_proj.weight", "up_proj.weight", "down_proj.weight", "gate_proj.bias", "up_proj.bias")
_OWN = ("auto_map", "architectures", "per_layer_config", "torch_dtype", "dtype")  # of config.json, not of the decoder itself


class Mlp(NamedTuple):
    """A gated feed-forward network of N units: ``down(act(gate(x)) * up(x))``."""

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    act: Callable[[Tensor], Tensor]

    def units(self, x: Tensor) -> Tensor:
        """(tokens, hidden) -> (tokens, N)."""
        return self.act(linear(x, self.gate, self.gate_bias)).mul_(linear(x, self.up, self.up_bias))

    def kept(self, units: Tensor, down: Tensor) -> Mlp:
        """The network of some of its units, and another consumer."""
        gate_bias, up_bias = (None if bias is None else bias[units] for bias in (self.gate_bias, self.up_bias))
        return Mlp(self.gate[units], self.up[units], down, gate_bias, up_bias, self.act)


def decoder(checkpoint: Checkpoint, attention: str = "sdpa") -> Any:
    """Its modules in transformers, without weights; ``attention`` by its name there."""
    from transformers import AutoConfig, AutoModel

    options = {key: value for key, value in checkpoint.config.items() if key not in _OWN}
    with torch.device("meta"):
        return AutoModel.from_config(AutoConfig.for_model(**options, attn_implementation=attention)).eval()


class Activations:
    """Of tokens on their way through a decoder, at first before layer 0.

    Parameters
    ----------
    checkpoint : Checkpoint
    tokens : Tensor, (sequences, length), int64
    place : callable
        Where a tensor of a layer that is only passed by is to be read.
    """

    def __init__(self, checkpoint: Checkpoint, tokens: Tensor, place: Callable[[str], TensorInfo]) -> None:
        self._model = decoder(checkpoint)
        config, length = self._model.config, tokens.shape[1]
        window = getattr(config, "sliding_window", None)
        if window is not None and window < length:
            raise PyfoldError(
                f"{checkpoint.path / 'config.json'}: a sliding_window of {window} is less than the {length} tokens of a "
                "calibration sequence; fold by weights alone (metric weight)"
            )
        self._place = place
        self._tensors = checkpoint.tensors
        self._prefix = "model." if any(name.startswith("model.") for name in checkpoint.tensors) else ""
        self._layer, self._attended = 0, False
        self._forks: list[Tensor] = []
        self._to_come: list[Tensor] = []  # forks that are past this layer already
        with torch.inference_mode(), Reader() as reader:
            self._hidden = _embedded(reader, checkpoint.tensors[self._prefix + _EMBEDDING], tokens)
            rotary = type(self._model.rotary_emb)(config=config)
            self._rotation = rotary(self._hidden[:1], torch.arange(length)[None])

    def inputs(self, layer: int) -> Iterator[Tensor]:
        """What the feed-forward network of a layer reads: batches of whole sequences, (sequences, length, hidden)."""
        with torch.inference_mode(), Reader() as reader:
            self._pass_until(layer, reader)
            self._attend(reader)
        for batch in self._batches(self._hidden):
            with torch.inference_mode():  # not while the caller has the batch
                normed = self._model.layers[layer].post_attention_layernorm(batch)
            yield normed

    def feed(self, mlp: Mlp) -> None:
        """Let the tokens through this network in the place of the layer's own, and on to the next layer."""
        with torch.inference_mode():
            for states in (self._hidden, *self._forks):
                self._through(mlp, states)
            self._model.layers[self._layer].to("meta")
        self._forks += self._to_come
        self._to_come = []
        self._layer, self._attended = self._layer + 1, False

    def fork(self, sequences: slice, mlp: Mlp) -> None:
        """Let copies of some sequences through this network, and on beside all others, which are still to be fed."""
        with torch.inference_mode():
            states = self._hidden[sequences].clone()
            self._through(mlp, states)
        self._to_come.append(states)

    def finish(self) -> None:
        """Go through the layers that are left."""
        with torch.inference_mode(), Reader() as reader:
            self._pass_until(len(self._model.layers), reader)

    def divergences(self, sequences: slice) -> list[float]:
        """Behind the last layer: of each fork of ``sequences`` the mean KL divergence, in nats, of what it says next from what
        they say."""
        sums = torch.zeros(len(self._forks), dtype=torch.float64)
        with torch.inference_mode(), Reader() as reader:
            head = reader.read(self._tensors[_HEAD if _HEAD in self._tensors else self._prefix + _EMBEDDING]).float()
            norm = self._model.norm
            norm.load_state_dict({"weight": reader.read(self._tensors[self._prefix + _NORM]).float()}, assign=True)
            own, *forks = (states.flatten(0, 1).split(_LOGITS) for states in (self._hidden[sequences], *self._forks))
            for i, states in enumerate(own):
                expected = linear(norm(states), head).log_softmax(-1)
                for fork, parts in enumerate(forks):
                    found = linear(norm(parts[i]), head).log_softmax(-1)
                    sums[fork] += kl_div(found, expected, reduction="sum", log_target=True).double()
        return (sums / self._hidden[sequences].shape[:2].numel()).tolist()

    def mlp(self, layer: int, weights: Mapping[str, Tensor]) -> Mlp:
        """The network of a layer in fp32, from its tensors by name."""
        at = f"{self._prefix}layers.{layer}.mlp."
        found = {name: weights[at + name].float() for name in _FED if at + name in weights}
        gate, up, down = (found[name] for name in _FED[:3])
        gate_bias, up_bias = (found.get(name) for name in _FED[3:])
        return Mlp(gate, up, down, gate_bias, up_bias, self._model.layers[layer].mlp.act_fn)

    def _pass_until(self, layer: int, reader: Reader) -> None:
        while self._layer < layer:
            self._attend(reader)
            self.feed(self.mlp(self._layer, self._read(reader, "mlp.", _FED)))

    def _attend(self, reader: Reader) -> None:
        if self._attended:
            return
        layer = self._model.layers[self._layer]
        names = [name for name, _ in layer.named_parameters() if not name.startswith("mlp.")]
        weights = self._read(reader, "", names)
        at = f"{self._prefix}layers.{self._layer}."
        layer.load_state_dict({name: weights[at + name].float() for name in names}, strict=False, assign=True)
        for states in (self._hidden, *self._forks):
            for batch in self._batches(states):
                normed = layer.input_layernorm(batch)
                batch += layer.self_attn(hidden_states=normed, position_embeddings=self._rotation, attention_mask=None)[0]
        self._attended = True

    def _read(self, reader: Reader, part: str, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of this layer, by their full names; those that the checkpoint has."""
        full = [f"{self._prefix}layers.{self._layer}.{part}{name}" for name in names]
        return {name: reader.read(self._place(name)) for name in full if name in self._tensors}

    def _through(self, mlp: Mlp, states: Tensor) -> None:
        norm = self._model.layers[self._layer].post_attention_layernorm
        for batch in self._batches(states):
            batch += linear(mlp.units(norm(batch)), mlp.down)

    def _batches(self, states: Tensor) -> Iterator[Tensor]:
        return iter(states.split(max(1, BATCH // states.shape[1])))


def _embedded(reader: Reader, embedding: TensorInfo, tokens: Tensor) -> Tensor:
    """The rows of the embedding that tokens name, in fp32: (sequences, length, hidden)."""
    width = embedding.shape[1]
    distinct, inverse = torch.unique(tokens, return_inverse=True)
    rows = [reader.block(embedding, range(row, row + 1), range(width), width) for row in distinct.tolist()]
    return torch.cat(rows).float()[inverse]
