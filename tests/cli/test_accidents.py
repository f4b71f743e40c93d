"""Kills, signals and full disks leave a complete output or none."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_phi3 import tiny_config, tiny_tensors, write_json
from safetensors.numpy import save_file

from phireg.cli import errors

ROOT = Path(__file__).parents[2]

VICTIM = Path(__file__).with_name("convert_victim.py")
POINTS = 14


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two tensors of two blocks each among small ones: 11 MB."""
    directory = tmp_path_factory.mktemp("accidents") / "model"
    directory.mkdir()
    rows = 90_001
    write_json(directory / "config.json", tiny_config() | {"vocab_size": rows})
    tensors = tiny_tensors()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        values = np.arange(rows * 32, dtype=np.uint32) % 0x7800
        tensors[name] = values.astype(np.uint16).view("f2").reshape(rows, 32)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def convert(model, base, *more):
    return ("convert", "--model-dir", model, "--output-dir", base / "out", "--tp-size", "2", *more)


def run_victim(accident, number, base, *arguments, **options):
    command = [sys.executable, VICTIM, accident, number, base, *arguments]
    options |= {"timeout": 60, "cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)


def listing(base):
    return sorted(path.name for path in base.iterdir() if path.name not in ("moments", "filler"))


def contents(directory):
    return {
        path.name: path.read_bytes() for path in directory.iterdir() if path.name != "phireg.json"
    }


@pytest.fixture(scope="module")
def uninterrupted(model, tmp_path_factory):
    """The moments of a whole conversion, and what it wrote."""
    base = tmp_path_factory.mktemp("uninterrupted")
    done = run_victim("SIGKILL", 0, base, *convert(model, base))
    assert done.returncode == 0, done.stderr
    return (base / "moments").read_text().split("\n"), contents(base / "out")


def spread(moments):
    """Points over the whole run, by bytes written, and each of the last steps."""
    last = 6
    early = np.linspace(1, len(moments) - last, POINTS - last).round().astype(int).tolist()
    return [*early, *range(len(moments) - last + 1, len(moments) + 1)]


@pytest.mark.parametrize(
    "overwrite",
    [pytest.param(False, id="new"), pytest.param(True, id="overwrite", marks=pytest.mark.slow)],
)
def test_kill_9_at_many_points(overwrite, model, uninterrupted, tmp_path, run):
    moments, expected = uninterrupted
    points = spread(moments)
    assert len(set(points)) == POINTS
    assert {moments[point - 1] for point in points} >= {"os.pwrite", "os.fsync", "os.rename"}
    old = {"config.json": b'{"architecture": "Old"}', "rank0.safetensors": b"old"}
    for point in points:
        base = tmp_path / str(point)
        if overwrite:
            (base / "out").mkdir(parents=True)
            for name, data in old.items():
                (base / "out" / name).write_bytes(data)
    arguments = convert(model, tmp_path / "{}", *(["--overwrite"] if overwrite else []))
    killed = run_victim("SIGKILL", ",".join(map(str, points)), tmp_path / "{}", *arguments)
    codes = [int(line) for line in killed.stdout.splitlines()]
    assert codes == [-signal.SIGKILL] * POINTS, killed.stderr
    absent = 0
    for point in points:
        base = tmp_path / str(point)
        # Nothing but the complete output and an unfinished one, which its name tells.
        assert set(listing(base)) <= {"out", "out.phireg-partial"}
        if not (base / "out").exists():
            absent += 1
        elif not overwrite or contents(base / "out") != old:
            assert run("inspect", base / "out", "--check").exit_code == 0
        replace = overwrite or (base / "out").exists()
        again = run(*convert(model, base, *(["--overwrite"] if replace else [])))
        assert again.exit_code == 0, again.output
        assert listing(base) == ["out"]
        assert contents(base / "out") == expected
        assert run("inspect", base / "out", "--check").exit_code == 0
    if not overwrite:
        assert POINTS - 6 <= absent < POINTS


@pytest.mark.parametrize(
    ("name", "code", "at"),
    [("SIGINT", 130, "first"), ("SIGTERM", 143, "middle"), ("SIGINT", 130, "fsync")],
)
def test_signals_leave_nothing(name, code, at, model, uninterrupted, tmp_path):
    moments, _ = uninterrupted
    last_fsync = len(moments) - 1 - moments[::-1].index("os.rename")
    point = {"first": 1, "middle": len(moments) // 2, "fsync": last_fsync}[at]
    stopped = run_victim(name, point, tmp_path / "base", *convert(model, tmp_path / "base"))
    assert stopped.returncode == code, stopped.stderr
    assert stopped.stderr.count("\n") == 1 and "complete" not in stopped.stderr
    assert stopped.stdout == ""
    assert listing(tmp_path / "base") == []


def test_a_signal_after_the_end_does_not_deny_the_output(model, uninterrupted, tmp_path, run):
    moments, expected = uninterrupted
    base = tmp_path / "base"
    stopped = run_victim("SIGINT", len(moments), base, *convert(model, base))
    assert stopped.returncode == 130
    assert "already complete" in stopped.stderr
    assert contents(base / "out") == expected
    assert run("inspect", base / "out", "--check").exit_code == 0


def test_a_background_job_goes_on_ignoring_ctrl_c(model, uninterrupted, tmp_path):
    def ignore():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    base = tmp_path / "base"
    done = run_victim("SIGINT", 30, base, *convert(model, base), preexec_fn=ignore)
    assert done.returncode == 0, done.stderr
    assert listing(base) == ["out"]


def test_file_size_limit(model, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    base = tmp_path / "base"
    done = run_victim("SIGKILL", 10**9, base, *convert(model, base), preexec_fn=limit)
    assert done.returncode == 6, done.stderr
    assert done.stderr.startswith("error: cannot write ")
    assert listing(base) == []


@pytest.fixture
def small_disk(tmp_path):
    mount = tmp_path / "disk"
    mount.mkdir()

    def make(megabytes):
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(mount)]
        try:
            subprocess.run(command, capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a small disk cannot be mounted here: {error}")
        return mount

    yield make
    if mount.is_mount():
        subprocess.run(["umount", str(mount)], check=True)


def test_too_small_a_disk_is_refused_before_writing(model, small_disk, spawn):
    disk = small_disk(20)
    done = spawn(*convert(model, disk))
    assert done.returncode == 6, done.stderr
    assert done.stderr.startswith("error: ")
    assert listing(disk) == []


@pytest.mark.parametrize("part", [0.1, 0.9])
def test_a_disk_that_runs_full_midway(part, model, uninterrupted, small_disk, spawn):
    moments, expected = uninterrupted
    disk = small_disk(48)
    writes = [number for number, name in enumerate(moments, 1) if name == "os.pwrite"]
    done = run_victim("full", writes[int(part * len(writes))], disk, *convert(model, disk))
    assert done.returncode == 6, done.stderr
    assert done.stderr.startswith("error: ")
    assert listing(disk) == []
    (disk / "filler").unlink()
    again = spawn(*convert(model, disk))
    assert again.returncode == 0, again.stderr
    assert contents(disk / "out") == expected


@pytest.mark.parametrize(
    "command",
    [
        "verify {ckpt} --model-dir {model} --report {file}",
        "quantize --model-dir {model} --output-dir {new} --qformat fp8 --report {file}",
        "summarize {ckpt} --report {file}",
        "quantize --model-dir {model} --output-dir {new} --qformat fp8 --calib-stats {link}",
    ],
)
def test_an_output_never_replaces_a_file_of_the_users(command, tiny, tmp_path, run):
    run("convert", "--model-dir", tiny, "--output-dir", tmp_path / "ckpt")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    places = {"ckpt": tmp_path / "ckpt", "model": tiny, "file": tiny / "config.json", "link": link}
    before = (tiny / "config.json").read_bytes()
    words = (word.format(new=tmp_path / "new", **places) for word in command.split())
    done = run(*words)
    assert done.exit_code == 6, done.output
    assert (tiny / "config.json").read_bytes() == before
    assert link.is_symlink() and not link.exists()
    assert not (tmp_path / "new").exists()


def test_an_interrupt_during_a_finalizer_is_not_lost(monkeypatch):
    """Python drops whatever ``__del__`` raises, and modules that are imported run many of these."""

    class Finalized:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(errors, "_last_stop", -errors._PATIENCE_S)
    before = signal.signal(signal.SIGINT, errors.stop)
    try:
        with pytest.raises(errors.Stopped):
            Finalized()
            time.sleep(2)
    finally:
        signal.signal(signal.SIGINT, before)
