"""No module opens a file itself: ``phireg.files`` has the one opener of what others made.

A call that opens, copies or maps a file must lie in ``phireg.files`` or be listed here with the
reason why the file cannot be somebody else's, or was opened before.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CALLS = {
    *("open", "fdopen", "read_text", "safe_open", "mmap", "memmap", "fromfile", "ZipFile"),
    *("copyfile", "copy2", "copytree", "copyfileobj", "cmp", "from_pretrained", "load_dataset"),
    *("read_table", "ParquetFile", "load_file", "load_json", "FileLoader"),
}
OF = {"load": {"torch", "np", "numpy", "json", "pickle"}, "open": {"os", "io", "gzip", "Image"}}
"""Names of functions that also mean other things, and the modules in which they open files."""

ALLOWED = {
    "phireg/checkpoint/rankfiles.py": {"mmap": "the descriptor is the opener's"},
    "phireg/children.py": {"open": "its own pipe, the null device and the system's /proc"},
    "phireg/cli/streams.py": {"open": "the null device"},
    "phireg/conversion/stream.py": {"open": "creates a rank file exclusively"},
    "phireg/data/formats.py": dict.fromkeys(
        ("load", "ParquetFile"), "the content, which was read before"
    ),
    "phireg/data/rows.py": {
        "load_dataset": "a directory or repository that the user names",
    },
    "phireg/data/samples.py": {"read_text": "text of this package"},
    "phireg/device.py": {"read_text": "the system's /proc"},
    "phireg/executor/model.py": {"read_text": "the system's /proc"},
    "phireg/generation/tokenizer_files.py": {
        "from_pretrained": "check_loadable opened the files before"
    },
    "phireg/scaffold/__init__.py": {"read_text": "templates of this package"},
    "phireg/source/torchbin.py": {
        "ZipFile": "list_bin opened the file before",
        "open": "a member of the archive",
        "load": "list_bin opened the file before, and the file holds no code that runs",
    },
    "phireg/tensorrt/build.py": {"read_text": "what its own child wrote into its own directory"},
    "phireg/tensorrt/compiler.py": {
        "read_text": "the job that its parent wrote",
        "open": "writes an engine",
    },
    "phireg/tensorrt/package.py": {"mmap": "the descriptor is the opener's"},
    "phireg/testing/": {
        "open": "writes a test's own directory",
        "copyfile": "a test's own directory",
        "read_bytes": "a test's own directory",
    },
    "phireg/trtllm/builder.py": {"open": "the program that it starts"},
    "phireg/verification/server.py": {"open": "a request over HTTP, bounded there"},
    "plugins/phi3_small/tokenizer.py": {"read_bytes": "check_loadable opened the files before"},
}


def opens(call: ast.Call) -> str:
    """The name of a call that opens a file; an empty string for others."""
    function = call.func
    if isinstance(function, ast.Name):
        return function.id if function.id in CALLS else ""
    if not isinstance(function, ast.Attribute):
        return ""
    name, of = function.attr, getattr(function.value, "id", "")
    if name == "read_bytes":
        return "" if call.args else name  # RankFile.read_bytes has an offset and a count
    if name == "open":
        # Without arguments it opens a source, a backend, a browser.
        return name if of in OF["open"] or call.args or call.keywords else ""
    if name == "load":
        return name if of in OF["load"] else ""
    return name if name in CALLS else ""


def found(text: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and (name := opens(node)):
            yield name, node.lineno


def test_only_files_opens_files():
    used = {place: set() for place in ALLOWED}
    wrong = []
    for folder in ("phireg", "plugins"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            shown = path.relative_to(ROOT).as_posix()
            if shown.startswith("phireg/files/"):
                continue
            place = next((place for place in ALLOWED if shown.startswith(place)), None)
            for name, line in found(path.read_text()):
                if place is None or name not in ALLOWED[place]:
                    wrong.append(f"{shown}:{line}: {name}")
                else:
                    used[place].add(name)
    assert not wrong, "use phireg.files.regular, or give a reason above"
    assert used == {place: set(reasons) for place, reasons in ALLOWED.items()}


@pytest.mark.parametrize(
    "text",
    [
        "open('x')",
        "path.open('rb')",
        "path.open(mode='rb')",
        "os.open(path, 0)",
        "path.read_text()",
        "path.read_text(encoding='utf-8')",
        "path.read_bytes()",
        "json.load(file)",
        "np.load('x')",
        "torch.load('x', weights_only=True)",
        "safe_open(path, 'np')",
        "mmap.mmap(0, 0)",
        "shutil.copyfile(a, b)",
        "AutoTokenizer.from_pretrained('x')",
    ],
)
def test_what_opens_a_file_is_seen(text):
    assert list(found(text))


@pytest.mark.parametrize("text", ["source.open()", "file.read_bytes(0, 3)", "registry.load(name)"])
def test_what_opens_none_is_not(text):
    assert not list(found(text))
