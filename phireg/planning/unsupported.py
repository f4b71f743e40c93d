"""Models that are refused for what they are, before any family is asked."""

from __future__ import annotations

from collections.abc import Iterator

from phireg.config.hf import HFConfig
from phireg.errors import SourceError

MODALITIES = ("vision_config", "img_processor", "embd_layer", "audio_config", "audio_processor")


def check_model(hf: HFConfig) -> None:
    """Refuse quantized, multimodal and encoder-decoder models, and configs of no model at all.

    Raises:
        SourceError: with every reason.
    """
    reasons = list(_reasons(hf))
    if reasons:
        raise SourceError(
            "config.json does not describe a model phireg converts:\n"
            + "\n".join(f"    {reason}" for reason, _ in reasons),
            hint=reasons[0][1],
        )


def _reasons(hf: HFConfig) -> Iterator[tuple[str, str]]:
    if hf.has("quantization_config"):
        method = hf.get("quantization_config.quant_method") or "unnamed method"
        yield (
            f"it is already quantized (quantization_config, {method})",
            "convert the unquantized model; quantize afterwards.",
        )
    # phi-1's first configs say embd_layer "default", of a plain embedding.
    found = [key for key in MODALITIES if hf.has(key) and hf.get(key) != "default"]
    if found:
        yield (
            f"it is multimodal ({', '.join(found)})",
            "phireg converts text models only; extract the language model first.",
        )
    if hf.get("is_encoder_decoder"):
        yield "it is an encoder-decoder model", "phireg converts decoder-only Phi models."
    if hf.has("peft_type") or hf.has("base_model_name_or_path"):
        yield "it configures a LoRA adapter", "merge it into its base model first."
    named = hf.get("architectures")
    if named is not None and not (
        isinstance(named, list) and all(isinstance(name, str) for name in named)
    ):
        yield (
            f"its architectures are {named!r}, not a list of names",
            "this is not the config.json of a transformers model.",
        )
    if not hf.architectures and not hf.model_type:
        yield (
            "it names neither architectures nor model_type",
            "this is not the config.json of a transformers model.",
        )
