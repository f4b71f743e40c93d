"""Processes of their own: one per rank, a terminal, signals."""

import json
import os
import pty
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.forks import Fork, become_phireg
from helpers.tokenized_models import continuation, converted
from torch.multiprocessing import start_processes

from phireg.executor import Sampling
from phireg.generation import Options, Request, open_backend, opener

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
TORCHRUN += ("--nproc-per-node", "2", "-m", "phireg")


def spawn(*words, stdin=b"", **variables):
    """Phireg in a process of its own, which starts others as it does anywhere."""
    return Fork((*words, "--device", "cpu"), environment=ENV | variables, stdin=stdin)


def torchruns():
    """The environment variables of both processes of a torchrun with two."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]


def test_a_process_for_each_rank(models):
    it = models("phi3-small")
    flags = ("--prompt", "The engine", "--prompt", "Wer", "--max-new-tokens", 10, "--batch-size", 1)
    words = ("run", it.checkpoint, *flags, "--device", "cpu", "--json")
    ran = subprocess.run([*TORCHRUN, *map(str, words)], env=ENV, capture_output=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    output = json.loads(ran.stdout)  # one document: only rank 0 prints
    expected = [
        continuation(it.model, it.tokenizer, prompt, 10, it.tokenizer.eos_token_id)
        for prompt in ("The engine", "Wer")
    ]
    assert [(row["tokens"], row["text"]) for row in output["results"]] == expected
    assert (output["tp_size"], output["processes"]) == (2, 2)


def test_a_chat_of_two_processes(models):
    it = models("phi3")
    flags = ("--chat", "--max-new-tokens", 6, "--temperature", 0.8)
    both, alone = (
        spawn("run", it.checkpoint, *flags, *tp, stdin=b"Wer?\nWhy?\n/exit\n").wait()
        for tp in (("--tp", 2), ())
    )
    assert (both.returncode, both.stderr) == (0, b"")
    assert both.stdout == alone.stdout
    assert len(both.stdout.split(b"\n")) >= 3


def test_errors_of_processes_come_once_and_keep_their_code(models, tmp_path):
    it = models("phi3")
    refused = spawn("run", it.checkpoint, "--tp", 2, "--prompt", "word " * 200).wait()
    assert refused.returncode == 2
    assert refused.stderr.count(b"exceed the model's") == 1
    assert b"Traceback" not in refused.stderr
    four = converted(it.source, tmp_path / "four", 4)
    ranks = [spawn("run", four, "--prompt", "x", **variables) for variables in torchruns()]
    first = ranks[0].wait()
    os.kill(ranks[1].process, signal.SIGTERM)  # as torchrun does: it waits for the first
    second = ranks[1].wait()
    assert first.returncode != 0
    assert (first.stderr + second.stderr).count(b"2 processes were started") == 1
    assert b"torchrun --nproc-per-node 4" in first.stderr


REQUESTS = [[5, 6, 7], [9]], [[1, 2], [3, 4, 5]]


def _likelihoods(rank, variables, directory, ckpt):
    torch.set_num_threads(1)
    os.environ.update(variables[rank])
    options = Options("cpu", "float32")
    if rank:
        opener("executor").run_worker(ckpt, options)
    else:
        with open_backend("executor", ckpt, options) as backend:
            rows = backend.generate(Request(REQUESTS[0], 4, (), Sampling()))
            nll = backend.mean_nll(*REQUESTS)
            rows += backend.generate(Request([[9]], 4, (), Sampling()))
        (directory / "leader.json").write_text(json.dumps([rows, nll, backend.processes]))


def test_likelihoods_of_two_processes(models, tmp_path):
    ckpt = models("phi3-small").checkpoint
    start_processes(_likelihoods, (torchruns(), tmp_path, ckpt), nprocs=2, start_method="fork")
    rows, nll, processes = json.loads((tmp_path / "leader.json").read_text())
    with open_backend("executor", ckpt, Options("cpu", "float32")) as alone:
        expected = alone.generate(Request(REQUESTS[0], 4, (), Sampling()))
        assert rows == [*expected, expected[1]]
        assert nll == pytest.approx(alone.mean_nll(*REQUESTS), rel=1e-5)
    assert processes == 2


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, *words):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            become_phireg(words, ENV | {"TERM": "xterm", "COLUMNS": "80"})
        self.seen = b""

    def until(self, text, seconds=90):
        """Read on until ``text`` has come after what was waited for before."""
        start, end = len(self.seen), time.monotonic() + seconds
        while text not in self.seen[start:]:
            left = end - time.monotonic()
            assert left > 0, self.seen
            if select.select([self.fd], [], [], left)[0]:
                try:
                    self.seen += os.read(self.fd, 4096)
                except OSError:
                    raise AssertionError(self.seen) from None
        return self.seen[start:]

    def type(self, keys):
        os.write(self.fd, keys)

    def code(self):
        """Exit code, once everything has been read."""
        try:
            while block := os.read(self.fd, 4096):
                self.seen += block
        except OSError:
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_chat_at_a_terminal(models):
    terminal = Terminal("run", models("phi3").checkpoint, "--chat", "--device", "cpu")
    terminal.until(b"> ")
    terminal.type("Straße?\n".encode())
    assert b"tokens/s" in terminal.until(b"> ")
    time.sleep(2.1)  # Ctrl-C again at once would be the same wish
    terminal.type(b"half a line\x03")
    terminal.until(b"Ctrl-D leaves\x1b[0m\r\n> ")
    terminal.type(b"\x04")
    assert terminal.code() == 0


def test_nothing_to_continue_at_a_terminal(models):
    terminal = Terminal("run", models("phi3").checkpoint, "--device", "cpu")
    assert terminal.code() == 2
    assert b"there is nothing to continue" in terminal.seen


def test_standard_input_that_is_closed(models):
    words = f"{sys.executable} -m phireg run {models('phi3').checkpoint} <&-"
    ran = subprocess.run(["sh", "-c", words], env=ENV, capture_output=True, timeout=60)
    assert ran.returncode == 2
    assert b"standard input is closed" in ran.stderr


@pytest.mark.parametrize("tp", [(), ("--tp", "2")], ids=["one", "two"])
def test_ctrl_c(tp, models, tmp_path):
    it = models("phi3")
    # More than a terminal's worth of text: there is time for a Ctrl-C in the middle.
    config = json.loads((it.checkpoint / "config.json").read_text())
    slow = tmp_path / "slow"
    slow.mkdir()
    for file in it.checkpoint.iterdir():
        shutil.copy(file, slow)
    (slow / "config.json").unlink()
    (slow / "generation_config.json").unlink()
    (slow / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100_000}))
    flags = ("--prompt", "The engine", "--temperature", "1", "--max-new-tokens", "90000")
    terminal = Terminal("run", slow, *flags, *tp, "--device", "cpu")
    deadline = time.monotonic() + 60
    # Each line that says "loading the model" is shorter, and is wiped out.
    while len(terminal.seen.rpartition(b"\x1b[2K")[2]) < 200 and time.monotonic() < deadline:
        terminal.seen += os.read(terminal.fd, 4096)
    terminal.type(b"\x03")
    assert terminal.code() == 130
    assert b"interrupted; the text is not complete" in terminal.seen
    assert b"Traceback" not in terminal.seen


def test_a_reader_that_leaves(models):
    it = models("phi3")
    flags = ("--max-new-tokens", "250", "--temperature", "1", "--device", "cpu")
    command = [sys.executable, "-m", "phireg", "run", str(it.checkpoint)]
    command += ["--prompt", "The engine", *flags]
    process = subprocess.Popen(
        command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    process.stdout.read(1)
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 141
    assert error == b""
