"""``phireg demo``: convert, verify and run a small trained model that comes with its family."""

from __future__ import annotations

import re
import shlex
import shutil
import textwrap
import time
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

import phireg
from phireg.cli import engines
from phireg.cli.errors import stopped, warn
from phireg.cli.help import ENGINE, OUTPUT, RANKS, TEXT, documented
from phireg.cli.options import Directory, PluginName, json_option, quiet_option
from phireg.cli.output import counted, emit, emit_json, next_steps, printable, spinner
from phireg.cli.streams import results
from phireg.cli.verify import exit_code, show_verification, verification_document
from phireg.files.sizes import size

if TYPE_CHECKING:
    from phireg.demo import Article, DemoModel
    from phireg.verification.result import Verification

DEFAULT_ARTICLE = 31
"""A long one that the first four models summarize well."""
_ALL = "all"
_BACKEND: Literal["tensorrt-rtx"] = "tensorrt-rtx"
_WIDTH = 80


@documented(
    "phireg demo",
    "phireg demo all --tp-size 2",
    page="demo-models.md",
    waits="converting the demo model",
)
@click.argument("family", type=PluginName("families", _ALL), default="phi3-small")
@OUTPUT.option(
    "--output-dir",
    type=Directory(),
    help="The checkpoint to make; with all, a directory of them.  [default: phireg-demo/FAMILY]",
)
@TEXT.option(
    "--article",
    "number",
    type=int,
    default=DEFAULT_ARTICLE,
    metavar="N",
    help="Which held-back article to summarize.",
)
@RANKS.option(
    "--tp-size",
    type=click.IntRange(1, 2),
    default=1,
    metavar="N",
    help="Tensor-parallel ranks, 1 or 2.",
)
@ENGINE.option(
    "--engine",
    is_flag=True,
    help="Also build an engine with TensorRT for RTX, which needs no GPU, and prove its network.",
)
@quiet_option("Print nothing unless a check fails.")
@json_option
def command(
    family: str,
    *,
    output_dir: str | None,
    number: int,
    tp_size: int,
    engine: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Convert, verify and run a small trained model.

    FAMILY is phi3-small by default, or all. The model comes with phireg and summarizes short
    articles; the article shown was not in its training. The exit code is 4 if a check fails.
    """
    from phireg import demo

    names: tuple[str, ...] = (family,)
    if family == _ALL:
        names, problems = demo.families()
        for problem in problems:
            warn(problem)
    pairs = [(model, model.article(number)) for model in map(demo.find, names)]
    if engine:
        from phireg.tensorrt.package import load_package

        load_package(_BACKEND)  # whatever is missing, before anything is written
    base = Path(output_dir or "phireg-demo")
    verbose = not (quiet or as_json)
    documents: list[dict[str, Any]] = []
    verifications: list[Verification] = []
    for model, article in pairs:
        target = base if output_dir and family != _ALL else base / model.family
        if verbose and documents:
            emit("")
        try:
            if engine:
                demo.check_engine_dir(_engine_dir(target))
            verification, document = _run(
                model, article, target, tp_size, verbose=verbose, quiet=quiet
            )
            verifications.append(verification)
            if engine and verification.passed:
                proof, document["engine"] = _engine(
                    model, article, target, verbose=verbose, quiet=quiet
                )
                verifications.append(proof)
        except KeyboardInterrupt as interrupt:
            what = "checkpoint and engine" if engine else "checkpoint"
            raise stopped(interrupt, f"every {what} in {base} is complete") from None
        documents.append(document)
    if as_json:
        emit_json({"article_number": number, "demos": documents})
    elif verbose and not exit_code(verifications):
        summarize = ["phireg", "summarize", documents[-1]["checkpoint_dir"], "--max-ite", "5"]
        plan = ["phireg", "plan", "--model-dir", "microsoft/Phi-3-mini-4k-instruct"]
        emit("\n" + next_steps(summarize, plan))
    if code := exit_code(verifications):
        raise click.exceptions.Exit(code)


def _run(
    model: DemoModel, article: Article, target: Path, tp_size: int, *, verbose: bool, quiet: bool
) -> tuple[Verification, dict[str, Any]]:
    """Convert, verify and run one model; return its verification and JSON document."""
    from phireg import demo

    started = time.monotonic()
    source = ["--model-dir", str(model.directory), "--family", model.family]
    ranks = ["--tp-size", str(tp_size)] if tp_size > 1 else []
    output = ["--output-dir", str(target), "--overwrite"]
    device = ["--device", "cpu", "--dtype", "float32"]
    commands = {
        "convert": ["phireg", "convert", *source, *ranks, *output],
        "verify": ["phireg", "verify", str(target), *source],
        "run": ["phireg", "run", str(target), *device, "--prompt", article.prompt],
    }
    if verbose:
        emit(f"== {model.family}\n\n$ {_folded(commands['convert'])}")
    converted = demo.convert(model, target, tp_size)
    if verbose:
        written = size(sum(converted.files.values()))
        emit(f"wrote {written}, {counted(tp_size, 'rank file')}")
        emit(f"\n$ {_folded(commands['verify'])}")
    with spinner("verifying", quiet=not verbose):
        verification = phireg.verify(target, model.directory, family=model.family)
    if verbose or (quiet and not verification.passed):
        show_verification(verification)
    summary = None
    if verification.passed:
        if verbose:
            emit(f"\n$ {_folded(commands['run'])}")
        with spinner("summarizing", quiet=not verbose):
            summary = demo.summarize(target, [article])[0]
        if verbose:
            emit("\n" + _comparison(article, summary, model.scores))
    return verification, {
        "family": model.family,
        "model_dir": str(model.directory),
        "checkpoint_dir": str(target),
        "tp_size": tp_size,
        "article": article.text,
        "reference": article.reference,
        "summary": summary,
        "identical": summary == article.reference,
        "commands": {name: shlex.join(words) for name, words in commands.items()},
        "files": dict(converted.files),
        "verification": verification_document(verification),
        "scores": model.scores,
        "engine": None,
        "seconds": round(time.monotonic() - started, 3),
    }


def _engine_dir(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}-engine")


def _engine(
    model: DemoModel, article: Article, checkpoint: Path, *, verbose: bool, quiet: bool
) -> tuple[Verification, dict[str, Any]]:
    """Build an engine of a demo checkpoint and prove it; return verification and document."""
    from phireg.demo import NOTE
    from phireg.tensorrt.build import build_engine
    from phireg.tensorrt.plan import plan_engine
    from phireg.trtllm.build import checkpoint_origin
    from phireg.verification.engine import verify_engine

    target = _engine_dir(checkpoint)
    build = ["phireg", "build", str(checkpoint), "--output-dir", str(target), "--overwrite"]
    commands = {
        "build": [*build, "--backend", _BACKEND],
        "verify": ["phireg", "verify", str(target), "--device", "cpu"],
    }
    with_gpu = {
        "verify": ["phireg", "verify", str(target), "--device", "cuda"],
        "run": ["phireg", "run", str(target), "--prompt", article.prompt],
        "summarize": ["phireg", "summarize", "--engine-dir", str(target)],
    }
    if verbose:
        emit(f"\n$ {_folded(commands['build'])}")
    origin = checkpoint_origin(checkpoint)
    plan = plan_engine(_BACKEND, origin, target, phireg.BuildOptions(), [NOTE])
    if verbose:
        for text in plan.notes:
            emit(f"note: {text}")
    with engines.build_progress(plan.spec.tp_size, quiet=not verbose) as progress:
        built = build_engine(plan, overwrite=True, progress=progress)
    if verbose:
        emit(engines.built_text(plan, built))
        emit(f"\n$ {_folded(commands['verify'])}")
    with spinner("proving the network", quiet=not verbose):
        proof = verify_engine(target, device="cpu")
    if verbose or (quiet and not proof.passed):
        show_verification(proof)
    if verbose:
        emit("\nOn a machine with one of these GPUs, the engine is verified there, and runs:")
        for words in with_gpu.values():
            emit(f"\n$ {_folded(words)}")
    return proof, {
        **engines.plan_document(plan, built),
        "commands": {name: shlex.join(words) for name, words in commands.items()},
        "gpu_commands": {name: shlex.join(words) for name, words in with_gpu.items()},
        "verification": verification_document(proof),
    }


def _folded(words: list[str]) -> str:
    """Write a command line with an option per line, as a shell accepts it."""
    return re.sub(r" (--[a-z])", r" \\\n    \1", shlex.join(words))


def _comparison(article: Article, summary: str, scores: dict[str, Any]) -> str:
    width = min(_WIDTH, shutil.get_terminal_size().columns) if results().isatty() else _WIDTH
    half = max(20, (width - 3) // 2)
    cells = [
        [title, *textwrap.wrap(printable(text), half)]
        for title, text in (("the model's summary", summary), ("reference", article.reference))
    ]
    pairs = zip_longest(*cells, fillvalue="")
    lines = [*(f"{left:<{half}}   {right}".rstrip() for left, right in pairs), ""]
    if summary == article.reference:
        lines.append("They are identical.")
    else:
        known = set(re.findall(r"\w+", article.reference))
        others = [word for word in re.findall(r"\w+", summary) if word not in known]
        lines.append(f"Not in the reference: {', '.join(others) or 'nothing'}.")
    if {"articles", "identical", "rouge1"} <= set(scores):
        lines.append(
            f"Of the {scores['articles']} held-back articles: {scores['identical']} identical "
            f"summaries, ROUGE-1 {scores['rouge1']:.3f}."
        )
    return "\n".join(lines)
