"""Hidden states of calibration tokens on their way through a decoder as its layers are folded, and the way back of gradients.

One decoder layer is in memory at a time, as transformers runs it, and of the tokens no more than their hidden states, in fp32:
4 x tokens x hidden bytes. Matrix products may be computed in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import Identity, Module, Parameter
from torch.nn.functional import cross_entropy, kl_div, linear

from pyfold.errors import PyfoldError
from pyfold.families.base import prefix_of
from pyfold.io.checkpoint import Checkpoint
from pyfold.io.safetensors import Reader, TensorInfo
from pyfold.progress import Progress

CPU = torch.device("cpu")
BATCH = 1 << 12  # tokens that go through a layer together
_LOGITS = 1 << 8  # tokens whose logits are in memory together
_KEPT = 1 << 28  # bytes of hidden states that are kept for the way back, or those of one sequence
HEAD, EMBEDDING, NORM = "lm_head.weight", "embed_tokens.weight", "norm.weight"
_ATTENTION = "self_attn."
BEFORE = "post_attention_layernorm."  # the feed-forward network, as it is named
_FED = ("gate_proj.weight", "up_proj.weight", "down_proj.weight", "gate_proj.bias", "up_proj.bias", "down_proj.bias")
_OWN = ("auto_map", "architectures", "per_layer_config", "torch_dtype", "dtype")  # of config.json, not of the decoder itself


class Mlp(NamedTuple):
    """A gated feed-forward network of N units: ``down(act(gate(x)) * up(x))``, products in the dtype of the weights."""

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    act: Callable[[Tensor], Tensor]

    def units(self, x: Tensor) -> Tensor:
        """(..., hidden) -> (..., N), in the dtype of the weights."""
        x = x.to(self.gate.dtype)
        return self.act(linear(x, self.gate, self.gate_bias)) * linear(x, self.up, self.up_bias)

    def output(self, x: Tensor) -> Tensor:
        """(..., hidden) -> (..., hidden), fp32."""
        return linear(self.units(x), self.down, self.down_bias).float()

    def kept(self, units: Tensor, down: Tensor) -> Mlp:
        """The network of some of its units, and another consumer."""
        gate_bias, up_bias = (None if bias is None else bias[units] for bias in (self.gate_bias, self.up_bias))
        return self._replace(
            gate=self.gate[units], up=self.up[units], down=down.to(self.down.dtype), gate_bias=gate_bias, up_bias=up_bias
        )


def decoder(checkpoint: Checkpoint, attention: str = "sdpa") -> Any:
    """Its modules in transformers, without weights; ``attention`` by its name there."""
    from transformers import AutoConfig, AutoModel

    options = {key: value for key, value in checkpoint.config.items() if key not in _OWN}
    with torch.device("meta"):
        return AutoModel.from_config(AutoConfig.for_model(**options, attn_implementation=attention)).eval()


def put(module: Module, name: str, value: Tensor) -> None:
    """A parameter by its path, of any shape: widths may differ from layer to layer."""
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, Parameter(value, requires_grad=False))


class Layers:
    """Of a decoder, read as they are needed.

    Parameters
    ----------
    checkpoint : Checkpoint
    length : int
        Tokens of a sequence.
    place : callable
        Where a tensor of a layer is to be read.
    dtype : torch.dtype
        Of matrix products.
    device : torch.device
        Where they are computed, and all that is in memory is.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        length: int,
        place: Callable[[str], TensorInfo],
        dtype: torch.dtype,
        device: torch.device = CPU,
    ) -> None:
        self._model = decoder(checkpoint)
        window = getattr(self._model.config, "sliding_window", None)
        if window is not None and window < length:
            raise PyfoldError(
                f"{checkpoint.path / 'config.json'}: a sliding_window of {window} is less than the {length} tokens of a "
                "calibration sequence; fold by weights alone (metric weight)"
            )
        self._tensors, self._place, self._dtype, self._device = checkpoint.tensors, place, dtype, device
        self._prefix, self._head_name = prefix_of(checkpoint), head_of(checkpoint)
        rotary = type(self._model.rotary_emb)(config=self._model.config)
        self._rotation = [part.to(device, dtype) for part in rotary(torch.empty(1), torch.arange(length)[None])]
        self._reader = Reader()

    def __len__(self) -> int:
        return len(self._model.layers)

    def close(self) -> None:
        """Close the files."""
        self._reader.close()

    def embedded(self, tokens: Tensor) -> Tensor:
        """(sequences, length, hidden), fp32: the rows of the embedding that tokens name."""
        embedding = self._tensors[self._prefix + EMBEDDING]
        width = embedding.shape[1]
        distinct, inverse = torch.unique(tokens, return_inverse=True)
        rows = [self._reader.block(embedding, range(row, row + 1), range(width), width) for row in distinct.tolist()]
        return torch.cat(rows).to(self._device).float()[inverse.to(self._device)]

    def load(self, i: int, part: str = "") -> None:
        """Have the attention and the norms of a layer in memory, or those whose names begin with ``part``."""
        layer = self._model.layers[i]
        names = [name for name, _ in layer.named_parameters() if not name.startswith("mlp.") and name.startswith(part)]
        for name, values in self._read(i, "", names):
            part = name.removeprefix(f"{self._prefix}layers.{i}.")
            put(layer, part, values.to(self._dtype) if part.startswith(_ATTENTION) else values.float())

    def drop(self, i: int, part: str = "") -> None:
        """Have a layer, or a part of it, in memory no more."""
        self._model.layers[i].get_submodule(part).to("meta")

    def attended(self, i: int, states: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """What attention adds to hidden states. ``weights``: its tensors by name, of any number of heads; those that are not
        given are as they are."""
        return self._attention(i, self.before_attention(i, states), weights or {}).float()

    def before_attention(self, i: int, states: Tensor) -> Tensor:
        """What the attention of a layer reads."""
        normed: Tensor = self._model.layers[i].input_layernorm(states)
        return normed

    def said(self, i: int, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """What heads of these tensors say of what the attention of a layer reads: (sequences, length, heads x head_dim)."""
        attention = self._model.layers[i].self_attn
        output, attention.o_proj = attention.o_proj, Identity()
        try:
            return self._attention(i, x, weights)
        finally:
            attention.o_proj = output

    def _attention(self, i: int, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        module, at = self._model.layers[i].self_attn, f"{self._prefix}layers.{i}.{_ATTENTION}"
        parts = (part for part, _ in module.named_parameters() if at + part in weights)
        given = {part: weights[at + part].to(self._device, self._dtype) for part in parts}
        inputs = {"hidden_states": x.to(self._dtype), "position_embeddings": self._rotation, "attention_mask": None}
        added: Tensor = functional_call(module, given, kwargs=inputs)[0]
        return added

    def normed(self, i: int, states: Tensor) -> Tensor:
        """What the feed-forward network of a layer reads."""
        normed: Tensor = self._model.layers[i].post_attention_layernorm(states)
        return normed

    def mlp(self, i: int, weights: Mapping[str, Tensor] | None = None) -> Mlp:
        """The feed-forward network of a layer, from its tensors by name; those that are not given are as they are."""
        at = f"{self._prefix}layers.{i}.mlp."
        given = weights or {}
        others = self._read(i, "mlp.", (name for name in _FED if at + name not in given))
        found = {name: values.to(self._device, self._dtype) for name, values in chain(given.items(), others)}
        gate, up, down = (found[at + name] for name in _FED[:3])
        gate_bias, up_bias, down_bias = (found.get(at + name) for name in _FED[3:])
        return Mlp(gate, up, down, gate_bias, up_bias, down_bias, self._model.layers[i].mlp.act_fn)

    def load_head(self) -> None:
        self._head = self._reader.read(self._tensors[self._head_name]).to(self._device, self._dtype)
        put(self._model.norm, "weight", self._reader.read(self._tensors[self._prefix + NORM]).to(self._device).float())

    def logits(self, states: Tensor) -> Tensor:
        """(..., hidden) behind the last layer -> (..., vocabulary), fp32."""
        return linear(self._model.norm(states).to(self._dtype), self._head).float()

    def _read(self, i: int, part: str, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors of a layer with their full names, one at a time; those that the checkpoint has."""
        for name in (f"{self._prefix}layers.{i}.{part}{name}" for name in names):
            if name in self._tensors:
                yield name, self._reader.read(self._place(name)).to(self._device)


class Activations:
    """Hidden states of tokens (sequences, length), at first before layer 0. Arguments as of :class:`Layers`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokens: Tensor,
        place: Callable[[str], TensorInfo],
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
    ) -> None:
        self._layers = Layers(checkpoint, tokens.shape[1], place, dtype, device)
        self._layer, self._loaded, self._attended = 0, False, False
        self._hidden = self._layers.embedded(tokens)
        self._forks: list[Tensor] = []
        self._to_come: list[Tensor] = []  # forks that are past this layer already

    def close(self) -> None:
        """Close the files."""
        self._layers.close()

    def before_attention(self, layer: int) -> Iterator[Tensor]:
        """What the attention of a layer reads: batches of whole sequences, (sequences, length, hidden)."""
        with torch.inference_mode():
            self._pass_until(layer)
            self._load()
        for batch in _batches(self._hidden):
            with torch.inference_mode():  # not while the caller has the batch
                normed = self._layers.before_attention(layer, batch)
            yield normed

    def said(self, layer: int, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """What heads of these tensors say of a batch of what the attention of a layer reads."""
        with torch.inference_mode():
            return self._layers.said(layer, x, weights)

    def attend(self, layer: int, weights: Mapping[str, Tensor]) -> None:
        """Let the tokens through attention of these tensors in the place of the layer's own."""
        with torch.inference_mode():
            self._pass_until(layer)
            self._attend(weights)

    def inputs(self, layer: int) -> Iterator[Tensor]:
        """What the feed-forward network of a layer reads: batches of whole sequences, (sequences, length, hidden)."""
        with torch.inference_mode():
            self._pass_until(layer)
            self._attend()
        for batch in _batches(self._hidden):
            with torch.inference_mode():  # not while the caller has the batch
                normed = self._layers.normed(layer, batch)
            yield normed

    def mlp(self, layer: int, weights: Mapping[str, Tensor]) -> Mlp:
        """The network of a layer from its tensors by name."""
        return self._layers.mlp(layer, weights)

    def feed(self, mlp: Mlp) -> None:
        """Let the tokens through this network in the place of the layer's own, and on to the next layer."""
        with torch.inference_mode():
            for states in (self._hidden, *self._forks):
                self._through(mlp, states)
        self._layers.drop(self._layer)
        self._forks += self._to_come
        self._to_come = []
        self._layer, self._loaded, self._attended = self._layer + 1, False, False

    def fork(self, sequences: slice, mlp: Mlp) -> None:
        """Let copies of some sequences through this network, and on beside all others, which are still to be fed."""
        with torch.inference_mode():
            states = self._hidden[sequences].clone()
            self._through(mlp, states)
        self._to_come.append(states)

    def finish(self) -> None:
        """Go through the layers that are left."""
        with torch.inference_mode():
            self._pass_until(len(self._layers))

    def divergences(self, sequences: slice) -> list[float]:
        """Behind the last layer: of each fork of ``sequences`` the mean KL divergence, in nats, of what it says next from what
        they say."""
        sums = torch.zeros(len(self._forks), dtype=torch.float64)
        self._layers.load_head()
        with torch.inference_mode():
            own, *forks = (states.flatten(0, 1).split(_LOGITS) for states in (self._hidden[sequences], *self._forks))
            for i, states in enumerate(own):
                expected = self._layers.logits(states).log_softmax(-1)
                for fork, parts in enumerate(forks):
                    found = self._layers.logits(parts[i]).log_softmax(-1)
                    sums[fork] += float(kl_div(found, expected, reduction="sum", log_target=True))
        return (sums / self._hidden[sequences].shape[:2].numel()).tolist()

    def _pass_until(self, layer: int) -> None:
        while self._layer < layer:
            self._attend()
            self.feed(self._layers.mlp(self._layer))

    def _load(self) -> None:
        if not self._loaded:
            self._layers.load(self._layer)
        self._loaded = True

    def _attend(self, weights: Mapping[str, Tensor] | None = None) -> None:
        if self._attended:
            return
        self._load()
        for states in (self._hidden, *self._forks):
            for batch in _batches(states):
                batch += self._layers.attended(self._layer, batch, weights)
        self._layers.drop(self._layer, "self_attn")
        self._attended = True

    def _through(self, mlp: Mlp, states: Tensor) -> None:
        for batch in _batches(states):
            batch += mlp.output(self._layers.normed(self._layer, batch))


def information(
    checkpoint: Checkpoint,
    tokens: Tensor,
    dtype: torch.dtype,
    progress: Progress | None = None,
    device: torch.device = CPU,
) -> list[Tensor]:
    """Of each layer's units, Σ (h ∂L/∂h)² over tokens (sequences, length), (N,) fp32: what the loss L = -Σ ln p(next token)
    would notice of their going. On text that the model wrote this is the diagonal of its Fisher information about gains of the
    units."""
    with closing(Layers(checkpoint, tokens.shape[1], checkpoint.tensors.__getitem__, dtype, device)) as layers:
        return _information(layers, tokens, kept_at_once(checkpoint, tokens.shape[1]), progress)


def _information(layers: Layers, tokens: Tensor, at_once: int, progress: Progress | None) -> list[Tensor]:
    layers.load_head()
    found: dict[int, Tensor] = {}
    done = 0
    for part in tokens.split(at_once):
        with torch.no_grad():
            entering = [layers.embedded(part)]
            for i in range(len(layers)):
                layers.load(i)
                between = entering[-1] + layers.attended(i, entering[-1])
                entering.append(between + layers.mlp(i).output(layers.normed(i, between)))
                layers.drop(i)
        gradient = _loss_gradient(layers, entering.pop(), part)
        for i in reversed(range(len(layers))):
            layers.load(i)
            with torch.enable_grad():
                states = entering.pop().requires_grad_()
                between = states + layers.attended(i, states)
                mlp = layers.mlp(i)
                units = mlp.units(layers.normed(i, between))
                leaving = between + linear(units, mlp.down, mlp.down_bias).float()
                on_states, on_units = torch.autograd.grad(leaving, (states, units), gradient)
            gradient = on_states
            if progress and i == 0:
                done += part.numel()
                progress(done, tokens.numel(), "gradients, tokens")
            seen = (units.detach().float() * on_units.float()).flatten(0, 1).square().sum(0)
            found[i] = found[i] + seen if i in found else seen
            layers.drop(i)
    return [found[i].cpu() for i in range(len(layers))]


def information_bytes(checkpoint: Checkpoint, length: int, dtype: torch.dtype) -> int:
    """Memory that :func:`information` takes at most: the head, and with it logits, or a layer; and the tokens."""
    config, item = checkpoint.config, dtype.itemsize
    hidden, layers, n = config["hidden_size"], config["num_hidden_layers"], widest(checkpoint)
    at_once = kept_at_once(checkpoint, length) * length
    head = item * hidden * config["vocab_size"]
    of_tokens = at_once * (4 * hidden * (layers + 12) + 8 * item * n + 4 * n)
    return max(saying_bytes(checkpoint, dtype), head + _layer_bytes(checkpoint, dtype)) + of_tokens


def attending_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Memory that attention takes on the way of a batch through it: its weights, and what is made of the batch."""
    return _layer_bytes(checkpoint, dtype, _ATTENTION) + 8 * 4 * BATCH * checkpoint.config["hidden_size"]


def saying_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Memory that logits take at most: the head, and it as it is read, or what is said of some tokens."""
    head = checkpoint.tensors[head_of(checkpoint)]
    return dtype.itemsize * head.n_parameters + max(head.nbytes, 5 * 4 * _LOGITS * checkpoint.config["vocab_size"])


def head_of(checkpoint: Checkpoint) -> str:
    """The tensor that makes logits: of a model that shares it, the embedding."""
    return HEAD if HEAD in checkpoint.tensors else prefix_of(checkpoint) + EMBEDDING


def layer_tensors(checkpoint: Checkpoint, part: str = "") -> list[list[TensorInfo]]:
    """Of each layer, or of a part of it."""
    at = f"{prefix_of(checkpoint)}layers."
    return [
        [info for name, info in checkpoint.tensors.items() if name.startswith(f"{at}{i}.{part}")]
        for i in range(checkpoint.config["num_hidden_layers"])
    ]


def layer_parameters(checkpoint: Checkpoint, part: str = "") -> list[int]:
    """Of each layer, or of a part of it."""
    return [sum(info.n_parameters for info in layer) for layer in layer_tensors(checkpoint, part)]


def _layer_bytes(checkpoint: Checkpoint, dtype: torch.dtype, part: str = "") -> int:
    """The largest layer, or part of one, in memory, and a tensor of it as it is read."""
    read = max(info.nbytes for layer in layer_tensors(checkpoint, part) for info in layer)
    return dtype.itemsize * max(layer_parameters(checkpoint, part)) + read


def kept_at_once(checkpoint: Checkpoint, length: int) -> int:
    """Sequences whose hidden states before every layer are kept for the way back."""
    a_sequence = 4 * length * checkpoint.config["hidden_size"] * checkpoint.config["num_hidden_layers"]
    return max(1, min(BATCH // length, _KEPT // a_sequence))


def widest(checkpoint: Checkpoint) -> int:
    """Units of the widest feed-forward network."""
    return max(info.shape[0] for name, info in checkpoint.tensors.items() if name.endswith(f"mlp.{_FED[0]}"))


def _loss_gradient(layers: Layers, states: Tensor, tokens: Tensor) -> Tensor:
    """∂L/∂ hidden states (sequences, length, hidden) behind the last layer."""
    gradient = torch.zeros_like(states)
    for at in range(0, tokens.shape[1] - 1, step := max(1, _LOGITS // len(tokens))):
        end = min(at + step, tokens.shape[1] - 1)
        with torch.enable_grad():
            part = states[:, at:end].detach().requires_grad_()
            expected = tokens[:, at + 1 : end + 1].flatten().to(states.device)
            loss = cross_entropy(layers.logits(part).flatten(0, 1), expected, reduction="sum")
            [gradient[:, at:end]] = torch.autograd.grad(loss, part)
    return gradient


def _batches(states: Tensor) -> Iterator[Tensor]:
    return iter(states.split(max(1, BATCH // states.shape[1])))
