"""The build: one SIMD level's code never reaching another's CPU, arm64, and the house style."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SOURCES = sorted(
    str(file) for part in ("csrc", "tests") for file in (ROOT / part).rglob("*") if file.suffix in (".cpp", ".cu", ".h")
)
CPU = ROOT / "csrc" / "cpu"
PRODUCTS = [CPU / f"{name}.cpp" for name in ("assign", "gram", "products")]  # all that a level of other product units has
KERNELS = [*PRODUCTS, *(CPU / f"{name}.cpp" for name in ("ward", "segments", "merge", "level"))]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mf16c", "-mfma"]
TOOLS = Path(sys.executable).parent  # of the environment that runs the tests, activated or not


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT, **options)


@pytest.mark.skipif(shutil.which("nm") is None or shutil.which("g++") is None, reason="needs g++ and nm")
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the levels are x86-64's")
@pytest.mark.parametrize(
    ("level", "sources", "flags"),
    [("avx512", KERNELS, AVX512), ("amx", PRODUCTS, [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"])],
    ids=["avx512", "amx"],
)
def test_no_level_defines_a_symbol_that_the_linker_could_share(
    level: str, sources: list[Path], flags: list[str], tmp_path: Path
) -> None:
    """A weak (COMDAT) function compiled for AVX-512 could be the copy that every CPU runs."""
    for source in sources:
        target = tmp_path / f"{source.stem}.o"
        common = ["-std=c++17", "-O3", "-fopenmp", "-fPIC", "-fno-exceptions", "-Wno-psabi", f"-DPYFOLD_SIMD={level}"]
        done = run("g++", *common, *flags, "-c", source, "-o", target)
        assert done.returncode == 0, done.stderr
        symbols = run("nm", "-C", target).stdout.splitlines()
        assert not [line for line in symbols if line.split()[-2:-1] and line[17:18] in "VWu"], source
        defined = [line[19:] for line in symbols if line[17:18] in "TDBR"]
        assert defined
        assert all(name.startswith(f"pyfold::{level}::") for name in defined), defined


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="needs g++-aarch64-linux-gnu")
def test_kernels_compile_for_arm64(tmp_path: Path) -> None:
    for source in [*KERNELS, *(CPU / f"{name}.cpp" for name in ("dispatch", "hartigan", "lloyd"))]:
        flags = ["-std=c++17", "-O3", "-fopenmp", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-DPYFOLD_SIMD=baseline"]
        done = run("aarch64-linux-gnu-g++", *flags, "-c", source, "-o", tmp_path / f"{source.stem}.o")
        assert done.returncode == 0, done.stderr


def test_extension_does_not_link_torch() -> None:
    from pyfold import _C

    assert "torch" not in run("ldd", _C.__file__).stdout


def test_calls_release_the_gil() -> None:
    """Another Python thread runs while a kernel does."""
    import threading

    import torch

    from pyfold import ops

    x = torch.randn(3000, 3000)
    counts = {"during": 0}
    done = threading.Event()

    def count() -> None:
        while not done.is_set():
            counts["during"] += 1
            done.wait(0.001)

    thread = threading.Thread(target=count)
    thread.start()
    before = counts["during"]
    ops.gram(x)
    after = counts["during"]
    done.set()
    thread.join()
    assert after - before >= 5


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["clang-format", "--dry-run", "--Werror", *SOURCES],
        ["mypy"],
    ],
    ids=["ruff", "ruff format", "clang-format", "mypy"],
)
def test_house_style(command: list[str]) -> None:
    done = run(TOOLS / command[0], *command[1:])
    assert done.returncode == 0, done.stdout + done.stderr


def test_pre_commit_pins_what_the_tests_run() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line.count("==") == 1)
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    for tool in ("ruff", "clang-format"):
        assert f"{tool}=={pinned[tool]}]" in hooks
