"""``phireg run``: continue prompts, or chat, with a checkpoint straight from its files."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phireg.cli.answers import (
    DEFAULT_NEW_TOKENS,
    Job,
    Timing,
    batches,
    check_input,
    document,
    new_tokens,
    note,
    show_answer,
    show_stream,
    timed,
)
from phireg.cli.failures import stopped
from phireg.cli.options import DTYPE_CHOICES, Directory, json_option
from phireg.cli.text import emit_json
from phireg.errors import CheckError, UsageError

if TYPE_CHECKING:
    from phireg.backends import Options
    from phireg.executor import Blueprint, Sampling
    from phireg.text.prompts import Prompt


@click.command()
@click.argument("checkpoint_dir", type=Directory(), metavar="CKPT")
@click.option("--prompt", "texts", multiple=True, metavar="TEXT", help="May be given repeatedly.")
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
    "--batch-size",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    metavar="N",
    help="Prompts continued side by side.",
)
@click.option("--tokenizer-dir", type=Directory(), metavar="DIR", help="[default: CKPT]")
@click.option(
    "--device", default="auto", show_default=True, help="auto (a GPU, if any), cpu, cuda, cuda:N."
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPE_CHOICES),
    default="auto",
    show_default=True,
    help="To compute in; auto is the checkpoint's.",
)
@click.option(
    "--offload/--no-offload",
    default=None,
    help="Read each layer when it is needed.  [default: if the weights exceed the memory]",
)
@click.option(
    "--tp",
    type=click.IntRange(min=1),
    metavar="N",
    help="Start N processes through torchrun, one for each rank.",
)
@json_option
def command(checkpoint_dir: str, tp: int | None, device: str, **options: Any) -> None:
    """Continue prompts with a checkpoint, or chat with it.

    Without --prompt, --input-file and --chat, standard input is the prompt. All ranks run in this
    process, unless it is one of several: torchrun --nproc-per-node N -m phireg run CKPT ...
    """
    from phireg.backends import Options, follow, process_rank
    from phireg.backends.device import pick_device

    directory = Path(checkpoint_dir)
    how = Options(device, _dtype(options["dtype"]), options["offload"])
    rank, processes = process_rank("executor")
    if rank > 0:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        follow("executor", directory, how)
        return
    blueprint = _blueprint(directory)
    _check_processes(directory, blueprint, tp, processes)
    _check_options(**options)
    pick_device(device)
    if tp and tp > processes:
        from phireg.backends.launch import run_processes

        raise click.exceptions.Exit(run_processes(tp, sys.argv[1:]))
    try:
        _run(directory, blueprint, how=how, **options)
    except KeyboardInterrupt as interrupt:
        raise stopped(interrupt, "the text is not complete") from None


def _dtype(name: str) -> str | None:
    return None if name == "auto" else name


def _blueprint(directory: Path) -> Blueprint:
    """What the checkpoint's config.json says.

    Raises:
        UsageError: there is no such directory.
        CheckError: it is something else than a checkpoint, or one that cannot be run.
    """
    from phireg.checkpoint.jsonfile import read_json_object
    from phireg.executor import read_blueprint

    if not directory.is_dir():
        raise UsageError(f"no such directory: {directory}")
    path = directory / "config.json"
    config = read_json_object(path) if path.exists() else {}
    if "architecture" not in config:
        if "pretrained_config" in config or any(directory.glob("rank*.engine")):
            raise CheckError(
                f"{directory} is a built engine, not a TensorRT-LLM checkpoint",
                hint="give the checkpoint that it was built from.",
            )
        if "architectures" in config or "model_type" in config:
            raise CheckError(
                f"{directory} is a Hugging Face model, not a TensorRT-LLM checkpoint",
                hint=f"convert it first: phireg convert --model-dir {directory} --output-dir CKPT",
            )
    return read_blueprint(directory)


def _check_processes(directory: Path, blueprint: Blueprint, tp: int | None, processes: int) -> None:
    ranks = blueprint.tp_size
    if tp and tp != ranks:
        raise UsageError(
            f"--tp {tp}, but {directory} was converted for {ranks} rank(s)",
            hint=f"use --tp {ranks}, or convert the model again with --tp-size {tp}.",
        )
    if processes not in (1, ranks):
        raise UsageError(
            f"{processes} processes were started, but {directory} was converted for {ranks} "
            "rank(s)",
            hint=f"use torchrun --nproc-per-node {ranks}, or one process for all ranks.",
        )


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
        raise UsageError("--json and --chat exclude each other")
    if system is not None and not chat:
        raise UsageError("--system has no effect without --chat", hint="add --chat.")
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
        raise UsageError(f"--seed {seed} is not between 0 and 2^63 - 1")
    return Sampling(temperature, top_k or 0, 1.0 if top_p is None else top_p, seed)


def _run(
    directory: Path,
    blueprint: Blueprint,
    *,
    how: Options,
    chat: bool,
    system: str | None,
    texts: Sequence[str],
    input_file: str | None,
    batch_size: int,
    tokenizer_dir: str | None,
    max_new_tokens: int | None,
    as_json: bool,
    dtype: str,
    offload: bool | None,
    **sampling: Any,
) -> None:
    from phireg.backends import open_backend
    from phireg.text.stops import stop_ids
    from phireg.text.tokenizer import find_tokenizer

    tokenizer = find_tokenizer(directory, Path(tokenizer_dir) if tokenizer_dir else None)
    stops = stop_ids(directory, tokenizer)
    job = Job(directory, blueprint, tokenizer, stops, _sampling(**sampling), max_new_tokens)
    if chat:
        conversation = _conversation(job, system)
        with open_backend("executor", directory, how) as backend:
            conversation.hold(backend)
        return
    prompts = _prompts(texts, input_file)
    inputs = [prompt.encoded(tokenizer) for prompt in prompts]
    for prompt, ids in zip(prompts, inputs, strict=True):
        check_input(prompt.where, ids, job)
    started = time.monotonic()
    with open_backend("executor", directory, how) as backend:
        loaded = time.monotonic() - started
        if as_json:
            results = list(batches(backend, job, inputs, batch_size))
            emit_json(document(job, backend, prompts, inputs, results, loaded))
        elif len(inputs) == 1 and tokenizer is not None:
            timing = Timing()
            steps = backend.stream(inputs, new_tokens(job, inputs), stops, job.sampling)
            show_stream(timed(steps, timing), tokenizer, stops)
            note(str(timing))
        else:
            done = 0
            for answers, timing in batches(backend, job, inputs, batch_size):
                for number, answer in enumerate(answers, done):
                    show_answer(job, f"[{number + 1}/{len(inputs)}]", prompts[number], answer)
                done += len(answers)
                note(str(timing))


def _conversation(job: Job, system: str | None) -> Any:
    from phireg.cli.conversation import Chat, opening

    if job.tokenizer is None:
        raise UsageError(
            "the checkpoint carries no tokenizer, and a chat needs one",
            hint="give --tokenizer-dir the directory of the source model.",
        )
    return Chat(
        job.tokenizer,
        job.stops | job.tokenizer.end_of_turn_ids,
        job.blueprint.max_position_embeddings,
        job.max_new_tokens,
        job.sampling,
        opening(job.tokenizer, system),
    )


def _prompts(texts: Sequence[str], input_file: str | None) -> list[Prompt]:
    from phireg.text.prompts import Prompt, read_prompts

    if texts:
        return [Prompt(f"--prompt {number}", text) for number, text in enumerate(texts, 1)]
    if input_file is not None and input_file != "-":
        try:
            return read_prompts(input_file, Path(input_file).read_bytes())
        except OSError as error:
            raise UsageError(f"cannot read {input_file}: {error.strerror}") from None
    content = sys.stdin.buffer.read()
    if input_file == "-":
        return read_prompts("standard input", content)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8 text (byte {error.start})") from None
    return [Prompt("standard input", text.rstrip("\r\n"))]
