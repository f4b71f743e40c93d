"""Helpers and tests that the families share; independent of the plugins.

``published/`` holds config.json of published models, and beside each the config.json that the
reader needs for it.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save, save_file

import phireg
from phireg.config.hf import HFConfig
from phireg.findings import Severity

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# Source dtype, --dtype, what must come out: auto keeps 16-bit types and narrows float32.
CASTS = [
    ("bfloat16", "auto", "bfloat16"),
    ("float16", "auto", "float16"),
    ("float32", "auto", "float16"),
    ("float32", "bfloat16", "bfloat16"),
    ("float32", "float32", "float32"),
    ("bfloat16", "float16", "float16"),
    ("bfloat16", "float32", "float32"),
    ("float16", "bfloat16", "bfloat16"),
]


# --- configs ---------------------------------------------------------------------------------


def published(model):
    """config.json of a published model."""
    return _read_json(model, "config")


def checkpoint_config(model):
    """The checkpoint's config.json of a published model at TP 1."""
    return _read_json(model, "checkpoint")


def translated_fields(model):
    """The part of it that the family's field table makes."""
    return without(checkpoint_config(model), "dtype", "mapping", "quantization")


def _read_json(model, kind):
    return json.loads((Path(__file__).parent / "published" / f"{model}.{kind}.json").read_text())


def translate(family, config):
    return family.config_fields().translate(HFConfig(config))


def subjects(translation, severity=Severity.ERROR):
    """Subjects of the findings of one severity."""
    return {finding.subject for finding in translation.findings if finding.severity is severity}


def without(mapping, *keys):
    return {key: value for key, value in mapping.items() if key not in keys}


def as_transformers5(config, **rope):
    """The same config with the keys transformers 5 writes instead of 4's."""
    new = without(config, "torch_dtype", "rope_theta", "rope_scaling", "partial_rotary_factor")
    return {**new, "dtype": config["torch_dtype"], "rope_parameters": rope}


def modules_after(plugin, config):
    """The modules that a fresh interpreter has imported after calling every hook of the plugin."""
    code = f"""
import json, sys
from phireg.api import HFConfig
from phireg_plugins.{plugin} import FAMILY
hf = HFConfig(json.loads(sys.stdin.read()))
fields = FAMILY.config_fields().translate(hf).fields
assert FAMILY.weight_rules(fields, hf)
assert FAMILY.quant_rules(fields, "W8A16").linears
print(json.dumps(sorted(sys.modules)))
"""
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, input=json.dumps(config).encode(), check=True, stdout=-1)
    return set(json.loads(output.stdout))


# --- sources ---------------------------------------------------------------------------------


def write_source(directory, config, tensors):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    separate = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(separate, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_sparse(directory, config, shapes, dtype="BF16"):
    """A source of real size without data: a header, and a hole where the tensors would be."""
    size = {"BF16": 2, "F16": 2, "F32": 4}[dtype]
    listing, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + size * math.prod(shape)
        listing[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(listing).encode()
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        os.ftruncate(file.fileno(), 8 + len(header) + end)
    return directory


def randomize(model, dtype, seed=0):
    """Random parameters everywhere: initial norms are ones and initial biases zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.to(DTYPES[dtype])


# --- conversions -----------------------------------------------------------------------------


def convert(source, output, **options):
    plan = phireg.plan(source, **options)
    phireg.convert(plan, output)
    return plan


def read_config(directory):
    return json.loads((Path(directory) / "config.json").read_text())


def errors(source, **options):
    """Error findings as (code, subject), and the text a user reads."""
    plan = phireg.plan(source, **options)
    assert plan.outputs == () and plan.tasks == ()
    return {(f.code, f.subject) for f in plan.errors}, plan.errors


def rank_files(output):
    names = sorted(p.name for p in Path(output).glob("rank*"))
    assert names == sorted(f"rank{rank}.safetensors" for rank in range(len(names)))
    return [(Path(output) / f"rank{rank}.safetensors").read_bytes() for rank in range(len(names))]


def assert_ranks(output, expected, dtype):
    """The rank files are, byte for byte, what safetensors writes for the expected tensors."""
    files = rank_files(output)
    assert len(files) == len(expected)
    for rank, (file, tensors) in enumerate(zip(files, expected, strict=True)):
        right = {n: t.to(DTYPES[dtype]).contiguous().clone() for n, t in tensors.items()}
        written = load(file)
        assert written.keys() == right.keys(), f"rank {rank}"
        wrong = [name for name, tensor in right.items() if not torch.equal(written[name], tensor)]
        assert file == save(right), f"rank {rank}: {wrong or 'same values'}"


# --- tensor parallelism, in plain torch ------------------------------------------------------


def share(tensor, tp, rank, dim=0):
    """One of ``tp`` equal slices."""
    assert tensor.shape[dim] % tp == 0
    size = tensor.shape[dim] // tp
    return tensor.narrow(dim, rank * size, size)


def kv_share(tensor, kv_heads, tp, rank):
    """A rank's KV heads; with more ranks than heads, the one its query heads use."""
    if tp <= kv_heads:
        return share(tensor, tp, rank)
    assert tp % kv_heads == 0
    return share(tensor, kv_heads, rank // (tp // kv_heads))


def vocab_share(tensor, tp, rank):
    """A rank's rows of a vocabulary padded with zero rows to a multiple of the ranks."""
    padding = -tensor.shape[0] % tp
    zeros = torch.zeros(padding, *tensor.shape[1:], dtype=tensor.dtype)
    return share(torch.cat([tensor, zeros]), tp, rank)


# --- tests of every family's mapping ---------------------------------------------------------


class MappingChecks:
    """Converts a tiny model of a family in every way and compares with rank files made by hand."""

    family: str
    bases = ()  # modules of the families it derives from
    large: str  # a published model, by its name in published/
    complete: tuple  # (name in published/, config.json) of published models
    complete_size: tuple  # their bytes, and tensors of the checkpoint
    complete_dtype = "BF16"
    tp_sizes = (1, 2, 4)
    vocabularies = (97, 128, 131)
    warnings = ()  # subjects of the warnings that a tiny config causes

    def write(self, directory, dtype="float32", vocab=None, **changes):
        """Write a random tiny source model; return its tensors, a tied head included."""
        raise NotImplementedError

    def expected(self, state, tp):
        """The tensors of every rank file, in plain torch."""
        raise NotImplementedError

    @staticmethod
    def source_shapes(config):
        """The tensors of a published model."""
        raise NotImplementedError

    def convert(self, source, output, **options):
        return convert(source, output, family=self.family, **options)

    def test_the_plugin_imports_nothing_else(self):
        plugin = self.family.replace("-", "_")
        modules = modules_after(plugin, published(self.large))
        assert not modules & {"torch", "transformers", "numpy", "safetensors"}
        plugins = {name.split(".")[1] for name in modules if name.startswith("phireg_plugins.")}
        assert plugins == {plugin, *self.bases}

    def test_complete_models(self, tmp_path):
        for number, (model, config) in enumerate(self.complete):
            shapes = self.source_shapes(config)
            source = write_sparse(tmp_path / f"hf{number}", config, shapes, self.complete_dtype)
            plan = phireg.plan(source, family=self.family)
            assert {finding.subject for finding in plan.findings} <= {"sliding_window"}
            assert (plan.bytes_in, len(plan.outputs)) == self.complete_size
            assert plan.config == checkpoint_config(model)

    def test_every_tp_size(self, tmp_path):
        state = self.write(tmp_path / "hf")
        for tp in self.tp_sizes:
            out = tmp_path / f"out{tp}"
            plan = self.convert(tmp_path / "hf", out, dtype="float32", tp_size=tp)
            assert {finding.subject for finding in plan.findings} == set(self.warnings)
            assert_ranks(out, self.expected(state, tp), "float32")
            assert read_config(out)["mapping"] == {"world_size": tp, "tp_size": tp, "pp_size": 1}

    @pytest.mark.parametrize("source_dtype, dtype, result", CASTS)
    def test_every_dtype(self, tmp_path, source_dtype, dtype, result):
        state = self.write(tmp_path / "hf", source_dtype)
        self.convert(tmp_path / "hf", tmp_path / "out", dtype=dtype, tp_size=2)
        assert_ranks(tmp_path / "out", self.expected(state, 2), result)
        assert read_config(tmp_path / "out")["dtype"] == result

    def test_resized_vocabularies(self, tmp_path):
        for vocab in self.vocabularies:
            source, out = tmp_path / f"hf{vocab}", tmp_path / f"out{vocab}"
            state = self.write(source, vocab=vocab)
            self.convert(source, out, dtype="float32", tp_size=4)
            assert_ranks(out, self.expected(state, 4), "float32")
            assert read_config(out)["vocab_size"] == vocab  # not padded: readers pad it themselves

    def test_shards_and_torch_archives_give_the_same_bytes(self, tmp_path):
        state = self.write(tmp_path / "hf")
        names = sorted(state)
        for form in ("sharded", "bin"):
            (tmp_path / form).mkdir()
            (tmp_path / form / "config.json").write_text(json.dumps(read_config(tmp_path / "hf")))
        weight_map = {}
        for number in range(3):
            file = f"model-{number + 1:05d}-of-00003.safetensors"
            tensors = {name: state[name].clone() for name in names[number::3]}
            save_file(tensors, tmp_path / "sharded" / file)
            weight_map |= dict.fromkeys(tensors, file)
        index = tmp_path / "sharded" / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
        for form in ("hf", "sharded", "bin"):
            self.convert(tmp_path / form, tmp_path / f"out-{form}", tp_size=2)
            assert rank_files(tmp_path / f"out-{form}") == rank_files(tmp_path / "out-hf")

    @pytest.mark.parametrize("precision, algorithm", [("int8", "W8A16"), ("int4", "W4A16")])
    def test_weight_only_leaves_the_weights_raw(self, tmp_path, precision, algorithm):
        self.write(tmp_path / "hf")
        for name, qformat in (("plain", None), ("quantized", f"{precision}_wo")):
            self.convert(tmp_path / "hf", tmp_path / name, tp_size=2, qformat=qformat)
        assert rank_files(tmp_path / "plain") == rank_files(tmp_path / "quantized")
        plain, quantized = read_config(tmp_path / "plain"), read_config(tmp_path / "quantized")
        # A list given to the reader replaces its own, so it must name the embedding as well.
        assert quantized.pop("quantization") == {
            "quant_algo": algorithm,
            "kv_cache_quant_algo": None,
            "exclude_modules": ["lm_head", "*vocab_embedding"],
        }
        plain.pop("quantization")
        assert plain == quantized

    def test_surplus_tensors_are_dropped_with_a_note(self, tmp_path):
        """A copy of the embedding that the config ties to it, and constants wherever they stand."""
        state = self.write(tmp_path / "hf", tie_word_embeddings=True)
        surplus = {"lm_head.weight": state["model.embed_tokens.weight"].clone()}
        surplus["model.rotary_emb.inv_freq"] = torch.ones(2)
        for i in range(2):
            surplus[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
            surplus[f"model.layers.{i}.self_attn.rotary_emb.cos_cached"] = torch.ones(2, 2)
        config = read_config(tmp_path / "hf")
        source = write_source(tmp_path / "surplus", config, {**state, **surplus})
        plan = self.convert(source, tmp_path / "out", dtype="float32", tp_size=2)
        dropped = [finding for finding in plan.findings if finding.code == "dropped"]
        assert {finding.subject for finding in dropped} == set(surplus)
        assert {finding.severity for finding in dropped} == {Severity.NOTE}
        assert_ranks(tmp_path / "out", self.expected(state, 2), "float32")


class LayoutChecks(MappingChecks):
    """For families whose models exist in several layouts, with a head of their own or tied."""

    def layouts(self, state, config):
        """The same model in the other layouts: tensors and config.json of each."""
        raise NotImplementedError

    def test_other_layouts_give_the_same_files(self, tmp_path):
        state = self.write(tmp_path / "hf")
        others = self.layouts(state, read_config(tmp_path / "hf"))
        for tp in self.tp_sizes:
            self.convert(tmp_path / "hf", tmp_path / f"hf{tp}", dtype="float32", tp_size=tp)
            for number, (tensors, config) in enumerate(others):
                source = write_source(tmp_path / f"other{number}", config, tensors)
                out = tmp_path / f"out{number}-{tp}"
                self.convert(source, out, dtype="float32", tp_size=tp)
                assert_ranks(out, self.expected(state, tp), "float32")
                assert read_config(out) == read_config(tmp_path / f"hf{tp}")

    def test_two_layouts_at_once_are_refused(self, tmp_path):
        state = self.write(tmp_path / "hf")
        config = read_config(tmp_path / "hf")
        for number, (tensors, _) in enumerate(self.layouts(state, config)):
            extra = without(tensors, *state)
            source = write_source(tmp_path / f"both{number}", config, {**state, **extra})
            codes, _ = errors(source, family=self.family)
            assert extra and codes == {("unmapped", name) for name in extra}

    def test_tied_heads(self, tmp_path):
        """In every layout, stated in config.json or by the user; a bias of the head is its own."""
        state = self.write(tmp_path / "hf", tie_word_embeddings=True)
        config = read_config(tmp_path / "hf")
        saved = load_file(tmp_path / "hf" / "model.safetensors")
        assert "lm_head.weight" not in saved
        for number, (tensors, old) in enumerate([(saved, config), *self.layouts(state, config)]):
            headless = {n: t for n, t in tensors.items() if t is not state["lm_head.weight"]}
            for stated in ({}, {"tie_word_embeddings": True}):
                directory = tmp_path / f"tied{number}-{len(stated)}"
                config = without(old, "tie_word_embeddings") | stated
                source = write_source(directory, config, headless)
                out = directory / "out"
                tie = None if stated else True
                plan = self.convert(source, out, dtype="float32", tp_size=4, tie=tie)
                assert plan.findings == ()
                assert_ranks(out, self.expected(state, 4), "float32")
