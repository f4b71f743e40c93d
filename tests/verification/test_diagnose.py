"""What single differences look like; whole mistakes are planted in checkpoints elsewhere."""

import numpy as np
import pytest

from phireg.verification.diagnose import diagnose
from phireg.verification.patterns import Heads

MODEL = Heads(4, 2, 3, "swiglu")
NAME = "transformer.layers.0.mlp.proj.weight"


def bits(values):
    return np.asarray(values, np.float32).view(np.uint32)


@pytest.fixture
def weight():
    return np.random.default_rng(3).standard_normal((6, 8)).astype(np.float32)


def looks(expected, found, name=NAME, dtype="F32"):
    return diagnose(name, dtype, [bits(e) for e in expected], [bits(f) for f in found], MODEL).text


def test_one_element(weight):
    wrong = weight.copy()
    wrong[4, 2] += 1
    text = looks([weight], [wrong])
    assert text.startswith(
        "1 of 48 elements differ, largest difference 1; first at row 4, column 2"
    )


def test_a_sign_of_zero_is_a_difference():
    text = looks([np.array([[0.0, 1.0], [2.0, 5.0]])], [np.array([[-0.0, 1.0], [2.0, 5.0]])])
    assert "1 of 4 elements differ" in text


def test_rows_in_reverse(weight):
    assert "reverse order" in looks([weight], [weight[::-1].copy()])


def test_columns_exchanged(weight):
    wrong = weight.copy()
    wrong[:, [1, 6]] = weight[:, [6, 1]]
    assert looks([weight], [wrong]) == "column 1 and column 6 are exchanged"


def test_through_bfloat16(weight):
    narrow = ((bits(weight) + 0x8000) & 0xFFFF0000).view(np.float32)
    assert "went through BF16" in looks([weight], [narrow])


def test_not_finite(weight):
    wrong = weight.copy()
    wrong[0, :3] = np.nan
    assert looks([weight], [wrong]) == "3 values are not finite"


def test_the_wrong_sign(weight):
    assert looks([weight], [-weight]) == "it is scaled by -1"


def test_de_interleaved_twice():
    rows = np.arange(8 * 3 * 2, dtype=np.float32).reshape(24, 2)  # 4 q, 2 k, 2 v heads of 3 rows
    heads = rows.reshape(8, 3, 2)
    # Read as two groups [q, q, k, v]: heads 0, 1, 4, 5 are q, then 2, 6 are k, then 3, 7 are v.
    twice = heads[[0, 1, 4, 5, 2, 6, 3, 7]].reshape(24, 2)
    name = "transformer.layers.0.attention.qkv.weight"
    assert looks([rows], [twice], name) == "the rows are de-interleaved twice"


def test_heads_are_named_by_the_whole_model():
    rows = np.arange(2 * 12 * 2, dtype=np.float32).reshape(2, 12, 2)  # per rank: q q k v
    wrong = rows.copy()
    wrong[1, 3:6], wrong[1, 0:3] = rows[1, 0:3], rows[1, 3:6]
    name = "transformer.layers.0.attention.qkv.weight"
    text = looks(list(rows), list(wrong), name)
    assert text == "query head 2 and query head 3 are exchanged"


def test_a_repeated_row(weight):
    wrong = weight.copy()
    wrong[2] = weight[5]
    assert "row 2 holds row 5" in looks([weight], [wrong])
    assert "some twice" in looks([weight], [wrong])
