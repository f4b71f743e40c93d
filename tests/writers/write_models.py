"""Write tiny models with the transformers release that runs this, and the logits that it computes.

    DIRECTORY/tf5.17/bin/python tests/writers/write_models.py OUTPUT

Each case becomes a directory as ``save_pretrained`` makes it, with ``logits.safetensors`` beside:
of a prompt on either side of long rope's switch. A case that the release cannot make is a line on
standard output. Nothing of phireg is imported, apart from Phi-3-small, which transformers lacks.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

FIVE = int(transformers.__version__.split(".")[0]) >= 5
FACTORS = {
    "short_factor": [1.0, 1.1, 1.2, 1.4, 1.7, 2.1],
    "long_factor": [1.0, 1.5, 2.5, 4.0, 7.0, 12.0],
}
THETA, LENGTHS = 5000.0, (9, 33)

PHI = {
    "vocab_size": 31, "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 64, "hidden_act": "gelu_new",
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PHI3 = {
    "vocab_size": 31, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-3,
    "max_position_embeddings": 64, "original_max_position_embeddings": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SMALL = {
    "vocab_size": 31, "hidden_size": 24, "ff_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "rope_embedding_base": THETA,
    "max_position_embeddings": 64, "gegelu_limit": 0.5, "gegelu_pad_to_256": False,
    "blocksparse_block_size": 4, "blocksparse_num_local_blocks": 2, "blocksparse_vert_stride": 3,
    "architectures": ["Phi3SmallForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def phi(**settings):
    return transformers.PhiForCausalLM(transformers.PhiConfig(**PHI, **settings))


def phi3(**settings):
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**PHI3, **settings))


def phi3_small(**settings):
    from phireg_plugins.phi3_small.reference import Phi3SmallConfig, Phi3SmallForCausalLM

    return Phi3SmallForCausalLM(Phi3SmallConfig(**SMALL, **settings))


def block(kind="default", partial=1.0, **scaling):
    """The settings of rope as transformers 5 has them; 4 has no such key."""
    if not FIVE:
        raise ValueError("rope_parameters is a key of transformers 5")
    rope = {"rope_type": kind, "rope_theta": THETA, "partial_rotary_factor": partial}
    return {"rope_parameters": {**rope, **scaling}}


def read_again(model_type, published):
    """A model of a config.json as it was published for transformers 4: a fine-tune, saved again."""
    published |= {"model_type": model_type, "torch_dtype": "bfloat16", "rope_theta": THETA}
    path = Path(sys.argv[1]) / "published"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(published), encoding="utf-8")
    config = transformers.AutoConfig.from_pretrained(path)
    return transformers.AutoModelForCausalLM.from_config(config)


def long_rope(name):
    return {"rope_theta": THETA, "rope_scaling": {"type": name, **FACTORS}}


CASES = {
    "phi-keywords": lambda: phi(partial_rotary_factor=0.34, rope_theta=THETA),
    "phi-block": lambda: phi(**block(partial=0.34)),
    "phi-defaults": phi,
    "phi-published": lambda: read_again("phi", {**PHI, "partial_rotary_factor": 0.34}),
    "phi3-keywords": lambda: phi3(rope_theta=THETA),
    "phi3-defaults": phi3,
    "phi3-partial": lambda: phi3(rope_theta=THETA, partial_rotary_factor=0.5),
    "phi3-partial-block": lambda: phi3(**block(partial=0.5)),
    "phi3-tied": lambda: phi3(tie_word_embeddings=True, **long_rope("longrope")),
    "phi3-tied-bin": lambda: phi3(tie_word_embeddings=True),
    "phi3-shards": phi3,
    "phi3-long-keywords": lambda: phi3(**long_rope("longrope")),
    "phi3-long-su": lambda: phi3(**long_rope("su")),
    "phi3-long-block": lambda: phi3(**block("longrope", **FACTORS)),
    "phi3-long-published": lambda: read_again("phi3", {**PHI3, **long_rope("longrope")}),
    "phi3small": phi3_small,
    "phi3small-long": lambda: phi3_small(
        rope_scaling={
            "type": "longrope", **FACTORS, "short_mscale": 1.1, "long_mscale": 1.3,
            "original_max_position_embeddings": 16,
        }
    ),
}  # fmt: skip


SAVED = {
    "phi3-tied-bin": {"safe_serialization": False},
    "phi3-shards": {"max_shard_size": "4KB"},
}
"""How some cases are saved."""


@torch.no_grad()
def randomize(model):
    """Give every parameter values of bfloat16; queries and keys are large, norms around one."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            noise = 1 + 0.3 * noise
        elif parameter.ndim == 2:
            noise *= parameter.shape[-1] ** -0.5
            noise *= 2.5 if any(p in name for p in ("q_proj", "k_proj", "qkv", "query_key")) else 1
        parameter.copy_(noise.to(torch.bfloat16))


def write(make, directory, **saved):
    """Save one model in bfloat16, and its logits, computed in float32."""
    model = make().float().eval()
    randomize(model)
    logits = {}
    for tokens in LENGTHS:
        ids = torch.randint(3, 31, (1, tokens), generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            logits[f"logits-{tokens}"] = model(ids, use_cache=False).logits[0].float().contiguous()
        logits[f"ids-{tokens}"] = ids[0]
    model.to(torch.bfloat16).save_pretrained(directory, **saved)
    if saved.get("safe_serialization") is False and not (directory / "pytorch_model.bin").exists():
        shutil.rmtree(directory)
        raise ValueError("transformers 5 writes safetensors only")
    save_file(logits, directory / "logits.safetensors")
    (directory / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    output = Path(sys.argv[1])
    output.mkdir(parents=True)
    for name, make in CASES.items():
        try:
            write(make, output / name, **SAVED.get(name, {}))
        except Exception as error:
            reason = str(error).strip().splitlines() or [""]
            print(f"{name}: {type(error).__name__}: {reason[0][:150]}")
