"""phireg families with real wheels, one for each way to be broken."""

import json
import textwrap

import pytest
from helpers.fresh_environment import FreshEnvironment, write_wheel

pytestmark = pytest.mark.slow

START = """
from collections.abc import Generator
from phireg.api import Family, Rules, hookimpl
from phireg_plugins.phi3_mini import FAMILY as BASE

print("a plugin that talks while it is imported")
"""

# distribution: (families it offers, its module after START)
PLUGINS = {
    "acme-good": (
        ["acme-good"],
        """
        class Weights:
            @hookimpl(wrapper=True)
            def phireg_weight_rules(self):
                return (yield)
        FAMILY = BASE.derive("acme-good", Weights(), api=1)
        """,
    ),
    "acme-raises": (["acme-raises"], "import einops_of_acme"),
    "acme-misspelled": (
        ["acme-misspelled"],
        """
        class Weights:
            @hookimpl
            def phireg_weigth_rules(self):
                return Rules()
        FAMILY = BASE.derive("acme-misspelled", Weights())
        """,
    ),
    "acme-api": (
        ["acme-api"],
        """
        class Weights:
            @hookimpl
            def phireg_weight_rules(self, shard):
                return Rules()
        FAMILY = BASE.derive("acme-api", Weights(), api=2)
        """,
    ),
    "acme-twin": (["phi2"], 'FAMILY = BASE.derive("phi2", tell_apart=lambda hf: "never")'),
    "acme-nothing": (
        ["acme-alias", "acme-nothing"],
        """
        class Weights:
            def weight_rules(self):
                return Rules()
        FAMILY = BASE.derive("acme-alias")
        def __getattr__(name):
            return BASE.derive("acme-nothing", Weights())
        """,
    ),
    "acme-unmapped": (
        ["acme-unmapped"],
        """
        class Weights:
            @hookimpl(wrapper=True)
            def phireg_weight_rules(self):
                rules = yield
                kept = [rule for rule in rules.values() if "post_layernorm" not in rule.target]
                return Rules(*kept, drop=rules.drop)
        FAMILY = BASE.derive("acme-unmapped", Weights())
        """,
    ),
}

BROKEN = {"acme-raises", "acme-misspelled", "acme-api", "acme-nothing"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory, phireg_wheel):
    place = tmp_path_factory.mktemp("plugins")
    environment = FreshEnvironment(tmp_path_factory.mktemp("environment"))
    wheels = []
    for name, (families, body) in PLUGINS.items():
        module = name.replace("-", "_")
        attributes = {"acme-nothing": "OTHER"}
        entries = {family: f"{module}:{attributes.get(family, 'FAMILY')}" for family in families}
        files = {f"{module}.py": START + textwrap.dedent(body)}
        wheels.append(write_wheel(place, name, files, entries))
    environment.install(phireg_wheel, *wheels)
    return environment


def plugins(environment, *options):
    done = environment.run("phireg", "families", "--json", *options)
    document = json.loads(done.stdout)
    offers = {(p["distribution"], p["name"]): p for p in document["families"]}
    return done, offers, document


def test_every_offer_is_listed(environment):
    done, offers, _ = plugins(environment)
    assert done.returncode == 0
    expected = {(name, family) for name, (families, _) in PLUGINS.items() for family in families}
    assert {offer for offer in offers if offer[0] != "phireg"} == expected
    assert {"phi2", "phi3-small", "phi3.5-moe"} < {name for _, name in offers}


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("acme-raises", ("acme-raises 1.0", "acme_raises:FAMILY", "einops_of_acme")),
        ("acme-misspelled", ("acme_misspelled.py:9", "phireg_weigth_rules", "phireg_weight_rules")),
        ("acme-api", ("acme-api 1.0", "API 2", "upgrade phireg")),
        ("acme-nothing", ("the step Weights", "@hookimpl")),
    ],
)
def test_check_names_the_problem(environment, name, named):
    done, offers, _ = plugins(environment, "--check")
    assert done.returncode == 5
    problem = offers[name, name]["problem"]
    assert all(part in problem for part in named), problem
    assert "Traceback" not in done.stderr


def test_check_finds_no_problem_with_the_others(environment):
    _, offers, document = plugins(environment, "--check")
    assert {name for (_, name), offer in offers.items() if offer["problem"]} == BROKEN
    assert {name for (_, name), offer in offers.items() if offer["note"]} == {"acme-alias"}
    assert document["unreadable"] == []
    text = environment.run("phireg", "families", "--check").stdout
    assert "--family acme-twin:phi2" in text and "--family phireg:phi2" in text


def test_one_name_twice_must_be_chosen(environment, tiny_phi3, tmp_path):
    options = ("--model-dir", tiny_phi3, "--output-dir", tmp_path / "out")
    done = environment.run("phireg", "convert", "--family", "phi2", *options)
    assert done.returncode == 5
    assert "acme-twin:phi2" in done.stderr
    assert not (tmp_path / "out").exists()
    environment.check("phireg", "convert", "--family", "acme-twin:phi2", *options)
    manifest = json.loads((tmp_path / "out" / "phireg.json").read_text())
    assert manifest["family"]["distribution"] == "acme-twin"
    _, offers, _ = plugins(environment)
    assert offers["acme-twin", "phi2"]["select"] == "acme-twin:phi2"
    assert offers["phireg", "phi3-mini"]["select"] == "phi3-mini"


def test_an_unmapped_tensor_is_an_error_of_the_plan(environment, tiny_phi3, tmp_path):
    options = ("--model-dir", tiny_phi3, "--family", "acme-unmapped")
    done = environment.run("phireg", "plan", *options)
    assert done.returncode == 3
    assert "model.layers.{0..1}.post_attention_layernorm.weight" in done.stdout
    assert "unmapped" in done.stdout
    done = environment.run("phireg", "convert", *options, "--output-dir", tmp_path / "out")
    assert done.returncode == 3
    assert "post_attention_layernorm" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_broken_plugin_does_not_affect_others(environment, tiny_phi3, tmp_path):
    """Also --family auto, which has to import them all."""
    for family in ("acme-good", "phi3-mini", "auto"):
        out = tmp_path / family
        options = ("--family", family, "--model-dir", tiny_phi3, "--output-dir", out)
        document = json.loads(environment.check("phireg", "convert", *options, "--json"))
        assert document["family"] == ("phi3-mini" if family == "auto" else family)
        warned = any("einops_of_acme" in text for text in document["plugin_warnings"])
        assert warned == (family == "auto")
    document = json.loads(environment.check("phireg", "families", "--json"))
    assert {family["name"] for family in document["families"] if family["problem"]} == BROKEN


@pytest.mark.parametrize(
    "entry_points", ["[console_scripts]\nno equals sign\n", "[phireg.families]\n= \n\xff"]
)
def test_a_damaged_distribution_does_not_affect_others(environment, entry_points):
    """Python's own entry_points() gives up on all distributions then."""
    info = environment.site_packages / "aaa_damaged-1.0.dist-info"
    info.mkdir()
    try:
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: aaa-damaged\nVersion: 1.0\n")
        (info / "entry_points.txt").write_bytes(entry_points.encode("latin-1"))
        done, offers, document = plugins(environment)
        assert done.returncode == 0, done.stderr
        assert ("phireg", "phi3-mini") in offers
        (problem,) = document["unreadable"]
        assert "aaa_damaged-1.0.dist-info" in problem
        assert "aaa_damaged" in environment.run("phireg", "families").stdout
    finally:
        for file in info.iterdir():
            file.unlink()
        info.rmdir()
