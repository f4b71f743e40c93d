"""Whether lm_head is the embedding: the config, the files, and what the user says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.command_line import run_phireg
from helpers.plan_sources import MODELS, write
from safetensors import numpy as safe
from safetensors.torch import load_file, save_file, save_model

import phireg
import phireg.api as ph
from phireg.checkpoint.rankfiles import RankFiles
from phireg.findings import Severity
from phireg.planning.ties import settle_ties
from phireg.source.readings import open_source

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(params=["phi2", "mini", "small"])
def model(request, tmp_path):
    """A function that writes a model of one of the families with changes."""
    _, config, shapes = MODELS[request.param]
    random = np.random.default_rng(0)
    tensors = {name: random.normal(size=shape).astype("f4") for name, shape in shapes.items()}
    tensors.setdefault(HEAD, random.normal(size=shapes[TABLE]).astype("f4"))
    tensors |= (
        {"lm_head.bias": np.ones(len(tensors[HEAD]), "f4")} if request.param == "phi2" else {}
    )

    def make(tie, **changes):
        values = {name: x for name, x in (tensors | changes).items() if x is not None}
        stated = {} if tie is None else {"tie_word_embeddings": tie}
        settings = {key: x for key, x in config.items() if key != "tie_word_embeddings"}
        return write(tmp_path / "model", settings | stated, values), tensors

    return make


def ends(directory, **readings):
    """The embedding and the head that a conversion writes, and the config's word."""
    out = directory.parent / "out"
    plan = phireg.plan(directory, dtype="float32", **readings)
    phireg.convert(plan, out)
    config = json.loads((out / "config.json").read_text())
    shape = config["vocab_size"], config["hidden_size"]
    with RankFiles(out, 1) as files:
        pair = [
            np.frombuffer(files[0].read(f"{name}.weight"), "f4").reshape(shape)
            for name in ("transformer.vocab_embedding", "lm_head")
        ]
    return (*pair, config["tie_word_embeddings"])


def test_a_tied_config_beside_another_head_is_a_question(model):
    directory, tensors = model(True)
    (error,) = phireg.plan(directory).errors
    assert (error.code, error.subject) == ("reading", HEAD)
    assert TABLE in error.detail
    assert all(f"--tie {choice}" in error.detail for choice in ("yes", "no"))
    table, head, tied = ends(directory, tie=False)
    assert (table == tensors[TABLE]).all() and (head == tensors[HEAD]).all() and tied is False


def test_the_user_may_tie_them(model):
    directory, tensors = model(True)
    asked = ("--model-dir", directory, "--tie", "yes")
    out = directory.parent / "checkpoint"
    assert run_phireg("convert", *asked, "--output-dir", out).exit_code == 0
    assert json.loads((out / "phireg.json").read_text())["options"]["readings"]["tie"] is True
    checked = run_phireg("verify", out, "--model-dir", directory, "--quick")
    assert checked.exit_code == 0
    table, head, tied = ends(directory, tie=True)
    assert (table == tensors[TABLE]).all() and (head == table).all() and tied is True


def test_an_equal_copy_is_dropped_with_a_note(model):
    directory, tensors = model(True)
    directory, _ = directory.rename(directory.parent / "old"), None
    directory, _ = model(True, **{HEAD: tensors[TABLE].copy()})
    plan = phireg.plan(directory)
    assert not plan.errors
    assert HEAD in {f.subject for f in plan.findings if f.severity is Severity.NOTE}
    assert ends(directory)[2] is True


def test_a_transposed_view_of_the_same_bytes_is_another_head(tmp_path):
    """In a .bin file both begin at the same byte."""
    table = torch.arange(16.0).view(4, 4)
    torch.save({TABLE: table, HEAD: table.T}, tmp_path / "pytorch_model.bin")
    rules = ph.Rules(
        ph.Table("transformer.vocab_embedding", ph.src(TABLE[:-7], 4), 4),
        ph.Linear("lm_head", ph.src(HEAD[:-7], 4), 4, ph.COLUMN),
    )
    ties = settle_ties(True, None, open_source(tmp_path), rules)
    assert [finding.subject for finding in ties.findings] == [HEAD]


def test_a_pair_saved_under_the_heads_name(model):
    directory, tensors = model(True, **{TABLE: None})
    table, head, tied = ends(directory)
    assert (table == tensors[HEAD]).all() and (head == table).all() and tied is True
    assert phireg.plan(directory).bytes_in == sum(
        x.nbytes for name, x in tensors.items() if name != TABLE
    )


@pytest.mark.parametrize("absent", [HEAD, TABLE])
def test_half_a_pair_that_is_not_tied(model, absent):
    directory, tensors = model(False, **{absent: None})
    plan = phireg.plan(directory)
    assert {(error.code, error.subject) for error in plan.errors} == {("missing", absent)}
    assert any("--tie yes" in f.detail and f.subject == absent for f in plan.findings)
    kept = tensors[TABLE if absent == HEAD else HEAD]
    table, head, tied = ends(directory, tie=True)
    assert (table == kept).all() and (head == kept).all() and tied is True


def test_the_default_of_the_sources_class(model, request):
    directory, _ = model(None)
    tied = "small" in request.node.name
    plan = phireg.plan(directory)
    assert bool(plan.errors) == tied  # a head of its own, against a class that ties
    assert phireg.plan(directory, tie=False).config["tie_word_embeddings"] is False


class Pair(torch.nn.Module):
    """Parameters of a model whose head is its embedding, as safetensors' save_model takes them."""

    def __init__(self, tensors):
        super().__init__()
        for name, value in tensors.items():
            *path, leaf = name.split(".")
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module._modules[part]
            module.register_parameter(leaf, torch.nn.Parameter(torch.from_numpy(value)))
        self.lm_head.weight = self.model.embed_tokens.weight


@pytest.mark.parametrize("tie", [True, False])
def test_names_that_safetensors_metadata_has(model, tie):
    directory, tensors = model(tie)
    save_model(Pair(tensors), str(directory / "model.safetensors"))
    stored = safe.load_file(directory / "model.safetensors")
    assert len({HEAD, TABLE} & set(stored)) == 1
    table, head, tied = ends(directory)
    assert (table == tensors[TABLE]).all() and (head == table).all() and tied is tie


def test_names_in_the_metadata_that_nobody_wants_are_no_tensors(model):
    directory, _ = model(False)
    path = directory / "model.safetensors"
    others = {f"alias{number}": HEAD for number in range(1000)}
    save_file(load_file(path), path, metadata=others)
    plan = phireg.plan(directory)
    assert not plan.errors and not plan.source.tensors.keys() & others.keys()
