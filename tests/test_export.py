"""Exports: what llama.cpp itself says of a file is what transformers says of the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
import torch
from conftest import ROOT, load, run_cli, tiny_checkpoint

import pyfold

TEXTS = ["Hello, world! It's 2026; 1234567 apples.", "  naïve\n\n\tcafé 你好 ", "<s>ab</s>"]


def byte_level(folder: Path, pre: str = "gpt-2") -> Path:
    """A byte-level BPE tokenizer of 64 tokens for a tiny checkpoint."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    letters = [*"abcdefghijklmnopqrstuvwxyzĠĊ0123456789.,!?A"]
    merges = [("a", "b"), ("ab", "c"), ("Ġ", "a"), ("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2")]
    words = ["<pad>", "<s>", "</s>", *letters, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(BPE({word: i for i, word in enumerate(words)}, merges))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    tokenizer.pre_tokenizer = {"gpt-2": whole, "smollm": digits, "none": pre_tokenizers.Whitespace()}[pre]
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    wrapped.save_pretrained(folder)
    return folder


def with_bytes(folder: Path) -> Path:
    """A tokenizer as SentencePiece makes them: ▁ for spaces, bytes for what it does not know; 300 tokens."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    merges = [("t", "h"), ("▁", "th"), ("▁th", "e"), ("a", "b"), ("ab", "a"), ("b", "a"), ("▁", "a")]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *("".join(pair) for pair in merges)]
    words += [*"▁abcdehilmnoprstuw.,!12"]
    tokenizer = Tokenizer(BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    wrapped.save_pretrained(folder)
    return folder


def check(file: Path, folder: Path, prompts: list[list[int]], n_predict: int, n_probs: int, **options: Any) -> None:
    """Greedy tokens are the same ones, and log-probabilities within 1e-3."""
    found = llama_cpp.run(file, prompts=prompts, n_predict=n_predict, n_probs=n_probs)
    model = load(folder, **options)
    for prompt, completion in zip(prompts, found["completions"], strict=True):
        ids = torch.tensor([prompt + completion["tokens"]])
        with torch.inference_mode():
            said = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert said.argmax(-1).tolist() == completion["tokens"]
        assert len(said) == n_predict or completion["tokens"][-1] == model.config.eos_token_id
        for step, likeliest in zip(said, completion["logprobs"], strict=True):
            assert len(likeliest) == n_probs
            for token, logprob in likeliest.items():
                assert abs(float(step[int(token)]) - logprob) < 1e-3


def export(folder: Path, tmp_path: Path, **options: Any) -> tuple[Path, Any]:
    file = tmp_path / "model.gguf"
    return file, pyfold.export_checkpoint(folder, file, **options)


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}
ATTENTION_BIAS = {"attention_bias": True, "mlp_bias": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biases": ("llama", ATTENTION_BIAS),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "wide heads": ("mistral", {"head_dim": 16, "sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_stock_in_llama_cpp(case: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    family, options = CASES[case]
    folder = byte_level(tiny_checkpoint(tmp_path / "tiny", family, **options))
    file, report = export(folder, tmp_path)
    assert report.architecture == {"mistral": "llama"}.get(family, family)
    check(file, folder, [[5, 9, 11, 40], [1, *range(3, 60)]], n_predict=20, n_probs=64)


@pytest.mark.parametrize("case", ["llama", "llama tied", "llama3 rope", "wide heads", "qwen2"])
def test_layers_that_differ_in_llama_cpp(case: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    family, options = CASES[case]
    source = byte_level(tiny_checkpoint(tmp_path / "tiny", family, **options))
    folder = tmp_path / "folded"
    pyfold.fold_checkpoint(source, folder, ratio=0.3, layers="1")
    file, report = export(folder, tmp_path)
    assert report.architecture == "deci"
    check(file, folder, [[5, 9, 11, 40], [1, *range(3, 60)]], n_predict=20, n_probs=64, trust_remote_code=True)


def test_what_llama_cpp_has_no_place_for(tmp_path: Path) -> None:
    folder = tmp_path / "folded"
    pyfold.fold_checkpoint(byte_level(tiny_checkpoint(tmp_path / "tiny", "qwen3")), folder, ratio=0.3, layers="1")
    with pytest.raises(ValueError, match=r"no place for tensor 'model.layers.0.self_attn.*_norm.weight' in its 'deci'"):
        export(folder, tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["folded", "tiny"]


@pytest.mark.model
def test_smollm2_in_llama_cpp(smollm2: Path, tmp_path: Path) -> None:
    """A real model, layers folded to widths of their own: 64 greedy tokens are the same, and so are all texts' tokens."""
    pytest.importorskip("xllamacpp")
    from transformers import AutoTokenizer

    folder = tmp_path / "folded"
    pyfold.fold_checkpoint(smollm2, folder, ratio=0.2, layers="14-17", dtype="float32")
    file, report = export(folder, tmp_path, dtype="float32")
    assert report.architecture == "deci"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("The capital of France is").input_ids
    check(file, folder, [prompt], n_predict=64, n_probs=10, trust_remote_code=True)
    texts = [*TEXTS, "<|im_start|>user\nHi<|im_end|>\n", (ROOT / "README.md").read_text()[:4000]]
    assert llama_cpp.run(file, texts=texts)["texts"] == [tokenizer(text).input_ids for text in texts]


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "bytes"])
def test_tokens(pre: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    from transformers import AutoTokenizer

    folder = tiny_checkpoint(tmp_path / "tiny", vocab_size=300 if pre == "bytes" else 64)
    folder = with_bytes(folder) if pre == "bytes" else byte_level(folder, pre)
    file, _ = export(folder, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["the abc. 1212", "abaab the  theab", "a\nthe!"] + (["wé the 你"] if pre == "bytes" else [])
    expected = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    assert llama_cpp.run(file, texts=texts)["texts"] == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_types(dtype: str, tmp_path: Path) -> None:
    """Every tensor is the source's, in another type; rows of 48 cannot be Q8_0."""
    import numpy as np
    from gguf import GGUFReader
    from gguf.quants import dequantize

    folder = byte_level(tiny_checkpoint(tmp_path / "tiny"))
    file, report = export(folder, tmp_path, dtype=dtype)
    read = {each.name: each for each in GGUFReader(file).tensors}
    assert len(read) == report.n_tensors
    assert sum(each.n_bytes for each in read.values()) == report.n_bytes
    down, up = read["blk.1.ffn_down.weight"], read["blk.1.ffn_up.weight"]
    assert up.tensor_type.name == {"float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    assert down.tensor_type.name == ("F16" if dtype == "q8_0" else up.tensor_type.name)
    assert read["blk.1.ffn_norm.weight"].tensor_type.name == "F32"
    assert bool(report.notes) == (dtype == "q8_0")
    weight = load(folder).model.layers[1].mlp.up_proj.weight.detach().numpy()
    step = {"float16": 2**-11, "bfloat16": 2**-8, "q8_0": 2**-7}[dtype]
    assert np.abs(dequantize(up.data, up.tensor_type) - weight).max() <= step * np.abs(weight).max()


def _set(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_bad_input(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny")

    def fails(match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            export(folder, tmp_path, **options)
        assert sorted(each.name for each in tmp_path.iterdir()) == ["tiny"]

    fails(r"tokenizer.json: missing")
    byte_level(folder, "none")
    fails("pre-tokenizer is none of those")
    byte_level(folder)
    fails("dtype: expected one of", dtype="int8")
    fails("to: expected one of", to="onnx")
    whole = json.loads((folder / "config.json").read_text())
    for values, message in [
        ({"hidden_act": "gelu"}, "SiLU for hidden_act, got 'gelu'"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
        ({"tie_word_embeddings": False, "vocab_size": 64}, None),
    ]:
        _set(folder, **values)
        if message:
            fails(message)
        (folder / "config.json").write_text(json.dumps(whole))
    file, _ = export(folder, tmp_path)
    with pytest.raises(ValueError, match="exists; --overwrite replaces it"):
        export(folder, tmp_path)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="a folder; name a file"):
        pyfold.export_checkpoint(folder, tmp_path)
    export(folder, tmp_path, overwrite=True)
    assert file.read_bytes() == before


def test_overflow_leaves_nothing(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = byte_level(tiny_checkpoint(tmp_path / "tiny"))
    for shard in folder.glob("*.safetensors"):
        save_file({name: 1e6 * tensor for name, tensor in load_file(shard).items()}, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="beyond float16's 65504"):
        export(folder, tmp_path, dtype="float16")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["tiny"]


def test_command_line(tmp_path: Path) -> None:
    folder, file = byte_level(tiny_checkpoint(tmp_path / "tiny")), tmp_path / "a model.gguf"
    done = run_cli("export", folder, file, "--dtype", "q8_0")
    assert done.returncode == 0, done.stderr
    assert f"llama-server -m '{file}'" in done.stdout.splitlines()[0]
    assert "note: 3 matrices, as model.layers.0.mlp.down_proj.weight, are F16" in done.stdout
    done = run_cli("export", folder, file)
    assert (done.returncode, done.stderr) == (2, f"pyfold: {file}: exists; --overwrite replaces it\n")
    done = run_cli("export", folder, file, "--overwrite", "--json")
    assert json.loads(done.stdout)["types"] == {"F32": 30}
