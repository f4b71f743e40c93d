"""A mistake of reading that plan and checkpoint share is found, and its key or file named.

The plan is made to read a directory otherwise than it is. What follows is sound: the config check
and the comparison of bytes pass, since they ask the plan.
"""

import json
import shutil

import pytest
import torch
from helpers.other_layouts import LAYOUTS, write_other
from helpers.tiny_models import edit_config
from safetensors.torch import load_file, save_file
from verify_sources import source

import phireg
from phireg.planning import build
from phireg.planning import plan as planning
from phireg.planning.ties import Ties
from phireg.source.readings import Readings, open_source

SHARED = ("structure", "config", "weights")


def copy(family, tmp_path):
    return shutil.copytree(source(family), tmp_path / "source")


def edit_rope(directory, **changes):
    rope = json.loads((directory / "config.json").read_text())["rope_parameters"]
    return edit_config(directory, rope_parameters={**rope, **changes})


@pytest.fixture
def misread(monkeypatch):
    """Let the plan see another config.json: ``seen`` are its keys, those of its rope block last."""

    def change(rope=None, **seen):
        read = planning.read_json_object

        def read_wrong(path):
            config = {**read(path), **seen}
            block = {**config.get("rope_parameters", {}), **(rope or {})}
            return config | {"rope_parameters": {k: v for k, v in block.items() if v is not None}}

        monkeypatch.setattr(planning, "read_json_object", read_wrong)

    return change


def verified(directory, family, tmp_path):
    """Convert and verify with the same misreading."""
    phireg.convert(phireg.plan(directory, family=family, dtype="float32"), tmp_path / "checkpoint")
    verification = phireg.verify(tmp_path / "checkpoint", directory, family=family)
    assert {verification.check(name).verdict for name in SHARED} == {"passed"}
    assert verification.verdict == "failed"
    return verification


def problems(verification):
    return "\n".join(map(str, verification.check("reading").problems))


KEYS = {
    "theta": ("phi3-mini", {"rope": {"rope_theta": 10000.0}}, "rope_parameters.rope_theta"),
    "theta of phi-3-small": (
        "phi3-small",
        {"rope_embedding_base": 1e6, "rope": {"rope_theta": None}},
        "rotary_base",
    ),
    "partial rotary": ("phi2", {"rope": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "epsilon": ("phi3-medium", {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
    "epsilon of phi-3-small": ("phi3-small", {"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon"),
    "limit of gegelu": ("phi3-small", {"gegelu_limit": 20.0}, "gegelu_limit"),
    "original length": (
        "phi3-mini",
        {
            "original_max_position_embeddings": 40,
            "rope": {"original_max_position_embeddings": 40},
        },
        "rope_parameters.original_max_position_embeddings",
    ),
    "factors": ("phi3-mini", {"rope": {"long_factor": [1.5] * 6}}, "rope_parameters.long_factor"),
}


@pytest.mark.parametrize(("family", "seen", "named"), KEYS.values(), ids=KEYS)
def test_a_misread_key_is_named(family, seen, named, misread, tmp_path):
    misread(**seen)
    verification = verified(source(family), family, tmp_path)
    assert named in problems(verification)
    assert verification.check("logits").verdict == "failed"


def test_a_factor_that_the_plan_overlooked_is_named(misread, tmp_path):
    directory = edit_rope(copy("phi3-mini", tmp_path), factor=2.0)
    misread(rope={"factor": None})
    text = problems(verified(directory, "phi3-mini", tmp_path))
    assert "the scale of cos and sin" in text and "factor" in text


def test_an_original_length_outside_the_block_is_what_counts(misread, tmp_path):
    """Without that key transformers takes the default of its class, whatever the block says."""
    directory = edit_config(copy("phi3-mini", tmp_path), original_max_position_embeddings="absent")
    misread(original_max_position_embeddings=52)
    text = problems(verified(directory, "phi3-mini", tmp_path))
    assert "original_max_position_embeddings" in text and "4096" in text


def test_long_rope_taken_for_plain_is_named(misread, tmp_path):
    keys = ("type", "short_factor", "long_factor", "original_max_position_embeddings")
    misread(rope={"rope_type": "default", **dict.fromkeys(keys)})
    text = problems(verified(source("phi3-mini"), "phi3-mini", tmp_path))
    assert "rope_parameters.short_factor" in text


def test_a_head_that_was_tied_wrongly_is_named(misread, monkeypatch, tmp_path):
    misread(tie_word_embeddings=True)
    # The plan itself would ask, since the two have other values.
    monkeypatch.setattr(build, "settle_ties", lambda _, __, source, ___: Ties(True, source))
    verification = verified(source("phi3-medium"), "phi3-medium", tmp_path)
    assert "lm_head.weight" in problems(verification)
    assert "tie_word_embeddings" in problems(verification)
    assert (None, "lm_head") in verification.logits.wrong_places


def test_weights_taken_from_the_wrong_file_are_named(monkeypatch, tmp_path):
    directory = copy("phi3-medium", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    save_file(
        {name: tensor + 0.05 for name, tensor in tensors.items()}, directory / "old.safetensors"
    )
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "old.safetensors")}))
    wrong = Readings(weights=index.name)
    monkeypatch.setattr(planning, "open_source", lambda place, *_: open_source(place, None, wrong))
    verification = verified(directory, "phi3-medium", tmp_path)
    assert "model.safetensors: " in problems(verification)
    assert "old.safetensors" in problems(verification)


def test_what_the_user_chose_is_an_input_of_both_sides(tmp_path):
    """The manifest remembers it."""
    directory = copy("phi3-medium", tmp_path)
    stem = "base_model.model.model.layers.1.self_attn.o_proj"
    factors = {
        f"{stem}.lora_A.weight": torch.randn(2, 96),
        f"{stem}.lora_B.weight": torch.randn(96, 2),
    }
    save_file(factors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    for adapter in ("merge", "ignore"):
        plan = phireg.plan(directory, dtype="float32", adapter=adapter)
        phireg.convert(plan, tmp_path / adapter)
        assert phireg.verify(tmp_path / adapter, directory).verdict == "verified"
    swapped = phireg.verify(tmp_path / "merge", directory, adapter="ignore", checks=("logits",))
    assert swapped.verdict == "failed"
    assert swapped.logits.wrong_places == ((1, "attention"),)


CONVERTIBLE = (
    *("separate projections", "a head's q, k and v together"),
    *("phi-2 as first published", "phi-1 as first published"),
)


@pytest.mark.parametrize("layout", CONVERTIBLE)
def test_other_layouts_are_verified_as_a_whole(layout, tmp_path):
    _, directory = write_other(*LAYOUTS[layout], tmp_path)
    phireg.convert(phireg.plan(directory, dtype="float32"), tmp_path / "checkpoint")
    verification = phireg.verify(tmp_path / "checkpoint", directory)
    assert verification.verdict == "verified", texts(verification)


def texts(verification):
    return [(c.name, c.summary, list(map(str, c.problems))) for c in verification.checks]
