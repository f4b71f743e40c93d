"""Writing the model card of a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from phireg.errors import OutputError, SourceError
from phireg.files.regular import Limit, read_file
from phireg.files.sizes import size
from phireg.files.writing import SingleFile, write_file
from phireg.planning.model import Plan
from phireg.targets.card import CARD, Card, is_unchanged, license_of
from phireg.targets.readers import READERS, UNQUANTIZED

_FILE = SingleFile("the model card", b"<!-- written by phireg")
_UNMEASURED = "Not measured. `phireg quantize --measure` compares it with the unquantized model."


def check_card(directory: Path) -> None:
    """Refuse a directory whose model card somebody changed, before it is replaced."""
    if (directory / CARD).is_file() and not is_unchanged(_read(directory / CARD)):
        raise OutputError(
            f"{directory / CARD} was changed since phireg wrote it, and would be lost",
            hint="move it to another place, and write the directory again.",
        )


def card_of(plan: Plan, quantization: Mapping[str, Any] | None, quality: str | None = None) -> str:
    """Return the model card of a plan's output; ``quantization`` is the manifest's record."""
    source, options = plan.source.directory, plan.options
    block = plan.documents["config.json"].get("quantization_config") or {}
    tags = ["phireg", *filter(None, (options.qformat, options.form, block.get("quant_method")))]
    readers = READERS.get(plan.target.name, {}).get(options.qformat or UNQUANTIZED, ())
    rows = [("revision", plan.source.revision), ("written as", options.form)]
    if options.format is not None:
        rows += [
            ("format", f"{options.qformat}: {options.format.summary}"),
            ("KV cache", options.kv_cache_dtype),
            *_scales(quantization or {}),
        ]
    before = sum(tensor.nbytes for tensor in plan.source.tensors.values())
    rows += [
        ("other tensors", options.dtype),
        ("weights", f"{size(plan.tensor_bytes)}; of the source {size(before)}"),
        ("readers", ", ".join(reader.text for reader in readers)),
        ("written by", f"phireg {metadata.version('phireg')}, family {plan.family}"),
    ]
    return Card(
        source=source,
        summary=f"quantized to {options.qformat}" if options.qformat else "converted",
        tags=tags,
        quantized=options.qformat is not None,
        license=_license(source / CARD),
        recipe=[(label, value) for label, value in rows if value],
        quality=(quality or _UNMEASURED) if options.qformat else None,
        left=block.get("ignore", ()),
    ).render()


def add_quality(
    directory: Path, plan: Plan, quantization: Mapping[str, Any] | None, quality: str
) -> None:
    """Write what was measured into the card of a directory, unless somebody changed that."""
    if (directory / CARD).is_file() and is_unchanged(_read(directory / CARD)):
        text = card_of(plan, quantization, quality)
        write_file(directory / CARD, text.encode("utf-8", "surrogateescape"), _FILE)


def _scales(quantization: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    if "migrated_from" in quantization:
        return [("scales", "those of a TensorRT-LLM checkpoint")]
    alpha, statistics = quantization.get("alpha"), quantization.get("statistics")
    rows: list[tuple[str, str | None]] = [
        ("SmoothQuant's alpha", None if alpha is None else f"{alpha:g}")
    ]
    if statistics and "samples" in statistics["provenance"]:
        from phireg.calibration.calibrate import describe

        with suppress(KeyError):  # statistics that were not taken by calibrate() tell less
            rows.append(("calibration", describe(statistics["provenance"])))
    return rows


def _license(card: Path) -> dict[str, str]:
    try:
        return license_of(_read(card))
    except SourceError:  # there is none, or none that is safe to read
        return {}


def _read(path: Path) -> str:
    return read_file(path, Limit.TOKENIZER).decode("utf-8", "surrogateescape")
