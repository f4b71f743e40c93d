"""One process per rank, each with its own rank file, against one process and the source model."""

import shutil

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from checkpoints_by_hand import (
    random_ids,
    reference_logits,
    relative_error,
    write_checkpoint,
    written,
)
from helpers.tiny_models import phi3, phi3_small

from phireg.executor import generate, load


def results(executor, ids):
    """Logits, the linears' inputs, and greedy tokens."""
    inputs = {}
    logits = executor(ids, None, lambda layer, name, x: inputs.update({(layer, name): x}))
    return logits, inputs, generate(executor, ids.tolist(), 3)


def _rank(rank, directory, names, ids):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2
    )
    for name in names:
        executor = load(directory / name / f"only{rank}", distributed=True)
        torch.save(results(executor, ids), directory / f"{name}-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_compute_what_one_does(tmp_path):
    plain = {"phi3": phi3(num_key_value_heads=2), "small": phi3_small()}
    quantized = {"fp8": "int8", "int8_sq": "fp8"}
    names = [*plain, *quantized]
    ids = random_ids(plain["phi3"], 2, 60)
    for name, model in plain.items():
        (tmp_path / name).mkdir()
        write_checkpoint(model, tmp_path / name, 2)
    for scheme, kv in quantized.items():
        written(phi3(num_hidden_layers=2), tmp_path / scheme, ids[0], scheme, kv, 2)
    for name in names:
        for rank in range(2):  # a process sees no other rank's file
            own = tmp_path / name / f"only{rank}"
            own.mkdir()
            for file in ("config.json", f"rank{rank}.safetensors"):
                shutil.copy(tmp_path / name / file, own)
    mp.start_processes(_rank, (tmp_path, names, ids), nprocs=2, start_method="fork")
    for name in names:
        logits, inputs, tokens = results(load(tmp_path / name), ids)
        for rank in range(2):
            actual = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            assert relative_error(actual[0], logits) < 1e-5
            assert actual[1].keys() == inputs.keys()
            for place, value in actual[1].items():
                assert relative_error(value, inputs[place]) < 1e-5, place
            assert actual[2] == tokens
            if name in plain:
                assert relative_error(actual[0], reference_logits(plain[name], ids)) < 1e-4
