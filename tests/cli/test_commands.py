"""Options, exit codes, text and JSON of the commands of conversion and of plugins."""

import json
import os
import sys

import numpy as np
import pytest
from helpers.damage import config, tensors
from helpers.tiny_phi3 import HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, VOCAB, tiny_tensors
from safetensors.numpy import load_file

from phireg.cli import options
from phireg.reader.schemes import KV_CACHES, SCHEMES

Q, KV = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM


def document(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


@pytest.fixture
def ckpt(tiny, run):
    out = tiny.parent / "out"
    result = run("convert", "--model-dir", tiny, "--output-dir", out, "--tp-size", 2, "--quiet")
    assert result.exit_code == 0
    assert result.output == ""
    return out


def test_a_prompt_is_proposed_where_there_is_a_tokenizer(tiny, run):
    command = ("convert", "--model-dir", tiny, "--output-dir", tiny.parent / "out")
    proposed = run(*command).output
    assert "phireg verify" in proposed and "phireg run" not in proposed
    (tiny / "tokenizer.json").write_text("{}")
    assert "phireg run" in run(*command, "--overwrite").output


# Options


def test_choices_are_those_of_the_reader():
    assert set(SCHEMES) <= set(options.QFORMAT_CHOICES)
    assert tuple(KV_CACHES) == options.KV_CACHE_CHOICES


def test_underscores_and_hyphens(tiny, run):
    values = {"model-dir": tiny, "tp-size": "2", "kv-cache-dtype": "int8"}
    hyphens = [word for name, value in values.items() for word in (f"--{name}", value)]
    underscores = [f"--{name.replace('-', '_')}={value}" for name, value in values.items()]
    plans = [
        document(run("plan", *words, "--json"))
        for words in ([*hyphens, "--qformat=int4-wo"], [*underscores, "--qformat=int4_wo"])
    ]
    assert plans[0] == plans[1]
    assert plans[0]["config"]["quantization"]["quant_algo"] == "W4A16"
    assert plans[0]["tp_size"] == 2
    quantized = [
        document(run("plan", "--model-dir", tiny, "--qformat", name, "--json"))
        for name in ("int8_sq", "int8-sq")
    ]
    assert quantized[0] == quantized[1]


@pytest.mark.parametrize(
    ("args", "code", "named"),
    [
        (["--weight-only-precision", "int4"], 2, "--use-weight-only"),
        (["--pp-size", "2"], 2, "--tp-size"),
        (["--tp-size", "0"], 2, "0"),
        (["--tp-size", "3"], 3, "transformer.layers.{0..1}.attention.qkv"),
        (["--dtype", "float8"], 2, "--dtype"),
        (["--use-weight-only", "--weight-only-precision", "int2"], 2, "--weight-only-precision"),
        (["--revision", "main"], 2, "revision"),
        (["--qformat", "fp8"], 2, "--qformat"),
        (["--family", "phi3-small"], 3, "Phi3SmallForCausalLM"),
        (["--family", "phi3-mimi"], 5, "'phi3-mini'"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, list) else "",
)
def test_wrong_options(args, code, named, tiny, run):
    result = run("convert", "--model-dir", tiny, "--output-dir", tiny.parent / "out", *args)
    assert result.exit_code == code
    assert named in result.output
    assert [path.name for path in tiny.parent.iterdir()] == ["model"]


def test_version(spawn):
    done = spawn("--version")
    assert (done.returncode, done.stdout) == (0, "phireg 0.1.0\n")


# What is refused


def test_a_hub_repository_without_network(tmp_path, spawn):
    done = spawn(
        *("convert", "--model-dir", "microsoft/Phi-3-mini-4k-instruct"),
        *("--output-dir", tmp_path / "out"),
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
    )
    assert done.returncode == 3
    assert done.stdout == ""
    first, *hint = done.stderr.splitlines()
    assert first.startswith("error: microsoft/Phi-3-mini-4k-instruct")
    assert hint


def test_an_existing_output(ckpt, tiny, run):
    before = {path.name: path.read_bytes() for path in ckpt.iterdir()}
    again = ("convert", "--model-dir", tiny, "--output-dir", ckpt)
    result = run(*again)
    assert result.exit_code == 6
    assert "--overwrite" in result.output
    assert {path.name: path.read_bytes() for path in ckpt.iterdir()} == before
    assert run(*again, "--overwrite").exit_code == 0
    assert not (ckpt / "rank1.safetensors").exists()
    (ckpt / "notes.txt").write_text("mine")
    result = run(*again, "--overwrite")
    assert result.exit_code == 6
    assert "notes.txt" in result.output
    assert (ckpt / "notes.txt").exists()


def test_names_cannot_command_the_terminal(tiny, run):
    evil = "model.\x1b]0;owned\x07\x9b2J\u202eweight"
    tensors(lambda held: held.update({evil: np.ones((2, 2), "f2")}))(tiny)
    for command in (["plan"], ["convert", "--output-dir", tiny.parent / "out"]):
        result = run(*command, "--model-dir", tiny)
        assert result.exit_code == 3
        assert "\\x1b]0;owned\\x07\\x9b2J\\u202eweight" in result.output
        assert not set(result.output) & set("\x1b\x07\x9b\u202e")


def test_a_defect_is_one_line_and_says_how_to_report_it(tiny, run, monkeypatch):
    import phireg

    monkeypatch.setattr(phireg, "plan", lambda *args, **options: 1 / 0)
    monkeypatch.delenv("PHIREG_DEBUG", raising=False)
    result = run("plan", "--model-dir", tiny)
    assert result.exit_code == 1
    assert result.output.startswith("internal error: ZeroDivisionError: division by zero\n")
    assert "PHIREG_DEBUG=1" in result.output
    assert "Traceback" not in result.output
    monkeypatch.setenv("PHIREG_DEBUG", "1")
    assert "Traceback" in run("plan", "--model-dir", tiny).output


# plan and convert


def test_plan_with_problems_is_on_stdout_and_ends_with_3(tiny, spawn):
    config(num_hidden_layers=3)(tiny)
    done = spawn("plan", "--model-dir", tiny)
    assert done.returncode == 3
    assert done.stderr == ""
    (line,) = [line for line in done.stdout.splitlines() if "model.layers.2.mlp.down_proj" in line]
    assert line.split()[0] == "missing"
    assert "phi3_mini/weights.py:" in line
    done = spawn("plan", "--model-dir", tiny, "--json")
    assert done.returncode == 3
    assert done.stderr == ""
    assert {f["code"] for f in json.loads(done.stdout)["findings"]} >= {"missing"}


def test_plan_json_says_where_every_byte_goes(tiny, run):
    plan = document(run("plan", "--model-dir", tiny, "--tp-size", "2", "--json"))
    assert plan["provided_by"] == {"distribution": "phireg", "version": "0.1.0", "api": 1}
    assert list(tiny.parent.iterdir()) == [tiny]
    out = tiny.parent / "out"
    report = document(
        run("convert", "--model-dir", tiny, "--output-dir", out, "--tp-size", 2, "--json")
    )
    assert report["files"] == {path.name: path.stat().st_size for path in out.iterdir()}
    assert report["losses"] == {}
    assert plan["config"] == json.loads((out / "config.json").read_text())
    assert plan["bytes_out"] == sum(f.stat().st_size for f in out.glob("rank*"))
    assert len(plan["outputs"]) == 30
    for output in plan["outputs"]:
        shape = output["shape"]
        held = (out / output["file"]).read_bytes()[output["offset"] :][: output["bytes"]]
        target = np.frombuffer(held, "f2").reshape(shape)
        for entry in output["rows"]:
            begin, end = entry["rows"]
            expected = np.zeros((end - begin, *shape[1:]), "f2")
            if source := entry["from"]:
                first, last = source["bytes"]
                raw = (tiny / source["file"]).read_bytes()[first:last]
                rows = np.frombuffer(raw, "f2").reshape(end - begin, -1)
                if source["columns"]:
                    rows = np.concatenate([rows[:, a:b] for a, b in source["columns"]], axis=1)
                expected = rows.reshape(end - begin, *shape[1:])
            assert np.array_equal(target[begin:end], expected), output["tensor"]


def test_values_that_overflow_are_refused_unless_allowed(tiny, run):
    import torch
    from safetensors.torch import save_file

    for path in tiny.glob("model*"):
        path.unlink()
    held = {n: torch.from_numpy(t).to(torch.bfloat16) for n, t in tiny_tensors().items()}
    held["model.layers.1.mlp.down_proj.weight"][0, :3] = 1e9
    held["model.layers.0.mlp.down_proj.weight"][0, :2] = 1e9
    save_file(held, tiny / "model.safetensors", {"format": "pt"})
    config(torch_dtype="bfloat16")(tiny)
    out = tiny.parent / "out"
    args = ("convert", "--model-dir", tiny, "--output-dir", out, "--dtype", "float16")
    result = run(*args)
    assert result.exit_code == 3
    assert "model.layers.{0..1}.mlp.down_proj.weight: 5 " in result.output
    assert "--allow-overflow" in result.output
    assert [path.name for path in tiny.parent.iterdir()] == ["model"]
    result = run(*args, "--allow-overflow")
    assert result.exit_code == 0
    assert "overflowed  5 values in 2 tensors" in result.output
    proj = load_file(out / "rank0.safetensors")["transformer.layers.1.mlp.proj.weight"]
    assert np.isinf(proj).sum() == 3


# explain


def test_explain_columns_and_padding(tiny, run):
    text = run("explain", tiny, "transformer.layers.0.mlp.proj", "--tp-size", 2).output
    half = INTERMEDIATE // 2
    assert f"columns 0:{half}" in text
    assert f"columns {half}:{INTERMEDIATE}" in text
    args = ("explain", tiny, "lm_head.weight", "--tp-size", 2, "--json")
    outputs = document(run(*args))["outputs"]
    assert [output["file"] for output in outputs] == ["rank0.safetensors", "rank1.safetensors"]
    rows = outputs[1]["rows"]
    assert rows[0]["from"]["rows"] == [VOCAB // 2 + 1, VOCAB]
    assert rows[1] == {"rows": [VOCAB // 2, VOCAB // 2 + 1], "from": None}
    assert len(document(run(*args, "--rank", 0))["outputs"]) == 1


@pytest.mark.parametrize(
    ("args", "code", "named"),
    [
        ([], 2, "1 name"),
        (["transformer.layers.7.mlp.fc"], 2, "transformer.layers.1.mlp.fc"),
        (["lm_head", "--rank", "1"], 2, "rank 1"),
        (["lm_head", "--tp-size", "3"], 3, "1, 2, 4"),
    ],
)
def test_explain_refuses(args, code, named, tiny, run):
    result = run("explain", tiny, *args)
    assert result.exit_code == code
    assert named in result.output


# inspect


def test_inspect(ckpt, tiny, run):
    text = run("inspect", ckpt).output
    for word in ("Phi3ForCausalLM", "phi3-medium", str(tiny), "rank{0..1}.safetensors"):
        assert word in text
    words = [line.split() for line in text.splitlines()]
    qkv = "transformer.layers.{0..1}.attention.qkv.weight"
    assert [qkv, f"[{(Q + 2 * KV) // 2},", f"{HIDDEN}]", "x", "2"] in words
    report = document(run("inspect", ckpt, "--check", "--json"))
    assert report["problems"] == []
    assert report["checked"] is True
    assert report["manifest"]["options"]["tp_size"] == 2
    assert report["files"]["rank0.safetensors"] == (ckpt / "rank0.safetensors").stat().st_size
    assert report["ranks"][1]["lm_head.weight"] == {"dtype": "F16", "shape": [19, 32]}


def flip_last_byte(path):
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize(
    ("spoil", "file"),
    [
        (lambda c: flip_last_byte(c / "rank1.safetensors"), "rank1.safetensors"),
        (lambda c: (c / "config.json").open("a").write(" "), "config.json"),
        (lambda c: os.truncate(c / "rank0.safetensors", 5000), "rank0.safetensors"),
        (lambda c: (c / "rank1.safetensors").unlink(), "rank1.safetensors"),
        (lambda c: (c / "rank2.safetensors").write_bytes(b""), "rank2.safetensors"),
    ],
    ids=["value", "config", "truncated", "missing", "extra"],
)
def test_inspect_check_finds_what_differs(spoil, file, ckpt, run):
    assert run("inspect", ckpt, "--check").exit_code == 0
    spoil(ckpt)
    result = run("inspect", ckpt, "--check", "--json")
    assert result.exit_code == 4
    problems = json.loads(result.output)["problems"]
    assert sum(file in problem for problem in problems) == 1, problems
    lines = run("inspect", ckpt, "--check").output.splitlines()
    assert f"{len(problems)} problem" in lines[1]
    assert sum(file in line for line in lines[-len(problems) :]) == 1, lines


def test_inspect_without_a_manifest(ckpt, run):
    (ckpt / "phireg.json").unlink()
    result = run("inspect", ckpt)
    assert result.exit_code == 0
    assert "phireg.json" in result.output
    assert run("inspect", ckpt, "--check").exit_code == 3


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"model_type": "phi3"}, "no model.safetensors"),
        ({"pretrained_config": {}, "build_config": {}}, "engine"),
        ({}, "a TensorRT-LLM checkpoint or a Hugging Face model"),
    ],
)
def test_inspect_what_is_no_checkpoint(content, named, tmp_path, run):
    (tmp_path / "config.json").write_text(json.dumps(content))
    result = run("inspect", tmp_path)
    assert result.exit_code == 3
    assert named in " ".join(result.stderr.split())


# families and plugins


def test_families(run):
    families = document(run("families", "--json"))["families"]
    sizes = {m["repo_id"]: m["tp_sizes"] for family in families for m in family["published"]}
    assert (len(families), len(sizes)) == (8, 14)
    assert sizes["microsoft/phi-2"][:3] == [1, 2, 4]
    assert 8 not in sizes["microsoft/Phi-3-medium-4k-instruct"]  # 40 heads, 10 of them KV heads
    assert sizes["microsoft/phi-4"] == [1, 2, 5, 10, 20, 40]
    assert sizes["microsoft/Phi-4-mini-reasoning"] == [1, 2, 4, 8]  # 24 heads
    for family in families:
        assert family["distribution"] == "phireg"
        assert family["dtypes"] == ["float16", "bfloat16", "float32"]
        formats = ["fp8", "int8_sq", "int8_wo", "int4_wo", "int4_awq", "w4a8_awq", "nvfp4"]
        assert family["quantization"] == formats[: 1 if family["name"] == "phi3.5-moe" else None]
    text = run("families").output
    assert all(model in text for model in sizes)


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    """Another distribution: one family that works, one that does not, one name taken."""
    site = tmp_path / "site"
    info = site / "acme_phi-0.3.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-phi\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text(
        "[phireg.families]\nacme = acme_phi:GOOD\nacme-broken = acme_broken:FAMILY\n"
        "phi2 = acme_phi:PHI2\n"
    )
    (site / "acme_phi.py").write_text(
        "from phireg_plugins.phi2 import FAMILY\n"
        "GOOD = FAMILY.derive('acme', FAMILY.steps[0])\nPHI2 = FAMILY\n"
    )
    (site / "acme_broken.py").write_text("raise ModuleNotFoundError('no einops')\n")
    monkeypatch.syspath_prepend(str(site))
    yield
    sys.modules.pop("acme_phi", None)  # other tests have another one


def test_a_broken_plugin_is_shown_and_others_work(third_party, tiny, run):
    result = run("families")
    assert result.exit_code == 0
    assert "acme-broken  (acme-phi 0.3)" in result.output
    assert "no einops" in result.output
    assert "microsoft/Phi-3-small-8k-instruct" in result.output
    broken = [f for f in document(run("families", "--json"))["families"] if f["problem"]]
    assert [family["name"] for family in broken] == ["acme-broken"]
    result = run("plan", "--model-dir", tiny)
    assert result.exit_code == 0
    assert "no einops" in result.output
    assert run("plan", "--model-dir", tiny, "--family", "acme-broken").exit_code == 5


def test_check_of_families(third_party, run):
    plugins = document(run("families", "--json"))["families"]
    values = {(p["distribution"], p["name"]): p["value"] for p in plugins}
    assert values["acme-phi", "acme"] == "acme_phi:GOOD"
    result = run("families", "--check", "--json")
    assert result.exit_code == 5
    checked = {(p["distribution"], p["name"]): p for p in json.loads(result.output)["families"]}
    assert checked["acme-phi", "acme"]["api"] == 1
    assert "no einops" in checked["acme-phi", "acme-broken"]["problem"]
    assert "--family acme-phi:phi2" in run("families", "--check").output
