"""Files of bounded size."""

from helpers import tiny_models
from transformers import AutoModelForCausalLM

import phireg
from phireg.planning import shards


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
