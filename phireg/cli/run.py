"""``phireg run``: continue prompts, or chat, with a checkpoint, an engine or the source model."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phireg.cli import options
from phireg.cli.completions import completions_document, emit_numbered, stream_text
from phireg.cli.errors import stopped
from phireg.cli.help import MODEL, PROMPTS, RUNNING, TEXT, documented
from phireg.cli.output import emit_generated, emit_json, end_waiting, note, spinner
from phireg.cli.streams import give_back
from phireg.errors import UsageError

if TYPE_CHECKING:
    from phireg.executor import Sampling
    from phireg.generation import Backend, Options
    from phireg.generation.generate import Generator
    from phireg.generation.prompts import Prompt

_LOADING = "loading the model"
_EXCLUSIVE = (
    ("--prompt", "--chat"),
    ("--prompt", "--input-file"),
    ("--input-file", "--chat"),
    ("--json", "--chat"),
    ("--streaming", "--json"),
    ("--num-beams", "--chat"),
    ("--num-beams", "--streaming"),
)


@documented(
    'phireg run ckpt --prompt "The capital of France is"',
    "phireg run ckpt --chat",
    waits="loading the model",
)
@options.checkpoint_argument("place", "[CKPT|ENGINE|MODEL]", required=False)
@RUNNING.option(
    "--backend",
    metavar="NAME",
    help="executor, tensorrt, tensorrt-llm or hf.  [default: what runs the directory]",
)
@MODEL.option(
    "--engine-dir", type=options.Directory(), help="Another way to give ENGINE.", rare=True
)
@options.model_dir_option("Another way to give MODEL, which may be owner/name on the hub here.")
@MODEL.option(
    "--weights-dir",
    type=options.Directory(),
    metavar="CKPT",
    help="The weights of an engine without.  [default: the checkpoint that it was built from]",
    rare=True,
)
@PROMPTS.option(
    *("--prompt", "texts"),
    aliases=("--input-text",),
    multiple=True,
    metavar="TEXT",
    help="May be repeated.",
)
@PROMPTS.option(
    "--input-file",
    metavar="FILE",
    help="A prompt per line; or .jsonl, .json, .csv, .parquet, or .npy of token ids; - is stdin.",
)
@PROMPTS.option("--chat", is_flag=True, help="Talk to the model, by its chat template.")
@PROMPTS.option("--system", metavar="TEXT", help="With --chat: the system prompt.")
@TEXT.option(
    "--max-new-tokens",
    aliases=("--max-output-len",),
    type=options.COUNT,
    help="New tokens at most.  [default: 128, with --chat 1024, or as many as fit]",
)
@TEXT.option(
    "--temperature",
    type=float,
    help="Divides the logits; 0 takes the most likely token.  [default: 0; 1 with top-k or top-p]",
)
@TEXT.option("--top-k", type=options.Whole(), help="Draw among the N most likely tokens.")
@TEXT.option("--top-p", type=float, metavar="P", help="Draw among the tokens that hold P.")
@TEXT.option(
    "--seed", aliases=("--random-seed",), type=int, default=0, metavar="N", help="Of drawing."
)
@TEXT.option(
    "--num-beams", type=options.COUNT, default=1, help="The best of N beams; not with the executor."
)
@TEXT.option(
    "--streaming", is_flag=True, help="Insist on text as it comes, which one prompt always gets."
)
@RUNNING.option(
    "--batch-size",
    type=options.COUNT,
    help="Prompts continued side by side.  [default: 8, or as many as an engine takes]",
)
@MODEL.option("--tokenizer-dir", type=options.Directory(), help="[default: where the model is]")
@options.device_option
@MODEL.option(
    "--dtype",
    aliases=("--data-type",),
    type=options.Dtype("auto"),
    default="auto",
    help="To compute in; auto is the model's own.",
)
@options.offload_option
@options.processes_option
@options.json_option
def command(
    place: str | None,
    backend: str | None,
    engine_dir: str | None,
    model_dir: str | None,
    weights_dir: str | None,
    tp_size: int | None,
    device: str,
    dtype: str,
    offload: bool | None,
    tokenizer_dir: str | None,
    max_new_tokens: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    num_beams: int,
    batch_size: int | None,
    **inputs: Any,
) -> None:
    """Continue prompts, or chat, with a checkpoint, an engine or the source model.

    Without --prompt, --input-file and --chat, standard input is the prompt. All ranks of a
    checkpoint run in this process, unless it is one of several: torchrun --nproc-per-node N
    --no-python phireg run CKPT ... Those of an engine have one each: mpirun -n N phireg run ENGINE
    """
    from phireg.generation import Options, opener
    from phireg.generation.generate import Generator, describe_runnable
    from phireg.generation.processes import run_processes

    name, directory = _choose(place, backend, engine_dir, model_dir)
    weights = None if weights_dir is None else Path(weights_dir)
    compute = Options(device, options.compute_dtype(dtype), offload, weights)
    if served_as_worker(name, directory, compute):
        return
    with spinner(_LOADING):
        description = describe_runnable(name, directory, compute, tp_size)
    sampling = _sampling(temperature, top_k, top_p, seed)
    arguments = _Inputs(**inputs)
    _check_options(arguments, num_beams)
    if tp_size and tp_size > opener(name).process_rank()[1]:
        end_waiting()
        give_back()
        raise click.exceptions.Exit(run_processes(tp_size, sys.argv[1:]))
    generator = Generator(
        name,
        directory,
        compute,
        description,
        tokenizer_dir=None if tokenizer_dir is None else Path(tokenizer_dir),
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        batch_size=batch_size,
    )
    try:
        _run(generator, arguments)
    except KeyboardInterrupt as interrupt:
        raise stopped(interrupt, "the text is not complete") from None


def served_as_worker(backend: str, directory: Path, options: Options) -> bool:
    """Run the requests of rank 0 if this process is another rank; return whether it is."""
    from phireg.generation import opener
    from phireg.generation.processes import check_launcher

    if not check_launcher(backend):
        return True
    if opener(backend).process_rank()[0] == 0:
        return False
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # rank 0 reports the signal
    opener(backend).run_worker(directory, options)
    return True


def _choose(
    place: str | None, backend: str | None, engine_dir: str | None, model_dir: str | None
) -> tuple[str, Path]:
    """Return the backend's name and the directory that it runs."""
    from phireg.files.kinds import ENGINE, check_kind
    from phireg.generation.backend import default_backend

    ways = (("the argument", place), ("--engine-dir", engine_dir), ("--model-dir", model_dir))
    given = [(way, path) for way, path in ways if path is not None]
    if not given:
        raise UsageError(
            "there is nothing to run", hint="give a checkpoint, an engine or a source model"
        )
    if len(given) > 1:
        raise UsageError(
            f"{' and '.join(way for way, _ in given)} name one directory each, and only one is run",
            hint="give the one that the backend runs.",
        )
    ((way, path),) = given
    meant = {"--model-dir": ["hf"], "--engine-dir": ["tensorrt", "tensorrt-llm"]}.get(way)
    if meant and backend and backend not in meant:
        raise UsageError(
            f"{way} is for backend {' or '.join(meant)}, not for {backend}",
            hint=f"leave out --backend, or give the directory without {way}.",
        )
    if meant == ["hf"]:
        return "hf", Path(path)  # perhaps of the hub
    if way == "--engine-dir":
        check_kind(Path(path), ENGINE)
    return backend or default_backend(Path(path)), Path(path)


@dataclass(frozen=True)
class _Inputs:
    texts: Sequence[str]
    input_file: str | None
    chat: bool
    system: str | None
    streaming: bool
    as_json: bool


def _check_options(arguments: _Inputs, num_beams: int) -> None:
    inputs = {
        "--prompt": arguments.texts,
        "--input-file": arguments.input_file,
        "--chat": arguments.chat,
    }
    options = inputs | {
        "--json": arguments.as_json,
        "--streaming": arguments.streaming,
        "--num-beams": num_beams > 1,  # the best beam is known at the end only
    }
    for pair in _EXCLUSIVE:
        if all(options[name] for name in pair):
            raise UsageError(
                f"{' and '.join(pair)} exclude each other", hint="leave one of them out."
            )
    if arguments.system is not None and not arguments.chat:
        raise UsageError("--system has no effect without --chat", hint="add --chat.")
    reads_stdin = arguments.chat or arguments.input_file == "-" or not any(inputs.values())
    if sys.stdin is None and reads_stdin:
        raise UsageError("standard input is closed", hint="give --prompt or --input-file FILE.")
    if not any(inputs.values()) and sys.stdin.isatty():
        raise UsageError(
            "there is nothing to continue",
            hint="give --prompt TEXT, --input-file FILE or --chat, or a text on standard input.",
        )


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


def _run(generator: Generator, inputs: _Inputs) -> None:
    from phireg.cli.chat import Chat
    from phireg.generation.generate import Timing

    if inputs.chat:
        conversation = Chat(generator, inputs.system)
        with _open(generator) as backend:
            conversation.run(backend)
        return
    with spinner("encoding the prompts"):
        prompts = generator.encode(_read_prompts(inputs.texts, inputs.input_file))
    if inputs.streaming and len(prompts) > 1:
        raise UsageError(
            f"--streaming shows one text as it comes, and there are {len(prompts)}",
            hint="leave it out, or give one prompt.",
        )
    started = time.monotonic()
    with _open(generator) as backend:
        load_s = time.monotonic() - started
        if inputs.as_json:
            batches = list(generator.batches(backend, prompts))
            emit_json(completions_document(generator, backend, batches, load_s))
            return
        if len(prompts) == 1 and generator.tokenizer and generator.num_beams == 1:
            timing = Timing()
            stream_text(generator.steps(backend, prompts, timing), generator.tokenizer)
            note(str(timing))
            return
        number = 0
        for completions, timing in generator.batches(backend, prompts):
            for completion in completions:
                number += 1
                if len(prompts) > 1 or completion.text is None:
                    emit_numbered(f"[{number}/{len(prompts)}]", completion)
                else:
                    emit_generated(f"{completion.text}\n")
            note(str(timing))


@contextmanager
def _open(generator: Generator) -> Iterator[Backend]:
    with ExitStack() as stack:
        with spinner(_LOADING):
            backend = stack.enter_context(generator.open())
        yield backend


def _read_prompts(texts: Sequence[str], input_file: str | None) -> list[Prompt]:
    from phireg.data.formats import decode_text
    from phireg.files.regular import Limit, read_named
    from phireg.generation.prompts import Prompt, read_prompts

    if texts:
        return [Prompt(f"--prompt {number}", text) for number, text in enumerate(texts, 1)]
    if input_file is not None and input_file != "-":
        return read_prompts(input_file, read_named(Path(input_file)))
    name, content = "standard input", sys.stdin.buffer.read(Limit.ROWS + 1)
    if len(content) > Limit.ROWS:
        raise UsageError(f"{name}: more than the {Limit.ROWS} bytes accepted")
    if input_file == "-":
        return read_prompts(name, content)
    return [Prompt(name, decode_text(name, content).rstrip("\r\n"))]
