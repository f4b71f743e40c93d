"""``phireg summarize``: summarize articles with backends and score them by ROUGE."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import phireg
from phireg.cli import options
from phireg.cli.errors import stopped
from phireg.cli.help import ACCURACY, MODEL, PROMPTS, RUNNING, TEXT, documented
from phireg.cli.output import (
    ProgressBars,
    counted,
    emit,
    emit_json,
    end_waiting,
    memory,
    page_facts,
    printable,
    table,
)
from phireg.cli.streams import give_back
from phireg.errors import CheckError, UsageError

if TYPE_CHECKING:
    from phireg.summarization.models import ModelRun
    from phireg.summarization.result import BackendResult, Summarization, Thresholds

THRESHOLD = 15.0
"""The default of both thresholds in TensorRT-LLM's summarize.py."""


@documented(
    "phireg summarize ckpt",
    "phireg summarize ckpt --model-dir ./phi-2 --test-hf --check-accuracy",
    page="summarize.md",
    waits="loading the models",
)
@options.checkpoint_argument("place", "[CKPT|ENGINE]", required=False)
@MODEL.option("--engine-dir", type=options.Directory(), help="The engine (or checkpoint).")
@options.model_dir_option("The source model, for backend hf; may be owner/name on the hub.")
@MODEL.option(
    "--tokenizer-dir",
    type=options.Directory(),
    help="Where the tokenizer is.  [default: CKPT, or the source model]",
)
@RUNNING.option(
    *("--backend", "backends"),
    multiple=True,
    metavar="NAME",
    help="executor, tensorrt, tensorrt-llm or hf; may be given repeatedly.  [default: by CKPT or "
    "ENGINE]",
)
@RUNNING.option("--test-trt-llm", is_flag=True, help="Run the engine.", rare=True)
@RUNNING.option("--test-hf", is_flag=True, help="Also run the source model, beside the others.")
@PROMPTS.option(
    "--dataset",
    default="auto",
    metavar="FILE|NAME",
    help="JSONL, CSV or parquet with article, highlights; or cnn_dailymail, or demo.",
)
@PROMPTS.option("--dataset-dir", type=options.Directory(), help="cnn_dailymail on this disk.")
@PROMPTS.option(
    "--eval-task",
    type=click.Choice(("summarize",)),
    default="summarize",
    expose_value=False,
    help="There is no other.",
    rare=True,
)
@RUNNING.option("--batch-size", type=options.COUNT, default=1, help="Articles side by side.")
@PROMPTS.option("--max-ite", type=options.COUNT, default=20, help="Batches at most.")
@PROMPTS.option(
    *("--max-input-len", "max_input_length"),
    aliases=("--max-input-length",),
    type=options.Whole(2),
    default=923,
    help="Tokens of a prompt at most; its beginning is cut off.",
)
@PROMPTS.option(
    *("--min-input-len", "min_input_length"),
    aliases=("--min-input-length",),
    type=options.Whole(0),
    default=0,
    help="Leave out articles whose prompt has no more tokens.",
)
@TEXT.option(
    *("--max-new-tokens", "output_len"),
    aliases=("--output-len", "--max-output-len"),
    type=options.COUNT,
    default=100,
    help="New tokens at most.",
)
@TEXT.option("--num-beams", type=options.COUNT, default=1, help="The best of N beams.")
@ACCURACY.option("--eval-ppl", is_flag=True, help="Also compute perplexity.")
@ACCURACY.option("--check-accuracy", is_flag=True, help="End with 4 if a threshold is missed.")
@ACCURACY.option(
    *("--check-backend", "checked"),
    multiple=True,
    metavar="NAME",
    help="Which backends to check; may be given repeatedly.  [default: all but hf]",
)
@ACCURACY.option(
    "--rouge1-threshold",
    aliases=("--tensorrt-llm-rouge1-threshold",),
    type=float,
    metavar="X",
    help=f"rouge1 must be above it, whatever the backend.  [default: {THRESHOLD}]",
)
@ACCURACY.option(
    "--ppl-threshold",
    aliases=("--tensorrt-llm-ppl-threshold",),
    type=float,
    metavar="X",
    help=f"Perplexity must be below it.  [default: {THRESHOLD}]",
)
@RUNNING.option(
    "--dtype",
    aliases=("--data-type",),
    type=options.Dtype("auto"),
    default="auto",
    help="What the executor computes in; auto is the checkpoint's.",
)
@RUNNING.option(
    "--hf-data-type",
    type=options.Dtype("auto"),
    default="auto",
    rare=True,
    help="What the source model computes in; auto is its own.",
)
@options.device_option
@options.offload_option
@options.processes_option
@options.report_option
@options.quiet_option("No progress bar.")
@options.json_option
def command(
    place: str | None,
    engine_dir: str | None,
    model_dir: str | None,
    tokenizer_dir: str | None,
    backends: Sequence[str],
    test_trt_llm: bool,
    test_hf: bool,
    dtype: str,
    hf_data_type: str,
    device: str,
    offload: bool | None,
    tp_size: int | None,
    dataset: str,
    dataset_dir: str | None,
    check_accuracy: bool,
    checked: Sequence[str],
    rouge1_threshold: float | None,
    ppl_threshold: float | None,
    report: Path | None,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Summarize articles with backends and score them by ROUGE.

    The task is that of TensorRT-LLM's summarize.py: the same prompts, lengths and scores.
    """
    from phireg.generation.processes import run_processes
    from phireg.summarization.models import (
        ENGINE_BACKEND,
        check_model_processes,
        choose_models,
        is_worker,
        serve_as_worker,
    )
    from phireg.summarization.task import Settings

    started = time.monotonic()
    hf_dir = None if model_dir is None else Path(model_dir)
    models = choose_models(
        [Path(directory) for directory in (place, engine_dir) if directory is not None],
        hf_dir,
        [*backends, *([ENGINE_BACKEND] if test_trt_llm else [])],
        phireg.Options(device, options.compute_dtype(dtype), offload),
        hf_dtype=options.compute_dtype(hf_data_type),
        also_hf=test_hf,
    )
    if any(map(is_worker, models)):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # rank 0 reports the signal
        serve_as_worker(models)
        return
    thresholds = _thresholds(
        models, check_accuracy, checked, rouge1_threshold, ppl_threshold, settings["eval_ppl"]
    )
    if check_model_processes(models, tp_size) and tp_size:
        end_waiting()
        give_back()
        raise click.exceptions.Exit(run_processes(tp_size, sys.argv[1:]))
    try:
        with ProgressBars(quiet) as bars:
            bars.spinner("loading the articles")
            summarization = phireg.summarize(
                models,
                Settings(**settings),
                dataset=dataset,
                dataset_dir=dataset_dir,
                tokenizer_dir=tokenizer_dir,
                model_dirs=[] if hf_dir is None else [hf_dir],
                thresholds=thresholds,
                progress=lambda name, more, total: bars.count(name, "articles")(more, total),
            )
    except KeyboardInterrupt as interrupt:
        raise stopped(interrupt, "nothing was kept") from None
    if report is not None:
        from phireg.report.page import write_page
        from phireg.report.summary import render_summarization

        write_page(render_summarization(summarization, page_facts(started)), report)
    if as_json:
        emit_json(_document(summarization))
    else:
        _emit_scores(summarization, report)
    if summarization.passed is False:
        raise click.exceptions.Exit(CheckError.exit_code)


def _thresholds(
    models: Sequence[ModelRun],
    check_accuracy: bool,
    checked: Sequence[str],
    rouge1: float | None,
    ppl: float | None,
    eval_ppl: bool,
) -> Thresholds | None:
    """Return the thresholds that the options ask for; None without --check-accuracy."""
    from phireg.summarization.result import Thresholds

    if not check_accuracy:
        options = {
            "--check-backend": checked or None,
            "--rouge1-threshold": rouge1,
            "--ppl-threshold": ppl,
        }
        for name, value in options.items():
            if value is not None:
                raise UsageError(
                    f"{name} has no effect without --check-accuracy", hint="add --check-accuracy."
                )
        return None
    if ppl is not None and not eval_ppl:
        raise UsageError("--ppl-threshold has no effect without --eval-ppl", hint="add --eval-ppl.")
    running = [model.backend for model in models]
    for name in checked:
        if name not in running:
            raise UsageError(
                f"--check-backend {name}, but that backend is not run",
                hint=f"run: {', '.join(running)}.",
            )
    names = list(checked) or [name for name in running if name != "hf"]
    if not names:
        raise UsageError(
            "--check-accuracy checks all backends but hf, and only hf is run",
            hint="add --check-backend hf.",
        )
    ppl_threshold = THRESHOLD if ppl is None else ppl
    return Thresholds(
        names, THRESHOLD if rouge1 is None else rouge1, ppl_threshold if eval_ppl else None
    )


def _emit_scores(summarization: Summarization, report: Path | None) -> None:
    count = len(summarization.samples)
    emit(f"{summarization.data}: {counted(count, 'article')}")
    if summarization.note is not None:
        emit(
            f"note: not cnn_dailymail, because {summarization.note}: these scores compare backends"
        )
        emit("      with each other, and say nothing on how well the model summarizes")
    emit("")
    head = ["backend", "rouge1", "rouge2", "rougeL", "rougeLsum"]
    if summarization.settings.eval_ppl:
        head.append("perplexity")
    head += ["tokens/s", "latency", "memory"]
    rows = [head, *(_row(summarization, result) for result in summarization.backends)]
    emit(table(rows, right=range(1, len(head))))
    emit("")
    for (first, second), same in summarization.agreement().items():
        emit(f"{first} and {second}: {same} of {count} summaries are the same")
    if report is not None:
        emit(f"report: {report}")
    if summarization.passed is None:
        emit("no score was checked: --check-accuracy does that")
    for check in summarization.checks:
        word, color = ("passed", "green") if check.passed else ("FAILED", "red")
        emit(click.style(printable(f"{word}  {check}"), fg=color), styled=True)


def _row(summarization: Summarization, result: BackendResult) -> list[str]:
    row = [result.name, *(f"{score:.2f}" for score in result.rouge.total.values())]
    if summarization.settings.eval_ppl:
        row.append("unknown" if result.perplexity is None else f"{result.perplexity:.3f}")
    peak = "unknown" if result.memory is None else memory(result.memory)
    return [*row, f"{result.tokens_per_second:,.1f}", f"{result.latency:.3f} s", peak]


def _document(summarization: Summarization) -> dict[str, Any]:
    return {
        "data": summarization.data,
        "note": summarization.note,
        "settings": summarization.settings,
        "passed": summarization.passed,
        "checks": [{**asdict(check), "passed": check.passed} for check in summarization.checks],
        "backends": [
            {
                "backend": result.name,
                "place": result.directory,
                **result.rouge.total,
                "perplexity": result.perplexity,
                "new_tokens": result.new_tokens,
                "seconds": round(result.seconds, 3),
                "latency_seconds": round(result.latency, 4),
                "tokens_per_second": round(result.tokens_per_second, 2),
                "peak_memory_bytes": result.memory,
            }
            for result in summarization.backends
        ],
        "same_summaries": [
            {"between": pair, "count": count} for pair, count in summarization.agreement().items()
        ],
        "articles": [
            {
                "where": sample.where,
                "prompt_tokens": len(sample.prompt),
                "reference": sample.reference,
                "summaries": [
                    {
                        "backend": result.name,
                        "summary": result.summaries[index].text,
                        "new_tokens": result.summaries[index].new_tokens,
                        **result.rouge.articles[index],
                        "perplexity": result.summaries[index].perplexity,
                    }
                    for result in summarization.backends
                ],
            }
            for index, sample in enumerate(summarization.samples)
        ],
        "provenance": dict(summarization.provenance),
    }
