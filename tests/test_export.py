"""Exports: what llama.cpp itself says of a file is what transformers says of the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
import torch
from conftest import FAMILIES, ROOT, load, logits, prompt, run_cli, tensors_of, tiny_checkpoint, with_tokenizer
from safetensors.torch import load_file, save_file

import pyfold
from pyfold.families import family_of
from pyfold.io.checkpoint import open_checkpoint

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
    for begin, completion in zip(prompts, found["completions"], strict=True):
        ids = torch.tensor([begin + completion["tokens"]])
        with torch.inference_mode():
            said = model(ids).logits[0, len(begin) - 1 : -1].log_softmax(-1)
        assert said.argmax(-1).tolist() == completion["tokens"]
        assert len(said) == n_predict or completion["tokens"][-1] == model.config.eos_token_id
        for step, likeliest in zip(said, completion["logprobs"], strict=True):
            assert len(likeliest) == n_probs
            for token, logprob in likeliest.items():
                assert abs(float(step[int(token)]) - logprob) < 1e-3


def export(folder: Path, tmp_path: Path, **options: Any) -> tuple[Path, Any]:
    file = tmp_path / "model.gguf"
    return file, pyfold.export_checkpoint(folder, file, **{"to": "gguf", **options})


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
    begin = tokenizer("The capital of France is").input_ids
    check(file, folder, [begin], n_predict=64, n_probs=10, trust_remote_code=True)
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


def with_layers_that_differ(source: Path, folder: Path) -> Path:
    """Layer 1 with fewer units, and one of its KV heads gone; of a fold that is not known."""
    pyfold.fold_checkpoint(source, folder, ratio=0.3, layers="1")
    (folder / "pyfold.json").unlink()
    checkpoint = open_checkpoint(folder)
    one, tensors = family_of(checkpoint).attention(checkpoint)[1], tensors_of(folder)
    for name in one.names:
        shape = one.shape_at(1, name, tuple(tensors[name].shape))
        tensors[name] = tensors[name][tuple(slice(size) for size in shape)].contiguous()
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["per_layer_config"]["1"] |= one.config(1)
    _set(folder, per_layer_config=config["per_layer_config"], allow_global_per_layer_attribute_access=True)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_zeros_change_nothing(family: str, tmp_path: Path) -> None:
    folded, padded = (
        with_layers_that_differ(tiny_checkpoint(tmp_path / "tiny", family), tmp_path / "folded"),
        tmp_path / "padded",
    )
    pyfold.export_checkpoint(folded, padded, to="hf-stock")
    config = json.loads((padded / "config.json").read_text())
    assert not {"per_layer_config", "auto_map"} & config.keys()
    assert (config["model_type"], config["intermediate_size"], config["num_key_value_heads"]) == (family, 48, 2)
    assert not list(padded.glob("*.py"))
    expected = logits(load(folded, trust_remote_code=True), prompt())
    assert torch.allclose(logits(load(padded), prompt()), expected, atol=1e-4)
    assert "trust_remote_code" not in (padded / "README.md").read_text()
    again = tmp_path / "again"
    report = pyfold.export_checkpoint(padded, again, to="hf-stock", multiple_of=40, dtype="bfloat16", max_shard_size="20KB")
    assert report.types == {"BF16": report.n_tensors}
    assert report.n_parameters == sum(tensor.numel() for tensor in tensors_of(again).values())
    assert report.n_bytes == 2 * report.n_parameters
    assert json.loads((again / "config.json").read_text())["intermediate_size"] == 80
    assert [note for note in report.notes if "zeros" in note]
    model = load(again)
    assert model.config.dtype is not None
    assert torch.allclose(logits(model, prompt()), expected, atol=0.5)


def test_llama_with_any_number_of_heads(tmp_path: Path, whole_text: Path) -> None:
    """Three query heads of eight rows do not divide 32: written as Mistral, the same function."""
    source = with_tokenizer(tiny_checkpoint(tmp_path / "tiny", num_attention_heads=4, num_key_value_heads=4))
    folded, padded = tmp_path / "folded", tmp_path / "padded"
    options = {"ratio": 0.3, "heads_ratio": 0.25, "metric": "function", "calibration": whole_text}
    pyfold.fold_checkpoint(source, folded, **options)
    config = json.loads((folded / "config.json").read_text())
    assert (config["architectures"], config["num_attention_heads"]) == (["MistralForCausalLM"], 3)
    assert "per_layer_config" not in config
    pyfold.verify_checkpoint(folded)
    part = tmp_path / "part"
    pyfold.fold_checkpoint(source, part, **options, layers="0-1")
    (part / "pyfold.json").unlink()
    assert json.loads((part / "config.json").read_text())["model_type"] == "llama"
    pyfold.export_checkpoint(part, padded, to="hf-stock")
    expected = logits(load(part, trust_remote_code=True), prompt())
    assert torch.allclose(logits(load(padded), prompt()), expected, atol=1e-4)


@pytest.mark.model
def test_smollm2_alike_in_both(smollm2: Path, tmp_path: Path) -> None:
    """Padded, without custom code: llama.cpp and transformers choose the same 64 tokens, and logits are those of the fold."""
    pytest.importorskip("xllamacpp")
    from transformers import AutoTokenizer

    folded, padded = tmp_path / "folded", tmp_path / "padded"
    pyfold.fold_checkpoint(smollm2, folded, ratio=0.3, layers="12-29", dtype="float32")
    with pytest.raises(ValueError, match=r"would leave 134,515,008 of 134,515,008 parameters, less than 1 % saved"):
        pyfold.export_checkpoint(folded, padded, to="hf-stock")
    again = tmp_path / "again"
    pyfold.fold_checkpoint(folded, again, ratio=0.2, layers="0-11", dtype="float32")
    (again / "pyfold.json").write_text(json.dumps({"parameters": {"before": 134_515_008}}))
    pyfold.export_checkpoint(again, padded, to="hf-stock")
    begin = AutoTokenizer.from_pretrained(padded)("The capital of France is").input_ids
    ids = torch.tensor([begin])
    assert torch.allclose(logits(load(padded), ids), logits(load(again, trust_remote_code=True), ids), atol=1e-4)
    file, report = export(padded, tmp_path)
    assert report.architecture == "llama"
    check(file, padded, [begin], n_predict=64, n_probs=10)


def test_what_no_zeros_make_alike(tmp_path: Path) -> None:
    source = with_tokenizer(tiny_checkpoint(tmp_path / "tiny"))
    folded, out = tmp_path / "folded", tmp_path / "out"
    pyfold.fold_checkpoint(source, folded, ratio=0.3, layers="1")
    for options, message in [
        ({"max_shard_size": "many"}, "max_shard_size: expected a size"),
        ({}, "less than 1 % saved; fold all layers alike"),
        ({"tp": 3}, "tp: 3 devices do not share 2 KV heads evenly"),
        ({"dtype": "q8_0"}, "dtype: expected one of keep, float32, float16, bfloat16 for hf-stock, got 'q8_0'"),
        ({"multiple_of": 0}, "multiple_of: expected a positive number"),
    ]:
        with pytest.raises(ValueError, match=message):
            pyfold.export_checkpoint(folded, out, to="hf-stock", **options)
        assert sorted(each.name for each in tmp_path.iterdir()) == ["folded", "tiny"]
    with pytest.raises(ValueError, match="multiple_of: expected a positive number, with to='hf-stock'"):
        export(folded, tmp_path, multiple_of=8)
    done = run_cli("export", source, out, "--to", "hf-stock", "--tp", 2)
    assert done.returncode == 0, done.stderr
    assert f"vllm serve {out} --tensor-parallel-size 2" in done.stdout
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == 256
    done = run_cli("export", source, out, "--to", "hf-stock")
    assert (done.returncode, done.stdout.count("\n")) == (2, 7)
    assert "is not empty" in done.stderr
    done = run_cli("export", source, out, "--to", "hf-stock", "--overwrite", "--json")
    assert json.loads(done.stdout)["notes"] == ["48 is no multiple of 256, which engines like: --multiple-of 256, or --tp N"]
    assert torch.equal(logits(load(out), prompt()), logits(load(source), prompt()))


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
        ({"rope_parameters": {"rope_type": "linear"}}, "expected a positive number for factor, got None"),
        ({"rope_parameters": [1]}, r"expected a dict for rope_parameters, got \[1\]"),
        ({"max_position_embeddings": "many"}, "expected a positive number for max_position_embeddings, got 'many'"),
        ({"rms_norm_eps": None}, "expected a positive number for rms_norm_eps, got None"),
        ({"tie_word_embeddings": False, "vocab_size": 64}, None),
    ]:
        _set(folder, **values)
        if message:
            fails(message)
        (folder / "config.json").write_text(json.dumps(whole))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for values, message in [
        ({"model": {"type": "BPE"}}, "not a tokenizer that pyfold can write to GGUF"),
        ({"model": {"type": "Unigram"}}, "llama.cpp reads BPE tokenizers, got 'Unigram'"),
        ({"added_tokens": [{"content": "x", "id": 64, "special": True}]}, "token 64 has no embedding: there are 64"),
        ({"added_tokens": 3}, "not a tokenizer that pyfold can write to GGUF"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer is none of those"),
    ]:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer | values))
        fails(message)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    file, _ = export(folder, tmp_path)
    with pytest.raises(ValueError, match="exists; --overwrite replaces it"):
        export(folder, tmp_path)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="a folder; name a file"):
        pyfold.export_checkpoint(folder, tmp_path, to="gguf")
    export(folder, tmp_path, overwrite=True)
    assert file.read_bytes() == before


def test_overflow_leaves_nothing(tmp_path: Path) -> None:
    folder = byte_level(tiny_checkpoint(tmp_path / "tiny"))
    for shard in folder.glob("*.safetensors"):
        save_file({name: 1e6 * tensor for name, tensor in load_file(shard).items()}, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="beyond float16's 65504"):
        export(folder, tmp_path, dtype="float16")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["tiny"]


def test_command_line(tmp_path: Path) -> None:
    folder, file = byte_level(tiny_checkpoint(tmp_path / "tiny")), tmp_path / "a model.gguf"
    done = run_cli("export", folder, file, "--to", "gguf", "--dtype", "q8_0")
    assert done.returncode == 0, done.stderr
    assert f"llama-server -m '{file}'" in done.stdout.splitlines()[1]
    assert "note: 3 matrices, as model.layers.0.mlp.down_proj.weight, are F16" in done.stdout
    done = run_cli("export", folder, file, "--to", "gguf")
    assert (done.returncode, done.stderr) == (2, f"pyfold: {file}: exists; --overwrite replaces it\n")
    done = run_cli("export", folder, file, "--to", "gguf", "--overwrite", "--json")
    assert json.loads(done.stdout)["types"] == {"F32": 30}
