"""Quantized checkpoints computed by hand: whole tensors, plain torch, one family after the other.

Nothing here is of phireg: which source is which target, how rows are regrouped and cut over ranks,
and the formulas are written down again from the format's description.
"""

import json

import numpy as np
import torch
from safetensors.torch import save_file

from helpers.plan_sources import HEADS, HIDDEN, INNER, LAYERS, MODELS, SIZE
from phireg.calibration.statistics import Statistics

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
KV_HEADS = {"phi2": HEADS, "mini": HEADS, "medium": 2, "one-kv-head": 1, "small": 2}
SOURCES = {
    "phi": {
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.dense": ("self_attn.dense",),
        "mlp.fc": ("mlp.fc1",),
        "mlp.proj": ("mlp.fc2",),
    },
    "phi3": {
        "attention.qkv": ("self_attn.qkv_proj",),
        "attention.dense": ("self_attn.o_proj",),
        "mlp.fc": ("mlp.gate_up_proj",),
        "mlp.proj": ("mlp.down_proj",),
    },
    "phi3small": {
        "attention.qkv": ("self_attn.query_key_value",),
        "attention.dense": ("self_attn.dense",),
        "mlp.fc": ("mlp.up_proj",),
        "mlp.proj": ("mlp.down_proj",),
    },
}
COLUMNS = {"attention.qkv": HIDDEN, "attention.dense": HIDDEN, "mlp.fc": HIDDEN, "mlp.proj": INNER}
FAMILY_OF = {key: MODELS[key][1]["model_type"] for key in KV_HEADS}


def model(key, dtype=torch.float32, seed=0):
    """Random tensors of a model; columns and rows of very different size."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in MODELS[key][2].items():
        tensor = torch.randn(*shape, generator=random)
        if len(shape) == 2:
            tensor *= 10 ** torch.empty(shape[0], 1).uniform_(-2, 0, generator=random)
            tensor *= 10 ** torch.empty(1, shape[1]).uniform_(-1, 1, generator=random)
        tensors[name] = tensor.to(dtype)
    return tensors


def write_model(directory, key, tensors):
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(MODELS[key][1]))
    save_file(tensors, directory / "model.safetensors")
    return directory


def calibration(key, seed=1):
    """Random maxima of every linear, different even for linears that see the same input."""
    random = np.random.default_rng(seed)
    inputs = {
        f"model.layers.{i}.{source}": (10 ** random.uniform(-2, 2, COLUMNS[name])).astype("f4")
        for i in range(LAYERS)
        for name, sources in SOURCES[FAMILY_OF[key]].items()
        for source in sources
    }
    keys, values = random.uniform(1, 2000, (2, LAYERS)).astype("f4").tolist()
    return Statistics(inputs, tuple(keys), tuple(values), {"seed": seed})


def row_order(key, name, count):
    """For each row of the target its row in the concatenated sources."""
    rows = torch.arange(count)
    if FAMILY_OF[key] == "phi3" and name == "mlp.fc":
        return torch.cat([rows[INNER:], rows[:INNER]])
    if FAMILY_OF[key] == "phi3small" and name == "attention.qkv":
        groups = rows.reshape(KV_HEADS[key], -1, SIZE)  # q heads, then k, then v
        return torch.cat(
            [groups[:, :-2].flatten(), groups[:, -2].flatten(), groups[:, -1].flatten()]
        )
    return rows


def rank_rows(key, name, count, tp, rank):
    """Rows of the target that a rank holds."""
    rows = torch.arange(count)

    def share(part, units):
        heads = part.reshape(units, -1)
        if units < tp:
            return heads[rank // (tp // units)]
        return heads.reshape(tp, -1)[rank]

    if name == "attention.qkv":
        kv = KV_HEADS[key]
        q, k, v = rows.split([HEADS * SIZE, kv * SIZE, kv * SIZE])
        return torch.cat([share(q, HEADS), share(k, kv), share(v, kv)])
    if name == "mlp.fc" and FAMILY_OF[key] == "phi3":
        return torch.cat([half.reshape(tp, -1)[rank] for half in rows.split(INNER)])
    return rows.reshape(tp, -1)[rank] if name == "mlp.fc" else rows


def rank_columns(name, tp, rank):
    columns = torch.arange(COLUMNS[name])
    return columns.reshape(tp, -1)[rank] if name in ("attention.dense", "mlp.proj") else columns


def fp8(weight, amax):
    largest = weight.abs().max().float()
    scale = largest / 448 if largest else torch.tensor(1.0)
    return {
        "weight": (weight.float() / scale).to(torch.float8_e4m3fn),
        "weights_scaling_factor": scale.reshape(1),
        "activation_scaling_factor": (amax.max() / 448).reshape(1),
    }


def int8_sq(weight, amax, alpha):
    smoother = torch.empty_like(amax)
    for j, a in enumerate(amax):  # one by one, so that nothing is broadcast by accident
        top = weight[:, j].abs().max().float()
        if a == 0:
            smoother[j] = 1e4
        elif alpha == 1:
            smoother[j] = 1 / a
        else:
            assert alpha == 0.5
            smoother[j] = top.sqrt() / a.sqrt()
    smoother = smoother.clamp(1e-4, 1e4)
    smoothed = (weight.float() * (1 / smoother)).to(weight.dtype)
    largest = smoothed.float().abs().max(dim=1).values
    scale = torch.where(largest == 0, torch.ones(()), largest / 127)
    return {
        "weight": (smoothed.float() / scale[:, None]).round().clamp(-128, 127).to(torch.int8),
        "weights_scaling_factor": scale,
        "activation_scaling_factor": ((amax * smoother).max().to(weight.dtype).float() / 127)
        .reshape(1),
        "prequant_scaling_factor": smoother.to(weight.dtype),
    }  # fmt: skip


def whole(key, tensors, statistics, qformat, dtype, alpha=1.0):
    """Every quantized linear of the target, not cut: companion by companion."""
    linears = {}
    for i in range(LAYERS):
        for name, sources in SOURCES[FAMILY_OF[key]].items():
            modules = [f"model.layers.{i}.{source}" for source in sources]
            weight = torch.cat([tensors[f"{m}.weight"].to(DTYPES[dtype]) for m in modules])
            weight = weight[row_order(key, name, len(weight))]
            amax = torch.stack([torch.from_numpy(statistics.inputs[m]) for m in modules]).amax(0)
            linears[f"transformer.layers.{i}.{name}"] = (
                fp8(weight, amax) if qformat == "fp8" else int8_sq(weight, amax, alpha)
            )
    return linears


def rank(key, linears, tp, index):
    """What one rank holds of :func:`whole`."""
    tensors = {}
    for target, companions in linears.items():
        name = target.split(".", 3)[3]
        rows = rank_rows(key, name, len(companions["weight"]), tp, index)
        columns = rank_columns(name, tp, index)
        for companion, tensor in companions.items():
            if companion == "weight":
                tensor = tensor.view(torch.int8)[rows][:, columns].view(tensor.dtype)
            elif companion == "weights_scaling_factor" and tensor.shape != (1,):
                tensor = tensor[rows]
            elif companion == "prequant_scaling_factor":
                tensor = tensor[columns]
            tensors[f"{target}.{companion}"] = tensor
    return tensors


def same(tensor, expected):
    """Dtype, shape and bits."""
    return (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape) and (
        tensor.contiguous().view(torch.uint8).equal(expected.contiguous().view(torch.uint8))
    )
