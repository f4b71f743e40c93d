"""The tensorrt-llm backend on a stand-in with the documented interface; see fake_trtllm.py."""

import importlib
import json
import math
import os
import sys
from pathlib import Path

import pytest
from fake_trtllm import VOCAB, continued, engine, install, next_token
from helpers.command_line import run_phireg
from helpers.forks import Fork

from phireg.errors import CheckError, PhiregError, UsageError
from phireg.executor import Sampling
from phireg.generation import Request, describe, open_backend, opener
from phireg.generation.mpi import communicator

ROOT = Path(__file__).parents[2]
GREEDY = Sampling()
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6], [7]]
VARIABLES = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE")
VARIABLES += ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "RANK", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """Neither started by anything, nor with another test's packages."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("FAKE_COMM", str(tmp_path))
    yield
    for name in [n for n in sys.modules if n.split(".")[0] in ("tensorrt_llm", "mpi4py")]:
        del sys.modules[name]


@pytest.fixture
def fake(monkeypatch, tmp_path):
    def use(release="0.17.0.post1", **options):
        monkeypatch.syspath_prepend(str(install(tmp_path / "site", release, **options)))
        importlib.invalidate_caches()

    return use


def log(tmp_path, call="generate"):
    lines = map(json.loads, (tmp_path / "log").read_text().splitlines())
    return [line for line in lines if line["call"].endswith(call)]


def test_greedy_batches_and_stop_ids(fake, tmp_path, capfd):
    fake()
    directory = engine(tmp_path / "engine")
    free = [continued(prompt, 8) for prompt in PROMPTS]
    stops = {free[0][3], free[1][5]}
    expected = [continued(prompt, 8, stops) for prompt in PROMPTS]
    assert expected != free
    with open_backend("tensorrt-llm", directory) as backend:
        facts = backend.name, backend.device, backend.dtype, backend.processes
        assert facts == ("tensorrt-llm", "cuda", "float16", 1)
        assert backend.generate(Request(PROMPTS, 8, (), GREEDY)) == free
        assert backend.generate(Request(PROMPTS, 8, stops, GREEDY)) == expected
        steps = list(backend.stream(Request(PROMPTS, 8, stops, GREEDY)))
        assert backend.mean_nll([[1]], [[2]]) is None
    for index, tokens in enumerate(expected):
        row = [step[index] for step in steps if step[index] is not None]
        assert row[: len(tokens)] == tokens
        assert len(row) == 8 or (len(row) == len(tokens) + 1 and row[-1] in stops)
    first, second, third = log(tmp_path)
    greedy = {"temperature": 1.0, "top_k": 1, "top_p": 0.0, "num_beams": 1, "random_seed": 0}
    assert greedy.items() <= first.items()
    assert (first["end_id"], first["stop_words_list"]) == (-1, None)
    low, high = sorted(stops)
    assert (second["end_id"], second["stop_words_list"]) == (low, [[[high]]] * 3)
    assert (second["streaming"], third["streaming"]) == (False, True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "noise of C++" in err


def test_sampling_and_beams(fake, tmp_path):
    fake()
    with open_backend("tensorrt-llm", engine(tmp_path / "engine")) as backend:
        backend.generate(Request([[1, 2]], 3, (), Sampling(0.7, 5, 0.9, 11)))
        assert backend.generate(Request([[1, 2], [3]], 3, (), GREEDY, 2)) == [
            continued([1, 2], 3),
            continued([3], 3),
        ]
        for beams, sampling in ((4, GREEDY), (2, Sampling(1.0))):
            with pytest.raises(UsageError):
                backend.generate(Request([[1]], 3, (), sampling, beams))
    drawn, searched = log(tmp_path)
    options = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "random_seed": 11}
    assert options.items() <= drawn.items()
    assert {"num_beams": 2, "length_penalty": 1.0, "early_stopping": 1}.items() <= searched.items()


def test_likelihood_from_context_logits(fake, tmp_path):
    fake()
    directory = engine(tmp_path / "engine", gather_context_logits=True)
    likely = continued([3, 1, 4], 4)
    unlikely = [(next_token([7]) + 1) % VOCAB]
    norm = math.log(math.exp(3) + VOCAB - 1)
    with open_backend("tensorrt-llm", directory) as backend:
        means = backend.mean_nll([[3, 1, 4], [7]], [likely, unlikely])
        assert means == pytest.approx([norm - 3, norm], rel=1e-3)
        mixed = backend.mean_nll([[3, 1, 4]], [[*likely[:3], (likely[3] + 1) % VOCAB]])
        assert mixed == pytest.approx([norm - 3 * 3 / 4], rel=1e-3)
        with pytest.raises(UsageError, match="20"):
            backend.mean_nll([[1] * 15], [[1] * 6])


PAGED = {"gpt_attention_plugin": "auto", "remove_input_padding": True, "paged_kv_cache": True}
ACCUMULATES = "enable_context_fmha_fp32_acc"


@pytest.mark.parametrize(
    ("release", "options", "build", "kind", "accumulates"),
    [
        ("0.17.0", {ACCUMULATES: True}, {}, "ModelRunnerCpp", True),
        ("0.11.0", None, {}, "ModelRunnerCpp", "no"),
        ("0.17.0", None, {"kv_cache_type": "CONTINUOUS"}, "ModelRunner", None),
        ("0.17.0", {ACCUMULATES: False}, {"plugin_config": {}}, "ModelRunner", 0),
        ("0.12.0", None, {"kv_cache_type": None, "plugin_config": PAGED}, "ModelRunnerCpp", None),
    ],
)
def test_runner_and_its_options(release, options, build, kind, accumulates, fake, tmp_path):
    fake(release)
    directory = engine(tmp_path / "engine", run_options=options, **build)
    stops = {continued([3, 1], 9)[4], 49}
    with open_backend("tensorrt-llm", directory) as backend:
        tokens = backend.generate(Request([[3, 1]], 9, stops, GREEDY))
    assert tokens == [continued([3, 1], 9, stops)]
    (loaded,) = log(tmp_path, "from_dir")
    assert (loaded["call"], loaded["fp32"]) == (f"{kind}.from_dir", accumulates)
    # 0.11 has another shape of stop words
    assert (log(tmp_path)[0]["stop_words_list"] is None) == (release == "0.11.0")


def test_refusals_of_the_backend(fake, tmp_path, monkeypatch):
    directory = engine(tmp_path / "engine")
    with pytest.raises(PhiregError):  # not installed
        open_backend("tensorrt-llm", directory).__enter__()
    fake()
    monkeypatch.setenv("FAKE_REFUSES", "1")
    with pytest.raises(CheckError, match="version mismatch"):
        open_backend("tensorrt-llm", directory).__enter__()
    monkeypatch.delenv("FAKE_REFUSES")
    with open_backend("tensorrt-llm", directory) as backend:
        too_long, too_many, too_far = [[1] * 21], [[1]] * 5, [[1] * 20]
        for prompts, count in ((too_long, 2), (too_many, 2), (too_far, 13), ([[VOCAB]], 2)):
            with pytest.raises(UsageError):
                backend.generate(Request(prompts, count, (), GREEDY))
        monkeypatch.setenv("FAKE_FAILS", "1")
        for call in (backend.generate, lambda request: list(backend.stream(request))):
            with pytest.raises(PhiregError, match="out of pages"):
                call(Request([[1]], 2, (), GREEDY))
    (directory / "rank0.engine").unlink()
    with pytest.raises(PhiregError, match=r"rank0\.engine"):
        describe("tensorrt-llm", directory)


def test_a_release_without_runtime(fake, tmp_path):
    fake("1.4.0", engines=False)
    directory = engine(tmp_path / "engine")
    with pytest.raises(PhiregError, match=r"1\.3\.0rc20"):
        open_backend("tensorrt-llm", directory).__enter__()
    path = tmp_path / "site" / "tensorrt_llm" / "runtime.py"
    path.write_text("raise OSError('libnvinfer.so.10: cannot open')")
    importlib.invalidate_caches()
    with pytest.raises(PhiregError, match="libnvinfer"):
        open_backend("tensorrt-llm", directory).__enter__()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, (1, 2)),
        ({"PMI_RANK": "3", "PMI_SIZE": "4"}, (3, 4)),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, (0, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, (0, 1)),  # a batch script, not srun
    ],
)
def test_ranks(variables, expected, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert opener("tensorrt-llm").process_rank() == expected


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("x", "2"), ("-1", "1")])
def test_variables_that_are_no_ranks(rank, size, monkeypatch):
    monkeypatch.setenv("PMI_RANK", rank)
    monkeypatch.setenv("PMI_SIZE", size)
    with pytest.raises(UsageError, match="PMI_RANK"):
        opener("tensorrt-llm").process_rank()


def test_mpi_that_disagrees_or_is_missing(fake, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # an import fails, even if it is installed
    with pytest.raises(PhiregError, match="pip install mpi4py"):
        communicator()
    monkeypatch.delitem(sys.modules, "mpi4py")
    fake()
    monkeypatch.setenv("FAKE_WORLD", "-1")
    with pytest.raises(PhiregError, match="rank 0 of 1"):
        communicator()


# phireg run


def phireg(*args):
    return run_phireg("run", *args)


def ids_file(tmp_path, rows=PROMPTS):
    path = tmp_path / "ids.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


def test_run_takes_an_engine_by_itself(fake, tmp_path):
    fake()
    directory = engine(tmp_path / "engine")
    flags = ("--input-file", ids_file(tmp_path), "--max_output_len", 6, "--json")
    for arguments in ((directory,), ("--engine_dir", directory)):
        result = phireg(*arguments, *flags)
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        assert [row["tokens"] for row in document["results"]] == [continued(p, 6) for p in PROMPTS]
        assert (document["backend"], document["engine_dir"]) == ("tensorrt-llm", str(directory))
        assert (document["checkpoint_dir"], document["model_dir"]) == (None, None)
        assert (document["tp_size"], document["processes"], document["num_beams"]) == (1, 1, 1)
    document = json.loads(phireg(directory, *flags, "--num_beams", 2).stdout)
    assert [row["tokens"] for row in document["results"]] == [continued(p, 6) for p in PROMPTS]
    assert document["num_beams"] == 2
    # a batch is no larger than the engine takes
    many = ids_file(tmp_path, [[n + 1] for n in range(9)])
    document = json.loads(phireg(directory, "--input-file", many, *flags[2:]).stdout)
    assert [batch["prompts"] for batch in document["batches"]] == [4, 4, 1]


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--dtype", "fp16"], "--dtype"),
        (["--offload"], "--offload"),
        (["--device", "cpu"], "--device cpu"),
        (["--device", "cuda:1"], "CUDA_VISIBLE_DEVICES"),
        (["--tp", "1"], "--tp"),
        (["--batch-size", "5"], "--batch-size 4"),
        (["--num-beams", "4"], "3"),
        (["--num-beams", "2", "--temperature", "1"], "beam"),
        (["--num-beams", "2", "--streaming"], "--streaming"),
        (["--max-new-tokens", "30"], "32"),
        (["--backend", "executor"], "engine"),
        (["--backend", "hf"], "engine"),
        (["--backend", "vllm"], "vllm"),
    ],
)
def test_run_refuses_what_an_engine_cannot_do(flags, names, tmp_path):
    file = ids_file(tmp_path)
    result = phireg(engine(tmp_path / "engine"), "--input-file", file, *flags)
    assert result.exit_code in (2, 3)
    assert names in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_run_says_what_starts_an_engine_of_two_ranks(fake, tmp_path, monkeypatch):
    fake()
    directory, file = engine(tmp_path / "engine", ranks=2), ids_file(tmp_path)
    for flags in ((), ("--tp", 2)):
        result = phireg(directory, "--input-file", file, *flags)
        assert result.exit_code == 2
        assert f"mpirun -n 2 phireg run {directory}" in " ".join(result.stderr.split())
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = phireg(directory, "--input-file", file)
    assert (result.exit_code, "started by torchrun" in result.stderr) == (2, True)
    monkeypatch.setenv("RANK", "1")
    result = phireg(directory, "--input-file", file)
    assert (result.exit_code, result.output) == (0, "")


def mpirun(tmp_path, *args, stdin=b"", **more):
    """Run phireg in two processes as mpirun does; rank 0 alone gets the input."""
    env = os.environ | {"OMPI_COMM_WORLD_SIZE": "2", **more}
    forks = [
        Fork(
            ("run", *args),
            environment=env | {"OMPI_COMM_WORLD_RANK": str(rank)},
            path=[tmp_path / "site"],
            stdin=b"" if rank else stdin,
        )
        for rank in range(2)
    ]
    return [(ran.stdout, ran.stderr, ran.returncode) for ran in [fork.wait() for fork in forks]]


@pytest.mark.parametrize("paged", ["PAGED", "CONTINUOUS"])
def test_two_processes(paged, tmp_path):
    install(tmp_path / "site")
    directory = engine(tmp_path / "engine", ranks=2, paged=paged)
    lines = b"".join(json.dumps({"input_ids": row}).encode() + b"\n" for row in PROMPTS)
    flags = ("--input-file", "-", "--max-new-tokens", 5, "--batch-size", 2, "--json")
    (out, err, code), (nothing, _, other) = mpirun(tmp_path, directory, *flags, stdin=lines)
    assert (code, other, nothing) == (0, 0, b""), err
    document = json.loads(out)
    assert [row["tokens"] for row in document["results"]] == [continued(p, 5) for p in PROMPTS]
    assert (document["tp_size"], document["processes"]) == (2, 2)
    assert sorted(line["rank"] for line in log(tmp_path, "from_dir")) == [0, 1]
    # both ranks generate, batch by batch; a ModelRunner's other ranks with the same arguments
    calls = [[c for c in log(tmp_path) if c["rank"] == rank] for rank in (0, 1)]
    assert [len(of_rank) for of_rank in calls] == [2, 2]
    if paged == "CONTINUOUS":
        assert [call | {"rank": 0} for call in calls[1]] == calls[0]


def test_two_processes_that_fail_together(tmp_path):
    install(tmp_path / "site")
    file = ids_file(tmp_path)
    single = engine(tmp_path / "one", ranks=1)
    (_, err, code), (nothing, quiet, _) = mpirun(tmp_path, single, "--input-file", file)
    assert code == 2
    assert b"2 processes were started" in err
    assert b"mpirun -n 1" in err
    assert (nothing, quiet) == (b"", b"")
    two = engine(tmp_path / "two", ranks=2)
    flags = (two, "--input-file", file, "--max-new-tokens", 3)
    (_, err, code), (nothing, _, other) = mpirun(tmp_path, *flags, FAKE_FAILS="1")
    assert (code, nothing) == (1, b"")
    assert b"out of pages" in err
    assert b"Traceback" not in err
    assert other != 0  # it does not wait for ever


def test_mpirun_is_not_for_the_executor(tmp_path):
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "config.json").write_text('{"architecture": "PhiForCausalLM"}')
    arguments = (tmp_path / "ckpt", "--prompt", "x")
    (_, err, code), (nothing, quiet, other) = mpirun(tmp_path, *arguments)
    assert (code, other, nothing, quiet) == (2, 0, b"", b"")
    assert b"torchrun --nproc-per-node" in err
