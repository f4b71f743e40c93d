"""The registry, with made-up distributions."""

import sys
import textwrap
from importlib import metadata
from types import SimpleNamespace

import pytest

from phireg import registry
from phireg.config.hf import HFConfig
from phireg.errors import PluginError, SourceError
from phireg.family import Family

PLUGIN = """
from phireg.api import Family, FieldTable, QuantRules, Rules, hookimpl

class Step:
    @hookimpl
    def phireg_config_fields(self):
        return FieldTable()
    @hookimpl
    def phireg_weight_rules(self):
        return Rules()
    @hookimpl
    def phireg_quant_rules(self):
        return QuantRules(())

def make(name, **more):
    values = dict(
        name=name, architectures=("Acme",), model_types=("acme",), steps=(Step(),), api=1
    )
    return Family(**{**values, **more})
"""


def offer(name, value, distribution="acme-phi", version="0.3"):
    """An entry point as importlib.metadata makes it for an installed distribution."""
    entry = metadata.EntryPoint(name, value, registry.GROUP)
    dist = SimpleNamespace(name=distribution, version=version)
    vars(entry)["dist"] = dist
    return entry


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Write a plugin module, which can be imported during the test only; returns its offer."""
    monkeypatch.syspath_prepend(tmp_path)
    modules = []

    def write(name, body=None, **distribution):
        module = f"acme_{len(modules)}_{name.replace('-', '_')}"
        text = f"FAMILY = make('{name}')" if body is None else textwrap.dedent(body)
        (tmp_path / f"{module}.py").write_text(PLUGIN + text)
        modules.append(module)
        return offer(name, f"{module}:FAMILY", **distribution)

    yield write
    for module in modules:
        sys.modules.pop(module, None)


def imported(offered):
    return offered.value.partition(":")[0] in sys.modules


def failure(name, *offers):
    with pytest.raises(PluginError) as caught:
        registry.load(name, registry.index(offers))
    assert caught.value.exit_code == 5
    return caught.value


def test_index_reads_names_and_imports_nothing(plugin):
    zeta = plugin("zeta", "raise SystemExit('imported')")
    known = registry.index(
        [zeta, offer("alpha", "x:F", "b-dist", "2"), offer("alpha", "x:F", "a-dist", "1")]
    )
    assert list(known) == ["alpha", "zeta"]
    assert [candidate.qualified for candidate in known["alpha"]] == ["a-dist:alpha", "b-dist:alpha"]
    assert (known["zeta"][0].distribution, known["zeta"][0].version) == ("acme-phi", "0.3")
    assert known["zeta"][0].value == zeta.value
    assert not imported(zeta)


def test_load_imports_that_family_alone(plugin):
    sound, bomb = plugin("sound"), plugin("bomb", "raise SystemExit('imported')")
    chosen = registry.load("sound", registry.index([sound, bomb]))
    assert isinstance(chosen.family, Family)
    assert (chosen.family.name, chosen.candidate.distribution) == ("sound", "acme-phi")
    assert chosen.warnings == ()
    assert imported(sound) and not imported(bomb)


def test_an_unknown_family_is_answered_with_the_nearest_and_all():
    error = failure(
        "phi3-mimi",
        offer("phi3-mini", "x:F", "phireg", "0.1.0"),
        offer("phi2", "x:F", "phireg", "0.1.0"),
        offer("acme-phi4", "x:F"),
    )
    assert "'phi3-mimi'" in error.message and "'phi3-mini'" in error.message
    assert all(name in error.hint for name in ("acme-phi4", "acme-phi 0.3", "phi2", "phi3-mini"))
    assert "'other:phi2'" in failure("other:phi2", offer("phi2", "x:F", "phireg")).message


def test_two_distributions_with_one_name(plugin):
    offers = (plugin("phi3-small", distribution="phireg"), plugin("phi3-small"))
    error = failure("phi3-small", *offers)
    assert all(offered.value in error.message for offered in offers)
    assert "--family acme-phi:phi3-small" in error.hint
    assert "--family phireg:phi3-small" in error.hint
    assert not any(map(imported, offers))
    chosen = registry.load("acme-phi:phi3-small", registry.index(offers))
    assert chosen.candidate.distribution == "acme-phi"
    assert not imported(offers[0])


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("import einops_of_acme", "ModuleNotFoundError: No module named 'einops_of_acme'"),
        ("1 / 0", "ZeroDivisionError"),
        ("FAMILY = (", "SyntaxError"),
        ("raise SystemExit('bye')", "SystemExit: bye"),
        ("pass", "AttributeError"),
        ("FAMILY = make('bad', api=2)", "API 2"),
        ("FAMILY = make('bad', steps=())", "phireg_weight_rules"),
        ("FAMILY = {'name': 'bad'}", "dict"),
        ("FAMILY = make('y')", "'y'"),  # not the entry point's name
    ],
)
def test_a_broken_plugin_is_named_and_the_others_work(plugin, body, named):
    offers = (plugin("bad", body), plugin("sound"))
    error = failure("bad", *offers)
    assert "acme-phi 0.3" in error.message
    assert named in error.message
    assert registry.load("sound", registry.index(offers)).family.name == "sound"


def test_damaged_metadata_does_not_stop_the_others(plugin):
    no_distribution = metadata.EntryPoint("sound", "x:F", registry.GROUP)
    nameless = offer("sound", "x:F", None, None)
    known = registry.index([nameless, no_distribution, plugin("sound")])
    assert [c.distribution for c in known["sound"]] == ["acme-phi", "unknown", "unknown"]
    assert registry.load("acme-phi:sound", known).family.name == "sound"


# --family auto


def choose(config, *offers):
    return registry.choose(HFConfig(config), registry.index(offers))


ACME = {"architectures": ["Acme"], "model_type": "acme"}


def test_choose_takes_the_family_that_claims_the_model(plugin):
    chosen = choose(
        ACME,
        plugin("a", "FAMILY = make('a', tell_apart=lambda hf: 'it is large')"),
        plugin("b", "FAMILY = make('b', tell_apart=lambda hf: None)"),
        plugin("c", "FAMILY = make('c', architectures=('Other',), model_types=('other',))"),
    )
    assert (chosen.family.name, chosen.candidate.name, chosen.warnings) == ("b", "b", ())


def test_choose_with_none_lists_the_reasons(plugin):
    a = plugin("a", "FAMILY = make('a', architectures=('Other',))")
    b = plugin("b", "FAMILY = make('b', tell_apart=lambda hf: 'it is small')")
    with pytest.raises(SourceError) as caught:
        choose(ACME, a, b, plugin("bad", "1 / 0"))
    message = caught.value.message
    assert "a: its architecture is Acme" in message
    assert "b: it is small" in message
    assert "family 'bad'" in message, "it might have been the one"
    assert caught.value.exit_code == 3


def test_choose_with_two_says_how_to_choose(plugin):
    with pytest.raises(PluginError) as caught:
        choose(ACME, plugin("a"), plugin("b", distribution="b-dist"))
    assert "--family acme-phi:a" in caught.value.hint
    assert "--family b-dist:b" in caught.value.hint


def test_a_derived_family_goes_before_its_bases(plugin):
    a = plugin("a")
    b = plugin("b", "from acme_0_a import FAMILY as A\nFAMILY = A.derive('b')")
    reason = "tell_apart=lambda hf: hf.get('reason')"
    c = plugin("c", f"from acme_1_b import FAMILY as B\nFAMILY = B.derive('c', {reason})")
    assert choose(ACME, a, b, c).family.name == "c"
    assert choose(ACME, c, b, a).family.name == "c"
    assert choose({**ACME, "reason": "it is not c"}, a, b, c).family.name == "a"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise SystemExit(3)", "cannot be loaded"),
        ("def raises(hf): 1 / 0\nFAMILY = make('bad', tell_apart=raises)", "ZeroDivisionError"),
    ],
)
def test_a_broken_plugin_is_a_warning(plugin, body, says):
    chosen = choose(ACME, plugin("bad", body), plugin("sound"))
    assert chosen.family.name == "sound"
    (warning,) = chosen.warnings
    assert says in warning
    assert "'bad'" in warning
    assert "acme-phi 0.3" in warning


@pytest.mark.parametrize("config", [{}, {"architectures": []}, {"hidden_size": 6}])
def test_a_config_that_names_no_model_is_not_guessed(plugin, config):
    with pytest.raises(SourceError) as caught:
        choose(config, plugin("a"))
    assert "--family" in caught.value.hint


# All families


def test_families_are_listed_with_what_they_can_do_or_their_problem(plugin):
    model = "PublishedModel('acme/model', {'hidden_size': 6})"
    body = f"from phireg.api import PublishedModel\nFAMILY = make('a', published=({model},))"
    offers = (plugin("a", body), plugin("bad", "1 / 0"))
    infos = {info.candidate.name: info for info in registry.families(registry.index(offers))}
    assert "ZeroDivisionError" in infos["bad"].problem and infos["bad"].family is None
    assert infos["a"].problem is None and infos["a"].family.name == "a"
    assert 1 in infos["a"].tp_sizes["acme/model"] and infos["a"].qformats["acme/model"] == ()
