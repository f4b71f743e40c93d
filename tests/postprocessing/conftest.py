"""A checkpoint whose rows are in the source's order."""

import grouped_by_hand as hand
import pytest


@pytest.fixture
def grouped(tmp_path):
    return hand.write(tmp_path / "ckpt", **hand.EARLY)
