"""phireg quantize as a user meets it: what is said, kept, refused and resumed."""

import json
import os

import numpy as np
import pytest
from helpers.tiny_phi3 import tiny_config, write_json
from safetensors.numpy import load_file, save_file

from phireg import demo
from phireg.calibration import calibrate as calibrating
from phireg.conversion import convert as exporting
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


@pytest.mark.parametrize("cache", [None, "int8", "fp8"])
@pytest.mark.parametrize("qformat", ["fp8", "int8_sq", "int8_wo", "int4_wo"])
def test_every_format(quantize, tmp_path, qformat, cache):
    more = () if cache is None else ("--kv_cache_dtype", cache)
    told = document(quantize("--json", "--tp_size", 2, *more, qformat=qformat))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    algorithms = {
        "fp8": "FP8", "int8_sq": "W8A8_SQ_PER_CHANNEL", "int8_wo": "W8A16", "int4_wo": "W4A16",
    }  # fmt: skip
    assert config["quantization"]["quant_algo"] == algorithms[qformat]
    assert config["quantization"]["kv_cache_quant_algo"] == (cache and cache.upper())
    assert (told["qformat"], told["kv_cache_dtype"], told["tp_size"]) == (qformat, cache, 2)
    assert told["alpha"] == (1.0 if qformat == "int8_sq" else None)
    calibrated = qformat in ("fp8", "int8_sq") or cache is not None
    assert stats(tmp_path).exists() == calibrated == (told["calibration"] is not None)
    quality = told["quality"]
    layers = config["num_hidden_layers"]
    assert (len(quality["linears"]), len(quality["hidden"])) == (4 * layers, layers)
    assert all(error > 0 for error in quality["hidden"])
    inputs = qformat in ("fp8", "int8_sq")
    assert all((one["activation_error"] is not None) == inputs for one in quality["linears"])
    assert (quality["calibrated_on"], quality["rows"]) == (False, 4 if calibrated else 12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_demo_model_with_its_tokenizer_and_a_page(run, tmp_path, dtype):
    model = demo.find("phi3-small").directory
    result = run(
        "quantize", "--model_dir", model, "--output_dir", tmp_path / "out", "--qformat", "int8_sq",
        "--dtype", dtype, "--kv_cache_dtype", "int8", "--calib_dataset", "builtin",
        "--calib_size", 3, "--calib_max_seq_length", 64, "--batch_size", 3, "--seed", 7,
        "--device", "cpu", "--report", tmp_path / "page.html",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "calibration: 3 samples of up to 64 tokens (192 in all) from the built-in text" in (
        result.stderr
    )
    assert "this takes about" in result.stderr
    assert "W8A8_SQ_PER_CHANNEL, 24 linears, the rest " + dtype in result.stdout
    assert "not calibrated on" in result.stdout
    assert "the worst 8 of 24 linears" in result.stdout
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    manifest = json.loads((tmp_path / "out" / "phireg.json").read_text())
    provenance = manifest["quantization"]["statistics"]["provenance"]
    assert provenance["settings"]["seed"] == 7
    assert provenance["data"] == "the built-in text"


def test_alpha(quantize, tmp_path):
    document(quantize("--json", "--alpha", "0.5", qformat="int8_sq"))
    name = "transformer.layers.0.mlp.fc.prequant_scaling_factor"
    half = load_file(tmp_path / "out" / "rank0.safetensors")[name]
    told = document(quantize("--json", "--overwrite", qformat="int8_sq"))
    assert told["calibration"]["reused"]
    assert not np.array_equal(half, load_file(tmp_path / "out" / "rank0.safetensors")[name])
    result = quantize("--alpha", "0.5", "--overwrite")
    assert result.exit_code == 2
    assert "alpha 0.5 has no effect on fp8" in result.output


def test_quiet_and_unmeasured(quantize):
    result = quantize("--quiet", "--no-measure")
    assert (result.exit_code, result.output) == (0, "")
    told = document(quantize("--json", "--overwrite", "--no-measure"))
    assert (told["quality"], told["unmeasured"]) == (None, None)


def test_a_model_that_would_take_long_is_measured_when_asked(quantize, monkeypatch):
    monkeypatch.setattr(measuring, "affordable", lambda *_: 10)
    told = document(quantize("--json"))
    assert told["quality"] is None
    assert told["unmeasured"] == "it would take long on a CPU; --measure does it"
    result = quantize("--overwrite")
    assert "quality  not measured: it would take long" in result.stdout
    told = document(quantize("--json", "--overwrite", "--measure"))
    assert told["quality"]["tokens"] == measuring.FEWEST


def test_without_text_weights_are_not_measured(quantize, tmp_path):
    told = document(quantize("--json", qformat="int8_wo", calib_size=None, calib_file=None))
    assert "holds no tokenizer to measure with" in told["unmeasured"]
    result = quantize(
        "--overwrite", "--measure", qformat="int8_wo", calib_size=None, calib_file=None
    )
    assert result.exit_code == 3
    assert "out is complete, but measuring it failed" in result.output
    assert (tmp_path / "out" / "rank0.safetensors").exists()


# --- what is refused, before anything is calibrated -------------------------------------------


@pytest.mark.usefixtures("uncalibrated")
@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (("--tp-size", 3), 3, "tp sizes that work"),
        (("--tp-size", 0), 2, "is not a number of ranks"),
        (("--pp-size", 2), 2, "pipeline parallelism"),
        (("--family", "phi4"), 5, "phi4"),
        (("--alpha", "0.3"), 2, "has no effect on fp8"),
        (("--report", "page.html", "--no-measure"), 2, "--report has no effect"),
        (("--report", "/nowhere/page.html"), 2, "no such directory"),
        (("--calib-dataset", "builtin"), 2, "both a calibration file"),
        (("--batch-size", 0), 2, "batch-size"),
        (("--device", "abacus"), 2, "unknown device"),
    ],
)
def test_a_wrong_request(quantize, tmp_path, more, code, said):
    result = quantize(*more)
    assert result.exit_code == code, result.output
    assert said in result.output
    assert not (tmp_path / "out").exists()
    assert not stats(tmp_path).exists()


@pytest.mark.usefixtures("uncalibrated")
def test_a_file_that_is_missing_and_options_without_effect(quantize, tmp_path):
    result = quantize(calib_file=tmp_path / "nothing.txt")
    assert result.exit_code == 2
    assert "nothing.txt: no such file" in result.output
    result = quantize("--calib-stats", tmp_path / "amax", qformat="int8_wo")
    assert result.exit_code == 2
    assert "--calib-stats" in result.output
    result = quantize("--calib-stats", tmp_path)
    assert result.exit_code == 6
    assert f"--calib-stats {tmp_path} is a directory" in result.output


def test_a_device_that_only_the_measurement_needs(quantize, tmp_path):
    result = quantize("--device", "abacus", qformat="int8_wo")
    assert result.exit_code == 2
    assert "unknown device 'abacus'" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("uncalibrated")
def test_an_output_that_exists(quantize, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    for more in ((), ("--overwrite",)):
        result = quantize(*more)
        assert result.exit_code == 6, result.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.usefixtures("uncalibrated")
def test_a_source_that_is_quantized_already(quantize, tiny, tmp_path):
    block = {"quant_method": "modelopt", "quant_algo": "FP8"}
    write_json(tiny / "config.json", tiny_config() | {"quantization_config": block})
    result = quantize()
    assert result.exit_code == 3
    assert "it is already quantized (quantization_config, modelopt)" in result.output
    assert "unquantized model" in result.output
    assert not (tmp_path / "out").exists()


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
    assert "FP8 on a long-rope model" in result.stderr
    assert result.stderr.index("FP8 on a long-rope") < result.stderr.index("calibration:")
    assert result.output.count("FP8 on a long-rope") == 1
    again = quantize("--kv-cache-dtype", "fp8", "--no-measure", "--overwrite")
    assert "FP8 on a long-rope model" in again.output
    assert again.output.count("FP8 on a long-rope") == 1
    assert "FP8 on a long-rope" not in quantize("--overwrite").output


@pytest.mark.parametrize(("value", "what"), [(0.0, "is zero"), (1e-37, "is denormal")])
def test_a_scale_that_is_none(quantize, tmp_path, value, what):
    document(quantize("--json"))
    name = "model.layers.1.mlp.down_proj.input_amax"
    change(stats(tmp_path), lambda tensors: tensors[name].fill(value))
    result = quantize("--overwrite")
    assert result.exit_code == 3
    scale = "transformer.layers.1.mlp.proj.activation_scaling_factor"
    assert f"{scale}: {what}" in result.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())  # the former one


def change(path, edit):
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata)


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


def test_statistics_of_other_settings(quantize, tmp_path):
    quantize()
    kept = stats(tmp_path).read_bytes()
    named = quantize("--overwrite", "--calib-stats", stats(tmp_path), calib_size=5)
    assert named.exit_code == 3
    assert (
        "does not serve as calibration statistics: it was made with size 8, not 5" in named.output
    )
    assert stats(tmp_path).read_bytes() == kept
    beside = quantize("--overwrite", calib_size=5)
    assert beside.exit_code == 0
    assert "does not serve: it was made with size 8, not 5" in beside.stderr
    assert "calibration: 5 samples" in beside.stderr
    assert stats(tmp_path).read_bytes() != kept


def test_statistics_of_another_model(quantize, run, tmp_path, ids):
    quantize()
    other = demo.find("phi2").directory
    result = quantize(
        "--overwrite", "--calib-stats", stats(tmp_path), model=other, calib_size=None,
        calib_file=None,
    )  # fmt: skip
    assert result.exit_code == 3
    assert (
        "does not serve as calibration statistics: it was made from other weights files"
        in result.output
    )


def test_statistics_that_are_none(quantize, tmp_path):
    stats(tmp_path).write_bytes(b"\0" * 100)
    result = quantize()
    assert result.exit_code == 3
    assert "not a readable safetensors file" in result.output
    assert not (tmp_path / "out").exists()


def test_a_failed_export_resumes(quantize, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OutputError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "compute_scales", full)
        result = quantize()
    assert result.exit_code == 6
    assert "the disk is full" in result.output
    assert f"the calibration statistics are kept in {stats(tmp_path)}" in result.output
    assert [path.name for path in tmp_path.glob("out*")] == [stats(tmp_path).name]
    monkeypatch.setattr(calibrating, "collect", None)
    told = document(quantize("--json"))
    assert told["calibration"]["reused"]


@pytest.mark.usefixtures("uncalibrated")
@pytest.mark.parametrize("directory", ["file", "typo"])
def test_statistics_that_cannot_be_kept(quantize, tmp_path, directory):
    (tmp_path / "file").write_text("")
    result = quantize("--calib-stats", tmp_path / directory / "amax")
    assert result.exit_code == 2
    assert f"amax: no such directory: {tmp_path / directory}\n" in result.output
    assert "make it first, or give --calib-stats another place" in result.output
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "typo").exists()


def test_statistics_in_a_place_that_can_only_be_read(quantize, tmp_path, monkeypatch):
    shared, access = tmp_path / "shared", os.access
    shared.mkdir()
    quantize("--calib-stats", shared / "amax", "--quiet")

    def only_read(path, mode):
        return access(path, mode) and not (mode & os.W_OK and str(path).startswith(str(shared)))

    monkeypatch.setattr(os, "access", only_read)
    told = quantize("--calib-stats", shared / "amax", "--overwrite", "--json", "--no-measure")
    assert document(told)["calibration"]["reused"]
    refused = quantize("--calib-stats", shared / "other", "--overwrite", "--json", "--no-measure")
    assert refused.exit_code == 6
    assert "cannot be written: no permission" in refused.output


# --- interrupted ------------------------------------------------------------------------------


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_ctrl_c_while_calibrating(quantize, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrating, "collect", interrupt)
    result = quantize()
    assert result.exit_code == 130
    assert result.stderr.endswith("interrupted; nothing was written\n")
    assert list(tmp_path.glob("out*")) == []


def test_ctrl_c_while_writing(quantize, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "WeightQuantizer", interrupt)
        result = quantize()
    assert result.exit_code == 130
    assert "nothing was written; the calibration statistics are kept in" in result.stderr
    assert [path.name for path in tmp_path.glob("out*")] == [stats(tmp_path).name]
    assert document(quantize("--json"))["calibration"]["reused"]


def test_ctrl_c_while_measuring(quantize, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "walk", interrupt)
    result = quantize()
    assert result.exit_code == 130
    assert "out was already complete" in result.stderr
    assert (tmp_path / "out" / "rank0.safetensors").exists()
