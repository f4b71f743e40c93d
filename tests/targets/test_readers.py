"""The table of readers: against the targets, the documentation and the refusals of plans."""

import json
import re
import sys
from pathlib import Path

import pytest
from helpers import tiny_models
from helpers.command_line import run_phireg as run

import phireg
from phireg import demo, registry
from phireg.errors import UsageError
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
    "config_files__outside": "lambda self, model: {'config.json': {}, '../../evil.json': {}}",
    "config_files__cycle": "lambda self, model: {'config.json': {}, '../unfinished/evil.json': {}}",
    "config_files__absolute": "lambda self, model: {'config.json': {}, HERE + '/evil.json': {}}",
    "config_files__below": "lambda self, model: {'config.json': {}, 'sub/x.json': {}}",
    "config_files__long": "lambda self, model: {'config.json': {}, 'x' * 300 + '.json': {}}",
    "config_files__weights": "lambda self, model: {'config.json': {}, 'model.safetensors': {}}",
    "config_files__index": (
        "lambda self, model: {'config.json': {}, 'model.safetensors.index.json': {}}"
    ),
    "config_files__tokenizer": "lambda self, model: {'config.json': {}, 'tokenizer.json': {}}",
    "config_files__case": "lambda self, model: {'config.json': {}, 'Tokenizer.json': {}}",
    "config_files__twice": "lambda self, model: {'config.json': {}, 'Config.json': {}}",
    "config_files__object": "lambda self, model: {'config.json': {'x': {1}}}",
    "config_files__nan": "lambda self, model: {'config.json': {'x': float('nan')}}",
    "api": "'x'",
    "folds": "'some'",
    "by_rank": "'no'",
    "layouts": "{'fp8': 3}",
    "layouts__unknown": "{'nope': BASE.layouts['fp8']}",
    "layouts__algorithm": "{'fp8': replace(BASE.layouts['fp8'], algorithm={1})}",
    "formats": "property(lambda self: 1 / 0)",
    "formats__unknown": "('fp8', 'nope')",
    "formats__unstored": "('fp8', 'w4a16')",
}
"""Facts and methods of a target, each with code that fails or makes what cannot be."""

FACTS = {"api", "layouts", "folds", "by_rank", "formats"}
"""What is known to be wrong as soon as a target is loaded."""


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


def test_what_a_plan_proposes_instead_works():
    source = demo.find("phi3-mini").directory
    command = ("plan", "--model-dir", source, "--target", "hf-modelopt", "--qformat")
    refused = run(*command, "int4_awq")
    assert refused.exit_code == 3
    formats = re.findall(r"without groups \((.*?)\)", refused.output)[0].split(", ")
    patterns = set(re.findall(r"--exclude '(.*?)'", refused.output))
    options = [word for pattern in patterns for word in ("--exclude", pattern)]
    for works in (["int4_awq", *options], *([qformat] for qformat in formats)):
        assert run(*command, *works).exit_code == 0, works


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
        "acme-later = acme_files:LATER\nacme-groups = acme_files:GROUPS\n"
        + "".join(f"acme-{name} = acme_files:{name}\n" for name in DEFECTS)
    )
    (info.parent / "acme_files.py").write_text(
        "from dataclasses import replace\nfrom phireg.api import LayoutError\n"
        "from phireg.targets.modelopt import TARGET as BASE\n"
        f"HERE = {str(tmp_path)!r}\n"
        "TARGET = replace(BASE, name='acme', summary='of acme')\n"
        "PLAIN = replace(BASE, name='acme-plain', layouts={})\n"
        "LATER = replace(BASE, name='acme-later', api=2)\n"
        "layouts = {'int4_awq': BASE.layouts['int4_awq']}\n"
        "GROUPS = replace(BASE, name='acme-groups', layouts=layouts)\n"
        "FACTS = {name: getattr(BASE, name) for name in ('layouts', 'kv_caches', 'by_rank')}\n"
        "FACTS |= {'api': 1, 'folds': 'all'}\n"
        "def defective(name, **methods):\n"
        "    facts = {key: methods.pop(key, FACTS[key]) for key in FACTS}\n"
        "    if 'config_files' in methods: facts['layouts'] = {}\n"
        "    kind = type(name, (type(BASE),), methods)\n"
        "    return kind(name='acme-' + name, summary='', **facts)\n"
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
    assert "upgrade phireg" in targets["acme-later"]["problem"]
    facts = {name for name in DEFECTS if name.partition("__")[0] in FACTS}
    broken = {f"acme-{name}" for name in ("broken", "later", *facts)}
    assert {name for name, target in targets.items() if target["problem"]} == broken
    listed, checked = run("families"), run("families", "--check")
    assert (listed.exit_code, checked.exit_code) == (0, 5)
    for name in facts:
        said = {"acme-files", "0.3", f"acme-{name}", name.partition("__")[0], "authors"}
        assert said <= set(re.findall(r"[\w.-]*\w", targets[f"acme-{name}"]["problem"]))
        problem = targets[f"acme-{name}"]["problem"]
        assert problem in listed.output and problem in checked.output
    source = tiny_models.write("phi2", tmp_path / "model")
    phireg.convert(phireg.plan(source, target="acme-plain"), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    unfit = phireg.plan(source, target="acme-unfit", qformat="fp8")
    assert [finding.code for finding in unfit.errors] == ["layout"]
    for finding in phireg.plan(source, target="acme-groups", qformat="int4_awq").errors:
        assert "--exclude" in finding.detail and "a format" not in finding.detail
    before = set(tmp_path.rglob("*"))
    for name in DEFECTS:
        method = name.partition("__")[0]
        command = ("plan", "--qformat", "int4_awq")
        if method == "config_files":
            command = ("convert", "--output-dir", tmp_path / name)
        refused = run(*command, "--model-dir", source, "--target", f"acme-{name}")
        assert refused.exit_code == 5, name
        said = set(re.findall(r"[\w-]+", refused.output))
        assert {f"acme-{name}", method, "authors"} <= said
    assert set(tmp_path.rglob("*")) == before
    sys.modules.pop("acme_files")
