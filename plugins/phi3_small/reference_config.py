"""config.json of Phi-3-small as the reference model reads it, under transformers 4 and 5."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from phireg_plugins.reference import own_values, rope_type
from transformers import PretrainedConfig

PUBLISHED_VOCAB_SIZE = 100352
# Special tokens of the published tokenizer that the model must never produce. The list comes from
# the tokenizer; the published config.json does not have it.
PUBLISHED_DUMMY_TOKEN_INDICES = (
    *(100256, 100258, 100259, 100260, 100264, 100265),
    *range(100267, PUBLISHED_VOCAB_SIZE),
)
# An absent key has the published 8k model's value.
# fmt: off
_DEFAULTS: dict[str, Any] = {
    "vocab_size": PUBLISHED_VOCAB_SIZE, "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "rope_embedding_base": 1e6, "rope_position_scale": 1.0, "rope_scaling": None,
    "hidden_act": "gegelu", "gegelu_limit": 20.0, "gegelu_pad_to_256": True,
    "ff_dim_multiplier": None, "ff_intermediate_size": 14336,
    "blocksparse_block_size": 64, "blocksparse_num_local_blocks": 16,
    "blocksparse_vert_stride": 8, "blocksparse_homo_head_pattern": False,
    "dense_attention_every_n_layers": 2, "layer_norm_epsilon": 1e-5, "initializer_range": 0.02,
    "mup_use_scaling": True, "mup_attn_multiplier": 1.0, "mup_embedding_multiplier": 10.0,
    "mup_width_multiplier": 8.0, "tie_word_embeddings": True, "use_cache": True,
    "bos_token_id": 100257, "eos_token_id": 100257, "dummy_token_indices": None,
}
# fmt: on


class LongRope(NamedTuple):
    """The 128k models' rotary scaling: D/2 factors and one magnitude for each regime."""

    short: tuple[list[float], float]
    long: tuple[list[float], float]
    original_max_position_embeddings: int


class Phi3SmallConfig(PretrainedConfig):  # type: ignore[misc]
    """config.json of Phi-3-small, as published and as transformers 4 or 5 saves it.

    ``dummy_token_indices`` are ids whose logits are suppressed. None, the default, means the
    published list for a model of the published vocabulary and no ids for any other. transformers
    5's ``rope_parameters`` is taken for ``rope_embedding_base`` and ``rope_scaling``, and saved
    under those names again.
    """

    model_type = "phi3small"
    # transformers 5 makes rope_scaling an alias of rope_parameters that is never None; a plain
    # attribute keeps the published meaning (None: the 8k model) under both major versions.
    rope_scaling = None

    def __init__(self, **kwargs: Any) -> None:
        own = own_values(kwargs, _DEFAULTS, "rope_embedding_base")
        super().__init__(**kwargs)
        for key, value in own.items():  # after the base class, which has defaults of its own
            setattr(self, key, value)
        if self.hidden_act != "gegelu":
            raise ValueError(f"hidden_act is {self.hidden_act!r}; Phi-3-small has only gegelu")
        if (self.ff_dim_multiplier is None) == (self.ff_intermediate_size is None):
            raise ValueError("give exactly one of ff_intermediate_size and ff_dim_multiplier")
        self.long_rope()

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return int(self.hidden_size // self.num_attention_heads)

    @property
    def intermediate_size(self) -> int:
        """Width of the MLP after the activation; up_proj has twice as many rows."""
        if self.ff_intermediate_size is not None:
            return int(self.ff_intermediate_size)
        size = int(self.ff_dim_multiplier * (self.hidden_size // 3) * 2)
        return math.ceil(size / 256) * 256 if self.gegelu_pad_to_256 else size

    def masked_token_indices(self) -> list[int]:
        """Ids whose logits are set to the lowest float32."""
        if self.dummy_token_indices is not None:
            return list(self.dummy_token_indices)
        published = self.vocab_size == PUBLISHED_VOCAB_SIZE
        return list(PUBLISHED_DUMMY_TOKEN_INDICES) if published else []

    def long_rope(self) -> LongRope | None:
        """The checked ``rope_scaling``, or None for the 8k model.

        A ``short_mscale`` that is absent or not positive is 1; such a ``long_mscale`` is
        sqrt(1 + ln(max / original) / ln(original)).
        """
        if self.rope_scaling is None:
            return None
        values = dict(self.rope_scaling)
        if (kind := rope_type(values)) not in ("su", "longrope"):
            raise ValueError(f"rope_scaling is of type {kind!r}; Phi-3-small has su or longrope")
        for spelled_elsewhere in ("type", "rope_type", "rope_theta"):
            values.pop(spelled_elsewhere, None)
        try:
            short, long = list(values.pop("short_factor")), list(values.pop("long_factor"))
            original = int(values.pop("original_max_position_embeddings"))
        except KeyError as error:
            raise ValueError(f"rope_scaling lacks {error}") from None
        short_mscale, long_mscale = values.pop("short_mscale", 0), values.pop("long_mscale", 0)
        if values.pop("partial_rotary_factor", 1) != 1 or values:
            raise ValueError(f"rope_scaling has {sorted(values) or 'a partial_rotary_factor'}")
        if {len(short), len(long)} != {self.head_dim // 2}:
            raise ValueError(
                f"rope_scaling has {len(short)} short and {len(long)} long factors; "
                f"a head of {self.head_dim} needs {self.head_dim // 2} of each"
            )
        growth = max(1.0, self.max_position_embeddings / original)
        by_formula = math.sqrt(1 + math.log(growth) / math.log(original))
        return LongRope(
            short=(short, short_mscale if short_mscale > 0 else 1.0),
            long=(long, long_mscale if long_mscale > 0 else by_formula),
            original_max_position_embeddings=original,
        )
