"""The command line as its user meets it: what it prints, failures in the middle, interruption."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import (
    ROOT,
    UP,
    check_refused,
    heed_interrupts,
    load,
    patch_json,
    rewrite,
    run_cli,
    tensors_of,
    tiny_checkpoint,
    tree,
    write_synthetic,
)

from pyfold import cli, fold_checkpoint
from pyfold.io.checkpoint import INDEX
from pyfold.io.destination import Destination


def test_fold_prints_what_it_did_and_how_to_load_it(source: Path, tmp_path: Path) -> None:
    done = run_cli("fold", source, tmp_path / "dst", "--ratio", "0.3", "--layers", "1", "--multiple-of", "8")
    assert done.returncode == 0
    assert done.stderr == "", "no progress bar where stderr is no terminal"
    assert "layers.1.mlp: width 33 rounded to 32, a multiple of 8" in done.stdout
    assert "of all removed" in done.stdout
    assert "per-layer" in done.stdout
    assert f'AutoModelForCausalLM.from_pretrained("{tmp_path / "dst"}", trust_remote_code=True)' in done.stdout
    uniform = run_cli("fold", source, tmp_path / "uniform", "--ratio", "0.25")
    assert "stock: all layers alike" in uniform.stdout
    assert done.stdout.startswith("profile per-layer, to be served by\n  transformers ")
    assert f"cannot: wants layers of one width: pyfold export {tmp_path / 'dst'} " in done.stdout
    assert f"vllm serve {tmp_path / 'uniform'}" in uniform.stdout.partition("width")[0]
    assert f'AutoModelForCausalLM.from_pretrained("{tmp_path / "uniform"}")' in uniform.stdout


def test_json_and_quiet(source: Path, tmp_path: Path) -> None:
    report = json.loads(run_cli("fold", source, tmp_path / "a", "--width", "40", "--json").stdout)
    assert report["profile"] == "stock"
    assert [group["folded_width"] for group in report["groups"]] == [40, 40, 40]
    quiet = run_cli("fold", source, tmp_path / "b", "--width", "40", "--quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_progress_bar_on_a_terminal(source: Path, tmp_path: Path) -> None:
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "pyfold", "fold", str(source), str(tmp_path / "dst"), "--ratio", "0.25"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=terminal, cwd=ROOT)
    os.close(terminal)
    shown = ""
    with contextlib.suppress(OSError):  # how the end of a pseudo-terminal reads
        while chunk := os.read(main, 65536):
            shown += chunk.decode()
    os.close(main)
    assert process.wait() == 0
    assert "layers.2.mlp" in shown
    assert "%" in shown


def test_inspect_reads_headers_only(source: Path, tmp_path: Path) -> None:
    """Also where there is no data behind the headers, and without importing torch."""
    hollow = tmp_path / "hollow"
    shutil.copytree(source, hollow)
    for shard in hollow.glob("*.safetensors"):
        size = shard.stat().st_size
        (length,) = struct.unpack("<Q", shard.read_bytes()[:8])
        os.truncate(shard, 8 + length)
        os.truncate(shard, size)
    shown = run_cli("inspect", hollow, "--ratio", "0.25", "--layers", "0-1")
    assert shown.returncode == 0
    assert shown.stdout == run_cli("inspect", source, "--ratio", "0.25", "--layers", "0-1").stdout.replace(
        str(source), str(hollow)
    )
    assert "layers.0.mlp" in shown.stdout
    assert "per-layer" in shown.stdout
    result = json.loads(run_cli("inspect", source, "--json").stdout)
    assert result["architecture"] == "llama"
    assert result["parameters"] == sum(tensor.numel() for tensor in tensors_of(source).values())
    code = f"import sys; from pyfold.cli import main; main(['inspect', {str(source)!r}]); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def test_help_names_every_option() -> None:
    for command in ((), ("fold",), ("inspect",), ("eval",)):
        shown = run_cli(*command, "--help")
        assert shown.returncode == 0
        assert "usage: pyfold" in shown.stdout
    assert run_cli("--version").stdout.startswith("pyfold 0.")
    assert run_cli().returncode == 2
    assert run_cli("fold", "a", "b").returncode == 2


def test_empty_destination_is_used_and_overwrite_replaces_everything(source: Path, tmp_path: Path) -> None:
    (tmp_path / "dst").mkdir()
    assert (
        run_cli("fold", source, tmp_path / "dst", "--ratio", "0.25", "--layers", "1", "--max-shard-size", "9KB").returncode == 0
    )
    assert run_cli("fold", source, tmp_path / "dst", "--ratio", "0.5", "--overwrite").returncode == 0
    assert run_cli("fold", source, tmp_path / "fresh", "--ratio", "0.5").returncode == 0
    assert tree(tmp_path / "dst") == tree(tmp_path / "fresh"), "no stale shard, no stale modeling file"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dst", "fresh"]


def test_a_width_per_layer_needs_a_causal_model(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The modeling file has no other head; one width for all layers needs no modeling file."""
    classifier = tmp_path / "src"
    shutil.copytree(source, classifier)
    patch_json(classifier / "config.json", architectures=["LlamaForSequenceClassification"])
    command = ["fold", str(classifier), str(tmp_path / "dst"), "--ratio", "0.25"]
    code = cli.main([*command, "--layers", "1"])
    check_refused(code, capsys.readouterr().err, ["config.json", "LlamaForSequenceClassification", "alike"])
    assert not (tmp_path / "dst").exists()
    assert cli.main([*command, "--quiet"]) == 0


def test_symlinked_destination_and_source(source: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "dst").symlink_to(tmp_path / "disk" / "real")
    (tmp_path / "src").symlink_to(source)
    assert run_cli("fold", tmp_path / "src", tmp_path / "dst", "--ratio", "0.25").returncode == 0
    assert (tmp_path / "disk" / "real" / "config.json").exists()
    load(tmp_path / "dst")


def test_nothing_that_a_loader_opens_before_the_commit(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kill just before it would leave the folder: complete but for the two names."""
    seen = []
    commit = Destination.commit
    monkeypatch.setattr(Destination, "commit", lambda stage: (seen.extend(os.listdir(stage.folder)), commit(stage)))
    assert cli.main(["fold", str(source), str(tmp_path / "dst"), "--ratio", "0.25", "--max-shard-size", "30KB", "--quiet"]) == 0
    assert {"pyfold.json", "config.json.tmp", INDEX + ".tmp"} <= set(seen)
    assert not {"config.json", INDEX} & set(seen)
    assert {"config.json", INDEX} <= set(os.listdir(tmp_path / "dst"))
    assert not list((tmp_path / "dst").glob("*.tmp"))


def test_a_mount_point_as_destination(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be renamed onto a container's volume: files move out of a folder inside it, index and config.json last."""
    volume = tmp_path / "volume"
    volume.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == volume)
    moved = []
    rename = os.rename

    def noted(old: Path, new: Path) -> None:
        rename(old, new)
        if new.parent == volume and not new.name.endswith(".trash"):
            moved.append(new.name)

    monkeypatch.setattr(os, "rename", noted)
    assert cli.main(["fold", str(source), str(volume), "--ratio", "0.25", "--max-shard-size", "30KB", "--quiet"]) == 0
    assert moved[-2:] == [INDEX, "config.json"]
    assert sorted(moved) == sorted(entry.name for entry in volume.iterdir())
    load(volume)
    assert cli.main(["fold", str(source), str(volume), "--ratio", "0.25", "--overwrite"]) == 2


def test_custom_code_of_the_source_comes_along(source: Path, tmp_path: Path) -> None:
    custom = tmp_path / "src"
    shutil.copytree(source, custom)
    (custom / "tok.py").write_text("class Tok: pass\n")
    patch_json(custom / "config.json", auto_map={"AutoTokenizer": "tok.Tok"})
    run_cli("fold", custom, tmp_path / "a", "--ratio", "0.25", "--layers", "1")
    run_cli("fold", tmp_path / "a", tmp_path / "b", "--width", "30")
    both, one = (json.loads((tmp_path / name / "config.json").read_text())["auto_map"] for name in "ab")
    assert set(both) == {"AutoTokenizer", "AutoModel", "AutoModelForCausalLM"}
    assert set(one) == {"AutoTokenizer"}
    assert [file.name for file in (tmp_path / "b").glob("*.py")] == ["tok.py"]


def test_overflow_of_a_narrower_dtype_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_checkpoint(tmp_path / "src")
    rewrite(source, lambda tensors: tensors[UP].__setitem__((0, 0), 1e6))
    for ratio in ("0", "0.25"):
        capsys.readouterr()
        code = cli.main(["fold", str(source), str(tmp_path / "dst"), "--ratio", ratio, "--dtype", "float16"])
        check_refused(code, capsys.readouterr().err, ["model-0000", UP, "inf"])
        assert not (tmp_path / "dst").exists()


def test_write_failure_is_one_line_and_exit_1(source: Path, tmp_path: Path) -> None:
    """A real one: the kernel refuses to let the file grow."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    done = run_cli("fold", source, tmp_path / "dst", "--ratio", "0.25", preexec_fn=limit)
    assert done.returncode == 1
    assert "model.safetensors: cannot write: File too large" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_read_failure_is_one_line_and_exit_1(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    assert cli.main(["fold", str(source), str(tmp_path / "dst"), "--ratio", "0.25"]) == 1
    error = capsys.readouterr().err
    assert "model-0000" in error
    assert "cannot read: Input/output error" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_too_little_disk_is_seen_before_a_weight_is_read(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    assert cli.main(["fold", str(source), str(tmp_path / "dst"), "--ratio", "0.25"]) == 1
    assert "1 are free" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def slow_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some seconds of work."""
    return write_synthetic(tmp_path_factory.mktemp("slow") / "src", 16, 2048, 512)


def journal_lines(dst: Path) -> int:
    journal = dst.with_name(dst.name + ".pyfold-partial") / "journal"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def interrupt(source: Path, dst: Path, how: signal.Signals, *options: str) -> tuple[int, str]:
    """Start a fold and send it a signal once it has finished a group."""
    command = [sys.executable, "-m", "pyfold", "fold", str(source), str(dst), "--ratio", "0.25", *options]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts)
    deadline = time.monotonic() + 120
    while journal_lines(dst) < 2:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(how)
    error = process.communicate()[1]
    return process.returncode, error


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_goes_on(slow_source: Path, tmp_path: Path, how: signal.Signals) -> None:
    dst = tmp_path / "dst"
    code, error = interrupt(slow_source, dst, how)
    if how == signal.SIGINT:
        assert (code, error) == (130, "pyfold: interrupted; the same command continues from here\n")
    else:
        assert code == -how
    assert [entry.name for entry in tmp_path.iterdir()] == ["dst.pyfold-partial"]
    assert not {"config.json", INDEX} & {entry.name for entry in tmp_path.rglob("*")}, "nothing that a loader opens"
    other = run_cli("fold", slow_source, dst, "--ratio", "0.5")
    check_refused(other.returncode, other.stderr, ["unfinished run with ratio 0.25 instead of 0.5", "dst.pyfold-partial"])
    done = journal_lines(dst) - 1
    assert done >= 1
    groups = []
    fold_checkpoint(slow_source, dst, ratio=0.25, progress=lambda done, total, what: groups.append(what))
    assert len({what for what in groups if "mlp" in what}) == 16 - done
    assert run_cli("fold", slow_source, tmp_path / "whole", "--ratio", "0.25").returncode == 0
    assert tree(dst) == tree(tmp_path / "whole")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dst", "whole"]


def test_the_old_result_survives_a_killed_overwrite(slow_source: Path, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "dst")
    before = tree(tmp_path / "dst")
    code, _ = interrupt(slow_source, tmp_path / "dst", signal.SIGKILL, "--overwrite")
    assert code == -signal.SIGKILL
    assert tree(tmp_path / "dst") == before
    load(tmp_path / "dst")


def test_a_second_run_on_the_same_destination_refuses(slow_source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pyfold", "fold", str(slow_source), str(tmp_path / "dst"), "--ratio", "0.25"]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while journal_lines(tmp_path / "dst") < 1:
        assert first.poll() is None
        time.sleep(0.005)
    first.send_signal(signal.SIGSTOP)  # or it may be done before the second has begun
    second = run_cli("fold", slow_source, tmp_path / "dst", "--ratio", "0.25")
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 2
    assert "another pyfold is writing it" in second.stderr
    assert first.wait() == 0
    assert (tmp_path / "dst" / "config.json").exists()
