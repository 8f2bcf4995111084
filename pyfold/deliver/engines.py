"""What serves an artefact, by which command; and what cannot, and why."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Engine:
    """``command``: to be typed in a shell; or None, and ``reason`` says what is in the way."""

    name: str
    command: str | None = None
    reason: str | None = None


def engines(profile: str, path: Path, tp: int | None = None) -> list[Engine]:
    """``profile``: ``stock``, ``per-layer`` or ``gguf`` (a file). ``tp``: on so many devices."""
    at = shlex.quote(str(path))
    if profile == "gguf":
        reason = "reads safetensors folders; export the folder that the file was made of"
        return [
            Engine("llama.cpp", f"llama-server -m {at}"),
            *(Engine(name, reason=reason) for name in ("vLLM", "SGLang", "TensorRT-LLM")),
        ]
    serve = "transformers serve"
    gguf = shlex.quote(f"{path}.gguf")
    convert = Engine("llama.cpp", reason=f"reads GGUF: pyfold export {at} {gguf} --to gguf")
    if profile == "stock":
        return [
            Engine("transformers", f"{serve} {at}"),
            Engine("vLLM", f"vllm serve {at}" + (f" --tensor-parallel-size {tp}" if tp else "")),
            Engine("SGLang", f"python -m sglang.launch_server --model-path {at}" + (f" --tp {tp}" if tp else "")),
            Engine("TensorRT-LLM", f"trtllm-serve {at}" + (f" --tp_size {tp}" if tp else "")),
            convert,
        ]
    stock = shlex.quote(f"{path}-stock")
    reason = f"wants layers of one width: pyfold export {at} {stock} --to hf-stock"
    return [
        Engine("transformers", f"{serve} {at} --trust-remote-code"),
        *(Engine(name, reason=reason) for name in ("vLLM", "SGLang", "TensorRT-LLM")),
        convert,
    ]


def lines(found: list[Engine]) -> list[str]:
    """For people."""
    width = max(len(each.name) for each in found)
    return [f"{each.name:<{width}}  {each.command or f'cannot: {each.reason}'}" for each in found]
