"""A good tiny checkpoint, and many ways in which a source directory can be bad.

`make_tiny_phi3` writes the good one; each entry of `DAMAGES` spoils a copy of it. The stage says
who must notice: "source" is found while the directory is read as data, "plan" only when the
tensors are compared with what config.json promises.
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
from safetensors.numpy import load_file, save_file

LAYERS, HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, VOCAB = 2, 32, 4, 2, 48, 37
HEAD_DIM = HIDDEN // HEADS
SHARDS = 3
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Damage:
    """One way to spoil a good checkpoint.

    Attributes:
        name: unique, also the test id.
        apply: spoils the directory it is given.
        exit_code: what the command line must end with.
        expect: a regular expression that the message must match (searched, case ignored).
        stage: who must notice.
    """

    name: str
    apply: Callable[[Path], None]
    exit_code: int
    expect: str
    stage: Literal["source", "plan"] = "source"


def tiny_config() -> dict[str, Any]:
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": INTERMEDIATE,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-05,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 32,
        "pad_token_id": 32,
        "torch_dtype": "float16",
        "transformers_version": "4.40.2",
        "use_cache": True,
    }


def tiny_tensors() -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (HIDDEN,),
            f"{prefix}.self_attn.qkv_proj.weight": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
            f"{prefix}.mlp.gate_up_proj.weight": (2 * INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        }
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    random = np.random.default_rng(0)
    return {name: random.normal(0, 0.15, shape).astype("f2") for name, shape in shapes.items()}


def make_tiny_phi3(directory: Path) -> None:
    """Write the good checkpoint: float16, three shards cut without regard to layers, an index."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", tiny_config())
    write_shards(directory, tiny_tensors())


def write_shards(directory: Path, tensors: dict[str, np.ndarray]) -> None:
    names = list(tensors)
    per_shard = -(-len(names) // SHARDS)
    weight_map: dict[str, str] = {}
    for shard in range(SHARDS):
        part = names[shard * per_shard : (shard + 1) * per_shard]
        save_file({n: tensors[n] for n in part}, shard_path(directory, shard), {"format": "pt"})
        weight_map |= {name: shard_path(directory, shard).name for name in part}
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / INDEX, index)


def shard_path(directory: Path, shard: int = 0) -> Path:
    return directory / f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# ---- small tools: each returns a function that takes the directory -----------------------------

Apply = Callable[[Path], None]


def raw_shard(edit: Callable[[bytes], bytes]) -> Apply:
    """Replace the bytes of the first shard."""

    def apply(directory: Path) -> None:
        path = shard_path(directory)
        path.write_bytes(edit(path.read_bytes()))

    return apply


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
    return entry(lambda e: e.__setitem__(key, value))


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
    return index(lambda d: d["weight_map"].__setitem__("model.norm.weight", shard_name))


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


def rename_tensor(held: dict[str, np.ndarray], old: str, new: str) -> None:
    held[new] = held.pop(old)


def to_int8(held: dict[str, np.ndarray]) -> None:
    for name in [name for name in held if "proj" in name]:
        held[name] = held[name].astype(np.int8)


def only(**files: bytes) -> Apply:
    """A directory that holds just these files (``__`` in a name stands for a dot)."""

    def apply(directory: Path) -> None:
        clear(directory)
        for name, data in files.items():
            (directory / name.replace("__", ".")).write_bytes(data)

    return apply


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


def drop_index_only(directory: Path) -> None:
    (directory / INDEX).unlink()


def replace_shard_by_directory(directory: Path) -> None:
    shard_path(directory).unlink()
    shard_path(directory).mkdir()


def replace_shard_by_pipe(directory: Path) -> None:
    shard_path(directory).unlink()
    os.mkfifo(shard_path(directory))


def replace_shard_by_link(directory: Path) -> None:
    shard_path(directory).unlink()
    shard_path(directory).symlink_to("../blobs/0123abcd")


def replace_index_by_directory(directory: Path) -> None:
    (directory / INDEX).unlink()
    (directory / INDEX).mkdir()


def drop_shards(*shards: int) -> Apply:
    def apply(directory: Path) -> None:
        for shard in shards:
            shard_path(directory, shard).unlink()

    return apply


def copy_tensor_to_last_shard(directory: Path) -> None:
    first, last = load_file(shard_path(directory)), shard_path(directory, SHARDS - 1)
    name = "model.embed_tokens.weight"
    save_file(load_file(last) | {name: first[name]}, last)


def hub_cache_folder(directory: Path) -> None:
    clear(directory)
    (directory / "snapshots" / "0123abcd").mkdir(parents=True)
    (directory / "refs").mkdir()


def converted_checkpoint(directory: Path) -> None:
    weightless("rank0.safetensors", "rank1.safetensors")(directory)
    write_json(directory / "config.json", {"architecture": "Phi3ForCausalLM", "dtype": "float16"})


# ---- .bin ---------------------------------------------------------------------------------------


def torch_bin(make: Callable[[dict[str, Any]], Any] = lambda state: state, **options: Any) -> Apply:
    """Keep config.json and store the tensors as pytorch_model.bin."""

    def apply(directory: Path) -> None:
        import torch

        weightless()(directory)
        state = {name: torch.from_numpy(array) for name, array in tiny_tensors().items()}
        torch.save(make(state), directory / "pytorch_model.bin", **options)

    return apply


def with_entry(make: Callable[[], Any], name: Any = "extra") -> Apply:
    return torch_bin(lambda state: state | {name: make()})


def bin_bytes(edit: Callable[[bytes], bytes]) -> Apply:
    def apply(directory: Path) -> None:
        torch_bin()(directory)
        path = directory / "pytorch_model.bin"
        path.write_bytes(edit(path.read_bytes()))

    return apply


class RunsCode:
    """Pickles to a call of os.system that would leave a file behind."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.witness}",)


def malicious_bin(directory: Path) -> None:
    torch_bin(lambda state: state | {"evil": RunsCode(directory / "executed")})(directory)


def compressed_bin(directory: Path) -> None:
    torch_bin()(directory)
    path = directory / "pytorch_model.bin"
    with zipfile.ZipFile(path) as stored:
        members = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in members.items():
            packed.writestr(name, data)


def sparse() -> Any:
    import torch

    return torch.eye(3).to_sparse()


def quantized() -> Any:
    import torch

    return torch.quantize_per_tensor(torch.ones(2, 2), 0.5, 0, torch.qint8)


def meta() -> Any:
    import torch

    return torch.empty(2, device="meta")


def complex128() -> Any:
    import torch

    return torch.zeros(2, dtype=torch.complex128)


def bin_index_without_shards(directory: Path) -> None:
    weightless()(directory)
    shards = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    write_json(directory / "pytorch_model.bin.index.json", {"weight_map": shards})


# ---- the list -----------------------------------------------------------------------------------

DEEP = b'{"a":' + b"[" * 200_000
QKV = "model.layers.1.self_attn.qkv_proj.weight"
O_PROJ = "model.layers.0.self_attn.o_proj.weight"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4976698672\n"
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}

_SOURCE: list[tuple[str, Apply, str]] = [
    # the file behind a shard's name
    ("shard-empty", raw_shard(lambda b: b""), "file is empty"),
    ("shard-seven-bytes", raw_shard(lambda b: b[:7]), "only 7 bytes"),
    ("shard-cut-in-header", raw_shard(lambda b: b[:100]), "header length .* truncated"),
    (
        "shard-cut-after-header",
        raw_shard(lambda b: b[: 8 + int.from_bytes(b[:8], "little")]),
        "truncated: .* missing",
    ),
    ("shard-cut-by-one-byte", raw_shard(lambda b: b[:-1]), "truncated: 1 bytes"),
    ("shard-trailing-bytes", raw_shard(lambda b: b + b"\0\0\0"), "3 trailing bytes"),
    ("shard-git-lfs", raw_shard(lambda b: LFS), r"git-lfs pointer[\s\S]*git lfs pull"),
    ("shard-html", raw_shard(lambda b: b"<!DOCTYPE html><html></html>"), "HTML"),
    ("shard-zip", raw_shard(lambda b: b"PK\x03\x04" + bytes(60)), "zip archive"),
    ("shard-pickle", raw_shard(lambda b: b"\x80\x02}q\x00." + bytes(9)), "pickle"),
    ("shard-gguf", raw_shard(lambda b: b"GGUF" + bytes(60)), "GGUF"),
    ("shard-zeros", raw_shard(lambda b: bytes(len(b))), "header length is zero"),
    ("shard-is-directory", replace_shard_by_directory, "expected a file.*directory"),
    ("shard-is-pipe", replace_shard_by_pipe, "expected a file.*pipe"),
    ("shard-dangling-link", replace_shard_by_link, "missing files.*00001-of-00003"),
    ("shard-missing", drop_shards(1), "missing files.*00002-of-00003"),
    ("shards-missing", drop_shards(0, 2), "missing files.*00001-of-00003.*00003-of-00003"),
    # the header
    ("header-length-zero", raw_shard(lambda b: bytes(8) + b[8:]), "header length is zero"),
    ("header-length-huge", raw_shard(lambda b: b"\xff" * 8 + b[8:]), "over the limit"),
    (
        "header-length-over-100-mb",
        raw_shard(lambda b: (100_000_001).to_bytes(8, "little") + b[8:]),
        "over the limit",
    ),
    (
        "header-length-past-end",
        raw_shard(lambda b: len(b).to_bytes(8, "little") + b[8:]),
        "bytes follow",
    ),
    (
        "header-length-short",
        raw_shard(lambda b: (40).to_bytes(8, "little") + b[8:]),
        "not valid JSON",
    ),
    (
        "header-length-into-data",
        raw_shard(lambda b: (int.from_bytes(b[:8], "little") + 64).to_bytes(8, "little") + b[8:]),
        "not UTF-8|not valid JSON",
    ),
    ("header-not-utf8", header_text(lambda t: t.replace(b"F16", b"F\xff6")), "not UTF-8"),
    ("header-not-json", header_text(lambda t: t[:-1] + b"]"), "not valid JSON"),
    ("header-array", header_text(lambda t: b"[" + t + b"]"), "not a JSON object"),
    ("header-leading-space", header_text(lambda t: b" " + t), "does not begin with"),
    ("header-deep", header_text(lambda t: DEEP), "nested too deeply|not valid JSON"),
    (
        "header-nan",
        header_text(lambda t: t.replace(b'"shape":[37', b'"shape":[NaN', 1)),
        "NaN",
    ),
    (
        "header-duplicate-name",
        header_text(lambda t: t.replace(b"layers.0.input_", b"layers.0.post_attention_", 1)),
        "post_attention_layernorm.weight.* occurs twice",
    ),
    (
        "header-duplicate-key",
        header_text(lambda t: t.replace(b'"dtype":', b'"dtype":"F16","dtype":', 1)),
        "'dtype' occurs twice",
    ),
    (
        "header-huge-integer",
        header_text(lambda t: t.replace(b"[37", b"[" + b"9" * 9999, 1)),
        r"digits|2\^63",
    ),
    ("metadata-not-strings", header(lambda h: h.update(__metadata__={"a": 1})), "__metadata__"),
    ("metadata-not-object", header(lambda h: h.update(__metadata__="pt")), "__metadata__"),
    (
        "tensor-name-empty",
        header(lambda h: h.update({"": h.pop("model.embed_tokens.weight")})),
        "without a name",
    ),
    (
        "tensor-name-surrogate",
        header(lambda h: h.update({"\ud800": h.pop("model.embed_tokens.weight")})),
        "surrogate",
    ),
    (
        "entry-not-object",
        header(lambda h: h.update({"model.embed_tokens.weight": [1, 2]})),
        "embed_tokens.*not an object",
    ),
    ("entry-without-dtype", entry(lambda e: e.pop("dtype") and None), "lacks 'dtype'"),
    ("entry-extra-key", set_entry("device", "cuda"), "unknown keys 'device'"),
    ("dtype-unknown", set_entry("dtype", "F17"), "dtype 'F17'"),
    ("dtype-number", set_entry("dtype", 16), "dtype '16'"),
    ("dtype-other-size", set_entry("dtype", "F32"), "embed_tokens.*need"),
    ("shape-negative", set_entry("shape", [-37, -32]), "shape must be"),
    ("shape-float", set_entry("shape", [37.0, 32]), "shape must be"),
    ("shape-bool", set_entry("shape", [37, True]), "shape must be"),
    ("shape-string", set_entry("shape", "37x32"), "shape must be"),
    ("shape-null", set_entry("shape", None), "shape must be"),
    ("shape-huge", set_entry("shape", [2**62, 2**62]), "too large"),
    ("shape-rank-huge", set_entry("shape", [1] * 1000), "1000 dimensions"),
    ("shape-mismatch", set_entry("shape", [38, 32]), "need 2432"),
    ("offsets-reversed", entry(lambda e: e["data_offsets"].reverse()), "reversed"),
    ("offsets-negative", set_entry("data_offsets", [-2368, 0]), "data_offsets must be"),
    ("offsets-three", set_entry("data_offsets", [0, 1, 2]), "data_offsets must be"),
    ("offsets-float", set_entry("data_offsets", [0.0, 2368.0]), "data_offsets must be"),
    ("offsets-beyond-file", set_entry("data_offsets", [10**9, 10**9 + 2368]), "truncated"),
    (
        "offsets-overlap",
        entry(lambda e: e.update(data_offsets=[x + 64 for x in e["data_offsets"]])),
        "overlaps",
    ),
    (
        "tensors-hole",
        header(lambda h: h.pop("model.layers.0.self_attn.qkv_proj.weight") and None),
        "a hole of|trailing bytes",
    ),
    # the index
    ("index-not-json", text(INDEX, '{"weight_map": {'), "index.json: line 1.*not valid JSON"),
    ("index-not-utf8", text(INDEX, b'{"weight_map":\n "\xff"}'), "line 2: not UTF-8"),
    ("index-git-lfs", text(INDEX, LFS), "git-lfs pointer"),
    ("index-is-directory", replace_index_by_directory, "expected a file"),
    (
        "index-duplicate-key",
        text(INDEX, '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'),
        "'a' occurs twice",
    ),
    ("index-array", text(INDEX, "[]"), "expected a JSON object"),
    ("index-no-map", index(lambda d: d.pop("weight_map") and None), "no weight_map"),
    ("index-empty-map", index(lambda d: d.update(weight_map={})), "weight_map is empty"),
    ("index-map-is-list", index(lambda d: d.update(weight_map=["a"])), "weight_map must be"),
    ("index-name-not-string", map_to(1), "not a string for 'model.norm.weight'"),
    ("index-name-empty", map_to(""), "is empty"),
    ("index-name-absolute", map_to("/etc/passwd.safetensors"), "is absolute"),
    ("index-name-leaves", map_to("../other/model.safetensors"), "leaves the directory"),
    ("index-name-returns", map_to("x/../model-00001-of-00003.safetensors"), "leaves"),
    ("index-name-dot", map_to("./model-00001-of-00003.safetensors"), "plain relative path"),
    ("index-name-backslash", map_to("..\\x.safetensors"), "backslash"),
    ("index-name-nul", map_to("a\0.safetensors"), "NUL"),
    ("index-name-long", map_to("a" * 5000 + ".safetensors"), "is too long"),
    ("index-other-kind", map_to("pytorch_model.bin"), "does not end with .safetensors"),
    (
        "index-lists-absent-tensor",
        index(lambda d: d["weight_map"].update({"ghost": shard_path(Path()).name})),
        "lacks tensors listed for it: 'ghost'",
    ),
    (
        "index-forgets-tensor",
        index(lambda d: d["weight_map"].pop("model.norm.weight") and None),
        "does not list: 'model.norm.weight'",
    ),
    (
        "index-names-wrong-shard",
        map_to("model-00001-of-00003.safetensors"),
        "00003-of-00003.safetensors holds tensors the index lists for model-00001",
    ),
    ("tensor-in-two-shards", copy_tensor_to_last_shard, "which holds them too: 'model.embed"),
    # other things than a checkpoint
    ("directory-empty", clear, "directory is empty"),
    ("weights-missing", weightless(), "no weights"),
    ("index-missing", drop_index_only, r"without its index[\s\S]*index.json"),
    (
        "lora-adapter",
        only(adapter_config__json=b"{}", adapter_model__safetensors=b""),
        r"LoRA adapter[\s\S]*merge_and_unload",
    ),
    ("gguf-only", weightless("phi3-q4.gguf"), "GGUF model"),
    ("onnx-only", weightless("model.onnx", "model.onnx.data"), "ONNX"),
    ("consolidated-only", weightless("consolidated.00.pth"), "consolidated layout"),
    ("flax-only", weightless("flax_model.msgpack"), "Flax"),
    ("tensorflow-only", weightless("tf_model.h5"), "TensorFlow"),
    ("unknown-weights", weightless("weights.safetensors"), "only weights.safetensors"),
    ("engine", weightless("rank0.engine"), "TensorRT-LLM engine"),
    ("converted-already", converted_checkpoint, "TensorRT-LLM checkpoint"),
    ("hub-cache-folder", hub_cache_folder, r"Hugging Face cache[\s\S]*snapshots/"),
    # .bin
    ("bin-malicious", malicious_bin, "running code.*system"),
    ("bin-legacy", torch_bin(_use_new_zipfile_serialization=False), "before 1.6"),
    ("bin-cut", bin_bytes(lambda b: b[: len(b) // 2]), "damaged or incomplete"),
    ("bin-empty", bin_bytes(lambda b: b""), "file is empty"),
    ("bin-git-lfs", bin_bytes(lambda b: LFS), "git-lfs pointer"),
    ("bin-garbage", bin_bytes(lambda b: b"garbage" * 99), "not a PyTorch file"),
    ("bin-compressed", compressed_bin, "compressed"),
    ("bin-list", torch_bin(lambda state: list(state.values())), "not a dict"),
    ("bin-nested", torch_bin(lambda state: {"state_dict": state}), "'state_dict' holds another"),
    ("bin-number", with_entry(lambda: 3), "'extra' is not a tensor but of type int"),
    ("bin-key-not-string", with_entry(lambda: 3, 7), "not a name: '7'"),
    ("bin-sparse", with_entry(sparse), "'extra' is sparse"),
    ("bin-quantized", with_entry(quantized), "'extra' has dtype torch.qint8"),
    ("bin-meta", with_entry(meta), "'extra' is on device meta"),
    ("bin-complex", with_entry(complex128), "dtype torch.complex128"),
    ("bin-shards-missing", bin_index_without_shards, "missing files.*00001-of-00002.bin"),
    # config.json as a file
    ("config-missing", lambda d: (d / "config.json").unlink(), "config.json: no such file"),
    ("config-empty", text("config.json", ""), "config.json: empty"),
    ("config-not-json", text("config.json", '{\n"a": 1,\n}'), "config.json: line 3"),
    ("config-not-utf8", text("config.json", b'{"a": "\xe9"}'), "line 1: not UTF-8"),
    ("config-bom", text("config.json", b"\xef\xbb\xbf{}"), "BOM"),
    ("config-array", text("config.json", '[{"hidden_size": 32}]'), "found an array"),
    ("config-deep", text("config.json", DEEP), "nested too deeply|not valid JSON"),
    ("config-nan", text("config.json", '{"rms_norm_eps": NaN}'), "NaN"),
    ("config-infinite", text("config.json", '{"rope_theta": 1e999}'), "too large"),
    (
        "config-duplicate-key",
        text("config.json", '{"hidden_size": 32, "hidden_size": 64}'),
        "'hidden_size' occurs twice",
    ),
    (
        "config-duplicate-nested-key",
        text("config.json", '{"rope_scaling": {"type": "su", "type": "yarn"}}'),
        "'type' occurs twice",
    ),
]

_PLAN: list[tuple[str, Apply, str]] = [
    # what kind of model it is
    (
        "quantization-config",
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "quanti[sz]|gptq",
    ),
    ("vision-config", config(vision_config={"hidden_size": 8}), "vision|multimodal"),
    ("vision-architecture", config(architectures=["Phi3VForCausalLM"]), "Phi3V"),
    ("architecture-unknown", config(architectures=["LlamaForCausalLM"]), "Llama"),
    ("architectures-not-list", config(architectures=3), "architecture"),
    # sizes
    ("hidden-size-missing", drop_config("hidden_size"), "hidden_size"),
    ("hidden-size-list", config(hidden_size=[32]), "hidden_size"),
    ("hidden-size-string", config(hidden_size="32"), "hidden_size"),
    ("hidden-size-float", config(hidden_size=32.5), "hidden_size"),
    ("hidden-size-bool", config(hidden_size=True), "hidden_size"),
    ("hidden-size-null", config(hidden_size=None), "hidden_size"),
    ("hidden-size-negative", config(hidden_size=-32), "hidden_size"),
    ("hidden-size-zero", config(hidden_size=0), "hidden_size"),
    ("hidden-size-huge", config(hidden_size=10**30), "hidden_size"),
    ("hidden-size-other", config(hidden_size=64), "hidden_size|embed_tokens|shape|rows|columns"),
    ("layers-zero", config(num_hidden_layers=0), "num_hidden_layers|layer"),
    ("layers-negative", config(num_hidden_layers=-1), "num_hidden_layers"),
    ("layers-too-many", config(num_hidden_layers=3), r"model\.layers\.2"),
    ("layers-too-few", config(num_hidden_layers=1), r"model\.layers\.1"),
    ("layers-huge", config(num_hidden_layers=10**12), "num_hidden_layers|layer"),
    ("heads-not-dividing", config(num_attention_heads=5), "num_attention_heads|heads"),
    ("heads-zero", config(num_attention_heads=0), "num_attention_heads"),
    ("kv-heads-not-dividing", config(num_key_value_heads=3), "num_key_value_heads|heads"),
    ("kv-heads-zero", config(num_key_value_heads=0), "num_key_value_heads"),
    ("kv-heads-string", config(num_key_value_heads="2"), "num_key_value_heads"),
    ("kv-heads-other", config(num_key_value_heads=4), "num_key_value_heads|qkv_proj"),
    ("vocab-missing", drop_config("vocab_size"), "vocab_size"),
    ("vocab-other", config(vocab_size=36), "vocab_size|embed_tokens|lm_head"),
    ("intermediate-other", config(intermediate_size=47), "intermediate_size|gate_up|down_proj"),
    # values
    ("eps-string", config(rms_norm_eps="1e-5"), "rms_norm_eps"),
    ("hidden-act-unknown", config(hidden_act="relu6"), "hidden_act|relu6"),
    ("dtype-unknown-config", config(torch_dtype="float12"), "dtype|float12"),
    ("rope-theta-negative", config(rope_theta=-1.0), "rope_theta"),
    ("rope-type-unknown", config(rope_scaling=LONGROPE | {"type": "magic"}), "magic|rope"),
    ("rope-scaling-string", config(rope_scaling="longrope"), "rope_scaling"),
    (
        "rope-factors-short",
        config(
            rope_scaling=LONGROPE | {"long_factor": [2.0] * 3},
            original_max_position_embeddings=32,
        ),
        "4 short and 3 long",
    ),
    (
        "rope-factors-long",
        config(
            rope_scaling=LONGROPE | {"short_factor": [1.0] * 5},
            original_max_position_embeddings=32,
        ),
        "5 short and 4 long",
    ),
    (
        "rope-factors-not-numbers",
        config(
            rope_scaling=LONGROPE | {"long_factor": ["2.0"] * 4},
            original_max_position_embeddings=32,
        ),
        "long_factor",
    ),
    # tensors
    ("tensor-missing", tensors(lambda t: t.pop(O_PROJ)), "o_proj"),
    ("norm-missing", tensors(lambda t: t.pop("model.norm.weight")), r"model\.norm"),
    ("head-missing", tensors(lambda t: t.pop("lm_head.weight")), "lm_head"),
    (
        "tensor-extra",
        tensors(lambda t: t.update({"model.layers.0.router.weight": np.ones((2, 32), "f2")})),
        "router",
    ),
    (
        "bias-extra",
        tensors(lambda t: t.update({O_PROJ.replace("weight", "bias"): np.ones(32, "f2")})),
        r"o_proj\.bias",
    ),
    ("tensor-renamed", tensors(lambda t: rename_tensor(t, O_PROJ, "model.o.weight")), "o_proj"),
    ("shape-wrong", tensors(lambda t: t.update({QKV: t[QKV][:-8].copy()})), "qkv_proj"),
    ("shape-transposed", tensors(lambda t: t.update({QKV: t[QKV].T.copy()})), "qkv_proj"),
    ("rank-wrong", tensors(lambda t: t.update({O_PROJ: t[O_PROJ].reshape(-1)})), "o_proj"),
    (
        "norm-rank-wrong",
        tensors(lambda t: t.update({"model.norm.weight": np.ones((32, 1), "f2")})),
        r"model\.norm",
    ),
    ("tensor-empty", tensors(lambda t: t.update({O_PROJ: np.ones((0, 32), "f2")})), "o_proj"),
    ("tensors-int8", tensors(to_int8), "int8|I8|quanti[sz]"),
    ("tensor-float64", tensors(lambda t: t.update({QKV: t[QKV].astype("f8")})), "qkv_proj|F64"),
]

DAMAGES: list[Damage] = [
    *(Damage(name, apply, 3, expect, "source") for name, apply, expect in _SOURCE),
    *(Damage(name, apply, 3, expect, "plan") for name, apply, expect in _PLAN),
]
