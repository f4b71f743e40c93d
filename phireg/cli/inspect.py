"""``phireg inspect``: show what a checkpoint or an engine holds and where it came from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import phireg
from phireg.cli import engines
from phireg.cli.help import OUTPUT, documented
from phireg.cli.options import checkpoint_argument, json_option, quiet_option
from phireg.cli.output import (
    ProgressBars,
    bounded,
    columns,
    counted,
    dtype_name,
    emit,
    emit_json,
    problem_list,
    spinner,
    table,
)
from phireg.dtypes import ITEMSIZE
from phireg.errors import CheckError
from phireg.files.sizes import size
from phireg.findings import first

if TYPE_CHECKING:
    from phireg.checkpoint.inspect import Inspection
    from phireg.reader.tensors import Kind

_LONG = 8
"""Lists in config.json with more items than this are shown by their ends."""


@documented("phireg inspect ckpt", "phireg inspect ckpt --check", waits="reading the checkpoint")
@checkpoint_argument("checkpoint_dir", "CKPT")
@OUTPUT.option("--check", is_flag=True, help="Read all files and compare them with phireg.json.")
@quiet_option("No progress bar.")
@json_option
def command(checkpoint_dir: str, check: bool, quiet: bool, as_json: bool) -> None:
    """Show what a checkpoint or an engine holds and where it came from.

    CKPT is a directory that phireg or TensorRT-LLM's own scripts wrote, a Hugging Face directory
    (quantized by ModelOpt or compressed-tensors, or not), or an engine of TensorRT or TensorRT for
    RTX. Ends with 4 if something is missing, mis-shaped or (with --check) not what
    was written.
    """
    from phireg.tensorrt.engine import is_native

    if is_native(checkpoint_dir):
        with spinner("reading the engine", quiet=quiet):
            problems, text, document = engines.inspected(checkpoint_dir, check)
    else:
        files = [file for file in Path(checkpoint_dir).glob("*") if file.is_file()]
        total = sum(file.stat().st_size for file in files)
        with ProgressBars(quiet) as bars:
            advance = bars.bytes("checking", "checked")
            inspection = phireg.inspect(
                checkpoint_dir, check=check, progress=lambda more: advance(more, total)
            )
        problems, text = inspection.problems, _text(checkpoint_dir, inspection, check)
        document = _document(checkpoint_dir, inspection, check)
    if as_json:
        emit_json(bounded(document))
    else:
        emit(text)
    if problems:
        raise click.exceptions.Exit(CheckError.exit_code)


def _document(directory: str, inspection: Inspection, checked: bool) -> dict[str, Any]:
    return {
        "checkpoint_dir": directory,
        "config": inspection.config,
        "files": inspection.sizes,
        "ranks": list(map(_kinds, inspection.ranks)),
        "shards": {}
        if inspection.ranks
        else {name: _kinds(kinds) for name, kinds in inspection.weights.items()},
        "layout": None if inspection.layout is None else inspection.layout.name,
        "manifest": inspection.manifest,
        "checked": checked,
        "problems": inspection.problems,
    }


def _kinds(tensors: Mapping[str, Kind]) -> dict[str, Any]:
    return {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in tensors.items()}


def _text(directory: str, inspection: Inspection, checked: bool) -> str:
    rows = [
        ("checkpoint", directory),
        ("check", _verdict(inspection, checked)),
        ("model", _model(inspection.config)),
        ("quantized", _quantization(inspection)),
        ("tensors", _sizes(inspection)),
        *_provenance(inspection.manifest),
        *_files(inspection.sizes),
    ]
    parts = [
        columns(rows),
        "config\n" + columns(_config(inspection.config), indent=2),
        *_tensors(inspection),
    ]
    if inspection.problems:
        parts.append(problem_list(inspection.problems))
    return "\n".join(filter(None, parts))


def _model(config: Mapping[str, Any]) -> str:
    name, dtype = config.get("architecture"), config.get("dtype", config.get("torch_dtype"))
    names = config.get("architectures")
    return f"{name or (names[0] if isinstance(names, list) and names else 'unknown')}, {dtype}"


def _sizes(inspection: Inspection) -> str:
    """Sum up the bytes by dtype, largest first."""
    total: dict[str, int] = {}
    for tensors in inspection.weights.values():
        for code, shape in tensors.values():
            total[code] = total.get(code, 0) + ITEMSIZE[code] * math.prod(shape)
    ordered = sorted(total.items(), key=lambda item: -item[1])
    return (
        ", ".join(f"{dtype_name(code)} {size(count)}" for code, count in ordered)
        or "none could be read"
    )


def _quantization(inspection: Inspection) -> str:
    if (layout := inspection.layout) is not None:
        parts = [layout.algorithm, f"KV cache {layout.cache}" if layout.cache else ""]
        stated = ", ".join(filter(None, parts))
        if not stated:
            return "no"
        alone = f"; not: {', '.join(first(layout.excluded, 8))}" if layout.excluded else ""
        return f"{layout.name}: {stated}{alone}"
    block = _block(inspection.config, "quantization")
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
    width = max(map(len, sizes))
    for number, (name, count) in enumerate(sizes.items()):
        yield "" if number else "files", f"{name:{width}}  {size(count)}"


def _verdict(inspection: Inspection, checked: bool) -> str:
    if inspection.problems:
        return f"{counted(len(inspection.problems), 'problem')}, listed at the end"
    if checked:
        return "all files are as they were written"
    return "names and shapes are what the reader requires; --check compares the contents"


def _config(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, list) and len(value) > _LONG:
            first, second, last = map(json.dumps, (*value[:2], value[-1]))
            yield key, f"[{first}, {second}, ..., {last}]  ({len(value)} items)"
        else:
            yield key, json.dumps(value)


def _tensors(inspection: Inspection) -> Iterator[str]:
    """List tensors once for all ranks that hold the same ones, and those of shards together."""
    from phireg.planning.report import fold_layers, ranges

    together = {name: kind for part in inspection.weights.values() for name, kind in part.items()}
    ranks: dict[frozenset[tuple[str, Kind]], list[int]] = {}
    for number, tensors in enumerate(inspection.ranks or (together,)):
        ranks.setdefault(frozenset(tensors.items()), []).append(number)
    for alike, numbers in ranks.items():
        groups: dict[Kind, list[str]] = {}
        for name, kind in alike:
            groups.setdefault(kind, []).append(name)
        where = f"{'each of ' if len(numbers) > 1 else ''}rank{ranges(numbers)}.safetensors"
        if not inspection.ranks:
            where = counted(len(inspection.weights), "file")
        if not alike:
            yield f"no tensors could be read from {where}"
            continue
        dtypes = {dtype for dtype, _ in groups}
        same = f", all {dtype_name(*dtypes)}," if len(dtypes) == 1 else ""
        yield f"{counted(len(alike), 'tensor')}{same} in {where}"
        rows = sorted(
            (name, str(list(shape)), dtype_name(dtype), f"x {len(at)}" if len(at) > 1 else "")
            for (dtype, shape), names in groups.items()
            for (name,), at in fold_layers((name,) for name in names)
        )
        yield table(
            [(n, s, times) if same else (n, s, d, times) for n, s, d, times in rows], indent=2
        )
