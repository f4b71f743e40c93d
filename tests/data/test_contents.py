"""Files as users have them: token ids of TensorRT-LLM's run.py, chats, instructions, books.

What a conversation becomes is compared with transformers' own apply_chat_template.
"""

import io
import json
import pickle
import time

import numpy as np
import pyarrow
import pytest
from helpers.command_line import run_phireg
from helpers.tiny_models import phi3
from helpers.tokenized_models import chat_tokenizer, converted, save
from pyarrow import parquet

from phireg.calibration.calibrate import encoder
from phireg.data.formats import read_rows
from phireg.data.row import Row
from phireg.data.samples import read_samples
from phireg.errors import UsageError
from phireg.generation.prompts import encode_prompts, read_prompts
from phireg.generation.tokenizer import Tokenizer

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
TOLD = [*ASKED, {"role": "assistant", "content": "Hello"}]
PAIR = [{"role": "user", "content": "Add"}, {"role": "assistant", "content": "3"}]
SHARED = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Hello"},
]
# The row, and the conversation that it is.
CHATS = [
    ({"messages": TOLD, "prompt": "Hi", "source": "x"}, TOLD),
    ({"conversations": SHARED, "id": 7}, TOLD),
    ({"instruction": "Add", "input": "", "output": "3"}, PAIR),
    (
        {"instruction": "Add", "input": "1 2", "output": "3", "text": None},
        [{"role": "user", "content": "Add\n\n1 2"}, PAIR[1]],
    ),
    ({"prompt": "Add", "completion": "3"}, PAIR),
    ({"prompt": "Add", "response": "3"}, PAIR),
    ({"prompt": ASKED, "completion": TOLD[2:]}, TOLD),
]


@pytest.fixture(scope="module")
def tokenizer():
    inner = chat_tokenizer()
    inner.backend_tokenizer.post_processor = None
    return inner


@pytest.fixture(scope="module")
def places(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("model")
    model = phi3(vocab_size=len(tokenizer) + 7, num_key_value_heads=4)
    return save(model, root / "source", tokenizer), converted(root / "source", root / "ckpt")


def template(inner, messages, **options):
    text = inner.apply_chat_template(messages, tokenize=False, **options)
    return inner(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("row", "conversation"), CHATS, ids=str)
def test_chats_are_calibrated_on_whole_and_answered_from_the_last_question(
    row, conversation, tokenizer, places, tmp_path
):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    samples = read_samples(
        str(path), encoder(places[0]), size=None, max_length=500, vocab_size=1000
    )
    assert list(samples.rows[0]) == template(tokenizer, conversation)
    (prompt,) = encode_prompts(
        read_prompts(str(path), path.read_bytes()), Tokenizer(tokenizer), 500
    )
    assert list(prompt.ids) == template(tokenizer, conversation[:-1], add_generation_prompt=True)
    assert prompt.text.endswith("<|assistant|>\n")


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"text": None}, "'text' is null"),
        ({"prompt": None, "other": 1}, "'prompt' is null"),
        ({"input_ids": None}, "'input_ids' is null"),
        ({"prompt": "a", "completion": None}, "'completion' is null"),
        ({"instruction": "a", "output": None}, "'output' is null"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1 of 'messages' is null"),
        ({"messages": [*ASKED, {"role": None, "content": "x"}]}, "message 3 of 'messages' is null"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "not text"),
        ({"messages": "Hi"}, "'messages'"),
        ({"messages": []}, "'messages'"),
        ({"conversations": [3]}, "message 1 of 'conversations'"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "Unicode"),
        ({"question": "why"}, "no 'text'"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_row_is_named(row, named):
    with pytest.raises(UsageError, match=r"^here:3: ") as caught:
        Row("here:3", row).content()
    assert named in caught.value.message


def test_a_model_without_chat_and_a_chat_without_question(tokenizer):
    rows = "\n".join(json.dumps({"prompt": "Add", "completion": "3"}) for _ in range(2)).encode()
    phi2 = Tokenizer(chat_tokenizer(special=("<|endoftext|>",), template=None))
    with pytest.raises(UsageError, match="no chat template"):
        encode_prompts(read_prompts("a.jsonl", rows), phi2, 50)
    alone = json.dumps({"messages": TOLD[2:]}).encode()
    with pytest.raises(UsageError, match=r"^a\.jsonl:1: "):
        encode_prompts(read_prompts("a.jsonl", alone), Tokenizer(tokenizer), 50)


def test_the_chat_that_the_template_refuses_is_named():
    refusing = Tokenizer(
        chat_tokenizer(
            template="{% if messages|length > 1 %}{{ raise_exception('one') }}{% endif %}"
        )
    )
    chats = [[{"role": "user", "content": "a"}]] * 20
    assert len(refusing.chat_texts(chats, [f"row {n}" for n in range(20)])) == 20
    chats[17] = TOLD
    with pytest.raises(UsageError, match=r"^row 17: .*one"):
        refusing.chat_texts(chats, [f"row {n}" for n in range(20)])


# Token ids, as TensorRT-LLM's run.py reads them


def test_ids_of_csv_and_npy(tokenizer, places, tmp_path):
    """Rows of a .npy file are padded with the tokenizer's own token, here 300."""
    ids = [[5, 6, 7], [9, 8], [1]]
    (tmp_path / "a.csv").write_text("5,6,7\n9, 8\n\n1\n")
    for name, padded in (
        ("left.npy", [[5, 6, 7], [300, 9, 8], [300, 300, 1]]),
        ("right.npy", [[5, 6, 7], [9, 8, 300], [1, 300, 300]]),
    ):
        np.save(tmp_path / name, np.array(padded, dtype=np.int32))
    for name in ("a.csv", "left.npy", "right.npy"):
        path = tmp_path / name
        prompts = encode_prompts(
            read_prompts(str(path), path.read_bytes()), Tokenizer(tokenizer), 50
        )
        assert [list(prompt.ids) for prompt in prompts] == ids
        samples = read_samples(
            str(path), encoder(places[0]), size=None, max_length=2, vocab_size=1000
        )
        assert [list(row) for row in samples.rows] == [row[:2] for row in ids]
    result = run_phireg(
        "run", places[1], "--input_file", tmp_path / "left.npy", "--max-new-tokens", 2,
        "--json", "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert [one["input_ids"] for one in json.loads(result.stdout)["results"]] == ids
    np.save(tmp_path / "one.npy", np.arange(4))
    assert read_rows(tmp_path / "one.npy")[0].content() == (0, 1, 2, 3)


def test_padding_needs_a_tokenizer(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((2, 3), dtype=np.int64))
    prompts = read_prompts("a.npy", (tmp_path / "a.npy").read_bytes())
    with pytest.raises(UsageError, match="padding"):
        encode_prompts(prompts, None, 50)


def saved(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


class Trap:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        saved(np.ones((2, 2))),
        saved(np.ones((1, 1, 1), dtype=int)),
        saved(np.array(["a"])),
        saved(np.array([Trap()], dtype=object)),
        pickle.dumps(Trap()),
        saved(np.ones((4, 4), dtype=int))[:-8],
        saved(np.ones((4, 4), dtype=int)).replace(b"(4, 4)", b"(9, 9)"),
        b"PK\x03\x04",
    ],
)
def test_other_arrays_are_refused_and_nothing_in_them_runs(content, tmp_path, capsys):
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=str(path)):
        read_rows(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "line"), [("1,2\n3,x\n", 2), ("1,2\n3,\n", 2), ("1,2\n-3\n", 2), ("1\n2.0\n", 2)]
)
def test_what_is_no_id_in_a_csv_is_named(content, line, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(UsageError, match=f":{line}: "):
        [row.content() for row in read_rows(path)]


def test_prompts_of_every_kind_of_file(tmp_path):
    """A file with columns is not read as lines of text."""
    rows = [{"prompt": "one"}, {"prompt": "two"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("id,prompt\n1,one\n2,two\n")
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "prompts").write_text("one\ntwo\n")
    for path in tmp_path.iterdir():
        prompts = read_prompts(str(path), path.read_bytes())
        assert [prompt.text for prompt in prompts] == ["one", "two"], path


@pytest.mark.parametrize("name", ["a", "a.txt", "a.json", "a.jsonl"])
def test_deep_brackets_are_no_defect(name, places):
    content = b'{"prompt": ' + b"[" * 100_000
    if name in ("a", "a.txt"):  # a line is a prompt
        assert len(read_prompts(name, content)) == 1
    else:
        with pytest.raises(UsageError, match=rf"^{name}:1: "):
            read_prompts(name, content)


# As many rows, and as much of each, as is needed


def test_what_is_behind_the_last_row_that_is_taken_does_not_matter(tmp_path):
    good = json.dumps({"input_ids": [1, 2]})
    for name, content in (
        ("a.jsonl", f"{good}\n{good}\nnot JSON\n".encode()),
        ("b.jsonl", f"{good}\n{good}\n".encode() + b'{"text": "\xff"}'),
        ("c.csv", b"1,2\n1,2\n\xff\n"),
    ):
        (tmp_path / name).write_bytes(content)
        assert len(read_rows(tmp_path / name, 2)) == 2
        with pytest.raises(UsageError, match=f"{name}:3: "):
            read_rows(tmp_path / name)


def test_a_bad_row_behind_those_calibrated_on(places, tmp_path):
    """The measurement that nobody asked for does not fail the checkpoint."""
    rows = [json.dumps({"input_ids": [n, 5, 6, 7]}) for n in range(20)]
    rows[10] = '{"input_ids": "no"}'
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(rows))
    common = (
        "quantize", "--model-dir", places[0], "--qformat", "fp8", "--calib-file", file,
        "--calib-size", 8, "--device", "cpu", "--json",
    )  # fmt: skip
    result = run_phireg(*common, "--output-dir", tmp_path / "unasked")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["quality"] is None and "rows.jsonl:11" in document["unmeasured"]
    result = run_phireg(*common, "--output-dir", tmp_path / "asked", "--measure")
    assert result.exit_code == 2 and "is complete" in result.stderr
    assert (tmp_path / "asked" / "rank0.safetensors").exists()


def test_a_book_in_one_row(places, tmp_path):
    book = "The engine reads the checkpoint, and then some more of it. " * 300_000  # 18 MB
    file = tmp_path / "book.jsonl"
    file.write_text(json.dumps({"text": book}))
    started = time.process_time()
    samples = read_samples(
        str(file), encoder(places[0]), size=None, max_length=512, vocab_size=1000
    )
    short = chat_tokenizer()(book[:20_000])["input_ids"]
    assert list(samples.rows[0]) == short[:512]
    result = run_phireg("run", places[1], "--input-file", file, "--device", "cpu")
    assert result.exit_code == 2 and "257 tokens or more" in result.stderr
    assert time.process_time() - started < 10
