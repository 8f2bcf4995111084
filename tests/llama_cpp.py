"""llama.cpp in a process of its own, as its server runs: ``python llama_cpp.py FILE`` with a JSON request on stdin.

In: ``prompts`` (lists of token ids), ``n_predict``, ``n_probs``, ``texts``. Out, as the last line: for each prompt ``tokens``,
chosen greedily, and at each of them the log-probabilities of the n_probs likeliest, by id; for each text its token ids.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any


def run(file: Path, **request: Any) -> dict[str, Any]:
    """Ask for it from another process: llama.cpp ends the one that it does not like the file in."""
    done = subprocess.run(
        [sys.executable, __file__, file], input=json.dumps(request), capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        raise RuntimeError(f"llama.cpp: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    import xllamacpp

    request = json.load(sys.stdin)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], 256, 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        asked = urllib.request.Request(f"{server.listening_address}/{path}", json.dumps(body).encode())
        asked.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(asked) as answer:
            return json.load(answer)

    found: dict[str, list[Any]] = {"completions": [], "texts": []}
    for prompt in request.get("prompts", []):
        body = {"prompt": prompt, "temperature": 0, "samplers": ["temperature"], "cache_prompt": False}
        sizes = {"n_predict": request["n_predict"], "n_probs": request["n_probs"], "return_tokens": True}
        answer = post("completion", body | sizes)
        likeliest = [
            {each["id"]: each["logprob"] for each in step["top_logprobs"]} for step in answer["completion_probabilities"]
        ]
        found["completions"].append({"tokens": answer["tokens"], "logprobs": likeliest})
    for text in request.get("texts", []):
        found["texts"].append(post("tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"])
    print(flush=True)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
