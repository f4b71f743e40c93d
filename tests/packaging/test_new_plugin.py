"""A generated plugin as its author meets it: built, installed, found, used and tested."""

import json

import pytest
from helpers.fresh_environment import FreshEnvironment, build_wheel

from phireg.cli import COMMANDS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory, phireg_wheel):
    environment = FreshEnvironment(tmp_path_factory.mktemp("environment"))
    environment.install(phireg_wheel)
    return environment


@pytest.fixture(scope="module")
def generated(environment, tmp_path_factory):
    place = tmp_path_factory.mktemp("work")
    environment.check("phireg", "new-plugin", "acme-phi", "--from", "phi3-mini", cwd=place)
    return place / "acme-phi"


@pytest.fixture(scope="module")
def installed(environment, generated, tmp_path_factory):
    """The environment with the plugin's wheel; the generated directory is not on its path."""
    environment.install(build_wheel(generated, tmp_path_factory.mktemp("plugin")))
    return environment


def test_the_wheel_holds_everything(environment):
    """Only what stands in setup.cfg is in it."""
    done = environment.check("python", "-c", "import phireg; print(phireg.__file__)")
    assert done.startswith(str(environment.site_packages))
    for command in COMMANDS:
        assert environment.check("phireg", command, "--help").startswith("Usage: phireg")


def test_it_is_listed(installed):
    document = json.loads(installed.check("phireg", "families", "--json"))
    (family,) = (family for family in document["families"] if family["name"] == "acme-phi")
    assert (family["distribution"], family["version"]) == ("acme-phi", "0.1.0")
    assert family["problem"] is None
    assert family["architectures"] == ["Phi3ForCausalLM"]
    assert "acme-phi" in installed.check("phireg", "families")
    document = json.loads(installed.check("phireg", "families", "--check", "--json"))
    (plugin,) = (plugin for plugin in document["families"] if plugin["name"] == "acme-phi")
    assert (plugin["api"], plugin["problem"], plugin["note"]) == (1, None, None)


def test_it_converts_like_its_base_until_it_is_changed(installed, tiny_phi3, tmp_path):
    for family in ("acme-phi", "phi3-mini"):
        options = ("--model-dir", tiny_phi3, "--tp-size", "2", "--output-dir", tmp_path / family)
        installed.check("phireg", "convert", "--family", family, *options)
    for name in ("rank0.safetensors", "rank1.safetensors", "config.json"):
        mine, base = ((tmp_path / f / name).read_bytes() for f in ("acme-phi", "phi3-mini"))
        assert mine == base
    manifest = json.loads((tmp_path / "acme-phi" / "phireg.json").read_text())
    provider = {"name": "acme-phi", "distribution": "acme-phi", "version": "0.1.0"}
    assert manifest["family"] == provider


def test_its_tests_pass_and_notice_a_wrong_rule(installed, generated, tmp_path):
    pytest_command = ("python", "-m", "pytest", "-p", "no:cacheprovider", generated)
    assert " passed" in installed.check(*pytest_command)
    module = tmp_path / "acme_phi.py"
    body = (generated / "src" / "acme_phi" / "__init__.py").read_text()
    wrong = body.replace(
        "        return rules\n",
        '        inner, hidden = config["intermediate_size"], config["hidden_size"]\n'
        '        source = src("model.layers.1.mlp.gate_up_proj", 2 * inner)\n'
        "        halves = parts(source, gate=inner, up=inner)\n"
        '        return rules.replace(Linear("transformer.layers.1.mlp.fc", halves, hidden, '
        "COLUMN))\n",
    ).replace("import HFConfig, Rules", "import COLUMN, HFConfig, Linear, Rules, parts, src")
    assert wrong != body
    module.write_text(wrong)
    done = installed.run(*pytest_command, "-x", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "acme_phi.py:" in done.stdout, "the rule's file and line"


def test_every_family_can_be_derived_from(installed, tmp_path):
    """Also a family of a third party."""
    names = {f"other-{base}": base for base in ("phi3-small", "acme-phi")}
    for name, base in names.items():
        installed.check("phireg", "new-plugin", name, "--from", base, cwd=tmp_path)
    installed.install(*(tmp_path / name for name in names))
    document = json.loads(installed.check("phireg", "families", "--check", "--json"))
    problems = {p["name"]: p["problem"] for p in document["families"]}
    assert [problems[name] for name in names] == [None, None]
    options = ("-p", "no:cacheprovider")
    output = installed.check("python", "-m", "pytest", *options, *names, cwd=tmp_path)
    assert all(f"test_{name.replace('-', '_')}.py" in output for name in names)
    assert " passed" in output
