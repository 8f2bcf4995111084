"""KV groups: exact symmetries in every family, alignment, folding of duplicates."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, logits, prompt, tiny_model

from pyfold.families import FAMILIES as KNOWN
from pyfold.families.attention import Attention, Freedom, KVGroup, Symmetry, pairs
from pyfold.heads import alignment, assignment, balanced
from pyfold.io.checkpoint import open_checkpoint

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


def with_symmetries(folder: Path, family: str, seed: int = 0, **options: Any) -> tuple[Any, dict[str, torch.Tensor], list[Attention]]:
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
        freedom = attention.freedom(tensors)
        groups = attention.groups(tensors)
        seeds = [10 * attention.layer + i for i in range(len(groups))]
        said = [random_symmetry(freedom, attention.n_queries, seed=seed).applied(g) for g, seed in zip(groups, seeds, strict=True)]
        changed |= attention.tensors(said[::-1])
    moved = [name for name in tensors if not torch.allclose(tensors[name], changed[name])]
    assert len(moved) >= 4 * len(layers)
    model.load_state_dict(changed)
    torch.testing.assert_close(logits(model, prompt()), expected, rtol=1e-3, atol=1e-3)


def test_norms_of_queries_and_keys_restrict_what_is_free(tmp_path: Path) -> None:
    _, tensors, layers = with_symmetries(tmp_path / "normed", "qwen3")
    freedom = layers[1].freedom(tensors)
    assert not freedom.scales
    assert freedom.turns.tolist() == [True, True, False, False]
    _, tensors, layers = with_symmetries(tmp_path / "free", "qwen2")
    assert layers[1].freedom(tensors).scales


@pytest.mark.parametrize("what", ["scale", "turn"])
def test_what_norms_forbid_would_be_heard(what: str, tmp_path: Path) -> None:
    model, tensors, layers = with_symmetries(tmp_path, "qwen3")
    expected = logits(model, prompt())
    factor = torch.tensor(2.0 if what == "scale" else 1j)
    turn = torch.ones(4, dtype=torch.complex64).index_fill(0, torch.tensor([3]), factor)
    groups = [Symmetry(torch.arange(2), turn, torch.eye(8)).applied(group) for group in layers[0].groups(tensors)]
    model.load_state_dict(tensors | layers[0].tensors(groups))
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
