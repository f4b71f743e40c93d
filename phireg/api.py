"""The plugin API. Everything else in phireg is internal and may change."""

from phireg.config.common import (
    BOOKKEEPING,
    CONSTANTS,
    OUTRANKED_SHARE,
    dimensions,
    grouped_heads,
    in_rope,
    is_long_rope,
    long_rope_factors,
    long_rope_scale,
    rotary_base,
    rotary_dim,
    rotary_share,
    rotary_shares,
    same_as,
    sliding_window,
    supported_rope,
)
from phireg.config.fields import (
    ConfigError,
    Entry,
    Fields,
    FieldTable,
    boolean,
    check,
    const,
    derive,
    factors,
    field,
    ignore,
    integer,
    number,
    positive,
    refuse,
    text,
    when,
)
from phireg.config.hf import HFConfig
from phireg.errors import SourceError
from phireg.family import Family, PublishedModel
from phireg.findings import Severity
from phireg.hookspecs import hookimpl
from phireg.layout.axes import (
    columns,
    fuse,
    order,
    pad,
    parts,
    replicable,
    select,
    src,
    tied,
    ungroup,
)
from phireg.layout.rules import (
    Experts,
    Linear,
    Norm,
    Policy,
    QuantRules,
    Rule,
    Rules,
    Table,
    every_linear,
    one_of,
)
from phireg.layout.spans import Axis, LayoutError
from phireg.targets.huggingface import HuggingFace
from phireg.targets.target import Layout, Quantized, Stored, Target, WrittenModel

COLUMN = Policy.COLUMN
ROW = Policy.ROW
COPY = Policy.COPY

__all__ = [
    # families and hooks
    "Family", "PublishedModel", "hookimpl", "HFConfig", "SourceError",
    # targets
    "Target", "HuggingFace", "Layout", "Stored", "Quantized", "WrittenModel",
    # config tables
    "FieldTable", "Entry", "Fields", "field", "const", "derive", "when", "check", "refuse",
    "ignore", "ConfigError", "Severity", "integer", "number", "positive", "boolean", "text",
    "factors",
    # entries and helpers shared by families
    "BOOKKEEPING", "CONSTANTS", "dimensions", "grouped_heads", "rotary_base", "rotary_dim",
    "rotary_share", "rotary_shares", "OUTRANKED_SHARE", "same_as", "sliding_window",
    "supported_rope", "in_rope", "is_long_rope", "long_rope_factors", "long_rope_scale",
    # weight rules
    "Rules", "Rule", "Linear", "Experts", "Norm", "Table", "one_of", "COLUMN", "ROW", "COPY",
    "Policy", "Axis", "LayoutError", "src", "fuse", "parts", "order", "select", "ungroup",
    "tied", "pad", "replicable", "columns",
    # quantization
    "QuantRules", "every_linear",
]  # fmt: skip
