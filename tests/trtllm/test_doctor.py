"""phireg doctor on simulated machines that have, lack, or have broken parts."""

import json
import sys
from importlib import metadata

import pytest
from helpers.command_line import run_phireg

from phireg import doctor


class Machine:
    """A simulated machine: programs on PATH, installed distributions, outcomes of imports."""

    def __init__(self, directory, monkeypatch):
        self.directory = directory
        self.versions = {"rouge-score": "0.1.2"}
        self.imports = {}
        monkeypatch.setenv("PATH", str(directory))
        monkeypatch.setattr(metadata, "version", self.version)
        self.really_query = doctor.query
        monkeypatch.setattr(doctor, "query", self.query)

    def version(self, name):
        if name not in self.versions:
            raise metadata.PackageNotFoundError(name)
        return self.versions[name]

    def query(self, command, seconds):
        """Run programs, but answer for interpreters from ``imports``."""
        if command[0] != sys.executable:
            return self.really_query(command, seconds)
        for word, answer in self.imports.items():
            if word in command[-1]:
                return answer
        raise AssertionError(command)

    def has_native(self, backend, version, gpus, problem=None):
        answer = {"problem": problem, "version": version, "gpus": gpus}
        self.imports[f"load_package({backend!r})"] = (0, json.dumps(answer))

    def program(self, name, script):
        path = self.directory / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def parts(self):
        return {part.name: part for part in doctor.examine()}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    simulated = Machine(tmp_path, monkeypatch)
    simulated.versions["torch"] = "2.9.1"
    torch = {"version": "2.9.1", "cuda": "13.0", "available": True}
    simulated.imports["has_kernels"] = (0, json.dumps({"available": True, "warnings": ""}))
    simulated.imports["torch"] = (0, json.dumps(torch))
    return simulated


def test_a_machine_with_everything(machine):
    machine.versions |= {"tensorrt": "10.14", "tensorrt_llm": "1.2.1", "datasets": "3.1.0",
                         "nvidia-modelopt": "0.37.0"}  # fmt: skip
    machine.imports["tensorrt_llm"] = (0, "[TensorRT-LLM] TensorRT-LLM version: 1.2.1\n")
    machine.versions["tensorrt_rtx_cu13_bindings"] = "1.7.1"
    machine.has_native("tensorrt", "11.4", [])
    machine.has_native("tensorrt-rtx", "1.7.1", ["sm89"])
    machine.program("nvidia-smi", "echo 'NVIDIA H200, 143771 MiB, 9.0, 580.82.07'")
    machine.program("mpirun", "echo 'mpirun (Open MPI) 4.1.7'; echo; echo Report bugs")
    machine.program("trtllm-build", "echo '[TensorRT-LLM] TensorRT-LLM version: 1.2.1'")
    parts = machine.parts()
    wrong = {part for part in parts.values() if part.state != doctor.OK and part.name != "disk"}
    assert wrong == set()
    versions = {"GPU": "NVIDIA H200", "driver": "580.82.07", "MPI": "4.1.7", "CUDA": "13.0",
                "tensorrt_llm": "1.2.1", "trtllm-build": "1.2.1", "tensorrt": "11.4",
                "tensorrt-rtx": "sm89"}  # fmt: skip
    for name, version in versions.items():
        assert version in parts[name].found


def test_a_machine_with_nothing(machine):
    machine.versions.clear()
    parts = machine.parts()
    missing = {name for name, part in parts.items() if part.state == doctor.MISSING}
    assert missing == {
        "torch", "GPU", "driver", "MPI", "tensorrt", "tensorrt-rtx", "tensorrt_llm", "trtllm-build",
        "modelopt", "datasets", "rouge-score",
    }  # fmt: skip
    for name in missing:
        assert parts[name].prevents, name
        assert parts[name].remedy, name
    assert parts["tensorrt_llm"].remedy == "pip install tensorrt_llm==1.2.1"
    assert parts["MPI"].remedy == "apt-get install openmpi-bin libopenmpi-dev"


def test_a_release_without_engine_backend(machine):
    version = "1.3.0rc21"
    machine.versions["tensorrt_llm"] = version
    machine.program("trtllm-build", f"echo '[TensorRT-LLM] TensorRT-LLM version: {version}'")
    parts = machine.parts()
    for name in ("tensorrt_llm", "trtllm-build"):
        assert parts[name].state == doctor.UNSUITABLE
        assert version in parts[name].found
        assert "pip install tensorrt_llm==1.2.1" in parts[name].remedy


def test_a_tensorrt_that_cannot_be_used(machine):
    machine.versions |= {"tensorrt": "8.6", "tensorrt_rtx_cu13_bindings": "1.7.1"}
    machine.has_native("tensorrt", None, [], "TensorRT 8.6 is too old")
    machine.imports["load_package('tensorrt-rtx')"] = (-11, "")
    parts = machine.parts()
    assert (parts["tensorrt"].state, parts["tensorrt"].found) == (
        doctor.UNSUITABLE,
        "TensorRT 8.6 is too old",
    )
    assert parts["tensorrt-rtx"].state == doctor.BROKEN
    assert parts["tensorrt-rtx"].remedy == "pip install 'phireg[rtx]' --force-reinstall"


def test_a_package_that_cannot_be_imported_is_broken(machine):
    machine.versions["tensorrt_llm"] = "1.2.1"
    lost = "ImportError: libmpi.so.40: cannot open shared object file"
    machine.imports["tensorrt_llm"] = (1, f"Traceback\n{lost}\n")
    machine.imports["torch"] = (-11, "")
    parts = machine.parts()
    assert parts["tensorrt_llm"].state == doctor.BROKEN
    assert lost in parts["tensorrt_llm"].found
    assert parts["torch"].state == doctor.BROKEN
    assert parts["plugins"].state == doctor.OK  # nothing else suffers


@pytest.mark.parametrize(("cuda", "state"), [(None, doctor.MISSING), ("13.0", doctor.BROKEN)])
def test_torch_without_a_gpu(machine, cuda, state):
    torch = {"version": "2.9.1", "cuda": cuda, "available": False}
    machine.imports["torch"] = (0, f"a warning\n{json.dumps(torch)}\n")
    assert machine.parts()["CUDA"].state == state


def test_a_gpu_without_a_compiler(machine):
    answer = json.dumps({"available": False, "warnings": "no C compiler"})
    for outcome in ((0, answer), (1, "Error: no C compiler\n")):
        machine.imports["has_kernels"] = outcome
        part = machine.parts()["GPU kernels"]
        assert part.state == doctor.BROKEN
        assert "no C compiler" in part.found


def test_programs_that_fail(machine):
    machine.program(
        "nvidia-smi", "echo 'Failed to initialize NVML: Driver/library mismatch'; exit 18"
    )
    machine.program("mpirun", "echo 'no orted'; exit 1")
    machine.program("trtllm-build", "exit 1")
    parts = machine.parts()
    for name in ("GPU", "driver", "MPI", "trtllm-build"):
        assert parts[name].state == doctor.BROKEN, name
    assert "Driver/library mismatch" in parts["GPU"].found


def test_a_check_that_breaks_hides_nothing(machine, monkeypatch):
    def broken():
        raise ZeroDivisionError("no")
        yield

    monkeypatch.setitem(doctor.CHECKS, "GPU", broken)
    monkeypatch.setattr(doctor, "_LITTLE_DISK", 10**18)
    parts = machine.parts()
    assert parts["GPU"].state == doctor.BROKEN
    assert "ZeroDivisionError" in parts["GPU"].found
    assert parts["disk"].state == doctor.UNSUITABLE


def test_the_command(machine):
    machine.versions["tensorrt_llm"] = "0.9.0"
    shown = run_phireg("doctor")
    assert shown.exit_code == 0
    assert "pip install tensorrt_llm==1.2.1" in shown.output
    parts = json.loads(run_phireg("doctor", "--json").output)["parts"]
    assert [part["name"] for part in parts][:3] == ["Python", "torch", "CUDA"]
    assert {part["state"] for part in parts} <= {"ok", "missing", "broken", "unsuitable"}


@pytest.mark.slow
def test_the_real_interpreter_answers():
    """The code that asks torch works on the torch that is here."""
    torch, cuda = tuple(doctor._torch())[:2]  # a GPU is a part of its own
    assert torch.state == doctor.OK
    assert torch.found.startswith(metadata.version("torch"))  # a CUDA build adds "+cu130"
    assert cuda.name == "CUDA"
