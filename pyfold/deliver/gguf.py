"""One GGUF file, as stock llama.cpp reads it: metadata, vocabulary, and which tensor goes where in which type.

Layers of one width are written as the architecture that they are; layers that differ as ``deci``, the one that llama.cpp reads
arrays of widths and head counts for. The package ``gguf`` writes the format.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from torch import Tensor

from pyfold.errors import PyfoldError
from pyfold.families import family_of
from pyfold.families.base import prefix_of
from pyfold.io.checkpoint import Checkpoint, read_json

if TYPE_CHECKING:
    from pyfold.families.attention import Attention

PER_LAYER = "deci"
# Architectures whose rotary embedding turns neighbours, x_2i and x_2i+1; transformers turns x_i and x_i+d/2.
_TURNS_NEIGHBOURS = ("llama", PER_LAYER)
# The pre-tokenizer of tokenizer.json, in parts, and what llama.cpp calls it.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PRE_TOKENIZERS = {
    ("ByteLevel regex",): "gpt-2",
    ("Digits", "ByteLevel regex"): "smollm",
    (_WORDS % "{1,3}", "ByteLevel"): "llama-bpe",
    (_WORDS % "", "ByteLevel"): "qwen2",
}
_Q8_BLOCK = 32
_BEYOND_HALF = 65520  # rounds to infinity
_CHUNK = 1 << 24  # numbers quantised at once


@dataclass(frozen=True)
class Model:
    """A checkpoint; what llama.cpp shall take it for; what stands before its tensors' names; every layer's width and heads."""

    checkpoint: Checkpoint
    architecture: str
    prefix: str
    widths: list[int]
    attention: list[Attention]

    @staticmethod
    def of(checkpoint: Checkpoint) -> Model:
        """Shapes checked against config.json."""
        family, differ = family_of(checkpoint), bool(checkpoint.config.get("per_layer_config"))
        return Model(
            checkpoint,
            PER_LAYER if differ else family.gguf,
            prefix_of(checkpoint),
            [group.width for group in family.fold_groups(checkpoint)],
            family.attention(checkpoint),
        )


@dataclass(frozen=True)
class Place:
    """A tensor of the file: its name there, its type, and the heads whose rows are put in another order, or 0."""

    name: str
    type: str
    heads: int


def places(model: Model, type: str | None) -> dict[str, Place]:
    """Where each tensor goes, by its name in the checkpoint. ``type``: F32, F16, BF16, Q8_0, or None for the one it has.

    Vectors are F32, as llama.cpp wants them; rows that are no multiple of 32 cannot be Q8_0, and are F16.

    Raises
    ------
    PyfoldError
        For a tensor that llama.cpp's architecture has no place for.
    """
    checkpoint, architecture = model.checkpoint, model.architecture
    names = gguf.get_tensor_name_map(_arch(architecture), len(model.attention))
    heads: dict[str | None, int] = {}
    for layer in model.attention if architecture in _TURNS_NEIGHBOURS else ():
        count = layer.n_groups * layer.n_queries
        heads |= {layer.query: count, layer.query_bias: count, layer.key: layer.n_groups, layer.key_bias: layer.n_groups}
    found = {}
    for name, info in checkpoint.tensors.items():
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and _tied(checkpoint)):
            continue  # computed; the same as the embedding
        full = name if model.prefix or name == "lm_head.weight" else f"model.{name}"
        known = names.get_name(full, try_suffixes=(".weight", ".bias"))
        if known is None:
            advice = " with layers that differ; fold all layers to one width" if architecture == PER_LAYER else ""
            raise PyfoldError(f"{checkpoint.path}: llama.cpp has no place for tensor '{name}' in its '{architecture}'{advice}")
        kind = info.dtype if type is None else type
        if len(info.shape) == 1:
            kind = "F32"
        elif kind == "Q8_0" and info.shape[-1] % _Q8_BLOCK:
            kind = "F16"
        found[name] = Place(known, kind, heads.get(name, 0))
    if "lm_head.weight" not in checkpoint.tensors and not _tied(checkpoint):
        raise PyfoldError(f"{checkpoint.path}: no lm_head.weight, and tie_word_embeddings is not true: not a language model")
    return found


def _tied(checkpoint: Checkpoint) -> bool:
    return bool(checkpoint.config.get("tie_word_embeddings"))


def _arch(architecture: str) -> Any:
    return next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)


def size(type: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    numbers = int(np.prod(shape, dtype=np.int64))
    return {"F32": 4, "F16": 2, "BF16": 2}[type] * numbers if type != "Q8_0" else numbers // _Q8_BLOCK * 34


def converted(tensor: Tensor, place: Place) -> np.ndarray:
    """A tensor as it is written: rows in llama.cpp's order, in the file's type; BF16 as uint16, Q8_0 as bytes."""
    if place.heads:
        half = tensor.shape[0] // place.heads // 2
        tensor = tensor.view(place.heads, 2, half, -1).transpose(1, 2).reshape(tensor.shape)
    if place.type == "Q8_0":
        return _quantised(tensor)
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[place.type]
    out = tensor.to(dtype)
    if out.dtype == torch.float16 != tensor.dtype and float(tensor.abs().max()) >= _BEYOND_HALF:
        raise PyfoldError(f"{place.name}: has values beyond float16's 65504; use --dtype bfloat16 or float32")
    return (out.view(torch.uint16) if dtype == torch.bfloat16 else out).numpy()


def _quantised(tensor: Tensor) -> np.ndarray:
    rows, columns = tensor.shape
    out = np.empty((rows, columns // _Q8_BLOCK * 34), np.uint8)
    at_once = max(1, _CHUNK // columns)
    for begin in range(0, rows, at_once):
        part = tensor[begin : begin + at_once].float().numpy()
        out[begin : begin + at_once] = gguf.quants.quantize(part, _gguf_type("Q8_0"))
    return out


def _gguf_type(type: str) -> Any:
    return gguf.GGMLQuantizationType[type]


def open_writer(path: Path, model: Model, found: dict[str, Place]) -> Any:
    """A ``gguf.GGUFWriter`` with metadata, vocabulary and tensor headers on the disk; tensors follow in the order of ``found``.

    Raises
    ------
    PyfoldError
        For what llama.cpp cannot do: another activation than SiLU, a rotary embedding or a tokenizer that it does not know.
    """
    checkpoint = model.checkpoint
    writer = gguf.GGUFWriter(path, model.architecture)
    try:
        _metadata(writer, model)
        types = [place.type for name, place in found.items() if len(checkpoint.tensors[name].shape) > 1]
        most = max(set(types), key=types.count)
        writer.add_file_type({"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}[most])
        _vocabulary(writer, checkpoint, model.prefix)
        factors = _rope_factors(model)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        for name, place in found.items():
            shape = checkpoint.tensors[name].shape
            dtype = np.dtype({"F32": "f4", "F16": "f2", "BF16": "u2", "Q8_0": "u1"}[place.type])
            bytes_of = (*shape[:-1], shape[-1] // _Q8_BLOCK * 34) if place.type == "Q8_0" else shape
            writer.add_tensor_info(place.name, bytes_of, dtype, size(place.type, shape), _gguf_type(place.type))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
    except BaseException:
        writer.close()
        raise
    return writer


def _metadata(writer: Any, model: Model) -> None:
    checkpoint, architecture, attention = model.checkpoint, model.architecture, model.attention
    config, file = checkpoint.config, checkpoint.path / "config.json"
    act = config.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise PyfoldError(f"{file}: llama.cpp's '{architecture}' has SiLU for hidden_act, got '{act}'")
    writer.add_name(str(checkpoint.hub_id or checkpoint.path.resolve().name))
    length = int(_number(checkpoint, config, "max_position_embeddings", 2048))
    if config.get("sliding_window") is not None and config.get("use_sliding_window", True):
        length = min(length, int(_number(checkpoint, config, "sliding_window", length)))
    writer.add_context_length(length)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(len(attention))
    for add, of_layers in (
        (writer.add_feed_forward_length, model.widths),
        (writer.add_head_count, [each.n_groups * each.n_queries for each in attention]),
        (writer.add_head_count_kv, [each.n_groups for each in attention]),
    ):
        add(of_layers if architecture == PER_LAYER else of_layers[0])
    writer.add_key_length(attention[0].head_dim)
    writer.add_value_length(attention[0].head_dim)
    writer.add_rope_dimension_count(attention[0].head_dim)
    writer.add_layer_norm_rms_eps(_number(checkpoint, config, "rms_norm_eps", 1e-6))
    kind, values, theta = _rope(checkpoint)
    writer.add_rope_freq_base(theta)
    if kind not in ("default", "linear", "yarn", "llama3") or (kind == "llama3" and architecture not in _TURNS_NEIGHBOURS):
        raise PyfoldError(f"{file}: rope type '{kind}' is not one that pyfold writes for llama.cpp's '{architecture}'")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(_number(checkpoint, values, "factor"))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(_number(checkpoint, values, "original_max_position_embeddings", length)))


def _rope(checkpoint: Checkpoint) -> tuple[str, dict[str, Any], float]:
    """What config.json says of the rotary embedding, in either spelling: its type, all of it, and θ."""
    config = checkpoint.config
    values: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(given := config.get(key) or {}, dict):
            raise PyfoldError(f"{checkpoint.path / 'config.json'}: expected a dict for {key}, got {given!r:.60}")
        values |= given
    theta = _number(checkpoint, {**config, **values}, "rope_theta", 10000.0)
    return str(values.get("rope_type", values.get("type", "default"))), values, theta


def _number(checkpoint: Checkpoint, config: dict[str, Any], key: str, default: float | None = None) -> float:
    """A positive number of config.json."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1 << 31:
        raise PyfoldError(f"{checkpoint.path / 'config.json'}: expected a positive number for {key}, got {value!r:.60}")
    return float(value)


def _rope_factors(model: Model) -> np.ndarray | None:
    """(head_dim / 2,) fp32: by how much each frequency is less than θ^(-2i/d), where config.json scales each by its own."""
    kind, values, theta = _rope(model.checkpoint)
    if kind != "llama3":
        return None
    d = model.attention[0].head_dim
    plain = theta ** (-np.arange(0, d, 2) / d)
    needed = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factor, low, high, length = (_number(model.checkpoint, values, key) for key in needed)
    turns = length * plain / (2 * np.pi)  # over the length trained on
    mixed = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - mixed) / factor + mixed)).astype(np.float32)


def _vocabulary(writer: Any, checkpoint: Checkpoint, prefix: str) -> None:
    file = checkpoint.path / "tokenizer.json"
    try:
        _write_vocabulary(writer, checkpoint, prefix, file)
    except PyfoldError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise PyfoldError(f"{file}: not a tokenizer that pyfold can write to GGUF ({type(error).__name__}: {error})") from None


def _write_vocabulary(writer: Any, checkpoint: Checkpoint, prefix: str, file: Path) -> None:
    if not file.is_file():
        raise PyfoldError(
            f"{file}: missing; llama.cpp needs the vocabulary: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    tokenizer = read_json(file)
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        raise PyfoldError(f"{file}: llama.cpp reads BPE tokenizers, got {model.get('type')!r}")
    n_tokens = checkpoint.tensors[f"{prefix}embed_tokens.weight"].shape[0]
    texts, types = [f"[PAD{i}]" for i in range(n_tokens)], [gguf.TokenType.UNUSED] * n_tokens
    special = {each["content"]: each["special"] for each in tokenizer.get("added_tokens") or []}
    ids = {**model["vocab"], **{each["content"]: each["id"] for each in tokenizer.get("added_tokens") or []}}
    if max(ids.values()) >= n_tokens:
        raise PyfoldError(f"{file}: token {max(ids.values())} has no embedding: there are {n_tokens}")
    for text, i in ids.items():
        texts[i], types[i] = text, gguf.TokenType.NORMAL
        if text in special:
            types[i] = gguf.TokenType.CONTROL if special[text] else gguf.TokenType.USER_DEFINED
    if model.get("byte_fallback"):  # SentencePiece's, in which what is merged first scores highest
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        order: dict[str, int] = {}
        for rank, pair in enumerate(model.get("merges") or []):
            order.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), rank)
        for text, i in ids.items():
            if re.fullmatch("<0x[0-9A-F]{2}>", text):
                types[i] = gguf.TokenType.BYTE
            elif text == model.get("unk_token"):
                types[i] = gguf.TokenType.UNKNOWN
        writer.add_token_scores([-float(order.get(text, len(order))) for text in texts])
        spaced = [*_parts(tokenizer.get("normalizer")), *_parts(tokenizer.get("pre_tokenizer"))]
        writer.add_add_space_prefix(
            any(each.get("prepend") == "▁" or each.get("prepend_scheme") in ("always", "first") for each in spaced)
        )
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(tokenizer, file))
    writer.add_token_list(texts)
    writer.add_token_types(types)
    gguf.SpecialVocab(checkpoint.path, load_merges=not model.get("byte_fallback"), n_vocab=n_tokens).add_to_gguf(
        writer, quiet=True
    )


def _parts(node: Any) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer of tokenizer.json as a list of its steps."""
    if not node:
        return []
    return [step for each in node.get("normalizers", node.get("pretokenizers", [node])) for step in ([each] if each else [])]


def _pre_tokenizer(tokenizer: dict[str, Any], file: Path) -> str:
    said: list[str] = []
    for step in _parts(tokenizer.get("pre_tokenizer")):
        if step["type"] == "ByteLevel":
            said.append("ByteLevel regex" if step.get("use_regex", True) else "ByteLevel")
        elif step["type"] == "Digits" and step.get("individual_digits"):
            said.append("Digits")
        elif step["type"] == "Split" and isinstance(step.get("pattern"), dict):
            said.append(str(step["pattern"].get("Regex")))
        else:
            said.append(step["type"])
    if tuple(said) not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS.values())
        raise PyfoldError(f"{file}: its pre-tokenizer is none of those that pyfold knows llama.cpp's name of ({known}): {said}")
    return _PRE_TOKENIZERS[tuple(said)]
