"""Phi-3.5-MoE: transformers' own model against the checkpoint, its tensors and its logits."""

import json
from functools import cache

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from phireg_plugins.phi35_mini import FAMILY as PHI35_MINI
from phireg_plugins.phi35_moe import FAMILY as PHI35_MOE
from phireg_plugins.phi35_moe.reference import PhiMoEConfig, PhiMoEForCausalLM
from safetensors.torch import load_file, save_file
from transformers import PhimoeConfig, PhimoeForCausalLM
from unregistered import convert, errors, planned, randomize

from phireg import executor
from phireg.config.hf import HFConfig
from phireg.findings import Severity
from phireg.testing import write_random_model

HIDDEN, HEADS, KV_HEADS, INNER, EXPERTS, VOCAB, LAYERS = 48, 8, 4, 20, 6, 97, 2
SIZE = HIDDEN // HEADS
ROPE = {
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.2, 2.5, 7.0],
    "short_mscale": 1.1,
    "long_mscale": 1.3,
    "original_max_position_embeddings": 64,
}
SPREADS = [(1, None), (2, None), (4, None), (2, 2), (4, 2)]
"""tp_size and moe_ep_size."""


@pytest.fixture(scope="module")
def model():
    config = PhimoeConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, num_local_experts=EXPERTS,
        max_position_embeddings=128, original_max_position_embeddings=64, rms_norm_eps=1e-3,
        router_jitter_noise=0.3, attention_bias=True, lm_head_bias=True, rope_parameters=ROPE,
        pad_token_id=0,
    )  # fmt: skip
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return randomize(PhimoeForCausalLM._from_config(config, **eager))


@pytest.fixture(scope="module")
def source(model, tmp_path_factory):
    """As transformers 5 saves it: the published names, and its own spelling of the config."""
    directory = tmp_path_factory.mktemp("source")
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def checkpoint(source, tmp_path_factory):
    @cache
    def checkpoint(tp_size, ep_size):
        output = tmp_path_factory.mktemp("out") / "ckpt"
        return convert(PHI35_MOE, source, output, tp_size=tp_size, moe_ep_size=ep_size)

    return checkpoint


@pytest.fixture(scope="module")
def reference(source):
    values = json.loads((source / "config.json").read_text())
    model = PhiMoEForCausalLM._from_config(PhiMoEConfig(**values), dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(load_file(source / "model.safetensors"))
    assert not missing and not unexpected
    return model


def ids(tokens, rows=2):
    return torch.randint(0, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(7))


def share(x, count, number, dim=0):
    return x.chunk(count, dim=dim)[number]


@pytest.mark.parametrize(("tp_size", "ep_size"), SPREADS)
def test_every_tensor(tp_size, ep_size, source, checkpoint):
    """What TensorRT-LLM's PhiMoE has on each rank, made of the published tensors by hand."""
    old = load_file(source / "model.safetensors")
    assert f"model.layers.0.block_sparse_moe.experts.{EXPERTS - 1}.w3.weight" in old
    shared = ep_size or 1
    for rank in range(tp_size):
        new = {"transformer.vocab_embedding.weight": old["model.embed_tokens.weight"]}
        for kind in ("weight", "bias"):
            new[f"transformer.ln_f.{kind}"] = old[f"model.norm.{kind}"]
            head = old[f"lm_head.{kind}"]
            padding = -VOCAB % tp_size
            head = torch.cat([head, head.new_zeros(padding, *head.shape[1:])])
            new[f"lm_head.{kind}"] = share(head, tp_size, rank)
        for i in range(LAYERS):
            here, there = f"model.layers.{i}", f"transformer.layers.{i}"
            for kind in ("weight", "bias"):
                new[f"{there}.input_layernorm.{kind}"] = old[f"{here}.input_layernorm.{kind}"]
                new[f"{there}.post_layernorm.{kind}"] = old[
                    f"{here}.post_attention_layernorm.{kind}"
                ]
                new[f"{there}.attention.qkv.{kind}"] = torch.cat(
                    [share(old[f"{here}.self_attn.{p}_proj.{kind}"], tp_size, rank) for p in "qkv"]
                )
            dense = f"{here}.self_attn.o_proj"
            new[f"{there}.attention.dense.weight"] = share(old[f"{dense}.weight"], tp_size, rank, 1)
            new[f"{there}.attention.dense.bias"] = old[f"{dense}.bias"]
            moe = f"{here}.block_sparse_moe"
            new[f"{there}.mlp.router.weight"] = old[f"{moe}.gate.weight"]
            w1, w2, w3 = (
                torch.stack([old[f"{moe}.experts.{e}.{w}.weight"] for e in range(EXPERTS)])
                for w in ("w1", "w2", "w3")
            )
            own = slice(rank % shared * EXPERTS // shared, (rank % shared + 1) * EXPERTS // shared)
            part = (tp_size // shared, rank // shared)
            new[f"{there}.mlp.fc.weight"] = torch.cat(
                [share(w3[own], *part, 1), share(w1[own], *part, 1)], dim=1
            )
            new[f"{there}.mlp.proj.weight"] = share(w2[own], *part, 2)
        tensors = load_file(checkpoint(tp_size, ep_size) / f"rank{rank}.safetensors")
        assert tensors.keys() == new.keys()
        for name, tensor in new.items():
            assert torch.equal(tensors[name], tensor), name


def test_the_config(checkpoint):
    config = json.loads((checkpoint(4, 2) / "config.json").read_text())
    assert config["architecture"] == "PhiMoEForCausalLM"
    moe = {"num_experts": EXPERTS, "top_k": 2, "normalization_mode": 2}
    assert config["moe"] == {**moe, "sparse_mixer_epsilon": 0.3}
    four_ranks = {"world_size": 4, "tp_size": 4, "pp_size": 1}
    assert config["mapping"] == {**four_ranks, "moe_tp_size": 2, "moe_ep_size": 2}
    assert (config["longrope_short_mscale"], config["longrope_long_mscale"]) == (1.1, 1.3)
    assert (config["hidden_act"], config["attention_bias"]) == ("swiglu", True)
    divided = json.loads((checkpoint(4, None) / "config.json").read_text())
    assert divided["mapping"] == four_ranks


@pytest.mark.parametrize(("tp_size", "ep_size"), SPREADS)
def test_logits_within_the_original_length(tp_size, ep_size, model, reference, checkpoint):
    """Beyond it transformers 5.23 stays with the short factors."""
    ran = executor.load(checkpoint(tp_size, ep_size), dtype="float32")
    for tokens in (9, 64):
        with torch.no_grad():
            expected = model(ids(tokens)).logits
            assert (reference(ids(tokens)).logits - expected).abs().max() < 1e-4
        assert (ran(ids(tokens)) - expected).abs().max() < 1e-4


def test_the_router_decides(model, source, tmp_path):
    """With another epsilon the logits are different."""
    with torch.no_grad():
        expected = model(ids(20)).logits
    output = convert(PHI35_MOE, source, tmp_path / "ckpt")
    config = json.loads((output / "config.json").read_text())
    config["moe"]["sparse_mixer_epsilon"] = 0.01
    (output / "config.json").write_text(json.dumps(config))
    other = executor.load(output, dtype="float32")
    assert (other(ids(20)) - expected).abs().max() > 0.1


def test_long_sequences(reference, checkpoint, monkeypatch):
    """The executor takes the long factors and their mscale, as the shipped reference does."""
    ran, rope = executor.load(checkpoint(2, 2), dtype="float32"), reference.config.rope_scaling
    with torch.no_grad():
        expected = reference(ids(90)).logits
        monkeypatch.setattr(reference.config, "rope_scaling", {**rope, "long_mscale": 1.1})
        other = reference(ids(90)).logits
    assert (ran(ids(90)) - expected).abs().max() < 1e-4
    assert (other - expected).abs().max() > 1e-2


def test_the_shipped_reference_computes_each_token_once(reference):
    lengths = []
    hook = reference.model.register_forward_pre_hook(
        lambda _, args: lengths.append(args[0].shape[1])
    )
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    reference.generate(torch.tensor([[1, 2, 3]]), **options)
    hook.remove()
    assert lengths == [3, 1, 1, 1]


def test_generation(model, reference, checkpoint):
    """With a cache, of prompts of unequal length, at EP 2; and the reference's own generate."""
    prompts = [ids(11, 1)[0].tolist(), ids(5, 1)[0].tolist()]
    rows = executor.generate(executor.load(checkpoint(2, 2), dtype="float32"), prompts, 6)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
    for prompt, tokens in zip(prompts, rows, strict=True):
        for theirs in (model, reference):
            whole = theirs.generate(torch.tensor([prompt]), **options)
            assert tokens == whole[0, len(prompt) :].tolist()
    padded = torch.tensor([prompts[0], [0] * 6 + prompts[1]])
    mask = torch.ones_like(padded)
    mask[1, :6] = 0
    whole = reference.generate(padded, attention_mask=mask, **options)
    assert whole[:, 11:].tolist() == rows


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_router_keeps_its_precision(dtype, source, tmp_path):
    """Cast from the source's dtype to float32 at once, and not through the checkpoint's."""
    tensors = load_file(source / "model.safetensors")
    half = tmp_path / "half"
    half.mkdir()
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    gate = "model.layers.1.block_sparse_moe.gate.weight"
    tensors[gate] *= 2.0**-30  # below what float16 can say
    save_file(tensors, half / "model.safetensors")
    (half / "config.json").write_text((source / "config.json").read_text())
    output = convert(PHI35_MOE, half, tmp_path / "ckpt", dtype=dtype, tp_size=2)
    for rank in range(2):
        written = load_file(output / f"rank{rank}.safetensors")
        router = written.pop("transformer.layers.1.mlp.router.weight")
        assert router.dtype == torch.float32
        assert torch.equal(router, tensors[gate].float())
        others = {tensor.dtype for name, tensor in written.items() if "router" not in name}
        assert others == {getattr(torch, dtype)}


def test_a_checkpoint_in_bfloat16_counts_what_is_cast(source):
    plan = planned(PHI35_MOE, source, dtype="bfloat16")
    routers = sum("gate.weight" in name for name in plan.source.tensors)
    assert plan.casts == len(plan.source.tensors) - routers


@pytest.mark.parametrize(
    ("options", "code", "module"),
    [
        ({"tp_size": 4, "moe_ep_size": 4}, "sharding", "mlp.fc"),
        ({"tp_size": 8}, "sharding", "mlp.fc"),
        ({"qformat": "int8_sq"}, "quant", ""),
        ({"qformat": "int8_wo"}, "quant", ""),
    ],
)
def test_unsupported_options_are_errors(options, code, module, source):
    found = errors(PHI35_MOE, source, **options)
    problems = {(kind, subject) for kind, subject, _ in found}
    assert any(kind == code and subject.endswith(module) for kind, subject in problems), problems
    assert all("fp8" in detail for kind, _, detail in found if kind == "quant")


@pytest.mark.parametrize("ep_size", [1, 2])
def test_families_without_experts_refuse_to_spread_them(ep_size, tmp_path):
    small = {"num_hidden_layers": 1, "hidden_size": 24, "num_attention_heads": 4}
    sizes = {"num_key_value_heads": 4, "intermediate_size": 8, "vocab_size": 10}
    config = {**PHI35_MINI.published[0].config, **small, **sizes}
    write_random_model(PHI35_MINI, config, tmp_path)
    assert errors(PHI35_MINI, tmp_path, tp_size=2) == []
    problems = errors(PHI35_MINI, tmp_path, tp_size=2, moe_ep_size=ep_size)
    assert [(code, subject) for code, subject, _ in problems] == [("sharding", "phi3.5-mini")]


@pytest.mark.parametrize(
    ("changes", "subject"),
    [
        ({"attention_bias": False}, "biases"),
        ({"lm_head_bias": None}, "biases"),
        ({"num_experts_per_tok": 3}, "moe"),
        ({"num_local_experts": 1}, "moe"),
        ({"router_jitter_noise": 0}, "moe"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"rope_parameters": {**ROPE, "short_mscale": None}}, "rope_parameters.short_mscale"),
    ],
)
def test_configs_that_are_refused(changes, subject, source):
    values = json.loads((source / "config.json").read_text()) | changes
    findings = PHI35_MOE.config_fields().translate(HFConfig(values)).findings
    assert subject in {f.subject for f in findings if f.severity is Severity.ERROR}, findings


def test_the_published_config():
    """Every key of it is known; the rope factors are made up."""
    (published,) = PHI35_MOE.published
    original, mscale = {"original_max_position_embeddings": 4096}, 1.243163121016122
    values = {
        **published.config, **original, "_name_or_path": "Phi-3.5-MoE-instruct",
        "attention_dropout": 0.0, "auto_map": {"AutoConfig": "configuration_phimoe.PhiMoEConfig"},
        "bos_token_id": 1, "eos_token_id": 32000, "hidden_dropout": 0.0, "initializer_range": 0.02,
        "input_jitter_noise": 0.01, "output_router_logits": False, "router_aux_loss_coef": 0.0,
        "sliding_window": 131072, "transformers_version": "4.43.3", "use_cache": True,
        "rope_scaling": {
            "type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64,
            "short_mscale": mscale, "long_mscale": mscale, **original,
        },
    }  # fmt: skip
    translation = PHI35_MOE.config_fields().translate(HFConfig(values))
    assert translation.ok and translation.findings == ()
    assert translation.fields["longrope_long_mscale"] == mscale
    assert translation.fields["moe"]["num_experts"] == 16


def _rank(rank, directory, tokens):
    torch.set_num_threads(1)
    place = f"file://{directory.parent}/rendezvous"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    ran = executor.load(directory, dtype="float32", distributed=True)
    results = ran(tokens), executor.generate(ran, tokens.tolist(), 3)
    torch.save(results, directory.parent / f"{rank}.pt")
    dist.destroy_process_group()


def test_a_process_for_each_share_of_the_experts(model, checkpoint):
    place = checkpoint(2, 2)
    mp.start_processes(_rank, (place, ids(20)), nprocs=2, start_method="fork")
    together = executor.load(place, dtype="float32")
    with torch.no_grad():
        expected = model(ids(20)).logits
    for rank in range(2):
        logits, tokens = torch.load(place.parent / f"{rank}.pt", weights_only=True)
        assert (logits - expected).abs().max() < 1e-4
        assert tokens == executor.generate(together, ids(20).tolist(), 3)
