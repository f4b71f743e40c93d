"""The decoder of a checkpoint as an ONNX graph (opset 24, mask form), for other judges.

Written from ``ModelSpec`` and ONNX's operators alone, in float32. onnxruntime computes it, and
NVIDIA's parser turns it into a TensorRT network: neither shares anything with phireg's builder.

Inputs: ``input_ids``, ``position_ids`` int64 [B, S], ``write_indices`` int64 [B], and the caches
``cache_{k,v}_{i}`` [B, G, C, D]. With long rope, the long factors follow the C short ones' rows:
a position takes the row of its number, plus 0 or C.
"""

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


class Twin:
    """A graph in the making; ``model`` is the finished one."""

    def __init__(self, spec, source, capacity):
        self.spec, self.source, self.capacity = spec, source, capacity
        self.nodes, self.constants, self.inputs, self.outputs = [], [], [], []
        logits = self.decoder()
        shape = ["batch", "sequence", spec.vocab_size]
        self.nodes.append(helper.make_node("Identity", [logits], ["logits"], name="logits"))
        self.outputs.insert(0, helper.make_tensor_value_info("logits", FLOAT, shape))
        graph = helper.make_graph(self.nodes, "phi", self.inputs, self.outputs, self.constants)
        opsets = [helper.make_opsetid("", 24)]
        self.model = helper.make_model(graph, opset_imports=opsets, ir_version=11)

    def op(self, kind, *inputs, outputs=1, **attributes):
        number = len(self.nodes)
        names = [f"t{number}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=f"n{number}", **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, value):
        array = value.float().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def number(self, value):
        return self.constant(np.float32(value))

    def given(self, name, kind, shape):
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def linear(self, name, x):
        y = self.op("MatMul", x, self.constant(self.source(f"{name}.weight").t()))
        row = self.spec.architecture
        biased = {"attention": row.attention_bias, "mlp": row.mlp_bias}
        part = name.split(".")[-2] if "." in name else "lm_head"
        if biased.get(part, row.lm_head_bias):
            y = self.op("Add", y, self.constant(self.source(f"{name}.bias")))
        return y

    def norm(self, name, x):
        settings = {"epsilon": self.spec.norm_epsilon, "axis": -1}
        weight = self.constant(self.source(f"{name}.weight"))
        if self.spec.architecture.norm == "rms_norm":
            return self.op("RMSNormalization", x, weight, **settings)
        bias = self.constant(self.source(f"{name}.bias"))
        return self.op("LayerNormalization", x, weight, bias, **settings)

    def activate(self, z):
        spec = self.spec
        if spec.activation == "swiglu":
            up, gate = self.op("Split", z, axis=-1, num_outputs=2, outputs=2)
            return self.op("Mul", self.op("Mul", gate, self.op("Sigmoid", gate)), up)
        if spec.activation == "gelu_tanh":
            return self.op("Gelu", z, approximate="tanh")
        end, axis, two = self.constant([2**31 - 1]), self.constant([-1]), self.constant([2])
        gate = self.op("Slice", z, self.constant([0]), end, axis, two)
        value = self.op("Slice", z, self.constant([1]), end, axis, two)
        limit = spec.gegelu_limit
        gate = self.op("Min", gate, self.number(limit))
        value = self.op("Clip", value, self.number(-limit), self.number(limit))
        gate = self.op("Mul", gate, self.op("Sigmoid", self.op("Mul", gate, self.number(1.702))))
        return self.op("Mul", gate, self.op("Add", value, self.number(1)))

    def tables(self):
        rope, rows = self.spec.rope, np.arange(self.capacity)[:, None]
        divisor = rope.base ** (np.arange(0, rope.dim, 2) / rope.dim)
        kinds = [(np.ones(rope.dim // 2), 1.0)]
        if rope.short is not None:
            kinds = [(rope.short, rope.short_mscale), (rope.long, rope.long_mscale)]
        angles = [(rows / (divisor * np.asarray(factors)), scale) for factors, scale in kinds]
        cos = np.concatenate([np.cos(angle) * scale for angle, scale in angles])
        sin = np.concatenate([np.sin(angle) * scale for angle, scale in angles])
        return self.constant(cos.astype(np.float32)), self.constant(sin.astype(np.float32))

    def masks(self, positions):
        """What a token sees, by whether the layer is sparse: bool [B, 1 or heads, S, C]."""
        query = self.op("Mod", positions, self.constant([self.capacity]))
        query = self.op("Unsqueeze", query, self.constant([1, 3]))
        key = np.arange(self.capacity).reshape(1, 1, 1, -1)
        causal = self.op("LessOrEqual", self.constant(key), query)
        sparse = self.spec.sparse
        if sparse is None:
            return causal, causal
        blocks = key // sparse.block_size
        head = np.arange(self.spec.num_heads).reshape(1, -1, 1, 1)
        stripe = (blocks + head * sparse.head_step + 1) % sparse.vertical_stride == 0
        back = self.op(
            "Sub", self.op("Div", query, self.constant([sparse.block_size])), self.constant(blocks)
        )
        near = self.op("Less", back, self.constant([sparse.num_local_blocks]))
        seen = self.op("Or", near, self.constant(stripe))
        return causal, self.op("And", causal, seen)

    def decoder(self):
        spec = self.spec
        ids = self.given("input_ids", INT, ["batch", "sequence"])
        self.positions = self.given("position_ids", INT, ["batch", "sequence"])
        self.given("write_indices", INT, ["batch"])
        self.cos, self.sin = self.tables()
        causal, sparse = self.masks(self.positions)
        table = self.constant(self.source("transformer.vocab_embedding.weight"))
        x = self.op("Mul", self.op("Gather", table, ids), self.number(spec.embedding_multiplier))
        for index in range(spec.num_layers):
            name = f"transformer.layers.{index}"
            u = self.norm(f"{name}.input_layernorm", x)
            mask = sparse if spec.is_sparse(index) else causal
            attended = self.attention(index, u, mask)
            if spec.architecture.residual == "sequential":
                x = self.op("Add", x, attended)
                u = self.norm(f"{name}.post_layernorm", x)
            inner = self.activate(self.linear(f"{name}.mlp.fc", u))
            x = self.op("Add", x, self.linear(f"{name}.mlp.proj", inner))
            if spec.architecture.residual == "parallel":
                x = self.op("Add", x, attended)
        logits = self.linear("lm_head", self.norm("transformer.ln_f", x))
        return self.op("Div", logits, self.number(spec.logits_divisor))

    def attention(self, index, u, mask):
        spec, name = self.spec, f"transformer.layers.{index}.attention"
        heads, kv_heads, size = spec.num_heads, spec.num_kv_heads, spec.head_size
        sizes = self.constant([heads * size, kv_heads * size, kv_heads * size])
        parts = self.op("Split", self.linear(f"{name}.qkv", u), sizes, axis=-1, outputs=3)
        query, key, value = (
            self.op(
                "Transpose",
                self.op("Reshape", part, self.constant([0, 0, count, size])),
                perm=[0, 2, 1, 3],
            )
            for part, count in zip(parts, (heads, kv_heads, kv_heads), strict=True)
        )
        partial = {} if spec.rope.dim == size else {"rotary_embedding_dim": spec.rope.dim}
        query, key = (
            self.op("RotaryEmbedding", x, self.cos, self.sin, self.positions, **partial)
            for x in (query, key)
        )
        whole = []
        for part, new in (("k", key), ("v", value)):
            shape = ["batch", kv_heads, self.capacity, size]
            cache = self.given(f"cache_{part}_{index}", FLOAT, shape)
            present = f"present_{part}_{index}"
            node = helper.make_node(
                "TensorScatter", [cache, new, "write_indices"], [present],
                axis=-2, mode="linear", name=present,
            )  # fmt: skip
            self.nodes.append(node)
            self.outputs.append(helper.make_tensor_value_info(present, FLOAT, shape))
            whole.append(present)
        attended = self.op("Attention", query, *whole, mask, scale=spec.attention_scale)
        attended = self.op("Transpose", attended, perm=[0, 2, 1, 3])
        attended = self.op("Reshape", attended, self.constant([0, 0, heads * size]))
        return self.linear(f"{name}.dense", attended)
