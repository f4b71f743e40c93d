"""A summarization as JSON; docs/command-line.md describes it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from phireg.summarization.result import BackendResult, Summarization


def summarization_document(found: Summarization) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "data": found.data,
        "note": found.note,
        "settings": asdict(found.settings),
        "passed": found.passed,
        "resumed_batches": found.resumed,
        "checks": [{**asdict(check), "passed": check.passed} for check in found.checks],
        "backends": [_backend(result) for result in found.backends],
        "same_summaries": [
            {"between": list(pair), "count": count} for pair, count in found.agreement().items()
        ],
        "articles": [
            {
                "where": sample.where,
                "prompt_tokens": len(sample.prompt),
                "reference": sample.reference,
                "summaries": [
                    {
                        "backend": result.name,
                        "summary": result.answers[n].summary,
                        "new_tokens": result.answers[n].new_tokens,
                        **result.rouge.articles[n],
                        "perplexity": result.answers[n].perplexity,
                    }
                    for result in found.backends
                ],
            }
            for n, sample in enumerate(found.samples)
        ],
        "provenance": dict(found.provenance),
    }


def _backend(result: BackendResult) -> dict[str, Any]:
    return {
        "backend": result.name,
        "place": result.place,
        **result.rouge.total,
        "perplexity": result.perplexity,
        "new_tokens": result.new_tokens,
        "seconds": round(result.seconds, 3),
        "latency_seconds": round(result.latency, 4),
        "tokens_per_second": round(result.tokens_per_second, 2),
        "peak_memory_bytes": result.memory,
    }
