"""The build: sanitizers over the kernels, one SIMD level's code never reaching another's CPU, arm64, and the house style."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SOURCES = sorted(str(file) for file in (ROOT / "csrc").rglob("*") if file.suffix in (".cpp", ".cu", ".h"))
KERNELS = [ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in ("gram", "ward", "segments", "merge", "level")]
TOOLS = Path(sys.executable).parent  # of the environment that runs the tests, activated or not
# Runs pytest with the extension at argv[1] in place of the installed one.
WITH_EXTENSION = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("pyfold._C", sys.argv[1])
sys.modules["pyfold._C"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import pytest
raise SystemExit(pytest.main(sys.argv[2:]))
"""


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT, **options)


def library(name: str) -> str:
    return run("g++", f"-print-file-name={name}").stdout.strip()


@pytest.fixture(scope="module")
def sanitized() -> Path:
    """The extension built with AddressSanitizer and UndefinedBehaviorSanitizer."""
    build = ROOT / "build" / "sanitize"
    options = [
        "-DPYFOLD_SANITIZE=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build / 'lib'}",
    ]
    for command in ([TOOLS / "cmake", "-S", ROOT, "-B", build, *options], [TOOLS / "cmake", "--build", build, "--parallel"]):
        done = run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    return next((build / "lib").glob("_C*.so"))


def run_sanitized(extension: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    return run(sys.executable, "-c", WITH_EXTENSION, extension, *arguments, env=environment)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the sanitizers' libraries are found through g++")
def test_kernels_are_clean_under_address_and_undefined_behaviour_sanitizers(sanitized: Path) -> None:
    tests = "tests/test_ops.py"
    done = run_sanitized(sanitized, "-q", "-p", "no:cacheprovider", "-x", tests)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="the sanitizers' libraries are found through g++")
def test_the_sanitizer_reports_a_planted_overrun(sanitized: Path, tmp_path: Path) -> None:
    """Otherwise the test above could not fail: a Gram matrix one row too small."""
    planted = tmp_path / "test_planted.py"
    planted.write_text(
        "import ctypes\nfrom pyfold import _C\n\n\ndef test_overrun():\n"
        "    libc = ctypes.CDLL(None)\n    libc.malloc.restype = ctypes.c_void_p\n"
        "    x, out = libc.malloc(ctypes.c_size_t(8 * 4)), libc.malloc(ctypes.c_size_t(7 * 8 * 4))\n"
        "    ctypes.memset(x, 0, 32), ctypes.memset(out, 0, 7 * 8 * 4)\n"
        "    _C.gram('baseline', x, 0, 8, 1, 1, False, out, 1)\n"
    )
    done = run_sanitized(sanitized, "-q", "-s", "-p", "no:cacheprovider", "--rootdir", tmp_path, "-c", os.devnull, planted)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("nm") is None or shutil.which("g++") is None, reason="needs g++ and nm")
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the levels are x86-64's")
def test_no_level_defines_a_symbol_that_the_linker_could_share(tmp_path: Path) -> None:
    """A weak (COMDAT) function compiled for AVX-512 could be the copy that every CPU runs."""
    for source in KERNELS:
        target = tmp_path / f"{source.stem}.o"
        flags = ["-std=c++17", "-O3", "-fopenmp", "-fPIC", "-fno-exceptions", "-Wno-psabi", "-mavx512f", "-mf16c", "-mfma"]
        done = run("g++", *flags, "-DPYFOLD_SIMD=avx512", "-c", source, "-o", target)
        assert done.returncode == 0, done.stderr
        symbols = run("nm", "-C", target).stdout.splitlines()
        assert not [line for line in symbols if line.split()[-2:-1] and line[17:18] in "VWu"], source
        defined = [line[19:] for line in symbols if line[17:18] in "TDBR"]
        assert defined
        assert all(name.startswith("pyfold::avx512::") for name in defined), defined


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="needs g++-aarch64-linux-gnu")
def test_kernels_compile_for_arm64(tmp_path: Path) -> None:
    for source in [*KERNELS, ROOT / "csrc" / "cpu" / "dispatch.cpp", ROOT / "csrc" / "cpu" / "hartigan.cpp"]:
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
