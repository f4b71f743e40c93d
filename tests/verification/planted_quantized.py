"""Mistakes with quantized tensors, planted into correct checkpoints by code of the tests' own."""

from dataclasses import dataclass

import torch
from planted import (
    L1,
    MEDIUM,
    MINI,
    SMALL,
    cut_as_block,
    each,
    exchanged,
    grouped,
    halves,
    qkv_rows,
    ranks,
    ranks_exchanged,
    whole_qkv,
    without,
)

QKV, FC, PROJ, DENSE = (
    L1 + name for name in ("attention.qkv", "mlp.fc", "mlp.proj", "attention.dense")
)
SCALE, INPUT, SMOOTH = (f".{name}_scaling_factor" for name in ("weights", "activation", "prequant"))
CACHE = L1 + "attention.kv_cache_scaling_factor"


@dataclass(frozen=True)
class Planted:
    """One error; ``where`` are all the tensors that must be named, ``says`` of the first of them.

    ``logits`` is whether the logits check alone must see it as well.
    """

    family: str
    qformat: str
    cache: str | None
    tp: int
    damage: object
    where: tuple
    says: str
    logits: bool = False


def at_once(*damages):
    def damage(directory, family):
        for change in damages:
            change(directory, family)

    return damage


def regrouped_smoothing(loaded, family):
    """As a script does that reorders whatever belongs to qkv and has a suitable length."""
    heads, kv, parts = 8, 4, 16
    for tensors in loaded:
        name = QKV + SMOOTH
        groups = tensors[name].reshape(kv, heads // kv + 2, len(tensors[name]) // parts)
        reordered = (groups[:, :-2], groups[:, -2], groups[:, -1])
        tensors[name] = torch.cat([part.flatten() for part in reordered])


def off_by_steps(x):
    x = x.clone()
    x[5, 7] = x[5, 7] - 9 if x[5, 7] > 0 else x[5, 7] + 9
    return x


def kv_exchanged(q, k, v):
    return q, v, k


PLANTED = {
    "halves of the weight exchanged, not those of its scales": Planted(
        MINI, "int8_sq", None, 1, each(FC + ".weight", halves), (FC + ".weight",),
        "gate and up are exchanged", logits=True,
    ),
    "halves of an FP8 weight exchanged at TP 2": Planted(
        MEDIUM, "fp8", None, 2, each(FC + ".weight", halves), (FC + ".weight",),
        "gate and up are exchanged", logits=True,
    ),
    "halves of the scales exchanged, not those of the weight": Planted(
        MEDIUM, "int8_sq", None, 2, each(FC + SCALE, halves), (FC + SCALE,),
        "gate and up are exchanged",
    ),
    "scales of k and v exchanged": Planted(
        MEDIUM, "int8_sq", "int8", 1, qkv_rows(kv_exchanged, (QKV + SCALE,)), (QKV + SCALE,),
        "k and v are exchanged",
    ),
    "k and v exchanged with their scales": Planted(
        MINI, "int8_sq", None, 2, qkv_rows(kv_exchanged, (QKV + ".weight", QKV + SCALE)),
        (QKV + ".weight", QKV + SCALE), "k and v are exchanged", logits=True,
    ),
    "smoothing vector regrouped like rows of qkv": Planted(
        SMALL, "int8_sq", None, 1, ranks(regrouped_smoothing), (QKV + SMOOTH,),
        "the same entries in another order", logits=True,
    ),
    "smoothing vector of another linear": Planted(
        SMALL, "int8_sq", None, 2, exchanged(QKV + SMOOTH, FC + SMOOTH),
        (QKV + SMOOTH, FC + SMOOTH), "is not what the weight was smoothed with",
    ),
    "smoothing vector of a row linear on the wrong ranks": Planted(
        MINI, "int8_sq", None, 2, ranks_exchanged(PROJ + SMOOTH), (PROJ + SMOOTH,),
        "the same entries in another order",
    ),
    "rows left grouped, int8": Planted(
        SMALL, "int8_sq", None, 1,
        whole_qkv(grouped, (QKV + ".weight", QKV + ".bias", QKV + SCALE)),
        (QKV + ".bias", QKV + ".weight", QKV + SCALE), "still grouped by KV head", logits=True,
    ),
    "rows left grouped, fp8 at TP 2": Planted(
        SMALL, "fp8", "fp8", 2, whole_qkv(grouped, (QKV + ".weight", QKV + ".bias")),
        (QKV + ".bias", QKV + ".weight"), "still grouped by KV head", logits=True,
    ),
    "scales of qkv left grouped": Planted(
        SMALL, "int8_sq", None, 2, whole_qkv(grouped, (QKV + SCALE,)), (QKV + SCALE,),
        "still grouped by KV head",
    ),
    "up and gate cut as one block": Planted(
        MEDIUM, "int8_sq", None, 2, at_once(cut_as_block(FC + ".weight"), cut_as_block(FC + SCALE)),
        (FC + ".weight", FC + SCALE), "as one block", logits=True,
    ),
    "weights of two ranks exchanged": Planted(
        MINI, "fp8", None, 2, ranks_exchanged(PROJ + ".weight"), (PROJ + ".weight",),
        "ranks are exchanged", logits=True,
    ),
    "one rank has another activation scale": Planted(
        "phi2", "fp8", None, 2, each(FC + INPUT, lambda x: x * 1.5, only=(1,)), (FC + INPUT,),
        "every rank must hold the same",
    ),
    "one rank has another KV scale": Planted(
        MINI, "int8_sq", "int8", 2, each(CACHE, lambda x: x * 1.5, only=(1,)), (CACHE,),
        "every rank must hold the same",
    ),
    "KV scale missing": Planted(
        MINI, "int8_sq", "int8", 2, without(CACHE), (CACHE,), "is missing"
    ),
    "FP8 weight scale twice too large": Planted(
        "phi2", "fp8", None, 1, each(QKV + SCALE, lambda x: x * 2), (QKV + SCALE,),
        "is 2 times what the source's largest values give", logits=True,
    ),
    "INT8 weight scales half of what they are": Planted(
        MEDIUM, "int8_sq", None, 2, each(DENSE + SCALE, lambda x: x / 2), (DENSE + SCALE,),
        "is 0.5 times",
    ),
    "one INT8 weight scale": Planted(
        MINI, "int8_sq", None, 1,
        each(FC + SCALE, lambda x: torch.where(torch.arange(len(x)) == 3, 1.1 * x, x)),
        (FC + SCALE,), "first at row 3: 1.1 times",
    ),
    "INT8 activation scale twice too large": Planted(
        MEDIUM, "int8_sq", None, 1, each(QKV + INPUT, lambda x: x * 2), (QKV + INPUT,),
        "is 2 times 1/127",
    ),
    "one weight": Planted(
        "phi2", "int8_sq", None, 2, each(FC + ".weight", off_by_steps, only=(1,)),
        (FC + ".weight",), "1 of 3,200 elements",
    ),
    "one e4m3 weight": Planted(
        "phi2", "fp8", None, 1,
        each(FC + ".weight", lambda x: x.view(torch.uint8).bitwise_xor(
            torch.eye(80, dtype=torch.uint8).tril().triu() * 0x10).view(torch.float8_e4m3fn)),
        (FC + ".weight",), "elements are more than a step",
    ),
    "what is not quantized": Planted(
        SMALL, "fp8", None, 2, each(L1 + "post_layernorm.weight", lambda x: x * 1.5),
        (L1 + "post_layernorm.weight",), "scaled by 1.5",
    ),
}  # fmt: skip
