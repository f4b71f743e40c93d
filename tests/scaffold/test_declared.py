"""The API number as the source states it: read, not imported."""

import sys

import pytest

from phireg.declared import declared_api

BOMB = "raise SystemExit('imported')\n"
MODULES = {
    "jj_plain/__init__.py": BOMB + "FAMILY = Family(name='x', api=7)\n",
    "jj_typed.py": BOMB + "FAMILY: Family = Family(api=4)\n",
    "jj_own.py": BOMB + "from jj_plain import FAMILY as BASE\nFAMILY = BASE.derive('y', api=3)\n",
    "jj_base.py": BOMB + "from jj_plain import FAMILY as BASE\nFAMILY = BASE.derive('y', 1)\n",
    "jj_deep/__init__.py": BOMB,
    "jj_deep/a/__init__.py": BOMB + "from ..b import F\nFAMILY = F.derive('z')\n",
    "jj_deep/b.py": BOMB + "from jj_base import FAMILY\nF = FAMILY.derive('w')\n",
    "jj_passed.py": BOMB + "from jj_deep.a import FAMILY\n",
    "jj_circle.py": BOMB + "from jj_circle import FAMILY\n",
    "jj_twice.py": BOMB + "FAMILY = Family(api=1)\nFAMILY = Family(api=2)\n",
    "jj_computed.py": BOMB + "FAMILY = Family(api=API)\n",
    "jj_word.py": BOMB + "FAMILY = Family(api='1')\n",
    "jj_other.py": BOMB + "FAMILY = make()\n",
    "jj_broken.py": "FAMILY = (\n",
    "jj_binary.py": "\0",
}


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    for name, text in MODULES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("value", "api"),
    [
        ("jj_plain:FAMILY", 7),
        ("jj_typed:FAMILY", 4),
        ("jj_own:FAMILY", 3),
        ("jj_base:FAMILY", 7),
        ("jj_deep.a:FAMILY", 7),
        ("jj_deep.b:F", 7),
        ("jj_passed:FAMILY", 7),
        ("jj_twice:FAMILY", 2),
        ("jj_circle:FAMILY", None),
        ("jj_computed:FAMILY", None),
        ("jj_word:FAMILY", None),
        ("jj_other:FAMILY", None),
        ("jj_broken:FAMILY", None),
        ("jj_binary:FAMILY", None),
        ("jj_nowhere:FAMILY", None),
        ("jj_plain.nothing:FAMILY", None),
        ("jj_plain:OTHER", None),
        ("json.decoder:FAMILY", None),
        ("sys:FAMILY", None),
        ("not a module at all!", None),
        ("", None),
    ],
)
def test_what_a_source_states(value, api):
    assert declared_api(value) == api
    assert not [name for name in sys.modules if name.startswith("jj_")]
