"""The logits check of a tiny model, with the rules that a difference comes from."""

from __future__ import annotations

from collections.abc import Iterable

from phireg.testing.model import TinyModel
from phireg.testing.repair import Repairs
from phireg.verification.compute import Computed
from phireg.verification.measure_types import Place, place_text
from phireg.verification.request import Request, Skipped
from phireg.verification.result import Problem

_EXPLAINED = 3


def logits_problems(model: TinyModel, tp_size: int) -> str | None:
    """What the executor computes differently from the source's own model; None if nothing.

    Args:
        model: the model; it has a plan at this size.
        tp_size: number of ranks.
    """
    import torch

    torch.set_num_threads(1)
    plan = model.planned(tp_size)
    directory = model.checkpoint(tp_size)
    source = str(model.source_dir)
    name = model.family.name
    request = Request(directory, source, name, None, ("logits",), "cpu", "float32", None)
    computed = Computed(request, plan.config, plan, lambda check, more, total: None)
    try:
        summary, problems, _ = computed.logits()
        if tp_size > 1 and not problems:
            summary, problems, _ = computed.ranks()
    except Skipped as reason:
        return f"TP {tp_size}: the logits cannot be compared: {reason}"
    if not problems:
        return None
    lines = [
        f"TP {tp_size}: the checkpoint of '{model.family.name}' differs from the source: {summary}"
    ]
    lines += [f"  {problem}" for problem in problems[:8]]
    wrong = _first_of_each_part(problems)
    for place in wrong:
        layer, part = place
        lines.append(f"rules of {place_text(place)}:")
        lines.append(model.places.lines(model.places.part(layer, part)))
    if tp_size > 1:
        lines.append("what fails at this size only is how a rule is divided: its parts and policy")
    elif wrong and computed.result is not None:
        tokens = [prompt.tokens for prompt in computed.result.prompts]
        reference, _ = computed.reference(computed.spec(), torch.device("cpu"))
        repairs = Repairs(model, reference, tuple(dict.fromkeys((tokens[0], tokens[-1]))))
        explained: dict[tuple[str, ...], list[str]] = {}
        for place in wrong[:_EXPLAINED]:
            explained.setdefault(tuple(repairs.explain(place)), []).append(place_text(place))
        for texts, parts in explained.items():
            if texts:
                either = " either of" if len(texts) > 1 else ""
                lines.append(f"{', '.join(parts)}: explained by{either}")
                lines += [f"    {text}" for text in texts]
    if not wrong:
        lines.append(
            f"the rules are in {model.places.hook('phireg_weight_rules')}, "
            f"the fields in {model.places.hook('phireg_config_fields')}"
        )
    return "\n".join(lines)


def _first_of_each_part(problems: Iterable[Problem]) -> list[Place]:
    first: dict[str, Place] = {}
    for problem in problems:
        if problem.part is not None and problem.part != "config":
            first.setdefault(problem.part, (problem.layer, problem.part))
    return list(first.values())
