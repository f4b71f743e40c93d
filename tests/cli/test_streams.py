"""Standard streams that are closed, full or used by others, and a Ctrl-C at the very start."""

import json
import os
import pty
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
from helpers.program import console_script, offer, run_shell

pytestmark = pytest.mark.hostile("streams and signals")


@pytest.fixture
def shell(tmp_path):
    script = console_script(tmp_path)
    return lambda line, **more: run_shell(line, PHIREG=script, **more)


@pytest.mark.parametrize(
    ("line", "exit_code", "told"),
    [
        ("families >/dev/full", 6, True),
        ("families --json >&-", 6, True),
        ("--help >/dev/full", 6, True),
        ("plan --help >&- 2>&-", 6, False),
        ("families >/dev/full 2>/dev/full", 6, False),
        ("families --json 2>&-", 0, False),
        ("plan --model-dir /nonexistent 2>/dev/full", 3, False),
        ("nonsense 2>&-", 2, False),
    ],
)
def test_streams_that_are_closed_or_full(shell, line, exit_code, told):
    done = shell(f"$PHIREG {line}")
    assert done.returncode == exit_code, done.stderr
    assert ("standard output" in done.stderr) == told
    assert "Traceback" not in done.stderr
    if exit_code == 0:
        json.loads(done.stdout)


def test_a_closed_stream_never_becomes_a_file_of_the_output(shell, tiny, tmp_path):
    """Descriptor 1 would be the first rank file's, and what anyone prints would be its content."""
    out = tmp_path / "out"
    done = shell(f"$PHIREG convert --model-dir {tiny} --output-dir {out} >&- 2>&- <&-")
    assert done.returncode == 6
    assert shell(f"$PHIREG inspect {out} --check").returncode == 0


PRINTS = """
import atexit, os, sys, threading, time
print("printed by Python")
os.write(1, b"printed by native code\\n")
os.system("echo printed by a child")
def endless():
    while True:
        print("printed by a thread", flush=True)
        os.write(1, b"printed by a thread\\n")
        time.sleep(0.2)
threading.Thread(target=endless).start()
atexit.register(sys.stdout.close)
from phireg.api import *
class Rules:
    @hookimpl(wrapper=True)
    def phireg_weight_rules(self):
        print("printed by a hook")
        return (yield)
from phireg_plugins.phi3_mini import FAMILY as BASE
FAMILY = BASE.derive("acme", Rules(), published=BASE.published)
"""


@pytest.mark.parametrize(
    "command", ["families", "families --check", "plan --family acme --model-dir {tiny}"]
)
def test_only_results_reach_standard_output(shell, tiny, tmp_path, command):
    place = tmp_path / "plugins"
    place.mkdir()
    offer(place, "acme", PRINTS)
    done = shell(f"$PHIREG {command.format(tiny=tiny)} --json", PYTHONPATH=place)
    assert done.returncode == 0, done.stderr
    assert "acme" in done.stdout
    json.loads(done.stdout)
    for printer in ("Python", "native code", "a child", "a thread", "a hook"):
        assert f"printed by {printer}" in done.stderr


@pytest.fixture
def terminal():
    """A terminal for one process's messages, read to its end; returns both."""
    ours, theirs = pty.openpty()
    seen = []

    def read():
        with suppress(OSError):  # the end of a terminal
            while block := os.read(ours, 4096):
                seen.append(block)

    reader = threading.Thread(target=read)
    reader.start()

    def messages():
        os.close(theirs)
        reader.join(60)
        return b"".join(seen).decode()

    yield theirs, messages
    os.close(ours)


@pytest.mark.parametrize("command", ["families", "plan --family acme --model-dir {tiny}"])
def test_results_do_not_go_where_something_moves(terminal, tiny, tmp_path, command):
    """Messages on a terminal, results in a file: `phireg plan --json > plan.json`."""
    offer(tmp_path, "acme", PRINTS)
    theirs, messages = terminal
    done = subprocess.run(
        [console_script(tmp_path), *command.format(tiny=tiny).split(), "--json"],
        env=os.environ | {"PYTHONPATH": str(tmp_path), "TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=theirs,
        timeout=60,
    )
    shown = messages()
    assert done.returncode == 0, shown
    assert "\x1b[?25l" in shown  # a cursor is hidden where something moves
    assert "acme" in done.stdout.decode()
    json.loads(done.stdout)
    for printer in ("Python", "native code", "a child", "a thread", "a hook"):
        assert f"printed by {printer}" in shown


EARLY = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *rest):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from phireg.__main__ import main
sys.argv = ["phireg", "families"]
main()
"""


@pytest.mark.parametrize("module", ["phireg.cli", "click", "phireg.cli.streams", "pluggy"])
def test_ctrl_c_at_the_start(module):
    script = EARLY.format(module=module)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert "interrupted; nothing was written" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_background_job_ignores_ctrl_c():
    script = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    script += EARLY.format(module="click")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_program_leaves_signals_alone():
    """Whoever imports every module of the package keeps a working Ctrl-C."""
    script = "import signal, phireg.__main__; print(signal.getsignal(signal.SIGINT).__name__)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout == "default_int_handler\n"
