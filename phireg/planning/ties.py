"""Whether lm_head is the embedding: what config.json says, against what the files hold.

transformers writes a tied pair once, under either name, or twice. A head of its own beside a
config that ties is a contradiction which only the user can settle.
"""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from phireg.findings import Finding, Severity
from phireg.layout.rules import Rules
from phireg.source.model import Source, same_bytes
from phireg.source.readings import finding

TIES = "tie_word_embeddings"
HEAD, TABLE = "lm_head", "transformer.vocab_embedding"


@dataclasses.dataclass(frozen=True, slots=True)
class Ties:
    """The reading of the pair that a plan goes on with."""

    tied: bool
    source: Source
    findings: tuple[Finding, ...] = ()


def settle_ties(stated: bool, choice: bool | None, source: Source, untied: Rules) -> Ties:
    """Decide whether the head, which ``untied`` rules name, is the embedding, as ``stated``."""
    tied = stated if choice is None else choice
    if HEAD not in untied or TABLE not in untied:
        return Ties(tied, source)
    heads, tables = (
        [f"{axis.sources[0][0]}.weight" for axis in untied[target].weight]
        for target in (HEAD, TABLE)
    )
    head, table = (
        next((name for name in names if name in source.tensors), None) for names in (heads, tables)
    )
    if head is not None and table is not None:
        return _both(head, table, tied, choice, source)
    if head is not None:
        paired = tables[heads.index(head)] if len(tables) == len(heads) else tables[0]
        return _one(head, paired, tied, source, missing="embedding")
    if table is not None:
        tensor = source.tensors[table]
        adapter = source.adapter
        if tied and adapter and (tensor.deltas or tensor.file == adapter.file.name):
            detail = (
                "the adapter changes it, and lm_head is tied to it: what was trained had another "
                "head; untie them before you train, or merge with PEFT"
            )
            return Ties(True, source, (Finding(Severity.ERROR, "adapter", table, detail),))
        return _one(table, heads[tables.index(table) % len(heads)], tied, source, missing="head")
    return Ties(tied, source)


def _both(head: str, table: str, tied: bool, choice: bool | None, source: Source) -> Ties:
    if not tied:
        return Ties(False, source)
    left, right = source.tensors[head], source.tensors[table]
    equal = (left.dtype, left.shape) == (right.dtype, right.shape)
    if equal and dataclasses.replace(left, name=right.name) != right:
        with source.open() as reader:
            equal = same_bytes(reader, left, reader, right)
    if equal:
        return Ties(True, source)
    if choice is not None:
        detail = f"has other values than {table}, and is dropped because of --tie yes"
        return Ties(True, source, (finding(Severity.NOTE, head, detail),))
    detail = (
        f"the config ties it to {table}, and their values differ. Choose: --tie no keeps both, as "
        "transformers 5 does; --tie yes drops this one, as transformers 4 does"
    )
    return Ties(False, source, (finding(Severity.ERROR, head, detail),))


def _one(present: str, absent: str, tied: bool, source: Source, *, missing: str) -> Ties:
    """Read the only tensor of the pair as both, if they are tied."""
    if not tied:  # the missing tensor is an error of the plan
        detail = f"if the {missing} is {present}, which the config does not say, choose --tie yes"
        return Ties(False, source, (finding(Severity.NOTE, absent, detail),))
    if missing == "head":
        return Ties(True, source)
    tensors = dict(source.tensors)
    tensors[absent] = dataclasses.replace(tensors.pop(present), name=absent)
    note = finding(Severity.NOTE, present, f"is the tied pair's only tensor, and read as {absent}")
    return Ties(True, dataclasses.replace(source, tensors=MappingProxyType(tensors)), (note,))
