"""Rows put right, byte for byte against arrays moved by hand; once; for every kind and TP size."""

import json
import stat

import grouped_by_hand as hand
import numpy as np
import pytest
from grouped_by_hand import EARLY, KINDS, LATE, TENSORS, content, parts_rows, rank_rows, right, same

import phireg
from phireg.errors import CheckError, OutputError, SourceError, UsageError
from phireg.postprocessing.orders import TEXTS, TWICE

QKV = "transformer.layers.{}.attention.qkv.{}"


@pytest.fixture
def source(tmp_path):
    return str(hand.write_source(tmp_path / "model"))


def write(tmp_path, *args, **keys):
    return hand.write(tmp_path / "ckpt", *args, **keys)


def refused(error, directory, match=None, **options):
    """Check that a repair is refused and changes nothing; return the error."""
    before = content(directory)
    with pytest.raises(error, match=match) as caught:
        phireg.postprocess(directory, **options)
    assert content(directory) == before
    return caught.value


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_by_its_producer(tmp_path, kind):
    directory = write(tmp_path, kind, **EARLY)
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
@pytest.mark.parametrize(
    ("tp", "rows_of"),
    [(1, hand.block_rows), (2, hand.block_rows), (2, parts_rows), (4, parts_rows)],
)
def test_ranks_by_their_rows(tmp_path, source, kind, tp, rows_of):
    directory = write(tmp_path, kind, rows_of, tp)
    result = phireg.postprocess(directory, model_dir=source)
    same(directory, right(kind, tp))
    assert result.rows.needed
    assert source in result.rows.evidence[0]
    assert not phireg.row_order(directory, model_dir=source).needed


def unneeded(directory, **options):
    """Check that there is nothing to repair, and that nothing changes."""
    before = content(directory)
    result = phireg.postprocess(directory, **options)
    assert (result.rows.needed, result.tensors, result.files) == (False, 0, {})
    assert content(directory) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tp", "rows_of"), [(2, rank_rows), (4, hand.block_rows)])
def test_right_rows_stay(tmp_path, source, kind, tp, rows_of):
    """A block for each of four ranks is one group, which is right as it is."""
    directory = write(tmp_path, kind, rows_of, tp)
    same(directory, right(kind, tp))
    assert not phireg.row_order(directory, model_dir=source).needed
    unneeded(directory, model_dir=source)


def test_twice_is_once(tmp_path, source):
    directory = write(tmp_path, **EARLY)
    phireg.postprocess(directory)
    for options in ({}, {"model_dir": source}):
        unneeded(directory, **options)
    refused(UsageError, directory, in_source_order=True)
    refused(UsageError, directory, output_dir=tmp_path / "out")
    manifest = json.loads((directory / "phireg.json").read_text())
    moved = [QKV.format(i, n) for i in (0, 1) for n in ("bias", "weight", hand.SCALES)]
    assert manifest["postprocess"]["tensors"] == moved
    assert phireg.inspect(directory, check=True).manifest == manifest
    rows = phireg.row_order(directory)
    assert not rows.needed
    assert "phireg.json" in rows.evidence[0]


def test_one_query_head_for_each_kv_head_and_one_kv_head(tmp_path):
    tensors = hand.source_tensors(kv=8)
    source = hand.write_source(tmp_path / "model", tensors, kv=8)
    for name, options in (("a", {"model_dir": str(source)}), ("b", {"in_source_order": True})):
        directory = hand.write(tmp_path / name, "fp8", tensors=tensors, kv=8)
        phireg.postprocess(directory, **options)
        same(directory, hand.checkpoint("fp8", tensors, rank_rows, kv=8))
    # One KV head has one order only.
    tensors = hand.source_tensors(kv=1)
    directory = hand.write(tmp_path / "c", "fp8", tensors=tensors, kv=1, **EARLY)
    assert not phireg.row_order(directory).needed


# The output


def test_a_new_directory(tmp_path):
    directory = write(tmp_path, **EARLY)
    before = content(directory)
    (directory / "sub").mkdir()
    out = tmp_path / "out"
    phireg.postprocess(directory, out)
    same(out, right())
    assert set(content(out)) == set(before) | {"phireg.json"}
    (directory / "sub").rmdir()
    assert content(directory) == before
    with pytest.raises(OutputError):
        phireg.postprocess(directory, out)
    (out / "notes.txt").unlink()
    phireg.postprocess(directory, out, overwrite=True)
    same(out, right())
    with pytest.raises(UsageError, match="--output-dir"):
        phireg.postprocess(directory, tmp_path / "." / "ckpt" / ".." / "ckpt")


def test_losing_files_is_refused(tmp_path):
    directory = write(tmp_path, **EARLY)
    (directory / "sub").mkdir()
    with pytest.raises(OutputError, match="sub"):
        phireg.postprocess(directory)
    (directory / "sub").rmdir()
    (directory / "config.json").rename(directory / "linked.json")
    (directory / "config.json").symlink_to("linked.json")
    with pytest.raises(OutputError, match=r"config.json"):
        phireg.postprocess(directory)
    phireg.postprocess(directory, tmp_path / "out")
    same(tmp_path / "out", right())


def test_modes_and_links_stay(tmp_path):
    # With the number of KV heads in its early spelling.
    directory = write(tmp_path, num_key_value_heads="absent", num_kv_heads=4, **EARLY)
    directory.chmod(0o700)
    (directory / "rank0.safetensors").chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to(directory)
    phireg.postprocess(link)
    assert link.is_symlink()
    same(directory, right())
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / "rank0.safetensors").stat().st_mode) == 0o600


# Evidence


def test_no_evidence(tmp_path):
    directory = write(tmp_path)
    hint = refused(UsageError, directory).hint
    assert "--model-dir" in hint and "--in-source-order" in hint
    with pytest.raises(UsageError):
        phireg.row_order(directory)
    phireg.postprocess(directory, in_source_order=True)
    same(directory, right())


@pytest.mark.parametrize(
    ("keys", "needed"),
    [
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
    directory = write(tmp_path, "fp8", **keys)
    if needed is None:
        with pytest.raises(UsageError):
            phireg.row_order(directory)
    else:
        assert phireg.row_order(directory).needed is needed


def test_rows_count_more_than_the_producer(tmp_path, source):
    """postprocess_quant_checkpoint.py leaves config.json as it is."""
    repaired = hand.write(tmp_path / "repaired", "int8", rank_rows, **EARLY)
    rows = phireg.row_order(repaired, model_dir=source)
    assert not rows.needed
    assert len(rows.evidence) == 2
    assert "modelopt 0.11.2" in rows.evidence[1]
    late = write(tmp_path, **LATE)
    assert phireg.row_order(late, model_dir=source).needed
    assert not phireg.row_order(late).needed


def test_a_statement_against_the_evidence(tmp_path, source):
    directory = write(tmp_path, "fp8", rank_rows, **LATE)
    for options in ({}, {"model_dir": source}):
        refused(UsageError, directory, "--in-source-order", in_source_order=True, **options)


def test_the_manifest_of_a_conversion(tmp_path, source):
    directory = tmp_path / "ckpt"
    phireg.convert(phireg.plan(source), directory)
    rows = phireg.row_order(directory)
    assert not rows.needed
    assert "phireg.json" in rows.evidence[0]
    # By the rows of this model, the checkpoint would be in its source's order.
    other = [(w[hand.right_rows()], b[hand.right_rows()]) for w, b in TENSORS]
    shuffled = hand.write_source(tmp_path / "shuffled", other)
    with pytest.raises(CheckError, match=r"phireg\.json"):
        phireg.row_order(directory, model_dir=str(shuffled))
    # An exporter's rank files beside the manifest.
    exported = hand.checkpoint("float16", TENSORS, hand.block_rows)
    hand.save(directory / "rank0.safetensors", exported[0])
    for options in ({}, {"model_dir": source}):
        with pytest.raises(CheckError, match=r"transformer.layers.0.attention.qkv"):
            phireg.row_order(directory, **options)
    (directory / "phireg.json").unlink()
    assert phireg.row_order(directory, model_dir=source).needed


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_no_repairable_order(tmp_path, source, kind):
    other = hand.write_source(tmp_path / "other", hand.source_tensors(seed=1))
    with pytest.raises(CheckError, match="qkv"):
        phireg.row_order(write(tmp_path, kind), model_dir=str(other))
    twice = hand.write(tmp_path / "twice", kind, lambda *_: hand.right_rows()[hand.right_rows()])
    with pytest.raises(CheckError) as caught:  # the original script, run again
        phireg.row_order(twice, model_dir=source)
    assert TEXTS[TWICE] in caught.value.message


@pytest.mark.parametrize("part", ["bias", "layer", hand.SCALES])
def test_rows_put_right_in_part(tmp_path, source, part):
    ranks, repaired = hand.checkpoint("int8", TENSORS, hand.block_rows), right()
    for name in ranks[0]:
        if (".0." in name) if part == "layer" else name.endswith(f"qkv.{part}"):
            ranks[0][name] = repaired[0][name]
    directory = hand.write_checkpoint(tmp_path / "ckpt", "int8", ranks)
    with pytest.raises(CheckError, match="qkv"):
        phireg.row_order(directory, model_dir=source)


def test_rows_that_are_alike_tell_nothing(tmp_path):
    tensors = [(np.ones_like(w), np.zeros_like(b)) for w, b in TENSORS]
    source = hand.write_source(tmp_path / "model", tensors)
    directory = write(tmp_path, "float16", tensors=tensors)
    with pytest.raises(UsageError):
        phireg.row_order(directory, model_dir=str(source))


def test_a_few_coarse_rows_do_not_matter(tmp_path):
    """Rows far below the largest are mostly rounding error in FP8."""
    tensors = [(w.copy(), b) for w, b in TENSORS]
    for weight, _ in tensors:
        weight[5:20] *= np.float16(1e-5)
        weight[50:60] = 0
    source = hand.write_source(tmp_path / "model", tensors)
    directory = write(tmp_path, "fp8", tensors=tensors)
    phireg.postprocess(directory, model_dir=str(source))
    same(directory, hand.checkpoint("fp8", tensors, rank_rows))


# Ranks that cannot be repaired


@pytest.mark.parametrize("options", [EARLY, {}])
def test_ranks_need_the_model(tmp_path, options):
    directory = write(tmp_path, "fp8", tp=2, **options)
    assert "--model-dir" in refused(UsageError, directory, in_source_order=not options).hint


def test_a_cut_through_groups(tmp_path):
    """Three KV heads over two ranks: no rank file could hold the rows that the reader wants."""
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": hand.HIDDEN}
    directory = write(tmp_path, "fp8", tp=2, head_size=hand.SIZE, **heads)
    refused(CheckError, directory, "2 rank", in_source_order=True)


def test_scales_that_differ_between_ranks(tmp_path, source):
    """They matter only where rows leave their rank."""
    name = QKV.format(1, "activation_scaling_factor")
    directories = []
    for rows_of in (parts_rows, hand.block_rows):
        ranks = hand.checkpoint("fp8", TENSORS, rows_of, 2)
        ranks[1][name] = ("F32", ranks[1][name][1] * 2)
        directories.append(hand.write_checkpoint(tmp_path / rows_of.__name__, "fp8", ranks))
    refused(CheckError, directories[0], name, model_dir=source)
    phireg.postprocess(directories[1], model_dir=source)


# Damaged input


def test_other_families(tmp_path, source):
    directory = write(tmp_path, "fp8", architecture="PhiForCausalLM")
    assert not phireg.row_order(directory).needed
    unneeded(directory)
    unknown = hand.write(tmp_path / "unknown", "fp8", rank_rows, architecture="LlamaForCausalLM")
    with pytest.raises(UsageError, match="LlamaForCausalLM"):
        phireg.row_order(unknown)
    with pytest.raises(UsageError, match="phi3-small"):
        phireg.row_order(unknown, family="phi3-small")
    with pytest.raises(SourceError, match="architecture"):
        phireg.row_order(unknown, model_dir=source)


@pytest.mark.parametrize(
    ("keys", "error", "names"),
    [
        ({"architecture": "absent"}, SourceError, "architecture"),
        ({"num_attention_heads": "8"}, CheckError, "num_attention_heads"),
        ({"num_key_value_heads": "absent"}, CheckError, "num_key_value_heads"),
        ({"num_key_value_heads": 2, "head_size": hand.SIZE}, CheckError, "qkv"),
        ({"num_key_value_heads": 3}, CheckError, "config.json"),
        ({"num_hidden_layers": 1}, CheckError, "layers"),
        ({"mapping": {"world_size": "2"}}, SourceError, "world_size"),
        ({"mapping": {"world_size": 2, "tp_size": 1, "pp_size": 2}}, CheckError, "tp_size"),
        # modelopt 0.11 wrote one file for decoder phi with TP 2.
        ({"mapping": {"world_size": 2, "tp_size": 2}}, CheckError, "rank1.safetensors"),
        ({"quantization": {"quant_algo": "W4A16_AWQ"}}, CheckError, "W4A16_AWQ"),
        ({"quantization": {"quant_algo": ["FP8"]}}, CheckError, "FP8"),
    ],
)
def test_wrong_configs(tmp_path, keys, error, names):
    directory = write(tmp_path, **{**EARLY, **keys})
    refused(error, directory, names)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("weight", None),
        ("weight", ("I8", np.zeros((hand.HIDDEN, 96)))),
        ("per_channel_scale", ("F16", np.zeros(96))),
        (hand.SCALES, ("F32", np.zeros(95))),
        (hand.SCALES, ("F32", np.zeros((96, 3)))),
        ("activation_scaling_factor", ("F32", np.zeros(96))),
        ("prequant_scaling_factor", ("F16", np.zeros(96))),
    ],
)
def test_wrong_tensors(tmp_path, name, tensor):
    ranks = hand.checkpoint("int8", TENSORS, hand.block_rows)
    ranks[0].pop(QKV.format(1, name), None)
    if tensor:
        ranks[0][QKV.format(1, name)] = tensor
    directory = hand.write_checkpoint(tmp_path / "ckpt", "int8", ranks, **EARLY)
    refused(CheckError, directory, rf"layers\.1\.attention\.qkv\.{name}")


def test_damaged_files(tmp_path):
    directory = write(tmp_path, **EARLY)
    raw = (directory / "rank0.safetensors").read_bytes()
    for damage in (b"", raw[:-5]):
        (directory / "rank0.safetensors").write_bytes(damage)
        refused(CheckError, directory)
    (directory / "rank0.safetensors").write_bytes(raw)
    for text in ("{", '{"format": 7, "files": {}}'):
        (directory / "phireg.json").write_text(text)
        refused(SourceError, directory)
    (directory / "phireg.json").write_text('{"format": 1, "files": {}, "producer": {"name": "x"}}')
    wide = hand.write_source(tmp_path / "wide", hand.source_tensors(kv=8), kv=8)
    refused(SourceError, directory, model_dir=str(wide))
