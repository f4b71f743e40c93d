"""Tiny Phi-3-small checkpoints written by hand, right and in the source's order.

Nothing of phireg is used here. The hidden size is a multiple of heads + 2 * KV heads, so that an
entry per input feature could be taken for one per head, and a head has neither one row nor all.
"""

import json
import struct

import numpy as np
import torch

SCALES = "weights_scaling_factor"
LAYERS, HEADS, KV, SIZE = 2, 8, 4, 6
HIDDEN, INNER, VOCAB = HEADS * SIZE, 40, 37
ROWS = (HEADS + 2 * KV) * SIZE
assert HIDDEN % (HEADS + 2 * KV) == 0
CODES = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "I8": "i1", "F8_E4M3": "u1"}


def save(path, tensors, metadata=None):
    """A safetensors file; tensors are (code, array)."""
    header, data = {}, b""
    if metadata:
        header["__metadata__"] = metadata
    for name, (code, array) in tensors.items():
        raw = array.astype(CODES[code]).tobytes()
        header[name] = {
            "dtype": code, "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }  # fmt: skip
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def load(path):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = (8 + length + n for n in entry["data_offsets"])
        array = np.frombuffer(raw[first:last], CODES[entry["dtype"]])
        tensors[name] = (entry["dtype"], array.reshape(entry["shape"]))
    return tensors


def e4m3(values):
    """The nearest float8_e4m3fn, as its byte."""
    return torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def right_rows(kv=KV):
    """For every row of the right order, its row in the source: all q, all k, all v."""
    rows = np.arange((HEADS + 2 * kv) * SIZE).reshape(kv, HEADS // kv + 2, SIZE)
    return np.concatenate([rows[:, :-2].ravel(), rows[:, -2].ravel(), rows[:, -1].ravel()])


def rank_rows(rank, tp, kv=KV, order=None):
    """The source rows a rank is to hold."""
    order = right_rows(kv) if order is None else order
    parts = np.split(order, [HEADS * SIZE, (HEADS + kv) * SIZE])
    return np.concatenate([np.split(part, tp)[rank] for part in parts])


def block_rows(rank, tp, kv=KV):
    """Rows of an exporter that cuts the source's rows as one block."""
    return np.split(np.arange((HEADS + 2 * kv) * SIZE), tp)[rank]


def parts_rows(rank, tp, kv=KV):
    """Rows of an exporter that takes the source's rows for q, k, v and cuts each."""
    return rank_rows(rank, tp, kv, np.arange((HEADS + 2 * kv) * SIZE))


def source_tensors(kv=KV, seed=0):
    """The source's query_key_value of every layer: weight (float16) and bias."""
    random = np.random.default_rng(seed)
    rows = (HEADS + 2 * kv) * SIZE
    return [
        (
            (random.standard_normal((rows, HIDDEN)) * 0.2).astype("f2"),
            (random.standard_normal(rows) * 0.5).astype("f2"),
        )
        for _ in range(LAYERS)
    ]


TENSORS = source_tensors()


def write_source(directory, tensors=TENSORS, kv=KV):
    """The Hugging Face model that the checkpoints are of."""
    directory.mkdir()
    random = np.random.default_rng(9)
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for name in ("model.final_layernorm", *(
        f"model.layers.{i}.{norm}" for i in range(LAYERS)
        for norm in ("input_layernorm", "post_attention_layernorm")
    )):  # fmt: skip
        shapes |= {f"{name}.weight": (HIDDEN,), f"{name}.bias": (HIDDEN,)}
    for i in range(LAYERS):
        for name, rows, cols in (
            ("self_attn.dense", HIDDEN, HIDDEN), ("mlp.up_proj", 2 * INNER, HIDDEN),
            ("mlp.down_proj", HIDDEN, INNER),
        ):  # fmt: skip
            layer = f"model.layers.{i}.{name}"
            shapes |= {f"{layer}.weight": (rows, cols), f"{layer}.bias": (rows,)}
    saved = {name: ("F16", random.standard_normal(shape)) for name, shape in shapes.items()}
    for i, (weight, bias) in enumerate(tensors):
        name = f"model.layers.{i}.self_attn.query_key_value"
        saved |= {f"{name}.weight": ("F16", weight), f"{name}.bias": ("F16", bias)}
    save(directory / "model.safetensors", saved)
    config = {
        "architectures": ["Phi3SmallForCausalLM"], "model_type": "phi3small",
        "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": kv,
        "num_hidden_layers": LAYERS, "ff_intermediate_size": INNER, "vocab_size": VOCAB,
        "max_position_embeddings": 64, "torch_dtype": "float16", "gegelu_pad_to_256": False,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def exported(kind, weight, bias, rng):
    """A whole qkv in the source's order as an exporter stores it: (code, array) by companion."""
    stored = {"bias": ("F16", bias)}
    wide = weight.astype("f8")
    if kind == "float16":
        return stored | {"weight": ("F16", weight)}
    stored["activation_scaling_factor"] = ("F32", rng.random(1) + 0.5)
    if kind in ("fp8", "fp8 as int8"):
        scale = np.float32(np.abs(wide).max() / 448)
        codes = e4m3(wide / scale)
        stored["weight"] = ("F8_E4M3", codes) if kind == "fp8" else ("I8", codes.view("i1"))
        stored[SCALES] = ("F32", np.array([scale]))
        return stored
    smooth = (10 ** rng.uniform(-1, 1, HIDDEN)).astype("f2")
    smoothed = wide / smooth.astype("f8")
    scales = np.abs(smoothed).max(1) / 127
    stored["weight"] = ("I8", np.rint(smoothed / scales[:, None]))
    stored[SCALES] = ("F32", scales)
    stored["prequant_scaling_factor"] = ("F16", smooth)
    return stored


ALGORITHM = {
    "float16": None, "fp8": "FP8", "fp8 as int8": "FP8", "int8": "W8A8_SQ_PER_CHANNEL"
}  # fmt: skip
KINDS = tuple(ALGORITHM)


def checkpoint(kind, tensors, rows_of, tp=1, kv=KV):
    """Every rank's tensors, each holding the source rows that ``rows_of(rank, tp)`` names."""
    rng = np.random.default_rng(3)
    ranks = [{} for _ in range(tp)]
    for i, (weight, bias) in enumerate(tensors):
        layer = f"transformer.layers.{i}"
        whole = exported(kind, weight, bias, rng)
        dense, fc = rng.standard_normal((HIDDEN, HIDDEN // tp)), rng.standard_normal(HIDDEN)
        for rank in range(tp):
            rows = rows_of(rank, tp, kv)
            for name, (code, array) in whole.items():
                by_row = name in ("weight", "bias") or (kind, name) == ("int8", SCALES)
                held = array[rows] if by_row else array
                ranks[rank][f"{layer}.attention.qkv.{name}"] = (code, held)
            if kind != "float16":
                name = f"{layer}.attention.kv_cache_scaling_factor"
                ranks[rank][name] = ("F32", np.array([1.5]))
            ranks[rank][f"{layer}.attention.dense.weight"] = ("F16", dense)
            ranks[rank][f"{layer}.mlp.fc.bias"] = ("F16", fc)
    return ranks


def write_checkpoint(directory, kind, ranks, kv=KV, **keys):
    directory.mkdir()
    for rank, tensors in enumerate(ranks):
        save(directory / f"rank{rank}.safetensors", tensors, {"by": "hand"})
    config = {
        "architecture": "Phi3SmallForCausalLM", "dtype": "float16", "hidden_size": HIDDEN,
        "num_attention_heads": HEADS, "num_key_value_heads": kv, "num_hidden_layers": LAYERS,
        "intermediate_size": INNER, "vocab_size": VOCAB,
        "mapping": {"world_size": len(ranks), "tp_size": len(ranks), "pp_size": 1},
        "quantization": {"quant_algo": ALGORITHM[kind], "kv_cache_quant_algo": None},
    }  # fmt: skip
    config.update(keys)
    config = {key: value for key, value in config.items() if value != "absent"}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text('{"a": 1}')
    (directory / "notes.txt").write_text("mine")
    return directory


def write(directory, kind="int8", rows_of=block_rows, tp=1, tensors=TENSORS, kv=KV, **keys):
    """A checkpoint whose rows are in another order than the right one."""
    ranks = checkpoint(kind, tensors, rows_of, tp, kv)
    return write_checkpoint(directory, kind, ranks, kv, **keys)


def right(kind="int8", tp=1):
    return checkpoint(kind, TENSORS, rank_rows, tp)


EARLY = {"producer": {"name": "modelopt", "version": "0.11.2"}, "decoder": "phi"}
LATE = {"producer": {"name": "modelopt", "version": "0.19.0"}, "decoder": "phi3small"}


def content(directory):
    """Every file's bytes."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def same(directory, ranks):
    """Assert that the rank files hold exactly these tensors."""
    for rank, tensors in enumerate(ranks):
        stored = load(directory / f"rank{rank}.safetensors")
        assert list(stored) == list(tensors)
        for name, (code, array) in tensors.items():
            assert stored[name][0] == code
            expected = array.astype(CODES[code])
            assert stored[name][1].shape == expected.shape, name
            assert stored[name][1].tobytes() == expected.tobytes(), name
