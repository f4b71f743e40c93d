"""What the tests of the four families share. It imports no plugin, and knows no mapping."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import phireg
from phireg.config.hf import HFConfig
from phireg.findings import Severity

torch.set_num_threads(1)

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# Source dtype, --dtype, what must come out: auto keeps 16-bit types and narrows float32.
CASTS = [
    ("bfloat16", "auto", "bfloat16"),
    ("float16", "auto", "float16"),
    ("float32", "auto", "float16"),
    ("float32", "bfloat16", "bfloat16"),
    ("float32", "float32", "float32"),
    ("bfloat16", "float16", "float16"),
    ("bfloat16", "float32", "float32"),
    ("float16", "bfloat16", "bfloat16"),
]


# --- configs ---------------------------------------------------------------------------------


def translate(family, config):
    return family.config_fields().translate(HFConfig(config))


def reported(translation, severity=Severity.ERROR):
    """Subjects and details of the findings of one severity."""
    found = {}
    for finding in translation.findings:
        if finding.severity is severity:
            found.setdefault(finding.subject, []).append(finding.detail)
    return {subject: "; ".join(details) for subject, details in found.items()}


def without(mapping, *keys):
    return {key: value for key, value in mapping.items() if key not in keys}


def as_transformers5(config, **rope):
    """The same config with the keys transformers 5 writes instead of 4's."""
    new = without(config, "torch_dtype", "rope_theta", "rope_scaling", "partial_rotary_factor")
    return {**new, "dtype": config["torch_dtype"], "rope_parameters": rope}


def modules_after(plugin, config):
    """What a fresh interpreter has imported once the plugin said everything it has to say."""
    code = f"""
import json, sys
from importlib import import_module
from phireg.api import HFConfig
family = import_module("phireg_plugins.{plugin}").FAMILY
hf = HFConfig(json.loads(sys.stdin.read()))
translation = family.config_fields().translate(hf)
assert translation.ok, translation.findings
assert family.weight_rules(translation.fields, hf)
assert family.quant_rules(translation.fields, "W8A16").linears
print(json.dumps(sorted(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(config),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def assert_stands_alone(plugin, config, *bases):
    modules = modules_after(plugin, config)
    assert not modules & {"torch", "transformers", "numpy", "safetensors"}
    plugins = {name.split(".")[1] for name in modules if name.startswith("phireg_plugins.")}
    assert plugins == {plugin, *bases}


# --- sources ---------------------------------------------------------------------------------


def write_source(directory, config, tensors):
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(
        {n: t.contiguous().clone() for n, t in tensors.items()}, directory / "model.safetensors"
    )
    return directory


def write_sparse(directory, config, shapes, dtype="BF16"):
    """A source of real size without data: a header, and a hole where the tensors would be."""
    size = {"BF16": 2, "F16": 2, "F32": 4}[dtype]
    listing, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + size * math.prod(shape)
        listing[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(listing).encode()
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        os.ftruncate(file.fileno(), 8 + len(header) + end)
    return directory


def randomize(model, dtype, seed=0):
    """Random parameters everywhere: initial norms are ones and initial biases zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.to(DTYPES[dtype])


# --- conversions -----------------------------------------------------------------------------


def convert(source, output, **options):
    plan = phireg.plan(source, **options)
    phireg.convert(plan, output)
    return plan


def errors(source, **options):
    """Error findings as (code, subject), and the text a user reads."""
    plan = phireg.plan(source, **options)
    assert plan.outputs == () and plan.tasks == ()
    return {(f.code, f.subject) for f in plan.errors}, plan.errors


def rank_files(output):
    names = sorted(p.name for p in Path(output).glob("rank*"))
    assert names == sorted(f"rank{rank}.safetensors" for rank in range(len(names)))
    return [(Path(output) / f"rank{rank}.safetensors").read_bytes() for rank in range(len(names))]


def assert_ranks(output, expected, dtype):
    """The rank files are, byte for byte, what safetensors writes for the expected tensors."""
    assert len(list(Path(output).glob("rank*"))) == len(expected)
    for rank, tensors in enumerate(expected):
        path = Path(output) / f"rank{rank}.safetensors"
        wanted = {n: t.to(DTYPES[dtype]).contiguous().clone() for n, t in tensors.items()}
        save_file(wanted, str(path) + ".expected")
        if path.read_bytes() != Path(str(path) + ".expected").read_bytes():
            found = load_file(path)
            assert found.keys() == wanted.keys(), f"rank {rank}"
            for name, tensor in wanted.items():
                assert found[name].dtype == tensor.dtype, f"rank {rank}: {name}"
                assert found[name].shape == tensor.shape, f"rank {rank}: {name}"
                assert torch.equal(found[name], tensor), f"rank {rank}: {name}"
            raise AssertionError(f"rank {rank}: same tensors, other bytes")


# --- tensor parallelism, in plain torch ------------------------------------------------------


def share(tensor, tp, rank, dim=0):
    """One of ``tp`` equal slices."""
    assert tensor.shape[dim] % tp == 0
    size = tensor.shape[dim] // tp
    return tensor.narrow(dim, rank * size, size)


def kv_share(tensor, kv_heads, tp, rank):
    """A rank's KV heads; with more ranks than heads, the one its query heads use."""
    if tp <= kv_heads:
        return share(tensor, tp, rank)
    assert tp % kv_heads == 0
    return share(tensor, kv_heads, rank // (tp // kv_heads))


def vocab_share(tensor, tp, rank):
    """A rank's rows of a vocabulary padded with zero rows to a multiple of the ranks."""
    padding = -tensor.shape[0] % tp
    zeros = torch.zeros(padding, *tensor.shape[1:], dtype=tensor.dtype)
    return share(torch.cat([tensor, zeros]), tp, rank)
