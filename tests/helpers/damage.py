"""Ways to spoil the source directory of ``helpers.tiny_phi3``.

Each entry of ``DAMAGES`` is one. Damage of the stage "source" is found while the directory is read
as data, that of the stage "plan" when the tensors are compared with what config.json promises.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from helpers.tiny_phi3 import INDEX, SHARDS, shard_path, tiny_tensors, write_json, write_shards

FIRST_SHARD = shard_path(Path()).name
Apply = Callable[[Path], Any]
"""Spoils the directory it is given."""


@dataclass(frozen=True)
class Damage:
    """One way to spoil a valid checkpoint."""

    name: str  # unique, also the test id
    apply: Apply
    named: str  # what the error must name: a file, a tensor or a key
    stage: Literal["source", "plan"] = "source"  # which of them must notice


def raw(name: str, edit: Callable[[bytes], bytes], prepare: Apply | None = None) -> Apply:
    """Replace the bytes of a file."""

    def apply(directory: Path) -> None:
        if prepare is not None:
            prepare(directory)
        (directory / name).write_bytes(edit((directory / name).read_bytes()))

    return apply


def raw_shard(edit: Callable[[bytes], bytes]) -> Apply:
    return raw(FIRST_SHARD, edit)


def bin_bytes(edit: Callable[[bytes], bytes]) -> Apply:
    return raw("pytorch_model.bin", edit, torch_bin())


def header_text(edit: Callable[[bytes], bytes]) -> Apply:
    """Replace the JSON of the first shard's header; length and data stay right."""

    def edit_file(raw: bytes) -> bytes:
        length = int.from_bytes(raw[:8], "little")
        text = edit(raw[8 : 8 + length].rstrip(b" "))
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + raw[8 + length :]

    return raw_shard(edit_file)


def header(edit: Callable[[dict[str, Any]], Any]) -> Apply:
    """Change the first shard's header as a dict (in place, or by returning another value)."""

    def edit_text(text: bytes) -> bytes:
        listing = json.loads(text)
        changed = edit(listing)
        return json.dumps(listing if changed is None else changed).encode()

    return header_text(edit_text)


def entry(edit: Callable[[dict[str, Any]], Any]) -> Apply:
    """Change the entry of one matrix in the first shard's header."""
    return header(lambda listing: edit(listing["model.embed_tokens.weight"]))


def set_entry(key: str, value: Any) -> Apply:
    return entry(lambda values: values.update({key: value}))


def json_file(name: str, edit: Callable[[dict[str, Any]], Any]) -> Apply:
    def apply(directory: Path) -> None:
        document = json.loads((directory / name).read_text())
        changed = edit(document)
        write_json(directory / name, document if changed is None else changed)

    return apply


def index(edit: Callable[[dict[str, Any]], Any]) -> Apply:
    return json_file(INDEX, edit)


def map_to(shard_name: Any) -> Apply:
    """Let the index name something else for one tensor."""
    return index(lambda d: d["weight_map"].update({NORM: shard_name}))


def config(**values: Any) -> Apply:
    return json_file("config.json", lambda d: d.update(values))


def drop_config(*keys: str) -> Apply:
    return json_file("config.json", lambda d: [d.pop(key) for key in keys] and None)


def text(name: str, content: str | bytes) -> Apply:
    def apply(directory: Path) -> None:
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return apply


def tensors(edit: Callable[[dict[str, np.ndarray]], Any]) -> Apply:
    """Rewrite all shards and the index with other tensors."""

    def apply(directory: Path) -> None:
        held: dict[str, np.ndarray] = {}
        for shard in range(SHARDS):
            held |= load_file(shard_path(directory, shard))
        edit(held)
        write_shards(directory, held)

    return apply


def to_int8(held: dict[str, np.ndarray]) -> None:
    for name in [name for name in held if "proj" in name]:
        held[name] = held[name].astype(np.int8)


def clear(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def weightless(*more: str) -> Apply:
    """Keep config.json, remove the weights and their index, add other files."""

    def apply(directory: Path) -> None:
        for path in directory.glob("model*"):
            path.unlink()
        for name in more:
            (directory / name).write_bytes(b"\0" * 64)

    return apply


def drop(*names: str) -> Apply:
    return lambda directory: [(directory / name).unlink() for name in names]


def replace(name: str, create: Callable[[Path], Any]) -> Apply:
    """Put something else where a file was."""

    def apply(directory: Path) -> None:
        (directory / name).unlink()
        create(directory / name)

    return apply


def copy_tensor_to_last_shard(directory: Path) -> None:
    first, last = load_file(shard_path(directory)), shard_path(directory, SHARDS - 1)
    name = "model.embed_tokens.weight"
    save_file(load_file(last) | {name: first[name]}, last)


def lora_adapter(directory: Path) -> None:
    clear(directory)
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").touch()


def hub_cache_folder(directory: Path) -> None:
    clear(directory)
    (directory / "snapshots" / "0123abcd").mkdir(parents=True)
    (directory / "refs").mkdir()


def converted_checkpoint(directory: Path) -> None:
    weightless("rank0.safetensors", "rank1.safetensors")(directory)
    write_json(directory / "config.json", {"architecture": "Phi3ForCausalLM", "dtype": "float16"})


# ---- .bin ---------------------------------------------------------------------------------------


def torch_bin(edit: Callable[[dict[str, Any]], Any] = lambda state: state, **options: Any) -> Apply:
    """Keep config.json and store the tensors as pytorch_model.bin."""

    def apply(directory: Path) -> None:
        weightless()(directory)
        state = {name: torch.from_numpy(array) for name, array in tiny_tensors().items()}
        torch.save(edit(state), directory / "pytorch_model.bin", **options)

    return apply


def with_entry(value: Callable[[], Any], name: Any = "extra") -> Apply:
    return torch_bin(lambda state: state | {name: value()})


@dataclass
class RunsCode:
    """Pickles to a call of os.system that would leave a file behind."""

    trace: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


def malicious_bin(directory: Path) -> None:
    torch_bin(lambda state: state | {"evil": RunsCode(directory / "executed")})(directory)


def rewritten_bin(compression: int, **contents: bytes) -> Apply:
    """Pack the archive again; ``contents`` replaces members by the last part of their names."""

    def apply(directory: Path) -> None:
        torch_bin()(directory)
        path = directory / "pytorch_model.bin"
        with zipfile.ZipFile(path) as stored:
            members = {name: stored.read(name) for name in stored.namelist()}
        with zipfile.ZipFile(path, "w", compression) as packed:
            for name, data in members.items():
                packed.writestr(name, contents.get(name.rpartition("/")[2], data))

    return apply


def bin_index_without_shards(directory: Path) -> None:
    weightless()(directory)
    shards = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    write_json(directory / "pytorch_model.bin.index.json", {"weight_map": shards})


# ---- the list -----------------------------------------------------------------------------------

DEEP = b'{"a":' + b"[" * 200_000
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
QKV = "model.layers.1.self_attn.qkv_proj.weight"
O_PROJ = "model.layers.0.self_attn.o_proj.weight"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4976698672\n"
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
ROUTER = {"model.layers.0.router.weight": np.ones((2, 32), "f2")}
BIAS = {"model.layers.0.self_attn.o_proj.bias": np.ones(32, "f2")}


def long_factor(values: list[Any]) -> Apply:
    scaling = LONGROPE | {"long_factor": values}
    return config(rope_scaling=scaling, original_max_position_embeddings=32)


def with_length(length: Callable[[bytes], int]) -> Apply:
    """Replace the length in front of the first shard's header."""
    return raw_shard(lambda raw: length(raw).to_bytes(8, "little") + raw[8:])


_SHARD: dict[str, Apply] = {
    "empty": raw_shard(lambda raw: b""),
    "cut-in-header": raw_shard(lambda raw: raw[:100]),
    "cut-after-header": raw_shard(lambda raw: raw[: 8 + int.from_bytes(raw[:8], "little")]),
    "cut-by-one-byte": raw_shard(lambda raw: raw[:-1]),
    "trailing-bytes": raw_shard(lambda raw: raw + b"\0\0\0"),
    "git-lfs": raw_shard(lambda raw: LFS),
    "html": raw_shard(lambda raw: b"<!DOCTYPE html><html></html>"),
    "zip": raw_shard(lambda raw: b"PK\x03\x04" + bytes(60)),
    "zeros": raw_shard(lambda raw: bytes(len(raw))),
    "is-directory": replace(FIRST_SHARD, Path.mkdir),
    "is-pipe": replace(FIRST_SHARD, os.mkfifo),
    "dangling-link": replace(FIRST_SHARD, lambda path: path.symlink_to("../blobs/0123abcd")),
    "missing": drop(FIRST_SHARD, shard_path(Path(), 2).name),
    "length-huge": with_length(lambda raw: 2**64 - 1),
    "length-over-100-mb": with_length(lambda raw: 100_000_001),
    "length-past-end": with_length(len),
    "length-short": with_length(lambda raw: 40),
    "length-into-data": with_length(lambda raw: int.from_bytes(raw[:8], "little") + 64),
    "header-not-utf8": header_text(lambda text: text.replace(b"F16", b"F\xff6")),
    "header-array": header_text(lambda text: b"[" + text + b"]"),
    "header-deep": header_text(lambda text: DEEP),
    "header-nan": header_text(lambda text: text.replace(b'"shape":[37', b'"shape":[NaN', 1)),
    "header-duplicate-name": header_text(
        lambda text: text.replace(b"0.input_", b"0.post_attention_")
    ),
    "header-huge-integer": header_text(lambda text: text.replace(b"[37", b"[" + b"9" * 9999, 1)),
    "metadata-not-strings": header(lambda listing: listing.update(__metadata__={"a": 1})),
    "tensor-name-empty": header(lambda d: d.update({"": d.pop(EMBEDDING)})),
    "tensor-name-surrogate": header(lambda d: d.update({"\ud800": d.pop(EMBEDDING)})),
    "entry-not-object": header(lambda listing: listing.update({EMBEDDING: [1, 2]})),
    "dtype-unknown": set_entry("dtype", "F17"),
    "dtype-other-size": set_entry("dtype", "F32"),
    "shape-negative": set_entry("shape", [-37, -32]),
    "shape-float": set_entry("shape", [37.0, 32]),
    "shape-huge": set_entry("shape", [2**62, 2**62]),
    "shape-mismatch": set_entry("shape", [38, 32]),
    "offsets-reversed": entry(lambda values: values["data_offsets"].reverse()),
    "offsets-negative": set_entry("data_offsets", [-2368, 0]),
    "offsets-beyond-file": set_entry("data_offsets", [10**9, 10**9 + 2368]),
    "offsets-overlap": entry(lambda d: d.update(data_offsets=[n + 64 for n in d["data_offsets"]])),
    "tensors-hole": header(lambda d: d.pop(QKV.replace("1", "0")) and None),
}

_INDEX: dict[str, Apply] = {
    "not-json": text(INDEX, '{"weight_map": {'),
    "git-lfs": text(INDEX, LFS),
    "is-directory": replace(INDEX, Path.mkdir),
    "duplicate-key": text(INDEX, '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'),
    "array": text(INDEX, "[]"),
    "no-map": index(lambda document: document.pop("weight_map") and None),
    "empty-map": index(lambda document: document.update(weight_map={})),
    "map-is-list": index(lambda document: document.update(weight_map=["a"])),
    "name-not-string": map_to(1),
    "name-empty": map_to(""),
    "name-absolute": map_to("/etc/passwd.safetensors"),
    "name-leaves": map_to("../other/model.safetensors"),
    "name-returns": map_to("x/../model-00001-of-00003.safetensors"),
    "name-dot": map_to("./model-00001-of-00003.safetensors"),
    "name-backslash": map_to("..\\x.safetensors"),
    "name-nul": map_to("a\0.safetensors"),
    "name-long": map_to("a" * 5000 + ".safetensors"),
    "other-format": map_to("pytorch_model.bin"),
}

_BIN: dict[str, Apply] = {
    "malicious": malicious_bin,
    "legacy": torch_bin(_use_new_zipfile_serialization=False),
    "cut": bin_bytes(lambda raw: raw[: len(raw) // 2]),
    "empty": bin_bytes(lambda raw: b""),
    "git-lfs": bin_bytes(lambda raw: LFS),
    "garbage": bin_bytes(lambda raw: b"garbage" * 99),
    "compressed": rewritten_bin(zipfile.ZIP_DEFLATED),
    "big-endian": rewritten_bin(zipfile.ZIP_STORED, byteorder=b"big"),
    "list": torch_bin(lambda state: list(state.values())),
    "nested": torch_bin(lambda state: {"state_dict": state}),
    "number": with_entry(lambda: 3),
    "key-not-string": with_entry(lambda: 3, 7),
    "sparse": with_entry(lambda: torch.eye(3).to_sparse()),
    "quantized": with_entry(lambda: torch.quantize_per_tensor(torch.ones(2), 0.5, 0, torch.qint8)),
    "meta": with_entry(lambda: torch.empty(2, device="meta")),
    "complex": with_entry(lambda: torch.zeros(2, dtype=torch.complex128)),
    "shards-missing": bin_index_without_shards,
}

_CONFIG_FILE: dict[str, Apply] = {
    "missing": drop("config.json"),
    "not-json": text("config.json", '{\n"a": 1,\n}'),
    "not-utf8": text("config.json", b'{"a": "\xe9"}'),
    "bom": text("config.json", b"\xef\xbb\xbf{}"),
    "array": text("config.json", '[{"hidden_size": 32}]'),
    "deep": text("config.json", DEEP),
    "nan": text("config.json", '{"rms_norm_eps": NaN}'),
    "duplicate-key": text("config.json", '{"rope_scaling": {"type": "su", "type": "yarn"}}'),
}

_OTHERS: list[tuple[str, Apply, str]] = [
    (
        "index-lists-absent-tensor",
        index(lambda d: d["weight_map"].update(ghost=FIRST_SHARD)),
        "ghost",
    ),
    ("index-forgets-tensor", index(lambda d: d["weight_map"].pop(NORM) and None), NORM),
    ("index-names-wrong-shard", map_to(FIRST_SHARD), NORM),
    ("tensor-in-two-shards", copy_tensor_to_last_shard, EMBEDDING),
    # other things than a checkpoint
    ("directory-empty", clear, "model"),
    ("weights-missing", weightless(), "model"),
    ("index-missing", drop(INDEX), "model-00001-of-00003.safetensors"),
    ("lora-adapter", lora_adapter, "adapter_config.json"),
    ("gguf-only", weightless("phi3-q4.gguf"), "phi3-q4.gguf"),
    ("onnx-only", weightless("model.onnx", "model.onnx.data"), "model.onnx"),
    ("consolidated-only", weightless("consolidated.00.pth"), "consolidated.00.pth"),
    ("flax-only", weightless("flax_model.msgpack"), "flax_model.msgpack"),
    ("tensorflow-only", weightless("tf_model.h5"), "tf_model.h5"),
    ("unknown-weights", weightless("weights.safetensors"), "weights.safetensors"),
    ("engine", weightless("rank0.engine"), "rank0.engine"),
    ("converted-already", converted_checkpoint, "rank0.safetensors"),
    ("hub-cache-folder", hub_cache_folder, "snapshots"),
]

_PLAN: list[tuple[str, Apply, str]] = [
    ("vision-config", config(vision_config={"hidden_size": 8}), "vision"),
    ("architecture-unknown", config(architectures=["LlamaForCausalLM"]), "Llama"),
    ("architectures-not-list", config(architectures=3), "architectures"),
    ("hidden-size-missing", drop_config("hidden_size"), "embed_tokens"),
    ("hidden-size-list", config(hidden_size=[32]), "hidden_size"),
    ("hidden-size-bool", config(hidden_size=True), "hidden_size"),
    ("hidden-size-null", config(hidden_size=None), "embed_tokens"),
    ("hidden-size-zero", config(hidden_size=0), "hidden_size"),
    ("hidden-size-huge", config(hidden_size=10**30), "hidden_size"),
    ("hidden-size-other", config(hidden_size=64), "embed_tokens"),
    ("layers-zero", config(num_hidden_layers=0), "num_hidden_layers"),
    ("layers-too-many", config(num_hidden_layers=3), "model.layers.2"),
    ("layers-too-few", config(num_hidden_layers=1), "model.layers.1"),
    ("layers-huge", config(num_hidden_layers=10**12), "num_hidden_layers"),
    ("heads-not-dividing", config(num_attention_heads=5), "heads"),
    ("kv-heads-not-dividing", config(num_key_value_heads=3), "num_key_value_heads"),
    ("kv-heads-string", config(num_key_value_heads="2"), "num_key_value_heads"),
    ("kv-heads-other", config(num_key_value_heads=4), "qkv_proj"),
    ("vocab-other", config(vocab_size=36), "embed_tokens"),
    ("intermediate-other", config(intermediate_size=47), "gate_up_proj"),
    ("eps-string", config(rms_norm_eps="1e-5"), "rms_norm_eps"),
    ("hidden-act-unknown", config(hidden_act="relu6"), "hidden_act"),
    ("dtype-unknown", config(torch_dtype="float12"), "torch_dtype"),
    ("rope-theta-negative", config(rope_theta=-1.0), "rope_theta"),
    ("rope-type-unknown", config(rope_scaling=LONGROPE | {"type": "magic"}), "rope_scaling"),
    ("rope-scaling-string", config(rope_scaling="longrope"), "rope_scaling"),
    ("rope-factors-short", long_factor([2.0] * 3), "rope_scaling"),
    ("rope-factors-not-numbers", long_factor(["2.0"] * 4), "long_factor"),
    ("tensor-missing", tensors(lambda held: held.pop(O_PROJ)), O_PROJ),
    ("head-missing", tensors(lambda held: held.pop("lm_head.weight")), "lm_head"),
    ("tensor-extra", tensors(lambda held: held.update(ROUTER)), "model.layers.0.router.weight"),
    ("bias-extra", tensors(lambda held: held.update(BIAS)), "o_proj.bias"),
    ("tensor-renamed", tensors(lambda held: held.update(o=held.pop(O_PROJ))), O_PROJ),
    ("shape-wrong", tensors(lambda held: held.update({QKV: held[QKV][:-8].copy()})), QKV),
    ("shape-transposed", tensors(lambda held: held.update({QKV: held[QKV].T.copy()})), QKV),
    ("rank-wrong", tensors(lambda held: held.update({O_PROJ: held[O_PROJ].reshape(-1)})), O_PROJ),
    ("tensor-empty", tensors(lambda held: held.update({O_PROJ: np.ones((0, 32), "f2")})), O_PROJ),
    ("tensors-int8", tensors(to_int8), "I8"),
    ("tensor-float64", tensors(lambda held: held.update({QKV: held[QKV].astype("f8")})), QKV),
]

DAMAGES = [
    *(Damage(f"shard-{name}", apply, FIRST_SHARD) for name, apply in _SHARD.items()),
    *(Damage(f"index-{name}", apply, INDEX) for name, apply in _INDEX.items()),
    *(Damage(f"bin-{name}", apply, "pytorch_model") for name, apply in _BIN.items()),
    *(Damage(f"config-{name}", apply, "config.json") for name, apply in _CONFIG_FILE.items()),
    *(Damage(*row) for row in _OTHERS),
    *(Damage(*row, "plan") for row in _PLAN),
]
