"""Files of bounded size."""

import json

import pytest
from click.testing import CliRunner
from helpers import tiny_models
from transformers import AutoModelForCausalLM

import phireg
from phireg.cli import app
from phireg.errors import CheckError
from phireg.planning import shards
from phireg.verification.result import QUICK


def test_transformers_reads_the_shards(tmp_path):
    tiny_models.write("phi3-gqa", tmp_path / "model")
    plan = phireg.plan(tmp_path / "model", target="hf", max_shard_size=60_000)
    phireg.convert(plan, tmp_path / "out")
    assert len(plan.files) > 2
    bound = 60_000 + max(map(len, plan.headers))
    large = max(output.nbytes for output in plan.outputs)
    assert max(plan.file_sizes) <= max(bound, large + max(map(len, plan.headers)))
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("model", "out")]
    weights = [dict(model.named_parameters()) for model in models]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_more_files_than_a_process_may_open_are_refused(tmp_path, monkeypatch):
    tiny_models.write("phi3-gqa", tmp_path)
    monkeypatch.setattr("phireg.planning.build.MOST_FILES", 5)
    plan = phireg.plan(tmp_path, target="hf", max_shard_size=1)
    assert {finding.subject for finding in plan.errors} == {"--max-shard-size"}
    assert plan.files == plan.outputs == ()
    assert shards.MOST_FILES < 1000


@pytest.mark.parametrize(
    ("size", "name"), [("60KB", "model.safetensors"), ("5GB", "old.safetensors")]
)
def test_files_that_some_readers_would_take_are_found(size, name, tmp_path):
    """transformers prefers model.safetensors to an index; without one, vLLM reads every file."""
    directory = tiny_models.write("phi3-gqa", tmp_path / "model", shard=size)
    shard = next(directory.glob("model*.safetensors"))
    (directory / name).write_bytes(shard.read_bytes())
    assert [p.partition(": ")[0] for p in phireg.inspect(directory).problems] == [name]
    result = phireg.verify(directory, directory, checks=QUICK)
    assert [p.where for p in result.check("structure").problems] == [name]


def test_inspect_tells_what_is_left_beside_a_damaged_shard(tmp_path):
    directory = tiny_models.write("phi3-gqa", tmp_path / "model", shard="60KB")
    first, *others = sorted(path.name for path in directory.glob("model-*.safetensors"))
    with (directory / first).open("r+b") as file:
        file.truncate(500)
    ran = CliRunner().invoke(app, ["inspect", str(directory), "--json"])
    document = json.loads(ran.stdout)
    (problem,) = document["problems"]
    assert ran.exit_code == CheckError.exit_code
    assert first in problem
    assert document["config"]["model_type"] == "phi3"
    assert not document["shards"].pop(first)
    assert set(document["shards"]) == set(others)
    assert all(document["shards"].values())
    assert first in CliRunner().invoke(app, ["inspect", str(directory)]).stdout


def test_a_damaged_file_is_no_other_models(tmp_path):
    directory = tiny_models.write("phi3-gqa", tmp_path / "model")
    with (directory / "model.safetensors").open("r+b") as file:
        file.truncate(500)
    (problem,) = phireg.inspect(directory).problems
    assert "not a valid safetensors file" in problem


def test_files_of_ranks_have_no_bound(tmp_path):
    tiny_models.write("phi3-gqa", tmp_path)
    with pytest.raises(phireg.errors.UsageError):
        phireg.plan(tmp_path, max_shard_size=60_000)
