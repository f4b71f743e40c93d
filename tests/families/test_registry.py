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


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Write a plugin module; it can be imported during the test only."""
    monkeypatch.syspath_prepend(tmp_path)
    written = []

    def write(module, body):
        (tmp_path / f"{module}.py").write_text(PLUGIN + textwrap.dedent(body))
        written.append(module)

    yield write
    for module in written:
        sys.modules.pop(module, None)


def offer(name, value, distribution="acme-phi", version="0.3"):
    """An entry point as importlib.metadata makes it for an installed distribution."""
    entry = metadata.EntryPoint(name, value, registry.GROUP)
    dist = SimpleNamespace(name=distribution, version=version)
    vars(entry)["dist"] = dist
    return entry


def failure(name, *offers):
    with pytest.raises(PluginError) as caught:
        registry.load(name, registry.index(offers))
    assert caught.value.exit_code == 5
    return caught.value


def test_index_reads_names_and_imports_nothing(plugin):
    plugin("acme_bomb", "raise SystemExit('imported')")
    known = registry.index(
        [
            offer("zeta", "acme_bomb:FAMILY"),
            offer("alpha", "acme_bomb:OTHER", "b-dist", "2"),
            offer("alpha", "acme_bomb:OTHER", "a-dist", "1"),
        ]
    )
    assert list(known) == ["alpha", "zeta"]
    assert [candidate.qualified for candidate in known["alpha"]] == ["a-dist:alpha", "b-dist:alpha"]
    assert (known["zeta"][0].distribution, known["zeta"][0].version) == ("acme-phi", "0.3")
    assert known["zeta"][0].value == "acme_bomb:FAMILY"
    assert "acme_bomb" not in sys.modules


def test_load_imports_that_family_alone(plugin):
    plugin("acme_sound", "FAMILY = make('sound')")
    plugin("acme_bomb", "raise SystemExit('imported')")
    known = registry.index([offer("sound", "acme_sound:FAMILY"), offer("bomb", "acme_bomb:FAMILY")])
    chosen = registry.load("sound", known)
    assert isinstance(chosen.family, Family)
    assert chosen.family.name == "sound"
    assert chosen.candidate.distribution == "acme-phi"
    assert chosen.warnings == ()
    assert "acme_sound" in sys.modules
    assert "acme_bomb" not in sys.modules


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
    plugin("acme_one", "FAMILY = make('phi3-small')")
    plugin("acme_two", "FAMILY = make('phi3-small')")
    offers = (
        offer("phi3-small", "acme_one:FAMILY", "phireg", "0.1.0"),
        offer("phi3-small", "acme_two:FAMILY", "acme-phi", "0.3"),
    )
    error = failure("phi3-small", *offers)
    assert "acme_one:FAMILY" in error.message and "acme_two:FAMILY" in error.message
    assert "--family acme-phi:phi3-small" in error.hint
    assert "--family phireg:phi3-small" in error.hint
    assert not {"acme_one", "acme_two"} & set(sys.modules)
    chosen = registry.load("acme-phi:phi3-small", registry.index(offers))
    assert chosen.candidate.distribution == "acme-phi"
    assert "acme_one" not in sys.modules


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
    plugin("acme_bad", body)
    plugin("acme_sound", "FAMILY = make('sound')")
    offers = (offer("bad", "acme_bad:FAMILY"), offer("sound", "acme_sound:FAMILY"))
    error = failure("bad", *offers)
    assert "acme-phi 0.3" in error.message
    assert named in error.message
    assert registry.load("sound", registry.index(offers)).family.name == "sound"


def test_damaged_metadata_does_not_stop_the_others(plugin):
    plugin("acme_sound", "FAMILY = make('sound')")
    no_distribution = metadata.EntryPoint("sound", "x:F", registry.GROUP)
    nameless = offer("sound", "x:F", None, None)
    known = registry.index([nameless, no_distribution, offer("sound", "acme_sound:FAMILY")])
    assert [c.distribution for c in known["sound"]] == ["acme-phi", "unknown", "unknown"]
    assert registry.load("acme-phi:sound", known).family.name == "sound"


# --family auto


def choose(config, *offers):
    return registry.choose(HFConfig(config), registry.index(offers))


ACME = {"architectures": ["Acme"], "model_type": "acme"}


def test_choose_takes_the_family_that_claims_the_model(plugin):
    plugin("acme_a", "FAMILY = make('a', tell_apart=lambda hf: 'it is large')")
    plugin("acme_b", "FAMILY = make('b', tell_apart=lambda hf: None)")
    plugin("acme_c", "FAMILY = make('c', architectures=('Other',), model_types=('other',))")
    chosen = choose(ACME, *(offer(name, f"acme_{name}:FAMILY") for name in "abc"))
    assert (chosen.family.name, chosen.candidate.name, chosen.warnings) == ("b", "b", ())


def test_choose_with_none_lists_the_reasons(plugin):
    plugin("acme_a", "FAMILY = make('a', architectures=('Other',))")
    plugin("acme_b", "FAMILY = make('b', tell_apart=lambda hf: 'it is small')")
    plugin("acme_bad", "1 / 0")
    with pytest.raises(SourceError) as caught:
        choose(ACME, *(offer(name, f"acme_{name}:FAMILY") for name in ("a", "b", "bad")))
    message = caught.value.message
    assert "a: its architecture is Acme" in message
    assert "b: it is small" in message
    assert "family 'bad'" in message, "it might have been the one"
    assert caught.value.exit_code == 3


def test_choose_with_two_says_how_to_choose(plugin):
    plugin("acme_a", "FAMILY = make('a')")
    plugin("acme_b", "FAMILY = make('b')")
    with pytest.raises(PluginError) as caught:
        choose(ACME, offer("a", "acme_a:FAMILY"), offer("b", "acme_b:FAMILY", "b-dist", "1"))
    assert "--family acme-phi:a" in caught.value.hint
    assert "--family b-dist:b" in caught.value.hint


def test_a_derived_family_goes_before_its_bases(plugin):
    plugin("acme_a", "FAMILY = make('a')")
    plugin("acme_b", "from acme_a import FAMILY as A\nFAMILY = A.derive('b')")
    reason = "tell_apart=lambda hf: hf.get('reason')"
    plugin("acme_c", f"from acme_b import FAMILY as B\nFAMILY = B.derive('c', {reason})")
    offers = [offer(n, f"acme_{n}:FAMILY") for n in "abc"]
    assert choose(ACME, *offers).family.name == "c"
    assert choose(ACME, *reversed(offers)).family.name == "c"
    assert choose({**ACME, "reason": "it is not c"}, *offers).family.name == "a"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise SystemExit(3)", "cannot be loaded"),
        ("def raises(hf): 1 / 0\nFAMILY = make('bad', tell_apart=raises)", "ZeroDivisionError"),
    ],
)
def test_a_broken_plugin_is_a_warning(plugin, body, says):
    plugin("acme_sound", "FAMILY = make('sound')")
    plugin("acme_bad", body)
    chosen = choose(ACME, offer("bad", "acme_bad:FAMILY"), offer("sound", "acme_sound:FAMILY"))
    assert chosen.family.name == "sound"
    (warning,) = chosen.warnings
    assert says in warning
    assert "'bad'" in warning
    assert "acme-phi 0.3" in warning


@pytest.mark.parametrize("config", [{}, {"architectures": []}, {"hidden_size": 6}])
def test_a_config_that_names_no_model_is_not_guessed(plugin, config):
    plugin("acme_a", "FAMILY = make('a')")
    with pytest.raises(SourceError) as caught:
        choose(config, offer("a", "acme_a:FAMILY"))
    assert "--family" in caught.value.hint


# All families


def test_families_are_listed_with_what_they_can_do_or_their_problem(plugin):
    model = "PublishedModel('acme/model', {'hidden_size': 6})"
    plugin(
        "acme_a", f"from phireg.api import PublishedModel\nFAMILY = make('a', published=({model},))"
    )
    plugin("acme_bad", "1 / 0")
    offers = (offer("a", "acme_a:FAMILY"), offer("bad", "acme_bad:FAMILY"))
    infos = {info.candidate.name: info for info in registry.families(registry.index(offers))}
    assert "ZeroDivisionError" in infos["bad"].problem and infos["bad"].family is None
    assert infos["a"].problem is None and infos["a"].family.name == "a"
    assert 1 in infos["a"].tp_sizes["acme/model"] and infos["a"].qformats["acme/model"] == ()
