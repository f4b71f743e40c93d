#!PYTHON
"""A stand-in for trtllm-build: records its arguments and behaves as FAKE_MODE says.

Written from the builder's documented behavior: the banner with the version comes first, an engine
directory gets config.json and one rankN.engine per rank of the checkpoint's mapping.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

VERSION = os.environ.get("FAKE_VERSION", "1.2.1")
print(f"[TensorRT-LLM] TensorRT-LLM version: {VERSION}")
if "--help" in sys.argv:
    sys.exit(0)

mode = os.environ.get("FAKE_MODE", "good")
record = Path(os.environ["FAKE_RECORD"])
arguments = sys.argv[1:]
(record / "arguments.json").write_text(json.dumps(arguments))
options = dict(zip(arguments[::2], arguments[1::2], strict=True))
output = Path(options["--output_dir"])
if "--model_config" in options:
    config = json.loads(Path(options["--model_config"]).read_text())
else:
    config = json.loads((Path(options["--checkpoint_dir"]) / "config.json").read_text())


def log(text):
    print(f"[11/22/2026-10:00:00] {text}", flush=True)


log("[TRT-LLM] [I] Set gemm_plugin to auto.")
(output / "rank0.engine").write_bytes(b"half")  # what an interruption must not leave
if mode == "slow":
    worker = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"
    child = subprocess.Popen([sys.executable, "-c", worker])
    time.sleep(0.3)
    (record / "pids").write_text(f"{os.getpid()} {child.pid}")
    if os.environ.get("FAKE_STUBBORN"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    log("[TRT-LLM] [I] Build TensorRT engine Unnamed Network 0")
    time.sleep(300)
if mode.endswith(".txt"):
    for line in (record / mode).read_text().splitlines():
        print(line, file=sys.stderr)
    sys.exit(1)
if mode == "killed":
    os.kill(os.getpid(), signal.SIGKILL)

for rank in range(config["mapping"]["world_size"]):
    log("[TRT-LLM] [I] Build TensorRT engine Unnamed Network 0")
    log(f"[TRT-LLM] [I] Serializing engine to {output}/rank{rank}.engine...")
    if mode != "incomplete" or rank == 0:
        (output / f"rank{rank}.engine").write_bytes(b"engine of rank %d" % rank)
build_config = {
    "max_input_len": int(options.get("--max_input_len", 1024)),
    "max_seq_len": int(options.get("--max_seq_len", config["max_position_embeddings"])),
    "max_batch_size": int(options.get("--max_batch_size", 2048)),
    "max_beam_width": 1,
    "gather_context_logits": False,
    "plugin_config": {"gemm_plugin": options.get("--gemm_plugin")},
}
engine = {"version": VERSION, "pretrained_config": config, "build_config": build_config}
(output / "config.json").write_text(json.dumps(engine))
log("[TRT-LLM] [I] Total time of building all engines: 00:00:01")
