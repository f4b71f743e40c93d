"""Names and shapes of the tensors of published Phi-3 and Phi-3-small files, by their config."""


def gated_layers(config, inner, qkv_proj, dense, gate_up):
    """The embedding and the layers."""
    h, heads = config["hidden_size"], config["num_attention_heads"]
    qkv = (heads + 2 * config.get("num_key_value_heads", heads)) * (h // heads)
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], h)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (h,),
            f"{layer}.self_attn.{qkv_proj}.weight": (qkv, h),
            f"{layer}.self_attn.{dense}.weight": (h, h),
            f"{layer}.post_attention_layernorm.weight": (h,),
            f"{layer}.mlp.{gate_up}.weight": (2 * inner, h),
            f"{layer}.mlp.down_proj.weight": (h, inner),
        }
    return shapes


def phi3_shapes(config):
    h, inner = config["hidden_size"], config["intermediate_size"]
    layers = gated_layers(config, inner, "qkv_proj", "o_proj", "gate_up_proj")
    return layers | {"model.norm.weight": (h,), "lm_head.weight": (config["vocab_size"], h)}


def small_shapes(config):
    """The embedding is the head."""
    h, inner = config["hidden_size"], config["ff_intermediate_size"]
    layers = gated_layers(config, inner, "query_key_value", "dense", "up_proj")
    return with_bias(layers | {"model.final_layernorm.weight": (h,)})


def with_bias(shapes):
    return shapes | {
        name.removesuffix("weight") + "bias": shape[:1]
        for name, shape in shapes.items()
        if name != "model.embed_tokens.weight"
    }
