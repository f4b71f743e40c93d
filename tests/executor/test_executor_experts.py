"""Which experts a token gets, by hand; and configurations that say something else."""

import math

import pytest
import torch

from phireg.errors import CheckError
from phireg.executor.blocks import rank_mixture, route
from phireg.reader.spec import Experts, parse_spec

CONFIG = {
    "architecture": "PhiMoEForCausalLM", "dtype": "float32", "vocab_size": 97, "hidden_size": 48,
    "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "hidden_act": "swiglu",
    "norm_epsilon": 1e-5, "rotary_base": 10000.0, "rotary_pct": 1.0,
    "position_embedding_type": "rope_gpt_neox",
    "moe": {
        "num_experts": 6, "top_k": 2, "normalization_mode": 2, "sparse_mixer_epsilon": 0.1,
    },
    "mapping": {"world_size": 4, "tp_size": 4, "pp_size": 1},
}  # fmt: skip


def ranks(count):
    return {"world_size": count, "tp_size": count}


def routed(scores, epsilon):
    chosen, weights = route(torch.tensor([scores]), epsilon)
    return chosen[0].tolist(), pytest.approx(weights[0].tolist(), abs=1e-6)


def test_scores_near_the_best_share():
    # Nothing is near the best, and nothing near the second: both weights are whole.
    assert routed([1.0, 4.0, 2.0, -3.0], 0.1) == ([1, 2], [1.0, 1.0])
    # (4 - 3.5) / 4 = 0.125 and (4 - 3.3) / 4 = 0.175, both at most 0.2; (4 - 3) / 4 is not.
    near = [math.exp(s) for s in (4.0, 3.5, 3.3)]
    # Without the first, (3.5 - 3.3) / 3.5 = 0.06 and (3.5 - 3) / 3.5 = 0.14 are near.
    rest = [math.exp(s) for s in (3.5, 3.3, 3.0)]
    expected = [near[0] / sum(near), rest[0] / sum(rest)]
    assert routed([3.3, 4.0, 3.5, 3.0], 0.1) == ([1, 2], expected)
    # The best is -1: (-1 + 1.2) / max(1.2, -1) = 0.17 is near, (-1 + 3) / 3 = 0.67 is not.
    share = math.exp(-1.0) / (math.exp(-1.0) + math.exp(-1.2))
    assert routed([-1.2, -3.0, -1.0], 0.1) == ([2, 0], [share, 1.0])
    assert routed([0.0, 0.0, 0.0], 0.1) == ([0, 1], [1 / 3, 1 / 2])


def test_tokens_are_routed_each_for_itself():
    scores = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    chosen, weights = route(scores, 0.3)
    for token in range(50):
        alone = route(scores[token : token + 1], 0.3)
        assert torch.equal(alone[0][0], chosen[token])
        assert torch.equal(alone[1][0], weights[token])
    assert (weights < 0.999).any() and (weights.sum(-1) > 1.01).any()


def test_an_expert_sees_only_its_tokens():
    fc, proj = torch.randn(2, 8, 5), torch.randn(2, 5, 4)
    x, chosen = torch.randn(3, 5), torch.tensor([[4, 1], [0, 2], [5, 4]])
    weights = torch.tensor([[0.5, 9.0], [9.0, 9.0], [2.0, 0.25]])

    def expert(e, row):
        up, gate = (fc[e] @ x[row]).split(4)
        return proj[e] @ (up * gate * torch.sigmoid(gate))

    expected = torch.stack(
        [0.5 * expert(0, 0), torch.zeros(5), 2.0 * expert(1, 2) + 0.25 * expert(0, 2)]
    )
    stacks = {"mlp.fc.weight": fc, "mlp.proj.weight": proj}
    assert torch.allclose(
        rank_mixture(range(4, 6), stacks, x, chosen, weights), expected, atol=1e-5
    )


def test_the_spec():
    spec = parse_spec(CONFIG)
    assert (spec.experts, spec.rank_intermediate_size) == (Experts(6, 1), 5)
    assert spec.mixer_epsilon == 0.1
    mapping = {**ranks(4), "moe_tp_size": 2, "moe_ep_size": 2}
    spec = parse_spec({**CONFIG, "mapping": mapping})
    assert (spec.experts, spec.rank_intermediate_size) == (Experts(6, 2), 10)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"moe": None}, "num_experts"),
        ({"moe": {**CONFIG["moe"], "normalization_mode": 1}}, "normalization_mode"),
        ({"moe": {**CONFIG["moe"], "top_k": 1}}, "top_k"),
        ({"moe": {**CONFIG["moe"], "num_experts": 1}}, "1 experts"),
        ({"moe": {**CONFIG["moe"], "sparse_mixer_epsilon": 0}}, "sparse_mixer_epsilon"),
        ({"moe": {**CONFIG["moe"], "shared_expert_intermediate_size": 8}}, "shared_expert"),
        ({"mapping": {**ranks(4), "moe_ep_size": 4}}, "over 4 ranks"),
        ({"mapping": {**ranks(4), "moe_ep_size": 3}}, "moe_ep_size"),
        ({"intermediate_size": 18}, "intermediate_size"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization": {"quant_algo": "W8A16"}}, "than FP8"),
        (
            {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}},
            "no router",
        ),
        ({"architecture": "Phi3ForCausalLM"}, "moe"),
    ],
)
def test_configurations_without_a_meaning_are_refused(changes, name):
    with pytest.raises(CheckError) as caught:
        parse_spec({**CONFIG, **changes})
    assert name in caught.value.message
