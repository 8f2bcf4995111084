"""Compiles every kernel of the Triton backend to cubin, at the tiles its launchers choose; no GPU needed.

The launchers run for real on CPU tensors; what they would launch is recorded and compiled. Prints a JSON list of
{kernel, arch, dtype, constants, warps, registers, stack, shared, tf32}. A process of its own: the tests' has the interpreter.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from pyfold.ops import triton as backend
from pyfold.ops.triton import tiles

ARCHS = (80, 90, 100)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# One panel of features, several, odd rows, and ones, which a launch on a GPU makes constants of the kernel.
SHAPES = {(1200, 1024, 128): ARCHS, (600, 300, 576): (90,), (40, 5, 3): (90,), (1, 1, 1): (90,)}
OPTIONS = ("num_warps", "num_stages", "maxnreg")
TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64", torch.int32: "*i32",
    torch.int64: "*i64",
}  # fmt: skip


def launches(n: int, k: int, d: int, dtype: torch.dtype) -> list[tuple[JITFunction[Any], dict[str, Any]]]:
    """What the launchers launch for one shape: kernels and their arguments by name, launch options included."""
    recorded: list[tuple[JITFunction[Any], dict[str, Any]]] = []

    def record(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        recorded.append((kernel, {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}))

    JITFunction.run = record  # type: ignore[method-assign]
    x = torch.zeros(n, d, dtype=dtype)
    labels = torch.arange(n) % k
    weights = torch.ones(n, dtype=torch.float64)
    backend.assign([x], [torch.zeros(k, d)])
    for w in (None, weights):
        backend.update([x], [labels], [k], [w])
        backend.merge_rows(x, labels, k, w, torch.empty(k, d, dtype=dtype))
    for scale in (None, torch.ones(n)):
        backend.merge_columns(x.T.contiguous(), labels, k, scale, torch.empty(d, k, dtype=dtype))
    if dtype == torch.float32:
        backend.lloyd([torch.zeros(n, n)], [labels], [k], [weights])
    return recorded


def compiled(kernel: JITFunction[Any], arguments: dict[str, Any], arch: int) -> dict[str, Any]:
    constants = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr}
    signature, attributes = {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value == 1:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            signature[parameter.name] = "i32"
    options = {name: arguments[name] for name in OPTIONS if arguments.get(name) is not None}
    result = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", arch, 32),
        options=options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    return {
        "kernel": kernel.fn.__name__,
        "arch": arch,
        "constants": {name: str(value) for name, value in constants.items()},
        "warps": options.get("num_warps", 4),
        "registers": int(registers),
        "stack": int(stack),
        "shared": result.metadata.shared,
        "tf32": "tf32" in result.asm["ptx"],
    }


def main() -> None:
    seen: set[tuple[Any, ...]] = set()
    rows = []
    for shape, archs in SHAPES.items():
        for arch in archs:
            tiles.chip = lambda _, arch=arch: tiles.Chip(arch, 132)
            for dtype in DTYPES:
                for kernel, arguments in launches(*shape, dtype):
                    kinds = {name: getattr(value, "dtype", value) for name, value in arguments.items()}
                    variant = [
                        str(kinds[p.name])
                        for p in kernel.params
                        if p.is_constexpr or not isinstance(kinds[p.name], int) or kinds[p.name] == 1
                    ]
                    key = (kernel.fn.__name__, arch, *variant)
                    if key not in seen:
                        seen.add(key)
                        rows.append({**compiled(kernel, arguments, arch), "dtype": str(dtype)})
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
