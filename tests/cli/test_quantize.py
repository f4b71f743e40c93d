"""``phireg quantize`` as a command: output, statistics, refusals, interruptions."""

import json
import os
import shlex
import shutil
import time

import numpy as np
import pytest
from helpers.tiny_phi3 import tiny_config, write_json
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from phireg import demo
from phireg.calibration import calibrate as calibrating
from phireg.conversion import quantize as exporting
from phireg.errors import OutputError
from phireg.quality import run as measuring


@pytest.fixture
def ids(tmp_path):
    """Twelve rows for the tiny model, whose vocabulary has 37 tokens."""
    path = tmp_path / "ids.jsonl"
    rows = [[(n * m) % 37 for m in range(3, 23)] for n in range(1, 13)]
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


@pytest.fixture
def quantize(run, tiny, ids, tmp_path):
    """Quantize the tiny model to ``out``; ``qformat=None`` and the like leave an option out."""

    def go(*more, qformat="fp8", calib_size=8, model=tiny, calib_file=ids):
        args = ["quantize", "--model-dir", model, "--output-dir", tmp_path / "out"]
        for name, value in (
            ("--qformat", qformat), ("--calib-size", calib_size), ("--calib-file", calib_file),
        ):  # fmt: skip
            args += [] if value is None else [name, value]
        return run(*args, "--device", "cpu", *more)

    return go


@pytest.fixture
def uncalibrated(monkeypatch):
    """A calibration is a failure."""

    def collect(*_, **__):
        raise AssertionError("it calibrates")

    monkeypatch.setattr(calibrating, "collect", collect)
    monkeypatch.setattr(calibrating, "measure", collect)


def stats(tmp_path, name="out.calib.safetensors"):
    return tmp_path / name


def document(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# --- what is made -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("qformat", "cache"),
    [("fp8", None), ("fp8", "int8"), ("int8_sq", "fp8"), ("int8_wo", None), ("int4_wo", "fp8")],
)
def test_every_format(quantize, tmp_path, qformat, cache):
    more = () if cache is None else ("--kv_cache_dtype", cache)
    summary = document(quantize("--json", "--tp_size", 2, *more, qformat=qformat))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    algorithms = {
        "fp8": "FP8", "int8_sq": "W8A8_SQ_PER_CHANNEL", "int8_wo": "W8A16", "int4_wo": "W4A16",
    }  # fmt: skip
    assert config["quantization"]["quant_algo"] == algorithms[qformat]
    assert config["quantization"]["kv_cache_quant_algo"] == (cache and cache.upper())
    assert (summary["qformat"], summary["kv_cache_dtype"]) == (qformat, cache)
    assert summary["tp_size"] == 2
    assert summary["alpha"] == (1.0 if qformat == "int8_sq" else None)
    calibrated = qformat in ("fp8", "int8_sq") or cache is not None
    assert stats(tmp_path).exists() == calibrated == (summary["calibration"] is not None)
    quality = summary["quality"]
    layers = config["num_hidden_layers"]
    assert (len(quality["linears"]), len(quality["hidden"])) == (4 * layers, layers)
    assert all(error > 0 for error in quality["hidden"])
    inputs = qformat in ("fp8", "int8_sq")
    assert all((linear["activation_error"] is not None) == inputs for linear in quality["linears"])
    assert (quality["calibrated_on"], quality["rows"]) == (False, 4 if calibrated else 12)


@pytest.mark.parametrize(("qformat", "builds"), [("int4_wo", True), ("nvfp4", False)])
def test_the_steps_proposed_next_are_possible(run, tmp_path, monkeypatch, qformat, builds):
    """TensorRT-LLM alone builds engines of four-bit groups, and it is not here."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'phireg[rtx]'")
    monkeypatch.setenv("PATH", "/usr/bin")
    options = ("--model-dir", demo.find("phi3-mini").directory, "--output-dir", tmp_path / "out")
    more = ("--calib-dataset", "builtin", "--calib-size", 1, "--no-measure", "--device", "cpu")
    result = run("quantize", *options, "--qformat", qformat, *more)
    steps = [shlex.split(x) for x in result.stdout.partition("\nnext\n")[2].splitlines()]
    assert [words[1] for words in steps] == ["verify", "run", *(["build"] if builds else [])]
    assert all(run(*words[1:]).exit_code == 0 for words in steps if words[1] != "build")
    build = run("build", tmp_path / "out", "--output-dir", tmp_path / "engine", "--print-command")
    assert build.exit_code == (0 if builds else 7)


def test_a_demo_model_with_its_tokenizer_and_a_page(run, tmp_path, monkeypatch):
    """Of phi-2: its 8-bit cache is warned about until it is measured."""
    model = demo.find("phi2").directory
    options = (
        "quantize", "--model_dir", model, "--output_dir", tmp_path / "out", "--qformat", "int8_sq",
        "--dtype", "bfloat16", "--kv_cache_dtype", "int8", "--calib_size", 3,
        "--calib_max_seq_length", 64, "--batch_size", 3, "--seed", 7, "--device", "cpu",
    )  # fmt: skip
    result = run(*options, "--calib_dataset", "builtin", "--no-measure")
    assert result.exit_code == 0, result.output
    assert "1 warning" in result.stderr and "44%" in result.stderr
    assert "W8A8_SQ_PER_CHANNEL" in result.stdout and "bfloat16" in result.stdout
    manifest = json.loads((tmp_path / "out" / "phireg.json").read_text())
    provenance = manifest["quantization"]["statistics"]["provenance"]
    assert provenance["settings"]["seed"] == 7
    assert provenance["data"] == "the built-in text"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = run(*options, "--report", tmp_path / "page.html", "--overwrite")
    assert result.exit_code == 0, result.output
    assert "44%" not in result.output and "warning" not in result.output
    assert "measured  KV cache of 8 bits: " in result.stdout
    # The unquantized one writes the reference summary of the first article.
    assert f"before         {demo.find('phi2').articles[0].reference}" in result.stdout
    assert "after          " in result.stdout
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_alpha(quantize, tmp_path):
    document(quantize("--json", "--alpha", "0.5", qformat="int8_sq"))
    name = "transformer.layers.0.mlp.fc.prequant_scaling_factor"
    half = load_file(tmp_path / "out" / "rank0.safetensors")[name]
    summary = document(quantize("--json", "--overwrite", qformat="int8_sq"))
    assert summary["calibration"]["reused"]
    assert not np.array_equal(half, load_file(tmp_path / "out" / "rank0.safetensors")[name])


def test_quiet_and_unmeasured(quantize):
    result = quantize("--quiet", "--no-measure")
    assert (result.exit_code, result.output) == (0, "")
    summary = document(quantize("--json", "--overwrite", "--no-measure"))
    assert (summary["quality"], summary["unmeasured"]) == (None, None)


def test_a_model_that_would_take_long_is_measured_when_asked(quantize, monkeypatch):
    monkeypatch.setattr(measuring, "affordable", lambda *_: 10)
    summary = document(quantize("--json"))
    assert summary["quality"] is None and "--measure" in summary["unmeasured"]
    assert summary["unmeasured"] in quantize("--overwrite").stdout
    summary = document(quantize("--json", "--overwrite", "--measure"))
    assert summary["quality"]["tokens"] == measuring.FEWEST


def test_the_model_card_has_what_was_measured(quantize, tmp_path):
    card = tmp_path / "out" / "README.md"
    options = ("--target", "hf-modelopt", "--overwrite", "--json")
    summary = document(quantize(*options, "--no-measure"))
    assert summary["files"]["README.md"] == card.stat().st_size
    assert "Not measured" in card.read_text()
    summary = document(quantize(*options, "--measure"))
    assert summary["files"]["README.md"] == card.stat().st_size
    text = card.read_text()
    assert "Not measured" not in text and "8 samples" in text
    # Random weights: the unquantized model's own perplexity, and that the text tells nothing.
    assert f"{summary['quality']['unquantized_perplexity']:.4g}" in text
    card.write_text(text.replace("phireg", "mine"))
    assert quantize(*options, "--no-measure").exit_code == 6


def test_a_tokenizer_that_cannot_be_read_keeps_the_numbers(quantize, tiny):
    result = quantize()
    assert "written        nothing: the model has no tokenizer\n" in result.stdout
    (tiny / "tokenizer.json").write_text("{")
    result = quantize("--overwrite")
    assert result.exit_code == 0, result.output
    assert "written        nothing: " in result.stdout and "tokenizer.json" in result.stdout
    assert "perplexity" in result.stdout


def test_without_text_weights_are_not_measured(quantize, tmp_path):
    summary = document(quantize("--json", qformat="int8_wo", calib_size=None, calib_file=None))
    assert "tokenizer" in summary["unmeasured"]
    result = quantize(
        "--overwrite", "--measure", qformat="int8_wo", calib_size=None, calib_file=None
    )
    assert result.exit_code == 2
    assert f"{tmp_path / 'out'} is complete" in result.output
    assert (tmp_path / "out" / "rank0.safetensors").exists()


# --- what is refused, before anything is calibrated -------------------------------------------


@pytest.mark.usefixtures("uncalibrated")
@pytest.mark.parametrize(
    ("more", "code", "name"),
    [
        (("--tp-size", 3), 3, "tp sizes"),
        (("--pp-size", 2), 2, "pipeline"),
        (("--alpha", "0.3"), 2, "fp8"),
        (("--report", "page.html", "--no-measure"), 2, "--report"),
        (("--report", "/nowhere/page.html"), 2, "/nowhere"),
        (("--calib-dataset", "builtin"), 2, "builtin"),
        (("--batch-size", 0), 2, "batch-size"),
        (("--device", "abacus"), 2, "abacus"),
        (("--device", "abacus", "--qformat", "int8_wo"), 2, "abacus"),
        (("--calib-file", "nothing.txt"), 2, "nothing.txt"),
        (("--calib-stats", "amax", "--qformat", "int8_wo"), 2, "--calib-stats"),
        (("--calib-stats", "."), 6, "--calib-stats"),
        (("--calib-stats", "typo/amax"), 2, "typo"),
        (("--calib-stats", "ids.jsonl/amax"), 2, "ids.jsonl"),
    ],
)
def test_wrong_requests(quantize, tmp_path, monkeypatch, more, code, name):
    monkeypatch.chdir(tmp_path)
    result = quantize(*more)
    assert result.exit_code == code, result.output
    assert name in result.output
    assert not (tmp_path / "out").exists() and not stats(tmp_path).exists()


@pytest.mark.usefixtures("uncalibrated")
def test_an_output_that_exists(quantize, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    for more in ((), ("--overwrite",)):
        result = quantize(*more)
        assert result.exit_code == 6, result.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_fp8_cache_on_long_rope_is_warned_of_before_calibrating(quantize, tiny):
    size = tiny_config()["hidden_size"] // tiny_config()["num_attention_heads"]
    factors = {"short_factor": [1.0] * (size // 2), "long_factor": [2.0] * (size // 2)}
    long = {
        "rope_scaling": {"type": "longrope", **factors},
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 64,
    }
    write_json(tiny / "config.json", tiny_config() | long)
    result = quantize("--kv-cache-dtype", "fp8", "--no-measure")
    assert result.exit_code == 0, result.output
    assert result.stderr.index("long-rope") < result.stderr.index("calibration:")
    assert result.output.count("long-rope") == 1
    again = quantize("--kv-cache-dtype", "fp8", "--no-measure", "--overwrite")
    assert again.output.count("long-rope") == 1
    assert "long-rope" not in quantize("--overwrite").output


# --- statistics: kept, taken again, or of something else --------------------------------------


def test_another_format_need_not_calibrate_again(quantize, tmp_path, monkeypatch):
    first = document(quantize("--json", "--calib-stats", stats(tmp_path, "amax")))
    assert not first["calibration"]["reused"]
    monkeypatch.setattr(calibrating, "collect", None)
    for more in (("--tp-size", 2), ("--dtype", "bfloat16"), ("--kv-cache-dtype", "int8")):
        again = document(
            quantize(
                "--json", "--overwrite", "--calib-stats", stats(tmp_path, "amax"), *more,
                qformat="int8_sq", calib_size=None, calib_file=None,
            )
        )  # fmt: skip
        assert again["calibration"]["reused"]
        assert again["calibration"]["provenance"] == first["calibration"]["provenance"]
    assert not stats(tmp_path).exists()


def test_a_second_format_takes_the_statistics_of_the_first(quantize, tmp_path, monkeypatch):
    first = document(quantize("--json"))
    (tmp_path / "bad.calib.safetensors").write_bytes(b"\0" * 100)  # newer, and damaged
    with monkeypatch.context() as patch:
        patch.setattr(calibrating, "collect", None)
        result = quantize("--json", "--output-dir", tmp_path / "second", qformat="int8_sq")
    again = document(result)["calibration"]
    assert again["reused"] and again["provenance"] == first["calibration"]["provenance"]
    assert str(stats(tmp_path)) == again["file"]
    assert str(stats(tmp_path)) in result.stderr
    assert not stats(tmp_path, "second.calib.safetensors").exists()


def test_what_a_calibration_would_not_repeat_is_not_taken(quantize, tmp_path, tiny, ids):
    """Other samples, whether the settings tell so or not, and other values of the same shapes."""
    kept = quantize() and stats(tmp_path).read_bytes()
    other = shutil.copytree(tiny, tmp_path / "other")
    file = next(other.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)

    def fresh(name, **options):
        result = quantize("--json", "--output-dir", tmp_path / name, **options)
        return not document(result)["calibration"]["reused"]

    assert fresh("a", model=other)
    assert fresh("b", calib_size=5)
    with safe_open(stats(tmp_path), "np") as file:
        record = file.metadata()
    origin = json.loads(record["provenance"])
    # As if the same settings had given other token ids then.
    record["provenance"] = json.dumps({**origin, "data_digest": "0" * 32})
    save_file(load_file(stats(tmp_path)), stats(tmp_path), record)
    assert fresh("c")
    stats(tmp_path).write_bytes(kept)
    assert not fresh("d")
    ids.write_text(ids.read_text().replace("[3,", "[4,"))
    assert fresh("e")


def test_statistics_that_do_not_fit(quantize, tmp_path):
    """A named file is refused and kept, the one beside the output is replaced."""
    quantize()
    kept = stats(tmp_path).read_bytes()
    named = ("--overwrite", "--calib-stats", stats(tmp_path))
    result = quantize(*named, calib_size=5)
    assert result.exit_code == 3 and "size 8, not 5" in result.output
    other = demo.find("phi2").directory
    result = quantize(*named, model=other, calib_size=None, calib_file=None)
    assert result.exit_code == 3 and str(stats(tmp_path)) in result.output
    assert stats(tmp_path).read_bytes() == kept
    beside = quantize("--overwrite", calib_size=5)
    assert beside.exit_code == 0 and "size 8, not 5" in beside.stderr
    assert stats(tmp_path).read_bytes() != kept
    stats(tmp_path).write_bytes(b"\0" * 100)
    result = quantize("--overwrite")
    assert result.exit_code == 3 and str(stats(tmp_path)) in result.output


def test_a_scale_that_cannot_be_used_keeps_the_former_output(quantize, tmp_path):
    document(quantize("--json"))
    with safe_open(stats(tmp_path), "np") as file:
        metadata = file.metadata()
    tensors = load_file(stats(tmp_path))
    tensors["model.layers.1.mlp.down_proj.input_amax"].fill(np.inf)
    save_file(tensors, stats(tmp_path), metadata)
    result = quantize("--overwrite")
    assert result.exit_code == 3
    assert "mlp.down_proj" in result.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_failed_export_resumes(quantize, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OutputError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "compute_scales", full)
        result = quantize()
    assert result.exit_code == 6
    assert str(stats(tmp_path)) in result.output
    assert [path.name for path in tmp_path.glob("out*")] == [stats(tmp_path).name]
    monkeypatch.setattr(calibrating, "collect", None)
    summary = document(quantize("--json"))
    assert summary["calibration"]["reused"]


def test_statistics_in_a_place_that_can_only_be_read(quantize, tmp_path, monkeypatch):
    shared, access = tmp_path / "shared", os.access
    shared.mkdir()
    quantize("--calib-stats", shared / "amax", "--quiet")

    def only_read(path, mode):
        return access(path, mode) and not (mode & os.W_OK and str(path).startswith(str(shared)))

    monkeypatch.setattr(os, "access", only_read)
    options = ("--overwrite", "--json", "--no-measure", "--calib-stats")
    assert document(quantize(*options, shared / "amax"))["calibration"]["reused"]
    refused = quantize(*options, shared / "other")
    assert refused.exit_code == 6
    assert str(shared / "other") in refused.output


# --- interrupted ------------------------------------------------------------------------------


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("module", "name", "files"),
    [(calibrating, "collect", []), (exporting, "WeightQuantizer", ["out.calib.safetensors"])],
)
def test_ctrl_c_keeps_complete_statistics(quantize, tmp_path, monkeypatch, module, name, files):
    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupt)
        result = quantize()
    assert result.exit_code == 130
    assert "nothing was written" in result.stderr
    assert (str(stats(tmp_path)) in result.stderr) == bool(files)
    assert [path.name for path in tmp_path.glob("out*")] == files
    assert document(quantize("--json"))["calibration"]["reused"] == bool(files)


def test_ctrl_c_while_measuring(quantize, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "compare_layers", interrupt)
    result = quantize()
    assert result.exit_code == 130
    assert f"{tmp_path / 'out'} was already complete" in result.stderr
    assert (tmp_path / "out" / "rank0.safetensors").exists()


def test_two_quantizations_have_the_same_manifest(quantize, tmp_path):
    """At another time, with statistics that each of them took."""
    manifests = []
    for _ in range(2):
        assert quantize("--no-measure").exit_code == 0
        manifests.append((tmp_path / "out/phireg.json").read_bytes())
        shutil.rmtree(tmp_path / "out")
        stats(tmp_path).unlink()
        time.sleep(1.1)  # dates have seconds
    assert manifests[0] == manifests[1]
