"""The function metric: units folded by what they do, consumers that make up for it, whole folds on the model's own text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, load, logits, run_cli, stop_before, tiny_checkpoint, tree, with_tokenizer

from pyfold import cli, fold_checkpoint, function_metric
from pyfold.calibration import CACHE
from pyfold.errors import PyfoldError
from pyfold.families import family_of
from pyfold.families.activations import Activations, information
from pyfold.families.writing import Writer
from pyfold.function_fold import UnitsFold
from pyfold.function_metric import Moments, fold_units, moments
from pyfold.io.checkpoint import open_checkpoint
from pyfold.io.destination import Destination
from pyfold.survey import lost_at_every_width, survey

BACKEND = "auto"


def said(n: int = 24, hidden: int = 10, rank: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """What n units say in 32 sequences of 20 tokens, (32, 20, n), and a consumer (hidden, n)."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(32, 20, rank, generator=generator) @ torch.randn(rank, n, generator=generator)
    return h * torch.logspace(0, -1, n), torch.randn(hidden, n, generator=generator)


def output_error(h: torch.Tensor, consumer: torch.Tensor, kept: torch.Tensor, folded: torch.Tensor) -> float:
    """Share of the output's energy that is lost, in fp64, token by token."""
    h, consumer, folded = h.flatten(0, 1).double(), consumer.double(), folded.double()
    whole = h @ consumer.T
    return float((whole - h[:, kept] @ folded.T).square().sum() / whole.square().sum())


def test_moments_part_the_tokens_that_are_held_out() -> None:
    h, _ = said()
    seen = moments(iter(h.split(5)), BACKEND)
    held = torch.arange(32) % 8 == 7
    for found, part in ((seen.fitted, h[~held]), (seen.held_out, h[held])):
        part = part.flatten(0, 1).double()
        torch.testing.assert_close(found.double(), part.T @ part, rtol=1e-5, atol=1e-3)


def test_units_that_contribute_the_same_fold_without_loss() -> None:
    """As a pair does that differs by scale and sign between what it says and how it is heard."""
    h, consumer = said(12)
    doubled = torch.cat([h, -0.5 * h], 2)
    consumer = torch.cat([consumer, -2 * consumer], 1)
    folded = fold_units(consumer, moments([doubled], BACKEND), 12, ridge=False, backend=BACKEND)
    assert sorted((folded.kept % 12).tolist()) == list(range(12)), "one of each two stands for both"
    assert output_error(doubled, consumer, folded.kept, folded.consumer) < 1e-9
    assert folded.error < 1e-6


@pytest.mark.parametrize("lam", function_metric.LAMBDAS)
def test_the_consumer_is_the_ridge_solution(lam: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against least squares over the tokens themselves, with rows for the penalty, in fp64."""
    monkeypatch.setattr(function_metric, "LAMBDAS", (lam,))
    h, consumer = said()
    plain = fold_units(consumer, moments([h], BACKEND), 15, ridge=False, backend=BACKEND)
    found = fold_units(consumer, moments([h], BACKEND), 15, ridge=True, backend=BACKEND)
    assert found.ridge == lam
    x = h.flatten(0, 1).double()
    kept, y = x[:, found.kept], x @ consumer.double().T
    penalty = (lam * kept.square().sum(0)).sqrt().diag()
    rows = torch.cat([kept, penalty]), torch.cat([y, penalty @ plain.consumer.double().T])
    torch.testing.assert_close(found.consumer.double(), torch.linalg.lstsq(*rows).solution.T, rtol=1e-3, atol=1e-4)


def test_regression_loses_less_and_the_best_lambda_is_taken() -> None:
    h, consumer = said(rank=8)
    seen = moments([h], BACKEND)
    plain = fold_units(consumer, seen, 12, ridge=False, backend=BACKEND)
    best = fold_units(consumer, seen, 12, ridge=True, backend=BACKEND)
    assert best.error < 0.5 * plain.error
    assert best.ridge == min(function_metric.LAMBDAS), "there is nothing that could be overfitted"


def test_nothing_is_said() -> None:
    _, consumer = said()
    with pytest.raises(ValueError, match="energies up to 0"):
        fold_units(consumer, Moments(torch.zeros(24, 24), torch.zeros(24, 24)), 12, ridge=True, backend=BACKEND)


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    """What each feed-forward network reads, also behind one that has been replaced."""
    folder = tiny_checkpoint(tmp_path / "src", family)
    checkpoint = open_checkpoint(folder)
    model = load(folder)
    tokens = torch.randint(0, 64, (3, 20), generator=torch.Generator().manual_seed(0))
    read: dict[int, torch.Tensor] = {}
    for layer, module in enumerate(model.model.layers):
        module.mlp.register_forward_pre_hook(lambda _, given, layer=layer: read.update({layer: given[0]}))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(0.5)
    logits(model, tokens)
    activations = Activations(checkpoint, tokens, lambda name: checkpoint.tensors[name])
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".1.mlp." in name}
    torch.testing.assert_close(torch.cat(list(activations.inputs(1))), read[1], rtol=1e-4, atol=1e-5)
    activations.feed(activations.mlp(1, weights))
    torch.testing.assert_close(torch.cat(list(activations.inputs(2))), read[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_information_is_that_of_the_gradients(family: str, tmp_path: Path) -> None:
    """Against one backward pass through the whole model."""
    folder = tiny_checkpoint(tmp_path / "src", family)
    tokens = torch.randint(0, 64, (5, 20), generator=torch.Generator().manual_seed(0))
    found = information(open_checkpoint(folder), tokens, torch.float32)
    model, said = load(folder), {}

    def note(layer: int, given: tuple[torch.Tensor]) -> None:
        said[layer] = given[0]
        given[0].retain_grad()

    for layer, module in enumerate(model.model.layers):
        module.mlp.down_proj.register_forward_pre_hook(lambda _, given, layer=layer: note(layer, given))
    embedded = model.model.embed_tokens(tokens).detach().requires_grad_()
    expected = model(inputs_embeds=embedded).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(expected, tokens[:, 1:].flatten(), reduction="sum").backward()
    assert len(found) == len(said)
    for layer, h in said.items():
        torch.testing.assert_close(found[layer], (h * h.grad).flatten(0, 1).square().sum(0), rtol=1e-4, atol=1e-6)


def test_units_of_which_the_loss_knows_stay() -> None:
    """Of units that are alike in energy those stay whose going the loss would notice; it sees none that says nothing."""
    h, consumer = said(rank=24)
    h, consumer = h / h.square().mean((0, 1)).sqrt(), torch.nn.functional.normalize(consumer, dim=0)
    information = torch.arange(24) % 2 * 100.0
    seen = moments([h], BACKEND)
    folded = fold_units(consumer, seen, 12, ridge=False, backend=BACKEND, information=information)
    assert (folded.kept % 2 == 1).float().mean() > 0.8
    assert set(folded.kept.tolist()) != set(fold_units(consumer, seen, 12, ridge=False, backend=BACKEND).kept.tolist())
    silent = moments([h * (torch.arange(24) > 0)], BACKEND)
    folded = fold_units(consumer, silent, 12, ridge=True, backend=BACKEND, information=information)
    assert bool(folded.consumer.isfinite().all())


def test_losses_at_every_width_are_those_of_regression() -> None:
    """Against the regression on the first K units, one K at a time, in fp64."""
    h, consumer = said()
    seen = moments([h], BACKEND)
    c = seen.fitted + seen.held_out
    lost = lost_at_every_width(consumer, seen)
    shrunk = (c + torch.diag(c.diagonal())).double()
    order = (c.diagonal() * consumer.square().sum(0)).argsort(descending=True)
    for k in range(1, 25):
        kept, gone = order[:k], order[k:]
        left = shrunk[gone][:, gone] - shrunk[gone][:, kept] @ torch.linalg.solve(shrunk[kept][:, kept], shrunk[kept][:, gone])
        expected = torch.trace(consumer[:, gone].double() @ left @ consumer[:, gone].double().T)
        assert lost[k - 1] == pytest.approx(float(expected), rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_written_by_the_model_as_it_is(family: str, resident: bool, tmp_path: Path) -> None:
    """Every token is the one that the same number draws from what the model says of the whole text."""
    folder = tiny_checkpoint(tmp_path / "src", family)
    draws = torch.rand(5, 19, generator=torch.Generator().manual_seed(0))
    writer = Writer(open_checkpoint(folder), 20, resident=resident)
    tokens = torch.stack(list(writer.write(1, draws)), 1)
    assert bool((tokens[:, 0] == 1).all())
    sums = logits(load(folder), tokens).softmax(-1).cumsum(-1)[:, :-1]
    drawn = (sums < draws[..., None]).sum(-1)
    assert torch.equal(drawn, tokens[:, 1:])


def test_text_does_not_depend_on_how_much_is_written_at_once(source: Path) -> None:
    draws = torch.rand(6, 19, generator=torch.Generator().manual_seed(0))
    writer = Writer(open_checkpoint(source), 20, resident=True)
    whole = torch.stack(list(writer.write(1, draws)), 1)
    parts = [torch.stack(list(writer.write(1, part)), 1) for part in draws.split(2)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "biases"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(tiny_checkpoint(tmp_path_factory.mktemp("source") / "src", mlp_bias=request.param))


def run(source: Path, dst: Path, **options: Any) -> dict[str, str]:
    fold_checkpoint(source, dst, metric="function", **options)
    return tree(dst)


def test_no_unit_removed_changes_nothing(source: Path, text: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "dst", ratio=0, calibration=text)
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    assert torch.equal(logits(load(source), ids), logits(load(tmp_path / "dst"), ids))


def test_it_is_nearer_to_the_model_than_weights_are(source: Path, text: Path, tmp_path: Path) -> None:
    ids = torch.randint(3, 64, (16, 24), generator=torch.Generator().manual_seed(1))
    dense = logits(load(source), ids)
    off = {}
    for metric in ("weight", "function"):
        seen = {"calibration": text} if metric == "function" else {}
        fold_checkpoint(source, tmp_path / metric, ratio=0.5, metric=metric, **seen)
        off[metric] = float((logits(load(tmp_path / metric), ids) - dense).square().mean())
    assert off["function"] < 0.7 * off["weight"], off


def test_the_model_writes_its_own_text_and_it_is_kept(source: Path, tmp_path: Path) -> None:
    first = run(source, tmp_path / "dst", ratio=0.25)
    cache = tmp_path / f"dst{CACHE}"
    tokens = torch.tensor(json.loads(cache.read_text())["tokens"]["value"])
    assert tokens.shape == (192, 256)
    assert bool((tokens[:, 0] == 1).all())
    assert len(tokens.unique(dim=0)) == 192
    stamp = cache.stat().st_mtime_ns
    assert run(source, tmp_path / "dst", ratio=0.25, overwrite=True) == first
    assert cache.stat().st_mtime_ns == stamp, "read, not written again"
    record = json.loads((tmp_path / "dst" / "pyfold.json").read_text())
    assert record["method"]["metric"] == "function"
    assert record["options"]["calibration"] == "self"
    assert all(0 <= group["output_error"] < 1 and group["ridge"] for group in record["groups"])


def test_a_survey_measures_what_a_fold_of_one_group_does(source: Path) -> None:
    """The divergence of the whole model, through transformers, from what it says with that group alone folded."""
    checkpoint = open_checkpoint(source)
    tokens = torch.randint(3, 64, (32, 20), generator=torch.Generator().manual_seed(0))
    groups = family_of(checkpoint).fold_groups(checkpoint)
    seen = [torch.ones(group.width) for group in groups]
    found = survey(checkpoint, groups, tokens, information=seen, ridge=True, backend="cpu:avx2")
    probes = tokens[7::8]
    dense = logits(load(source), probes).log_softmax(-1)
    for group, curve in zip(groups, found, strict=True):
        k = int(0.75 * group.width)
        model = load(source)
        mlp = model.model.layers[group.layer].mlp
        activations = Activations(checkpoint, tokens, checkpoint.tensors.__getitem__)
        own = activations.mlp(group.layer, model.state_dict())
        c = moments([own.units(x) for x in activations.inputs(group.layer)], "cpu:avx2")
        folded = fold_units(own.down, c, k, ridge=True, backend="cpu:avx2", information=seen[0])
        for name in ("gate_proj", "up_proj"):
            part = getattr(mlp, name)
            part.weight = torch.nn.Parameter(part.weight[folded.kept])
            if part.bias is not None:
                part.bias = torch.nn.Parameter(part.bias[folded.kept])
        mlp.down_proj.weight = torch.nn.Parameter(folded.consumer)
        said = logits(model, probes).log_softmax(-1)
        nats = float((dense.exp() * (dense - said)).sum(-1).mean())
        assert curve[k - 1] == pytest.approx(nats, rel=1e-3)
        assert len(curve) == group.width
        assert (curve[:-1] >= curve[1:]).all()
        assert curve[-1] == 0


@pytest.mark.parametrize("what", ["ratio", "target_params", "target_bytes"])
def test_widths_are_found_within_the_budget(source: Path, text: Path, tmp_path: Path, what: str) -> None:
    target = int(0.85 * open_checkpoint(source).n_parameters)
    given = {"ratio": 0.3, "target_params": target, "target_bytes": 4 * target}[what]
    options: dict[str, Any] = {what: given, "calibration": text, "metric": "function"}
    found = fold_checkpoint(source, tmp_path / "auto", allocate="auto", **options)
    even = fold_checkpoint(source, tmp_path / "even", **options)
    stock = fold_checkpoint(source, tmp_path / "stock", allocate="auto", profile="stock", **options)
    a_unit = (found.parameters_before - even.parameters_after) // sum(g.width - g.folded_width for g in even.groups)
    limit = even.parameters_after if what == "ratio" else target
    for report in (found, even, stock):
        assert report.parameters_after <= limit
        assert limit - report.parameters_after < len(report.groups) * a_unit
    assert found.profile == "per-layer"
    assert stock.profile == "stock"
    assert len({group.folded_width for group in stock.groups}) == 1
    nats = [float(re.search(r"([0-9.]+) nats", note)[1]) for note in stock.notes]
    assert nats[0] <= nats[1], "one width costs more"
    model = load(tmp_path / "auto", trust_remote_code=True)
    assert [layer.mlp.down_proj.in_features for layer in model.model.layers] == [g.folded_width for g in found.groups]


def test_it_goes_on_where_it_was_stopped(source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(source, tmp_path / "expected", ratio=0.25, calibration=text)
    begun = stop_before(UnitsFold, 2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "dst", ratio=0.25, calibration=text)
    with pytest.raises(PyfoldError, match="cannot read the calibration text"):
        run(source, tmp_path / "dst", ratio=0.25, calibration=tmp_path / "none")
    with pytest.raises(PyfoldError, match=r"an unfinished run with ratio 0.25 instead of 0.5"):
        run(source, tmp_path / "dst", ratio=0.5, calibration=text)
    assert run(source, tmp_path / "dst", ratio=0.25, calibration=text) == expected
    assert 3 < len(begun) < 6, "what was on the disk is not folded again"


def test_a_destination_is_refused_before_a_token_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pyfold.calibration.Writer", written)
    full, busy = tmp_path / "full", tmp_path / "busy"
    full.mkdir()
    (full / "file").touch()
    with Destination(busy, []):
        for dst, words in (
            (full, "is not empty"),
            (source / "dst", "lie in one another"),
            (busy, "another pyfold is writing it"),
        ):
            with pytest.raises(PyfoldError, match=words):
                run(source, dst, ratio=0.25)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "dst", ratio=0.25)
    assert [entry.name for entry in tmp_path.iterdir()] == ["full"]
    assert [entry.name for entry in full.iterdir()] == ["file"]


@pytest.mark.parametrize("allocate", ["uniform", "auto"])
def test_memory_is_kept_to(text: Path, tmp_path: Path, allocate: str) -> None:
    source = with_tokenizer(tiny_checkpoint(tmp_path / "src", width=1200, hidden_size=512))
    options = [
        "--ratio",
        "0.2",
        "--metric",
        "function",
        "--allocate",
        allocate,
        "--calibration",
        text,
        "--json",
        "--host-memory",
    ]
    refused = run_cli("fold", source, tmp_path / "dst", *options, "1MiB")
    assert refused.returncode == 2, refused.stderr
    least = int(re.search(r"at least .*\(([\d,]+) bytes\)", refused.stderr)[1].replace(",", ""))
    done = run_cli("fold", source, tmp_path / "dst", *options, least + (8 << 20))  # what a process holds varies
    assert done.returncode == 0, done.stderr
    assert 0.7 * least < json.loads(done.stdout)["peak_rss_bytes"] <= least + (8 << 20)


def test_what_cannot_be_done_is_said(source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "short.txt"
    short.write_text("w3 w4 w5")
    bare = tiny_checkpoint(tmp_path / "bare")
    dst = tmp_path / "dst"
    for of, options, words in (
        (source, ["--metric", "functions"], "metric: expected weight or function, got 'functions'"),
        (source, ["--metric", "function", "--repair", "all"], "repair: expected ridge or none of metric function, got 'all'"),
        (source, ["--metric", "function", "--calibration", str(short)], "at least 4080 tokens of text, got 3"),
        (source, ["--metric", "function", "--calibration", str(tmp_path / "no")], "cannot read the calibration text"),
        (source, ["--metric", "function", "--calibration", "none", "--allocate", "auto"], "auto measures on text"),
        (source, ["--calibration", str(text)], "the weight metric sees no text"),
        (source, ["--metric", "function", "--host-memory", "350MiB"], "host_memory"),
        (bare, ["--metric", "function"], "transformers cannot load it"),
        (source, ["--allocate", "auto"], "it needs metric function"),
        (source, ["--metric", "function", "--seed", "-1"], "seed: expected 0 to"),
        (source, ["--allocate", "best"], "expected uniform or auto, got 'best'"),
        (source, ["--profile", "stock", "--layers", "1"], "stock is one width, and one number of heads, for all layers"),
    ):
        assert cli.main(["fold", str(of), str(dst), "--ratio", "0.25", *options]) == 2
        error = capsys.readouterr().err
        assert words in error, error
        assert error.count("\n") == 1
        assert not dst.exists()


def test_a_model_that_repeats_itself_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "src")
    model = load(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(100)  # as cold as can be
    model.save_pretrained(folder)
    with pytest.raises(PyfoldError, match="repeats itself"):
        fold_checkpoint(with_tokenizer(folder), tmp_path / "dst", ratio=0.2, metric="function")
