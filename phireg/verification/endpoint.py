"""Ask a server for what servers get wrong for Phi, and say which fault its answers look like.

The same prompts are scored by the model itself and by the model with each known fault, so that a
fault shows as what it is: an answer nearer to a faulty model than to the right one. Where the two
are too close to tell apart, that is said, and counts as not checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from phireg.checkpoint.shards import is_executed
from phireg.data.samples import builtin_text
from phireg.device import pick_device
from phireg.errors import UsageError, check_known
from phireg.files.json import read_json_object
from phireg.files.kinds import CHECKPOINT, HF_MODEL, check_kind
from phireg.source.hub import resolve_model_dir
from phireg.verification.result import (
    ENDPOINT_CHECKS,
    NotNeeded,
    Outcome,
    Problem,
    Progress,
    Skipped,
    Verification,
    make_check,
)
from phireg.verification.server import NotOffered, Server
from phireg.verification.subject import FAULTS, Logits, Subject, open_checkpoint, open_source

TOLERANCES = {
    "float32": 0.02,
    "bfloat16": 0.15,
    "float16": 0.1,
    "fp8": 0.5,
    "int8": 0.5,
    "int4": 1.0,
}
"""Mean difference of the log probabilities of a prompt's tokens, in nats, by the server's format.
A model in 16 bits that is right has shown 0.01 to 0.06 on text; a fault, 0.5 and more."""

_SHORT, _NEW, _CHAT_NEW = 48, 24, 32
_ENOUGH = 4  # tokens of a continuation that must be comparable
_QUESTION = "Answer with the single word yes."


def verify_endpoint(
    url: str,
    model_dir: str | Path,
    *,
    model: str | None = None,
    form: str = "bfloat16",
    device: str = "auto",
    max_tokens: int | None = None,
    progress: Progress = lambda check, more, total: None,
) -> Verification:
    """Compare an OpenAI-compatible server with the model it serves.

    Args:
        url: the endpoint, such as http://localhost:8000/v1.
        model_dir: the source model, a directory or a hub repository; or a checkpoint or a
            quantized directory, which the executor computes.
        model: the name by which the server serves it; None is the first it lists.
        form: in which form the server computes, a key of ``TOLERANCES``.
        device: where the model is computed for comparison.
        max_tokens: most tokens of a prompt; None for as many as the checks need.
        progress: takes (check, how much more is done, the total): requests.

    Raises:
        UsageError: an unknown format or device, or a URL that is none.
        SourceError: the model cannot be read, or the server does not answer.
    """
    check_known("format", form, TOLERANCES)
    directory, _ = resolve_model_dir(str(model_dir), None)
    kind = check_kind(directory, HF_MODEL, CHECKPOINT)
    by_executor = kind is CHECKPOINT or is_executed(directory)
    open_subject = open_checkpoint if by_executor else open_source
    subject = open_subject(directory, pick_device(device))
    server = Server(url, model)
    checker = _Checker(server, subject, TOLERANCES[form], max_tokens, progress)
    makers: dict[str, Callable[[], Outcome]] = {
        "prompts": checker.prompts,
        "long rope": checker.long_rope,
        "neighbors": checker.neighbors,
        "block-sparse": checker.block_sparse,
        "sliding window": checker.sliding_window,
        "generation": checker.generation,
        "chat": checker.chat,
    }
    checks = tuple(make_check(name, makers[name]) for name in ENDPOINT_CHECKS)
    config = read_json_object(directory / "config.json")
    return Verification(
        checkpoint_dir=server.url,
        model_dir=str(model_dir),
        family=str(config.get("architecture") or config.get("model_type")),
        config=config if kind is CHECKPOINT else {},
        checks=checks,
        provenance=(("endpoint", server.url), ("model", server.model), ("format", form)),
        known=tuple(ENDPOINT_CHECKS),
    )


@dataclass(eq=False)
class _Checker:
    server: Server
    subject: Subject
    tolerance: float
    most: int | None  # tokens of a prompt
    progress: Progress
    _changes: dict[str, float] = field(default_factory=dict)  # by fault, of the last prompts

    def __post_init__(self) -> None:
        self.positions = self.subject.spec.max_position_embeddings

    @cached_property
    def right(self) -> Logits:
        """The model without a fault, which stays in memory."""
        return self.subject.logits(None)

    def prompts(self) -> Outcome:
        length = _SHORT if self.subject.original is None else min(_SHORT, self.subject.original)
        return self._scored("prompts", [length], [] if self.subject.original is None else ["long"])

    def long_rope(self) -> Outcome:
        original = self.subject.original
        if original is None:
            raise NotNeeded("the model has no long rope")
        return self._scored("long rope", [original, original + 1], ["long", "short"])

    def neighbors(self) -> Outcome:
        """Score a prompt before the switch alone, and beside one that is past it."""
        original = self.subject.original
        if original is None:
            raise NotNeeded("the model has no long rope, so no row changes another's arithmetic")
        self._fits(original + _SHORT)
        near, far = self._ids(original), self._ids(original + _SHORT)
        alone = self.server.score([near])[0]
        beside = self.server.score([near, far])[0]
        self.progress("neighbors", 2, 2)
        difference = _distance(alone, beside)
        summary = f"a prompt of {original} tokens alone and beside a longer one: {difference:.3f}"
        if difference <= self.tolerance:
            change = self._changes.get("long", math.inf)
            return Outcome(summary, [], [], self._untold("neighbors", {"long": change}))
        text = (
            f"its log probabilities differ by {difference:.2f} nats (tolerance {self.tolerance:g}) "
            "when a longer prompt is in the same batch: the whole batch takes the long factors"
        )
        return Outcome(summary, [Problem("neighbors", text, "serve one request at a time")], [])

    def block_sparse(self) -> Outcome:
        sparse = self.subject.spec.sparse
        if sparse is None:
            raise NotNeeded("the model has no block-sparse layers")
        window = sparse.block_size * sparse.num_local_blocks
        # Until a stripe is seen behind a gap.
        tokens = window + sparse.block_size * (sparse.vertical_stride + 1)
        return self._scored("block-sparse", [tokens], ["dense"], first=window)

    def sliding_window(self) -> Outcome:
        sliding = self.subject.sliding
        if sliding is None:
            raise NotNeeded("the model has no sliding window that binds")
        tokens = min(sliding + sliding // 2, self.positions - 1)
        return self._scored("sliding window", [tokens], ["window"], first=sliding)

    def generation(self) -> Outcome:
        """Continue a prompt greedily, through the server's cache."""
        # Behind long rope's switch, servers differ in what becomes of keys already in the cache.
        room = self.positions if self.subject.original is None else self.subject.original
        ids = self._ids(max(2, min(_SHORT, room - _NEW)))
        answer = self.server.complete([ids], _NEW)[0]
        self.progress("generation", 1, 1)
        if not answer.scores:
            raise NotOffered("the server gives no log probabilities of new tokens")
        if len(answer.scores) > _NEW:
            text = f"{len(answer.scores)} new tokens, where {_NEW} at most were asked for"
            return Outcome("a continuation", [Problem("generation", text)], [])
        expected = _greedy(self.right, ids, len(answer.scores), frozenset())
        scores = [score for _, score, _ in expected]
        distance = _distance(answer.scores, scores)
        summary = f"{len(answer.scores)} tokens; mean difference {distance:.3f} nats"
        dropped: list[float] = []  # what dropped cache scales would give
        if self.subject.spec.quantization.kv_cache is not None:
            faulty = _greedy(self.subject.logits("cache"), ids, len(scores), frozenset())
            dropped = [score for _, score, _ in faulty]
        if distance <= self.tolerance:
            apart = _distance(scores, dropped) if dropped else math.inf
            return Outcome(summary, [], [], self._untold("generation", {"cache": apart}))
        # Behind two tokens that are nearly as likely as each other, the texts may part.
        close = next((n for n, (_, _, gap) in enumerate(expected) if gap <= self.tolerance), None)
        if close is not None and _distance(answer.scores[:close], scores[:close]) <= self.tolerance:
            note = f"after {close} tokens two are nearly as likely as each other: the texts part"
            if close < _ENOUGH:
                return Outcome(summary, [], [], (f"{note}, too early to compare them",))
            return Outcome(summary, [], [note])
        text = f"differs by {distance:.2f} nats (tolerance {self.tolerance:g})"
        if dropped and _distance(answer.scores, dropped) < distance / 2:
            text += f"; it looks like this: {FAULTS['cache']}"
        return Outcome(summary, [Problem("generation", text)], [])

    def chat(self) -> Outcome:
        """Ask a question by the chat template, whose answer should end with a stop id."""
        tokenizer, stops = self.subject.tokenizer, self.subject.stops
        if tokenizer is None:
            raise Skipped("there is no tokenizer beside the model")
        try:
            ids = tokenizer.chat_ids([{"role": "user", "content": _QUESTION}])
        except UsageError as error:
            raise NotNeeded(error.message) from error
        answer = self.server.chat(_QUESTION, _CHAT_NEW)
        self.progress("chat", 1, 1)
        problems, undone = [], []
        if answer.prompt_tokens is None:
            undone.append("the server does not count a prompt's tokens")
        elif answer.prompt_tokens != len(ids):
            problems.append(
                Problem(
                    "chat template",
                    f"a question has {answer.prompt_tokens} tokens there, and {len(ids)} by the "
                    "model's own template",
                    "give the server the model's chat template and tokenizer",
                )
            )
        expected = _greedy(self.right, ids, _CHAT_NEW, stops)
        ends = bool(expected) and expected[-1][0] in stops
        if not ends:
            undone.append(f"the answer has no stop id within {_CHAT_NEW} tokens: not compared")
        elif answer.finish_reason != "stop" and not problems:
            problems.append(
                Problem(
                    "stop ids",
                    f"the answer ends with token {expected[-1][0]} after {len(expected)} tokens; "
                    f"the server goes on ({answer.finish_reason})",
                    f"its stop ids must have all of {sorted(stops)}",
                )
            )
        return Outcome(f"a question of {len(ids)} tokens", problems, [], tuple(undone))

    def _scored(
        self, name: str, lengths: Sequence[int], faults: Sequence[str], first: int = 1
    ) -> Outcome:
        """Score prompts; of the scores, those of the tokens from ``first`` on count."""
        problems, largest = [], 0.0
        changes = dict.fromkeys(faults, 0.0)  # how far each fault is from the right model at most
        for length in lengths:
            self._fits(length)
            ids = self._ids(length)
            actual = self.server.score([ids])[0][first - 1 :]
            self.progress(name, 1, len(lengths))
            right = _scores(self.right, ids)[first - 1 :]
            if not right:
                raise Skipped(f"a prompt of {length} tokens has no token past {first}")
            distance = _distance(actual, right)
            largest = max(largest, distance)
            by_fault = {
                fault: _scores(self.subject.logits(fault), ids)[first - 1 :] for fault in faults
            }
            for fault, scores in by_fault.items():
                changes[fault] = max(changes[fault], _distance(right, scores))
            if distance > self.tolerance:
                problems.append(self._problem(name, length, distance, actual, by_fault))
        tokens = ", ".join(map(str, lengths))
        summary = f"prompts of {tokens} tokens; mean difference {largest:.3f} nats"
        self._changes |= changes
        return Outcome(summary, problems, [], self._untold(name, changes))

    def _untold(self, name: str, changes: Mapping[str, float]) -> tuple[str, ...]:
        """Say which faults change too little, by so many nats, to be told from the right model."""
        return tuple(
            f"{name}: it cannot be told whether {FAULTS[fault]}: with this model that would change "
            f"only {change:.2f} nats"
            for fault, change in changes.items()
            if change <= 2 * self.tolerance
        )

    def _problem(
        self,
        name: str,
        length: int,
        distance: float,
        actual: Sequence[float],
        by_fault: Mapping[str, Sequence[float]],
    ) -> Problem:
        text = (
            f"log probabilities differ by {distance:.2f} nats in the mean (tolerance "
            f"{self.tolerance:g})"
        )
        distances = {fault: _distance(actual, scores) for fault, scores in by_fault.items()}
        likely = min(distances, key=lambda fault: distances[fault], default=None)
        if likely is not None and distances[likely] < distance / 2:
            text += f"; it looks like this: {FAULTS[likely]} ({distances[likely]:.2f} from that)"
        else:
            text += "; it looks like none of the known faults of this place"
        return Problem(f"{name}, {length} tokens", text)

    def _fits(self, tokens: int) -> None:
        most = self.positions - 1 if self.most is None else self.most
        if tokens > most or tokens >= self.positions:
            raise Skipped(f"a prompt of {tokens} tokens is longer than allowed ({most})")

    def _ids(self, tokens: int) -> list[int]:
        """Return a prompt: text where there is a tokenizer, else ids at random."""
        subject = self.subject
        if subject.tokenizer is not None:
            ids = subject.tokenizer.encode(builtin_text())
            ids = [token for token in ids if token < subject.spec.vocab_size]
            return (ids * math.ceil(tokens / len(ids)))[:tokens]
        generator = torch.Generator().manual_seed(tokens)
        drawn = torch.randint(subject.spec.vocab_size, (tokens,), generator=generator)
        return [int(token) for token in drawn]


def _scores(logits: Logits, ids: Sequence[int]) -> list[float]:
    """Return the log probabilities of the tokens but the first."""
    rows = logits(ids)[:-1].double().log_softmax(-1)
    picked = rows.gather(1, torch.tensor(list(ids[1:]))[:, None])[:, 0]
    values: list[float] = picked.clamp(min=-1e4).tolist()
    return values


def _greedy(
    logits: Logits, ids: Sequence[int], count: int, stops: frozenset[int]
) -> list[tuple[int, float, float]]:
    """Continue greedily: each token, its log probability, and by how much it leads the next."""
    tokens: list[tuple[int, float, float]] = []
    row = list(ids)
    for _ in range(count):
        best = logits(row)[-1].double().log_softmax(-1).topk(2)
        token, score = int(best.indices[0]), float(best.values[0])
        tokens.append((token, score, score - float(best.values[1])))
        if token in stops:
            break
        row.append(token)
    return tokens


def _distance(actual: Sequence[float], expected: Sequence[float]) -> float:
    """Return the mean of the absolute differences; infinite if the lengths differ."""
    if len(actual) != len(expected):
        return math.inf
    differences = [abs(a - b) for a, b in zip(actual, expected, strict=True)]
    return sum(differences) / max(1, len(differences))
