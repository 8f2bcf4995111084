"""`pyfold eval`: perplexity by either protocol, comparisons, tasks of lm-evaluation-harness, the picture."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import string
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import check_refused, load, patch_json, run_cli, tiny_checkpoint

import pyfold.compare
from pyfold import cli, fold_checkpoint, perplexity
from pyfold.compare import Measured, compare
from pyfold.errors import PyfoldError

TEXT = "the quick brown fox jumps over the lazy dog while model folding merges neurons that do the same thing. " * 5


def with_tokenizer(folder: Path, letters: str = string.ascii_lowercase + " .") -> Path:
    """A token for each letter; it knows the model's length, so that it has a reason to warn of long texts."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    vocabulary = {token: i for i, token in enumerate([*special.values(), *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that reads letters."""
    return with_tokenizer(tiny_checkpoint(tmp_path_factory.mktemp("eval") / "dense"))


@pytest.fixture(scope="module")
def folded(dense: Path) -> Path:
    """The same with a layer folded, which loads by its own modeling file."""
    fold_checkpoint(dense, dense.with_name("folded"), ratio=0.5, layers="1")
    return dense.with_name("folded")


def letters(folder: Path, text: str) -> torch.Tensor:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", verbose=False).input_ids


def test_eval_is_the_perplexity_of_the_model(smollm2: Path, tmp_path: Path) -> None:
    """One window: exactly transformers' own loss. Several: every token scored once."""
    text = "The quick brown fox jumps over the lazy dog. " * 8 + "Model folding merges neurons that do the same thing."
    (tmp_path / "text.txt").write_text(text)
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(smollm2)(text, return_tensors="pt").input_ids
    with torch.inference_mode():
        expected = float(load(smollm2)(ids, labels=ids).loss.exp())
    shown = json.loads(run_cli("eval", smollm2, "--text", tmp_path / "text.txt", "--json").stdout)[0]
    assert shown["n_tokens"] == ids.shape[1] - 1
    assert shown["perplexity"] == pytest.approx(expected, rel=1e-4)
    windows = run_cli("eval", smollm2, "--text", tmp_path / "text.txt", "--context", "32", "--tokens", "80")
    assert "over 79 tokens, context 32" in windows.stdout
    assert windows.returncode == 0


def test_eval_runs_only_code_that_pyfold_wrote(source: Path, tmp_path: Path) -> None:
    from pyfold.deliver.huggingface import has_own_modeling_file
    from pyfold.families import FAMILIES

    folded = tmp_path / "dst"
    run_cli("fold", source, folded, "--ratio", "0.25", "--layers", "1")
    assert has_own_modeling_file(folded, FAMILIES)
    (folded / "modeling_pyfold.py").write_text((folded / "modeling_pyfold.py").read_text() + "\nprint('mine')\n")
    assert not has_own_modeling_file(folded, FAMILIES)
    (folded / "modeling_pyfold.py").write_text((folded / "modeling_pyfold.py").read_text().replace("\nprint('mine')\n", ""))
    assert has_own_modeling_file(folded, FAMILIES)
    own = json.loads((folded / "config.json").read_text())["auto_map"]
    for foreign in ({"AutoModelForCausalLM": "owner/repo--evil.Evil"}, {"AutoConfig": "evil.Evil"}):
        patch_json(folded / "config.json", auto_map={**own, **foreign})
        assert not has_own_modeling_file(folded, FAMILIES)
    refused = run_cli("eval", folded)
    assert refused.returncode == 2
    assert "mine" not in refused.stdout
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("windows", "context", "tokens"), [(1, 64, None), (3, 64, None), (4, 100, 257), (9, 64, 200), (2, 80, 80)]
)
def test_windows_are_spread_evenly(dense: Path, windows: int, context: int, tokens: int | None) -> None:
    """The mean of transformers' own losses of the windows; also where they overlap, or are all the same."""
    ids = letters(dense, TEXT)[:, :tokens]
    model, losses, begins = load(dense), [], []
    for i in range(windows):
        begins.append(math.floor(i * (ids.shape[1] - context) / max(windows - 1, 1)))
        window = ids[:, begins[-1] : begins[-1] + context]
        with torch.inference_mode():
            losses.append(float(model(window, labels=window).loss))
    assert windows == 1 or (begins[0], begins[-1] + context) == (0, ids.shape[1])
    found = perplexity(dense, text=TEXT, max_tokens=tokens, context=context, windows=windows)
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / windows), rel=1e-5)
    assert (found.n_tokens, found.context, found.windows) == (windows * (context - 1), context, windows)


def test_the_command_says_how_it_measured(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    done = run_cli("eval", dense, "--text", tmp_path / "text.txt", "--context", "64", "--windows", "3")
    expected = perplexity(dense, text=TEXT, context=64, windows=3).perplexity
    assert done.stdout == f"perplexity {expected:.4f} over 189 tokens, 3 windows of 64: {dense}\n"
    assert done.stderr == "", "a text longer than the model is no reason to warn"


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--windows", "0"], ["windows >= 1", "got 0"]),
        (["--windows", "-3"], ["windows >= 1", "got -3"]),
        (["--context", "1"], ["context >= 2", "got 1"]),
        (["--tokens", "1"], ["tokens >= 2", "and 1"]),
        (["--windows", "2", "--tokens", "100", "--context", "128"], ["has 100 tokens", "128 are needed"]),
        (["--tasks-folder", "tasks"], ["--tasks"]),
        (["--picture", "it.jpg"], ["it.jpg", ".png"]),
        (["--picture", "nowhere/it.png"], ["nowhere"]),
    ],
    ids=" ".join,
)
def test_bad_options_are_refused(dense: Path, capsys: pytest.CaptureFixture[str], options: list[str], names: list[str]) -> None:
    code = cli.main(["eval", str(dense), *options])
    check_refused(code, capsys.readouterr().err, names)


def test_a_stride_is_of_the_window_that_slides(dense: Path) -> None:
    for options in ({"stride": 8, "windows": 2}, {"stride": 0}, {"stride": 32}):
        with pytest.raises(PyfoldError, match="1 <= stride < context and no windows"):
            perplexity(dense, text=TEXT, context=32, **options)


def test_several_checkpoints_in_one_table(
    dense: Path, folded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    command = ["eval", str(dense), str(folded), "--text", str(tmp_path / "text.txt"), "--context", "64"]
    assert cli.main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    models = load(dense), load(folded, trust_remote_code=True)
    each = [perplexity(path, text=TEXT, context=64).perplexity for path in (dense, folded)]
    assert [row["perplexity"] for row in rows] == each
    assert [row["ratio"] for row in rows] == [1, each[1] / each[0]]
    assert [row["parameters"] for row in rows] == [model.num_parameters() for model in models]
    assert [row["bytes"] for row in rows] == [4 * row["parameters"] for row in rows]
    assert cli.main(command) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["checkpoint", "parameters", "bytes", "perplexity", "x", "first"]
    for line, row in zip(lines, rows, strict=False):
        sizes = (f"{row[key]:,}" for key in ("parameters", "bytes"))
        assert line.split() == [row["source"], *sizes, f"{row['perplexity']:.4f}", f"{row['ratio']:.3f}"]
    assert lines[2:] == ["", f"perplexity over {rows[0]['n_tokens']} tokens, context 64"]


def test_one_model_at_a_time(dense: Path, folded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def watched(source: Path) -> Any:
        assert all(model() is None for model in seen), "the one before is still in memory"
        model, tokenizer = load_model(source)
        seen.append(weakref.ref(model))
        return model, tokenizer

    load_model = pyfold.compare.load_model
    monkeypatch.setattr(pyfold.compare, "load_model", watched)
    told: list[tuple[int, int, str]] = []
    compare([dense, folded, dense], text=TEXT, context=64, windows=2, progress=lambda *told_: told.append(told_))
    assert len(seen) == 3
    assert told == [(63 * i, 126, f"{n} of 3: perplexity, tokens") for n in (1, 2, 3) for i in (1, 2)]


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is wrong must be said before a model is loaded."""
    monkeypatch.setattr(pyfold.compare, "load_model", lambda source: pytest.fail("a model was loaded"))


@pytest.mark.usefixtures("no_model")
def test_what_cannot_be_compared_is_refused_first(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["eval", str(dense), str(tmp_path / "missing")])
    check_refused(code, capsys.readouterr().err, ["missing: no such folder"])
    shutil.copytree(dense, tmp_path / "other")
    with_tokenizer(tmp_path / "other", "".join(reversed(string.ascii_lowercase)) + " .")
    code = cli.main(["eval", str(dense), str(tmp_path / "other")])
    check_refused(code, capsys.readouterr().err, ["other: its tokenizer is not that of", str(dense)])


TASK = """
task: letters
dataset_path: json
dataset_kwargs:
  cache_dir: {folder}/cache
  data_files: {{train: {folder}/train.json, test: {folder}/test.json}}
output_type: multiple_choice
training_split: train
test_split: test
num_fewshot: 2
fewshot_delimiter: " "
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def tasks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task without few-shot examples and one with, over questions made here, and one whose data are elsewhere."""
    pytest.importorskip("lm_eval", reason="needs pip install 'pyfold[tasks]'")
    folder = tmp_path_factory.mktemp("tasks")
    generator = torch.Generator().manual_seed(0)

    def word(length: int) -> str:
        return "".join(string.ascii_lowercase[i] for i in torch.randint(26, (length,), generator=generator))

    for split, count in (("train", 8), ("test", 24)):
        docs = [{"question": word(6), "choices": [word(3), word(3), word(3)], "answer": i % 3} for i in range(count)]
        (folder / f"{split}.json").write_text("\n".join(map(json.dumps, docs)))
    few = TASK.format(folder=folder)
    (folder / "letters_few.yaml").write_text(few.replace("task: letters", "task: letters_few"))
    (folder / "letters.yaml").write_text(few.replace("num_fewshot: 2", ""))
    (folder / "elsewhere.yaml").write_text(
        re.sub("dataset_kwargs:.*?output", "output", few, flags=re.S)
        .replace("task: letters", "task: elsewhere")
        .replace("dataset_path: json", "dataset_path: nobody/nothing")
    )
    return folder


def test_tasks_are_answered_by_the_harness(
    dense: Path, folded: Path, tasks_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Accuracy: the share of questions to whose answer the model gives the highest likelihood."""
    expected = []
    for model in (load(dense), load(folded, trust_remote_code=True)):
        right = 0
        for doc in map(json.loads, (tasks_folder / "test.json").read_text().splitlines()):
            likelihoods = []
            for choice in doc["choices"]:
                ids = letters(dense, f"{doc['question']} {choice}")[0]
                with torch.inference_mode():
                    log = model(ids[None]).logits[0].log_softmax(-1)
                begin = len(doc["question"])
                likelihoods.append(sum(float(log[i - 1, ids[i]]) for i in range(begin, len(ids))))
            right += likelihoods.index(max(likelihoods)) == doc["answer"]
        expected.append(right / 24)
    command = ["eval", str(dense), str(folded), "--context", "64", "--windows", "1", "--tasks-folder", str(tasks_folder)]
    assert cli.main([*command, "--tasks", "letters", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["tasks"]["letters"]["acc"] for row in rows] == expected
    assert rows[0]["tasks"]["letters"].keys() == {"acc", "acc_stderr"}
    assert cli.main([*command, "--tasks", "letters,letters_few"]) == 0
    shown = capsys.readouterr()
    assert "letters acc" in shown.out
    assert "letters_few acc" in shown.out
    for line, share in zip(shown.out.splitlines()[1:], expected, strict=False):
        assert f"{100 * share:.2f} ± " in line
    assert shown.err == ""


def test_examples_do_not_depend_on_what_came_before(dense: Path, tasks_folder: Path) -> None:
    """Each model is shown the same examples, in each run."""
    told = []
    rows = compare(
        [dense, dense],
        context=64,
        windows=1,
        tasks=["letters_few"],
        tasks_folder=tasks_folder,
        progress=lambda *told_: told.append(told_),
    )
    assert rows[0].tasks == rows[1].tasks
    assert told[-1] == (72, 72, "2 of 2: tasks, requests")


@pytest.mark.usefixtures("no_model")
def test_tasks_that_cannot_be_run_are_refused_first(
    dense: Path, tasks_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", str(dense), "--tasks-folder", str(tasks_folder), "--tasks"]
    check_refused(cli.main([*command, "letters,nonsense,"]), capsys.readouterr().err, ["no task 'nonsense', ''"])
    assert cli.main([*command, "elsewhere"]) == 1
    error = capsys.readouterr().err
    assert "the data of elsewhere cannot be had: " in error
    assert "nobody/nothing" in error
    assert error.count("\n") == 1
    code = cli.main(["eval", str(dense), "--tasks", "letters", "--tasks-folder", str(tmp_path / "nowhere")])
    check_refused(code, capsys.readouterr().err, ["nowhere: no such folder of tasks"])
    for text in ("task: broken\ndataset_path: json\noutput_type: nonsense", "task: broken\ndataset_path: [", "- 1"):
        (tmp_path / "broken.yaml").write_text(text)
        code = cli.main(["eval", str(dense), "--tasks", "broken", "--tasks-folder", str(tmp_path)])
        check_refused(code, capsys.readouterr().err, ["broken"])


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("options", "module", "extra"),
    [(["--tasks", "arc_easy"], "lm_eval", "tasks"), (["--picture", "it.png"], "matplotlib", "plot")],
)
def test_a_missing_extra_is_named_first(
    dense: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    module: str,
    extra: str,
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    check_refused(cli.main(["eval", str(dense), *options]), capsys.readouterr().err, [f"pip install 'pyfold[{extra}]'"])


def measured(*points: tuple[str, float, float]) -> list[Measured]:
    first = points[0][2]
    return [Measured(name, int(1e6 * x), 1, y, y / first, 1000, 1024, None, {}) for name, x, y in points]


CROWDED = measured(
    ("smollm2", 134.5, 24.3),
    ("function", 125, 33.1),
    ("function-ridge", 125, 30.2),
    ("auto-10", 126.5, 27.5),
    ("auto-20", 118.5, 29.5),
    ("energy-20", 118.5, 31.1),
    ("auto-30", 110.5, 38.5),
    ("energy-$30$", 110.5, 41),
    ("auto-50", 94.5, 88.5),
    ("gone", 90, math.inf),
)


@pytest.mark.parametrize("rows", [CROWDED, CROWDED[:4], measured(("owner/model", 7000, 5.5)), CROWDED[::-1]])
def test_every_point_has_a_label_of_its_own(rows: list[Measured]) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.text import Text

    from pyfold.picture import figure_of

    figure = figure_of(rows)
    axes = figure.axes[0]
    finite = [row for row in rows if math.isfinite(row.perplexity)]
    boxes = [Text.get_window_extent(label) for label in axes.texts]
    inside = axes.get_window_extent()
    assert [label.get_text().split(",")[0].split(" ")[0] for label in axes.texts] == [Path(row.source).name for row in finite]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert inside.x0 <= box.x0 < box.x1 <= inside.x1
        assert inside.y0 <= box.y0 < box.y1 <= inside.y1
        assert not any(box.contains(*axes.transData.transform(line.get_xydata()[0])) for line in axes.lines[: len(finite)])
    spread = max(row.perplexity for row in finite) / min(row.perplexity for row in finite)
    assert axes.get_yscale() == ("log" if spread > 3 else "linear")
    assert ("gone (inf)" in axes.get_xlabel()) == (len(finite) < len(rows))
    assert ("reference" in axes.texts[0].get_text()) == (rows[0] is finite[0])


def test_the_picture_is_whole_or_as_it_was(
    dense: Path, folded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    command = ["eval", str(dense), str(folded), "--context", "64", "--windows", "2", "--picture", str(tmp_path / "it.png")]
    assert cli.main(command) == 0
    shown, first = capsys.readouterr().out, (tmp_path / "it.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert cli.main(command) == 0
    assert (tmp_path / "it.png").read_bytes() == first, "the same figures, the same bytes"
    capsys.readouterr()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "it.png"))

    monkeypatch.setattr(os, "replace", full)
    assert cli.main(command) == 1
    failed = capsys.readouterr()
    assert failed.out == shown, "what was measured is not lost"
    assert failed.err == f"pyfold: {tmp_path / 'it.png'}: No space left on device\n"
    assert [file.name for file in tmp_path.iterdir()] == ["it.png"]
    assert (tmp_path / "it.png").read_bytes() == first
