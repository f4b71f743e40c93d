"""Write hooks.md, the reference of the plugin API, from the docstrings of phireg.api.

python docs/generate.py            writes docs/hooks.md
python docs/generate.py --check    exits with 1 if docs/hooks.md is not up to date
"""

import ast
import enum
import inspect
import re
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

from phireg import api, hookspecs

PAGE = Path(__file__).with_name("hooks.md")
DEFINING = ("phireg.hookspecs", "phireg.config.common", "phireg.config.fields")
HEAD = """\
<!-- Written by docs/generate.py from the docstrings of phireg.hookspecs and phireg.api. -->

# Hooks and names

A plugin imports `phireg.api` and nothing else of phireg. This page is generated from its
docstrings; [Writing a plugin](plugin-authors.md) shows how it is used.

"""
_ROLE = re.compile(r":\w+:`~?([^`]*)`")
_SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields):$")


def page() -> str:
    """Return the whole reference."""
    return HEAD + "\n\n".join([hooks(), versions(), *names()]) + "\n"


def hooks() -> str:
    """Describe the hooks, in the order of the specification."""
    parts = ["## The hooks", first_paragraph(hookspecs.__doc__)]
    for name, function in vars(hookspecs.Steps).items():
        if name.startswith(f"{hookspecs.PROJECT}_"):
            parts += [f"### {name}", signature(name, function), docstring(function.__doc__)]
    return "\n\n".join(parts)


def versions() -> str:
    """Describe how the specification changes."""
    paragraphs = inspect.cleandoc(hookspecs.__doc__ or "").split("\n\n")[1:]
    return "\n\n".join(["## How hooks change", *map(docstring, paragraphs)])


def names() -> list[str]:
    """Describe every name of phireg.api, under the comments that group its __all__."""
    parts = []
    lines = inspect.getsource(api).partition("__all__ = [")[2].splitlines()
    for line in map(str.strip, lines):
        if line.startswith("#"):
            title = line.lstrip("# ")
            parts.append(f"## Names: {title}")
        for name in re.findall(r'"(\w+)"', line):
            parts += [f"### {name}", *description(name, getattr(api, name))]
    return parts


def description(name: str, value: object) -> list[str]:
    """Return signature and docstring of one name."""
    if isinstance(value, enum.Enum):
        return [f"`{type(value).__name__}.{value.name}`", docstring(documented(value))]
    if inspect.isclass(value) and issubclass(value, enum.Enum):
        members = [f"- `{m.name}`: {' '.join(docstring(documented(m)).split())}" for m in value]
        return [docstring(value.__doc__), "\n".join(members)]
    if text := assigned(name):
        return [docstring(text)]
    if inspect.isclass(value) or inspect.isfunction(value):
        shown = [] if inspect.isclass(value) and plain(value) else [signature(name, value)]
        return [*shown, docstring(value.__doc__), *methods(name, value)]
    raise SystemExit(f"{name} has no docstring")


def plain(kind: type) -> bool:
    """Return whether plugins do not construct a class themselves."""
    return issubclass(kind, Exception) or kind in (api.Entry, api.Rule, api.Axis)


def methods(name: str, value: object) -> list[str]:
    """List the documented public methods of a class."""
    if not inspect.isclass(value):
        return []
    items = []
    for method, function in vars(value).items():
        if not method.startswith("_") and inspect.isfunction(function) and function.__doc__:
            paragraphs = inspect.cleandoc(function.__doc__).split("\n\n")
            prose = [part for part in paragraphs if not _SECTION.match(part.partition("\n")[0])]
            text = " ".join(docstring("\n\n".join(prose)).split())
            items.append(f"- `{name}.{method}{arguments(function)}`: {text}")
    return ["\n".join(items)] if items else []


def documented(member: enum.Enum) -> str:
    """Return the docstring under a member of an enumeration."""
    return after(ast.parse(textwrap.dedent(inspect.getsource(type(member)))), member.name)


def assigned(name: str) -> str:
    """Return the docstring under a module-level name, in the module that defines it."""
    for module in map(sys.modules.get, DEFINING):
        if text := after(ast.parse(inspect.getsource(module)), name):
            return text
    return ""


def after(tree: ast.Module, name: str) -> str:
    """Return the string after the assignment to ``name``, in a module or its only class."""
    body = tree.body
    if len(body) == 1 and isinstance(body[0], ast.ClassDef):
        body = body[0].body
    for node, follower in pairwise(body):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if name in map(ast.unparse, targets) and isinstance(follower, ast.Expr):
            return str(ast.literal_eval(follower.value))
    return ""


class Annotation(str):
    """An annotation that a signature shows without quotes."""

    def __repr__(self) -> str:
        return str(self)


def signature(name: str, value: object) -> str:
    """Return a fenced signature, an argument per line where it is long."""
    shown = f"{name}{arguments(value)}"
    if len(shown) > 96:
        given, answer = parameters(value)
        lines = [f"    {readable(str(parameter))}," for parameter in given]
        kinds = [parameter.kind for parameter in given]
        named, starred = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_POSITIONAL
        if named in kinds and starred not in kinds:
            lines.insert(kinds.index(named), "    *,")
        arrow = "" if answer is inspect.Signature.empty else f" -> {answer}"
        shown = "\n".join([f"{name}(", *lines, f"){arrow}"])
    return f"```python\n{shown}\n```"


def arguments(value: object) -> str:
    """Return the signature as in the source, without self."""
    given, answer = parameters(value)
    return readable(str(inspect.Signature(given, return_annotation=answer)))


def parameters(value: object) -> tuple[list[inspect.Parameter], object]:
    """Return the parameters but self, and the return annotation."""
    found = inspect.signature(value)
    given = [
        p if p.annotation is p.empty else p.replace(annotation=Annotation(p.annotation))
        for p in found.parameters.values()
        if p.name != "self"
    ]
    return given, found.empty if inspect.isclass(value) else Annotation(found.return_annotation)


def readable(text: str) -> str:
    """Replace defaults that mean nothing to a reader."""
    text = re.sub(r"<object object at \w+>|<factory>", "...", text)
    return re.sub(r"<(\w+\.\w+): \w+>", r"\1", text)


def first_paragraph(text: str | None) -> str:
    """Return the summary of a docstring."""
    return docstring(inspect.cleandoc(text or "").partition("\n\n")[0])


def docstring(text: str | None) -> str:
    """Convert a docstring to Markdown: sections as lists, single backticks."""
    if not text:
        raise SystemExit("a name of phireg.api has no docstring")
    parts = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        head, _, rest = paragraph.partition("\n")
        if found := _SECTION.match(head):
            parts.append(f"{found[1]}:")
            parts.append(entries(textwrap.dedent(rest), listed=found[1] != "Returns"))
        else:
            parts.append(paragraph)
    markdown = "\n\n".join(parts).replace("::\n", ":\n")
    return _ROLE.sub(r"`\1`", markdown).replace("``", "`")


def entries(text: str, *, listed: bool) -> str:
    """Return the entries of a section, one list item each."""
    if not listed:
        return " ".join(text.split())
    items = re.split(r"\n(?=\S)", text)
    return "\n".join(
        "- " + re.sub(r"^([\w, *]+): ", r"`\1`: ", " ".join(item.split())) for item in items
    )


if __name__ == "__main__":
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        sys.exit("docs/hooks.md is not up to date; run: python docs/generate.py")
