"""The conformance tests that a family's author inherits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn

import numpy as np
import pytest
import torch

import phireg
from phireg.calibration.statistics import Statistics
from phireg.checkpoint.rankfiles import RankFiles
from phireg.errors import CheckError
from phireg.family import Family
from phireg.findings import Severity
from phireg.formats import FORMATS
from phireg.planning.model import Rows
from phireg.reader.architectures import required_keys
from phireg.reader.schemes import SCHEMES, Scheme
from phireg.reader.spec import parse_spec
from phireg.source.readings import open_source
from phireg.source.tensors import SourceTensor
from phireg.testing.model import Addresses, TinyModel
from phireg.verification.compute import ComputedChecks
from phireg.verification.ranks import merge
from phireg.verification.result import Skipped, place_of
from phireg.verification.verify import compare_weights

SourceRow = tuple[str, int]
"""A source module and one of its rows."""


class FamilyConformance:
    """Tests a family's mapping on a tiny model.

    Inherit from it::

        from phireg.testing import FamilyConformance
        from acme_phi import FAMILY

        class TestAcmePhi(FamilyConformance):
            family = FAMILY
            tiny = dict(
                hidden_size=48, num_attention_heads=8, num_key_value_heads=2,
                num_hidden_layers=2, intermediate_size=40, vocab_size=97,
                max_position_embeddings=128, tie_word_embeddings=False, ...
            )

    The tiny model is made, with random values, by the class that runs the source: transformers' own
    or the one that ``Family.reference`` names. So names, shapes and logits do not come from the
    family's rules. No entry point is needed.

    Attributes:
        family: the family under test.
        tiny: config.json of a tiny source model. ``architectures`` and ``model_type`` default to
            the family's first ones; ``tie_word_embeddings`` must be given. Choose sizes that hide
            no mistake: an odd vocabulary, fewer KV heads than heads but more than one, three
            layers, a rope base and an epsilon that are not the defaults.
        tp_sizes: numbers of ranks to convert for, beginning with 1. Change it if 2 does not divide
            the model.
    """

    family: ClassVar[Family]
    tiny: ClassVar[Mapping[str, Any]]
    tp_sizes: ClassVar[tuple[int, ...]] = (1, 2)

    def expected_rows(self, module: str) -> Sequence[SourceRow] | None:
        """Return the source rows of a checkpoint module at TP 1, worked out by hand.

        Overriding it is optional. ``module`` is a name in the checkpoint
        (``transformer.layers.0.mlp.fc``); the result is the source module and row of each of its
        rows in order, or None to check nothing.
        """
        return None

    _model_of_class: ClassVar[TinyModel]

    @pytest.fixture(name="model")
    def _model(self, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
        """The tiny model, shared by the tests of a class."""
        case = type(self)
        if "_model_of_class" not in vars(case):
            directory = tmp_path_factory.mktemp("conformance")
            case._model_of_class = TinyModel(self.family, self.tiny, directory)
        return case._model_of_class

    def test_config_table_is_complete(self, model: TinyModel) -> None:
        """Every source key is read or ignored with a reason; every key the reader needs is made.

        Errors of the translation itself, such as an unknown value, are reported too.
        """
        translation, unread = model.translate()
        problems = [
            f"{f.subject}: {f.detail}" + (f"  [{f.where}]" if f.where else "")
            for f in translation.findings
            if f.severity is Severity.ERROR
        ]
        problems += [
            f"{key}: no entry reads it; use it, or ignore(..., why=...) it"
            for key in unread
            if not any(line.startswith(f"{key}:") for line in problems)
        ]
        if translation.ok:
            config = model.plan(1).config
            problems += [
                f"{key}: the reader of {config['architecture']} needs it, and no entry makes it"
                for key in required_keys(config)
                if key not in config
            ]
        if problems:
            _fail(f"the field table of '{model.family.name}' is incomplete:", problems)

    def test_plan_is_complete(self, model: TinyModel) -> None:
        """Every source tensor is mapped, every target filled, every part divided, at each TP size.

        The sources are the tensors that the model class saves; the targets are those that
        TensorRT-LLM's reader requires.
        """
        for tp_size in self.tp_sizes:
            if problems := model.plan_problems(tp_size):
                _fail(problems)

    def test_partition_is_exact(self, model: TinyModel) -> None:
        """Every source element is on some rank, and no element is twice in a tensor of a rank."""
        for tp_size in self.tp_sizes:
            present = np.zeros(model.book.end, bool)
            for rank, tensors in enumerate(_probes(model, tp_size)):
                for name, tensor in tensors.items():
                    counts = np.bincount(tensor.reshape(-1), minlength=model.book.end)
                    if twice := np.flatnonzero(counts[1:] > 1).tolist():
                        origin = model.book.origin(twice[0] + 1)
                        place = model.place(name)
                        _fail(f"TP {tp_size}: rank {rank} {name} holds {origin} twice  [{place}]")
                    present |= counts > 0
            for name in _mapped(model):
                addresses = model.book.tensor(name)
                lost = addresses[~present[addresses]]
                if len(lost):
                    _fail(f"TP {tp_size}: {model.book.origin(int(lost[0]))} is on no rank")

    def test_rows_are_where_the_author_expects_them(self, model: TinyModel) -> None:
        """Every row came from where :meth:`expected_rows` says."""
        tensors = _probes(model, 1)[0]
        expected = {module: self.expected_rows(module) for module in model.places}
        if not any(expected.values()):
            pytest.skip("expected_rows is not overridden")
        for name, tensor in tensors.items():
            module, _, kind = name.rpartition(".")
            if rows := expected[module]:
                addresses = [model.book.tensor(f"{source}.{kind}")[row] for source, row in rows]
                _check_equal(model, name, tensor, np.stack(addresses))

    def test_inverse_restores_the_source(self, model: TinyModel) -> None:
        """The plan, inverted, rebuilds every source tensor from the rank files, bit for bit."""
        for tp_size in self.tp_sizes:
            ranks = _probes(model, tp_size)
            plan = model.plan_for(open_source(model.probe_dir), tp_size)
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
            for name in _mapped(model):
                if difference := model.book.difference(
                    name, rebuilt[name], model.book.tensor(name)
                ):
                    _fail(f"TP {tp_size}: {difference}")

    def test_ranks_reassemble(self, model: TinyModel) -> None:
        """The ranks, merged as TensorRT-LLM divides tensors, are the checkpoint at TP 1."""
        whole = _probes(model, 1)[0]
        for tp_size in self.tp_sizes:
            if tp_size == 1:
                continue
            ranks = _probes(model, tp_size)
            try:
                spec = parse_spec(dict(model.plan(tp_size).config))
            except CheckError as error:
                _fail(str(error))
            for name, expected in whole.items():
                shards = [tensors[name] for tensors in ranks]
                if shards[0].shape == expected.shape:  # every rank repeats it
                    for rank, shard in enumerate(shards):
                        _check_equal(model, name, shard, expected, f"TP {tp_size} rank {rank}: ")
                merged = merge(spec, name, [torch.from_numpy(s.astype(np.int64)) for s in shards])
                addresses = merged.numpy().astype(np.uint32)
                prefix = f"TP {tp_size}, all ranks together: "
                _check_equal(model, name, addresses, expected, prefix)

    def test_logits_agree_with_the_reference(self, model: TinyModel) -> None:
        """The executor on the checkpoint computes what the source's own model computes.

        Each sub-module is compared on the reference's own input, then the whole model, in float32,
        with prompts on both sides of every length at which the model changes its behavior.
        """
        for tp_size in self.tp_sizes:
            _probes(model, tp_size)
            if problems := logits_problems(model, tp_size):
                _fail(problems)

    def test_scales_commute_with_the_mapping(self, model: TinyModel) -> None:
        """Quantized weights and scales are those of the source's rows, in every scheme.

        Scales are computed in the source's order and moved with its rows; what is expected of them
        here comes from rows that were moved before. Input maxima are made up. The schemes are those
        for which ``phireg_quant_rules`` names linears, and which take the tiny model's sizes.
        """
        for tp_size in self.tp_sizes:
            _probes(model, tp_size)
            for scheme in schemes_of(model, tp_size):
                if problems := scale_problems(model, tp_size, scheme):
                    _fail(problems)

    def test_two_runs_are_identical(self, model: TinyModel) -> None:
        """Converting again gives the same files, byte for byte."""
        for tp_size in self.tp_sizes:
            _probes(model, tp_size)
            first = model.convert(model.source_dir, tp_size)
            second = model.directory / f"again-tp{tp_size}"
            phireg.convert(model.plan(tp_size), second)
            for file in sorted(first.iterdir()):
                if file.read_bytes() != (second / file.name).read_bytes():
                    _fail(f"TP {tp_size}: {file.name} is not the same in a second run")

    def test_wrong_source_tensors_are_named(self, model: TinyModel) -> None:
        """A source with a tensor missing, unknown or one row short is refused by its name."""
        tensors = model.source.tensors
        for name in _samples(model):
            tensor = tensors[name]
            module, _, kind = name.rpartition(".")
            extra = dataclasses.replace(tensor, name=f"{module}_extra.{kind}")
            short = dataclasses.replace(tensor, shape=(tensor.shape[0] - 1, *tensor.shape[1:]))
            rest = {other: tensors[other] for other in tensors if other != name}
            _check_refused(model, rest, "missing", name)
            _check_refused(model, {**tensors, extra.name: extra}, "unmapped", extra.name)
            _check_refused(model, {**tensors, name: short}, "shape", name)


def _fail(message: str, lines: Iterable[str] = ()) -> NoReturn:
    pytest.fail("\n  ".join([message, *lines]), pytrace=False)


def _check_equal(
    model: TinyModel, name: str, actual: Addresses, expected: Addresses, prefix: str = ""
) -> None:
    if difference := model.book.difference(name, actual, expected):
        _fail(f"{prefix}{difference}  [{model.place(name)}]")


def _probes(model: TinyModel, tp_size: int) -> list[dict[str, Addresses]]:
    if model.plan_problems(tp_size):
        pytest.skip(f"there is no plan at TP {tp_size}: see test_plan_is_complete")
    return model.probes(tp_size)


def _mapped(model: TinyModel) -> list[str]:
    """List the source tensors that the rules do not drop."""
    dropped = {f.subject for f in model.plan(1).findings if f.code == "dropped"}
    return [name for name in model.source.tensors if name not in dropped]


def _samples(model: TinyModel) -> Iterator[str]:
    """Yield the tensors of the last layer and those of no layer."""
    if model.plan_problems(1):
        pytest.skip("there is no plan at TP 1: see test_plan_is_complete")
    last = model.plan(1).config["num_hidden_layers"] - 1
    for name in _mapped(model):
        if not any(f".{number}." in name for number in range(last)):
            yield name


def logits_problems(model: TinyModel, tp_size: int) -> str | None:
    """Compare logits; name the tensors of wrong sub-modules and how the base makes them."""
    torch.set_num_threads(1)
    plan = model.plan(tp_size)
    directory = model.convert(model.source_dir, tp_size)
    family = model.family.name
    checks = ComputedChecks(directory, plan.config, torch.device("cpu"))
    try:
        summary, problems, *_ = checks.run("logits", plan)
        if tp_size > 1 and not problems:
            summary, problems, *_ = checks.run("ranks", plan)
    except Skipped as reason:
        return f"TP {tp_size}: the logits cannot be compared: {reason}"
    if not problems:
        return None
    lines = [f"TP {tp_size}: the checkpoint of '{family}' does not match the source: {summary}"]
    lines += [f"  {problem}" for problem in problems[:8]]
    first_layers: dict[str | None, int | None] = {}
    for problem in problems:
        first_layers.setdefault(problem.part, problem.layer)
    wrong = {(layer, part) for part, layer in first_layers.items()}
    tensors = [output.name for output in model.plan(1).outputs if place_of(output.name) in wrong]
    if tp_size == 1 and model.base and (differences := model.differences_from_base(tensors)):
        lines += [f"unlike {model.base.family.name}, the base of '{family}':"]
        lines += [f"  {difference}" for difference in differences]
    elif tensors:
        lines += ["made of:"]
        lines += [f"  {name}  [{model.place(name)}]" for name in tensors]
    return "\n".join(lines)


def schemes_of(model: TinyModel, tp_size: int) -> Iterator[Scheme]:
    """Yield the schemes for which the family names linears, if their inputs make whole groups."""
    translation, _ = model.translate()
    inputs = {output.name: output.matrix[1] for output in model.plan(tp_size).outputs}
    for scheme in SCHEMES.values():
        linears = model.family.quant_rules(translation.fields, scheme.quant_algo).linears
        size = FORMATS[scheme.qformat].group_size or 1
        if linears and not any(inputs.get(f"{name}.weight", 0) % size for name in linears):
            yield scheme


def scale_problems(model: TinyModel, tp_size: int, scheme: Scheme) -> str | None:
    """Quantize with made-up maxima; list what is not the source's, None if all is."""
    if problems := model.plan_problems(tp_size, scheme.qformat):
        return problems
    plan = model.plan(tp_size, scheme.qformat)
    rng = np.random.default_rng(0)
    maxima = {
        module: rng.uniform(0.5, 8.0, linear.columns).astype(np.float32)
        for linear in plan.linears
        for module in linear.sources
    }
    output = model.directory / f"{scheme.qformat}-tp{tp_size}"
    phireg.quantize(plan, output, Statistics(maxima, (), (), {}, maxima))
    with RankFiles(output, tp_size) as files:
        found = compare_weights(plan, files, 1.0).problems
    lines = [
        f"TP {tp_size}, {scheme.qformat}: {problem}  "
        f"[{model.place(problem.where.rpartition(' ')[2])}]"
        for problem in found
    ]
    return "\n".join(lines) or None


def _check_refused(
    model: TinyModel, tensors: Mapping[str, SourceTensor], code: str, name: str
) -> None:
    """Check that the plan of a source with these tensors has an error about ``name``."""
    source = dataclasses.replace(model.source, tensors=MappingProxyType(dict(tensors)))
    plan = model.plan_for(source, 1)
    if (code, name) not in {(finding.code, finding.subject) for finding in plan.errors}:
        _fail(
            f"{name} is {code} in the source, and the plan's errors do not name it:",
            [f"{f.code} {f.subject}: {f.detail}" for f in plan.errors] or ["none"],
        )
