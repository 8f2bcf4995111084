"""A whole fold: exactness, determinism, both kinds of result, every family, memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import (
    BACKENDS,
    FAMILIES,
    load,
    logits,
    prompt,
    run_cli,
    tensors_of,
    tiny_checkpoint,
    tiny_model,
    tree,
    write_synthetic,
)

import pyfold
from pyfold import ops

MLP = ("gate_proj", "up_proj", "down_proj")


def fold_module(model: torch.nn.Module, layers: range | list[int], k: int) -> list[torch.Tensor]:
    """The same fold done in memory, by the definition: reference ops on the torch module. Returns each layer's labels."""
    partitions = []
    for layer in layers:
        mlp = model.model.layers[layer].mlp
        gate, up, down = (getattr(mlp, name).weight.detach() for name in MLP)
        features = [gate, up, down.T]
        for name in ("gate_proj", "up_proj"):
            if getattr(mlp, name).bias is not None:
                features.append(getattr(mlp, name).bias.detach()[:, None])
        labels = pyfold.cluster(torch.cat(features, 1).float(), n_clusters=k, backend="reference").labels
        for name in ("gate_proj", "up_proj"):
            linear = getattr(mlp, name)
            linear.weight = torch.nn.Parameter(ops.merge_rows(linear.weight.detach(), labels, k, backend="reference"))
            if linear.bias is not None:
                linear.bias = torch.nn.Parameter(ops.merge_rows(linear.bias.detach(), labels, k, backend="reference"))
        mlp.down_proj.weight = torch.nn.Parameter(ops.merge_columns(down, labels, k, backend="reference"))
        partitions.append(labels)
    return partitions


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_fold_loads_without_custom_code(tmp_path: Path, family: str) -> None:
    source = tiny_checkpoint(tmp_path / "src", family)
    report = pyfold.fold_checkpoint(source, tmp_path / "dst", ratio=0.25, max_shard_size="30KB")
    assert report.profile == "stock"
    assert len(list((tmp_path / "dst").glob("model-*.safetensors"))) > 1
    assert not list((tmp_path / "dst").glob("*.py"))
    folded = load(tmp_path / "dst")
    assert type(folded) is type(load(source))
    expected = load(source)
    fold_module(expected, range(3), 36)
    torch.testing.assert_close(logits(folded, prompt()), logits(expected, prompt()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_per_layer_fold_loads_with_trust_remote_code(tmp_path: Path, family: str, attention: str) -> None:
    from transformers import AutoModel

    source = tiny_checkpoint(tmp_path / "src", family)
    report = pyfold.fold_checkpoint(source, tmp_path / "dst", ratio=0.25, layers="1-2")
    assert report.profile == "per-layer"
    folded = load(tmp_path / "dst", trust_remote_code=True, attn_implementation=attention)
    assert [layer.mlp.gate_proj.out_features for layer in folded.model.layers] == [48, 36, 36]
    expected = load(source, attn_implementation=attention)
    fold_module(expected, [1, 2], 36)
    torch.testing.assert_close(logits(folded, prompt()), logits(expected, prompt()), rtol=1e-4, atol=1e-4)
    # Causal: the logits before a changed token are as they were.
    changed = prompt()
    changed[:, -1] = (changed[:, -1] + 1) % 64
    torch.testing.assert_close(logits(folded, changed)[:, :-1], logits(folded, prompt())[:, :-1])
    greedy = {"max_new_tokens": 12, "do_sample": False, "use_cache": True}
    assert torch.equal(folded.generate(prompt(), **greedy), expected.generate(prompt(), **greedy))
    bare = AutoModel.from_pretrained(tmp_path / "dst", trust_remote_code=True, dtype=torch.float32).eval()
    with torch.inference_mode():
        torch.testing.assert_close(bare(prompt()).last_hidden_state, folded.model(prompt()).last_hidden_state)
    # Saving and loading again keeps the widths.
    folded.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", trust_remote_code=True)
    torch.testing.assert_close(logits(again, prompt()), logits(folded, prompt()), rtol=1e-4, atol=1e-4)


def test_biases_ride_along(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "src", "llama", mlp_bias=True, attention_bias=True)
    pyfold.fold_checkpoint(source, tmp_path / "dst", ratio=0.25)
    expected = load(source)
    fold_module(expected, range(3), 36)
    torch.testing.assert_close(logits(load(tmp_path / "dst"), prompt()), logits(expected, prompt()), rtol=1e-4, atol=1e-4)


def test_real_model_equals_the_fold_in_memory(tmp_path: Path, smollm2: Path) -> None:
    pyfold.fold_checkpoint(smollm2, tmp_path / "dst", ratio=0.2, layers=[11], dtype="float32")
    folded, expected = load(tmp_path / "dst", trust_remote_code=True), load(smollm2)
    fold_module(expected, [11], 1228)
    ids = torch.randint(0, 49152, (1, 64), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(folded, ids), logits(expected, ids), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_ratio_0_is_the_identity_bit_for_bit(tmp_path: Path, dtype: torch.dtype, backend: str) -> None:
    source = tiny_checkpoint(tmp_path / "src", dtype=dtype, mlp_bias=True)
    report = pyfold.fold_checkpoint(source, tmp_path / "dst", ratio=0, backend=backend)
    assert [(group.folded_width, group.n_singletons) for group in report.groups] == [(48, 48)] * 3
    before, after = tensors_of(source), tensors_of(tmp_path / "dst")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name].flatten().view(torch.uint8), after[name].flatten().view(torch.uint8)), name


def test_ratio_0_of_the_real_model_is_the_identity(tmp_path: Path, smollm2: Path) -> None:
    pyfold.fold_checkpoint(smollm2, tmp_path / "dst", ratio=0, layers="10-19")
    before, after = tensors_of(smollm2), tensors_of(tmp_path / "dst")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].view(torch.int16), after[name].view(torch.int16)) for name in before)


def test_singletons_keep_their_bits(tmp_path: Path, smollm2: Path) -> None:
    """At ratio 0.2, on the real model: rows and columns of every cluster of one; everything unfolded is untouched."""
    layer = 12
    report = pyfold.fold_checkpoint(smollm2, tmp_path / "dst", ratio=0.2, layers=[layer])
    before, after = tensors_of(smollm2), tensors_of(tmp_path / "dst")
    gate, up, down = (before[f"model.layers.{layer}.mlp.{name}.weight"] for name in MLP)
    labels = pyfold.cluster(torch.cat([gate, up, down.T], 1), n_clusters=1228).labels
    alone = (torch.bincount(labels) == 1)[labels]
    assert int(alone.sum()) == report.groups[0].n_singletons > 900
    for name in ("gate_proj", "up_proj"):
        name = f"model.layers.{layer}.mlp.{name}.weight"
        assert torch.equal(after[name][labels[alone]].view(torch.int16), before[name][alone].view(torch.int16))
    folded_down = after[f"model.layers.{layer}.mlp.down_proj.weight"]
    assert torch.equal(folded_down[:, labels[alone]].view(torch.int16), down[:, alone].view(torch.int16))
    for name in before:
        if f"layers.{layer}.mlp" not in name:
            assert torch.equal(before[name], after[name]), name


def test_singleton_riders_keep_their_bits(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "src", dtype=torch.bfloat16, mlp_bias=True)
    pyfold.fold_checkpoint(source, tmp_path / "dst", ratio=0.2)
    before, after = tensors_of(source), tensors_of(tmp_path / "dst")
    mlp = "model.layers.1.mlp."
    gate, up, down = (before[f"{mlp}{name}.weight"] for name in MLP)
    biases = [before[f"{mlp}{name}.bias"] for name in ("gate_proj", "up_proj")]
    labels = pyfold.cluster(torch.cat([gate, up, down.T, *(bias[:, None] for bias in biases)], 1), n_clusters=38).labels
    alone = (torch.bincount(labels) == 1)[labels]
    assert alone.any()
    assert not alone.all()
    for name in ("gate_proj", "up_proj"):
        assert torch.equal(after[f"{mlp}{name}.bias"][labels[alone]], before[f"{mlp}{name}.bias"][alone])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_planted_duplicates_fold_losslessly(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """Exact copies of units, clusters of 2 to 9 in any order: same logits, within the rounding of the summed columns; computed
    in fp64, for how a processor rounds products is not pyfold's."""
    sizes = torch.tensor([2, 3, 4, 5, 6, 7, 8, 9, 1, 1, 1])
    n = int(sizes.sum())
    model = tiny_model(family, width=n, n_layers=2)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in model.model.layers:
            copies = torch.arange(len(sizes)).repeat_interleave(sizes)[torch.randperm(n, generator=generator)]
            for name in MLP:
                weight = getattr(layer.mlp, name).weight
                weight.copy_(weight[:, copies] if name == "down_proj" else weight[copies])
    model.to(dtype).save_pretrained(tmp_path / "src")
    report = pyfold.fold_checkpoint(tmp_path / "src", tmp_path / "dst", width=len(sizes))
    for group in report.groups:
        assert group.inertia <= 1e-6 * group.total_inertia
        assert group.n_singletons == 3
    expected, got = (logits(load(tmp_path / folder).double(), prompt()) for folder in ("src", "dst"))
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_bytes_do_not_depend_on_threads_or_shards(tmp_path: Path, smollm2: Path) -> None:
    """1 or 2 threads, the source in three shards or one: the same files."""
    from safetensors.torch import save_file

    single = tmp_path / "single"
    single.mkdir()
    for file in smollm2.iterdir():
        if not file.name.startswith("model"):
            (single / file.name).write_bytes(file.read_bytes())
    tensors = tensors_of(smollm2)
    save_file({name: tensors[name] for name in reversed(tensors)}, single / "model.safetensors")
    options = {"ratio": 0.3, "layers": "3,17", "max_shard_size": "90MB"}
    trees = []
    for i, (source, threads) in enumerate([(smollm2, 1), (smollm2, 2), (single, 2)]):
        torch.set_num_threads(threads)
        pyfold.fold_checkpoint(source, tmp_path / str(i), **options)
        trees.append(tree(tmp_path / str(i)))
    torch.set_num_threads(2)
    assert len([name for name in trees[0] if name.endswith(".safetensors")]) == 3
    assert trees[0] == trees[1] == trees[2]
    text = "".join((tmp_path / "0" / name).read_text() for name in ("pyfold.json", "README.md", "config.json"))
    assert str(tmp_path) not in text
    assert str(smollm2) not in text


def test_result_files(tmp_path: Path, smollm2: Path) -> None:
    import hashlib

    report = pyfold.fold_checkpoint(smollm2, tmp_path / "dst", ratio=0.2, layers="14-17", max_shard_size="100MB")
    names = {file.name for file in (tmp_path / "dst").iterdir()}
    shards = {f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)}
    assert names == shards | {
        "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "LICENSE", "README.md", "modeling_pyfold.py", "pyfold.json", "pyfold-run.json",
    }  # fmt: skip
    assert all((tmp_path / "dst" / shard).stat().st_size <= 100_100_000 for shard in shards)
    identity = json.loads((tmp_path / "dst" / "pyfold.json").read_text())
    assert identity["backend"] == BACKENDS[0]
    assert identity["options"]["layers"] == [14, 15, 16, 17]
    assert [group["folded_width"] for group in identity["groups"]] == [1228] * 4
    weight = tensors_of(smollm2)["model.layers.14.mlp.up_proj.weight"]
    digest = hashlib.sha256(weight.view(torch.uint8).numpy().tobytes()).hexdigest()
    assert identity["source_sha256"]["model.layers.14.mlp.up_proj.weight"] == digest
    before, after = (
        json.loads((smollm2 / "config.json").read_text()),
        json.loads((tmp_path / "dst" / "config.json").read_text()),
    )
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed == {"per_layer_config", "architectures", "auto_map"}
    assert report.parameters_after == sum(tensor.numel() for tensor in tensors_of(tmp_path / "dst").values())
    assert report.removed_share == pytest.approx(1 - report.parameters_after / report.parameters_before)
    card = (tmp_path / "dst" / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: "transformers"')
    assert "| layers.14.mlp | 1536 | 1228 |" in card


def test_folding_a_folded_checkpoint(tmp_path: Path) -> None:
    """per-layer -> further per-layer -> one width again: stock, without custom code."""
    source = tiny_checkpoint(tmp_path / "src")
    pyfold.fold_checkpoint(source, tmp_path / "a", width=40, layers=[1])
    second = pyfold.fold_checkpoint(tmp_path / "a", tmp_path / "b", width=36, layers=[1, 2])
    assert [(group.width, group.folded_width) for group in second.groups] == [(40, 36), (48, 36)]
    third = pyfold.fold_checkpoint(tmp_path / "b", tmp_path / "c", width=32)
    assert third.profile == "stock"
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    original = json.loads((source / "config.json").read_text())
    assert config == {**original, "intermediate_size": 32}
    assert not (tmp_path / "c" / "modeling_pyfold.py").exists()
    load(tmp_path / "c")


def test_empty_tensors_and_a_single_file_beside_an_index(tmp_path: Path) -> None:
    """As transformers reads it: model.safetensors before the index; a tensor of no elements still has its place."""
    from safetensors.torch import save_file

    source = tiny_checkpoint(tmp_path / "src")
    tensors = {**tensors_of(source), "model.empty": torch.zeros(0, 3)}
    tensors["model.norm.weight"] = torch.full((32,), 7.0)
    save_file(tensors, source / "model.safetensors")
    pyfold.fold_checkpoint(source, tmp_path / "dst", ratio=0.25, max_shard_size=100)
    after = tensors_of(tmp_path / "dst")
    assert after["model.empty"].shape == (0, 3)
    assert torch.equal(after["model.norm.weight"], tensors["model.norm.weight"])


def test_dtype_of_the_result(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "src")
    pyfold.fold_checkpoint(source, tmp_path / "dst", ratio=0.25, dtype="bfloat16")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "dst").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "dst" / "config.json").read_text())["dtype"] == "bfloat16"
    embedding = "model.embed_tokens.weight"
    assert torch.equal(tensors_of(tmp_path / "dst")[embedding], tensors_of(source)[embedding].bfloat16())


def test_hub_id_is_resolved_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model id that the local hub cache holds, as huggingface_hub lays it out."""
    repo = tmp_path / "hub" / "models--acme--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    tiny_checkpoint(repo / "snapshots" / commit)
    (repo / "snapshots" / commit / "README.md").write_text("---\nlicense: mit\n---\n# tiny\n")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    import os

    done = run_cli("fold", "acme/tiny", tmp_path / "dst", "--ratio", "0.25", env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "dst" / "README.md").read_text()
    assert 'base_model: "acme/tiny"' in card
    assert 'license: "mit"' in card
    missing = run_cli("fold", "acme/absent", tmp_path / "other", "--ratio", "0.25", env={**os.environ, **environment})
    assert missing.returncode == 2
    assert missing.stderr.startswith("pyfold: acme/absent: no such folder here")
    assert missing.stderr.count("\n") == 1


def test_peak_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    """Layers of 32 MiB: VmHWM of 16 of them minus VmHWM of 4 is less than one."""
    width, hidden = 2736, 1024
    layer_bytes = 3 * width * hidden * 4
    assert layer_bytes >= 32 * 2**20
    peaks = {}
    for n_layers in (4, 16):
        source = write_synthetic(tmp_path / f"src{n_layers}", n_layers, width, hidden)
        done = run_cli("fold", source, tmp_path / f"dst{n_layers}", "--ratio", "0.2", "--json", "--max-shard-size", "100MB")
        assert done.returncode == 0, done.stderr
        peaks[n_layers] = json.loads(done.stdout)["peak_rss_bytes"]
    print(
        f"VmHWM: {peaks[4] / 2**20:.1f} MiB for 4 layers, {peaks[16] / 2**20:.1f} for 16; a layer has {layer_bytes / 2**20:.1f}"
    )
    assert peaks[16] - peaks[4] < layer_bytes
