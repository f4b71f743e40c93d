"""``phireg inspect``: show what a checkpoint holds and where it came from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import phireg
from phireg.cli.options import Directory, json_option
from phireg.cli.output import ProgressBars, columns, counted, dtype_name, emit, emit_json, size
from phireg.errors import CheckError

if TYPE_CHECKING:
    from phireg.checkpoint.inspect import Inspection

_LONG = 8
"""Lists in config.json with more items than this are shown by their ends."""


@click.command()
@click.argument("checkpoint_dir", type=Directory(), metavar="CKPT")
@click.option("--check", is_flag=True, help="Read all files and compare them with phireg.json.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@json_option
def command(checkpoint_dir: str, check: bool, quiet: bool, as_json: bool) -> None:
    """Show what a checkpoint holds and where it came from.

    CKPT is a directory that phireg or TensorRT-LLM's own scripts wrote. Ends with 4 if something
    is missing, mis-shaped or (with --check) not what was written.
    """
    total = _bytes(checkpoint_dir) if check else 0
    with ProgressBars(quiet) as bars:
        advance = bars.bytes("checking", "checked")
        inspection = phireg.inspect(
            checkpoint_dir, check=check, progress=lambda more: advance(more, total)
        )
    if as_json:
        emit_json(_document(checkpoint_dir, inspection, check))
    else:
        emit(_text(checkpoint_dir, inspection, check))
    if inspection.problems:
        raise click.exceptions.Exit(CheckError.exit_code)


def _bytes(directory: str) -> int:
    return sum(file.stat().st_size for file in Path(directory).glob("*") if file.is_file())


def _document(directory: str, inspection: Inspection, checked: bool) -> dict[str, Any]:
    return {
        "checkpoint_dir": directory,
        "config": inspection.config,
        "files": dict(inspection.sizes),
        "ranks": [
            {name: {"dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in rank.items()}
            for rank in inspection.ranks
        ],
        "manifest": inspection.manifest,
        "checked": checked,
        "problems": list(inspection.problems),
    }


def _text(directory: str, inspection: Inspection, checked: bool) -> str:
    rows = [
        ("checkpoint", directory),
        ("model", f"{inspection.config['architecture']}, {inspection.config.get('dtype')}"),
        ("quantized", _quantization(inspection.config)),
        *_provenance(inspection.manifest),
        *_files(inspection.sizes),
        ("check", _verdict(inspection, checked)),
    ]
    parts = [
        columns(rows),
        "\n".join(f"  {problem}" for problem in inspection.problems),
        "config\n" + columns(_config(inspection.config), indent=2),
        *_tensors(inspection),
    ]
    return "\n".join(filter(None, parts))


def _quantization(config: Mapping[str, Any]) -> str:
    block = config.get("quantization")
    block = block if isinstance(block, Mapping) else {}
    named = [f"{k} {v}" for k in ("quant_algo", "kv_cache_quant_algo") if (v := block.get(k))]
    excluded = block.get("exclude_modules") or []
    if named and isinstance(excluded, list) and excluded:
        named.append(f"not: {', '.join(map(str, excluded))}")
    return "; ".join(named) or "no"


def _provenance(manifest: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    if manifest is None:
        yield "made by", "not known: there is no phireg.json"
        return
    producer, family = _block(manifest, "producer"), _block(manifest, "family")
    source = _block(manifest, "source")
    yield (
        "made by",
        f"{producer.get('name')} {producer.get('version')}, family {family.get('name')} "
        f"({family.get('distribution')} {family.get('version')})",
    )
    files = [file for file in source.get("files") or () if isinstance(file, Mapping)]
    total = sum(file["size"] for file in files if isinstance(file.get("size"), int))
    revision = f", revision {source['revision']}" if source.get("revision") else ""
    yield (
        "made from",
        f"{source.get('model_dir')}{revision}: {size(total)} in {counted(len(files), 'file')}",
    )


def _block(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = document.get(key)
    return value if isinstance(value, Mapping) else {}


def _files(sizes: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    label = "files"
    width = max(map(len, sizes))
    for name, count in sizes.items():
        yield label, f"{name:{width}}  {size(count)}"
        label = ""


def _verdict(inspection: Inspection, checked: bool) -> str:
    if inspection.problems:
        return f"{counted(len(inspection.problems), 'problem')}:"
    if checked:
        return "all files are as they were written"
    return "names and shapes are what the reader requires; --check compares the contents"


def _config(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, list) and len(value) > _LONG:
            ends = ", ".join(json.dumps(item) for item in (value[0], value[1]))
            yield key, f"[{ends}, ..., {json.dumps(value[-1])}]  ({len(value)} items)"
        else:
            yield key, json.dumps(value)


def _tensors(inspection: Inspection) -> Iterator[str]:
    """List tensors once for all ranks that hold the same names, shapes and dtypes."""
    from phireg.planning.report import ranges

    alike: list[tuple[Mapping[str, Any], list[int]]] = []
    for number, rank in enumerate(inspection.ranks):
        for tensors, numbers in alike:
            if tensors == rank:
                numbers.append(number)
                break
        else:
            alike.append((rank, [number]))
    for tensors, numbers in alike:
        where = f"{'each of ' if len(numbers) > 1 else ''}rank{ranges(numbers)}.safetensors"
        dtypes = {dtype for dtype, _ in tensors.values()}
        kind = f", all {dtype_name(*dtypes)}," if len(dtypes) == 1 else ""
        yield f"{counted(len(tensors), 'tensor')}{kind} in {where}"
        rows = ((n, s, *(() if kind else (d,)), times) for n, s, d, times in _folded(tensors))
        yield columns(rows, indent=2)


def _folded(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, shape, dtype and number of layers."""
    from phireg.planning.report import fold_names

    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, kind in tensors.items():
        groups.setdefault(kind, []).append(name)
    lines = [
        (folded, str(list(shape)), dtype_name(dtype), f"x {count}" if count > 1 else "")
        for (dtype, shape), names in groups.items()
        for folded, count in fold_names(names)
    ]
    yield from sorted(lines)
