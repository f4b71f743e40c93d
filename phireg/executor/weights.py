"""The tensors a blueprint expects, and the mapped rank files that hold them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from phireg.errors import CheckError
from phireg.executor.blueprint import Blueprint

# Reads one tensor of one rank by its name in the file.
Source: TypeAlias = Callable[[str], Tensor]

# Rotary tables TensorRT-LLM 0.12 and later writes at the root and computes again when it loads.
_ROTARY_TABLES = re.compile(
    r"(long_rope_)?(embed_positions\w*|rotary_inv_freq)|(short|long)_inv_freq"
)


def layer_shapes(blueprint: Blueprint) -> dict[str, tuple[int, ...]]:
    """Name (after ``transformer.layers.N.``) and shape of one rank's tensors of one layer."""
    hidden, size = blueprint.hidden_size, blueprint.head_size
    inner = blueprint.intermediate_size // blueprint.tp_size
    fc = inner if blueprint.activation == "gelu_tanh" else 2 * inner
    qkv = (blueprint.rank_heads + 2 * blueprint.rank_kv_heads) * size
    shapes: dict[str, tuple[int, ...]] = {}
    linears = {
        "attention.qkv": (qkv, hidden),
        "attention.dense": (hidden, blueprint.rank_heads * size),
        "mlp.fc": (fc, hidden),
        "mlp.proj": (hidden, inner),
    }
    for name, shape in linears.items():
        shapes[f"{name}.weight"] = shape
        if blueprint.linear_bias:
            shapes[f"{name}.bias"] = shape[:1]
    norms = ["input_layernorm"]
    if blueprint.residual == "sequential":
        norms.append("post_layernorm")
    for name in norms:
        shapes |= _norm_shapes(blueprint, name)
    return shapes


def _norm_shapes(blueprint: Blueprint, name: str) -> dict[str, tuple[int, ...]]:
    kinds = ("weight", "bias") if blueprint.norm == "layer_norm" else ("weight",)
    return {f"{name}.{kind}": (blueprint.hidden_size,) for kind in kinds}


def layer_prefix(layer: int) -> str:
    """What the file puts in front of a layer's names."""
    return f"transformer.layers.{layer}."


def end_shapes(blueprint: Blueprint) -> dict[str, tuple[int, ...]]:
    """Name and shape of one rank's tensors that belong to no layer."""
    rows = blueprint.padded_vocab_size // blueprint.tp_size
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.vocab_embedding.weight": (blueprint.vocab_size, blueprint.hidden_size),
        **_norm_shapes(blueprint, "transformer.ln_f"),
        "lm_head.weight": (rows, blueprint.hidden_size),
    }
    if blueprint.lm_head_bias:
        shapes["lm_head.bias"] = (rows,)
    return shapes


def tensor_shapes(blueprint: Blueprint) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of one rank file; all ranks have the same."""
    shapes = end_shapes(blueprint)
    for layer in range(blueprint.num_layers):
        for name, shape in layer_shapes(blueprint).items():
            shapes[layer_prefix(layer) + name] = shape
    return shapes


def replicated(name: str) -> bool:
    """Whether every rank must hold the same values: norms, the embedding, row-linear biases."""
    return (
        "norm" in name
        or "ln_f" in name
        or name.endswith(("vocab_embedding.weight", "attention.dense.bias", "mlp.proj.bias"))
    )


def open_ranks(checkpoint_dir: Path, blueprint: Blueprint, ranks: Sequence[int]) -> list[Source]:
    """Map the rank files and hold them against the blueprint.

    Args:
        checkpoint_dir: directory of config.json and rank*.safetensors.
        blueprint: what config.json says.
        ranks: the ranks to open. When it is all of them there must be no further rank file, and
            the tensors that every rank repeats must be equal.

    Returns:
        For each rank a function from a tensor's name to the tensor, mapped, on the CPU.

    Raises:
        CheckError: lists every file that is missing or extra, and every tensor that is missing,
            unknown, of another shape or dtype, or not the same on all ranks.
    """
    problems: list[str] = []
    files = {rank: checkpoint_dir / f"rank{rank}.safetensors" for rank in ranks}
    if len(ranks) == blueprint.tp_size:
        found = set(checkpoint_dir.glob("rank*.safetensors"))
        problems += [
            f"{path.name}: config.json has only {blueprint.tp_size} rank(s)"
            for path in sorted(found - set(files.values()))
        ]
    opened: dict[int, Any] = {}
    for rank, path in files.items():
        opened[rank], failure = _open(path)
        found_here = [failure] if failure else _problems(opened[rank], blueprint)
        problems += [f"{path.name}: {problem}" for problem in found_here]
    if not problems:
        problems += _differences(opened, blueprint)
    if problems:
        raise CheckError(
            f"{checkpoint_dir}: the rank files are not what config.json says:\n  "
            + "\n  ".join(problems),
            hint="convert the model again; a checkpoint is not meant to be edited by hand",
        )
    return [handle.get_tensor for handle in opened.values()]


def _open(path: Path) -> tuple[Any, str | None]:
    """The mapped file, or why there is none."""
    try:
        return safe_open(path, framework="pt", device="cpu"), None
    except FileNotFoundError:
        return None, "is missing"
    except (OSError, SafetensorError) as error:
        return None, f"cannot be read ({error})"


def _problems(handle: Any, blueprint: Blueprint) -> list[str]:
    expected = tensor_shapes(blueprint)
    present = set(handle.keys())
    problems = [f"{name} is missing" for name in expected if name not in present]
    dtype = getattr(torch, blueprint.dtype)
    for name in sorted(present):
        if name not in expected:
            if not _ROTARY_TABLES.fullmatch(name):
                problems.append(f"{name} is not a tensor of this architecture")
            continue
        tensor = handle.get_tensor(name)
        if tuple(tensor.shape) != expected[name]:
            shape = list(tensor.shape)
            problems.append(f"{name} has the shape {shape}, not {list(expected[name])}")
        if tensor.dtype != dtype:
            problems.append(f"{name} is {tensor.dtype}, not {dtype}".replace("torch.", ""))
    return problems


def _differences(opened: dict[int, Any], blueprint: Blueprint) -> list[str]:
    """Names of replicated tensors that some rank has other values of.

    The ranks run in lockstep on one copy of the hidden states, which is right only while what
    every rank repeats is the same everywhere.
    """
    handles = iter(opened.items())
    _, first = next(handles)
    names = [name for name in tensor_shapes(blueprint) if replicated(name)]
    return [
        f"rank{rank}.safetensors: {name} differs from the first rank's"
        for rank, handle in handles
        for name in names
        if not torch.equal(
            first.get_tensor(name).view(torch.uint8), handle.get_tensor(name).view(torch.uint8)
        )
    ]
