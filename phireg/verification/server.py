"""A client of OpenAI-compatible servers: bounded requests, and answers that are only data."""

from __future__ import annotations

import http.client
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from phireg.errors import SourceError, UsageError, described
from phireg.files.regular import listed
from phireg.verification.result import Skipped

TIMEOUT_S = 300
_MOST_BYTES = 64 * 1024 * 1024
_KEY = "OPENAI_API_KEY"
"""Environment variable: sent as a bearer token, if set."""


class NotOffered(Skipped):
    """Raised where a server does not give what was asked for; the text says what."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A continuation of one prompt."""

    finish_reason: str
    scores: tuple[float, ...]  # log probabilities of the new tokens
    prompt_scores: tuple[float, ...]  # of the prompt's tokens but the first; () if not asked for
    prompt_tokens: int | None  # as the server counts them


class Server:
    """An endpoint such as ``http://localhost:8000/v1``; a SourceError if no server is there."""

    def __init__(self, url: str, model: str | None = None) -> None:
        try:
            parts = urlsplit(url)
            valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # brackets that do not match, or a port that is no number
            valid = False
        if valid and "@" in parts.netloc:  # urllib takes it for a part of the host's name
            raise UsageError(
                "the URL of the server holds a user's name or a password",
                hint="leave them out; OPENAI_API_KEY is sent if it is set.",
            )
        if not valid or not url.isprintable() or " " in url:
            raise UsageError(
                f"{url!r} is no URL of a server", hint="for example http://localhost:8000/v1."
            )
        self.url = url.rstrip("/")
        if not self.url.endswith("/v1"):
            self.url += "/v1"
        models = self._request("models", None).get("data")
        if not isinstance(models, list) or not models or not isinstance(models[0], dict):
            raise SourceError(f"{self.url}/models lists no model", hint="is a model loaded?")
        self.models = [str(entry.get("id")) for entry in models if isinstance(entry, dict)]
        if model is not None and model not in self.models:
            raise UsageError(
                f"{self.url} does not serve {model}", hint=f"it serves {listed(self.models)}."
            )
        self.model = model or self.models[0]
        self._scoring: str | None = None  # how the server gives log probabilities of a prompt

    def score(self, prompts: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """Return the log probabilities of prompts' tokens but the first, or raise NotOffered."""
        ways = {"echo": {"echo": True, "logprobs": 1}, "prompt_logprobs": {"prompt_logprobs": 1}}
        reasons = []
        for way, options in ways.items():
            if self._scoring not in (None, way):
                continue
            try:
                answers = self.complete(prompts, 1, options)
            except NotOffered as reason:
                reasons.append(str(reason))
                continue
            if all(
                len(a.prompt_scores) == len(p) - 1 for a, p in zip(answers, prompts, strict=True)
            ):
                self._scoring = way
                return [answer.prompt_scores for answer in answers]
            reasons.append(f"{way} is ignored")
        raise NotOffered(f"the server gives no log probabilities of prompts ({'; '.join(reasons)})")

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        options: Mapping[str, Any] | None = None,
    ) -> list[Answer]:
        """Continue prompts greedily, in one request."""
        body = {
            "model": self.model,
            "prompt": [list(prompt) for prompt in prompts],
            "max_tokens": max_tokens,
            "temperature": 0,
            "logprobs": 1,
            **(options or {}),
        }
        document = self._request("completions", body)
        choices = document.get("choices")
        if not isinstance(choices, list) or len(choices) != len(prompts):
            raise NotOffered(f"{len(prompts)} prompts in one request got another number of answers")
        ordered = sorted(choices, key=lambda choice: _whole(choice, "index") or 0)
        pairs = zip(ordered, prompts, strict=True)
        echoes = bool(body.get("echo"))
        return [_answer(choice, prompt, document, echoes) for choice, prompt in pairs]

    def chat(self, text: str, max_tokens: int) -> Answer:
        """Answer one message of a user, by the server's chat template."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        document = self._request("chat/completions", body)
        choices = document.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise NotOffered("the server gives no answer to a chat")
        return _answer(choices[0] | {"logprobs": None}, [], document, False)

    def _request(self, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(_KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)
        opener = urllib.request.build_opener(_NoRedirects, urllib.request.ProxyHandler({}))
        code = 200
        try:
            try:
                with opener.open(request, timeout=TIMEOUT_S) as response:
                    raw = _body(response)
            except urllib.error.HTTPError as error:
                with error:
                    code, raw = error.code, error.read(2000)
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise SourceError(
                f"{self.url}/{path} does not answer: {described(error)}",
                hint="is the server running?",
            ) from None
        if code != 200:
            if body is not None and 400 <= code < 500:
                raise NotOffered(f"the server refuses {path} ({code}: {_reason(raw)})")
            raise SourceError(f"{self.url}/{path} answers {code}: {_reason(raw)}")
        try:
            document = json.loads(raw) if len(raw) <= _MOST_BYTES else None
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise SourceError(f"{self.url}/{path} answers something else than a JSON object")
        return document


def _body(response: http.client.HTTPResponse) -> bytes:
    """Read an answer; TimeoutError if it does not end in time, however steadily it comes."""
    deadline, body = time.monotonic() + TIMEOUT_S, bytearray()
    while len(body) <= _MOST_BYTES and (block := response.read1(2**20)):
        body += block
        if time.monotonic() > deadline:
            raise TimeoutError(f"no end within {TIMEOUT_S} s")
    return bytes(body)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _reason(raw: bytes) -> str:
    """Return the beginning of an error's text, printable."""
    text = " ".join(raw.decode("utf-8", "replace").split())
    return "".join(c if c.isprintable() else "?" for c in text)[:200]


def _answer(
    choice: Any, prompt: Sequence[int], document: Mapping[str, Any], echoes: bool
) -> Answer:
    choice = choice if isinstance(choice, dict) else {}
    block = choice.get("logprobs")
    scores = block.get("token_logprobs") if isinstance(block, dict) else None
    scores = scores if isinstance(scores, list) else []
    before: list[Any] = []
    if echoes:
        before, scores = scores[1 : len(prompt)], scores[len(prompt) :]
    elif isinstance(given := choice.get("prompt_logprobs"), list):
        before = [_of(token, entry) for token, entry in zip(prompt, given, strict=False)][1:]
    usage = document.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Answer(
        finish_reason=str(choice.get("finish_reason")),
        scores=_numbers(scores),
        prompt_scores=_numbers(before),
        prompt_tokens=_whole(usage, "prompt_tokens"),
    )


def _of(token: int, entry: Any) -> Any:
    """Return a token's log probability of an entry of vLLM's ``prompt_logprobs``."""
    value = entry.get(str(token)) if isinstance(entry, dict) else None
    return value.get("logprob") if isinstance(value, dict) else value


def _numbers(values: Sequence[Any]) -> tuple[float, ...]:
    """Return log probabilities; () if one of them is none."""
    try:
        numbers = tuple(
            max(float(value), -1e4) if isinstance(value, int | float) else math.nan
            for value in values
        )
    except OverflowError:
        return ()
    return numbers if all(map(math.isfinite, numbers)) else ()


def _whole(mapping: Mapping[str, Any], key: str) -> int | None:
    value = mapping.get(key) if isinstance(mapping, dict) else None
    return value if type(value) is int else None
