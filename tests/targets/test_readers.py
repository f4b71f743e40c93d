"""The table of readers: against the targets, the documentation and the refusals of plans."""

import json
import re
import sys
from pathlib import Path

import pytest
from helpers import tiny_models
from helpers.command_line import run_phireg as run

import phireg
from phireg import registry
from phireg.errors import PluginError, UsageError
from phireg.formats import FORMATS
from phireg.targets.readers import FP8_CACHE, READERS, UNQUANTIZED, table

PAGE = Path(__file__).parents[2] / "docs" / "targets.md"

DEFECTS = {
    "written_as": "lambda self, form: form / 2",
    "written_as__type": "lambda self, form: None",
    "problems": "lambda self, *_: (1 / 0 for _ in 'a')",
    "problems__type": "lambda self, *_: ['a problem']",
    "rules": "lambda self, *_: exit(0)",
    "rules__type": "lambda self, *_: {}",
    "quantized_modules__type": "None",
    "shared_inputs": "lambda self, rules: rules['none']",
    "shared_inputs__type": "lambda self, rules: {name: list(rules) for name in rules}",
    "fed_rows": "lambda self, rules: {}",
    "fed_rows__type": "lambda self, *_: {'linear': ('module', ['rows'])}",
    "config_files": "lambda self, model: {'quant_config.json': {}}",
    "config_files__type": "lambda self, model: {'config.json': '{}'}",
    "config_files__outside": "lambda self, model: {'config.json': {}, '../evil.json': {}}",
    "config_files__below": "lambda self, model: {'config.json': {}, 'sub/x.json': {}}",
    "config_files__weights": "lambda self, model: {'config.json': {}, 'model.safetensors': {}}",
    "config_files__index": (
        "lambda self, model: {'config.json': {}, 'model.safetensors.index.json': {}}"
    ),
    "config_files__tokenizer": "lambda self, model: {'config.json': {}, 'tokenizer.json': {}}",
    "config_files__object": "lambda self, model: {'config.json': {'x': {1}}}",
    "config_files__nan": "lambda self, model: {'config.json': {'x': float('nan')}}",
    "layouts": "{'fp8': 3}",
    "formats": "property(lambda self: 1 / 0)",
}
"""Methods of a target, each with code that fails or makes another type."""


def test_every_format_of_every_target_has_a_row():
    for info in registry.targets():
        rows = READERS[info.target.name]
        assert set(info.target.formats) <= rows.keys()
        assert ("fp8" in info.target.kv_caches) <= (FP8_CACHE in rows)
        assert rows.keys() <= {*FORMATS, FP8_CACHE, UNQUANTIZED}


def test_the_page_has_the_table():
    assert table() in PAGE.read_text()


def test_families_tells_the_readers():
    document = json.loads(run("families", "--json").output)
    targets = {target["name"]: target for target in document["targets"]}
    assert {"trtllm", "hf", "hf-modelopt"} <= targets.keys()
    formats = {entry["qformat"]: entry for entry in targets["hf-modelopt"]["formats"]}
    # vLLM 0.33 has no W8A8_SQ_PER_CHANNEL among its algorithms; Edge-LLM 0.11 ran it.
    assert [reader["reader"] for reader in formats["int8_sq"]["readers"]] == ["TensorRT-Edge-LLM"]
    assert "vLLM" in {reader["reader"] for reader in formats["fp8"]["readers"]}
    assert targets["hf"]["formats"] == []


def test_a_refusal_names_readers_elsewhere_and_the_nearest_format(tmp_path):
    tiny_models.write("phi2", tmp_path)
    with pytest.raises(UsageError) as caught:
        phireg.plan(tmp_path, target="hf-modelopt", qformat="int4_wo")
    assert "--target trtllm" in caught.value.message and "1.2.1" in caught.value.message
    assert "int4_awq" in caught.value.hint


@pytest.mark.parametrize("target", ["hf-modelopt", "hf-compressed-tensors"])
def test_layouts_of_quantized_models_need_a_format(tmp_path, target):
    source = tiny_models.write("phi2", tmp_path / "model")
    options = ("--model-dir", source, "--target", target)
    for command in (("plan",), ("convert", "--output-dir", tmp_path / "out")):
        refused = run(*command, *options)
        assert refused.exit_code == 2 and "--qformat" in refused.output
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert run("plan", *options, "--qformat", "fp8").exit_code == 0


def test_targets_of_another_distribution(tmp_path, monkeypatch):
    info = tmp_path / "site" / "acme_files-0.3.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-files\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text(
        "[phireg.targets]\nacme = acme_files:TARGET\nacme-plain = acme_files:PLAIN\n"
        "acme-broken = acme_broken:TARGET\nacme-unfit = acme_files:unfit\n"
        + "".join(f"acme-{name} = acme_files:{name}\n" for name in DEFECTS)
    )
    (info.parent / "acme_files.py").write_text(
        "from dataclasses import replace\nfrom phireg.api import LayoutError\n"
        "from phireg.targets.modelopt import TARGET as BASE\n"
        "TARGET = replace(BASE, name='acme', summary='of acme')\n"
        "PLAIN = replace(BASE, name='acme-plain', layouts={})\n"
        "def defective(name, **methods):\n"
        "    fields = ('layouts', 'kv_caches')\n"
        "    facts = {key: methods.pop(key, getattr(BASE, key)) for key in fields}\n"
        "    kind = type(name, (type(BASE),), methods)\n"
        "    return kind(name='acme-' + name, summary='', api=1, folds='all', **facts)\n"
        "def no_layout(*_): raise LayoutError('sizes of acme')\n"
        "unfit = defective('unfit', shared_inputs=no_layout)\n"
        + "".join(
            f"{name} = defective({name!r}, {name.partition('__')[0]}={code})\n"
            for name, code in DEFECTS.items()
        )
    )
    (info.parent / "acme_broken.py").write_text("raise ModuleNotFoundError('no acme')\n")
    monkeypatch.syspath_prepend(str(info.parent))
    targets = {t["name"]: t for t in json.loads(run("families", "--json").output)["targets"]}
    assert targets["acme"]["summary"] == "of acme" and targets["acme"]["problem"] is None
    assert "no acme" in targets["acme-broken"]["problem"]
    assert "layouts" in targets["acme-layouts"]["problem"]
    checked = run("families", "--check")
    assert checked.exit_code == 5 and "no acme" in checked.output
    source = tiny_models.write("phi2", tmp_path / "model")
    phireg.convert(phireg.plan(source, target="acme-plain"), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    unfit = phireg.plan(source, target="acme-unfit", qformat="fp8")
    assert [finding.code for finding in unfit.errors] == ["layout"]
    for name in DEFECTS:
        with pytest.raises(PluginError) as caught:
            phireg.plan(source, target=f"acme-{name}", qformat="int4_awq")
        method = name.partition("__")[0]
        said = set(re.findall(r"[\w-]+", str(caught.value)))
        assert {f"acme-{name}", method, "authors"} <= said
    assert not (tmp_path / "evil.json").exists()
    sys.modules.pop("acme_files")
