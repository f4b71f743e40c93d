"""Convert a model and look at the result.

    python examples/quickstart.py              # makes itself a small random Phi-3-small
    python examples/quickstart.py MODEL_DIR    # converts yours (a directory or a hub repository)

Everything is written to ./phireg-quickstart. The commands it runs are printed, to be typed again.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from phireg import registry
from phireg.testing.factory import write_random_model

WORK = Path("phireg-quickstart")

TINY_PHI3_SMALL = {
    "architectures": ["Phi3SmallForCausalLM"],
    "model_type": "phi3small",
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "ff_intermediate_size": 1024,
    "vocab_size": 1001,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}


def phireg(*arguments: str) -> None:
    print(f"\n$ phireg {shlex.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "phireg", *arguments], check=False).returncode
    if code:
        sys.exit(code)


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else str(WORK / "model")
    if len(sys.argv) == 1:
        print(f"no model given: writing a small random Phi-3-small to {model}")
        write_random_model(registry.load("phi3-small").family, TINY_PHI3_SMALL, Path(model))
    checkpoint = str(WORK / "checkpoint")
    phireg("convert", "--model-dir", model, "--output-dir", checkpoint, "--overwrite")
    phireg("inspect", checkpoint, "--check")


if __name__ == "__main__":
    main()
