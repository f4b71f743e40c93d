"""A stand-in for tensorrt_llm and mpi4py, as far as their documented interface is used.

``install`` writes both as importable packages. The runner's model is arithmetic: the token after a
text is the sum of its tokens, each times its place, modulo the vocabulary; with beams, every beam
but the first has one added to each token.
"""

import inspect
import json
from pathlib import Path

VOCAB = 50
"""Of the model; logits have 14 columns more, as a vocabulary padded for its ranks."""


def next_token(ids):
    return sum(token * (n + 1) for n, token in enumerate(ids)) % VOCAB


def continued(prompt, count, stops=()):
    ids = list(prompt)
    for _ in range(count):
        token = next_token(ids)
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


RUNTIME = '''
import json, os, sys
from pathlib import Path
import torch

print("[TensorRT-LLM] TensorRT-LLM version: RELEASE")  # the real one does so, too
os.write(1, b"[TensorRT-LLM][INFO] noise of C++\\n")
VOCAB, PADDED, LENGTH = 50, 64, 48
LOG = Path(os.environ["FAKE_LOG"])

NEXT_TOKEN


def note(**facts):
    with LOG.open("a") as file:
        file.write(json.dumps(facts) + "\\n")


class _Runner:
    def __init__(self, rank, gathers):
        self.rank, self.gathers = rank, gathers

    def _generate(self, batch_input_ids, *, max_new_tokens, end_id, pad_id, num_beams=1,
                  stop_words_list=None, streaming=False, return_dict=False,
                  output_sequence_lengths=False, **sampling):
        assert all(t.dtype == torch.int32 and t.dim() == 1 for t in batch_input_ids)
        assert return_dict and output_sequence_lengths
        note(rank=self.rank, call="generate", rows=[t.tolist() for t in batch_input_ids],
             max_new_tokens=max_new_tokens, end_id=end_id, pad_id=pad_id, num_beams=num_beams,
             stop_words_list=stop_words_list, streaming=streaming, **sampling)
        if os.environ.get("FAKE_FAILS"):
            raise RuntimeError("out of pages")
        steps = self._steps(batch_input_ids, max_new_tokens, end_id, num_beams, stop_words_list)
        return steps if streaming else list(steps)[-1]

    def _steps(self, inputs, count, end_id, beams, stop_words):
        words = stop_words or [[] for _ in inputs]
        rows = [[t.tolist() for _ in range(beams)] for t in inputs]
        ended = [False] * len(rows)
        for _ in range(count):
            for index, row in enumerate(rows):
                if ended[index]:
                    continue
                token = next_token(row[0])
                stops = [word[0] for word in words[index]]
                if token == end_id:
                    ended[index] = True  # the end id is left out
                    continue
                ended[index] = token in stops  # a stop word stays
                for beam, ids in enumerate(row):
                    ids.append(token + beam)
            lengths = [[len(ids) for ids in row] for row in rows]
            padded = [[ids + [end_id] * (LENGTH - len(ids)) for ids in row] for row in rows]
            output = {
                "output_ids": torch.tensor(padded, dtype=torch.int32),
                "sequence_lengths": torch.tensor(lengths, dtype=torch.int32),
            }
            if self.gathers:
                output["context_logits"] = [logits(t.tolist()) for t in inputs]
            yield output
            if all(ended):
                return


def logits(ids):
    """Behind each token the next one has 3, the padding of the vocabulary 99, and all others 0."""
    table = torch.zeros(len(ids), PADDED, dtype=torch.float16)
    table[:, VOCAB:] = 99
    for n in range(len(ids)):
        table[n, next_token(ids[: n + 1])] = 3
    return table


def _load(engine_dir, rank, **options):
    config = json.loads((Path(engine_dir) / "config.json").read_text())
    if os.environ.get("FAKE_REFUSES"):
        raise ValueError("engine version mismatch")
    assert (Path(engine_dir) / f"rank{rank}.engine").is_file()
    os.write(1, b"loading\\n")
    return config["build_config"].get("gather_context_logits", False)


class ModelRunner(_Runner):
    @classmethod
    def from_dir(cls, engine_dir, *, max_output_len=None, rank=0, debug_mode=False,
                 stream=None, gpu_weights_percent=1, KNOB multi_block_mode=None):
        note(rank=rank, call="ModelRunner.from_dir", KNOBVALUE)
        return cls(rank, _load(engine_dir, rank))

    def generate(self, batch_input_ids, position_ids=None, sampling_config=None, streaming=False,
                 stopping_criteria=None, **kwargs):
        return self._generate(batch_input_ids, streaming=streaming, **kwargs)


class ModelRunnerCpp(_Runner):
    @classmethod
    def from_dir(cls, engine_dir, *, lora_dir=None, rank=0, max_batch_size=None,
                 max_input_len=None, max_output_len=None, max_beam_width=None,
                 kv_cache_free_gpu_memory_fraction=None, debug_mode=False, KNOB
                 gpu_weights_percent=1):
        note(rank=rank, call="ModelRunnerCpp.from_dir", KNOBVALUE)
        return cls(rank, _load(engine_dir, rank))

    def generate(self, batch_input_ids, *, position_ids=None, sampling_config=None, lora_uids=None,
                 streaming=False, stopping_criteria=None, max_new_tokens=1, end_id=None,
                 pad_id=None, bad_words_list=None, stop_words_list=None, return_dict=False,
                 output_sequence_lengths=False, **kwargs):
        if self.rank > 0:
            note(rank=self.rank, call="generate")
            return []  # only the leader enqueues requests
        return self._generate(batch_input_ids, streaming=streaming, max_new_tokens=max_new_tokens,
                              end_id=end_id, pad_id=pad_id, stop_words_list=stop_words_list,
                              return_dict=return_dict,
                              output_sequence_lengths=output_sequence_lengths, **kwargs)
'''

MPI = '''
import os, pickle, time
from pathlib import Path


class Comm:
    """Broadcasts through files, in order."""

    def __init__(self, name="world"):
        self.name, self.count, self.copies = name, 0, 0

    def Get_rank(self):
        return int(os.environ["OMPI_COMM_WORLD_RANK"])

    def Get_size(self):
        return int(os.environ["OMPI_COMM_WORLD_SIZE"]) + int(os.environ.get("FAKE_WORLD", "0"))

    def Dup(self):
        self.copies += 1
        return Comm(f"{self.name}-{self.copies}")

    def Abort(self, errorcode=0):
        Path(os.environ["FAKE_COMM"], "aborted").touch()
        os._exit(errorcode)

    def bcast(self, obj, root=0):
        assert self.name != "world", "TensorRT-LLM's own messages go there"
        path = Path(os.environ["FAKE_COMM"], f"{self.name}.{self.count}")
        self.count += 1
        if self.Get_rank() == root:
            path.with_suffix(".part").write_bytes(pickle.dumps(obj))
            path.with_suffix(".part").rename(path)
            return obj
        while not path.exists():
            time.sleep(0.01)
            if Path(os.environ["FAKE_COMM"], "aborted").exists():
                os._exit(1)
        return pickle.loads(path.read_bytes())


COMM_WORLD = Comm()
'''


def install(folder, release="0.17.0.post1", *, engines=True):
    """Write the packages into ``folder``, which is to be put on the path."""
    package = Path(folder) / "tensorrt_llm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    knob = tuple(map(int, release.split(".")[:2])) >= (0, 12)
    text = RUNTIME.replace("RELEASE", release).replace("NEXT_TOKEN", inspect.getsource(next_token))
    text = text.replace("KNOBVALUE", "fp32=enable_context_fmha_fp32_acc" if knob else "fp32='no'")
    text = text.replace("KNOB", "enable_context_fmha_fp32_acc=None," if knob else "")
    if engines:
        (package / "runtime.py").write_text(text)
    info = Path(folder) / f"tensorrt_llm-{release}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: {release}\n"
    (info / "METADATA").write_text(metadata)
    mpi = Path(folder) / "mpi4py"
    mpi.mkdir()
    (mpi / "__init__.py").write_text("")
    (mpi / "MPI.py").write_text(MPI)
    return Path(folder)


def engine(folder, ranks=1, *, run_options=None, paged="PAGED", **build):
    """An engine directory of a model with the vocabulary above."""
    directory = Path(folder)
    directory.mkdir(parents=True)
    pretrained = {
        "architecture": "Phi3ForCausalLM", "dtype": "float16", "vocab_size": VOCAB,
        "mapping": {"world_size": ranks, "tp_size": ranks, "pp_size": 1},
    }  # fmt: skip
    limits = {"max_batch_size": 4, "max_input_len": 20, "max_seq_len": 32, "max_beam_width": 3}
    plugins = {"gpt_attention_plugin": "float16", "remove_input_padding": True}
    build = {**limits, "kv_cache_type": paged, "plugin_config": plugins, **build}
    config = {"version": "0.17.0", "pretrained_config": pretrained, "build_config": build}
    (directory / "config.json").write_text(json.dumps(config))
    for rank in range(ranks):
        (directory / f"rank{rank}.engine").write_bytes(b"\0")
    if run_options is not None:
        (directory / "phireg-build.json").write_text(json.dumps({"run_options": run_options}))
    return directory
