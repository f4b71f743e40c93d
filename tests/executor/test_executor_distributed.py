"""One process per rank, each with its own rank file, against the source model."""

import shutil

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from quantized_sources import written
from tiny_sources import (
    phi3,
    phi3_small,
    random_ids,
    reference_logits,
    relative_error,
    write_checkpoint,
)

from phireg.executor import generate, load


def _rank(rank, directory, models, ids, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2
    )
    for name in models:
        executor = load(directory / name / str(rank), distributed=True)
        torch.save(executor(ids), f"{results}/{name}-{rank}.pt")
        torch.save(generate(executor, ids.tolist(), 3), f"{results}/{name}-{rank}-tokens.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_source_models_logits(tmp_path):
    models = {"phi3": phi3(num_key_value_heads=2), "small": phi3_small()}
    ids = random_ids(models["phi3"], 2, 60)
    for name, model in models.items():
        whole = tmp_path / name
        whole.mkdir()
        write_checkpoint(model, whole, 2)
        for rank in range(2):  # a process sees no other rank's file
            (whole / str(rank)).mkdir()
            shutil.copy(whole / "config.json", whole / str(rank))
            shutil.move(whole / f"rank{rank}.safetensors", whole / str(rank))
    mp.spawn(_rank, (tmp_path, list(models), ids, tmp_path), nprocs=2)
    for name, model in models.items():
        expected = reference_logits(model, ids)
        for rank in range(2):
            actual = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            assert relative_error(actual, expected) < 1e-4
            tokens = torch.load(tmp_path / f"{name}-{rank}-tokens.pt", weights_only=True)
            for row, new in zip(ids, tokens, strict=True):
                for count, token in enumerate(new):
                    so_far = torch.cat((row, torch.tensor(new[:count], dtype=torch.int64)))
                    assert reference_logits(model, so_far[None])[0, -1].argmax() == token


def _quantized_rank(rank, directory, ids):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2
    )
    for name in ("fp8", "int8_sq"):
        executor, inputs = load(directory / name, distributed=True), {}

        def keep(layer, linear, x, inputs=inputs):
            inputs[layer, linear] = x

        logits = executor(ids, None, keep)
        tokens = generate(executor, ids.tolist(), 3)
        torch.save((logits, inputs, tokens), directory / f"{name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_run_quantized_ranks_as_one_does(tmp_path):
    model = phi3(num_hidden_layers=2, num_key_value_heads=2)
    ids = random_ids(model, 2, 20)
    for name, kv in (("fp8", "int8"), ("int8_sq", "fp8")):
        written(model, tmp_path / name, ids[0], name, kv, 2)
    mp.spawn(_quantized_rank, (tmp_path, ids), nprocs=2)
    for name in ("fp8", "int8_sq"):
        executor, expected = load(tmp_path / name), {}

        def keep(layer, linear, x, expected=expected):
            expected[layer, linear] = x

        logits = executor(ids, None, keep)
        for rank in range(2):
            actual = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            assert relative_error(actual[0], logits) < 1e-5
            assert actual[1].keys() == expected.keys()
            for place, value in actual[1].items():
                assert relative_error(value, expected[place]) < 1e-5, place
            assert actual[2] == generate(executor, ids.tolist(), 3)
