"""What quantization costs the demo models: perplexity, most likely tokens, and ModelOpt beside it.

    python benchmarks/quantize_demo.py [--families phi2 ...] [--rows 144] [--json OUT]

Each model is calibrated on its last 16 held-back texts (an article, `` TL;DR: ``, its summary),
quantized to FP8 and INT8 SmoothQuant with and without a quantized KV cache, and run by the
executor, on the CPU in float32, over the first held-back texts. Where nvidia-modelopt is
installed and knows the model's classes, its fake-quantized model runs over the same texts,
calibrated on the same ones. Numbers do not depend on the machine beyond rounding.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import phireg
from phireg import demo
from phireg.calibration.collect import collect
from phireg.calibration.statistics import Statistics
from phireg.demo import DemoModel
from phireg.dtypes import E4M3_MAX
from phireg.executor import load
from phireg.generation.tokenizer import find_tokenizer
from phireg.reference.load import open_reference

FAMILIES = ("phi2", "phi3-mini", "phi3-small", "phi3-medium", "phi4", "phi4-mini", "phi3.5-moe")
FORMATS = (("fp8", None), ("fp8", "fp8"), ("int8_sq", None), ("int8_sq", "int8"))
CALIBRATED = 16
EVALUATED = 160 - CALIBRATED
MODELOPT = ("phi2", "phi3-mini", "phi3-medium", "phi4", "phi4-mini")
"""Families whose classes are in transformers, and so known to ModelOpt."""

Logits = Callable[[Tensor], Tensor]
Rows = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Score:
    """One model over all rows.

    Attributes:
        perplexity: of every token after the first of each text.
        best: the most likely next token at every position.
    """

    perplexity: float
    best: Tensor

    def agreement(self, other: Score) -> float:
        """Share of positions with the same most likely token."""
        return float((self.best == other.best).float().mean())


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the table; perplexities, and shares from 0 to 1.

    Attributes:
        family: the demo model.
        qformat: the format.
        kv_cache_dtype: the KV cache's, or None.
        unquantized: perplexity of the unquantized checkpoint.
        phireg: perplexity of the quantized checkpoint in the model's own dtype.
        top1: share of positions with the unquantized checkpoint's most likely token.
        tensor_parallel: perplexity at TP 2.
        float32: perplexity of a quantized checkpoint in float32, as ModelOpt computes.
        modelopt: perplexity of ModelOpt's model with the exporter's maxima; None where not run.
        modelopt_top1: share of positions at which that and ``float32``'s agree.
        modelopt_own: perplexity of ModelOpt's model as ``mtq.quantize`` leaves it.
    """

    family: str
    qformat: str
    kv_cache_dtype: str | None
    unquantized: float
    phireg: float
    top1: float
    tensor_parallel: float
    float32: float
    modelopt: float | None
    modelopt_top1: float | None
    modelopt_own: float | None

    @property
    def change(self) -> float:
        """What quantization does to the perplexity, relatively."""
        return self.phireg / self.unquantized - 1


def token_rows(model: DemoModel, first: int, last: int) -> list[list[int]]:
    """Held-back texts as token ids."""
    tokenizer = find_tokenizer(model.directory)
    assert tokenizer is not None
    return [tokenizer.encode(a.prompt + a.reference) for a in model.articles[first:last]]


def calibrated(model: DemoModel, rows: Rows) -> Statistics:
    """Maxima over rows, in float32."""
    plan = phireg.plan(model.directory, family=model.family)
    device = torch.device("cpu")
    reference = open_reference(
        plan.chosen.family, plan.source.directory, weights=None, dtype=torch.float32, device=device
    )
    return collect(reference, rows, device=device)


def score(logits: Logits, rows: Rows) -> Score:
    """Run a model over rows.

    Args:
        logits: ids [1, tokens] to logits [tokens, vocabulary].
        rows: token ids of each text.
    """
    total, count = 0.0, 0
    best: list[Tensor] = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            scores = logits(ids).float()
            chosen = scores[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            total -= float(chosen.double().sum())
            count += len(row) - 1
            best.append(scores[:-1].argmax(-1))
    return Score(math.exp(total / count), torch.cat(best))


def checkpoint_score(directory: Path, rows: Rows) -> Score:
    """The executor's, on the CPU in float32."""
    executor = load(directory, dtype="float32")
    return score(lambda ids: executor(ids)[0], rows)


class Measured:
    """One demo model: its rows, its statistics, and the checkpoints made of it.

    Args:
        family: its name.
        rows: how many texts to run.
        place: a folder for checkpoints.
    """

    def __init__(self, family: str, rows: int, place: Path) -> None:
        self.model = demo.find(family)
        self.place = place
        self.rows = token_rows(self.model, 0, min(rows, EVALUATED))
        self.calibration = token_rows(self.model, EVALUATED, EVALUATED + CALIBRATED)
        self.statistics = calibrated(self.model, self.calibration)

    def unquantized(self) -> Score:
        """The converted model's."""
        directory = self.place / f"{self.model.family}-plain"
        phireg.convert(phireg.plan(self.model.directory, family=self.model.family), directory)
        return checkpoint_score(directory, self.rows)

    def quantized(
        self, qformat: str, cache: str | None, *, tp_size: int = 1, dtype: str = "auto"
    ) -> Score:
        """A quantized checkpoint's."""
        plan = phireg.plan(
            self.model.directory,
            family=self.model.family,
            tp_size=tp_size,
            dtype=dtype,
            qformat=qformat,
            kv_cache_dtype=cache,
        )
        directory = self.place / f"{self.model.family}-{qformat}-{cache}-{tp_size}-{dtype}"
        phireg.quantize(plan, directory, self.statistics)
        return checkpoint_score(directory, self.rows)

    def modelopt(self, qformat: str, cache: str | None) -> tuple[Score, Score]:
        """ModelOpt's fake-quantized model as it is, and with the maxima that it would export."""
        model = modelopt_model(self.model.directory, self.calibration, qformat, cache)

        def logits(ids: Tensor) -> Tensor:
            scores: Tensor = model(ids, use_cache=False).logits[0]
            return scores

        own = score(logits, self.rows)
        use_exported_maxima(model, qformat, cache)
        return own, score(logits, self.rows)

    def line(self, unquantized: Score, qformat: str, cache: str | None) -> Line:
        """All of one format."""
        one = self.quantized(qformat, cache)
        two = self.quantized(qformat, cache, tp_size=2)
        float32 = self.quantized(qformat, cache, dtype="float32")
        known = self.model.family in MODELOPT and find_spec("modelopt") is not None
        own, exported = self.modelopt(qformat, cache) if known else (None, None)
        return Line(
            self.model.family,
            qformat,
            cache,
            unquantized.perplexity,
            one.perplexity,
            one.agreement(unquantized),
            two.perplexity,
            float32.perplexity,
            exported.perplexity if exported else None,
            exported.agreement(float32) if exported else None,
            own.perplexity if own else None,
        )


def modelopt_model(directory: Path, rows: Rows, qformat: str, cache: str | None) -> Any:
    """ModelOpt's fake-quantized model, in float32.

    Its wildcard for inputs also quantizes what goes into LayerNorm modules, which no engine does:
    that is switched off. SmoothQuant's alpha is 1, as its exporter's scripts have it for Phi.
    """
    import modelopt.torch.quantization as mtq
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    config = copy.deepcopy(mtq.FP8_DEFAULT_CFG if qformat == "fp8" else mtq.INT8_SMOOTHQUANT_CFG)
    if qformat == "int8_sq":
        config["algorithm"] = {"method": "smoothquant", "alpha": 1.0}
    config["quant_cfg"].append({"quantizer_name": "*layernorm*", "enable": False})
    if cache is not None:
        bits = (4, 3) if cache == "fp8" else 8
        entry = {"num_bits": bits, "axis": None}
        name = "*[kv]_bmm_quantizer"
        config["quant_cfg"].append({"quantizer_name": name, "cfg": entry, "enable": True})

    def calibrate(quantizable: Any) -> None:
        for row in rows:
            quantizable(torch.tensor([row]), use_cache=False)

    with torch.no_grad():
        return mtq.quantize(model, config, calibrate)


def use_exported_maxima(model: Any, qformat: str, cache: str | None) -> None:
    """What the exporter does to the maxima before it writes a TensorRT-LLM checkpoint.

    q, k and v become one linear, so FP8 has one weight scale for all three. Keys and values share
    the larger scale, and FP8's is at least 1.
    """
    for layer in model.model.layers:
        attention = layer.self_attn
        if qformat == "fp8" and hasattr(attention, "q_proj"):
            _share([getattr(attention, f"{part}_proj").weight_quantizer for part in "qkv"])
        if cache is not None:
            _share(
                [attention.k_bmm_quantizer, attention.v_bmm_quantizer],
                least=E4M3_MAX if cache == "fp8" else 0.0,
            )


def _share(quantizers: Sequence[Any], least: float = 0.0) -> None:
    largest = max(least, *(float(quantizer.amax) for quantizer in quantizers))
    for quantizer in quantizers:
        quantizer.amax = torch.tensor(largest)


def measure(families: Sequence[str], rows: int, place: Path) -> Iterator[Line]:
    """The table, line by line."""
    for family in families:
        measured = Measured(family, rows, place)
        unquantized = measured.unquantized()
        for qformat, cache in FORMATS:
            if family == "phi3.5-moe" and qformat != "fp8":
                continue  # experts have no other format
            yield measured.line(unquantized, qformat, cache)


HEADER = (
    "| model | format | KV cache | unquantized | phireg | change | top-1 | TP 2 | "
    "phireg, float32 | ModelOpt | top-1 of both | ModelOpt, own maxima |\n" + "|---" * 12 + "|"
)


def row_of(line: Line) -> str:
    """A line of the Markdown table."""
    cells = [
        line.family,
        line.qformat,
        line.kv_cache_dtype or "",
        f"{line.unquantized:.4f}",
        f"{line.phireg:.4f}",
        f"{line.change:+.2%}",
        f"{line.top1:.1%}",
        f"{line.tensor_parallel:.4f}",
        f"{line.float32:.5f}",
        "" if line.modelopt is None else f"{line.modelopt:.5f}",
        "" if line.modelopt_top1 is None else f"{line.modelopt_top1:.2%}",
        "" if line.modelopt_own is None else f"{line.modelopt_own:.5f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--rows", type=int, default=EVALUATED)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(HEADER)
    lines = []
    with tempfile.TemporaryDirectory() as place:
        for line in measure(options.families, options.rows, Path(place)):
            print(row_of(line), flush=True)
            lines.append(dataclasses.asdict(line))
    if options.json is not None:
        options.json.write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
