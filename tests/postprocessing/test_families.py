"""A third party's family with linears of its own order; and rules that make no sense."""

import numpy as np
import pytest
from grouped_by_hand import content, same, write_checkpoint
from phireg_plugins.phi3_mini import FAMILY

import phireg
from phireg import registry
from phireg.api import COLUMN, COPY, Linear, QuantRules, Rules, hookimpl, order, parts, src
from phireg.errors import CheckError
from phireg.registry import Candidate, FamilyChoice

FC = "transformer.layers.{}.mlp.fc"


class Steps:
    """Rows of gate and up are exchanged by some exporter."""

    rule = staticmethod(
        lambda i: Linear(
            FC.format(i), order(parts(src(FC.format(i), 12), gate=6, up=6), "up", "gate"), 5, COLUMN
        )
    )

    @hookimpl
    def phireg_quant_rules(self, config, scheme):
        return QuantRules(
            linears=(),
            postprocess=Rules(*(self.rule(i) for i in range(config["num_hidden_layers"]))),
        )


@pytest.fixture
def swapped(tmp_path, monkeypatch):
    steps = Steps()
    family = FAMILY.derive("swapped", steps)
    candidate = Candidate("swapped", "acme", "1.0", "acme:FAMILY", None)
    monkeypatch.setattr(registry, "load", lambda name: FamilyChoice(family, candidate))
    rng = np.random.default_rng(0)
    tensors = {}
    for i in range(2):
        tensors[f"{FC.format(i)}.weight"] = ("I8", rng.integers(-128, 128, (12, 5)))
        tensors[f"{FC.format(i)}.weights_scaling_factor"] = ("F32", rng.random(12))
        tensors[f"{FC.format(i)}.prequant_scaling_factor"] = ("F16", rng.random(5))
        tensors[f"{FC.format(i)}.activation_scaling_factor"] = ("F32", rng.random(1))
    directory = write_checkpoint(
        tmp_path / "ckpt", "int8", [tensors], architecture="Phi3ForCausalLM"
    )
    return directory, tensors, steps


def test_any_linear_of_any_family(swapped):
    directory, tensors, _ = swapped
    phireg.postprocess(directory, family="acme:swapped", in_source_order=True)
    for name, (code, array) in tensors.items():
        if name.endswith((".weight", "weights_scaling_factor")):
            tensors[name] = (code, np.concatenate([array[6:], array[:6]]))
    same(directory, [tensors])


@pytest.mark.parametrize(
    ("rows", "policy"),
    [
        (lambda name: src("another", 12), COLUMN),
        (lambda name: src(name, 12), COPY),
        (lambda name: order(parts(src(name, 11), a=5, b=6), "b", "a"), COLUMN),
    ],
)
def test_rules_that_make_no_sense(swapped, rows, policy):
    directory, _, steps = swapped
    steps.rule = lambda i: Linear(FC.format(i), rows(FC.format(i)), 5, policy)
    before = content(directory)
    with pytest.raises(CheckError):
        phireg.postprocess(directory, family="acme:swapped", in_source_order=True)
    assert content(directory) == before
