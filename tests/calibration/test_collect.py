"""Maxima against hooks on transformers' own whole models and against nvidia-modelopt."""

import pytest
import torch
from helpers import tiny_models as sources
from helpers.tiny_models import from_pretrained, opened
from torch import nn
from transformers import DynamicCache

from phireg.calibration import collect as collecting
from phireg.calibration.collect import collect, measure
from phireg.errors import SourceError

CPU = torch.device("cpu")
# Past 8 tokens blocks are dropped, past 20 long rope takes the long factors.
LENGTHS = (5, 7, 20, 7, 21, 33, 2, 33)


def rows(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 100, (n,), generator=generator).tolist() for n in lengths]


class Recorder(DynamicCache):
    """A cache that works as ever, and keeps the largest key and value of each layer."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        for what, states in (("key", key_states), ("value", value_states)):
            known = self.seen.get((what, layer_idx), 0.0)
            self.seen[what, layer_idx] = max(known, states.abs().max().item())
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@torch.no_grad()
def by_hand(model, batches, masks=None):
    """Channel maxima by linear, and cached maxima, of whole forward passes one after the other."""
    seen, cached = {}, {}

    def hook(name):
        def record(module, inputs):
            for token in inputs[0].reshape(-1, inputs[0].shape[-1]):
                seen[name] = torch.maximum(seen.get(name, token.abs()), token.abs())

        return record

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and ("layers." in name or not model.config.tie_word_embeddings)
    ]
    for number, ids in enumerate(batches):
        mask = {} if masks is None else {"attention_mask": masks[number]}
        model(ids, past_key_values=Recorder(cached), use_cache=True, **mask)
    for handle in handles:
        handle.remove()
    return {name: amax.float().cpu().numpy() for name, amax in seen.items()}, cached


def same(statistics, expected, rtol=0.0):
    inputs, cached = expected
    assert statistics.inputs.keys() == inputs.keys()
    for name, amax in inputs.items():
        ours = torch.from_numpy(statistics.inputs[name])
        assert torch.allclose(ours, torch.from_numpy(amax), rtol=rtol, atol=0), name
    assert len(statistics.keys) == len(statistics.values) == len(cached) // 2 == 3
    for what, ours in (("key", statistics.keys), ("value", statistics.values)):
        for layer, amax in enumerate(ours):
            assert amax == pytest.approx(cached[what, layer], rel=rtol, abs=0), (what, layer)


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("name", sources.MODELS)
def test_the_models_own_name_of_the_cache(tmp_path, name):
    """Transformers warns of the old one, and means to drop it."""
    reference = opened(name, sources.write(name, tmp_path, torch.float32), torch.float32)
    assert collect(reference, rows(), device=CPU).keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sources.MODELS)
def test_layer_by_layer_equals_the_whole_model(tmp_path, name, dtype):
    directory = sources.write(name, tmp_path, dtype)
    statistics = collect(opened(name, directory, dtype), rows(), device=CPU)
    expected = by_hand(
        from_pretrained(name, directory, dtype), [torch.tensor([row]) for row in rows()]
    )
    linears, tied = 6 if name == "phi2" else 4, name in ("phi3-tied", "phi3-small")
    assert len(statistics.inputs) == 3 * linears + (not tied)
    same(statistics, expected)


@pytest.mark.parametrize("name", sources.MODELS)
def test_batches_hold_rows_of_one_length(tmp_path, name):
    directory = sources.write(name, tmp_path)
    alone = by_hand(from_pretrained(name, directory), [torch.tensor([row]) for row in rows()])
    same(collect(opened(name, directory), rows(), device=CPU, batch_size=2), alone, rtol=1e-5)


def test_a_batch_has_as_many_tokens_as_fit(tmp_path, monkeypatch):
    """Two rows of 7 are 14; a row that is longer runs alone."""
    directory = sources.write("phi2", tmp_path)
    monkeypatch.setattr(collecting, "_tokens_at_once", lambda *_: 14)
    fitting = collect(opened("phi2", directory), rows(), device=CPU)
    assert fitting.provenance == {"batch_size": 2}
    alone = by_hand(from_pretrained("phi2", directory), [torch.tensor([row]) for row in rows()])
    same(fitting, alone, rtol=1e-5)


def test_padding_does_not_count(tmp_path):
    """Ids whose embedding is large would; upstream pads with such ones, and counts them."""
    model = sources.phi2()
    with torch.no_grad():
        model.model.embed_tokens.weight[0, :40] = 60
    model.save_pretrained(tmp_path, safe_serialization=True)
    unequal = rows((5, 12, 9))
    padded = torch.tensor([[0] * (12 - len(row)) + row for row in unequal])
    wrong, _ = by_hand(from_pretrained("phi2", tmp_path), [padded], [(padded > 0).long()])
    alone = by_hand(from_pretrained("phi2", tmp_path), [torch.tensor([row]) for row in unequal])
    grown = {name for name, amax in alone[0].items() if (wrong[name] > 1.05 * amax).any()}
    assert grown >= {f"model.layers.{layer}.mlp.fc2" for layer in range(3)}
    same(collect(opened("phi2", tmp_path), unequal, device=CPU, batch_size=3), alone)


def test_a_row_of_one_token(tmp_path):
    """Products with one vector are summed in an order that depends on the weights' layout."""
    directory = sources.write("phi2", tmp_path)
    expected = by_hand(from_pretrained("phi2", directory), [torch.tensor([[5]])])
    same(collect(opened("phi2", directory), [[5]], device=CPU), expected, rtol=1e-3)


def test_the_long_factors_depend_on_the_row(tmp_path):
    """The same tokens in a longer row have other keys: short and long factors differ."""
    directory = sources.write("phi3-gqa", tmp_path)
    (row,) = rows((21,))
    short = collect(opened("phi3-gqa", directory), [row[:20]], device=CPU)
    long = collect(opened("phi3-gqa", directory), [row], device=CPU)
    expected = by_hand(from_pretrained("phi3-gqa", directory), [torch.tensor([row])])
    same(long, expected)
    assert short.keys[0] != long.keys[0]


@pytest.mark.parametrize("name", sources.MODELS)
def test_one_layer_at_a_time_and_each_read_once(tmp_path, name, monkeypatch):
    reference = opened(name, sources.write(name, tmp_path))
    model = reference.model
    reads, real = [], set()
    fill = type(reference.parameters).fill

    def watched(self, names):
        reads.extend(names)
        fill(self, names)

    monkeypatch.setattr(type(reference.parameters), "fill", watched)

    def look(*_):
        real.add(
            tuple(
                index
                for index, layer in enumerate(model.model.layers)
                if any(not parameter.is_meta for parameter in layer.parameters())
            )
        )

    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(look)
    steps = []
    collect(reference, rows(), device=CPU, progress=lambda more, all_: steps.append((more, all_)))
    assert real == {(0,), (1,), (2,)}
    used = ("model.layers", "model.embed")
    if not model.config.tie_word_embeddings:  # else lm_head needs no maxima, nor its input
        used += ("model.norm", "model.final_layernorm")
    assert sorted(reads) == sorted(n for n, _ in model.named_parameters() if n.startswith(used))
    assert all(parameter.is_meta for parameter in model.parameters())
    total = 3 * sum(LENGTHS)
    assert sum(more for more, _ in steps) == total
    assert {all_ for _, all_ in steps} == {total}


def test_the_cost_grows_with_tokens_and_layers(tmp_path):
    reference = opened("phi2", sources.write("phi2", tmp_path))
    cost = measure(reference, rows((64,) * 3), device=CPU, batch_size=1)
    assert cost.token > 0
    assert cost.of(20) - cost.of(10) == pytest.approx(10 * cost.token)
    assert cost.of(0) == cost.reading > 0
    assert all(parameter.is_meta for parameter in reference.model.parameters())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_is_named(tmp_path, bad):
    model = sources.phi3_gqa()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[5] = bad
    model.save_pretrained(tmp_path, safe_serialization=True)
    with pytest.raises(SourceError, match=r"model\.layers\.1\.self_attn\.qkv_proj .*channel 5"):
        collect(opened("phi3-gqa", tmp_path), rows(), device=CPU)
    model = sources.phi2()
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.bias[0] = bad
    model.save_pretrained(tmp_path / "2", safe_serialization=True)
    with pytest.raises(SourceError, match=r"model\.layers\.2\.self_attn\.dense"):
        collect(opened("phi2", tmp_path / "2"), rows(), device=CPU)


def test_a_linear_that_no_token_reaches_is_named(tmp_path):
    reference = opened("phi2", sources.write("phi2", tmp_path))
    reference.model.model.layers[1].mlp.spare = nn.Linear(2, 2)
    with pytest.raises(SourceError, match=r"no token went through model\.layers\.1\.mlp\.spare"):
        collect(reference, rows(), device=CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", sources.MODELS)
def test_on_a_gpu(tmp_path, name):
    """The same maxima as on the CPU, but for the order of sums; on the GPU as the whole model's."""
    device = torch.device("cuda")
    directory = sources.write(name, tmp_path)
    reference = opened(name, directory, device=device)
    statistics = collect(reference, rows(), device=device)
    assert statistics.provenance == {"batch_size": 2}
    on_cpu = [torch.tensor([row]) for row in rows()]
    same(statistics, by_hand(from_pretrained(name, directory), on_cpu), rtol=2e-3)
    on_gpu = [ids.to(device) for ids in on_cpu]
    same(statistics, by_hand(from_pretrained(name, directory).to(device), on_gpu), rtol=2e-3)


@pytest.mark.slow
@pytest.mark.skipif(sources.FOUR, reason="nvidia-modelopt needs a newer transformers")
@pytest.mark.filterwarnings("ignore")
def test_modelopt_has_the_same_maxima(tmp_path):
    """Of a class that it cannot export; test_modelopt.py compares exports of the others."""
    mtq = pytest.importorskip("modelopt.torch.quantization", reason="nvidia-modelopt is missing")
    directory = sources.write("phi3-small", tmp_path)
    statistics = collect(opened("phi3-small", directory), rows(), device=CPU)

    def quantized(config):
        def run(model):
            for row in rows():
                model(torch.tensor([row]))

        return mtq.quantize(from_pretrained("phi3-small", directory), getattr(mtq, config), run)

    model = quantized("FP8_DEFAULT_CFG")
    theirs = {
        module_name: float(module.input_quantizer.amax)
        for module_name, module in model.named_modules()
        if getattr(module, "input_quantizer", None) is not None and "layers." in module_name
        and isinstance(module, nn.Linear)
    }  # fmt: skip
    assert theirs == {name: float(amax.max()) for name, amax in statistics.inputs.items()}
    # With its alpha of 1 the smoothing vector is one over the channel maxima.
    model = quantized("INT8_SMOOTHQUANT_CFG")
    for module_name, amax in statistics.inputs.items():
        theirs = model.get_submodule(module_name).input_quantizer.pre_quant_scale
        ours = (1 / torch.from_numpy(amax)).clamp(1e-4, 1e4)
        assert torch.equal(theirs.flatten(), ours), module_name
