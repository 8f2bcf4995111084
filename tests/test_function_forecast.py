"""The plan of a fold by function: what it takes, phase by phase, and what it refuses as the fold does."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import check_refused, count_reads, run_cli, tiny_checkpoint, with_tokenizer

from pyfold import fold_checkpoint
from pyfold.calibration import LENGTH, SEQUENCES
from pyfold.errors import PyfoldError
from pyfold.forecast import Forecast, forecast
from pyfold.function_forecast import Writing
from pyfold.io.safetensors import Shard
from pyfold.pipeline import prepare

MIB = 2**20
OPTIONS: dict[str, Any] = {
    "width": None,
    "layers": None,
    "multiple_of": None,
    "dtype": "keep",
    "max_shard_size": "5GB",
    "backend": "auto",
    "metric": "function",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its logits take more than a layer in hand."""
    folder = tmp_path_factory.mktemp("source") / "src"
    return with_tokenizer(tiny_checkpoint(folder, width=400, hidden_size=64, vocab_size=30000))


def llama_7b(folder: Path) -> Path:
    """Its shapes in fp16; a file without blocks."""
    hidden, width, n_layers, vocabulary = 4096, 11008, 32, 32000
    square, wide = ("F16", (hidden, hidden)), ("F16", (width, hidden))
    layer = {f"self_attn.{name}_proj.weight": square for name in "qkvo"}
    layer |= {"mlp.gate_proj.weight": wide, "mlp.up_proj.weight": wide, "mlp.down_proj.weight": ("F16", (hidden, width))}
    layer |= {name: ("F16", (hidden,)) for name in ("input_layernorm.weight", "post_attention_layernorm.weight")}
    tensors = {f"model.layers.{i}.{name}": tensor for i in range(n_layers) for name, tensor in layer.items()}
    tensors |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), ("F16", (vocabulary, hidden)))
    tensors["model.norm.weight"] = ("F16", (hidden,))
    folder.mkdir()
    file = folder / "model.safetensors"
    shard = Shard(file, tensors)
    os.truncate(file, max(info.end for info in shard._info.values()))
    shard.close()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": vocabulary,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def names(found: Forecast) -> list[str]:
    return [phase.name for phase in found.phases]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_llama_7b_fits_in_4_gib(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a process that has just begun; also where products are in fp32: by the reference."""
    monkeypatch.setattr("pyfold.pipeline.rss_bytes", lambda: 450 * MIB)
    source = llama_7b(tmp_path / "src")
    prepared = prepare(source, ratio=0.2, host_memory="4GiB", **OPTIONS | {"backend": backend})
    found = forecast(prepared)
    print({phase.name: round(phase.memory / MIB) for phase in found.phases})
    assert names(found) == ["writing text", "gradients", "folding"]
    assert found.peak == max(phase.memory for phase in found.phases) <= 4096 * MIB
    assert found.seconds == sum(phase.seconds for phase in found.phases)
    writing = found.phases[0]
    assert isinstance(writing, Writing)
    assert not writing.resident
    assert writing.sequences * (writing.waves - 1) < SEQUENCES <= writing.sequences * writing.waves
    assert writing.key_value_bytes == writing.sequences * 2 * 2 * LENGTH * 32 * 4096
    in_layers = 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    assert writing.bytes_read == writing.waves * (LENGTH - 1) * in_layers + prepared.checkpoint.nbytes - in_layers
    assert "give a text with --calibration FILE" in found.beyond(600)[0]
    assert found.beyond(2 * writing.seconds) == []
    whole_text = tmp_path / "text"
    whole_text.touch()
    read = forecast(prepare(source, ratio=0.2, host_memory="4GiB", calibration=whole_text, **OPTIONS | {"backend": backend}))
    assert names(read) == ["gradients", "folding"]
    assert read.beyond(1) == []
    wide = forecast(prepare(source, ratio=0.2, host_memory="64GiB", **OPTIONS | {"backend": backend})).phases[0]
    assert isinstance(wide, Writing)
    assert wide.resident
    assert wide.waves == 1
    assert wide.bytes_read == prepared.checkpoint.nbytes


def test_a_plan_refuses_what_the_fold_does(
    source: Path, whole_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("pipeline", "processor"):
        monkeypatch.setattr(f"pyfold.{module}.rss_bytes", lambda: 0)
    limit, refused = 1, []
    while len(refused) < 5:
        given: dict[str, Any] = {"ratio": 0.25, "host_memory": limit, "calibration": whole_text}
        try:
            found = forecast(prepare(source, **given, **OPTIONS))
        except PyfoldError as error:
            refused.append(str(error))
            with pytest.raises(PyfoldError, match=re.escape(refused[-1])):
                fold_checkpoint(source, tmp_path / "dst", metric="function", **given)
            limit = int(re.search(r"\(([\d,]+) bytes\)", refused[-1])[1].replace(",", ""))
            continue
        break
    print(refused)
    assert len(refused) == 2, "a layer in hand, and gradients"
    assert "layers.0.mlp needs at least" in refused[0]
    assert "gradients for the function metric take" in refused[1]
    assert found.peak == found.phases[0].memory == limit
    fold_checkpoint(source, tmp_path / "dst", metric="function", **given)


@pytest.mark.parametrize(
    ("given", "surveyed"), [([], []), (["--allocate", "auto"], ["survey"]), (["--heads-ratio", "0.5"], [])]
)
def test_a_plan_says_what_the_fold_takes(whole_text: Path, tmp_path: Path, given: list[str], surveyed: list[str]) -> None:
    source = with_tokenizer(tiny_checkpoint(tmp_path / "src", width=1500, hidden_size=512))
    options = ["--ratio", "0.2", "--json", "--metric", "function", "--calibration", whole_text, *given]
    plan = run_cli("plan", source, tmp_path / "dst", *options)
    assert plan.returncode == 0, plan.stderr
    planned = json.loads(plan.stdout)
    fold = run_cli("fold", source, tmp_path / "dst", *options)
    assert fold.returncode == 0, fold.stderr
    took = json.loads(fold.stdout)
    print(f"peak {took['peak_rss_bytes'] / MIB:.0f} MiB of {planned['peak'] / MIB:.0f} planned, beside "
          f"{planned['process'] / MIB:.0f}; seconds {took['seconds']:.2f} of {planned['seconds']:.2f}")  # fmt: skip
    assert [group["name"] for group in planned["groups"]] == [group["name"] for group in took["groups"]]
    assert [phase["name"] for phase in planned["phases"]] == ["gradients", *surveyed, "folding"]
    assert 0.85 * planned["peak"] <= took["peak_rss_bytes"] <= 1.02 * planned["peak"]


def test_a_plan_counts_the_weights_that_are_read(
    source: Path, whole_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = count_reads(source, monkeypatch)
    for layers, heads in ((None, 0), ("1", 0), ("1", 0.5)):
        options = {"calibration": whole_text, "layers": layers, "ratio": 0.25, "heads_ratio": heads}
        planned = forecast(prepare(source, host_memory=None, **OPTIONS | options))
        read.clear()
        fold_checkpoint(source, tmp_path / f"{layers}-{heads}", metric="function", **options)
        rows = 6 * 4 * 64 * 64  # of the embedding, for five batches of tokens; and the last norm
        assert planned.bytes_read <= sum(read) <= planned.bytes_read + rows


def test_a_plan_is_read_by_people(source: Path, tmp_path: Path) -> None:
    done = run_cli("plan", source, "--metric", "function", "--allocate", "auto", "--max-time", "0.001s")
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"writing text +\d+ +\d+\.\d +[\d,]+  layers in memory; 1 wave of 192 sequences, [\d,]+ bytes", done.stdout
    )
    assert re.search(r"gradients +\d+ +\d+\.\d +[\d,]+\nsurvey +\d+ +\d+\.\d +[\d,]+\nfolding +\d+", done.stdout)
    assert re.search(r"note: writing text takes [\d,]+ s, longer than 0; give a text with --calibration FILE", done.stdout)
    done = run_cli("plan", source, "--metric", "function", "--heads-ratio", "0.5", "--layers", "1")
    assert re.search(r"layers\.1\.attn +2 +1 +whole +whole .*\nlayers\.1\.mlp ", done.stdout), done.stderr
    for options, words in (
        (["--max-time", "soon"], ["max_time", "10min", "'soon'"]),
        (["--heads-ratio", "0.5"], ["heads_ratio", "needs metric function"]),
        (["--metric", "function", "--host-memory", "1MiB"], ["host_memory", "needs at least"]),
    ):
        refused = run_cli("plan", source, *options)
        check_refused(refused.returncode, refused.stderr, words)
