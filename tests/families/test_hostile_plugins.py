"""Plugins that do their worst when they are imported: each is named, and stops nobody."""

import json

import pytest
from helpers.program import console_script, offer, run_shell
from helpers.tiny_phi3 import make_tiny_phi3

pytestmark = pytest.mark.hostile("plugins")

GOOD = """
from phireg_plugins.phi3_mini import FAMILY as BASE
FAMILY = BASE.derive("acme-good")
"""
WORST = {
    "acme-skip": ("import pytest; pytest.skip('none', allow_module_level=True)", "Skipped: none"),
    "acme-cancel": ("import asyncio; raise asyncio.CancelledError", "CancelledError"),
    "acme-ctrl-c": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "acme-exit": ("raise SystemExit(0)", "SystemExit: 0"),
    "acme-mute": (
        "class Mute(Exception):\n"
        "    def __str__(self): raise RuntimeError\n"
        "raise Mute",
        "Mute",
    ),
    "acme-long": ("raise ValueError('x' * 10**7)", "ValueError"),
    "acme-quits": ("import os; os._exit(0)", "code 0"),
    "acme-crashes": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11"),
    "acme-shuts": ("import sys; sys.stdout.close(); sys.stdin.close(); 1 / 0", "ZeroDivisionError"),
    "acme-closes": ("import os; os.closerange(0, 100); raise OSError", "code 1"),
}  # fmt: skip


@pytest.fixture
def phireg(tmp_path):
    place = tmp_path / "plugins"
    place.mkdir()
    offer(place, "acme-good", GOOD)
    for family, (code, _) in WORST.items():
        offer(place, family, code)
    script = console_script(tmp_path)
    return lambda line: run_shell(f"{script} {line}", PYTHONPATH=place)


def test_each_is_named_and_the_others_are_listed(phireg):
    for command, exit_code in (("families", 0), ("families --check", 5)):
        done = phireg(f"{command} --json")
        assert done.returncode == exit_code, done.stderr
        assert len(done.stdout) < 100_000
        problems = {
            entry["name"]: entry["problem"] for entry in json.loads(done.stdout)["families"]
        }
        assert problems["acme-good"] is None
        assert problems["phi2"] is None
        for family, (_, says) in WORST.items():
            assert says in problems[family], family


def test_conversions_go_on(phireg, tmp_path):
    make_tiny_phi3(tmp_path / "model")
    for family in ("auto", "acme-good", "phi3-mini"):
        out = tmp_path / family
        done = phireg(f"convert --model-dir {tmp_path / 'model'} --family {family} "
                      f"--output-dir {out} --json")  # fmt: skip
        assert done.returncode == 0, done.stderr
        warnings = json.loads(done.stdout)["plugin_warnings"]
        assert len(warnings) == (len(WORST) if family == "auto" else 0)
    done = phireg(f"convert --model-dir {tmp_path / 'model'} --family acme-quits --output-dir x")
    assert done.returncode == 5
    assert "acme-quits" in done.stderr and "code 0" in done.stderr


def test_a_ctrl_c_of_the_user_ends_phireg(tmp_path):
    """While a plugin is imported for good, after it was tried."""
    code = """
import os, signal
if os.getpgrp() != os.getpid():  # not in the process that tries it
    os.kill(os.getpid(), signal.SIGINT)
"""
    place = tmp_path / "plugins"
    place.mkdir()
    offer(place, "acme-slow", code)
    done = run_shell(f"{console_script(tmp_path)} families", PYTHONPATH=place)
    assert done.returncode == 130, done.stderr
