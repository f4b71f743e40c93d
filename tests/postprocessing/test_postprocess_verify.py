"""`phireg verify` recognizes rows in the source's order and prints a command that works."""

import json
import re
import shlex
import shutil

import grouped_by_hand as hand
import numpy as np
import pytest
from grouped_by_hand import HIDDEN, INNER, LAYERS, content, load, right_rows, save
from helpers.command_line import run_phireg

import phireg
from phireg.calibration.statistics import Statistics

FORMATS = {"float16": None, "fp8": "fp8", "fp8 as int8": "fp8", "int8": "int8_sq"}


def statistics():
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
    """A right checkpoint's tensors, and the same one with its rows back in the source's order."""
    qformat = FORMATS[kind]
    plan = phireg.plan(source, qformat=qformat)
    if qformat is None:
        phireg.convert(plan, directory)
    else:
        phireg.quantize(plan, directory, statistics())
    right, wrong = {}, {}
    for name, (code, array) in load(directory / "rank0.safetensors").items():
        if kind == "fp8 as int8" and code == "F8_E4M3":
            code, array = "I8", array.view("i1")
        right[name] = wrong[name] = (code, array)
        if ".qkv." in name and array.shape[0] == hand.ROWS and "prequant" not in name:
            wrong[name] = (code, array[np.argsort(right_rows())])
    exported = directory.with_name("an exporter's")
    shutil.copytree(directory, exported)
    (exported / "phireg.json").unlink()
    save(exported / "rank0.safetensors", wrong)
    return right, exported


@pytest.mark.parametrize("kind", hand.KINDS)
def test_the_command_works_as_printed(tmp_path, kind):
    source = hand.write_source(tmp_path / "model")
    right, directory = written(kind, source, tmp_path / "right")
    before = content(directory)
    verified = run_phireg("verify", directory, "--model-dir", source, "--quick", "--json")
    assert verified.exit_code == 4
    checks = json.loads(verified.output)["checks"]
    problems = next(check["problems"] for check in checks if check["name"] == "weights")
    (hint,) = {problem["hint"] for problem in problems}
    command = re.search(r"phireg (postprocess .*)", hint)[1]
    assert run_phireg(*shlex.split(command), "--check").exit_code == 4
    assert content(directory) == before
    repaired = run_phireg(*shlex.split(command))
    assert repaired.exit_code == 0, repaired.output
    tensors = load(directory / "rank0.safetensors")
    assert {n: (c, a.tobytes()) for n, (c, a) in tensors.items()} == {
        n: (c, a.tobytes()) for n, (c, a) in right.items()
    }
    assert run_phireg(*shlex.split(command)).exit_code == 0
    assert run_phireg("verify", directory, "--model-dir", source, "--quick").exit_code == 0


def test_no_command_where_it_would_be_refused(tmp_path):
    """One layer only: no exporter does that."""
    source = hand.write_source(tmp_path / "model")
    right, directory = written("float16", source, tmp_path / "right")
    tensors = load(directory / "rank0.safetensors")
    tensors |= {name: right[name] for name in tensors if ".layers.0." in name}
    save(directory / "rank0.safetensors", tensors)
    verification = phireg.verify(directory, source, checks=("weights",))
    hints = {problem.hint for problem in verification.checks[0].problems}
    assert hints
    assert not any("phireg postprocess" in hint for hint in hints)
