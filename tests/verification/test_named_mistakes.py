"""Mistakes with rows and values of single tensors; whole ones are planted in checkpoints."""

import numpy as np
import pytest

from phireg.verification.mistakes import Heads, mistake_in_values, named_mistake

HEADS = Heads(4, 2, 3, "swiglu")


@pytest.fixture
def weight():
    return np.random.default_rng(3).standard_normal((6, 8)).astype(np.float32)


def named(module, expected, stored):
    mistake = named_mistake(module, expected, stored, HEADS, np.array_equal)
    return mistake and mistake.text


def in_values(expected, stored, ranks=1):
    mistake = mistake_in_values(stored.ravel(), expected.ravel(), "F32", ranks)
    return mistake and mistake.text


def test_values(weight):
    wrong = weight.copy()
    wrong[4, 2] += 1
    assert named("mlp.proj", [weight], [wrong]) is None
    assert in_values(weight, wrong) is None
    wrong[0, :3] = np.nan
    assert in_values(weight, wrong) == "3 values are not finite"
    assert in_values(weight, -weight) == "it is scaled by -1"
    assert "divided by the number of ranks" in in_values(weight, weight / 4, ranks=4)
    assert in_values(weight, weight / 4, ranks=3) == "it is scaled by 0.25"


def test_a_repeated_part_of_a_rank(weight):
    left, right = weight[:, :4], weight[:, 4:]
    repeated = named("mlp.proj", [left, right], [left, left])
    assert repeated == "a rank's part is repeated: rank 1 holds rank 0's"


def test_grouped_rows_name_the_heads_of_a_group():
    q, k, v = (np.arange(n * 6).reshape(n * 3, 2) + 100 * n for n in (4, 2, 2))
    expected = np.concatenate([q, k + 50, v + 70])
    k, v = expected[12:18], expected[18:]
    stored = np.concatenate([q[:6], k[:3], v[:3], q[6:], k[3:], v[3:]])
    text = named("transformer.layers.0.attention.qkv", [expected], [stored])
    assert "grouped by KV head (2 q, 1 k, 1 v" in text
