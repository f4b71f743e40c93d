"""What every format of hf-modelopt costs the demo models, and ModelOpt's own numbers beside it.

    python benchmarks/quantize_formats.py [--families phi2 ...] [--rows 48]

Each model is calibrated on its last 16 held-back texts (in bfloat16 or float32), quantized, and run
by the executor on the CPU in float32 over the first held-back texts. Linears whose inputs are no
whole groups are left out of both. ModelOpt's numbers are its fake-quantized model's in float32; its
NVFP4 needs a GPU. Intervals are of 95 %.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import phireg
from phireg import demo
from phireg.calibration.collect import collect
from phireg.executor import load
from phireg.generation.tokenizer import find_tokenizer
from phireg.planning.model import Plan
from phireg.quality.estimates import Estimate, mean, share
from phireg.reference.load import open_reference
from phireg.registry import load_target

TARGET = "hf-modelopt"
FAMILIES = ("phi2", "phi3-mini", "phi3-small", "phi3-medium", "phi4", "phi4-mini")
MODELOPT = {
    "fp8": "FP8_DEFAULT_CFG",
    "int8_sq": "INT8_SMOOTHQUANT_CFG",
    "int4_awq": "INT4_AWQ_CFG",
    "w4a8_awq": "W4A8_AWQ_BETA_CFG",
}
CACHES = {"fp8": (None, "fp8")}
"""KV caches by format; others are measured without."""
CALIBRATED = 16

Rows = Sequence[Sequence[int]]
Logits = Callable[[Tensor], Tensor]


def planned(model: demo.DemoModel, qformat: str, cache: str | None) -> tuple[Plan, list[str]]:
    """A plan without the linears that the format cannot take, and these."""
    chosen = {"target": TARGET, "qformat": qformat, "kv_cache_dtype": cache}
    plan = phireg.plan(model.directory, family=model.family, **chosen)
    out = [finding.subject for finding in plan.errors if finding.code == "quant"]
    if not out:
        return plan, []
    return phireg.plan(model.directory, family=model.family, exclude=out, **chosen), out


def modelopt(directory: Path, rows: Rows, qformat: str, cache: str | None, out: list[str]) -> Any:
    """ModelOpt's fake-quantized model; inputs of norms, which no reader quantizes, are left."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    config = copy.deepcopy(getattr(mtq, MODELOPT[qformat]))
    for name in ("layernorm", *out):
        config["quant_cfg"].append({"quantizer_name": f"*{name}*", "enable": False})
    if cache is not None:
        config = update_quant_cfg_with_kv_cache_quant(config, mtq.FP8_KV_CFG["quant_cfg"])
    with torch.no_grad():
        return mtq.quantize(model, config, lambda m: [m(torch.tensor([row])) for row in rows])


def compared(before: Logits, after: Logits, rows: Rows) -> tuple[Estimate, Estimate, Estimate]:
    """KL, the relative change of the perplexity, and the share of equal most likely tokens."""
    kl, change, same = [], [], []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            p, q = (model(ids).double()[:-1].log_softmax(-1) for model in (before, after))
            kl.append((p.exp() * (p - q)).sum(-1).numpy())
            change.append((p - q).gather(1, ids[0, 1:, None])[:, 0].numpy())
            same.append((p.argmax(-1) == q.argmax(-1)).numpy())
    nll = mean(change)
    loss = Estimate(*(float(np.expm1(x)) for x in (nll.value, nll.low, nll.high)))
    return mean(kl), loss, share(same)


def measure(family: str, rows: int, place: Path) -> Iterator[str]:
    """Lines of the Markdown table."""
    model = demo.find(family)
    tokenizer = find_tokenizer(model.directory)
    assert tokenizer is not None
    texts = [tokenizer.encode(a.prompt + a.reference) for a in model.articles]
    read, calibration = texts[: min(rows, len(texts) - CALIBRATED)], texts[-CALIBRATED:]
    plain = phireg.plan(model.directory, family=family)
    phireg.convert(plain, place / family)
    source = load(place / family, dtype="float32")
    weights = next(iter(plain.source.tensors.values())).dtype
    reference = open_reference(
        plain.chosen.family,
        model.directory,
        weights=None,
        dtype=torch.bfloat16 if weights == "BF16" else torch.float32,
        device=torch.device("cpu"),
    )
    statistics = collect(reference, calibration, device=torch.device("cpu"), search=True)
    for qformat in load_target(TARGET).formats:
        for cache in CACHES.get(qformat, (None,)):
            plan, out = planned(model, qformat, cache)
            if plan.errors or not plan.linears:
                continue
            directory = place / f"{family}-{qformat}-{cache}"
            phireg.quantize(plan, directory, statistics)
            ours = load(directory, dtype="float32")
            found = compared(lambda x: source(x)[0], lambda x, own=ours: own(x)[0], read)
            theirs = None
            if qformat in MODELOPT and family != "phi3-small" and find_spec("modelopt"):
                fake = modelopt(model.directory, calibration, qformat, cache, out)
                theirs = compared(
                    lambda x: source(x)[0],
                    lambda x, own=fake: own(x, use_cache=False).logits[0],
                    read,
                )
            left = ", ".join(sorted({name.rpartition(".")[2] for name in out}))
            yield line(family, qformat, cache, left, found, theirs)


def line(
    family: str,
    qformat: str,
    cache: str | None,
    left: str,
    found: tuple[Estimate, Estimate, Estimate],
    theirs: tuple[Estimate, Estimate, Estimate] | None,
) -> str:
    """One row of the table."""
    kl, loss, top1 = found
    cells = [family, qformat, cache or "", left, f"{kl.value:.4f} ({kl.low:.4f} to {kl.high:.4f})"]
    cells.append(f"{loss.value:+.2%} ({loss.low:+.2%} to {loss.high:+.2%})")
    cells.append(f"{top1.value:.1%}")
    if theirs is None:
        cells += ["", "", ""]
    else:
        cells += [f"{theirs[0].value:.4f}", f"{theirs[1].value:+.2%}", f"{theirs[2].value:.1%}"]
    return "| " + " | ".join(cells) + " |"


HEADER = (
    "| model | format | KV cache | left out | KL | perplexity | same top-1 | ModelOpt: KL "
    "| perplexity | same top-1 |\n" + "|---" * 10 + "|"
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--rows", type=int, default=48)
    options = parser.parse_args()
    print(HEADER)
    with tempfile.TemporaryDirectory() as place:
        for family in options.families:
            for row in measure(family, options.rows, Path(place)):
                print(row, flush=True)


if __name__ == "__main__":
    main()
