"""Who may import whom. An arrow that points the wrong way fails, with its place and the rule.

The core stays importable without torch, the plan without plugins, the executor without anything of
the converter whose work it verifies, and a plugin needs nothing but phireg.api.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"phireg": "phireg", "phireg_plugins": "plugins"}
ANYTHING = "*"


@dataclass(frozen=True)
class Rule:
    """What a package may import besides itself and the standard library.

    A name stands for the module and everything below it.
    """

    always: tuple[str, ...] = ()
    lazily: tuple[str, ...] = ()
    """Inside functions only (and for type checkers)."""
    typing: tuple[str, ...] = ()
    """Under ``if TYPE_CHECKING`` only."""
    never: tuple[str, ...] = ()
    """Exceptions to the above."""


ERRORS, FINDINGS, DTYPES = "phireg.errors", "phireg.findings", "phireg.dtypes"
RANGES = "phireg.ranges"
FILES = "phireg.files"
TARGETS, FORMATS = "phireg.targets", "phireg.formats"
LAYOUT, CONFIG, READER = "phireg.layout", "phireg.config", "phireg.reader"
SOURCE, CHECKPOINT, PLANNING = "phireg.source", "phireg.checkpoint", "phireg.planning"
PLANNED = (PLANNING, SOURCE, CHECKPOINT, READER, FILES, ERRORS)
STATISTICS = "phireg.calibration.statistics"
DESCRIBE = (LAYOUT, CONFIG, READER, FINDINGS, ERRORS, "pluggy")
"""What families are described with."""
ABOVE = ("phireg.cli", "phireg.report", "phireg_plugins")
"""What no package below the command line may import."""

RULES = {
    ERRORS: Rule(),
    "phireg.children": Rule((ERRORS,)),
    FINDINGS: Rule((ERRORS,)),
    RANGES: Rule(),
    DTYPES: Rule(lazily=("numpy", "torch"), typing=("numpy", "torch")),
    LAYOUT: Rule((FINDINGS, ERRORS)),
    CONFIG: Rule((LAYOUT, FINDINGS, RANGES, ERRORS)),
    FORMATS: Rule(),
    READER: Rule((FILES, RANGES, ERRORS, DTYPES, FORMATS)),
    FILES: Rule((ERRORS, DTYPES, "safetensors", "xxhash")),
    SOURCE: Rule(
        (FILES, LAYOUT, DTYPES, ERRORS, FINDINGS, "phireg.children", "numpy", "xxhash"),
        lazily=("torch", "huggingface_hub"),
    ),
    "phireg.hookspecs": Rule(DESCRIBE),
    "phireg.family": Rule((*DESCRIBE, "phireg.hookspecs")),
    TARGETS: Rule((LAYOUT, CONFIG, READER, FILES, FORMATS, ERRORS)),
    "phireg.registry": Rule(
        (*DESCRIBE, "phireg.hookspecs", "phireg.family", f"{TARGETS}.target", "phireg.children")
    ),
    "phireg.api": Rule((*DESCRIBE, TARGETS, "phireg.hookspecs", "phireg.family")),
    "phireg.device": Rule((ERRORS, "torch")),
    PLANNING: Rule(
        (*DESCRIBE, SOURCE, FILES, RANGES, DTYPES, "phireg.registry", FORMATS, TARGETS),
        typing=("phireg.family",),
    ),
    CHECKPOINT: Rule(
        (READER, SOURCE, FILES, FINDINGS, RANGES, DTYPES, ERRORS, "numpy", "safetensors", "xxhash"),
        lazily=("torch",),
    ),
    "phireg.executor.cuda.kernels": Rule(("triton",)),
    "phireg.executor.cuda.products": Rule(("triton", "phireg.executor.cuda.kernels")),
    "phireg.executor.cuda": Rule(("phireg.executor", READER, "torch", "triton")),
    "phireg.executor": Rule(
        (
            *(READER, CHECKPOINT, FILES, DTYPES, ERRORS, "phireg.formats"),
            *("torch", "numpy", "safetensors"),
        )
    ),
    "phireg.reference": Rule(
        (SOURCE, FILES, "phireg.family", DTYPES, ERRORS, "torch"),
        ("transformers",),
        never=("phireg.source.readings",),
    ),
    "phireg.data": Rule(
        (FILES, ERRORS, "xxhash"), lazily=("huggingface_hub", "datasets", "numpy", "pyarrow")
    ),
    STATISTICS: Rule((FILES, ERRORS, "numpy", "safetensors")),
    "phireg.calibration": Rule(
        ("phireg", "numpy", "torch", "xxhash"), ("transformers",), never=ABOVE
    ),
    "phireg.conversion": Rule(
        (*PLANNED, STATISTICS, FINDINGS, DTYPES, FORMATS, TARGETS, "numpy", "xxhash"),
        lazily=("torch", "phireg.device", "phireg.calibration"),
    ),
    "phireg.migration": Rule(
        (
            *PLANNED,
            LAYOUT,
            CONFIG,
            DTYPES,
            FINDINGS,
            TARGETS,
            "phireg.registry",
            "phireg.conversion",
            "phireg.verification",
            "numpy",
        )
    ),
    "phireg.generation": Rule(
        (
            *("phireg.executor", "phireg.reference", "phireg.registry", "phireg.data"),
            *("phireg.device", "phireg.children"),
            *(SOURCE, CHECKPOINT, CONFIG, READER, FILES, DTYPES, ERRORS, "torch", "packaging"),
        ),
        lazily=("transformers", "jinja2", "mpi4py", "sentencepiece", "tokenizers"),
    ),
    "phireg.postprocessing": Rule(
        (
            *(*PLANNED, LAYOUT, CONFIG, DTYPES, "phireg.conversion", "phireg.registry"),
            *("numpy", "xxhash"),
        ),
        typing=("phireg.family",),
    ),
    "phireg.trtllm": Rule(
        (
            *(*PLANNED, "phireg.executor", "phireg.generation", "phireg.registry"),
            *("phireg.children", "packaging", "torch"),
        ),
        lazily=("tensorrt_llm",),
    ),
    # What describes networks reads the spec and rank files; it shares no arithmetic with the
    # executor, which they are compared with.
    **dict.fromkeys(
        (f"phireg.tensorrt.{name}" for name in ("network", "linears", "mlp", "parameters")),
        Rule(
            (
                *(f"phireg.tensorrt.{name}" for name in ("graph", "linears", "mlp")),
                *("phireg.tensorrt.parameters", "phireg.tensorrt.package"),
                *(READER, DTYPES, ERRORS, "torch"),
            )
        ),
    ),
    "phireg.tensorrt": Rule(
        (
            *("phireg.trtllm", "phireg.generation", "phireg.executor", "phireg.registry"),
            *(*PLANNED, DTYPES, "phireg.children", "phireg.device", "torch", "xxhash"),
        ),
        lazily=("tensorrt", "tensorrt_rtx_bindings"),
    ),
    "phireg.verification": Rule(("phireg", "numpy", "torch"), ("transformers",), never=ABOVE),
    "phireg.quality": Rule(("phireg", "numpy", "torch"), never=ABOVE),
    "phireg.summarization": Rule(("phireg", "numpy"), lazily=("rouge_score",), never=ABOVE),
    "phireg.report": Rule(
        (
            *("phireg.verification", "phireg.quality", "phireg.summarization"),
            *(FILES, ERRORS, "jinja2"),
        )
    ),
    "phireg.demo": Rule(("phireg",), lazily=("torch",), never=ABOVE),
    "phireg.doctor": Rule(
        ("phireg.registry", "phireg.trtllm", "phireg.tensorrt.package", "phireg.children", ERRORS)
    ),
    "phireg.scaffold": Rule(
        (*DESCRIBE, "phireg.hookspecs", "phireg.family", "phireg.registry", FILES)
    ),
    "phireg.testing": Rule(
        ("phireg", "numpy", "torch", "safetensors", "pytest"),
        lazily=("transformers",),
        never=("phireg.cli", "phireg.report"),
    ),
    "phireg.cli": Rule(
        (
            *(DTYPES, ERRORS, FINDINGS, RANGES, "phireg.files.sizes", "phireg.planning.report"),
            *("phireg.children", FORMATS, "click"),
        ),
        lazily=(ANYTHING,),
        never=("phireg_plugins",),
    ),
    "phireg.__main__": Rule(("phireg.cli",)),
}

PLUGIN = Rule(("phireg.api",))
PLUGIN_MODELS = Rule(("phireg.api", "torch", "transformers", "tokenizers"))
"""A plugin's reference model and tokenizer, which are imported only where they are run."""
MODEL_FILES = ("reference", "reference_config", "tokenizer")


@dataclass(frozen=True)
class Import:
    """One import: the module it needs, and where it stands."""

    module: str
    line: int
    place: str  # "module", "function" or "typing"


def below(module: str, package: str) -> bool:
    return package == ANYTHING or module == package or module.startswith(f"{package}.")


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    for package, folder in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            names = path.relative_to(root / folder).with_suffix("").parts
            yield ".".join((package, *(name for name in names if name != "__init__"))), path


def rule_for(module: str) -> tuple[str, Rule] | None:
    """The package a module belongs to and its rule; nothing for a package without one."""
    if module == "phireg":
        return module, Rule(lazily=(ANYTHING,))
    if module in FOLDERS:
        return module, Rule()
    if below(module, "phireg_plugins"):
        package = ".".join(module.split(".")[:2])
        return package, PLUGIN_MODELS if module.rpartition(".")[2] in MODEL_FILES else PLUGIN
    return next(
        ((package, rule) for package, rule in RULES.items() if below(module, package)), None
    )


def imports(tree: ast.Module, module: str, is_package: bool, known: set[str]) -> Iterator[Import]:
    def walk(node: ast.AST, place: str) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, place)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join((*package, base) if base else package)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(inner if inner in known else base, node.lineno, place)
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in {"import_module", "__import__"}:
                name = node.args[0].value if isinstance(node.args[0], ast.Constant) else ANYTHING
                yield Import(str(name), node.lineno, place)
        for child in ast.iter_child_nodes(node):
            inside = place
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                inside = "function"
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                inside = "typing" if child in node.body else place
            yield from walk(child, inside)

    return walk(tree, "module")


def allowed(found: Import, package: str, rule: Rule) -> bool:
    top = found.module.split(".")[0]
    if top in sys.stdlib_module_names or found.module == "phireg" or below(found.module, package):
        return True
    if any(below(found.module, name) for name in rule.never):
        return False
    if package.startswith("phireg_plugins.") and top == "phireg_plugins":
        # Another plugin's FAMILY, which its package offers; not its inside.
        return found.module.count(".") == 1
    names = rule.always
    if found.place != "module":
        names += rule.lazily
    if found.place == "typing":
        names += rule.typing
    return any(below(found.module, name) for name in names)


def violations(root: Path) -> list[str]:
    """Every wrong arrow, as ``file:line: what is wrong``."""
    files = dict(modules(root))
    wrong = []
    for module, path in files.items():
        shown = path.relative_to(root)
        found = rule_for(module)
        if found is None:
            wrong.append(f"{shown}:1: {module} has no rule; give it one in {Path(__file__).name}")
            continue
        package, rule = found
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for item in imports(tree, module, path.name == "__init__.py", set(files)):
            if not allowed(item, package, rule):
                place = {"module": "", "function": " in a function", "typing": " for typing"}
                wrong.append(
                    f"{shown}:{item.line}: {package} may not import {item.module}"
                    f"{place[item.place]}; {rule}"
                )
    return wrong


def test_every_arrow_points_the_right_way() -> None:
    assert violations(ROOT) == []


def test_there_is_no_rule_for_nothing() -> None:
    """A renamed package must not leave its rule behind."""
    present = {module for module, _ in modules(ROOT)}
    assert set(RULES) - present == set()


# The checker itself


def plant(root: Path, path: str, text: str) -> list[str]:
    packages = ("phireg", "phireg/layout", "phireg/planning", "plugins", "plugins/phi2")
    files = {f"{package}/__init__.py": "" for package in packages}
    files |= {"phireg/layout/spans.py": "", "plugins/phi2/config.py": "", path: text}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return violations(root)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("phireg/layout/x.py", "def f():\n    import numpy"),
        ("phireg/layout/x.py", "from phireg.planning import build"),
        ("phireg/layout/x.py", "from phireg import planning"),
        ("phireg/layout/x.py", "from ..planning import build"),
        ("phireg/layout/__init__.py", "from .. import planning"),
        ("phireg/layout/x.py", "import json, pluggy"),
        ("phireg/layout/x.py", "try:\n    import torch\nexcept ImportError:\n    pass"),
        ("phireg/layout/x.py", "class A:\n    import torch"),
        ("phireg/layout/x.py", "import importlib\ntorch = importlib.import_module('torch')"),
        ("phireg/layout/x.py", "def f(name):\n    return __import__(name)"),
        ("phireg/source/x.py", "import torch"),
        ("phireg/planning/x.py", "def f():\n    from phireg.family import Family"),
        ("phireg/planning/x.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import phireg.family"),
        ("phireg/executor/x.py", "from phireg.layout.spans import shard"),
        ("phireg/verification/x.py", "def f():\n    from phireg.cli import main"),
        ("phireg/cli/x.py", "def f():\n    from phireg_plugins.phi2 import FAMILY"),
        ("phireg/new/__init__.py", ""),
        ("phireg/new.py", ""),
        ("plugins/phi3/__init__.py", "from phireg.layout.spans import shard"),
        ("plugins/phi3/__init__.py", "from phireg_plugins.phi2 import config"),
        ("plugins/phi3/__init__.py", "from ..phi2 import config"),
        ("plugins/phi3/weights.py", "def f():\n    import torch"),
        ("plugins/phi3/reference.py", "from phireg.executor import run"),
        ("plugins/__init__.py", "from phireg.api import Family"),
    ],
)
def test_the_checker_sees(path: str, text: str, tmp_path: Path) -> None:
    (violation,) = plant(tmp_path, path, text)
    assert violation.startswith(f"{path}:")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "phireg/layout/x.py",
            "import json\nfrom phireg.layout.spans import x\nfrom . import spans",
        ),
        ("phireg/source/x.py", "import numpy\ndef f():\n    import torch.serialization"),
        ("phireg/planning/x.py", "if TYPE_CHECKING:\n    from phireg.family import Family"),
        (
            "phireg/cli/x.py",
            "import click\ndef f():\n    from phireg import device\n    import rich",
        ),
        ("plugins/phi3/__init__.py", "from phireg_plugins.phi2 import FAMILY\nimport phireg.api"),
        ("plugins/phi3/__init__.py", "from phireg_plugins.phi3 import config"),
        ("plugins/phi3/reference.py", "import torch"),
    ],
)
def test_the_checker_lets_pass(path: str, text: str, tmp_path: Path) -> None:
    assert plant(tmp_path, path, text) == []


def test_the_checker_shows_the_line_and_the_module(tmp_path: Path) -> None:
    (violation,) = plant(tmp_path, "phireg/reader/x.py", "import json\n\nimport torch\n")
    assert violation.startswith("phireg/reader/x.py:3: phireg.reader may not import torch")


# What really gets imported

HEAVY = {"torch", "transformers", "tokenizers", "numpy", "huggingface_hub", "rich"}
PLUGINS = sorted(
    f"phireg_plugins.{path.parent.name}" for path in (ROOT / "plugins").glob("*/__init__.py")
)


@pytest.mark.parametrize("module", ["phireg", "phireg.api", "phireg.registry", *PLUGINS])
def test_a_fresh_interpreter_stays_light(module: str) -> None:
    code = f"import sys, {module}; print(*({{name.split('.')[0] for name in sys.modules}}))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert HEAVY & set(ran.stdout.split()) == set()
