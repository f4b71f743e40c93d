"""Converted tiny models, made once."""

import pytest
import torch
from run.tiny import SOURCES, converted

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A function from a family to its source model (float32), source directory and checkpoint."""
    cache = {}

    def make(name, tp_size=1):
        if name not in cache:
            base = tmp_path_factory.mktemp(name)
            model, _ = SOURCES[name](base / "source")
            cache[name] = model, base / "source", {}
        model, source, made = cache[name]
        if tp_size not in made:
            made[tp_size] = converted(source, source.parent / f"tp{tp_size}", tp_size)
        return model, source, made[tp_size]

    return make
