"""``phireg run``: continue prompts, or chat, with a checkpoint, an engine or the source model."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phireg.cli.answers import (
    DEFAULT_NEW_TOKENS,
    Job,
    Timing,
    batches,
    document,
    new_tokens,
    show_answer,
    show_stream,
    timed,
)
from phireg.cli.errors import stopped
from phireg.cli.options import COMPUTE_DTYPES, Directory, compute_dtype, device_option, json_option
from phireg.cli.output import emit_generated, emit_json, note, spinner
from phireg.errors import UsageError

if TYPE_CHECKING:
    from phireg.executor import Sampling
    from phireg.generation import Backend, Description, Options
    from phireg.generation.prompts import Prompt


_LOADING = "loading the model"
_DEFAULT_BATCH = 8


@click.command()
@click.argument("place", type=Directory(), metavar="[CKPT|ENGINE|MODEL]", required=False)
@click.option(
    "--backend",
    metavar="NAME",
    help="executor, tensorrt-llm or hf.  [default: tensorrt-llm for an engine, else executor]",
)
@click.option("--engine-dir", type=Directory(), metavar="DIR", help="Another way to give ENGINE.")
@click.option(
    "--model-dir",
    "--hf-model-dir",
    type=Directory(),
    metavar="DIR|REPO",
    help="The source model, for backend hf.",
)
@click.option(
    "--prompt", "--input-text", "texts", multiple=True, metavar="TEXT", help="May be repeated."
)
@click.option(
    "--input-file",
    metavar="FILE",
    help='A prompt per line, or JSON per line with "prompt" or "input_ids"; - is standard input.',
)
@click.option("--chat", is_flag=True, help="Talk to the model, by its chat template.")
@click.option("--system", metavar="TEXT", help="With --chat: the system prompt.")
@click.option(
    "--max-new-tokens",
    "--max-output-len",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"[default: {DEFAULT_NEW_TOKENS}, with --chat 1024, or as many as fit]",
)
@click.option(
    "--temperature",
    type=float,
    help="Divides the logits; 0 takes the most likely token.  [default: 0; 1 with top-k or top-p]",
)
@click.option("--top-k", type=int, metavar="N", help="Draw among the N most likely tokens.")
@click.option("--top-p", type=float, metavar="P", help="Draw among the tokens that hold P.")
@click.option("--seed", "--random-seed", type=int, default=0, show_default=True, help="Of drawing.")
@click.option(
    "--num-beams",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="The best of N beams; not with the executor.",
)
@click.option(
    "--streaming", is_flag=True, help="Insist on text as it comes, which one prompt always gets."
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Prompts continued side by side.  [default: 8, or as many as an engine takes]",
)
@click.option(
    "--tokenizer-dir", type=Directory(), metavar="DIR", help="[default: where the model is]"
)
@device_option
@click.option(
    "--dtype",
    "--data-type",
    type=click.Choice(COMPUTE_DTYPES),
    default="auto",
    show_default=True,
    help="To compute in; auto is the model's own.",
)
@click.option(
    "--offload/--no-offload",
    default=None,
    help="Read each layer when it is needed.  [default: if a checkpoint exceeds the memory]",
)
@click.option(
    "--tp",
    type=click.IntRange(min=1),
    metavar="N",
    help="Start N processes through torchrun, one for each rank of a checkpoint.",
)
@json_option
def command(
    place: str | None,
    backend: str | None,
    engine_dir: str | None,
    model_dir: str | None,
    tp: int | None,
    device: str,
    dtype: str,
    offload: bool | None,
    **options: Any,
) -> None:
    """Continue prompts, or chat, with a checkpoint, an engine or the source model.

    Without --prompt, --input-file and --chat, standard input is the prompt. All ranks of a
    checkpoint run in this process, unless it is one of several: torchrun --nproc-per-node N -m
    phireg run CKPT ... Those of an engine have a process each: mpirun -n N phireg run ENGINE ...
    """
    from phireg.generation import Options, describe, process_rank, run_worker
    from phireg.generation.backend import check_directory
    from phireg.generation.processes import check_launcher, check_processes, run_processes

    name, directory = _chosen(place, backend, engine_dir, model_dir)
    if not check_launcher(name):
        return
    how = Options(device, compute_dtype(dtype), offload)
    rank, processes = process_rank(name)
    if rank > 0:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        run_worker(name, directory, how)
        return
    check_directory(name, directory)
    with spinner(_LOADING):
        model = describe(name, directory, how)
    check_processes(name, directory, model, processes, tp)
    _check_options(**options)
    if tp and tp > processes:
        raise click.exceptions.Exit(run_processes(tp, sys.argv[1:]))
    try:
        _run(name, directory, model, how=how, **options)
    except KeyboardInterrupt as interrupt:
        raise stopped(interrupt, "the text is not complete") from None


def _chosen(
    place: str | None, backend: str | None, engine_dir: str | None, model_dir: str | None
) -> tuple[str, Path]:
    """Return the backend's name and the directory that it runs."""
    from phireg.generation.backend import default_backend

    ways = (("the argument", place), ("--engine-dir", engine_dir), ("--model-dir", model_dir))
    given = [(way, path) for way, path in ways if path is not None]
    if not given:
        raise UsageError("there is nothing to run", hint="give a checkpoint or an engine.")
    if len(given) > 1:
        raise UsageError(
            f"{' and '.join(way for way, _ in given)} name one directory each, and only one is run",
            hint="give the one that the backend runs.",
        )
    ((way, path),) = given
    meant = {"--engine-dir": "tensorrt-llm", "--model-dir": "hf"}.get(way)
    if meant and backend and backend != meant:
        raise UsageError(
            f"{way} is for backend {meant}, not for {backend}",
            hint=f"leave out --backend, or give the directory without {way}.",
        )
    return backend or meant or default_backend(Path(path)), Path(path)


def _check_options(
    *,
    texts: Sequence[str],
    input_file: str | None,
    chat: bool,
    system: str | None,
    as_json: bool,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    num_beams: int,
    streaming: bool,
    **_others: Any,
) -> None:
    given = [("--prompt", texts), ("--input-file", input_file), ("--chat", chat)]
    named = [name for name, value in given if value]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} exclude each other", hint="give one of them.")
    if sys.stdin is None and (chat or input_file == "-" or not named):
        raise UsageError("standard input is closed", hint="give --prompt or --input-file FILE.")
    if not named and sys.stdin.isatty():
        raise UsageError(
            "there is nothing to continue",
            hint="give --prompt TEXT, --input-file FILE or --chat, or a text on standard input.",
        )
    if chat and as_json:
        raise UsageError("--json and --chat exclude each other", hint="leave one of them out.")
    if system is not None and not chat:
        raise UsageError("--system has no effect without --chat", hint="add --chat.")
    if num_beams > 1 and (chat or streaming):
        raise UsageError(
            f"--num-beams and {'--chat' if chat else '--streaming'} exclude each other: the best "
            "beam is known at the end only",
            hint="leave one of them out.",
        )
    if streaming and as_json:
        raise UsageError("--streaming and --json exclude each other", hint="leave one of them out.")
    _sampling(temperature, top_k, top_p, seed)


def _sampling(
    temperature: float | None, top_k: int | None, top_p: float | None, seed: int
) -> Sampling:
    from phireg.executor import Sampling

    if temperature is None:
        temperature = 0.0 if top_k is None and top_p is None else 1.0
    elif temperature == 0 and (top_k is not None or top_p is not None):
        raise UsageError(
            "--temperature 0 takes the most likely token, so --top-k and --top-p have no effect",
            hint="leave them out, or raise the temperature.",
        )
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed {seed} is not possible", hint="use 0 to 2^63 - 1.")
    return Sampling(temperature, top_k or 0, 1.0 if top_p is None else top_p, seed)


def _run(
    name: str,
    directory: Path,
    model: Description,
    *,
    how: Options,
    chat: bool,
    system: str | None,
    texts: Sequence[str],
    input_file: str | None,
    batch_size: int | None,
    num_beams: int,
    streaming: bool,
    tokenizer_dir: str | None,
    max_new_tokens: int | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    from phireg.generation.limits import check_batch, check_prompts

    job = _job(directory, model, tokenizer_dir, _sampling(**sampling), max_new_tokens, num_beams)
    size = batch_size or min(_DEFAULT_BATCH, model.max_batch or _DEFAULT_BATCH)
    check_batch(model, size, num_beams, job.sampling)
    if chat:
        conversation = _conversation(job, system)
        with _opened(name, directory, how) as backend:
            conversation.hold(backend)
        return
    prompts = _prompts(texts, input_file)
    if streaming and len(prompts) > 1:
        raise UsageError(
            f"--streaming shows one text as it comes, and there are {len(prompts)}",
            hint="leave it out, or give one prompt.",
        )
    inputs = [prompt.encoded(job.tokenizer) for prompt in prompts]
    check_prompts(model, inputs, max_new_tokens or 1, [prompt.where for prompt in prompts])
    started = time.monotonic()
    with _opened(name, directory, how) as backend:
        loaded = time.monotonic() - started
        if as_json:
            results = list(batches(backend, job, inputs, size))
            emit_json(document(job, backend, prompts, inputs, results, loaded))
        elif len(inputs) == 1 and job.tokenizer is not None:
            if num_beams > 1:
                ((((answer,), timing)),) = batches(backend, job, inputs, size)
                emit_generated(job.tokenizer.decode(answer.tokens) + "\n")
            else:
                timing = Timing()
                steps = backend.stream(inputs, new_tokens(job, inputs), job.stops, job.sampling)
                show_stream(timed(steps, timing), job.tokenizer, job.stops)
            note(str(timing))
        else:
            done = 0
            for answers, timing in batches(backend, job, inputs, size):
                for number, answer in enumerate(answers, done):
                    show_answer(job, f"[{number + 1}/{len(inputs)}]", prompts[number], answer)
                done += len(answers)
                note(str(timing))


@contextmanager
def _opened(name: str, directory: Path, how: Options) -> Iterator[Backend]:
    """The backend; reading large weights takes long enough to say so."""
    from phireg.generation import open_backend

    with ExitStack() as stack:
        with spinner(_LOADING):
            backend = stack.enter_context(open_backend(name, directory, how))
        yield backend


def _job(
    directory: Path,
    model: Description,
    tokenizer_dir: str | None,
    sampling: Sampling,
    max_new_tokens: int | None,
    num_beams: int,
) -> Job:
    """What is settled before the weights are read."""
    from phireg.generation.tokenizer import find_tokenizer, stop_ids
    from phireg.source.hub import resolve_model_dir

    files = resolve_model_dir(str(directory), None)[0]  # backend hf may run one from the hub
    other = Path(tokenizer_dir) if tokenizer_dir else None
    tokenizer = find_tokenizer(files, other)
    # An engine may come without the small files, which then are where its tokenizer is.
    lies_elsewhere = other is not None and not (files / "generation_config.json").exists()
    stops = stop_ids(other if other is not None and lies_elsewhere else files, tokenizer)
    return Job(directory, model, tokenizer, stops, sampling, max_new_tokens, num_beams)


def _conversation(job: Job, system: str | None) -> Any:
    from phireg.cli.conversation import Chat, opening

    if job.tokenizer is None:
        raise UsageError(
            "the model carries no tokenizer, and a chat needs one",
            hint="give --tokenizer-dir the directory of the source model.",
        )
    return Chat(
        job.tokenizer,
        job.stops | job.tokenizer.end_of_turn_ids,
        job.model.positions,
        job.max_new_tokens,
        job.sampling,
        opening(job.tokenizer, system),
    )


def _prompts(texts: Sequence[str], input_file: str | None) -> list[Prompt]:
    from phireg.generation.prompts import Prompt, read_prompts

    if texts:
        return [Prompt(f"--prompt {number}", text) for number, text in enumerate(texts, 1)]
    if input_file is not None and input_file != "-":
        try:
            return read_prompts(input_file, Path(input_file).read_bytes())
        except OSError as error:
            raise UsageError(
                f"cannot read {input_file}: {error.strerror}",
                hint="--input-file names a file of prompts; - is standard input.",
            ) from None
    content = sys.stdin.buffer.read()
    if input_file == "-":
        return read_prompts("standard input", content)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input is not UTF-8 text (byte {error.start})", hint="convert it to UTF-8."
        ) from None
    return [Prompt("standard input", text.rstrip("\r\n"))]
