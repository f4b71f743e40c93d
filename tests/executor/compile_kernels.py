"""Compiles every kernel for real GPUs, which needs none: a program of its own, since Triton's
interpreter, once chosen, is chosen for a whole process.

Prints, for each, its name, the compute capability, and the shared memory it takes in bytes.
"""

import sys
import warnings

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from phireg.executor.cuda import kernels

HALF, FLOAT, LONG, INT, NUMBER = "*bf16", "*fp32", "*i64", "i32", "fp32"
# Arguments by their names; what is left over is a half-precision pointer.
STRIDES = [
    f"{rows}_{axis}" for rows in ("query", "key", "value") for axis in ("row", "head", "token")
]
TYPES = {
    "width": INT, "outputs": INT, "tokens": INT, "capacity": INT, "rotary_rows": INT,
    "first_head": INT, "length": INT, "epsilon": NUMBER, "limit": NUMBER, "scale": NUMBER,
    "scale_ptr": FLOAT, "x_scale_ptr": FLOAT, "weight_scale_ptr": FLOAT, "cos_ptr": FLOAT,
    "sin_ptr": FLOAT, "part_ptr": FLOAT, "stats_ptr": FLOAT, "slot_ptr": LONG, "pads_ptr": LONG,
    **dict.fromkeys(STRIDES, INT),
}  # fmt: skip
ATTEND = {
    "KV_HEADS": 8, "GROUP": 4, "SIZE": 128, "SPLITS": 8, "BLOCK_SIZE": 64, "LOCAL": 16, "STRIDE": 8,
    "STEP": 1, "PADDED": 16, "TILE": 64, "BLOCK": 128,
}  # fmt: skip
CASES = [
    ("norm", {"DELTA": True, "RMS": True, "BLOCK": 4096}),
    ("norm", {"DELTA": False, "RMS": False, "BLOCK": 8192}),
    ("quantize", {"SMOOTH": True, "GRID": "int8", "STORED": False, "BLOCK": 1024}),
    ("quantize", {"SMOOTH": False, "GRID": "fp8", "STORED": True, "BLOCK": 1024}),
    *(
        ("matvec", {
            "INPUTS": 3072, "BIAS": True, "SCALED": kind == "none", "KIND": kind, "ROWS": 4,
            "BLOCK": 1024,
        })
        for kind in ("none", "swiglu", "gegelu", "gelu_tanh")
    ),
    *(("activation", {"KIND": kind, "BLOCK": 1024}) for kind in ("swiglu", "gegelu", "gelu_tanh")),
    *(
        ("rotate", {
            "HEADS": 32, "KV_HEADS": 8, "SIZE": 80, "HALF": 16, "GRID": grid, "ROWS": 16,
            "BLOCK": 128,
        })
        for grid in ("none", "fp8", "int8")
    ),
    ("attend", {**ATTEND, "SPARSE": False}),
    ("attend", {**ATTEND, "SPARSE": True}),
    ("sparse", {
        "GROUP": 4, "SIZE": 128, "BLOCK_SIZE": 64, "LOCAL": 16, "STRIDE": 8, "STEP": 1,
        "PADDED": False, "TILE": 64, "BLOCK": 128,
    }),
    ("merge", {"SIZE": 96, "SPLITS": 8, "BLOCK": 128}),
]  # fmt: skip


def main():
    for name, constants in CASES:
        kernel = getattr(kernels, f"{name}_kernel")
        for capability in (80, 90):
            fixed = {**constants, "EARLY": capability >= 90}
            signature = {
                argument: "constexpr" if argument in fixed else TYPES.get(argument, HALF)
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
            built = triton.compile(source, GPUTarget("cuda", capability, 32), options=options)
            print(name, capability, built.metadata.shared)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
