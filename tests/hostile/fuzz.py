"""Fuzz the readers of ``helpers.hostile_readers`` with atheris, guided by coverage.

    python tests/hostile/fuzz.py SECONDS READER...    these readers
    python tests/hostile/fuzz.py SECONDS              all of them

Each reader has a process, and all run at the same time. Prints how many inputs were tried. What
breaks a reader is kept in ``--keep`` (default: beside the corpus), and the exit code is then not 0.
The corpus is in ``corpus/READER``.
"""

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
MEMORY_MB = 3000
INPUT_SECONDS = 30  # for one input; several readers and a busy machine share two cores

VALUES = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**25, 0.5, 1e308, 5e-324, "", "x", "\ud800"),
    *("../x", "\0", "a" * 2000, "F16", "BF16", "float16", "1" * 400, [], {}, [[]], [0], [None]),
    *({"a": {"b": 1}}, [1] * 50, ["x"] * 50, {"": 0}),
)


def places(value, place=()):
    yield place
    if isinstance(value, dict | list):
        keys = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            yield from places(value[key], (*place, key))


def changed(document, chance):
    """Replace, remove, copy or rename something somewhere."""
    place = chance.choice(list(places(document))[1:] or [()])
    if not place:
        return chance.choice(VALUES)
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    key = place[-1]
    kind = chance.randrange(5)
    if kind == 0:
        del inner[key]
    elif kind == 1 and isinstance(inner, dict):
        inner[chance.choice([*inner, "a", "", "weights", "tensors", "\ud800"])] = inner.pop(key)
    elif kind == 2:
        other = document
        for step in chance.choice(list(places(document))):
            other = other[step]
        inner[key] = json.loads(json.dumps(other))
    elif kind == 3 and type(inner[key]) in (int, float):
        inner[key] = chance.choice((-inner[key], inner[key] + 1, inner[key] * 2, 2**40))
    else:
        inner[key] = chance.choice(VALUES)
    return document


def mutate(data, most, seed):
    """Change the JSON of an input; bytes that are no JSON are changed as bytes."""
    import atheris

    chance = random.Random(seed)
    if chance.random() < 0.9:
        try:
            document = json.loads(data)
            for _ in range(chance.randrange(1, 4)):
                document = changed(document, chance)
            text = json.dumps(document).encode()
            if len(text) <= most:
                return text
        except (ValueError, RecursionError, TypeError, LookupError):
            pass
    return atheris.Mutate(data, most)


def fuzz(name, seconds, keep, root):
    """Fuzz one reader in this process, which ends."""
    import atheris
    from helpers.hostile_readers import PLANTED, READERS, check

    reader = {**READERS, "planted": PLANTED}[name]
    good = (root / "work" / reader.file).read_bytes()
    new = root / "new"
    new.mkdir()
    (new / "good").write_bytes(reader.part(good))
    (CORPUS / name).mkdir(exist_ok=True)
    work = root / "work"  # apart from the corpus, whose files come and go
    options = [
        *("-print_final_stats=1", "-verbosity=0", "-max_len=200000", "-len_control=0"),
        *(f"-max_total_time={seconds}", f"-timeout={INPUT_SECONDS}"),
        *(f"-rss_limit_mb={MEMORY_MB}", f"-artifact_prefix={keep}/{name}-"),
    ]

    check(reader, work, good, reader.part(good))  # imports what the first file needs

    def one(data):
        check(reader, work, good, bytes(data))

    atheris.Setup([sys.argv[0], *options, str(new), str(CORPUS / name)], one, custom_mutator=mutate)
    atheris.Fuzz()


def started(name, seconds, keep, root):
    """Start a process that fuzzes one reader; give its id. It has what is imported already."""
    if process := os.fork():
        return process
    output = os.open(root / "output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    fuzz(name, seconds, keep, root)
    sys.exit("the fuzzer has not ended the process")


def tried(output):
    """The number of inputs that a process says it tried."""
    found = re.search(r"number_of_executed_units: (\d+)", output)
    return int(found[1]) if found else 0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("seconds", type=int)
    parser.add_argument("readers", nargs="*")
    parser.add_argument("--keep", type=Path, default=CORPUS / "new")
    asked = parser.parse_args()
    asked.keep.mkdir(parents=True, exist_ok=True)
    import atheris

    with atheris.instrument_imports(include=["phireg", "helpers.hostile_readers"]):
        from helpers.hostile_readers import READERS, models

    made = models(Path(tempfile.mkdtemp(prefix="fuzz-")))
    running = {}
    for name in asked.readers or READERS:
        root = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
        shutil.copytree(made, root / "work")
        running[name] = root, started(name, asked.seconds, asked.keep.absolute(), root)
    failed = False
    for name, (root, process) in running.items():
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        failed |= code != 0
        output = (root / "output").read_text(errors="replace")
        print(f"{name:20} {tried(output):10,} inputs, exit code {code}")
        if code:
            print(output[-3000:])
    sys.exit(failed)


if __name__ == "__main__":
    main()
