"""Phi-3-small in float64 NumPy, with a loop per token and per head.

Written from the published formulas alone; reference.py is compared with it. ``wrong`` plants one
known mistake, so that the tests can show that they would notice it.
"""

import math

import numpy as np

MISTAKES = (
    "mask ignored",
    "dense and sparse layers exchanged",
    "dense layers counted from 0",
    "stripes of all heads alike",
    "stripes of kv heads",
    "stripe step 1",
    "stripe without + 1",
    "local blocks + 1",
    "positions of the mask count padding",
    "scale 1/sqrt(d)",
    "attention multiplier dropped",
    "clamp removed",
    "gate clamped from below",
    "up_proj in halves",
    "gate and linear exchanged",
    "linear without + 1",
    "qkv as [Q; K; V]",
    "k and v exchanged",
    "rotary pairs",
    "rope base 1e4",
    "position scale dropped",
    "mscale dropped",
    "mscale squared",
    "short and long exchanged",
    "eps 1e-5",
    "norm bias dropped",
    "qkv bias dropped",
    "dense bias dropped",
    "up_proj bias dropped",
    "down_proj bias dropped",
    "embedding multiplier dropped",
    "width multiplier dropped",
)


class Naive:
    def __init__(self, config, tensors, wrong=None):
        assert wrong is None or wrong in MISTAKES, wrong
        self.c = config
        self.t = {name: np.asarray(value, dtype=np.float64) for name, value in tensors.items()}
        self.wrong = wrong
        self.head_dim = config["hidden_size"] // config["num_attention_heads"]

    def norm(self, x, name):
        eps = 1e-5 if self.wrong == "eps 1e-5" else self.c["layer_norm_epsilon"]
        centered = x - x.mean()
        y = centered / math.sqrt((centered**2).mean() + eps) * self.t[f"{name}.weight"]
        return y if self.wrong == "norm bias dropped" else y + self.t[f"{name}.bias"]

    def linear(self, x, name, mistake):
        y = self.t[f"{name}.weight"] @ x
        return y if self.wrong == mistake else y + self.t[f"{name}.bias"]

    def rotate(self, vector, position, total):
        c, half = self.c, self.head_dim // 2
        base = 1e4 if self.wrong == "rope base 1e4" else c["rope_embedding_base"]
        scaling = c.get("rope_scaling")
        factors, mscale = [1.0] * half, 1.0
        if scaling is None:
            if self.wrong != "position scale dropped":
                position = position * c["rope_position_scale"]
        else:
            original = scaling["original_max_position_embeddings"]
            long = total > original
            if self.wrong == "short and long exchanged":
                long = not long
            factors = scaling["long_factor"] if long else scaling["short_factor"]
            if long:
                growth = c["max_position_embeddings"] / original
                mscale = scaling.get("long_mscale", -1)
                if mscale <= 0:
                    mscale = math.sqrt(1 + math.log(growth) / math.log(original))
            else:
                mscale = scaling.get("short_mscale", -1)
                if mscale <= 0:
                    mscale = 1.0
        if self.wrong == "mscale dropped":
            mscale = 1.0
        if self.wrong == "mscale squared":
            mscale = mscale**2
        out = np.empty_like(vector)
        for i in range(half):
            angle = position / (factors[i] * base ** (2 * i / self.head_dim))
            cos, sin = math.cos(angle) * mscale, math.sin(angle) * mscale
            a, b = (2 * i, 2 * i + 1) if self.wrong == "rotary pairs" else (i, i + half)
            out[a] = vector[a] * cos - vector[b] * sin
            out[b] = vector[b] * cos + vector[a] * sin
        return out

    def split(self, y):
        """Queries by global head, keys and values by group, of one token's projection."""
        heads, groups = self.c["num_attention_heads"], self.c["num_key_value_heads"]
        d = self.head_dim
        per_group = heads // groups
        pieces = [y[n * d : (n + 1) * d] for n in range(heads + 2 * groups)]
        if self.wrong == "qkv as [Q; K; V]":
            return pieces[:heads], pieces[heads : heads + groups], pieces[heads + groups :]
        queries, keys, values = [], [], []
        for g in range(groups):
            own = pieces[g * (per_group + 2) : (g + 1) * (per_group + 2)]
            queries += own[:per_group]
            keys.append(own[per_group])
            values.append(own[per_group + 1])
        if self.wrong == "k and v exchanged":
            keys, values = values, keys
        return queries, keys, values

    def allowed(self, layer, head, i, j):
        c, wrong = self.c, self.wrong
        every = c["dense_attention_every_n_layers"]
        dense = bool(every) and (layer + 1) % every == 0
        if wrong == "dense and sparse layers exchanged":
            dense = not dense
        if wrong == "dense layers counted from 0":
            dense = bool(every) and layer % every == 0
        if j > i:
            return False
        if dense or wrong == "mask ignored":
            return True
        stride, heads = c["blocksparse_vert_stride"], c["num_attention_heads"]
        step = max(1, math.floor(stride / heads))
        if c["blocksparse_homo_head_pattern"] or wrong == "stripes of all heads alike":
            step = 0
        if wrong == "stripe step 1":
            step = 1
        if wrong == "stripes of kv heads":
            head = head // (heads // c["num_key_value_heads"])
        block = c["blocksparse_block_size"]
        local = c["blocksparse_num_local_blocks"] + (wrong == "local blocks + 1")
        if i // block - j // block < local:
            return True
        return (j // block + head * step + (wrong != "stripe without + 1")) % stride == 0

    def attention(self, layer, inputs, first):
        """``inputs``: the normalized states of the stored tokens; ``first``: first real one."""
        c, d, name = self.c, self.head_dim, f"model.layers.{layer}.self_attn"
        heads, total = c["num_attention_heads"], len(inputs)
        per_group = heads // c["num_key_value_heads"]
        scale = 1 / math.sqrt(d)
        if c["mup_use_scaling"] and self.wrong != "scale 1/sqrt(d)":
            scale = (
                1 if self.wrong == "attention multiplier dropped" else c["mup_attn_multiplier"]
            ) / d
        queries, keys, values = [], [], []
        for position, x in enumerate(inputs):
            y = self.linear(x, f"{name}.query_key_value", "qkv bias dropped")
            q, k, v = self.split(y)
            queries.append([self.rotate(vector, position, total) for vector in q])
            keys.append([self.rotate(vector, position, total) for vector in k])
            values.append(v)
        self.keys[layer] = np.array(keys)
        offset = 0 if self.wrong == "positions of the mask count padding" else first
        outputs = []
        for i in range(total):
            context = []
            for head in range(heads):
                group = head // per_group
                seen = [
                    j
                    for j in range(first, i + 1)
                    if self.allowed(layer, head, i - offset, j - offset)
                ]
                if not seen:  # padding
                    context.append(np.zeros(d))
                    continue
                scores = np.array([queries[i][head] @ keys[j][group] * scale for j in seen])
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                context.append(
                    sum(w * values[j][group] for w, j in zip(weights, seen, strict=True))
                )
            outputs.append(
                self.linear(np.concatenate(context), f"{name}.dense", "dense bias dropped")
            )
        return outputs

    def mlp(self, layer, x):
        name, limit = f"model.layers.{layer}.mlp", self.c["gegelu_limit"]
        y = self.linear(x, f"{name}.up_proj", "up_proj bias dropped")
        gate, linear = y[0::2], y[1::2]
        if self.wrong == "up_proj in halves":
            gate, linear = np.split(y, 2)
        if self.wrong == "gate and linear exchanged":
            gate, linear = linear, gate
        if self.wrong != "clamp removed":
            gate, linear = np.minimum(gate, limit), np.clip(linear, -limit, limit)
            if self.wrong == "gate clamped from below":
                gate = np.maximum(gate, -limit)
        plus = 0 if self.wrong == "linear without + 1" else 1
        activated = gate / (1 + np.exp(-1.702 * gate)) * (linear + plus)
        return self.linear(activated, f"{name}.down_proj", "down_proj bias dropped")

    def __call__(self, ids, first=0):
        """Logits [T, vocab] of one stored sequence whose first real token is ``first``."""
        c = self.c
        multiplier = c["mup_embedding_multiplier"]
        if multiplier <= 0 or self.wrong == "embedding multiplier dropped":
            multiplier = 1.0
        embedding = self.t["model.embed_tokens.weight"]
        states = [embedding[token] * multiplier for token in ids]
        self.keys = {}
        self.states = [np.array(states)]
        for layer in range(c["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            normed = [self.norm(x, f"{name}.input_layernorm") for x in states]
            states = [
                x + y for x, y in zip(states, self.attention(layer, normed, first), strict=True)
            ]
            states = [
                x + self.mlp(layer, self.norm(x, f"{name}.post_attention_layernorm"))
                for x in states
            ]
            self.states.append(np.array(states))
        states = [self.norm(x, "model.final_layernorm") for x in states]
        self.states[-1] = np.array(states)
        width = 1.0 if self.wrong == "width multiplier dropped" else c["mup_width_multiplier"]
        head = self.t.get("lm_head.weight", embedding)
        return np.array([head @ x for x in states]) / width
