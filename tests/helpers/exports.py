"""Real exports of tiny models: by ModelOpt and by compressed-tensors.

Each is written by the package itself, and comes with the logits of its own fake-quantized model,
which is a witness of what the files mean.
"""

import copy
import warnings

import torch

from helpers import tiny_models

MODELOPT = {
    "fp8": "FP8_DEFAULT_CFG",
    "fp8_pc_pt": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "int8_sq": "INT8_SMOOTHQUANT_CFG",
    "int8_wo": "INT8_WEIGHT_ONLY_CFG",
    "int4_awq": "INT4_AWQ_CFG",
    "w4a8_awq": "W4A8_AWQ_BETA_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
}
COMPRESSED = {
    "fp8": "FP8",
    "fp8_dynamic": "FP8_DYNAMIC",
    "w8a8": "W8A8",
    "w4a16": "W4A16",
    "w8a16": "W8A16",
    "nvfp4": "NVFP4",
}
SIZES = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 131}


def phi3(**changes):
    return tiny_models.phi3(**{"num_key_value_heads": 2, **SIZES, **changes})


def phi2(**changes):
    return tiny_models.phi2(partial_rotary_factor=0.5, **SIZES, **changes)


MAKERS = {"phi3": phi3, "phi2": phi2}


def rows(count=4):
    generator = torch.Generator().manual_seed(7)
    return torch.randint(1, 100, (count, 24), generator=generator)


def source(name, directory, shard="5GB", dtype=torch.bfloat16, **changes):
    """A source directory."""
    model = MAKERS[name](**changes).to(dtype)
    model.save_pretrained(directory, max_shard_size=shard)
    return directory


def modelopt(
    name, directory, qformat, out, shard=None, dtype=torch.float32, cache=True, run=True, texts=()
):
    """Write ModelOpt's export; return the logits of its fake-quantized model for ``rows()[:1]``.

    Its NVFP4 computes on a GPU alone: with ``run`` unset there are none. It calibrates on
    ``texts`` one by one, or on all ``rows()`` at once.
    """
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant

    model = tiny_models.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    config = copy.deepcopy(getattr(mtq, MODELOPT[qformat]))
    if cache:
        config = update_quant_cfg_with_kv_cache_quant(config, mtq.FP8_KV_CFG["quant_cfg"])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = [torch.tensor([text]) for text in texts] or [rows()]
        model = mtq.quantize(model, config, lambda inner: [inner(ids) for ids in batches])
        mtq.disable_quantizer(model, "*norm*")  # readers of the export round no norm's input
        logits = model(rows()[:1]).logits[0].float() if run else None
        export_hf_checkpoint(model, export_dir=out, **({"max_shard_size": shard} if shard else {}))
    return logits


def compressed(name, directory, scheme, out, cache=False, shard="5GB", dtype=torch.float32):
    """Write compressed-tensors' compression; return the logits of its fake-quantized model."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
        preset_name_to_scheme,
    )

    model = tiny_models.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    maxima = _input_maxima(model)
    whole = QuantizationArgs(num_bits=8, type="float", strategy="tensor", dynamic=False)
    config = QuantizationConfig(
        config_groups={"group_0": preset_name_to_scheme(COMPRESSED[scheme], ["Linear"])},
        ignore=["lm_head"],
        kv_cache_scheme=whole if cache else None,
    )
    apply_quantization_config(model, config)
    with torch.no_grad():
        for path, module in model.named_modules():
            if getattr(module, "quantization_scheme", None) and hasattr(module, "weight"):
                _set_scales(module, maxima[path])
                module.quantization_status = QuantizationStatus.FROZEN
            elif cache and path.endswith("self_attn"):
                module.k_scale.fill_(0.021)
                module.v_scale.fill_(0.0085)
        logits = None if cache else model(rows()[:1]).logits[0].float()
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(out, max_shard_size=shard)
        compressor.update_config(out)
    return logits


def _input_maxima(model):
    """The largest input of every linear, with nothing quantized."""
    maxima, handles = {}, []
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def keep(_, inputs, path=path):
                largest = inputs[0].detach().float().abs().max()
                maxima[path] = max(maxima.get(path, largest), largest)

            handles.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(rows())
    for handle in handles:
        handle.remove()
    return maxima


def _set_scales(module, largest):
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args, inputs = module.quantization_scheme.weights, module.quantization_scheme.input_activations
    weight = module.weight.float()
    if args.strategy == "tensor":
        grouped = weight.reshape(1, -1)
    elif args.group_size and args.group_size > 0:
        grouped = weight.unflatten(-1, (-1, args.group_size))
    else:
        grouped = weight[:, None]
    low, high = grouped.amin(-1), grouped.amax(-1)
    glob = None
    if hasattr(module, "weight_global_scale"):
        glob = generate_gparam(weight.min(), weight.max())
        module.weight_global_scale.copy_(glob)
    scale, _ = calculate_qparams(low, high, args, global_scale=glob)
    module.weight_scale.copy_(scale.reshape(module.weight_scale.shape))
    if hasattr(module, "input_global_scale"):
        module.input_global_scale.copy_(generate_gparam(-largest, largest))
    elif hasattr(module, "input_scale"):
        scale, _ = calculate_qparams(-largest, largest, inputs)
        module.input_scale.copy_(scale.reshape(module.input_scale.shape))
