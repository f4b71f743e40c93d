"""The tests that a family's author inherits."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn

import numpy as np
import pytest

import phireg
from phireg.errors import PlanError, SourceError
from phireg.family import Family
from phireg.findings import Severity
from phireg.planning.model import Rows
from phireg.reader.keys import required_keys
from phireg.source.source import SourceTensor, open_source
from phireg.testing.model import TinyModel
from phireg.testing.probe import Addresses

SourceRow = tuple[str, int]
"""A source module and one of its rows."""


class FamilyConformance:
    """Proves a family right on a tiny model of it.

    Inherit it and say which::

        from phireg.testing import FamilyConformance
        from acme_phi import FAMILY

        class TestAcmePhi(FamilyConformance):
            family = FAMILY
            tiny = dict(
                hidden_size=48, num_attention_heads=8, num_key_value_heads=2,
                num_hidden_layers=2, intermediate_size=40, vocab_size=97,
                max_position_embeddings=128, tie_word_embeddings=False, ...
            )

    The tiny model is made by the class that the source is run with, transformers' own or the one
    named by ``Family.reference``, with random values; so names, shapes and logits are that class's
    word, not the family's. No entry point is needed or looked for.

    Attributes:
        family: the family under test.
        tiny: config.json of a tiny source model. ``architectures`` and ``model_type`` are the
            family's first ones where it does not say; say ``tie_word_embeddings``. Choose sizes
            that hide nothing: an odd vocabulary, fewer KV heads than heads but more than one, three
            layers, a rope base and an epsilon that are not the defaults.
        tp_sizes: numbers of ranks to convert for, beginning with 1. Change it where 2 does not
            divide the model.
    """

    family: ClassVar[Family]
    tiny: ClassVar[Mapping[str, Any]]
    tp_sizes: ClassVar[tuple[int, ...]] = (1, 2)

    def expected_rows(self, module: str) -> Sequence[SourceRow] | None:
        """Where the rows of a checkpoint module come from at TP 1, worked out by hand.

        Overriding it is optional: it adds a witness for what the author knows of the source's
        layout. ``module`` is a name in the checkpoint (``transformer.layers.0.mlp.fc``); the answer
        is the source module and row of each of its rows in order, or None for no opinion.
        """
        return None

    _made: ClassVar[TinyModel]

    @pytest.fixture(name="model")
    def _model(self, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
        """The tiny model; checkpoints of it are made once for the class."""
        case = type(self)
        if "_made" not in vars(case):
            case._made = TinyModel(self.family, self.tiny, tmp_path_factory.mktemp("conformance"))
        return case._made

    def test_config_table_is_complete(self, model: TinyModel) -> None:
        """Every key of the source is used or ignored with a reason; the reader finds all it needs.

        A key without an effect inside a block the table reads, or an unknown value, is an error of
        the translation itself. Warnings about values are the table's own business.
        """
        translation, unread = model.translated()
        wrong = [
            f"{f.subject}: {f.detail}" + (f"  [{f.where}]" if f.where else "")
            for f in translation.findings
            if f.severity is Severity.ERROR
        ]
        wrong += [
            f"{key}: no entry reads it; use it, or ignore(..., why=...) it"
            for key in unread
            if not any(line.startswith(f"{key}:") for line in wrong)
        ]
        if translation.ok:
            config = model.planned(1).config
            wrong += [
                f"{key}: the reader of {config['architecture']} needs it, and no entry produces it"
                for key in required_keys(config)
                if key not in config
            ]
        if wrong:
            place = model.places.hook("phireg_config_fields")
            _fail(f"the field table of '{model.family.name}' ({place}) is incomplete:", wrong)

    def test_plan_is_complete(self, model: TinyModel) -> None:
        """Every source tensor is mapped, every target filled, every part divided, at each TP size.

        The sources are the tensors that the model class saves; the targets are what TensorRT-LLM's
        reader asks for.
        """
        for tp_size in self.tp_sizes:
            if problems := model.plan_problems(tp_size):
                _fail(problems)

    def test_partition_is_exact(self, model: TinyModel) -> None:
        """No element of a tensor stands twice on one rank, and no source element is on none."""
        for tp_size in self.tp_sizes:
            there = np.zeros(model.book.end, bool)
            for rank, tensors in enumerate(_probes(model, tp_size)):
                for name, tensor in tensors.items():
                    counts = np.bincount(tensor.reshape(-1), minlength=model.book.end)
                    if twice := np.flatnonzero(counts[1:] > 1).tolist():
                        _fail(
                            f"TP {tp_size}: rank {rank} {name} holds "
                            f"{model.book.origin(twice[0] + 1)} twice ({model.places.where(name)})"
                        )
                    there |= counts > 0
            for name in model.book.shapes:
                lost = model.book.tensor(name)[~there[model.book.tensor(name)]]
                if len(lost) and name not in model.places.rules.drop:
                    origin = model.book.origin(int(lost[0]))
                    _fail(f"TP {tp_size}: {origin} is on no rank", [model.places.concerned(name)])

    def test_rows_are_where_the_author_expects_them(self, model: TinyModel) -> None:
        """Every row came from where :meth:`expected_rows` says."""
        made = _probes(model, 1)[0]
        known = {module: self.expected_rows(module) for module in model.places.rules}
        if not any(known.values()):
            pytest.skip("expected_rows has no opinion")
        for module, rows in known.items():
            for name in (f"{module}.weight", f"{module}.bias"):
                if rows is None or name not in made:
                    continue
                kind = name.rpartition(".")[2]
                wanted = np.stack([model.book.tensor(f"{source}.{kind}")[n] for source, n in rows])
                self._same(model, name, made[name], wanted)

    def test_inverse_restores_the_source(self, model: TinyModel) -> None:
        """The plan read backwards rebuilds every source tensor from the rank files, bit for bit."""
        for tp_size in self.tp_sizes:
            ranks = _probes(model, tp_size)
            plan = model.planned(tp_size, open_source(model.probe_dir))
            rebuilt = {
                name: np.zeros(shape, np.uint32) for name, shape in model.book.shapes.items()
            }
            for output in plan.outputs:
                tensor, row = ranks[output.rank][output.name], 0
                if tensor.ndim > 2:  # the rows of all experts
                    tensor = tensor.reshape(output.matrix)
                assert isinstance(output.origin, Rows)
                for span in output.origin.spans:
                    block = tensor[row : row + span.count]
                    row += span.count
                    if span.source is None:
                        if block.any():
                            _fail(f"{output.name}: its padding is not zero")
                        continue
                    rows = rebuilt[span.source][span.start : span.stop]
                    if output.origin.columns is None:
                        rows[:] = block
                        continue
                    column = 0
                    for kept in output.origin.columns:
                        rows[:, kept.start : kept.stop] = block[:, column : column + kept.count]
                        column += kept.count
            for name, tensor in rebuilt.items():
                if name not in model.places.rules.drop:
                    self._same(model, name, tensor, model.book.tensor(name), f"TP {tp_size}: ")

    def test_ranks_reassemble(self, model: TinyModel) -> None:
        """The ranks, put together as TensorRT-LLM takes their rows, are the checkpoint at TP 1."""
        import torch

        from phireg.errors import CheckError
        from phireg.reader.spec import parse_spec
        from phireg.verification.merge import merge

        whole = _probes(model, 1)[0]
        for tp_size in self.tp_sizes:
            if tp_size == 1:
                continue
            ranks = _probes(model, tp_size)
            try:
                spec = parse_spec(dict(model.planned(tp_size).config))
            except CheckError as error:
                _fail(f"{error} ({model.places.hook('phireg_config_fields')})")
            for name, wanted in whole.items():
                shards = [tensors[name] for tensors in ranks]
                if shards[0].shape == wanted.shape:  # every rank repeats it
                    for rank, shard in enumerate(shards):
                        self._same(model, name, shard, wanted, f"TP {tp_size} rank {rank}: ")
                merged = merge(spec, name, [torch.from_numpy(s.astype(np.int64)) for s in shards])
                got = merged.numpy().astype(np.uint32)
                before = f"TP {tp_size}, all ranks together: "
                self._same(model, name, got, wanted, before)

    def test_logits_agree_with_the_reference(self, model: TinyModel) -> None:
        """The executor on the checkpoint computes what the source's own model computes.

        Part by part on the reference's own input, then as a whole, in float32, with prompts on both
        sides of every length at which the model changes its behaviour; and each TP size what its
        ranks merged into one compute. A part that differs is reported with its rules, and with the
        mistake whose undoing makes it agree, where one is found.
        """
        from phireg.testing.logits import logits_problems

        for tp_size in self.tp_sizes:
            _probes(model, tp_size)
            if problems := logits_problems(model, tp_size):
                _fail(problems)

    def test_scales_commute_with_the_mapping(self, model: TinyModel) -> None:
        """For every scheme, converting then dequantizing is dequantizing then converting.

        The source is quantized and dequantized here, module by module and in plain arithmetic, and
        then converted unquantized; the quantized checkpoint, dequantized, must hold the same
        values. Input maxima are made up. The schemes are those for which ``phireg_quant_rules``
        names linears; of the weight-only ones, whose weights stay raw, the bytes are compared.
        """
        from phireg.testing.scales import scale_problems, schemes_of

        for scheme in schemes_of(model):
            for tp_size in self.tp_sizes:
                _probes(model, tp_size)
                if problems := scale_problems(model, tp_size, scheme):
                    _fail(problems)

    def test_two_runs_are_identical(self, model: TinyModel) -> None:
        """Converting again gives the same files, byte for byte."""
        for tp_size in self.tp_sizes:
            _probes(model, tp_size)
            first = model.checkpoint(tp_size)
            second = model.directory / f"again-tp{tp_size}"
            phireg.convert(model.planned(tp_size), second)
            for file in sorted(first.iterdir()):
                if file.read_bytes() != (second / file.name).read_bytes():
                    place = model.places.hook("phireg_weight_rules")
                    _fail(f"TP {tp_size}: {file.name} is not the same in a second run ({place})")

    def test_a_missing_tensor_is_named(self, model: TinyModel) -> None:
        """Without one of its tensors the source is refused, and the message names the tensor."""
        for name in _samples(model):
            tensors = {n: t for n, t in model.source.tensors.items() if n != name}
            _refused(model, tensors, "missing", name)

    def test_an_unknown_tensor_is_named(self, model: TinyModel) -> None:
        """A tensor that no rule maps is refused, not left out."""
        for name in _samples(model):
            module, _, kind = name.rpartition(".")
            extra = dataclasses.replace(model.source.tensors[name], name=f"{module}_extra.{kind}")
            tensors = {**model.source.tensors, extra.name: extra}
            _refused(model, tensors, "unmapped", extra.name)

    def test_a_short_tensor_is_named(self, model: TinyModel) -> None:
        """A tensor with a row less than the config says is refused, and so is a truncated file."""
        for name in _samples(model):
            tensor = model.source.tensors[name]
            short = dataclasses.replace(tensor, shape=(tensor.shape[0] - 1, *tensor.shape[1:]))
            _refused(model, {**model.source.tensors, name: short}, "shape", name)
        _truncated(model)

    def _same(
        self, model: TinyModel, name: str, got: Addresses, wanted: Addresses, before: str = ""
    ) -> None:
        if problem := model.book.difference(name, got, wanted):
            rule = model.places.rule(name)
            where = rule.where if rule else model.places.concerned(name).strip()
            _fail(f"{before}{problem}\n    {where}")


def _fail(message: str, lines: Iterable[str] = ()) -> NoReturn:
    pytest.fail("\n  ".join([message, *lines]), pytrace=False)


def _probes(model: TinyModel, tp_size: int) -> list[dict[str, Addresses]]:
    if model.plan_problems(tp_size):
        pytest.skip(f"there is no plan at TP {tp_size}: see test_plan_is_complete")
    return model.probes(tp_size)


def _samples(model: TinyModel) -> Iterator[str]:
    """The tensors of the last layer and those of no layer."""
    if model.plan_problems(1):
        pytest.skip("there is no plan at TP 1: see test_plan_is_complete")
    number = model.planned(1).config["num_hidden_layers"] - 1
    mine = f".{number}."
    others = [f".{n}." for n in range(number)]
    for name in model.source.tensors:
        if name in model.places.rules.drop:
            continue
        if mine in name or not any(other in name for other in others):
            yield name


def _refused(model: TinyModel, tensors: Mapping[str, SourceTensor], code: str, name: str) -> None:
    """The plan of a source with these tensors must have one finding of a kind about a tensor."""
    source = dataclasses.replace(model.source, tensors=MappingProxyType(dict(tensors)))
    plan = model.planned(1, source)
    if not any((f.code, f.subject) == (code, name) for f in plan.errors):
        found = [f"{f.code} {f.subject}: {f.detail}" for f in plan.errors]
        place = model.places.concerned(name)
        _fail(
            f"{name} is {code} in the source, and the plan does not say so; it says:",
            [*(found or ["nothing"]), f"concerned:\n{place}"],
        )
    output = model.directory / "refused"
    try:
        phireg.convert(plan, output)
    except PlanError as error:
        if name not in error.message:
            _fail(f"{name} is {code}, and the error does not name it:", [error.message])
    else:
        _fail(f"{name} is {code} in the source, and the conversion was carried out")
    if output.exists():
        _fail(f"{name} is {code} in the source, and {output.name} was written all the same")


def _truncated(model: TinyModel) -> None:
    directory = model.directory / "truncated"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(model.config), encoding="utf-8")
    file = model.source.files[-1]
    raw = (model.source.directory / file.name).read_bytes()
    last = max(model.source.tensors.values(), key=lambda tensor: (tensor.file, tensor.offset)).name
    (directory / "model.safetensors").write_bytes(raw[:-2])
    try:
        open_source(directory)
    except SourceError as error:
        if last not in error.message:
            _fail(f"the file ends within {last}, and the error does not name it:", [error.message])
    else:
        _fail("a truncated source file was accepted")
