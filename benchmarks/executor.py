"""How fast the executor generates on a GPU, beside what it is measured against.

    python benchmarks/executor.py [--only check|decode|formats|experts|batch|sparse ...]
    python benchmarks/executor.py --only formats --models Phi-3-small --formats INT4 NVFP4

Weights are random, at the published shapes, made on the GPU. Times are the median of several runs
after a warm-up, whole calls by the wall clock: compilation is outside, everything else inside.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from phireg.dtypes import torch_dtype
from phireg.executor import Executor, generate
from phireg.executor.levels import E2M1, Levels
from phireg.reader.schemes import LINEARS
from phireg.reader.spec import BlockSparse, parse_spec
from phireg.reader.tensors import EMBEDDING, rank_tensors

PHI3_MINI = {
    "architecture": "Phi3ForCausalLM", "dtype": "bfloat16", "vocab_size": 32064,
    "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "swiglu",
    "max_position_embeddings": 4096, "rotary_base": 10000.0, "rotary_pct": 1.0,
}  # fmt: skip
PHI35_MOE = {
    "architecture": "PhiMoEForCausalLM", "dtype": "bfloat16", "vocab_size": 32064,
    "hidden_size": 4096, "intermediate_size": 6400, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "swiglu",
    "norm_epsilon": 1e-5, "max_position_embeddings": 4096, "rotary_base": 10000.0,
    "rotary_pct": 1.0, "position_embedding_type": "rope_gpt_neox",
    "moe": {
        "num_experts": 16, "top_k": 2, "normalization_mode": 2, "sparse_mixer_epsilon": 0.01,
    },
}  # fmt: skip
# Small enough for float32 and many tokens, with everything that a step does differently.
PHI3_SMALL_SHORT = {
    "architecture": "Phi3SmallForCausalLM", "dtype": "float32", "vocab_size": 1000,
    "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_act": "gegelu",
    "gegelu_limit": 20.0, "max_position_embeddings": 8192, "rotary_base": 1e6, "rotary_pct": 1.0,
    "mup_embedding_multiplier": 10.0, "mup_width_multiplier": 8.0,
    "blocksparse_block_size": 64, "blocksparse_num_local_blocks": 2,
    "blocksparse_vertical_stride": 8, "blocksparse_homo_head_pattern": False,
    "dense_attention_every_n_layers": 2,
}  # fmt: skip
PHI3_SMALL = {
    **PHI3_SMALL_SHORT, "dtype": "bfloat16", "vocab_size": 100352, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "blocksparse_num_local_blocks": 16,
}  # fmt: skip
MODELS = {"Phi-3-mini": PHI3_MINI, "Phi-3-small": PHI3_SMALL}
# The attention of one rank of the published Phi-3-small at TP 1.
HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128
PHI3_SMALL_PATTERN = {
    "block_size": 64, "num_local_blocks": 16, "vertical_stride": 8, "head_step": 1, "dense_every": 2
}  # fmt: skip


def random_executor(config: dict[str, Any], std: float = 0.02) -> Executor:
    spec = parse_spec(config)
    tensors, dtype = rank_tensors(spec), getattr(torch, spec.dtype)
    generator = torch.Generator("cuda").manual_seed(0)

    def source(name: str) -> torch.Tensor:
        code, shape = tensors[name]
        if name.endswith("scaling_factor"):
            scale = 1.0 if "prequant" in name else 5e-4 if "weights" in name else 0.05
            return torch.full(shape, scale, dtype=torch_dtype(code), device="cuda")
        values = torch.randn(shape, device="cuda", generator=generator)
        if torch_dtype(code) != dtype:  # levels
            return (values * 40).clamp(-127, 127).to(torch_dtype(code))
        return (values * std + ("norm" in name or "ln_f" in name)).to(dtype)

    return Executor(spec, [source], [0], device="cuda", offload=False)


def weight_bytes(executor: Executor) -> int:
    """Count the bytes a decode step must read, as they lie in memory.

    These are all tensors but the embedding, which is used by the row, and two of a layer's experts.
    """
    layers = [executor.layer_weights(n)[0] for n in range(executor.spec.num_layers)]
    ends = {n: t for n, t in executor.end_weights()[0].items() if n != EMBEDDING}
    total = 0
    for tensor in (tensor for weights in (*layers, ends) for tensor in weights.values()):
        experts = tensor.dim() == 3 and executor.spec.experts is not None
        total += tensor.nbytes * 2 // len(tensor) if experts else tensor.nbytes
    return total


def seconds(call: Callable[[], object], runs: int = 5) -> float:
    """Median time of a call, after one that is not counted."""
    times = []
    for _ in range(runs + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def in_a_row(call: Callable[[], object], calls: int = 16) -> float:
    """Time of a call among others: a prompt's sixteen sparse layers do not wait for the host."""

    def all_calls() -> None:
        for _ in range(calls):
            call()

    return seconds(all_calls) / calls


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy on the device."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), runs=9)


def prompts(rows: int, length: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, vocab_size, (rows, length), generator=generator).tolist()


def peer() -> Callable[[list[list[int]], int], None] | None:
    """The same model in transformers, as a function (prompts, new tokens), if it is installed."""
    try:
        from transformers import Phi3Config, Phi3ForCausalLM
    except ImportError:
        return None
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Phi3ForCausalLM(Phi3Config(attn_implementation="sdpa", sliding_window=None)).eval()
    torch.set_default_dtype(torch.float32)

    def run(batch: list[list[int]], count: int) -> None:
        ids = torch.tensor(batch, device="cuda")
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
            min_new_tokens=count, max_new_tokens=count,
        )  # fmt: skip

    return run


def check(results: dict[str, Any]) -> None:
    """The captured step and the tiled prefill against whole forward passes, in float32."""
    executor = random_executor(PHI3_SMALL_SHORT, std=0.05)
    batch = prompts(2, 700, 1000)
    batch[1] = batch[1][:333]
    start = time.perf_counter()
    got = generate(executor, batch, 40)
    print(f"first call, compilation included: {time.perf_counter() - start:.1f} s")
    on_cpu = Executor(
        executor.spec,
        [lambda name: _named(executor, name).cpu()], [0], device="cpu", offload=False,
    )  # fmt: skip
    wrong = 0
    for row, new in zip(batch, got, strict=True):
        logits = on_cpu(torch.tensor([row + new[:-1]]))[0, len(row) - 1 :]
        chosen = logits.gather(1, torch.tensor(new)[:, None])[:, 0]
        wrong += int((logits.max(dim=1).values - chosen > 1e-3).sum())
    results["check_wrong_tokens"] = wrong
    print(f"tokens the CPU would not have chosen: {wrong} of {2 * len(got[0])}")
    ids = torch.tensor(batch[:1])
    wanted = on_cpu(ids)
    error = ((executor(ids.cuda()).cpu() - wanted).norm() / wanted.norm()).item()
    results["check_relative_error"] = error
    print(f"logits of a 700-token prompt, GPU against CPU: relative error {error:.1e}")


def _named(executor: Executor, name: str) -> torch.Tensor:
    if name.startswith("transformer.layers."):
        _, _, layer, rest = name.split(".", 3)
        return executor.layer_weights(int(layer))[0][rest]
    return executor.end_weights()[0][name]


def generation(sections: set[str], results: dict[str, Any]) -> None:
    executor = random_executor(PHI3_MINI)
    other = peer()
    if "decode" in sections:
        prompt = prompts(1, 128, 32064)
        results["decode_ms"] = per_token(lambda count: generate(executor, prompt, count), 256)
        results["floor_ms"] = weight_bytes(executor) / results["copy_bytes_per_second"] * 1e3
        show("Phi-3-mini, batch 1, ms a token", results["decode_ms"])
        show("  memory floor, ms", results["floor_ms"])
        show("  times the floor (wanted: at most 1.5)", results["decode_ms"] / results["floor_ms"])
        if other is not None:
            results["peer_decode_ms"] = per_token(lambda count: other(prompt, count), 32)
            show("  transformers, ms a token", results["peer_decode_ms"])
            show("  times faster (wanted: 15)", results["peer_decode_ms"] / results["decode_ms"])
    if "batch" in sections:
        rows, count = prompts(32, 512, 32064), 128
        took = seconds(lambda: generate(executor, rows, count), runs=3)
        first = seconds(lambda: generate(executor, rows, 1), runs=3)
        results["batch_tokens_per_second"] = 32 * count / took
        results["batch_prefill_seconds"] = first
        show("Phi-3-mini, 32 x 512-token prompts, tokens/s", 32 * count / took)
        show("  of that, seconds in the prompts", first)
        show("  decode, ms a step", (took - first) / (count - 1) * 1e3)
        if other is not None:
            took = seconds(lambda: other(rows, count), runs=1)
            results["peer_batch_tokens_per_second"] = 32 * count / took
            show("  transformers, tokens/s", 32 * count / took)
            ratio = results["batch_tokens_per_second"] * took / (32 * count)
            show("  times faster (wanted: 10)", ratio)


# Rows: name, quant_algo, kv_cache_quant_algo; or the grid and the group size of weights of formats
# that TensorRT-LLM checkpoints of phireg do not have.
FORMATS: dict[str, tuple[str | None, str | int | None]] = {
    "bfloat16": (None, None),
    "FP8, FP8 cache": ("FP8", "FP8"),
    "INT8 SmoothQuant, INT8 cache": ("W8A8_SQ_PER_CHANNEL", "INT8"),
    "INT8 weights": ("W8A16", None),
    "INT4 weights": ("W4A16", None),
    "INT4 weights, groups of 128": ("int4", 128),
    "NVFP4 weights": ("e2m1", 16),
}


def of_format(algorithm: str | None, cache: str | int | None, shape: dict[str, Any]) -> Executor:
    """A random model; its weights are replaced by packed ones of a grid for formats of groups."""
    if not isinstance(cache, int):
        block = {"quant_algo": algorithm, "kv_cache_quant_algo": cache}
        return random_executor({**shape, "quantization": block})
    executor = random_executor(shape)
    for index in range(executor.spec.num_layers):
        weights = dict(executor._layers[index][0])
        for linear in LINEARS:
            size = weights.pop(f"{linear}.weight").shape
            levels = torch.randint(-7, 8, size, dtype=torch.int8, device="cuda")
            groups = torch.full((size[0], size[1] // cache), 0.02, device="cuda")
            if algorithm == "e2m1":
                table = torch.tensor(E2M1, device="cuda")
                values = (levels.sign() * table[levels.abs().long()]).to(torch.float8_e4m3fn)
                one = torch.ones(1, device="cuda")
                weights |= Levels("e2m1", values, one, groups).packed(linear)
            else:
                weights |= Levels("int4", levels, None, groups.bfloat16()).packed(linear)
        executor._layers[index] = [weights]
    return executor


def formats(models: list[str], wanted: list[str], results: dict[str, Any]) -> None:
    """Every format's decode step against its floor, its memory, a batch, and prompts."""
    for model in models:
        print(model)
        for name in wanted:
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            found = results.setdefault(model, {})
            # No name for the model here: the next one's memory is counted when this one is gone.
            of_model(name, of_format(*FORMATS[name], MODELS[model]), before, found, results)


def of_model(
    name: str, executor: Executor, before: int, found: dict[str, Any], results: dict[str, Any]
) -> None:
    rows, long = prompts(32, 512, 32064), prompts(1, 4000, 32064)
    spec, copies = executor.spec, results["copy_bytes_per_second"]
    read = weight_bytes(executor)
    stored = read + executor.end_weights()[0][EMBEDDING].nbytes
    taken = torch.cuda.memory_allocated() - before
    floor = read / copies * 1e3
    step = per_token(lambda count: generate(executor, prompts(1, 128, 32064), count), 256)
    first = seconds(lambda: generate(executor, rows, 1), runs=2)
    took = seconds(lambda: generate(executor, rows, 65), runs=1)
    batch = (took - first) / 64 * 1e3
    kept = 32 * (512 + 32) * 2 * spec.num_layers * spec.rank_kv_heads * spec.head_size
    keys = kept * (1 if spec.quantization.kv_cache else 2) / copies * 1e3
    prompt = seconds(lambda: generate(executor, long, 1), runs=3) * 1e3
    found[name] = [step, floor, batch, floor + keys, taken, stored, prompt, first]
    print(
        f"{name:<28} {step:6.3f} ms a token, {step / floor:.2f} x its floor; batch of 32: "
        f"{batch:6.3f} ms, {batch / (floor + keys):.2f} x; {taken / 1e9:.2f} GB in memory, "
        f"{taken / stored:.3f} x the bytes stored; prompts: 4000 tokens {prompt:.1f} ms, "
        f"32 x 512 {first * 1e3:.1f} ms", flush=True,
    )  # fmt: skip


def experts(results: dict[str, Any]) -> None:
    """Phi-3.5-MoE's shape, in FP8, which fits into 80 GB; a quarter of its layers in bfloat16."""
    for name, layers in (("FP8", 32), ("bfloat16", 8)):
        torch.cuda.empty_cache()
        block = {"quant_algo": "FP8", "exclude_modules": ["lm_head", "*router"]}
        shape = {**PHI35_MOE, "num_hidden_layers": layers}
        of_experts(
            f"Phi-3.5-MoE, {layers} layers, {name}",
            random_executor({**shape, "quantization": block} if name == "FP8" else shape),
            results,
        )


def of_experts(name: str, executor: Executor, results: dict[str, Any]) -> None:
    floor = weight_bytes(executor) / results["copy_bytes_per_second"] * 1e3
    step = per_token(lambda count: generate(executor, prompts(1, 16, 32064), count), 64)
    results[name] = [step, floor]
    show(f"{name}, ms a token", step)
    show("  times the bytes of the active experts (wanted: at most 1.6)", step / floor)


def per_token(run: Callable[[int], object], count: int) -> float:
    """Milliseconds that each further token takes."""
    return (seconds(lambda: run(count + 1)) - seconds(lambda: run(1))) / count * 1e3


def sparse(results: dict[str, Any]) -> None:
    from phireg.executor.cuda.launch import sparse_attention

    pattern = BlockSparse(**PHI3_SMALL_PATTERN)
    for length, wanted in ((8192, 3), (32768, 6)):
        query = torch.randn(1, HEADS, length, HEAD_SIZE, device="cuda", dtype=torch.bfloat16)
        key, value = torch.randn(
            2, 1, KV_HEADS, length, HEAD_SIZE, device="cuda", dtype=torch.bfloat16
        )
        dense = in_a_row(
            lambda q=query, k=key, v=value: functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=1 / HEAD_SIZE, enable_gqa=True
            )
        )
        skipping = in_a_row(
            lambda q=query, k=key, v=value: sparse_attention(
                q, k, v, pattern, None, 0, 1 / HEAD_SIZE
            )
        )
        results[f"attention_{length}_dense_ms"] = dense * 1e3
        results[f"attention_{length}_sparse_ms"] = skipping * 1e3
        show(f"Phi-3-small attention, {length} tokens, dense SDPA, ms", dense * 1e3)
        show("  block-sparse, ms", skipping * 1e3)
        show(f"  times faster (wanted: {wanted})", dense / skipping)


def show(what: str, value: float) -> None:
    print(f"{what:<60} {value:10.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the executor on a GPU.")
    names = ["check", "decode", "formats", "experts", "batch", "sparse"]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--formats", nargs="+", metavar="TEXT", default=[""], help="in their names")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(f"{results['device']}, torch {results['torch']}")
    sections = set(options.only)
    if "check" in sections:
        check(results)
    results["copy_bytes_per_second"] = copy_bandwidth()
    show("copy, TB/s read and written", results["copy_bytes_per_second"] / 1e12)
    if "sparse" in sections:
        sparse(results)
    if "formats" in sections:
        wanted = [name for name in FORMATS if any(text in name for text in options.formats)]
        formats(options.models, wanted, results)
    if "experts" in sections:
        experts(results)
    if sections & {"decode", "batch"}:
        generation(sections, results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
