"""The training script: its scores against hand-made values, and a short run of every family."""

import json
import math
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "examples" / "demo_models"
FILES = {"config.json", "generation_config.json", "model.safetensors", "heldback.jsonl"}


@pytest.mark.parametrize(
    ("summary", "reference", "rouge1", "rouge_l"),
    [
        ("The cat sat.", "the cat sat", 1.0, 1.0),
        ("a b c d", "d c b a", 1.0, 0.25),
        ("x b y d e", "b z d", 2 * 2 / 8, 2 * 2 / 8),
        ("340 crowns", "34 crowns", 0.5, 0.5),
        ("", "a", 0.0, 0.0),
    ],
)
def test_rouge(script, summary, reference, rouge1, rouge_l):
    score = script("scoring").rouge(summary, reference)
    assert score == pytest.approx({"rouge1": rouge1, "rougeL": rouge_l})


class Uniform:
    """Gives every token of a vocabulary of 5 the same probability, and token 3 twice that."""

    device = "cpu"

    def __call__(self, input_ids, use_cache):
        class Output:
            logits = torch.zeros(*input_ids.shape, 5)

        Output.logits[..., 3] = math.log(2)
        return Output


def test_perplexity_counts_every_real_token_but_the_first(script):
    pair = script("batches").Pair
    pairs = [pair([0, 1, 2], [3, 3]), pair([1], [2]), pair([3, 3, 3, 3], [4, 0, 3])]
    summaries, texts = script("scoring").perplexities(Uniform(), pairs, batch=2)
    # Of 6: token 3 has 1/3, others 1/6. Summaries: 3 3 | 2 | 4 0 3.
    assert summaries == pytest.approx((3 * 3 * 6 * 6 * 6 * 3) ** (1 / 6))
    # And of the prompts all but their first: 1 2 | nothing | 3 3 3.
    assert texts == pytest.approx((3**3 * 6**3 * 6 * 6 * 3**3) ** (1 / 11))


def test_batches_keep_short_texts_apart(script):
    batches = script("batches")
    short = [batches.Pair([1] * n, [2] * 4) for n in (9, 60)]
    long = [batches.Pair([3] * n, [4] * 5) for n in (60, 90, 100)]
    stream = batches.Shuffled([*short, *long], "cpu").batches(3, seed=0)
    widths = set()
    for _ in range(60):
        rows = next(stream)
        widths.add(rows.ids.shape[1])
        is_long = bool((rows.ids >= 3).any())
        assert is_long == (rows.ids.shape[1] > batches.SHORT)
        assert (rows.is_summary == (rows.ids == (4 if is_long else 2))).all()
        assert (rows.is_real == (rows.ids != 0)).all()
    assert widths == {13, 64, 65, 95, 105}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["phi4"])
def test_a_short_training(tmp_path, script, family):
    """A dozen steps: the loss falls, and the directory is a model that loads and computes."""
    arguments = ["--out", tmp_path, "--families", family, "--steps", 12, "--batch", 4]
    arguments += ["--articles", 2000, "--heldback", 4, "--pack", tmp_path / "all.tar"]
    command = [sys.executable, SCRIPTS / "train.py", *map(str, arguments)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    output = ran.stdout
    directory = tmp_path / family
    card = json.loads((directory / "card.json").read_text())
    assert card["steps"] == 12
    assert " --out DIR " in card["command"] and str(tmp_path) not in card["command"]
    untrained = float(output.split("loss of summary ")[1].split(",")[0])
    assert untrained == pytest.approx(math.log(1021), rel=0.05)
    assert card["held_back"]["perplexity_of_summaries"] < 0.9 * math.exp(untrained)
    assert {path.name for path in directory.iterdir()} >= FILES
    assert (directory / "model.safetensors").stat().st_size < 4_000_000
    with tarfile.open(tmp_path / "all.tar") as tar:
        assert {f"{family}/{name}" for name in FILES} <= set(tar.getnames())
    rows = [json.loads(line) for line in (directory / "heldback.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(set(row) == {"article", "highlights"} for row in rows)

    model = script("families").load_model(directory, family)
    tokenizer = script("vocabulary").open_tokenizer(directory, family)
    for row in rows:
        for text in row.values():
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        ids = tokenizer(row["article"] + " TL;DR: ", return_tensors="pt")["input_ids"]
        assert ids.shape[1] > 64
        assert ids[0, -1] == tokenizer(" ")["input_ids"][-1]
        assert model(input_ids=ids).logits.shape == (*ids.shape, 1021)
