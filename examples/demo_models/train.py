"""Trains the small models that phireg's demo, tests and measurements stand on.

    python examples/demo_models/train.py --out DIR --families all --minutes 2

Each family gets a directory with what a published model has (config.json, model.safetensors,
generation_config.json, tokenizer files), ``heldback.jsonl`` with articles it has not seen, and
``card.json``, which says how it was trained and how well it does. All text is made up by
``articles.py``; nothing is downloaded. Two minutes are meant for a data-center GPU; on a CPU
``--steps`` and a small ``--batch`` show that it works.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import tarfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from articles import Example, held_back_articles, training_articles
from batches import Pair, Shuffled, tokenized
from families import FAMILIES, load_model, new_model, save_weights, write_config
from scoring import mean_rouge, perplexities, summaries
from torch.nn import functional
from vocabulary import open_tokenizer, write_tokenizer

ARTICLE_WEIGHT = 0.25
"""Of an article's token in the loss; a summary's token has 1."""


def main() -> None:
    arguments = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    families = FAMILIES if arguments.families == ["all"] else arguments.families
    begin = time.monotonic()
    training = list(islice(training_articles(arguments.seed), arguments.articles))
    test = list(islice(held_back_articles(arguments.seed), arguments.heldback))
    print(f"{len(training)} articles in {time.monotonic() - begin:.0f} s, on {device}", flush=True)
    for family in families:
        directory = arguments.out / family
        directory.mkdir(parents=True, exist_ok=True)
        card = make(family, directory, training, test, arguments, device)
        print(json.dumps(card, indent=2), flush=True)
        if arguments.pack:  # after every family: a stopped run leaves the finished ones
            with tarfile.open(arguments.pack, "w") as tar:
                for finished in families[: families.index(family) + 1]:
                    tar.add(arguments.out / finished, finished)
    print(f"all in {time.monotonic() - begin:.0f} s", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a directory per family goes here")
    parser.add_argument("--families", nargs="+", choices=[*FAMILIES, "all"], default=["all"])
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="of training per family")
    length.add_argument("--steps", type=int, help="per family, to repeat a run")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--articles", type=int, default=100_000, help="different ones to train on")
    parser.add_argument("--heldback", type=int, default=160, help="articles of the test split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pack", type=Path, help="also write everything into this tar file")
    return parser.parse_args()


def make(
    family: str,
    directory: Path,
    training: Sequence[Example],
    test: Sequence[Example],
    arguments: argparse.Namespace,
    device: str,
) -> dict[str, Any]:
    """Write one family's directory; returns its card."""
    print(f"\n== {family}", flush=True)
    write_config(directory, family)
    sample = training[:20_000]
    texts = (text for row in sample for text in (row.article, row.summary))
    write_tokenizer(directory, family, texts)
    tokenizer = open_tokenizer(directory, family)
    begin = time.monotonic()
    pairs = tokenized(tokenizer, training)
    lengths = sorted(len(pair.prompt) + len(pair.summary) for pair in pairs)
    print(
        f"tokenized in {time.monotonic() - begin:.0f} s; tokens per text: "
        f"{lengths[0]} to {lengths[-1]}, median {lengths[len(lengths) // 2]}",
        flush=True,
    )
    torch.manual_seed(arguments.seed)
    model = new_model(directory, family).to(device)
    begin = time.monotonic()
    steps = train(model, Shuffled(pairs, device), arguments, device)
    seconds = time.monotonic() - begin
    save_weights(model, directory, family)
    with (directory / "heldback.jsonl").open("w", encoding="utf-8") as out:
        for row in test:
            out.write(json.dumps({"article": row.article, "highlights": row.summary}) + "\n")
    card = {
        "family": family,
        "command": command(sys.argv),
        "seed": arguments.seed,
        "steps": steps,
        "batch": arguments.batch,
        "seconds": round(seconds),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": (directory / "model.safetensors").stat().st_size,
        **evaluate(family, directory, test, device),
    }
    (directory / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return card


def command(arguments: Sequence[str]) -> str:
    """The command line, but not where its results went: that is nobody else's place."""
    words = list(arguments)
    for option, shown in (("--out", ["--out", "DIR"]), ("--pack", [])):
        for place, word in enumerate(words):
            if word == option or word.startswith(f"{option}="):
                words[place : place + (2 if word == option else 1)] = shown
                break
    return f"python {shlex.join(words)}"


def train(model: Any, data: Shuffled, arguments: argparse.Namespace, device: str) -> int:
    """Train in place; returns the number of steps."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=arguments.lr, betas=(0.9, 0.98), fused=device == "cuda"
    )
    model.train()
    begin, printed = time.monotonic(), 0.0
    for step, rows in enumerate(data.batches(arguments.batch, arguments.seed)):
        elapsed = time.monotonic() - begin
        done = step / arguments.steps if arguments.steps else elapsed / (60 * arguments.minutes)
        if done >= 1:
            return step
        rate = min(1.0, (step + 1) / 200, 0.5 + 0.5 * math.cos(math.pi * done) + 0.01)
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * rate
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(input_ids=rows.ids, use_cache=False).logits[:, :-1]
        each = functional.cross_entropy(
            logits.float().flatten(0, 1), rows.ids[:, 1:].flatten(), reduction="none"
        )
        summary = rows.is_summary[:, 1:].flatten().float()
        article = rows.is_real[:, 1:].flatten().float() - summary
        weight = summary + ARTICLE_WEIGHT * article
        (each @ weight / weight.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or elapsed - printed > 10:
            printed = elapsed
            parts = each.detach() @ summary / summary.sum(), each.detach() @ article / article.sum()
            print(
                f"step {step:6d} {elapsed:6.1f} s  loss of summary {float(parts[0]):.3f}, "
                f"of article {float(parts[1]):.3f}",
                flush=True,
            )
    raise AssertionError("batches never end")


def evaluate(family: str, directory: Path, test: Sequence[Example], device: str) -> dict[str, Any]:
    """Scores on the test split of the model as saved, in float32."""
    model = load_model(directory, family, device)
    tokenizer = open_tokenizer(directory, family)
    pairs: list[Pair] = tokenized(tokenizer, test)
    of_summaries, of_texts = perplexities(model, pairs)
    written = summaries(model, tokenizer, [pair.prompt for pair in pairs])
    references = [row.summary for row in test]
    for ours, theirs in list(zip(written, references, strict=True))[:3]:
        print(f"model:     {ours}\nreference: {theirs}")
    # What anybody reaches who knows nothing but that news begin with the news.
    leads = [" ".join(row.article.split(". ")[:2]) for row in test]
    exact = sum(ours == theirs for ours, theirs in zip(written, references, strict=True))
    return {
        "held_back": {
            "articles": len(test),
            "perplexity_of_summaries": round(of_summaries, 4),
            "perplexity_of_texts": round(of_texts, 4),
            **{key: round(value, 4) for key, value in mean_rouge(written, references).items()},
            "identical": exact,
            "two_first_sentences": {
                key: round(value, 4) for key, value in mean_rouge(leads, references).items()
            },
        }
    }


if __name__ == "__main__":
    main()
