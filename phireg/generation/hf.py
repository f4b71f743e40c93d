"""The source model as a backend: transformers' class, or the one that its family provides."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from phireg import device as devices
from phireg import registry
from phireg.config.common import is_long_rope
from phireg.config.hf import HFConfig
from phireg.dtypes import WEIGHT_DTYPES
from phireg.errors import SourceError
from phireg.executor import Sampling
from phireg.executor.finite import NotFiniteError, finite
from phireg.files.json import read_json_object
from phireg.files.kinds import HF_MODEL, check_kind
from phireg.generation.backend import Description, LongRope, Options, Request
from phireg.generation.limits import check_request, mean_nll
from phireg.generation.processes import process_rank, run_worker
from phireg.reference.load import Reference, open_reference
from phireg.source.hub import resolve_model_dir
from phireg.source.readings import open_source

__all__ = ["HFBackend", "describe", "load", "process_rank", "run_worker"]

_DEFAULT_DTYPE = "float32"


def describe(directory: Path, options: Options) -> Description:
    """See :class:`phireg.generation.backend.Opener`; ``directory`` may be a hub repository."""
    devices.pick_device(options.device)
    return _read_model(directory)[-1]


def _read_model(model: Path) -> tuple[Path, HFConfig, registry.FamilyChoice, Description]:
    """Return a source model's directory, config, family and the limits of its table."""
    directory, _ = resolve_model_dir(str(model), None)
    check_kind(directory, HF_MODEL)
    path = directory / "config.json"
    hf = HFConfig(read_json_object(path))
    choice = registry.choose(hf)
    fields = choice.family.config_fields().translate(hf).fields
    try:
        vocab_size, positions = fields["vocab_size"], fields["max_position_embeddings"]
    except KeyError as error:
        raise SourceError(
            f"{path} has no {error.args[0]} that can be used",
            hint="compare the file with the published one.",
        ) from None
    switch = fields.get("original_max_position_embeddings") if is_long_rope(hf) else None
    rope = None if switch is None else _long_rope(switch, hf.model_type)
    return directory, hf, choice, Description(vocab_size, positions, long_rope=rope)


def _long_rope(switch: int, model_type: str) -> LongRope:
    """Transformers takes the long factors for a batch by its longest row."""
    release = version("transformers")
    crossing = "the whole text is computed again with them"
    if model_type != "phi3small" and Version("5") <= Version(release) < Version("5.20"):
        crossing = f"transformers {release} goes on from the last token alone (5.20 does not)"
    return LongRope(switch, False, crossing)


def load(directory: Path, options: Options) -> HFBackend:
    """Load the source model without running code from its directory."""
    directory, hf, choice, description = _read_model(directory)
    own_dtype = str(hf.get("dtype") or hf.get("torch_dtype")).removeprefix("torch.")
    dtype = options.dtype or (own_dtype if own_dtype in WEIGHT_DTYPES else _DEFAULT_DTYPE)
    device = devices.pick_device(options.device)
    devices.measure_memory(device)
    open_source(directory).check_settled()
    reference = open_reference(
        choice.family, directory, weights=None, dtype=getattr(torch, dtype), device=device
    )
    if options.offload:
        reference.keep_ends()
    else:
        reference.keep_all()
    return HFBackend(reference, description, device, dtype)


class HFBackend:
    """Run the source model, a causal language model of transformers or of its family."""

    name = "hf"
    processes = 1

    def __init__(
        self, reference: Reference, description: Description, device: torch.device, dtype: str
    ) -> None:
        from transformers import GenerationConfig

        self._reference: Reference | None = reference  # whose hooks read the layers
        self.model: Any = reference.model
        # Sampling is set by each request, not by the directory's generation_config.json.
        self.model.generation_config = GenerationConfig()
        self.description = description
        self.device = str(device)
        self.dtype = dtype
        self._device = device

    def generate(self, request: Request) -> list[list[int]]:
        """Continue a batch."""
        check_request(self.description, request)
        rows = self._generate(request)[:, max(map(len, request.prompts)) :].tolist()
        stops = request.stop_ids
        return [list(takewhile(lambda token: token not in stops, row)) for row in rows]

    def stream(self, request: Request) -> Iterator[list[int | None]]:
        """Continue a batch step by step."""
        check_request(self.description, request)
        steps, ended = _Steps(), [False] * len(request.prompts)

        def work() -> None:
            try:
                self._generate(request, steps)
            except _ConsumerStopped:
                pass
            except BaseException as error:
                steps.queue.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while (tokens := steps.queue.get()) is not None:
                if isinstance(tokens, BaseException):
                    raise tokens
                yield [None if end else token for token, end in zip(tokens, ended, strict=True)]
                stops = [token in request.stop_ids for token in tokens]
                ended = [end or stop for end, stop in zip(ended, stops, strict=True)]
        finally:
            steps.consumer_stopped = True
            thread.join()

    def mean_nll(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> list[float]:
        """Score continuations, in nats."""

        def logits_of(ids: list[int]) -> Tensor:
            row = torch.tensor([ids], device=self._device)
            with torch.no_grad():
                logits: Tensor = self.model(input_ids=row, use_cache=False).logits
            return logits[0]

        return mean_nll(self, prompts, continuations, logits_of)

    def peak_memory(self) -> int:
        """Return the peak in bytes of the GPU or of this process's main memory."""
        return devices.peak_memory(self._device)

    def close(self) -> None:
        """Free the model's memory."""
        self._reference = self.model = None
        devices.return_memory(self._device)

    def _generate(self, request: Request, steps: _Steps | None = None) -> Tensor:
        from transformers import GenerationConfig, LogitsProcessorList

        prompts, sampling = request.prompts, request.sampling
        vocabulary = range(self.description.vocab_size)
        pad = min((stop for stop in request.stop_ids if stop in vocabulary), default=0)
        length = max(map(len, prompts))
        ids = [[pad] * (length - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        arguments: dict[str, Any] = {"do_sample": False}
        if not sampling.greedy:
            arguments = asdict(replace(sampling, temperature=sampling.divisor))
            arguments["do_sample"] = True
            del arguments["seed"]
        elif request.num_beams > 1:
            # The beam search that TensorRT-LLM's summarize.py asks of both sides.
            arguments |= {"early_stopping": True, "length_penalty": 1.0}
            arguments["num_beams"] = request.num_beams
        config = GenerationConfig(
            max_new_tokens=request.max_new_tokens,
            eos_token_id=sorted(request.stop_ids) or None,
            pad_token_id=pad,
            **arguments,
        )
        gpus = [self._device] if self._device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(gpus):
            torch.manual_seed(sampling.seed)
            out: Tensor = self.model.generate(
                torch.tensor(ids, device=self._device),
                attention_mask=torch.tensor(mask, device=self._device),
                generation_config=config,
                logits_processor=LogitsProcessorList([_Logits(request, self.dtype)]),
                streamer=steps,
            )
        return out


class _Logits:
    """Refuses scores that are not finite, and shifts those that a temperature will divide."""

    def __init__(self, request: Request, dtype: str) -> None:
        self._lengths = list(map(len, request.prompts))
        self._stops = sorted(request.stop_ids)
        self._sampling: Sampling = request.sampling
        self._dtype = dtype

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Take the ids so far, int64 [rows x beams, length], and scores of the next token."""
        new = ids[:, max(self._lengths) :]
        going = ~torch.isin(new, torch.tensor(self._stops, device=ids.device)).any(dim=-1)
        wrong = going & ~finite(scores)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0]) * len(self._lengths) // len(ids)
            raise NotFiniteError(row, self._lengths[row] + new.shape[1], self._dtype)
        return scores if self._sampling.greedy else scores - scores.amax(dim=-1, keepdim=True)


class _ConsumerStopped(Exception):  # noqa: N818  (not an error)
    """Raised when the consumer stopped iterating."""


class _Steps:
    """A streamer of transformers' ``generate`` for several rows; its own take only one."""

    def __init__(self) -> None:
        # Token ids of each row; None at the end.
        self.queue: queue.SimpleQueue[list[int] | BaseException | None] = queue.SimpleQueue()
        self.consumer_stopped = False  # makes the next step end the generation
        self._has_prompt = False

    def put(self, value: Tensor) -> None:
        """Take [batch] tokens of one step; the first call has the prompt."""
        if self.consumer_stopped:
            raise _ConsumerStopped
        if self._has_prompt:
            self.queue.put(value.tolist())
        self._has_prompt = True

    def end(self) -> None:
        self.queue.put(None)
