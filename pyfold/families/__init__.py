"""Architecture knowledge: which tensors share a hidden dimension. Nothing outside this folder knows a model type.

A family turns a config and tensor shapes into fold groups. To add one: a module here, and its entry in ``FAMILIES``.
"""

from __future__ import annotations

from pyfold.errors import PyfoldError
from pyfold.families.base import Family, FoldGroup
from pyfold.families.decoder import DecoderFamily
from pyfold.io.checkpoint import Checkpoint

__all__ = ["FAMILIES", "Family", "FoldGroup", "family_of"]

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        DecoderFamily("llama", "Llama", "llama", any_heads="mistral"),
        DecoderFamily("mistral", "Mistral", "llama"),
        DecoderFamily("qwen2", "Qwen2", "qwen2"),
        DecoderFamily("qwen3", "Qwen3", "qwen3"),
    )
}


def family_of(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint, by its config's model_type.

    Raises
    ------
    PyfoldError
        For an architecture that pyfold does not know; lists those it does.
    """
    model_type = str(checkpoint.config.get("model_type"))
    if model_type not in FAMILIES:
        raise PyfoldError(
            f"{checkpoint.path / 'config.json'}: model_type '{model_type}' is not supported; pyfold folds {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]
