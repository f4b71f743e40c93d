"""Long rope beside other rows and across its switch, against transformers' own generate, alone."""

import json
import warnings

import pytest
import torch
import transformers
from helpers.tiny_models import phi3, phi3_small
from helpers.tokenized_models import continuation, converted

import phireg
from phireg.errors import PhiregWarning
from phireg.generation.backend import Description, LongRope, describe
from phireg.generation.batches import batches

SWITCH = 32
LENGTHS = (20, 58, 3, 4, 41, 33)


class NoTokenizer:
    eos_token_id = 0

    def decode(self, ids, **options):
        return ""


@pytest.fixture(scope="module", params=[phi3, phi3_small])
def places(request, tmp_path_factory):
    model = request.param(long=SWITCH)
    source = tmp_path_factory.mktemp("long") / "source"
    model.save_pretrained(source)
    return model, {"hf": source, "executor": converted(source, source.parent / "ckpt")}


def random_ids(length):
    return torch.randint(1, 90, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def alone(model, prompt, count):
    return continuation(model, NoTokenizer(), torch.tensor([prompt]), count)[0]


@pytest.mark.parametrize("backend", ["executor", "hf"])
def test_each_row_continues_as_it_does_alone(backend, places):
    model, directories = places
    assert describe(backend, directories[backend]).long_rope.switch == SWITCH
    prompts = [random_ids(n) for n in LENGTHS]
    expected = [alone(model, prompt, 8) for prompt in prompts]
    with warnings.catch_warnings():
        warnings.simplefilter("error", PhiregWarning)
        done = phireg.generate(directories[backend], prompts, backend=backend, max_new_tokens=8)
    assert [list(completion.tokens) for completion in done] == expected


@pytest.mark.parametrize("backend", ["executor", "hf"])
def test_a_text_that_passes_the_switch_is_told_of(backend, places):
    model, directories = places
    prompts = [random_ids(n) for n in (28, 3)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = phireg.generate(directories[backend], prompts, backend=backend, max_new_tokens=9)
    assert [str(w.message).count("passes 32 tokens") for w in caught] == [1]
    expected = [alone(model, prompt, 9) for prompt in prompts]
    tokens = [list(completion.tokens) for completion in done]
    assert tokens[1] == expected[1]
    if backend == "hf":
        assert tokens == expected and done[0].batch != done[1].batch
    else:  # computed up to the switch alike
        assert tokens[0][:5] == expected[0][:5] and done[0].batch == done[1].batch


def test_a_source_model_has_the_limits_of_its_class_where_its_config_is_silent(tmp_path):
    config = phi3(long=SWITCH).config.to_dict()
    block = config["rope_parameters"] | {"original_max_position_embeddings": 16}
    del config["original_max_position_embeddings"], config["max_position_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_parameters": block}))
    expected = transformers.Phi3Config()
    limits = describe("hf", tmp_path)
    assert limits.long_rope.switch == expected.original_max_position_embeddings
    assert limits.positions == expected.max_position_embeddings


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], []),
        ([5, 5, 5, 5, 5], [3, 2]),
        ([5, 40, 40, 5], [1, 2, 1]),
        ([24, 24, 25, 32, 33], [2, 1, 1, 1]),  # 25 + 9 - 1 tokens are computed
        ([26, 26], [1, 1]),
    ],
)
def test_batches(lengths, expected):
    full = [len(lengths[n : n + 3]) for n in range(0, len(lengths), 3)]
    for by_row, sizes in ((False, expected), (True, full)):
        model = Description(90, 128, long_rope=LongRope(SWITCH, by_row, ""))
        parts = list(batches(model, lengths, 3, 9))
        assert [part.stop - part.start for part in parts] == sizes
        assert [n for part in parts for n in range(len(lengths))[part]] == list(range(len(lengths)))
