"""What a family says about a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pyfold.families.attention import Attention
from pyfold.io.checkpoint import Checkpoint


@dataclass(frozen=True)
class FoldGroup:
    """The tensors that share one hidden dimension of ``width`` units.

    Attributes
    ----------
    name : str
        What people call it: ``layers.5.mlp``.
    layer : int
    width : int
        N, the number of units.
    width_key : str
        The config field that holds the width.
    producers : tuple of str
        Tensors (N, D) whose rows are the units.
    consumers : tuple of str
        Tensors (H, N) whose columns read the units.
    riders : tuple of str
        Vectors (N,) with one value per unit: biases.
    gain : str
        The vector (D,) of the norm before the producers, which multiplies all that they read.
    act : str
        What gates: unit i says ``act(gate_i x) * (up_i x)``, of the producers' rows.
    """

    name: str
    layer: int
    width: int
    width_key: str
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    riders: tuple[str, ...]
    gain: str
    act: str

    @property
    def tensors(self) -> tuple[str, ...]:
        return self.producers + self.consumers + self.riders

    def shape_at(self, width: int, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a member tensor once the group has ``width`` units."""
        return (shape[0], width) if name in self.consumers else (width, *shape[1:])


class Family(Protocol):
    """One architecture."""

    @property
    def model_type(self) -> str:
        """``model_type`` in config.json."""

    @property
    def class_prefix(self) -> str:
        """Of its classes in transformers: ``Llama`` for LlamaForCausalLM, LlamaModel, LlamaMLP."""

    @property
    def gguf(self) -> str:
        """What llama.cpp calls the architecture."""

    @property
    def any_heads(self) -> str:
        """Where its config in transformers wants num_attention_heads to divide hidden_size: the model type that computes the
        same, without biases, and takes any number."""

    def fold_groups(self, checkpoint: Checkpoint) -> list[FoldGroup]:
        """Every fold group of a checkpoint, in layer order; shapes checked against config.json."""

    def attention(self, checkpoint: Checkpoint) -> list[Attention]:
        """The heads of every layer; shapes checked against config.json."""


def prefix_of(checkpoint: Checkpoint) -> str:
    """What stands before the names of a decoder's tensors: nothing in a checkpoint of the bare decoder (LlamaModel)."""
    return "model." if any(name.startswith("model.") for name in checkpoint.tensors) else ""
