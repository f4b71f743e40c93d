"""``phireg summarize``: how well backends summarize articles, by ROUGE."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phireg.cli.errors import stopped
from phireg.cli.options import (
    COMPUTE_DTYPES,
    Directory,
    check_file,
    compute_dtype,
    device_option,
    json_option,
    quiet_option,
    report_option,
)
from phireg.cli.output import ProgressBars, emit_json, note
from phireg.cli.task_options import THRESHOLD, task_options
from phireg.errors import CheckError, UsageError

if TYPE_CHECKING:
    from phireg.data.articles import Data
    from phireg.summarization.contestants import Contestant, Places
    from phireg.summarization.result import Summarization
    from phireg.summarization.run import Task
    from phireg.summarization.task import Settings

_COUNT = click.IntRange(min=1)


@click.command()
@click.argument("place", type=Directory(), metavar="[CKPT|ENGINE]", required=False)
@click.option("--engine-dir", type=Directory(), metavar="DIR", help="The engine (or checkpoint).")
@click.option(
    "--hf-model-dir", type=Directory(), metavar="DIR|REPO", help="The source model, for hf."
)
@click.option("--tokenizer-dir", type=Directory(), metavar="DIR", help="[default: CKPT, or hf's]")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    metavar="NAME",
    help="executor, tensorrt-llm or hf; may be given repeatedly.  [default: by CKPT or ENGINE]",
)
@click.option("--test-trt-llm", is_flag=True, help="Run the engine: --backend tensorrt-llm.")
@click.option("--test-hf", is_flag=True, help="Also run the source model, beside the others.")
@task_options
@click.option(
    "--data-type",
    type=click.Choice(COMPUTE_DTYPES),
    default="auto",
    show_default=True,
    help="What the executor computes in; auto is the checkpoint's.",
)
@click.option(
    "--hf-data-type",
    type=click.Choice(COMPUTE_DTYPES),
    default="auto",
    show_default=True,
    help="What the source model computes in; auto is its own.",
)
@device_option
@click.option(
    "--offload/--no-offload",
    default=None,
    help="Executor: read each layer when it is needed.  [default: if the weights exceed memory]",
)
@click.option(
    "--tp",
    type=_COUNT,
    metavar="N",
    help="Executor: start N processes through torchrun, one for each rank.",
)
@report_option
@click.option(
    "--results",
    type=click.Path(),
    metavar="FILE",
    help="Keep results as they come; a killed run goes on from it.  [default: beside --report]",
)
@click.option("--overwrite", is_flag=True, help="Start anew, whatever --results holds.")
@quiet_option("No progress bar.")
@json_option
def command(as_json: bool, quiet: bool, report: str | None, **options: Any) -> None:
    """Summarize articles with backends and score them by ROUGE.

    The task is that of TensorRT-LLM's summarize.py: the same prompts, lengths and scores.
    """
    del options["eval_task"]
    report_path = None if report is None else check_file(Path(report), "--report")
    results_path = _results_path(options.pop("results"), report_path, options["overwrite"])
    tp, device_options = options.pop("tp"), {k: options.pop(k) for k in ("device", "offload")}
    contestants, places = _contestants(device_options, **options)
    if _followed(contestants):
        return
    from phireg.summarization.contestants import check_processes

    checks = _checked(contestants, **options)
    if tp and _start(tp, contestants):
        from phireg.generation.processes import run_processes

        raise click.exceptions.Exit(run_processes(tp, sys.argv[1:]))
    check_processes(contestants)
    try:
        found = _run(contestants, places, checks, results_path, quiet=quiet, **options)
    except KeyboardInterrupt as interrupt:
        raise stopped(interrupt, _outcome(results_path)) from None
    if report_path is not None:
        from phireg.report.page import write_page
        from phireg.report.summary import render_summarization

        write_page(render_summarization(found), report_path)
    if as_json:
        from phireg.summarization.document import summarization_document

        emit_json(summarization_document(found))
    else:
        from phireg.cli.scores import show_scores

        show_scores(found, report_path, results_path)
    if not found.passed:
        raise click.exceptions.Exit(CheckError.exit_code)


def _results_path(results: str | None, report: Path | None, overwrite: bool) -> Path | None:
    if results is not None:
        return check_file(Path(results), "--results")
    if report is not None:
        return report.with_name(f"{report.stem}.results.jsonl")
    if overwrite:
        raise UsageError(
            "--overwrite has no effect without --results or --report", hint="leave it out."
        )
    return None


def _contestants(
    device_options: dict[str, Any],
    *,
    place: str | None,
    engine_dir: str | None,
    hf_model_dir: str | None,
    backends: Sequence[str],
    test_trt_llm: bool,
    test_hf: bool,
    data_type: str,
    hf_data_type: str,
    **_others: Any,
) -> tuple[tuple[Contestant, ...], Places]:
    from phireg.generation.backend import Options, opener
    from phireg.summarization.contestants import ENGINE, EXECUTOR, HF, choose

    places = _places(place, engine_dir, hf_model_dir)
    names = [*backends, *([ENGINE] if test_trt_llm else [])]
    if not names and places.engine is not None:
        names = [ENGINE]
    elif not names:
        names = [EXECUTOR]
    if test_hf:
        names.append(HF)
    for name in names:
        opener(name)
    if places.checkpoint is None and places.engine is None and set(names) != {HF}:
        raise UsageError(
            "there is nothing to run",
            hint="give a checkpoint or an engine; or --backend hf and --hf-model-dir.",
        )
    options = Options(dtype=compute_dtype(data_type), **device_options)
    return choose(names, places, options, compute_dtype(hf_data_type)), places


def _places(place: str | None, engine_dir: str | None, hf_model_dir: str | None) -> Places:
    """Sort the directories into checkpoint and engine."""
    from phireg.files.kinds import CHECKPOINT, ENGINE, HF_MODEL, Kind
    from phireg.generation.backend import kind_of_place
    from phireg.summarization.contestants import Places

    kinds: dict[Kind, Path] = {}
    for path in (Path(given) for given in (place, engine_dir) if given is not None):
        kind = kind_of_place(path)
        if kind is HF_MODEL:
            raise UsageError(
                f"{path} is a Hugging Face model, not a checkpoint or an engine",
                hint=f"convert it first: phireg convert --model-dir {path} --output-dir CKPT; or "
                f"run it as it is: --backend hf --hf-model-dir {path}",
            )
        kind = ENGINE if kind is ENGINE else CHECKPOINT
        if kind in kinds:
            raise UsageError(
                f"{kinds[kind]} and {path} are both {kind.name}",
                hint="give one checkpoint and one engine at most.",
            )
        kinds[kind] = path
    hf = Path(hf_model_dir) if hf_model_dir is not None else None
    return Places(kinds.get(CHECKPOINT), kinds.get(ENGINE), hf)


def _followed(contestants: Sequence[Contestant]) -> bool:
    """Do as rank 0 says, if this process is another rank of one of the backends."""
    from phireg.generation.backend import run_worker
    from phireg.summarization.contestants import following

    backends = following(contestants)
    if backends:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        for one in backends:
            run_worker(one.name, one.place, one.options)
    return bool(backends)


def _checked(
    contestants: Sequence[Contestant],
    *,
    check_accuracy: bool,
    checked: Sequence[str],
    rouge1_threshold: float | None,
    ppl_threshold: float | None,
    eval_ppl: bool,
    **_others: Any,
) -> dict[str, Any] | None:
    """The arguments of ``make_checks``; None if nothing is to be checked."""
    given = {
        "--check-backend": checked or None,
        "--tensorrt-llm-rouge1-threshold": rouge1_threshold,
        "--tensorrt-llm-ppl-threshold": ppl_threshold,
    }
    if not check_accuracy:
        for name, value in given.items():
            if value is not None:
                raise UsageError(
                    f"{name} has no effect without --check-accuracy", hint="add --check-accuracy."
                )
        return None
    if ppl_threshold is not None and not eval_ppl:
        raise UsageError(
            "--tensorrt-llm-ppl-threshold has no effect without --eval-ppl", hint="add --eval-ppl."
        )
    running = [one.name for one in contestants]
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
    ppl = THRESHOLD if ppl_threshold is None else ppl_threshold
    return {
        "names": names,
        "rouge1_threshold": THRESHOLD if rouge1_threshold is None else rouge1_threshold,
        "ppl_threshold": ppl if eval_ppl else None,
    }


def _start(tp: int, contestants: Sequence[Contestant]) -> bool:
    """Whether processes are still to be started for ``--tp``."""
    from phireg.generation.backend import describe, process_rank
    from phireg.summarization.contestants import EXECUTOR

    one = next((one for one in contestants if one.name == EXECUTOR), None)
    if one is None:
        raise UsageError("--tp is for the executor, which is not run", hint="leave it out.")
    ranks = describe(one.name, one.place, one.options).tp_size
    if tp != ranks:
        raise UsageError(
            f"--tp {tp}, but {one.place} was converted for {ranks} rank(s)",
            hint=f"use --tp {ranks}, or convert the model again with --tp-size {tp}.",
        )
    return tp > process_rank(EXECUTOR)[1]


def _run(
    contestants: Sequence[Contestant],
    places: Places,
    checks: dict[str, Any] | None,
    results_path: Path | None,
    *,
    dataset: str,
    dataset_dir: str | None,
    tokenizer_dir: str | None,
    overwrite: bool,
    quiet: bool,
    **options: Any,
) -> Summarization:
    from phireg.data.articles import TEST_ROWS, open_data
    from phireg.summarization.contestants import check_fits
    from phireg.summarization.result import Summarization, make_checks
    from phireg.summarization.resultsfile import open_results
    from phireg.summarization.run import evaluate
    from phireg.summarization.task import Settings
    from phireg.summarization.traits import identity, provenance

    settings = Settings(**{name: options[name] for name in Settings.__dataclass_fields__})
    wanted = TEST_ROWS if settings.min_input_length else settings.count
    if not quiet:
        note("loading the articles")
    data = open_data(dataset, wanted, places.given(), dataset_dir)
    task = _task(data, places, settings, tokenizer_dir)
    for one in contestants:
        check_fits(one, task.samples, settings)
    told = identity(contestants, task, digests=results_path is not None)
    total = len(task.samples)
    with (
        open_results(results_path, told, overwrite=overwrite) as results,
        ProgressBars(quiet) as bars,
    ):
        found = evaluate(
            contestants, task, results, lambda name, more: bars.count(name, "articles")(more, total)
        )
    return Summarization(
        data.name,
        data.note,
        settings,
        tuple(task.samples),
        found,
        make_checks(found, **checks) if checks else (),
        results.earlier,
        provenance(told, data.name),
    )


def _task(data: Data, places: Places, settings: Settings, tokenizer_dir: str | None) -> Task:
    from phireg.generation.tokenizer import find_tokenizer, stop_ids
    from phireg.summarization.run import Task
    from phireg.summarization.task import make_samples

    owner, *others = places.given()
    tokenizer = find_tokenizer(owner, Path(tokenizer_dir) if tokenizer_dir else None)
    for other in others:
        tokenizer = tokenizer or find_tokenizer(other)
    if tokenizer is None:
        raise UsageError(
            f"{owner} carries no tokenizer",
            hint="give --tokenizer-dir (or --hf-model-dir) the directory of the source model.",
        )
    # As upstream, which ends a summary with the end of a text, not of a turn.
    own = tokenizer.eos_id
    stops = stop_ids(owner, tokenizer) if own is None else frozenset({own})
    return Task(make_samples(data.rows, tokenizer, settings), settings, tokenizer, stops)


def _outcome(results: Path | None) -> str:
    if results is None:
        return "nothing was kept; with --results FILE a run can go on where it stopped"
    return f"the results so far are in {results}; the same command goes on from there"
