"""Rows put right, byte for byte against arrays moved by hand; once; for every kind and TP size."""

import json
import stat

import numpy as np
import pytest
from grouped_by_hand import (
    EARLY,
    HIDDEN,
    KINDS,
    LATE,
    SIZE,
    block_rows,
    checkpoint,
    content,
    load,
    parts_rows,
    rank_rows,
    right_rows,
    same,
    save,
    source_tensors,
    write_checkpoint,
    write_source,
)

import phireg
from phireg.errors import CheckError, OutputError, SourceError, UsageError
from phireg.postprocessing.orders import TEXTS, TWICE

TENSORS = source_tensors()


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "model", TENSORS)


def grouped(tmp_path, kind="int8", rows_of=block_rows, tp=1, **keys):
    ranks = checkpoint(kind, TENSORS, rows_of, tp)
    return write_checkpoint(tmp_path / "ckpt", kind, ranks, **keys)


def right(kind="int8", tp=1):
    return checkpoint(kind, TENSORS, rank_rows, tp)


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_by_its_producer(tmp_path, kind):
    directory = grouped(tmp_path, kind, **EARLY)
    before = content(directory)
    assert phireg.row_order(directory).needed
    assert content(directory) == before
    result = phireg.postprocess(directory)
    same(directory, right(kind))
    after = content(directory)
    assert set(after) == set(before) | {"phireg.json"} == set(result.files)
    for name in ("config.json", "tokenizer.json", "notes.txt"):
        assert after[name] == before[name]
    # Header, its metadata and the place of every tensor stay as they were.
    assert len(after["rank0.safetensors"]) == len(before["rank0.safetensors"])
    assert result.tensors == (6 if kind == "int8" else 4)
    assert not list(tmp_path.glob("*.phireg-partial"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("rows_of", [block_rows, parts_rows])
def test_ranks_by_their_rows(tmp_path, source, kind, tp, rows_of):
    directory = grouped(tmp_path, kind, rows_of, tp)
    if tp == 4 and rows_of is block_rows:  # one group for each rank, which is right as it is
        same(directory, right(kind, tp))
        assert not phireg.row_order(directory, model_dir=str(source)).needed
        return
    result = phireg.postprocess(directory, model_dir=str(source))
    same(directory, right(kind, tp))
    assert result.rows.needed
    assert str(source) in result.rows.evidence[0]
    assert not phireg.row_order(directory, model_dir=str(source)).needed


@pytest.mark.parametrize("kind", KINDS)
def test_right_rows_are_refused(tmp_path, source, kind):
    directory = write_checkpoint(tmp_path / "ckpt", kind, right(kind, 2))
    assert not phireg.row_order(directory, model_dir=str(source)).needed
    before = content(directory)
    with pytest.raises(UsageError):
        phireg.postprocess(directory, model_dir=str(source))
    assert content(directory) == before


def test_twice_is_refused(tmp_path, source):
    directory = grouped(tmp_path, **EARLY)
    phireg.postprocess(directory)
    before = content(directory)
    for options in ({}, {"model_dir": str(source)}, {"in_source_order": True}):
        with pytest.raises(UsageError):
            phireg.postprocess(directory, **options)
        assert content(directory) == before
    manifest = json.loads(before["phireg.json"])
    assert manifest["postprocess"]["tensors"] == sorted(
        f"transformer.layers.{i}.attention.qkv.{name}"
        for i in (0, 1)
        for name in ("weight", "bias", "weights_scaling_factor")
    )
    assert phireg.inspect(directory, check=True).manifest == manifest
    rows = phireg.row_order(directory)
    assert not rows.needed
    assert "phireg.json" in rows.evidence[0]


def test_one_query_head_for_each_kv_head(tmp_path):
    tensors = source_tensors(kv=8)
    source = write_source(tmp_path / "model", tensors, kv=8)
    for name, options in (("a", {"model_dir": str(source)}), ("b", {"in_source_order": True})):
        ranks = checkpoint("fp8", tensors, block_rows, kv=8)
        directory = write_checkpoint(tmp_path / name, "fp8", ranks, kv=8)
        phireg.postprocess(directory, **options)
        same(directory, checkpoint("fp8", tensors, rank_rows, kv=8))


def test_one_kv_head_has_one_order_only(tmp_path):
    tensors = source_tensors(kv=1)
    ranks = checkpoint("fp8", tensors, block_rows, kv=1)
    directory = write_checkpoint(tmp_path / "ckpt", "fp8", ranks, kv=1, **EARLY)
    assert np.array_equal(right_rows(1), np.arange(len(right_rows(1))))
    assert not phireg.row_order(directory).needed


def test_the_pre_quant_scale_stays(tmp_path):
    """Arithmetic on sizes would move it here."""
    directory = grouped(tmp_path, **EARLY)
    name = "transformer.layers.1.attention.qkv.prequant_scaling_factor"
    before = load(directory / "rank0.safetensors")[name][1]
    assert before.shape == (HIDDEN,)
    assert HIDDEN % (8 + 2 * 4) == 0
    phireg.postprocess(directory)
    assert np.array_equal(load(directory / "rank0.safetensors")[name][1], before)


# --- the output -----------------------------------------------------------------------------


def test_a_new_directory(tmp_path):
    directory = grouped(tmp_path, **EARLY)
    (directory / "sub").mkdir()
    before = {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}
    out = tmp_path / "out"
    phireg.postprocess(directory, out)
    same(out, right())
    assert set(content(out)) == set(before) | {"phireg.json"}
    assert {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()} == before
    with pytest.raises(OutputError, match="out"):
        phireg.postprocess(directory, out)
    (out / "notes.txt").unlink()
    phireg.postprocess(directory, out, overwrite=True)
    same(out, right())


def test_output_dir_must_be_another_one(tmp_path):
    directory = grouped(tmp_path, **EARLY)
    with pytest.raises(UsageError, match="--output-dir"):
        phireg.postprocess(directory, tmp_path / "." / "ckpt" / ".." / "ckpt")


def test_what_would_get_lost_is_refused(tmp_path):
    directory = grouped(tmp_path, **EARLY)
    (directory / "sub").mkdir()
    with pytest.raises(OutputError, match="sub"):
        phireg.postprocess(directory)
    (directory / "sub").rmdir()
    moved = tmp_path / "elsewhere"
    (directory / "rank0.safetensors").rename(moved)
    (directory / "rank0.safetensors").symlink_to(moved)
    with pytest.raises(OutputError, match=r"rank0.safetensors"):
        phireg.postprocess(directory)
    phireg.postprocess(directory, tmp_path / "out")
    same(tmp_path / "out", right())


def test_modes_and_links_stay(tmp_path):
    directory = grouped(tmp_path, **EARLY)
    directory.chmod(0o700)
    (directory / "rank0.safetensors").chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to(directory)
    phireg.postprocess(link)
    assert link.is_symlink()
    same(directory, right())
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / "rank0.safetensors").stat().st_mode) == 0o600


# --- evidence --------------------------------------------------------------------------------


def test_nothing_tells(tmp_path):
    directory = grouped(tmp_path)
    before = content(directory)
    for call in (phireg.row_order, phireg.postprocess):
        with pytest.raises(UsageError) as caught:
            call(directory)
        assert "--model-dir" in caught.value.hint
        assert "--in-source-order" in caught.value.hint
    assert content(directory) == before
    phireg.postprocess(directory, in_source_order=True)
    same(directory, right())


@pytest.mark.parametrize(
    ("keys", "needed"),
    [
        (EARLY, True),
        ({"producer": {"name": "modelopt", "version": "0.12.1.dev3"}}, True),
        (LATE, False),
        ({"producer": {"name": "modelopt", "version": "1.0"}}, False),
        ({**LATE, "decoder": "phi"}, None),
        ({**EARLY, "decoder": "phi3small"}, None),
        ({"producer": {"name": "modelopt", "version": "new"}}, None),
        ({"producer": {"name": "other", "version": "0.11.2"}}, None),
        ({"producer": "modelopt"}, None),
    ],
)
def test_the_producer(tmp_path, keys, needed):
    directory = grouped(tmp_path, "fp8", **keys)
    if needed is None:
        with pytest.raises(UsageError):
            phireg.row_order(directory)
    else:
        assert phireg.row_order(directory).needed is needed


def test_rows_count_more_than_the_producer(tmp_path, source):
    """postprocess_quant_checkpoint.py leaves config.json as it is."""
    done = write_checkpoint(tmp_path / "done", "int8", right(), **EARLY)
    rows = phireg.row_order(done, model_dir=str(source))
    assert not rows.needed
    assert len(rows.evidence) == 2
    assert "modelopt 0.11.2" in rows.evidence[1]
    late = grouped(tmp_path, **LATE)
    assert phireg.row_order(late, model_dir=str(source)).needed
    assert not phireg.row_order(late).needed


def test_a_statement_against_the_evidence(tmp_path, source):
    directory = write_checkpoint(tmp_path / "right", "fp8", right("fp8"), **LATE)
    for options in ({}, {"model_dir": str(source)}):
        with pytest.raises(UsageError, match="--in-source-order"):
            phireg.postprocess(directory, in_source_order=True, **options)


def test_a_converted_checkpoint_needs_nothing(tmp_path, source):
    directory = tmp_path / "ckpt"
    phireg.convert(phireg.plan(source), directory)
    rows = phireg.row_order(directory)
    assert not rows.needed
    assert "phireg.json" in rows.evidence[0]
    with pytest.raises(UsageError):
        phireg.postprocess(directory)


def test_the_manifest_of_other_files(tmp_path, source):
    """Rank files of an exporter put beside the manifest of a conversion."""
    directory = tmp_path / "ckpt"
    phireg.convert(phireg.plan(source), directory)
    save(directory / "rank0.safetensors", checkpoint("float16", TENSORS, block_rows)[0])
    for options in ({}, {"model_dir": str(source)}):
        with pytest.raises(CheckError, match=r"transformer.layers.0.attention.qkv"):
            phireg.row_order(directory, **options)
    (directory / "phireg.json").unlink()
    assert phireg.row_order(directory, model_dir=str(source)).needed


def test_the_manifest_against_rows_of_another_model(tmp_path, source):
    directory = tmp_path / "ckpt"
    phireg.convert(phireg.plan(source), directory)
    other = [(w[right_rows()], b[right_rows()]) for w, b in TENSORS]
    model = write_source(tmp_path / "shuffled", other)
    # The rows are this model's own, so the checkpoint would be in its source's order.
    with pytest.raises(CheckError, match=r"phireg\.json"):
        phireg.row_order(directory, model_dir=str(model))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_another_model(tmp_path, kind):
    other = write_source(tmp_path / "model", source_tensors(seed=1))
    directory = grouped(tmp_path, kind)
    with pytest.raises(CheckError, match="qkv"):
        phireg.row_order(directory, model_dir=str(other))


@pytest.mark.parametrize("kind", KINDS)
def test_done_twice_by_the_original_script(tmp_path, source, kind):
    ranks = checkpoint(kind, TENSORS, lambda *_: right_rows()[right_rows()])
    directory = write_checkpoint(tmp_path / "ckpt", kind, ranks)
    with pytest.raises(CheckError) as caught:
        phireg.row_order(directory, model_dir=str(source))
    assert TEXTS[TWICE] in caught.value.message


@pytest.mark.parametrize("part", ["bias", "layer", "weights_scaling_factor"])
def test_half_of_it_done(tmp_path, source, part):
    ranks, done = checkpoint("int8", TENSORS, block_rows), right()
    for name in ranks[0]:
        if (".0." in name) if part == "layer" else name.endswith(f"qkv.{part}"):
            ranks[0][name] = done[0][name]
    directory = write_checkpoint(tmp_path / "ckpt", "int8", ranks)
    with pytest.raises(CheckError, match="qkv"):
        phireg.row_order(directory, model_dir=str(source))


def test_rows_that_are_alike_tell_nothing(tmp_path):
    tensors = [(np.ones_like(w), np.zeros_like(b)) for w, b in TENSORS]
    source = write_source(tmp_path / "model", tensors)
    ranks = checkpoint("float16", tensors, block_rows)
    directory = write_checkpoint(tmp_path / "ckpt", "float16", ranks)
    with pytest.raises(UsageError):
        phireg.row_order(directory, model_dir=str(source))


def test_a_few_coarse_rows_do_not_matter(tmp_path):
    """Rows far below the largest are mostly rounding error in FP8."""
    tensors = [(w.copy(), b) for w, b in TENSORS]
    for weight, _ in tensors:
        weight[5:20] *= np.float16(1e-5)
        weight[50:60] = 0
    source = write_source(tmp_path / "model", tensors)
    ranks = checkpoint("fp8", tensors, block_rows)
    directory = write_checkpoint(tmp_path / "ckpt", "fp8", ranks)
    phireg.postprocess(directory, model_dir=str(source))
    same(directory, checkpoint("fp8", tensors, rank_rows))


# --- ranks that cannot be repaired -----------------------------------------------------------


@pytest.mark.parametrize("options", [EARLY, {}])
def test_ranks_need_the_model(tmp_path, options):
    directory = grouped(tmp_path, "fp8", tp=2, **options)
    with pytest.raises(UsageError) as caught:
        phireg.postprocess(directory, in_source_order=not options)
    assert "--model-dir" in caught.value.hint


def test_one_file_for_two_ranks(tmp_path):
    """modelopt 0.11 wrote this for decoder phi with TP 2."""
    directory = grouped(tmp_path, mapping={"world_size": 2, "tp_size": 2}, **EARLY)
    with pytest.raises(SourceError, match=r"rank1.safetensors") as caught:
        phireg.postprocess(directory)
    assert "TP 1" in caught.value.hint


def test_a_cut_through_groups(tmp_path):
    """Three KV heads over two ranks: no rank file could hold the rows that the reader wants."""
    global_heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": HIDDEN}
    directory = grouped(tmp_path, "fp8", tp=2, head_size=SIZE, **global_heads)
    with pytest.raises(CheckError, match="2 rank"):
        phireg.postprocess(directory, in_source_order=True)


def test_scales_that_differ_between_ranks(tmp_path, source):
    ranks = checkpoint("fp8", TENSORS, parts_rows, 2)
    name = "transformer.layers.1.attention.qkv.activation_scaling_factor"
    ranks[1][name] = ("F32", ranks[1][name][1] * 2)
    directory = write_checkpoint(tmp_path / "ckpt", "fp8", ranks)
    with pytest.raises(CheckError, match=name):
        phireg.postprocess(directory, model_dir=str(source))
    ranks = checkpoint("fp8", TENSORS, block_rows, 2)  # here no row leaves its rank
    ranks[1][name] = ("F32", ranks[1][name][1] * 2)
    directory = write_checkpoint(tmp_path / "block", "fp8", ranks)
    phireg.postprocess(directory, model_dir=str(source))


# --- damaged input ---------------------------------------------------------------------------


def test_other_families(tmp_path, source):
    directory = grouped(tmp_path, "fp8", architecture="PhiForCausalLM")
    assert not phireg.row_order(directory).needed
    with pytest.raises(UsageError, match="phi2"):
        phireg.postprocess(directory)
    unknown = write_checkpoint(
        tmp_path / "unknown", "fp8", right("fp8"), architecture="LlamaForCausalLM"
    )
    with pytest.raises(UsageError, match="LlamaForCausalLM"):
        phireg.row_order(unknown)
    with pytest.raises(UsageError, match="phi3-small"):
        phireg.row_order(unknown, family="phi3-small")
    with pytest.raises(SourceError, match="architecture"):
        phireg.row_order(unknown, model_dir=str(source))


@pytest.mark.parametrize(
    ("keys", "error", "names"),
    [
        ({"architecture": "absent"}, SourceError, "architecture"),
        ({"num_attention_heads": "8"}, CheckError, "num_attention_heads"),
        ({"num_key_value_heads": "absent"}, CheckError, "num_key_value_heads"),
        ({"num_key_value_heads": 2, "head_size": SIZE}, CheckError, "qkv"),
        ({"num_key_value_heads": 3}, CheckError, "config.json"),
        ({"num_hidden_layers": 1}, CheckError, "layers"),
        ({"mapping": {"world_size": "2"}}, SourceError, "world_size"),
        ({"mapping": {"world_size": 2, "tp_size": 1, "pp_size": 2}}, SourceError, "tp_size"),
        ({"mapping": {"world_size": 10**6}}, SourceError, "world_size"),
        ({"quantization": {"quant_algo": "W4A16_AWQ"}}, CheckError, "W4A16_AWQ"),
        ({"quantization": {"quant_algo": ["FP8"]}}, CheckError, "FP8"),
    ],
)
def test_wrong_configs(tmp_path, keys, error, names):
    directory = grouped(tmp_path, **{**EARLY, **keys})
    before = content(directory)
    with pytest.raises(error, match=names):
        phireg.postprocess(directory)
    assert content(directory) == before


def test_early_spelling_of_kv_heads(tmp_path):
    directory = grouped(tmp_path, num_key_value_heads="absent", num_kv_heads=4, **EARLY)
    phireg.postprocess(directory)
    same(directory, right())


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("weight", None),
        ("weight", ("I8", np.zeros((HIDDEN, 96)))),
        ("per_channel_scale", ("F16", np.zeros(96))),
        ("weights_scaling_factor", ("F32", np.zeros(95))),
        ("weights_scaling_factor", ("F32", np.zeros((96, 3)))),
        ("activation_scaling_factor", ("F32", np.zeros(96))),
        ("prequant_scaling_factor", ("F16", np.zeros(96))),
    ],
)
def test_wrong_tensors(tmp_path, name, tensor):
    ranks = checkpoint("int8", TENSORS, block_rows)
    ranks[0].pop(f"transformer.layers.1.attention.qkv.{name}", None)
    if tensor:
        ranks[0][f"transformer.layers.1.attention.qkv.{name}"] = tensor
    directory = write_checkpoint(tmp_path / "ckpt", "int8", ranks, **EARLY)
    with pytest.raises(CheckError, match=rf"layers\.1\.attention\.qkv\.{name}"):
        phireg.postprocess(directory)


def test_damaged_files(tmp_path, source):
    directory = grouped(tmp_path, **EARLY)
    raw = (directory / "rank0.safetensors").read_bytes()
    for damage in (b"", raw[:-5]):
        (directory / "rank0.safetensors").write_bytes(damage)
        with pytest.raises(SourceError):
            phireg.postprocess(directory)
    (directory / "rank0.safetensors").write_bytes(raw)
    for text in ("{", '{"format": 7, "files": {}}'):
        (directory / "phireg.json").write_text(text)
        with pytest.raises(SourceError):
            phireg.postprocess(directory)
    (directory / "phireg.json").write_text('{"format": 1, "files": {}, "producer": {"name": "x"}}')
    model = write_source(tmp_path / "wide", source_tensors(kv=8), kv=8)
    for options in (model, tmp_path / "nothing"):
        with pytest.raises(SourceError):
            phireg.postprocess(directory, model_dir=str(options))
    with pytest.raises(UsageError, match="--revision"):
        phireg.postprocess(directory, revision="main")
