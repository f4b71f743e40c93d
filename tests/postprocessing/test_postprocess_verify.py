"""`phireg verify` recognises rows in the source's order and prints a command that works."""

import json
import re
import shlex
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from grouped_by_hand import KINDS, content, load, save

import phireg
from phireg.cli import app

HEADS, KV, SIZE, HIDDEN, INNER, VOCAB, LAYERS = 8, 4, 4, 32, 24, 37, 2
ROWS = (HEADS + 2 * KV) * SIZE
FORMATS = {"float16": None, "fp8": "fp8", "fp8 as int8": "fp8", "int8": "int8_sq"}


def model(directory):
    random = np.random.default_rng(2)
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for norm in ("model.final_layernorm", *(
        f"model.layers.{i}.{n}" for i in range(LAYERS)
        for n in ("input_layernorm", "post_attention_layernorm")
    )):  # fmt: skip
        shapes |= {f"{norm}.weight": (HIDDEN,), f"{norm}.bias": (HIDDEN,)}
    for i in range(LAYERS):
        for name, rows, cols in (
            ("self_attn.query_key_value", ROWS, HIDDEN), ("self_attn.dense", HIDDEN, HIDDEN),
            ("mlp.up_proj", 2 * INNER, HIDDEN), ("mlp.down_proj", HIDDEN, INNER),
        ):  # fmt: skip
            linear = f"model.layers.{i}.{name}"
            shapes |= {f"{linear}.weight": (rows, cols), f"{linear}.bias": (rows,)}
    directory.mkdir()
    tensors = {name: ("F16", random.standard_normal(shape)) for name, shape in shapes.items()}
    save(directory / "model.safetensors", tensors)
    config = {
        "architectures": ["Phi3SmallForCausalLM"], "model_type": "phi3small",
        "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": KV,
        "num_hidden_layers": LAYERS, "ff_intermediate_size": INNER, "vocab_size": VOCAB,
        "max_position_embeddings": 64, "torch_dtype": "float16", "gegelu_pad_to_256": False,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def statistics():
    from phireg.calibration.statistics import Statistics

    random = np.random.default_rng(5)
    columns = {"self_attn.query_key_value": HIDDEN, "self_attn.dense": HIDDEN,
               "mlp.up_proj": HIDDEN, "mlp.down_proj": INNER}  # fmt: skip
    inputs = {
        f"model.layers.{i}.{name}": random.uniform(0.5, 2, count).astype("f4")
        for i in range(LAYERS)
        for name, count in columns.items()
    }
    return Statistics(inputs, (3.0,) * LAYERS, (2.0,) * LAYERS, {})


def written(kind, source, directory):
    """A right checkpoint and the same one with its rows put back into the source's order."""
    qformat = FORMATS[kind]
    plan = phireg.plan(source, qformat=qformat)
    if qformat is None:
        phireg.convert(plan, directory)
    else:
        phireg.quantize(plan, directory, statistics())
    rows = np.arange(ROWS).reshape(KV, HEADS // KV + 2, SIZE)
    order = np.concatenate([rows[:, :-2].ravel(), rows[:, -2].ravel(), rows[:, -1].ravel()])
    tensors = load(directory / "rank0.safetensors")
    right, wrong = {}, {}
    for name, (code, array) in tensors.items():
        if kind == "fp8 as int8" and code == "F8_E4M3":
            code, array = "I8", array.view("i1")
        right[name] = wrong[name] = (code, array)
        if ".qkv." in name and array.shape[0] == ROWS and "prequant" not in name:
            wrong[name] = (code, array[np.argsort(order)])
    other = directory.with_name("an exporter's")
    shutil.copytree(directory, other)
    (other / "phireg.json").unlink()
    save(other / "rank0.safetensors", wrong)
    return right, other


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_works_as_printed(tmp_path, kind):
    source = model(tmp_path / "model")
    right, directory = written(kind, source, tmp_path / "right")

    def phireg(*args):
        return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="phireg")

    before = content(directory)
    told = phireg("verify", directory, "--model-dir", source, "--quick", "--json")
    assert told.exit_code == 4
    check = next(c for c in json.loads(told.output)["checks"] if c["name"] == "weights")
    texts = [problem["text"] for problem in check["problems"]]
    assert texts and all("still grouped by KV head" in text for text in texts), texts
    (hint,) = {problem["hint"] for problem in check["problems"]}
    command = re.search(r"phireg (postprocess .*)", hint)[1]
    assert phireg(*shlex.split(command), "--check").exit_code == 4
    assert content(directory) == before
    done = phireg(*shlex.split(command))
    assert done.exit_code == 0, done.output
    found = load(directory / "rank0.safetensors")
    assert {n: (c, a.tobytes()) for n, (c, a) in found.items()} == {
        n: (c, a.tobytes()) for n, (c, a) in right.items()
    }
    assert phireg(*shlex.split(command), "--check").exit_code == 0
    assert phireg(*shlex.split(command)).exit_code == 2
    assert phireg("verify", directory, "--model-dir", source, "--quick").exit_code == 0


def test_no_command_where_it_would_be_refused(tmp_path):
    """One layer only: no exporter does that."""
    source = model(tmp_path / "model")
    right, directory = written("float16", source, tmp_path / "right")
    tensors = load(directory / "rank0.safetensors")
    tensors |= {name: right[name] for name in tensors if ".layers.0." in name}
    save(directory / "rank0.safetensors", tensors)
    found = phireg.verify(directory, source, checks=("weights",))
    hints = {problem.hint for problem in found.checks[0].problems}
    assert hints == {"all q come first, then all k, then all v; convert or quantize again."}
