"""KV groups: exact symmetries in every family, alignment, folding of duplicates, whole folds with ``heads_ratio``."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    FAMILIES,
    load,
    logits,
    prompt,
    run_cli,
    stop_before,
    tensors_of,
    tiny_checkpoint,
    tiny_model,
    tree,
    with_tokenizer,
)
from transformers import PreTrainedTokenizerFast

from pyfold import evaluate, fold_checkpoint
from pyfold.errors import PyfoldError
from pyfold.families import FAMILIES as KNOWN
from pyfold.families.activations import Activations, put
from pyfold.families.attention import Attention
from pyfold.families.kv_groups import Freedom, KVGroup, Symmetry, freedom_of, groups_of, pairs, weights_of
from pyfold.function_fold import HeadsFold
from pyfold.head_folding import FoldedHeads, fold_heads
from pyfold.heads import alignment, assignment, balanced
from pyfold.io.checkpoint import open_checkpoint
from pyfold.report import FoldReport
from pyfold.verify import verify_checkpoint

FREE = Freedom(True, torch.ones(4, dtype=torch.bool))


def random_symmetry(freedom: Freedom, m: int = 2, d: int = 8, seed: int = 0) -> Symmetry:
    """All that a family allows, at random."""
    generator = torch.Generator().manual_seed(seed)
    angles = 6.28 * torch.rand(d // 2, generator=generator)
    half = torch.where(angles < 3.14, 0.0, torch.pi)
    turn = torch.polar(torch.ones(d // 2), torch.where(freedom.turns, angles, half))
    if freedom.scales:
        turn = turn * (0.5 + torch.rand(d // 2, generator=generator))
    mix = torch.eye(d) + 0.3 * torch.randn(d, d, generator=generator)
    return Symmetry(torch.randperm(m, generator=generator), turn, mix)


def with_symmetries(folder: Path, family: str, **options: Any) -> tuple[Any, dict[str, torch.Tensor], list[Attention]]:
    """A random model, its tensors, and its layers' attention; where there are norms of queries and keys, two of their pairs
    have equal gains."""
    model = tiny_model(family, **options)
    with torch.no_grad():
        for name, gains in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                gains[4:6] = gains[:2]
    model.save_pretrained(folder)
    checkpoint = open_checkpoint(folder)
    return model, model.state_dict(), KNOWN[family].attention(checkpoint)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"num_key_value_heads": 4}, {"attention_bias": True}], ids=["gqa", "mha", "biases"])
def test_symmetries_leave_the_logits(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """All that a family allows, in every group of every layer, and the groups in another order."""
    model, tensors, layers = with_symmetries(tmp_path, family, **options)
    expected = logits(model, prompt())
    changed = dict(tensors)
    for attention in layers:
        freedom = freedom_of(attention, tensors)
        groups = groups_of(attention, tensors)
        seeds = [10 * attention.layer + i for i in range(len(groups))]
        said = [
            random_symmetry(freedom, attention.n_queries, seed=seed).applied(g) for g, seed in zip(groups, seeds, strict=True)
        ]
        changed |= weights_of(attention, said[::-1])
    moved = [name for name in tensors if not torch.allclose(tensors[name], changed[name])]
    assert len(moved) >= 4 * len(layers)
    model.load_state_dict(changed)
    torch.testing.assert_close(logits(model, prompt()), expected, rtol=1e-3, atol=1e-3)


def test_norms_of_queries_and_keys_restrict_what_is_free(tmp_path: Path) -> None:
    _, tensors, layers = with_symmetries(tmp_path / "normed", "qwen3")
    freedom = freedom_of(layers[1], tensors)
    assert not freedom.scales
    assert freedom.turns.tolist() == [True, True, False, False]
    _, tensors, layers = with_symmetries(tmp_path / "free", "qwen2")
    assert freedom_of(layers[1], tensors).scales


@pytest.mark.parametrize("what", ["scale", "turn"])
def test_what_norms_forbid_would_be_heard(what: str, tmp_path: Path) -> None:
    model, tensors, layers = with_symmetries(tmp_path, "qwen3")
    expected = logits(model, prompt())
    factor = torch.tensor(2.0 if what == "scale" else 1j)
    turn = torch.ones(4, dtype=torch.complex64).index_fill(0, torch.tensor([3]), factor)
    groups = [Symmetry(torch.arange(2), turn, torch.eye(8)).applied(group) for group in groups_of(layers[0], tensors)]
    model.load_state_dict(tensors | weights_of(layers[0], groups))
    assert (logits(model, prompt()) - expected).abs().max() > 0.05


def random_group(m: int = 3, d: int = 8, hidden: int = 20, seed: int = 0) -> KVGroup:
    generator = torch.Generator().manual_seed(seed)
    shapes = (m, d, hidden), (d, hidden), (d, hidden), (m, d, hidden)
    return KVGroup(*(torch.randn(shape, generator=generator) for shape in shapes))


def products(group: KVGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """What a group says, in no words: its queries on its key, pair by pair, and what its output makes of its value."""
    asked = pairs(group.query).conj()[..., None] * pairs(group.key)[..., None, :]
    return asked, torch.einsum("jdh,dc->jhc", group.output, group.value)


def test_a_balanced_group_says_and_is_heard_alike() -> None:
    group = random_group()
    found = balanced(group, FREE).applied(group)
    for before, after in zip(products(group), products(found), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pairs(found.key).abs().square().sum(-1), pairs(found.query).abs().square().sum((0, -1)))
    heard = torch.einsum("jdh,jeh->de", found.output, found.output)
    torch.testing.assert_close(found.value @ found.value.T, heard, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("freedom", [FREE, Freedom(False, torch.tensor([True, False, True, False]))], ids=["free", "normed"])
@pytest.mark.parametrize("seed", range(5))
def test_alignment_finds_what_was_planted(freedom: Freedom, seed: int) -> None:
    """Order, turns, scales and mixing of a group that says the same; the words are then the same too."""
    group = random_group(seed=seed)
    planted = random_symmetry(freedom, 3, seed=seed + 100).applied(group)
    here, there = (balanced(g, freedom).applied(g) for g in (group, planted))
    found = alignment(here, there, freedom).applied(there)
    for before, after in zip(here, found, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("m", [1, 2, 5])
def test_assignment_is_the_best_of_all(m: int) -> None:
    gains = torch.randn(m, m, generator=torch.Generator().manual_seed(m))
    best = max(itertools.permutations(range(m)), key=lambda order: float(gains[range(m), list(order)].sum()))
    assert assignment(gains).tolist() == list(best)


def with_duplicates(folder: Path, family: str, **options: Any) -> tuple[Path, torch.Tensor]:
    """A checkpoint whose KV group 2 of 3 says in every layer what group 0 says, in other words, and its logits."""
    model, tensors, layers = with_symmetries(folder, family, **GROUPS, **options)
    for attention in layers:
        groups = groups_of(attention, tensors)
        freedom = freedom_of(attention, tensors)
        said = random_symmetry(freedom, attention.n_queries, seed=attention.layer).applied(groups[0])
        groups[2] = said._replace(output=0.7 * said.output)
        model.load_state_dict(tensors | weights_of(attention, groups))
        tensors = model.state_dict()
    model.save_pretrained(folder)
    return folder, logits(model, prompt())


GROUPS = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}


def fold_layer(folder: Path, layer: int, n_groups: int, tokens: torch.Tensor) -> tuple[FoldedHeads, dict[str, torch.Tensor]]:
    checkpoint = open_checkpoint(folder)
    attention = KNOWN[checkpoint.config["model_type"]].attention(checkpoint)[layer]
    tensors = tensors_of(folder)
    with closing(Activations(checkpoint, tokens, checkpoint.tensors.__getitem__)) as activations:
        read, say = partial(activations.before_attention, layer), partial(activations.said, layer)
        return fold_heads(attention, tensors, read, say, n_groups, backend="auto"), tensors


TOKENS = torch.randint(0, 64, (24, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_heads_say_is_what_the_model_has(family: str, tmp_path: Path) -> None:
    """Of a layer's own tensors, and of others, in another number."""
    model, tensors, layers = with_symmetries(tmp_path, family, **GROUPS)
    checkpoint = open_checkpoint(tmp_path)
    given: list[torch.Tensor] = []
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, said: given.append(said[0]))
    logits(model, TOKENS)
    with closing(Activations(checkpoint, TOKENS, checkpoint.tensors.__getitem__)) as activations:
        [x] = activations.before_attention(1)
        torch.testing.assert_close(activations.said(1, x, tensors), given[0], rtol=1e-4, atol=1e-5)
        groups = groups_of(layers[1], tensors)
        said = activations.said(1, x, weights_of(layers[1], [groups[2], groups[0]]))
    units = given[0].unflatten(2, (3, -1))
    torch.testing.assert_close(said, units[:, :, [2, 0]].flatten(2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_duplicate_folds_without_loss(family: str, tmp_path: Path) -> None:
    """A group that says the same as another in other words; the model then says what it said."""
    folder, expected = with_duplicates(tmp_path / "src", family)
    folded, _ = fold_layer(folder, 1, 2, TOKENS)
    assert folded.clusters in ([[0, 2], [1]], [[1], [2, 0]])
    assert folded.error < 1e-4  # what ridge 0.03 costs, if that is chosen
    model = load(folder)
    with torch.no_grad():
        for name, values in folded.tensors.items():
            put(model, name, values)
    torch.testing.assert_close(logits(model, prompt()), expected, rtol=2e-3, atol=2e-3)


def fold(source: Path, dst: Path, text: Path, **options: Any) -> FoldReport:
    return fold_checkpoint(source, dst, **{"ratio": 0.25, "metric": "function", "calibration": text, **options})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return with_tokenizer(tiny_checkpoint(tmp_path / "src", **GROUPS))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [None, [1]], ids=["stock", "per-layer"])
def test_a_result_loads_with_fewer_heads(
    family: str, layers: list[int] | None, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "load_tokenizer", PreTrainedTokenizerFast.from_pretrained)  # Qwen's would not be as written
    source = with_tokenizer(tiny_checkpoint(tmp_path / "src", family, **GROUPS))
    report = fold(source, tmp_path / "dst", text, heads_ratio=0.33, layers=layers)
    assert [group.name for group in report.groups[:2]] == [f"layers.{(layers or [0])[0]}.{part}" for part in ("attn", "mlp")]
    assert report.profile == ("per-layer" if layers else "stock")
    verify_checkpoint(tmp_path / "dst")
    model = load(tmp_path / "dst", trust_remote_code=bool(layers))
    said = logits(model, prompt())
    assert bool(said.isfinite().all())
    for i, layer in enumerate(model.model.layers):
        heads = 2 if layers is None or i in layers else 3
        assert tuple(layer.self_attn.k_proj.weight.shape) == (heads * 8, 48)
        assert tuple(layer.self_attn.o_proj.weight.shape) == (48, heads * 16)
    expected = load(source)
    for name, values in tensors_of(tmp_path / "dst").items():
        put(expected, name, values)
    torch.testing.assert_close(said, logits(expected, prompt()))
    if layers is None:
        assert "auto_map" not in json.loads((tmp_path / "dst" / "config.json").read_text())
    again = fold(tmp_path / "dst", tmp_path / "again", text, heads_ratio=0.33, layers=[1] if layers is None else [2])
    assert again.parameters_after < report.parameters_after, "a result is a source"
    verify_checkpoint(tmp_path / "again")


def test_no_head_removed_changes_nothing(source: Path, text: Path, tmp_path: Path) -> None:
    fold(source, tmp_path / "without", text)
    fold(source, tmp_path / "none", text, heads_ratio=0)
    assert tree(tmp_path / "none") == tree(tmp_path / "without")


def test_a_fold_of_heads_goes_on_where_it_was_stopped(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the heads of layer 1, whose feed-forward network is still to come."""
    options = {"heads_ratio": 0.33}
    fold(source, tmp_path / "expected", text, **options)
    begun = stop_before(HeadsFold, 2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        fold(source, tmp_path / "dst", text, **options)
    fold(source, tmp_path / "dst", text, **options)
    assert tree(tmp_path / "dst") == tree(tmp_path / "expected")
    assert begun == [f"layers.{layer}.attn" for layer in (0, 1, 2, 2)]


def test_what_cannot_be_done_with_heads_is_said(source: Path, text: Path, tmp_path: Path) -> None:
    biases = {"attention_bias": True, "hidden_size": 42}
    odd = with_tokenizer(tiny_checkpoint(tmp_path / "odd", **GROUPS | biases))
    with pytest.raises(PyfoldError, match="4 query heads do not divide a hidden_size of 42"):
        fold(odd, tmp_path / "dst", text, heads_ratio=0.33)
    function: dict[str, Any] = {"metric": "function", "calibration": text, "ratio": 0.25}
    for options, words in (
        ({"ratio": 0.25}, "needs metric function, repair ridge and calibration self, or a file, got weight, none and self"),
        (function | {"repair": "none"}, "got function, none and"),
        (function | {"calibration": "none"}, "got function, ridge and none"),
        (function | {"ratio": None, "target_params": "40K"}, "a target is for the feed-forward layers"),
        (function | {"heads_ratio": 1.0}, "expected a number in"),
        (function | {"heads_ratio": 0.9}, "leaves none of the 3 KV heads of layers.0.attn; use at most 0.66"),
        (function | {"host_memory": "1MiB"}, "needs at least"),
    ):
        with pytest.raises(PyfoldError, match=re.escape(words)):
            fold_checkpoint(source, tmp_path / "dst", **{"heads_ratio": 0.33, **options})
        assert not (tmp_path / "dst").exists()


def test_memory_of_heads_is_kept_to(text: Path, tmp_path: Path) -> None:
    """Where it is heads that take most."""
    heads = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64}
    source = with_tokenizer(tiny_checkpoint(tmp_path / "src", width=64, n_layers=2, **heads))
    options = ["--ratio", 0.25, "--heads-ratio", 0.5, "--metric", "function", "--calibration", text, "--json", "--host-memory"]
    refused = run_cli("fold", source, tmp_path / "dst", *options, "1MiB")
    assert refused.returncode == 2, refused.stderr
    least = int(re.search(r"at least .*\(([\d,]+) bytes\)", refused.stderr)[1].replace(",", ""))
    done = run_cli("fold", source, tmp_path / "dst", *options, least + (8 << 20))  # what a process holds varies
    assert done.returncode == 0, done.stderr
    assert 0.6 * least < json.loads(done.stdout)["peak_rss_bytes"] <= least + (8 << 20)


def test_a_result_with_heads_per_layer_is_folded_again(source: Path, text: Path, tmp_path: Path) -> None:
    """By weights, and its heads once more: still per layer, and it says so; a checkpoint folded back to one number is stock."""
    fold(source, tmp_path / "once", text, heads_ratio=0.33, layers="1")
    report = fold_checkpoint(tmp_path / "once", tmp_path / "twice", ratio=0.25)
    assert report.profile == "per-layer"
    with pytest.raises(PyfoldError, match="profile: stock is one width, and one number of heads"):
        fold_checkpoint(tmp_path / "once", tmp_path / "dst", ratio=0.25, profile="stock")
    fold(tmp_path / "once", tmp_path / "again", text, heads_ratio=0.5, layers="1")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (6, 3)
    assert config["per_layer_config"]["1"]["num_key_value_heads"] == 1
    for folder in ("twice", "again"):
        assert logits(load(tmp_path / folder, trust_remote_code=True), prompt()).isfinite().all()


def test_dead_heads_fold(source: Path, text: Path, tmp_path: Path) -> None:
    """Two of three KV heads say nothing."""
    folder = tmp_path / "dead"
    shutil.copytree(source, folder)
    model = load(folder)
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data[8:] = 0
    model.save_pretrained(folder)
    fold(folder, tmp_path / "dst", text, heads_ratio=0.33)
    assert logits(load(tmp_path / "dst"), prompt()).isfinite().all()
