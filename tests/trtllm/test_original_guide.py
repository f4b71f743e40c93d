"""The original guide's own lines, and docs/guide.md's, in a shell, with stand-ins for TensorRT-LLM.

The guide's programs are functions of the shell that give phireg the arguments as typed;
`trtllm-build`, the runtime and `mpirun` are stand-ins. The stand-in for an engine recites the
reference summaries, so that the guide's own check of the accuracy decides.
"""

import inspect
import json
import os
import re
import shutil
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import fake_trtllm
import pytest
from helpers.forks import Fork
from helpers.program import shell_words

from phireg import demo
from phireg.generation.tokenizer import find_tokenizer, stop_ids
from phireg.summarization.task import prompt_text

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guide.md").read_text()
SH = r"^```sh\n(.*?)^```$"

CONVERT = """
python ./convert_checkpoint.py \\
                    --model_dir /path/to/phi-model \\
                    --output_dir ./phi-checkpoint \\
                    --dtype float16
"""
BUILD = """
trtllm-build \\
    --checkpoint_dir ./phi-checkpoint \\
    --output_dir ./phi-engine \\
    --gemm_plugin float16 \\
    --max_batch_size 8 \\
    --max_input_len 1024 \\
    --max_output_len 1024 \\
    --tp_size 1 \\
    --pp_size 1
"""
SUMMARIZE = """
python3 ../summarize.py --engine_dir ./phi-engine \\
                        --hf_model_dir /path/to/phi-model \\
                        --batch_size 1 \\
                        --test_trt_llm \\
                        --test_hf \\
                        --data_type fp16 \\
                        --check_accuracy \\
                        --tensorrt_llm_rouge1_threshold=20
"""
SUMMARIZE_TP = f"""
mpirun -n 2 --allow-run-as-root \\
{SUMMARIZE.strip().replace("./phi-engine", "./phi-engine-tp2")}
"""
FP8 = """
DTYPE=bfloat16
python3 ../quantization/quantize.py \\
       --model_dir phi3-model \\
       --output_dir ./phi3-checkpoint \\
       --dtype $DTYPE \\
       --qformat fp8 --kv_cache_dtype fp8
python3 postprocess_quant_checkpoint.py --checkpoint_dir ./phi3-checkpoint
"""
INT8 = FP8.replace("fp8 --kv_cache_dtype fp8", "int8_sq --kv_cache_dtype int8")

PROGRAMS = {
    "./convert_checkpoint.py": "convert",
    "../run.py": "run",
    "../summarize.py": "summarize",
    "../quantization/quantize.py": "quantize",
    "postprocess_quant_checkpoint.py": "postprocess",
}


def commands(lines):
    """What a shell makes of lines: the number of processes and phireg's arguments of each."""
    for words in shell_words(lines, "phireg", "python", "python3", "trtllm-build", "mpirun"):
        processes = 1
        if words[0] == "mpirun":
            assert words[1:4] == ["-n", "2", "--allow-run-as-root"]
            words, processes = words[4:], 2
        program, *arguments = words
        if program == "trtllm-build":
            yield processes, ["build", *arguments]
        elif program == "phireg":
            yield processes, arguments
        else:
            yield processes, [PROGRAMS[arguments[0]], *arguments[1:]]


def recite(ids):
    texts = json.loads(Path(os.environ["FAKE_TEXTS"]).read_text())
    for prompt, text in texts:
        if ids[: len(prompt)] == prompt:
            return text[len(ids) - len(prompt)]
    return 0


@pytest.fixture(scope="module")
def follow(tmp_path_factory):
    """Follow lines in a directory that keeps what they make; return what they print."""
    for module in ("rouge_score.rouge_scorer", "transformers.models.phi.modeling_phi"):
        import_module(module)  # once, and not in every fork
    base = tmp_path_factory.mktemp("guide")
    trained = demo.find("phi2")
    model = shutil.copytree(trained.directory, base / "phi-model")
    config = json.loads((model / "config.json").read_text())
    # The guide's engine is for 2048 tokens; the demo model's rotary embedding has no table.
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    programs = base / "bin"
    programs.mkdir()
    builder = Path(__file__).with_name("builder.py").read_text()
    (programs / "trtllm-build").write_text(builder.replace("PYTHON", sys.executable, 1))
    (programs / "trtllm-build").chmod(0o755)
    tokenizer = find_tokenizer(model, None)
    stop = min(stop_ids(model, tokenizer))
    texts = [
        (tokenizer.encode(prompt_text(a.text)), [*tokenizer.encode(f" {a.reference}"), stop])
        for a in trained.articles[:20]
    ]
    (base / "texts").write_text(json.dumps(texts))
    site = fake_trtllm.install(base / "site", "1.2.1")
    source = inspect.getsource(recite).replace("def recite", "def next_token")
    runtime = site / "tensorrt_llm" / "runtime.py"
    arithmetic = inspect.getsource(fake_trtllm.next_token)
    runtime.write_text(runtime.read_text().replace(arithmetic, source))
    environment = {
        "PATH": f"{programs}:/usr/bin:/bin",
        "HOME": str(base),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "FAKE_RECORD": str(base),
        "FAKE_LOG": str(base / "log"),
        "FAKE_TEXTS": str(base / "texts"),
    }

    def run(lines):
        place = base / "lines"
        place.mkdir(exist_ok=True)
        printed = ""
        for processes, words in commands(lines.replace("/path/to/", f"{base}/")):
            variables = environment | {"FAKE_COMM": tempfile.mkdtemp(dir=base)}
            if processes > 1:
                variables["OMPI_COMM_WORLD_SIZE"] = str(processes)
            started = []
            for rank in range(processes):
                if processes > 1:
                    variables["OMPI_COMM_WORLD_RANK"] = str(rank)
                started.append(Fork(words, place, variables, [site]))
            for done in [process.wait() for process in started]:
                assert done.returncode == 0, (
                    f"{words}\n{done.stdout.decode()}\n{done.stderr.decode()}"
                )
                printed += done.stdout.decode()
        return printed

    return run


def as_phireg(lines):
    """The lines with phireg's commands for the guide's programs, and one blank for several."""
    for program, command in (
        ("python ./convert_checkpoint.py", "convert"), ("trtllm-build", "build"),
        ("python3 ../summarize.py", "summarize"),
        ("python3 ../quantization/quantize.py", "quantize"),
        ("python3 postprocess_quant_checkpoint.py", "postprocess"),
    ):  # fmt: skip
        lines = lines.replace(program, f"phireg {command}")
    return " ".join(lines.replace("\\\n", " ").split())


@pytest.mark.parametrize(
    "lines",
    [
        *(CONVERT, BUILD, SUMMARIZE, SUMMARIZE_TP, FP8),
        INT8.replace("./phi3-checkpoint", "./phi3-checkpoint-int8").replace("DTYPE=bfloat16\n", ""),
    ],
)
def test_the_page_has_the_guides_lines(lines):
    assert as_phireg(lines) in map(as_phireg, re.findall(SH, GUIDE, re.MULTILINE | re.DOTALL))


@pytest.mark.slow
def test_the_guides_lines_as_they_are_typed(follow):
    printed = follow(CONVERT + BUILD + SUMMARIZE)
    assert "passed  tensorrt-llm" in printed
    done = {as_phireg(lines) for lines in (CONVERT, BUILD, SUMMARIZE, SUMMARIZE_TP)}
    blocks = re.findall(SH, GUIDE.partition("\n## 5.")[0], re.MULTILINE | re.DOTALL)
    # What the guide only tells of: ranks, attention, dummy weights, run; and the executor.
    others = [block for block in blocks if as_phireg(block) not in done]
    assert len(others) >= 6
    follow("\n".join(others))
    assert "passed  tensorrt-llm" in follow(SUMMARIZE_TP)
