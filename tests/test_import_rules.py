"""Who may import whom. An arrow that points the wrong way fails, with its place and the rule.

The core stays importable without torch, the plan without plugins, the executor without anything of
the converter it has to witness against, and a plugin needs nothing but phireg.api.
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


LAYOUT, CONFIG, QUANT = "phireg.layout", "phireg.config", "phireg.quant"
CHECKPOINT, PLAN = "phireg.checkpoint", "phireg.plan"
STATISTICS = "phireg.calibration.statistics"
ERRORS, FINDINGS = "phireg.errors", "phireg.findings"
DESCRIBE = (LAYOUT, CONFIG, QUANT, FINDINGS, ERRORS, "pluggy")
"""What families are described with."""

RULES = {
    ERRORS: Rule(),
    FINDINGS: Rule(),
    LAYOUT: Rule((ERRORS,)),
    CONFIG: Rule((LAYOUT, FINDINGS, ERRORS)),
    QUANT: Rule((LAYOUT, ERRORS)),
    CHECKPOINT: Rule((LAYOUT, ERRORS, "numpy", "xxhash"), lazily=("torch", "huggingface_hub")),
    PLAN: Rule((LAYOUT, CONFIG, CHECKPOINT, QUANT, FINDINGS, ERRORS), typing=("phireg.family",)),
    "phireg.hookspecs": Rule(DESCRIBE),
    "phireg.family": Rule((*DESCRIBE, "phireg.hookspecs")),
    "phireg.declared": Rule(),
    "phireg.registry": Rule((*DESCRIBE, "phireg.hookspecs", "phireg.family")),
    "phireg.api": Rule((*DESCRIBE, "phireg.hookspecs", "phireg.family")),
    "phireg.page": Rule((ERRORS,)),
    "phireg.calibration.statistics": Rule((ERRORS, "numpy", "safetensors")),
    "phireg.calibration.data": Rule(
        ("phireg.calibration.settings", "phireg.text", ERRORS, "xxhash"), ("huggingface_hub",)
    ),
    "phireg.calibration": Rule(
        ("phireg", "numpy", "torch", "xxhash"),
        ("transformers",),
        never=("phireg.cli", "phireg_plugins"),
    ),
    "phireg.reference": Rule(
        ("phireg", "torch"), ("transformers",), never=("phireg.cli", "phireg_plugins")
    ),
    "phireg.runner": Rule(
        (CHECKPOINT, PLAN, QUANT, STATISTICS, FINDINGS, ERRORS, "numpy", "xxhash"),
        lazily=("torch",),
    ),
    "phireg.executor.kernels": Rule(("triton",)),
    "phireg.executor.launch": Rule(("phireg.executor", "torch", "triton")),
    "phireg.executor": Rule((ERRORS, "torch", "numpy", "safetensors")),
    "phireg.text": Rule(
        (CHECKPOINT, "phireg.registry", ERRORS),
        lazily=("transformers", "jinja2", "datasets", "pyarrow"),
    ),
    "phireg.backends": Rule(
        ("phireg.executor", "phireg.trtllm", ERRORS, "torch"),
        lazily=(
            *(CHECKPOINT, CONFIG, "phireg.reference", "phireg.registry"),
            *("transformers", "tensorrt_llm", "mpi4py"),
        ),
    ),
    "phireg.postprocess": Rule(
        (LAYOUT, CHECKPOINT, PLAN, QUANT, ERRORS, "numpy", "xxhash"), typing=("phireg.family",)
    ),
    "phireg.jobs": Rule(("phireg",), lazily=("torch",), never=("phireg.cli",)),
    "phireg.demo": Rule(("phireg",), lazily=("torch",), never=("phireg.cli", "phireg_plugins")),
    "phireg.scaffold": Rule(
        (
            *(*DESCRIBE, "phireg.hookspecs", "phireg.family", "phireg.registry"),
            "phireg.runner.directory",
        )
    ),
    "phireg.testing": Rule(
        ("phireg", "numpy", "torch", "pytest"),
        lazily=("transformers", "safetensors"),
        never=("phireg.cli",),
    ),
    "phireg.verify": Rule(
        ("phireg", "numpy", "torch"), ("transformers",), never=("phireg.cli", "phireg_plugins")
    ),
    "phireg.quality": Rule(("phireg", "numpy", "torch"), never=("phireg.cli", "phireg_plugins")),
    "phireg.doctor": Rule(("phireg.registry", "phireg.trtllm", ERRORS)),
    "phireg.trtllm": Rule((CHECKPOINT, ERRORS, "packaging")),
    "phireg.summarize": Rule(
        ("phireg", "numpy"), lazily=("rouge_score",), never=("phireg.cli", "phireg_plugins")
    ),
    "phireg.cli": Rule(
        (ERRORS, FINDINGS, "phireg.plan.report", "click"),
        lazily=(ANYTHING,),
        never=("phireg_plugins",),
    ),
    "phireg.__main__": Rule(("phireg.cli",)),
}

PLUGIN = Rule(("phireg.api",))
PLUGIN_MODELS = Rule(("phireg.api", "torch", "transformers", "tokenizers"))
"""A plugin's reference model and tokenizer, which are imported only where they are run."""
MODEL_FILES = (["reference"], ["reference_config"], ["tokenizer"])


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
    if module in FOLDERS:
        return module, Rule()
    if below(module, "phireg_plugins"):
        package = ".".join(module.split(".")[:2])
        return package, PLUGIN_MODELS if module.split(".")[2:3] in MODEL_FILES else PLUGIN
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
    files = {
        "phireg/__init__.py": "",
        "phireg/layout/__init__.py": "",
        "phireg/layout/spans.py": "",
        "phireg/plan/__init__.py": "",
        "plugins/__init__.py": "",
        "plugins/phi2/__init__.py": "",
        "plugins/phi2/config.py": "",
        path: text,
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return violations(root)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("phireg/layout/x.py", "import torch"),
        ("phireg/layout/x.py", "def f():\n    import numpy"),
        ("phireg/layout/x.py", "from phireg.plan import build"),
        ("phireg/layout/x.py", "from phireg import plan"),
        ("phireg/layout/x.py", "from ..plan import build"),
        ("phireg/layout/x.py", "from .. import plan"),
        ("phireg/layout/__init__.py", "from ..plan import build"),
        ("phireg/layout/x.py", "import json, pluggy"),
        ("phireg/layout/x.py", "try:\n    import torch\nexcept ImportError:\n    pass"),
        ("phireg/layout/x.py", "class A:\n    import torch"),
        ("phireg/layout/x.py", "import importlib\ntorch = importlib.import_module('torch')"),
        ("phireg/layout/x.py", "def f(name):\n    return __import__(name)"),
        ("phireg/config/x.py", "import phireg.family"),
        ("phireg/checkpoint/x.py", "import torch"),
        ("phireg/checkpoint/x.py", "import transformers"),
        ("phireg/checkpoint/x.py", "from phireg.plan import build"),
        ("phireg/quant/x.py", "def f():\n    import torch"),
        ("phireg/plan/x.py", "from phireg.family import Family"),
        ("phireg/plan/x.py", "def f():\n    from phireg.family import Family"),
        ("phireg/plan/x.py", "if TYPE_CHECKING:\n    from phireg.registry import load"),
        (
            "phireg/plan/x.py",
            "if TYPE_CHECKING:\n    pass\nelse:\n    from phireg.family import Family",
        ),
        ("phireg/plan/x.py", "from phireg.runner import run"),
        ("phireg/family.py", "from phireg.plan import build"),
        ("phireg/api.py", "import phireg.registry"),
        ("phireg/runner/x.py", "import torch"),
        ("phireg/runner/x.py", "from phireg.family import Family"),
        ("phireg/executor/x.py", "from phireg.layout.spans import shard"),
        ("phireg/executor/x.py", "import transformers"),
        ("phireg/jobs.py", "import torch"),
        ("phireg/jobs.py", "def f():\n    from phireg.cli import main"),
        ("phireg/jobs.py", "import phireg_plugins.phi2"),
        ("phireg/cli/x.py", "import rich"),
        ("phireg/cli/x.py", "from phireg.plan import build"),
        ("phireg/cli/x.py", "def f():\n    from phireg_plugins.phi2 import FAMILY"),
        ("phireg/new/__init__.py", ""),
        ("phireg/new.py", ""),
        ("plugins/phi3/__init__.py", "from phireg.layout.spans import shard"),
        ("plugins/phi3/__init__.py", "from phireg_plugins.phi2.config import FIELDS"),
        ("plugins/phi3/__init__.py", "from phireg_plugins.phi2 import config"),
        ("plugins/phi3/__init__.py", "from ..phi2 import config"),
        ("plugins/phi3/__init__.py", "import torch"),
        ("plugins/phi3/weights.py", "def f():\n    import torch"),
        ("plugins/phi3/reference.py", "from phireg.executor import run"),
        ("plugins/__init__.py", "from phireg.api import Family"),
    ],
)
def test_the_checker_sees(path: str, text: str, tmp_path: Path) -> None:
    found = plant(tmp_path, path, text)
    assert len(found) == 1, found
    assert found[0].startswith(f"{path}:")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "phireg/layout/x.py",
            "import json\nfrom phireg.layout.spans import x\nfrom . import spans",
        ),
        ("phireg/checkpoint/x.py", "import numpy\ndef f():\n    import torch.serialization"),
        ("phireg/checkpoint/x.py", "if typing.TYPE_CHECKING:\n    import torch"),
        ("phireg/plan/x.py", "if TYPE_CHECKING:\n    from phireg.family import Family"),
        ("phireg/cli/x.py", "import click\ndef f():\n    from phireg import jobs\n    import rich"),
        ("phireg/jobs.py", "import phireg.plan\ndef f():\n    import torch"),
        ("plugins/phi3/__init__.py", "from phireg_plugins.phi2 import FAMILY\nimport phireg.api"),
        ("plugins/phi3/__init__.py", "from phireg_plugins.phi3 import config"),
        ("plugins/phi3/reference.py", "import torch"),
    ],
)
def test_the_checker_lets_pass(path: str, text: str, tmp_path: Path) -> None:
    assert plant(tmp_path, path, text) == []


def test_the_checker_shows_the_line_and_the_rule(tmp_path: Path) -> None:
    (found,) = plant(tmp_path, "phireg/quant/x.py", "import json\n\nimport torch\n")
    assert found.startswith("phireg/quant/x.py:3: phireg.quant may not import torch; Rule(")
    assert "phireg.layout" in found


# What really gets imported

HEAVY = {"torch", "transformers", "tokenizers", "numpy", "huggingface_hub", "rich"}
PLUGINS = sorted(
    f"phireg_plugins.{path.parent.name}" for path in (ROOT / "plugins").glob("*/__init__.py")
)


@pytest.mark.parametrize("module", ["phireg.api", "phireg.registry", *PLUGINS])
def test_a_fresh_interpreter_stays_light(module: str) -> None:
    code = f"import sys, {module}; print(*({{name.split('.')[0] for name in sys.modules}}))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert HEAVY & set(ran.stdout.split()) == set()
