"""Correct checkpoints pass, and what is not covered is said."""

import json
import math
import os
import shutil

import pytest
import torch
from planted import L1, each
from verify_sources import FAMILIES, converted, copied, edit_config, source

import phireg
from phireg.errors import CheckError, SourceError, UsageError
from phireg.executor import Executor, load
from phireg.executor import attention as attend
from phireg.reader.spec import read_spec
from phireg.report.verification import render_verification as render
from phireg.verification.logits import (
    divergences,
    token_errors,
    top1,
)
from phireg.verification.prompts import choose_prompts, prompt_ids
from phireg.verification.ranks import merge
from phireg.verification.result import CHECKS, QUICK


def verdicts(verification):
    return {check.name: check.verdict for check in verification.checks}


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_correct_checkpoint_passes(family, tp_size):
    verification = phireg.verify(converted(family, tp_size), source(family))
    assert verification.passed
    assert verification.family == family
    alone = {"ranks": "not needed"} if tp_size == 1 else {}
    assert verdicts(verification) == {**dict.fromkeys(CHECKS, "passed"), **alone}
    assert verification.verdict == "verified"
    assert verification.logits.wrong_places == ()
    assert all(prompt.top1 == 1 for prompt in verification.logits.prompts)


@pytest.mark.parametrize(("family", "dtype"), [("phi3-mini", "bfloat16"), ("phi2", "float16")])
def test_a_cast_is_compared_with_the_rounded_source(family, dtype):
    verification = phireg.verify(converted(family, 2, dtype), source(family))
    assert verification.passed
    assert "source tensors cast" in verification.check("weights").summary
    assert verification.logits.prompts[-1].relative < 1e-4  # the reference is rounded too


def test_progress_reaches_the_total_of_every_check():
    reports = {}
    verification = phireg.verify(
        converted("phi3-small", 2),
        source("phi3-small"),
        progress=lambda check, more, total: reports.setdefault(check, []).append((more, total)),
    )
    layers = verification.config["num_hidden_layers"]
    logits = 2 * layers * len(verification.logits.prompts)
    totals = {check: total for check, ((_, total), *_) in reports.items()}
    files = converted("phi3-small", 2).glob("rank*.safetensors")
    assert 0 < totals["weights"] <= 2 * sum(file.stat().st_size for file in files)
    assert totals == {"weights": totals["weights"], "logits": logits, "ranks": 2 * layers}
    for check, total in totals.items():
        assert {known for _, known in reports[check]} == {total}
        assert sum(more for more, _ in reports[check]) == total
    assert reports["logits"][0] == (0, logits)  # before the first layer is read


def test_quick_computes_nothing():
    verification = phireg.verify(converted("phi2"), source("phi2"), checks=QUICK)
    assert verdicts(verification) == dict.fromkeys(QUICK, "passed")
    assert verification.logits is None
    assert verification.verdict == "verified in part"
    assert verification.unasked == ("reading", "logits", "ranks")


def test_a_weight_only_checkpoint_is_verified_before_the_builder_quantizes_it(tmp_path):
    plan = phireg.plan(source("phi3-mini"), dtype="float32", qformat="int8_wo")
    phireg.convert(plan, tmp_path / "c")
    verification = phireg.verify(tmp_path / "c", source("phi3-mini"))
    assert verification.passed
    assert "run without W8A16" in "\n".join(verification.check("logits").notes)


def test_stripes_by_local_head_number_show_at_tp_8(monkeypatch):
    """Not a mistake of a checkpoint: an executor that counts a rank's heads from 0."""
    directory = converted("phi3-small", 8)
    checks = ("logits", "ranks")
    assert phireg.verify(directory, source("phi3-small"), checks=checks).passed
    mask = attend.slot_mask
    monkeypatch.setattr(
        attend, "slot_mask", lambda spec, sparse, rank, pads: mask(spec, sparse, 0, pads)
    )
    verification = phireg.verify(directory, source("phi3-small"), checks=checks)
    assert verification.logits.wrong_places == ((0, "attention"), (2, "attention"))
    (problem,) = verification.check("ranks").problems
    assert (problem.layer, problem.part) == (0, "attention")


def test_a_wrong_residual_path_is_not_blamed_on_a_sub_module(monkeypatch):
    from phireg.executor import Executor

    real = Executor.run_layer

    def skipping(self, shards, x, rotary, attends, observe=None, observe_inputs=None):
        after = real(self, shards, x, rotary, attends, observe, observe_inputs)
        return after * 1.01

    monkeypatch.setattr(Executor, "run_layer", skipping)
    verification = phireg.verify(converted("phi2"), source("phi2"), checks=("logits",))
    assert not verification.passed
    assert verification.logits.wrong_places == ()
    assert verification.logits.prompts[0].relative > verification.logits.logits_tolerance


def test_the_merged_ranks_are_the_checkpoint_of_one_rank():
    for family in FAMILIES:
        single = load(converted(family, 1))
        ranks = load(converted(family, 8 if family in ("phi3-small", "phi3-medium") else 4))
        for name in ("transformer.layers.1.attention.qkv.weight", "lm_head.weight"):
            shards = [source_(name) for source_ in ranks._sources]
            assert torch.equal(merge(ranks.spec, name, shards), single._sources[0](name))
        for name in ("attention.dense.weight", "mlp.fc.weight", "mlp.proj.weight"):
            shards = [weights[name] for weights in ranks.layer_weights(1)]
            whole = single.layer_weights(1)[0][name]
            assert torch.equal(merge(ranks.spec, f"{L1}{name}", shards), whole)


def test_tensors_of_another_shape_or_dtype_are_structure(tmp_path):
    directory = copied("phi2", 1, tmp_path / "c")
    each(L1 + "mlp.fc.bias", lambda x: x[:-1])(directory, "phi2")
    each(L1 + "mlp.fc.weight", lambda x: x.half())(directory, "phi2")
    verification = phireg.verify(directory, source("phi2"))
    problems = "\n".join(map(str, verification.check("structure").problems))
    assert "mlp.fc.bias: is [79], the reader expects [80]" in problems
    assert "mlp.fc.weight: is F16, config.json says F32" in problems
    assert verdicts(verification)["weights"] == "failed"
    assert verdicts(verification)["logits"] == "failed"
    assert {(p.layer, p.part) for p in verification.check("logits").problems} == {(1, "mlp")}


def test_what_the_reader_would_refuse_is_structure(tmp_path):
    directory = copied("phi3-medium", 1, tmp_path / "c")
    edit_config(directory, lambda config: config["mapping"].update(stages=2))
    verification = phireg.verify(directory, source("phi3-medium"), checks=QUICK)
    assert "stages" in "\n".join(map(str, verification.check("structure").problems))


@pytest.mark.parametrize("value", [None, "x", [1, "a"], 1e300])
def test_no_value_in_config_json_is_a_defect_of_phireg(value, tmp_path):
    directory = copied("phi3-small", 2, tmp_path / "c")
    whole = json.loads((directory / "config.json").read_text())
    for key in whole:
        if key in ("mapping", "architecture"):
            continue
        (directory / "config.json").write_text(json.dumps({**whole, key: value}))
        verification = phireg.verify(
            directory, source("phi3-small"), checks=("structure", "config"), family="phi3-small"
        )
        render(verification)
        if value not in (None, 0, {}) and value != whole[key]:
            assert not verification.passed, key


def test_blocks_that_are_no_objects_are_problems(tmp_path):
    directory = copied("phi2", 1, tmp_path / "c")
    for key in ("mapping", "quantization", "hidden_act"):
        edit_config(directory, lambda config, key=key: config.update({key: ["x"]}))
        verification = phireg.verify(directory, source("phi2"))
        assert verdicts(verification)["logits"] == "failed"
        shutil.copy(converted("phi2") / "config.json", directory / "config.json")


def test_a_rank_file_too_many_and_one_too_few(tmp_path):
    directory = copied("phi2", 2, tmp_path / "c")
    shutil.copy(directory / "rank0.safetensors", directory / "rank2.safetensors")
    (directory / "rank1.safetensors").unlink()
    verification = phireg.verify(directory, source("phi2"))
    files = [problem.where for problem in verification.check("structure").problems]
    assert files == ["rank1.safetensors", "rank2.safetensors"]
    assert any("rank2.safetensors" in problem for problem in phireg.inspect(directory).problems)
    assert not verification.passed


def test_a_truncated_rank_file_is_one_problem_of_each_check(tmp_path):
    directory = copied("phi2", 2, tmp_path / "c")
    path = directory / "rank0.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    verification = phireg.verify(directory, source("phi2"))
    for check in ("structure", "weights", "logits", "ranks"):
        (problem,) = verification.check(check).problems
        assert problem.where.endswith("rank0.safetensors")
        assert "the file is truncated: 5 bytes are missing" in problem.text


def test_what_may_not_be_read_is_said_once(tmp_path):
    checkpoint = copied("phi2", 1, tmp_path / "c")
    model = shutil.copytree(source("phi2"), tmp_path / "m")
    for path in (checkpoint / "rank0.safetensors", model / "model.safetensors"):
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("root may read everything")
    (problem,) = phireg.inspect(checkpoint, check=True).problems
    assert "Permission denied" in problem
    with pytest.raises(CheckError, match="Permission denied") as caught:
        phireg.inspect(model)
    assert "permissions" in caught.value.hint


def test_who_made_it_is_not_known_without_a_manifest(tmp_path):
    directory = copied("phi2", 1, tmp_path / "c")
    (directory / "phireg.json").unlink()
    verification = phireg.verify(directory, source("phi2"), checks=QUICK)
    assert dict(verification.provenance)["made by"].startswith("not known")


@pytest.mark.parametrize("text", ["[1", "[]", "{}"])
def test_a_damaged_manifest_is_an_error(text, tmp_path):
    directory = copied("phi2", 1, tmp_path / "c")
    (directory / "phireg.json").write_text(text)
    with pytest.raises(SourceError, match=r"phireg\.json"):
        phireg.verify(directory, source("phi2"), checks=QUICK)


def test_keys_of_other_producers_are_notes(tmp_path):
    directory = copied("phi3-mini", 1, tmp_path / "c")

    def change(config):
        config.update(producer={"name": "modelopt"}, logits_dtype="float16")
        for key in ("head_size", "rotary_embedding_dim", "share_embedding_table", "qk_layernorm"):
            del config[key]

    edit_config(directory, change)
    verification = phireg.verify(directory, source("phi3-mini"))
    assert verification.passed
    notes = "\n".join(verification.check("config").notes)
    assert "producer" in notes
    assert "logits_dtype is 'float16'" in notes


def test_a_key_that_switches_something_on_is_a_problem(tmp_path):
    directory = copied("phi3-medium", 1, tmp_path / "c")
    edit_config(directory, lambda config: config.update(mup_width_multiplier=8.0))
    verification = phireg.verify(directory, source("phi3-medium"), checks=("config", "logits"))
    assert "mup_width_multiplier" in str(verification.check("config").problems[0])
    assert verification.logits.wrong_places == ((None, "lm_head"),)


def test_a_checkpoint_of_another_model():
    verification = phireg.verify(converted("phi3-mini"), source("phi3-medium"))
    assert not verification.passed
    problems = map(str, verification.check("logits").problems)
    assert "vocab_size is 103, the source has 105" in "\n".join(problems)


def test_a_checkpoint_of_another_family_has_one_finding():
    verification = phireg.verify(converted("phi3-mini"), source("phi2"), checks=QUICK)
    (problem,) = verification.check("weights").problems
    assert "Phi3ForCausalLM" in problem.text and "PhiForCausalLM" in problem.text
    assert str(source("phi3-mini")) in problem.hint


def test_what_no_class_can_load_is_skipped_and_said(tmp_path, monkeypatch):
    broken = shutil.copytree(source("phi2"), tmp_path / "source")
    directory = converted("phi2")
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", None)
    verification = phireg.verify(directory, broken)
    for check in ("reading", "logits"):
        assert verdicts(verification)[check] == "skipped"
        assert "the reference model cannot be loaded" in verification.check(check).summary
    assert verification.verdict == "incomplete" and not verification.passed
    assert verification.unmade == ("reading", "logits")


def test_a_length_beyond_the_budget_leaves_the_check_incomplete(monkeypatch):
    """Unless the user asked for shorter prompts, which is said."""
    pair = converted("phi3-mini"), source("phi3-mini")
    asked = phireg.verify(*pair, checks=("logits",), max_tokens=50)
    assert asked.check("logits").verdict == "passed" and asked.check("logits").notes
    assert asked.passed and "logits" in asked.unasked
    monkeypatch.setattr("phireg.verification.prompts.CPU_BUDGET", 2e7)
    verification = phireg.verify(*pair, checks=("logits",), device="cpu")
    assert verification.check("logits").verdict == "incomplete"
    assert "57 tokens" in "\n".join(verification.check("logits").undone)
    assert verification.verdict == "incomplete"
    assert "57 tokens" in render(verification)


@pytest.mark.parametrize("family", ["phi2", "phi3-small"])
def test_both_sides_layer_by_layer_where_memory_is_short(family, monkeypatch):
    """A machine with room for two of three layers: the same numbers, and a note."""
    model = FAMILIES[family]()
    layer = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    whole = sum(p.numel() * 4 for p in model.parameters())
    options = {"checks": ("logits", "ranks"), "device": "cpu"}
    pair = converted(family, 2, "bfloat16"), source(family, "bfloat16")
    whole_run = phireg.verify(*pair, **options)
    assert not any("layer by layer" in note for note in whole_run.check("logits").notes)

    executors = []
    init = Executor.__init__

    def watched(self, *args, **kwargs):
        init(self, *args, **kwargs)
        executors.append(self)

    monkeypatch.setattr(Executor, "__init__", watched)
    for module in ("phireg.verification.compute", "phireg.executor.model"):
        monkeypatch.setattr(f"{module}.free_memory", lambda: int((whole - layer) / 0.8))
    verification = phireg.verify(*pair, **options)
    assert executors[0].offload
    assert verdicts(verification) == {"logits": "passed", "ranks": "passed"}
    assert verification.logits == whole_run.logits
    (note,) = [note for note in verification.check("logits").notes if "layer by layer" in note]
    assert "float32" in note

    monkeypatch.setattr("phireg.verification.compute.free_memory", lambda: layer)
    verification = phireg.verify(*pair, **options)
    assert verdicts(verification)["logits"] == "skipped"
    assert "even layer by layer" in verification.check("logits").summary


@pytest.mark.parametrize(
    "options", [{"checks": ("all",)}, {"dtype": "int8"}, {"device": "abacus"}, {"max_tokens": 0}]
)
def test_bad_requests(options):
    with pytest.raises(UsageError) as error:
        phireg.verify(
            converted("phi2"), source("phi2"), progress=lambda *_: pytest.fail("reads"), **options
        )
    assert error.value.hint


# Prompts


def test_lengths_cross_every_threshold():
    spec = read_spec(converted("phi3-small"))
    chosen = choose_prompts(spec, None, gpu=False)
    assert [at for at, _ in chosen.thresholds] == [8, 52]
    assert [prompt.tokens for prompt in chosen.prompts] == [35, 48, 52, 57]
    assert chosen.notes == chosen.undone == ()
    limited = choose_prompts(spec, 40, gpu=False)
    assert [prompt.tokens for prompt in limited.prompts] == [35, 40]
    assert any("57 tokens" in note for note in limited.notes)


def test_published_sizes_get_prompts_within_the_budget():
    from dataclasses import replace

    small = read_spec(converted("phi3-small"))
    published = replace(
        small, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
        num_kv_heads=8, head_size=128, vocab_size=100352, max_position_embeddings=131072,
        rope=replace(small.rope, original=8192),
        sparse=replace(small.sparse, block_size=64, num_local_blocks=16, vertical_stride=8),
    )  # fmt: skip
    on_cpu = choose_prompts(published, None, gpu=False)
    # 7.4e9 weights, four passes: 2e13 / 2.96e10 is some 680 tokens.
    assert 600 < on_cpu.prompts[-1].tokens < 760
    assert "2e+13" in on_cpu.undone[0]
    on_gpu = choose_prompts(published, None, gpu=True)
    assert [p.tokens for p in on_gpu.prompts] == [48, 1603, 8192, 8197]
    assert on_gpu.undone == ()


def test_a_prompt_uses_every_id_before_one_again():
    ids = prompt_ids(11, 25)[0].tolist()
    assert sorted(ids[:11]) == list(range(11)) == sorted(ids[11:22])
    assert prompt_ids(11, 25)[0].tolist() == ids


# Measures, against values worked out by hand


def test_token_errors():
    expected = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    actual = torch.tensor([[3.0, 4.5], [0.0, 5.0]])
    assert token_errors(actual, expected).tolist() == pytest.approx([0.1, 0.0])
    actual[1, 0] = math.nan
    assert token_errors(actual, expected)[1] == math.inf


def test_divergence_of_two_coins():
    expected = torch.log(torch.tensor([[0.5, 0.5]]))
    actual = torch.log(torch.tensor([[0.25, 0.75]]))
    assert float(divergences(actual, expected).mean()) == pytest.approx(
        0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    )


def test_top1_excuses_only_near_ties():
    expected = torch.tensor([[1.0, 0.99], [1.0, 0.0], [0.0, 1.0]])
    actual = torch.tensor([[0.98, 1.0], [0.0, 1.0], [0.0, 1.0]])
    share, wrong = top1(actual, expected, 0.01)
    assert share == pytest.approx(2 / 3)
    assert wrong == 1
