"""Child processes: nothing planted in the current directory runs, and nothing waits for ever."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.processes import ends
from helpers.tiny_phi3 import make_tiny_phi3

from phireg import children
from phireg.children import ChildError, call, find_program, python_command, query

pytestmark = pytest.mark.hostile("child processes")

MODULES = ("torch", "xxhash", "json", "typing", "phireg", "tensorrt_llm", "transformers", "click")
PROGRAMS = ("nvidia-smi", "mpirun", "trtllm-build", "gcc")


@pytest.fixture
def planted(tmp_path):
    """A directory of a stranger: modules, a distribution and programs that leave a trace."""
    place, traces = tmp_path / "planted", tmp_path / "traces"
    place.mkdir()
    traces.mkdir()
    for name in MODULES:
        text = f"import os\nos.mkdir({str(traces / name)!r})\n"
        (place / f"{name}.py").write_text(text)
    for name in PROGRAMS:
        (place / name).write_text(f"#!/bin/sh\nmkdir {traces / name}\n")
        (place / name).chmod(0o755)
    info = place / "acme-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 9.9\n")
    (info / "entry_points.txt").write_text("[phireg.families]\nacme = torch:FAMILY\n")
    return place


def traces(planted):
    return sorted(path.name for path in (planted.parent / "traces").iterdir())


@pytest.fixture
def run_here(planted, tmp_path):
    """Run phireg in the planted directory, with a PATH and a PYTHONPATH that lead there too."""
    script = tmp_path / "phireg"  # as pip writes it
    script.write_text(f"#!{sys.executable}\nfrom phireg.__main__ import main\nmain()\n")
    script.chmod(0o755)
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env |= {"PATH": f".::{tmp_path}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}

    def run(*arguments, **variables):
        words = [script, *map(str, arguments)]
        done = subprocess.run(
            words, cwd=planted, env=env | variables, capture_output=True, text=True, timeout=100
        )
        assert "Traceback" not in done.stderr
        return done

    return run


def test_the_trap_works(planted):
    subprocess.run([sys.executable, "-c", "import torch"], cwd=planted, check=True)
    assert traces(planted) == ["torch"]


def test_scripts_find_nothing_in_the_current_directory(planted):
    """Without -P and PYTHONSAFEPATH too, which Python 3.10 does not know."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    script = "import xxhash, json, importlib.metadata as m; m.version('acme')"
    done = subprocess.run(python_command(script), cwd=planted, env=env, capture_output=True)
    assert b"PackageNotFoundError" in done.stderr
    assert traces(planted) == []


def test_paths_to_modules_are_absolute(planted, monkeypatch):
    monkeypatch.chdir(planted)
    monkeypatch.setenv("PYTHONPATH", f":lib::{planted}/more:")
    assert children.environment()["PYTHONPATH"] == f"{planted}/lib:{planted}/more"
    monkeypatch.setenv("PATH", f"::.:{planted}/bin")
    assert find_program("mpirun") is None


@pytest.fixture
def checkpoint(tmp_path):
    import phireg

    make_tiny_phi3(tmp_path / "model")
    phireg.convert(phireg.plan(tmp_path / "model", tp_size=2), tmp_path / "ckpt")
    return tmp_path / "ckpt"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "doctor",
        "run {ckpt} --tp 2 --device cpu --input-file {prompts}",
        "build {ckpt} --output-dir engine",
        "families --check",
    ],
)
def test_commands_run_nothing_that_is_planted(planted, run_here, checkpoint, command):
    base = checkpoint.parent
    (base / "prompts").write_text('{"input_ids": [1, 2]}\n')
    builder = base / "trtllm-build"
    # Its interpreter is asked, its workers import, and it looks where it is.
    builder.write_text(BUILDER.format(python=sys.executable, record=base / "where"))
    builder.chmod(0o755)
    done = run_here(*command.format(ckpt=checkpoint, prompts=base / "prompts").split())
    assert done.returncode == (7 if command.startswith("build") else 0), done.stderr
    assert traces(planted) == []
    assert "acme" not in done.stdout
    if command.startswith("build"):
        assert (base / "where").read_text() not in (str(planted), "/")


BUILDER = """#!{python}
import os, subprocess, sys
print("[TensorRT-LLM] TensorRT-LLM version: 1.2.1", flush=True)
if "--help" in sys.argv:
    sys.exit(0)
open('{record}', "w").write(os.getcwd())
subprocess.run([sys.executable, "-c", "import torch"])
sys.exit(1)
"""


def test_a_module_of_the_current_directory_is_none_of_phiregs(planted):
    """``python -m`` puts the directory first; phireg takes it out before it imports others."""
    (planted / "typing.py").unlink()
    (planted / "phireg.py").unlink()
    command = [sys.executable, "-m", "phireg", "families"]
    done = subprocess.run(command, cwd=planted, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert traces(planted) == []


def sleeper(seconds):
    return f"import time; time.sleep({seconds})"


def test_a_query_ends_in_time_and_takes_its_children_along(tmp_path):
    script = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {sleeper(60)!r}])
print(child.pid, flush=True)
{{}}
"""
    started = time.monotonic()
    code, output = query(python_command(script.format("")), 30)
    assert code == 0
    assert ends(int(output))
    assert query(python_command(script.format(sleeper(60))), 0.5)[0] == 124
    assert query(["/nonexistent"], 1)[0] == 126
    assert time.monotonic() - started < 20


def test_a_query_does_not_wait_for_a_daemon():
    """It has left the group, keeps the pipe and floods it."""
    script = """
import os, sys
if os.fork() == 0:
    os.setsid()
    try:
        while True:
            os.write(1, b"x" * 65536)
    except OSError:
        os._exit(0)
print("done", flush=True)
"""
    code, output = query(python_command(script), 30)
    assert code == 0
    assert len(output) <= 2**20


# Calls


def test_a_call_returns_text():
    assert call(lambda: "Straße\x00" * 1000, seconds=30) == "Straße\x00" * 1000


class UnprintableError(Exception):
    def __str__(self):
        raise SystemExit


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda: fail(KeyError("key")), "KeyError: 'key'"),
        (lambda: fail(KeyboardInterrupt("own")), "KeyboardInterrupt: own"),
        (lambda: fail(UnprintableError()), "UnprintableError"),
        (lambda: os._exit(0), "code 0"),
        (lambda: os._exit(9), "code 9"),
        (lambda: os.kill(os.getpid(), 9), "signal 9"),
        (lambda: "\ud800", "UnicodeEncodeError"),
        (lambda: "x" * 2**21, "bytes"),
        (lambda: "x" * 2**40, "memory"),
        (lambda: time.sleep(60), "more than 0.5 s"),
        (lambda: (os.fork() == 0 and time.sleep(60)) or "parent", None),
    ],
)
def test_what_a_call_does_stays_in_its_process(function, says):
    started, before = time.monotonic(), own_children()
    if says is None:
        assert call(function, seconds=30) == "parent"
    else:
        with pytest.raises(ChildError, match=says):
            call(function, seconds=0.5 if "0.5" in says else 30, memory=2**28)
    assert time.monotonic() - started < 20
    assert own_children() <= before  # no zombie is left


def own_children():
    """Processes that this one started and has not waited for."""
    lists = Path("/proc/self/task").glob("*/children")
    return {pid for path in lists for pid in path.read_text().split()}


def test_half_an_answer_is_none(monkeypatch):
    write = os.write

    def die(pipe, content):
        write(pipe, content[:2])
        os._exit(3)

    monkeypatch.setattr(os, "write", die)
    with pytest.raises(ChildError, match="3"):
        call(lambda: "a whole text", seconds=20)
