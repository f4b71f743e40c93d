"""Qualities made by hand."""

from phireg.quality.estimates import Estimate
from phireg.quality.result import Continuation, LinearQuality, Quality, TextQuality

NAMES = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj")


def made(layers=3, *, inputs=True, qformat="fp8", origin="text.jsonl", flat=False, **text):
    """A quality whose linears differ, or with ``flat`` all have the same numbers."""
    linears = tuple(
        LinearQuality(
            layer,
            name,
            0.01 if flat else 0.01 * (1 + layer),
            (0.01 if flat else 0.02 * (1 + layer)) if inputs else None,
            (0.0 if flat else 1e-4 * layer) if inputs else None,
            1.0 if flat else 4.0 + layer if layer else float("inf"),
        )
        for layer in range(layers)
        for name in NAMES
    )
    numbers = {
        "vocab_size": 1000,
        "top1": Estimate(0.97, 0.96, 0.98),
        "kl": Estimate(0.01, 0.009, 0.011),
        "nll": 1.0,
        "unquantized_nll": 1.0,
        "nll_change": Estimate(0.0, -0.01, 0.01),
    }
    return Quality(
        "/tmp/<i>ckpt", "phi3-mini", qformat, "int8", "Phi3ForCausalLM", "bfloat16", 2, linears,
        tuple(0.01 * (n + 1) for n in range(layers)),
        TextQuality(origin, 2, 300, False, **{**numbers, **text}), 2_000_000, 1_000_000,
        Continuation("<s>Once", " upon <b>a</b> time", " upon a hill", 48),
        (("text", "<u>300 tokens"),),
    )  # fmt: skip
