"""Compiles every kernel for real GPUs, which needs none: a program of its own, since Triton's
interpreter, once chosen, is chosen for a whole process.

Prints, for each, its name, the compute capability, and the shared memory it takes in bytes.
"""

import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from phireg.executor.cuda import (
    attention,
    head_attention,
    integers,
    kernels,
    products,
    tiles,
)

HALF, FLOAT, LONG, INT, NUMBER = "*bf16", "*fp32", "*i64", "i32", "fp32"
# Arguments by their names; what is left over is a half-precision pointer.
STRIDES = [
    f"{rows}_{axis}" for rows in ("query", "key", "value") for axis in ("row", "head", "token")
]
TYPES = {
    "width": INT, "outputs": INT, "tokens": INT, "capacity": INT, "rotary_rows": INT,
    "first_head": INT, "original": INT, "vocab_size": INT, "logits_row": INT, "length": INT,
    "epsilon": NUMBER, "limit": NUMBER, "scale": NUMBER, "scale_ptr": FLOAT, "x_scale_ptr": FLOAT,
    "out_scale_ptr": FLOAT, "kv_scale_ptr": FLOAT, "cos_ptr": FLOAT, "scores_ptr": FLOAT,
    "share_ptr": FLOAT, "expert_ptr": LONG, "chosen_ptr": LONG, "count_ptr": "*i32",
    "first_expert": INT, "experts": INT, "lost_width": INT, "sin_ptr": FLOAT, "part_ptr": FLOAT,
    "stats_ptr": FLOAT, "slot_ptr": LONG, "pads_ptr": LONG, "best_ptr": FLOAT, "place_ptr": "*i32",
    "logits_ptr": FLOAT, "token_ptr": LONG,
    **dict.fromkeys(STRIDES, INT),
}  # fmt: skip
ATTEND = {
    "KV_HEADS": 8, "GROUP": 4, "SIZE": 128, "SPLITS": 8, "BLOCK_SIZE": 64, "LOCAL": 16, "STRIDE": 8,
    "STEP": 1, "PADDED": 4, "TILE": 64, "BLOCK": 128, "SMOOTH": False, "GRID": "none",
    "HALF": 48, "KV_GRID": "none",
}  # fmt: skip
HEAD_ATTEND = {
    "HEADS": 32, "SIZE": 80, "SMOOTH": False, "GRID": "none", "HALF": 16, "KV_GRID": "none",
    "num_warps": 1,
}  # fmt: skip
# Dtypes of a weight's elements, and of its groups' scales.
GRIDS = {
    "none": ("*bf16", "*bf16"), "e4m3": ("*fp8e4nv", "*bf16"), "int8": ("*i8", "*bf16"),
    "int4": ("*i32", "*bf16"), "e2m1": ("*i32", "*fp8e4nv"),
}  # fmt: skip
HALF_TYPE, FLOAT_TYPE = triton.language.bfloat16, triton.language.float32
LINEAR = {"INPUTS": 3072, "X_SCALE": True, "BIAS": True}


def weight(grid, group=0, scales=2):
    data, groups = GRIDS[grid]
    types = {"weight_ptr": data, "group_ptr": groups}
    if grid in ("int4", "e2m1"):
        return {"GRID": grid, "GROUP": group, "SCALES": scales, "types": types}
    return {"SCALES": scales, "types": types}


def of_levels(case):
    return {**case, "types": {**case["types"], "x_ptr": "*i8", "out_ptr": "*i8"}}


def in_float32(case):
    pointers = ("x_ptr", "out_ptr", "bias_ptr", "smoothing_ptr", "lost_ptr")
    return {**case, "types": {**case["types"], **dict.fromkeys(pointers, FLOAT)}}


E4M3 = {"types": {"key_ptr": "*fp8e4nv", "value_ptr": "*fp8e4nv"}}
INT8 = {"types": {"key_ptr": "*i8", "value_ptr": "*i8"}}
VECTOR = {
    **LINEAR, "KIND": "none", "SMOOTH": False, "OUT": "none", "TYPE": HALF_TYPE, "PER_TOKEN": 0,
    "DEPTH": 2,
}  # fmt: skip
MATVEC = {**VECTOR, "ROWS": 4, "BLOCK": 1024}
INTEGERS = {**VECTOR, "WARPS": 4}
TILES = {**INTEGERS, "TOGETHER": 1}
FEW = {
    **LINEAR, "KIND": "none", "SMOOTH": False, "OUT": "none", "TYPE": HALF_TYPE, "TOKENS": 32,
    "SPLITS": 4,
}  # fmt: skip
PRODUCT = {**FEW, "ROWS": 64, "BLOCK": 128}
TILE_PRODUCT = {**FEW, "TILES": 4, "TOGETHER": 4}
TALL_PRODUCT = {**TILE_PRODUCT, "TILES": 8, "TOKENS": 64, "SPLITS": 1, "num_warps": 8}
CASES = [
    ("norm", {"DELTA": True, "RMS": True, "SMOOTH": True, "GRID": "int8", "BLOCK": 4096}),
    ("norm", {"DELTA": False, "RMS": False, "SMOOTH": False, "GRID": "none", "BLOCK": 8192}),
    ("quantize", {"SMOOTH": True, "GRID": "int8", "STORED": False, "BLOCK": 1024}),
    ("quantize", {
        "SMOOTH": False, "GRID": "fp8", "STORED": True, "BLOCK": 1024,
        "types": {"out_ptr": "*fp8e4nv"},
    }),
    ("matvec", {**MATVEC, **weight("none", scales=0), "KIND": "gegelu"}),
    ("matvec", {**MATVEC, **weight("e4m3", scales=1), "KIND": "swiglu", "OUT": "fp8"}),
    ("matvec", {**MATVEC, **in_float32(weight("int8")), "KIND": "gelu_tanh", "TYPE": FLOAT_TYPE}),
    ("integer_matvec", {
        **INTEGERS, **weight("int8"), "KIND": "swiglu", "PER_TOKEN": 2,
        "types": {"weight_ptr": "*i32"},
    }),
    ("integer_matvec", {
        **INTEGERS, **weight("int8"), "KIND": "gegelu", "OUT": "int8", "SMOOTH": True,
        "types": {"weight_ptr": "*i8", "x_ptr": "*i8", "out_ptr": "*i8"},
    }),
    ("tile_matvec", {**TILES, **weight("int4"), "KIND": "swiglu", "PER_TOKEN": 2}),
    ("tile_matvec", {**TILES, **weight("int4", 128, 0), "KIND": "gegelu"}),
    ("tile_matvec", {**TILES, **weight("int4", 32, 0)}),
    ("tile_matvec", {**TILES, **weight("e2m1", 16, 1), "OUT": "int8", "SMOOTH": True}),
    ("tile_matvec", {**TILES, **in_float32(weight("e2m1", 16, 1)), "TYPE": FLOAT_TYPE}),
    ("product", {**PRODUCT, **weight("e4m3")}),
    ("product", {**PRODUCT, **in_float32(weight("e4m3")), "TYPE": FLOAT_TYPE}),
    ("product", {
        **PRODUCT, **weight("e4m3", scales=1), "KIND": "swiglu", "OUT": "fp8", "SPLITS": 1,
        "types": {"weight_ptr": "*fp8e4nv", "x_ptr": "*fp8e4nv", "out_ptr": "*fp8e4nv"},
    }),
    ("product", {
        **PRODUCT, **weight("int8"), "ROWS": 128, "TOKENS": 64, "num_warps": 8,
        "types": {"weight_ptr": "*i32"},
    }),
    ("product", {**PRODUCT, **of_levels(weight("int8")), "BLOCK": 256, "num_stages": 4}),
    ("product", {**PRODUCT, **of_levels(weight("int8")), "BLOCK": 256, "TOKENS": 64}),
    ("product", {
        **PRODUCT, **of_levels(weight("int8")), "ROWS": 128, "TOKENS": 128, "SPLITS": 1,
        "KIND": "gegelu", "OUT": "int8", "SMOOTH": True,
    }),
    ("tile_product", {**TILE_PRODUCT, **weight("int4", 128, 0), "SPLITS": 1}),
    ("tile_product", {
        **TILE_PRODUCT, **in_float32(weight("int4", 32, 0)), "TYPE": FLOAT_TYPE, "num_stages": 2,
    }),
    ("tile_product", {**TALL_PRODUCT, **weight("int4"), "KIND": "swiglu"}),
    ("tile_product", {**TALL_PRODUCT, **weight("int4", 32, 0), "num_stages": 2}),
    ("tile_product", {**TILE_PRODUCT, **weight("e2m1", 16, 1), "TOKENS": 64, "KIND": "gegelu"}),
    ("expand", {"INPUTS": 3072, **weight("int8"), "BLOCK": 1024}),
    ("tile_expand", {"INPUTS": 3072, **weight("e2m1", 16, 1), "TILES": 4}),
    ("route", {"BLOCK": 16}),
    *(
        ("activation", {"KIND": kind, "SMOOTH": smooth, "GRID": grid, "BLOCK": 1024})
        for kind, smooth, grid in (
            ("swiglu", False, "none"), ("gegelu", True, "int8"), ("gelu_tanh", False, "fp8")
        )
    ),
    *(
        ("rotate", {
            "HEADS": 32, "KV_HEADS": 8, "SIZE": 80, "HALF": 16, "GRID": grid, "ROWS": 16,
            "BLOCK": 128, **kept,
        })
        for grid, kept in (("none", {}), ("fp8", E4M3), ("int8", INT8))
    ),
    ("attend", {**ATTEND, "SPARSE": False, "KV_GRID": "fp8", **E4M3}),
    ("attend", {**ATTEND, "SPARSE": True, "KV_GRID": "int8", **INT8, "SPLITS": 1, "GRID": "fp8"}),
    ("attend", {
        **ATTEND, "SPARSE": True, "SMOOTH": True, "GRID": "int8", "types": {"out_ptr": "*i8"},
    }),
    ("head_attend", {**HEAD_ATTEND, "KV_GRID": "fp8", **E4M3}),
    ("head_attend", {**HEAD_ATTEND, "KV_GRID": "int8", **INT8, "GRID": "fp8"}),
    ("head_attend", HEAD_ATTEND),
    ("sparse", {
        "GROUP": 4, "SIZE": 128, "BLOCK_SIZE": 64, "LOCAL": 16, "STRIDE": 8, "STEP": 1,
        "PADDED": False, "TILE": 64, "BLOCK": 128,
    }),
    ("choose", {"NO_TOKEN": -1, "SPLITS": 99, "PADDED": 128, "BLOCK": 1024}),
    ("combine", {"PER_TOKEN": 2, "BLOCK": 256}),
]  # fmt: skip


def build(number):
    """Compile a case for two GPUs, and return a line on each."""
    warnings.simplefilter("ignore")
    name, constants = CASES[number]
    modules = (attention, head_attention, integers, kernels, products, tiles)
    kernel = next(filter(None, (getattr(m, f"{name}_kernel", None) for m in modules)))
    types = {**TYPES, **constants.get("types", {})}
    lines = []
    # Ampere has no e4m3; Ada is the first that has, and otherwise runs what Ampere does.
    first = 89 if "*fp8e4nv" in types.values() else 80
    for capability in (first, 90):
        fixed = {k: v for k, v in constants.items() if k == k.upper()}
        fixed["EARLY"] = capability >= 90
        signature = {
            argument: "constexpr" if argument in fixed else types.get(argument, HALF)
            for argument in kernel.arg_names
        }
        # Pointers, strides and the cache's capacity are multiples of sixteen, as at run time.
        aligned = {
            (position,): [["tt.divisibility", 16]]
            for position, argument in enumerate(kernel.arg_names)
            if argument.endswith("_ptr") or argument in ("capacity", *STRIDES)
        }
        source = ASTSource(kernel, signature, constexprs=fixed, attrs=aligned)
        options = {"num_warps": 4, "num_stages": 3}
        options |= {k: v for k, v in constants.items() if k in options}
        built = triton.compile(source, GPUTarget("cuda", capability, 32), options=options)
        lines.append(f"{name} {capability} {built.metadata.shared}")
    return lines


def main():
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for lines in pool.map(build, range(len(CASES))):
            print(*lines, sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
