"""What nvcc makes of the CUDA sources: no spills, no local memory, registers and shared memory within each chip's limits."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# Bytes of shared memory that a block may have, of any kind.
LIMITS = {"80": 166912, "90a": 232448, "100": 232448}
STATIC = 49152  # of which a kernel may declare
REGISTERS = 65536  # of a multiprocessor

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


class Kernel(NamedTuple):
    name: str
    registers: int
    stack: int
    spills: int
    shared: int
    threads: int


def kernels_of(source: Path, arch: str, out: Path) -> list[Kernel]:
    flags = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v"]
    done = subprocess.run(
        ["nvcc", *flags, "-keep", "-keep-dir", str(out.parent), "-c", str(source), "-o", str(out)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # The block size that a kernel promises (__launch_bounds__) is in the PTX; any, where it promises none.
    ptx = next(out.parent.glob(f"{source.stem}*.ptx")).read_text()
    promised = dict(re.findall(r"\.entry (\w+)\([^{]*?\.maxntid (\d+)", ptx, re.DOTALL))
    kernels = []
    for name, report in re.findall(r"Compiling entry function '(\w+)'(.*?Used [^\n]*)", done.stderr, re.DOTALL):

        def number(pattern: str, report: str = report) -> int:
            found = re.search(pattern, report)
            return int(found[1]) if found else 0

        spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
        stack, registers, shared = number(r"(\d+) bytes stack"), number(r"Used (\d+) reg"), number(r"(\d+) bytes smem")
        kernels.append(Kernel(name, registers, stack, spills, shared, int(promised.get(name, 1024))))
    return kernels


@pytest.mark.parametrize("arch", LIMITS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_kernels_stay_in_registers(tmp_path: Path, source: Path, arch: str) -> None:
    kernels = kernels_of(source, arch, tmp_path / "kernels.o")
    assert kernels, "the report names every kernel"
    for kernel in kernels:
        print(f"sm_{arch} {kernel}")
        assert kernel.registers > 0
        assert kernel.spills == 0, kernel
        assert kernel.stack == 0, kernel
        assert kernel.shared <= min(STATIC, LIMITS[arch]), kernel
        assert kernel.registers * kernel.threads <= REGISTERS, kernel


def test_the_report_shows_local_memory(tmp_path: Path) -> None:
    """Otherwise the test above could not fail: an array indexed at run time, and more live values than registers."""
    source = tmp_path / "planted.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024) planted(float* x, int at) {\n"
        "    float kept[200];\n"
        "    for (int i = 0; i < 200; i++) kept[i] = x[i * 1024 + threadIdx.x];\n"
        "    for (int i = 0; i < 200; i++) x[i] += kept[(i * at) % 200];\n"
        "}\n"
    )
    [kernel] = kernels_of(source, "90a", tmp_path / "planted.o")
    assert kernel.stack >= 800
    assert kernel.threads == 1024


def test_the_extension_imports_where_there_is_no_cuda() -> None:
    """Its runtime is linked in, and the driver is found when it is first used."""
    import torch

    from pyfold import _C, ops

    linked = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in linked
    if not hasattr(_C, "cuda_lloyd"):
        assert "no CUDA kernels" in str(ops.backends()["cuda"])
    elif not torch.cuda.is_available():
        assert ops.backends()["cuda"] == "torch sees no CUDA device"
        with pytest.raises(RuntimeError, match="cuda limits: "):
            _C.cuda_limits(0)
