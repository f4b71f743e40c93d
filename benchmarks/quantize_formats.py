"""What every format of a Hugging Face target costs the demo models, ModelOpt's numbers beside it.

    python benchmarks/quantize_formats.py [--families phi2 ...] [--rows 48]

Each model is calibrated on its last 16 held-back texts (in bfloat16 or float32), quantized, and run
by the executor on the CPU in float32 over the first held-back texts. Linears whose inputs are no
whole groups are left out of both. ModelOpt's numbers are its fake-quantized model's in float32,
against the unquantized one; its NVFP4 needs a GPU, and it has no ``w8a8``. Intervals are of 95 %.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from phireg_plugins.phi3_small.reference import Phi3SmallForCausalLM
from phireg_plugins.phi35_moe.reference import PhiMoEForCausalLM
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

TARGETS = ("hf-modelopt", "hf-compressed-tensors")
FAMILIES = ("phi2", "phi3-mini", "phi3-small", "phi3-medium", "phi4", "phi4-mini", "phi3.5-moe")
MODELOPT = {
    "fp8": "FP8_DEFAULT_CFG",
    "fp8_pc_pt": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "fp8_dynamic": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "int8_sq": "INT8_SMOOTHQUANT_CFG",
    "int8_wo": "INT8_WEIGHT_ONLY_CFG",
    "w4a16": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "int4_awq": "INT4_AWQ_CFG",
    "w4a8_awq": "W4A8_AWQ_BETA_CFG",
}
CACHES = {"fp8": (None, "fp8")}
"""KV caches by format; others are measured without."""
CALIBRATED = 16

Rows = Sequence[Sequence[int]]
Logits = Callable[[Tensor], Tensor]
Found = tuple[Estimate, Estimate, Estimate]


def planned(
    model: demo.DemoModel, target: str, qformat: str, cache: str | None
) -> tuple[Plan, list[str]]:
    """A plan without the linears that the format cannot take, and these."""
    chosen = {"target": target, "qformat": qformat, "kv_cache_dtype": cache}
    plan = phireg.plan(model.directory, family=model.family, **chosen)
    out = [finding.subject for finding in plan.errors if finding.code == "quant"]
    if not out:
        return plan, []
    return phireg.plan(model.directory, family=model.family, exclude=out, **chosen), out


def opened(model: demo.DemoModel) -> Any:
    """Transformers' model in float32, or the family's own where transformers has none that fits."""
    from transformers import AutoModelForCausalLM

    own = {"phi3-small": Phi3SmallForCausalLM, "phi3.5-moe": PhiMoEForCausalLM}
    cls: Any = own.get(model.family, AutoModelForCausalLM)
    return cls.from_pretrained(model.directory, dtype=torch.float32).eval()


def modelopt(model: Any, rows: Rows, name: str, cache: str | None, out: list[str]) -> Any:
    """ModelOpt's fake-quantized model; inputs of norms, which no reader quantizes, are left."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant

    config = copy.deepcopy(getattr(mtq, name))
    for part in ("norm", *out):
        config["quant_cfg"].append({"quantizer_name": f"*{part}*", "enable": False})
    with torch.no_grad(), redirect_stdout(sys.stderr):
        if cache is not None:
            config = update_quant_cfg_with_kv_cache_quant(config, mtq.FP8_KV_CFG["quant_cfg"])
        return mtq.quantize(model, config, lambda m: [m(torch.tensor([row])) for row in rows])


def compared(before: Sequence[Tensor], model: Logits, rows: Rows) -> Found:
    """KL, the relative change of the perplexity, and the share of equal most likely tokens."""
    kl, change, same = [], [], []
    for p, row in zip(before, rows, strict=True):
        q = logarithms(model, row)
        kl.append((p.exp() * (p - q)).sum(-1).numpy())
        change.append((p - q).gather(1, torch.tensor(row[1:])[:, None])[:, 0].numpy())
        same.append((p.argmax(-1) == q.argmax(-1)).numpy())
    nll = mean(change)
    loss = Estimate(*(float(np.expm1(x)) for x in (nll.value, nll.low, nll.high)))
    return mean(kl), loss, share(same)


def logarithms(model: Logits, row: Sequence[int]) -> Tensor:
    """Of the probabilities of the next tokens, float64 [tokens - 1, vocabulary]."""
    with torch.no_grad():
        return model(torch.tensor([row])).double()[:-1].log_softmax(-1)


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
    before = [logarithms(lambda x: source(x)[0], row) for row in read]
    theirs_too = find_spec("modelopt") is not None
    if theirs_too:
        plain_hf = opened(model)
        before_hf = [logarithms(lambda x: plain_hf(x, use_cache=False).logits[0], r) for r in read]
    theirs: dict[tuple[str, str | None, tuple[str, ...]], Found] = {}
    for target in TARGETS:
        chosen = [(q, c) for q in load_target(target).formats for c in CACHES.get(q, (None,))]
        for qformat, cache in chosen:
            plan, out = planned(model, target, qformat, cache)
            if plan.errors or not plan.linears:
                continue
            directory = place / f"{family}-{target}-{qformat}-{cache}"
            phireg.quantize(plan, directory, statistics)
            ours = load(directory, dtype="float32")
            found = compared(before, lambda x, own=ours: own(x)[0], read)
            config = MODELOPT.get(qformat, "")
            key = config, cache, tuple(out)
            if config and key not in theirs and theirs_too:
                fake = modelopt(opened(model), calibration, config, cache, out)
                theirs[key] = compared(
                    before_hf, lambda x, own=fake: own(x, use_cache=False).logits[0], read
                )
            left = ", ".join(sorted({name.rpartition(".")[2] for name in out}))
            cells = [family, target.removeprefix("hf-"), qformat, cache or "", left]
            yield line(cells, found, theirs.get(key))


def line(cells: list[str], found: Found, theirs: Found | None) -> str:
    """One row of the table."""
    kl, loss, top1 = found
    cells += [f"{kl.value:.4f} ({kl.low:.4f} to {kl.high:.4f})"]
    cells += [f"{loss.value:+.2%} ({loss.low:+.2%} to {loss.high:+.2%})", f"{top1.value:.1%}"]
    if theirs is None:
        cells += ["", "", ""]
    else:
        cells += [f"{theirs[0].value:.4f}", f"{theirs[1].value:+.2%}", f"{theirs[2].value:.1%}"]
    return "| " + " | ".join(cells) + " |"


HEADER = (
    "| model | layout | format | KV cache | left out | KL (95 %) | perplexity (95 %) | same top-1 "
    "| ModelOpt: KL | perplexity | same top-1 |\n" + "|---" * 11 + "|"
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
