"""Loading the source's model from its files, against transformers' own from_pretrained."""

from contextlib import nullcontext

import pytest
import torch
from helpers import tiny_models as sources
from helpers.tiny_models import from_pretrained, opened

from phireg.errors import SourceError

CPU = torch.device("cpu")
LENGTHS = (5, 20, 21, 33)


class Silent:
    """An observer that does nothing."""

    def layer(self, *_):
        pass

    embedded = hidden = normed = layer


def real_layers(model):
    """Layers of which a parameter is in memory."""
    return [
        index
        for index, layer in enumerate(model.model.layers)
        if not all(parameter.is_meta for parameter in layer.parameters())
    ]


def ids(vocab_size, tokens):
    return torch.randint(vocab_size, (1, tokens), generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("keep", ["keep_all", "keep_ends"])
@pytest.mark.parametrize(
    ("stored", "computed"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", sources.MODELS)
@torch.no_grad()
def test_the_same_bits_as_from_pretrained(tmp_path, name, stored, computed, keep):
    directory = sources.write(name, tmp_path, stored, shard="60KB")
    reference = opened(name, directory, computed)
    getattr(reference, keep)()
    original = from_pretrained(name, directory, computed)
    if keep == "keep_all":
        ours, theirs = reference.model.state_dict(), original.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(ours[name].dtype == theirs[name].dtype for name in theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = dict(reference.model.named_buffers()), dict(original.named_buffers())
    assert ours.keys() == theirs.keys()
    for buffer, values in theirs.items():
        assert ours[buffer].dtype == values.dtype, buffer
        assert torch.equal(ours[buffer], values), buffer
    for tokens in LENGTHS:
        prompt = ids(original.config.vocab_size, tokens)
        logits = reference.logits(prompt, Silent())
        assert torch.equal(logits, original(prompt, use_cache=False).logits.float()), tokens


@torch.no_grad()
def test_values_are_rounded_first(tmp_path):
    directory = sources.write("phi2", tmp_path)
    reference = opened("phi2", directory, torch.float32, weights=torch.bfloat16)
    reference.keep_all()
    original = from_pretrained("phi2", directory, torch.bfloat16).float()
    ours = reference.model.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in original.state_dict().items())


@pytest.mark.parametrize("name", sources.MODELS)
def test_one_layer_in_memory_at_a_time(tmp_path, name):
    reference = opened(name, sources.write(name, tmp_path))
    model = reference.model
    assert all(parameter.is_meta for parameter in model.parameters())
    for index in range(3):
        with reference.layer(index) as layer:
            assert layer is model.model.layers[index]
            assert real_layers(model) == [index]
            assert not any(parameter.is_meta for parameter in layer.parameters())
        assert real_layers(model) == []
    reference.keep_ends()
    outside = [p for n, p in model.named_parameters() if not n.startswith("model.layers.")]
    assert not any(parameter.is_meta for parameter in outside)
    seen = []

    class Watcher(Silent):
        def layer(self, index, before, attention, mlp):
            seen.append((index, real_layers(model)))

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: seen.append(real_layers(model)))
    reference.logits(ids(50, 9), Watcher())
    assert seen == [[0], (0, []), [1], (1, []), [2], (2, [])]
    assert real_layers(model) == []


@pytest.mark.parametrize("name", ["phi3-tied", "phi3-small"])
def test_a_tied_head_takes_no_memory_of_its_own(tmp_path, name):
    reference = opened(name, sources.write(name, tmp_path))
    reference.keep_all()
    head, embedding = reference.model.lm_head.weight, reference.model.model.embed_tokens.weight
    assert head.data_ptr() == embedding.data_ptr()
    held = {p.data_ptr(): p.numel() * 4 for p in reference.model.parameters()}
    assert reference.nbytes == sum(held.values())
    layer = sum(p.numel() * 4 for p in reference.model.model.layers[0].parameters())
    assert reference.streamed_nbytes == reference.nbytes - 2 * layer


def test_pytorch_files(tmp_path):
    model = sources.phi2()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    reference = opened("phi2", tmp_path)
    reference.keep_all()
    ours = reference.model.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in model.state_dict().items())


def test_what_the_files_lack(tmp_path):
    directory = sources.write("phi3-gqa", tmp_path)
    sources.edit_config(directory, num_hidden_layers=4)
    with pytest.raises(SourceError, match=r"model\.layers\.3\."):
        opened("phi3-gqa", directory)
    sources.edit_config(directory, num_hidden_layers=3, vocab_size=99)
    with pytest.raises(SourceError, match=r"embed_tokens.weight.*\[103, 96\].*\[99, 96\]"):
        opened("phi3-gqa", directory)
    sources.edit_config(directory, vocab_size=103, hidden_act="no such function")
    with pytest.raises(SourceError):
        opened("phi3-gqa", directory)


def test_other_models_are_built_as_ever(tmp_path):
    """Building a reference leaves nothing behind in torch."""
    opened("phi2", sources.write("phi2", tmp_path))
    assert not torch.nn.Linear(2, 2).weight.is_meta


class Stream:
    """In the place of a GPU's."""

    def __init__(self, device):
        self.device = device

    def synchronize(self):
        pass


def test_a_layer_that_was_read_ahead_is_the_same(tmp_path, monkeypatch):
    """In another thread; what a layer other than the next needs is read anew."""
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    directory = sources.write("phi3-tied", tmp_path)
    reference, parameters = opened("phi3-tied", directory), from_pretrained("phi3-tied", directory)
    for index, ahead in ((0, True), (1, True), (0, False), (1, True), (2, True)):
        with reference.layer(index, ahead=ahead) as layer:
            expected = parameters.model.layers[index].state_dict()
            assert all(torch.equal(x, expected[name]) for name, x in layer.state_dict().items())
        assert real_layers(reference.model) == []
