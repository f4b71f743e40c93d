"""What is left of a model once nothing refers to it; the garbage collector is off."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from checkpoints_by_hand import written
from helpers.tiny_models import phi3, phi3_small

from phireg.executor import Executor, Sampling, generate, load, stream
from phireg.executor.decoder import Decoder
from phireg.generation import Options, Request, open_backend

PROMPT = [[5, 6, 7, 8]]
CPU = torch.device("cpu")
GPU = pytest.param(
    torch.device("cuda"),
    marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A checkpoint of two ranks whose weights are dequantized, and copied, when they are read."""
    model, path = phi3(num_hidden_layers=2), tmp_path_factory.mktemp("memory")
    written(model, path / "checkpoint", torch.arange(30), "fp8", "fp8", 2)
    return path / "checkpoint"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """The same for a source: a model of a class of phireg's own."""
    path = tmp_path_factory.mktemp("source")
    phi3_small(num_hidden_layers=2).save_pretrained(path)
    return path


@pytest.fixture
def no_collection():
    gc.collect()
    gc.freeze()  # what earlier tests left is not looked through again
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


def tensors():
    """All tensors that exist, by identity: referred to, or kept by a cycle."""
    return {id(it): it for it in gc.get_objects() if issubclass(type(it), torch.Tensor)}


def streamed_half(model):
    steps = stream(model, PROMPT, 6)
    next(steps), next(steps)  # and the generator goes


def failed(model):
    """An exception in the middle of the first step, caught and forgotten."""
    gather, calls = Executor.gather, []

    def fail(*arguments):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("planted")
        return gather(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Executor, "gather", fail)
        try:
            generate(model, PROMPT, 6)
        except RuntimeError as error:
            assert "planted" in str(error)
        else:
            raise AssertionError("nothing failed")


def fused(model):
    """By the kernels, which Triton's interpreter runs here."""
    model.decoder = Decoder(model, 1, 64, Sampling(), fused=True)
    model.decoder.prefill(PROMPT, seed=0)
    model.decoder.step()


USES = {
    "forward": lambda model: model(torch.tensor(PROMPT, device=model.device)),
    "sampled": lambda model: generate(model, PROMPT, 6, (), Sampling(0.8, 5, 0.9)),
    "streamed": streamed_half,
    "failed": failed,
    "fused": fused,
    "offloaded": lambda model: generate(model, PROMPT, 6),
}


@pytest.mark.parametrize("device", [CPU, GPU], ids=lambda device: device.type)
@pytest.mark.parametrize("use", USES)
def test_nothing_is_left_of_a_deleted_model(use, device, directory, no_collection):
    on_gpu = device.type == "cuda"
    if use == "fused" and not on_gpu and torch.cuda.is_available():
        pytest.skip("the kernels are those of the GPU here, not the interpreter's")
    first = load(directory, device, offload=use == "offloaded")
    USES[use](first)  # kernels are compiled, and they and libraries keep their workspaces
    del first
    allocated = torch.cuda.memory_allocated() if on_gpu else 0
    before = tensors()
    model = load(directory, device, offload=use == "offloaded")
    USES[use](model)
    assert len(tensors().keys() - before.keys()) > 8  # weights or caches
    parts = [weakref.ref(part) for part in (model, model.decoder) if part is not None]
    assert len(parts) == (1 if use == "forward" else 2)
    del model
    assert [part() for part in parts if part() is not None] == []
    assert [it.shape for key, it in tensors().items() if key not in before] == []
    if use != "fused":  # Triton's interpreter has cycles of its own, with pointers into the file
        assert "rank0.safetensors" not in Path("/proc/self/maps").read_text()
    if on_gpu:
        assert torch.cuda.memory_allocated() == allocated


@pytest.mark.parametrize(("name", "offload"), [("executor", False), ("hf", False), ("hf", True)])
def test_nothing_is_left_of_a_closed_backend(name, offload, directory, mixed, no_collection):
    before = tensors()
    source = directory if name == "executor" else mixed
    with open_backend(name, source, Options("cpu", "float32", offload)) as backend:
        backend.generate(Request(PROMPT, 3, (), Sampling()))
        assert tensors().keys() - before.keys()
    assert [it.shape for key, it in tensors().items() if key not in before] == []
