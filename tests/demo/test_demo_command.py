"""``phireg demo``: what it prints, what it makes, and how it ends when something is wrong."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import phireg
from phireg import demo, registry
from phireg.cli import app
from phireg.errors import PluginError

ROOT = Path(__file__).parents[2]
FAMILIES = {"phi2", "phi3-mini", "phi3-small", "phi3-medium"}
CHECKS = ["structure", "config", "weights", "logits", "ranks"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """phireg in an empty directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def invoke(*args):
        return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="phireg")

    return invoke


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """A copy of phi3-small's demo, which the family now brings instead of its own."""
    package = tmp_path / "packages" / "acme_demo"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copytree(demo.find("phi3-small").directory, package / "demo")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr(registry.load("phi3-small").family, "demo", "acme_demo:demo")
    yield package / "demo"
    sys.modules.pop("acme_demo", None)


def test_without_arguments(run):
    done = run("demo")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    directory = str(demo.find("phi3-small").directory)
    assert sum(directory in line for line in lines) == 2, "a path is not broken"
    assert Path("phireg-demo/phi3-small/rank0.safetensors").is_file()
    for name in CHECKS[:4]:
        assert any(line.startswith(name) and " passed " in line for line in lines)
    article = demo.find("phi3-small").articles[31]
    unfolded = done.output.replace("\\\n", "")
    assert f'"{article.prompt}"' in unfolded
    title = next(n for n, line in enumerate(lines) if line.startswith("the model's summary"))
    end = lines.index("", title)
    at = lines[title].index("reference")
    left = " ".join(line[:at].strip() for line in lines[title + 1 : end])
    right = " ".join(line[at:].strip() for line in lines[title + 1 : end])
    assert right.strip() == article.reference
    assert left.strip() == article.reference, "this one it gets right"
    assert "They are identical." in lines
    assert "Of the 160 held-back articles: 14 identical summaries, ROUGE-1 0.946." in lines


def test_what_is_wrong_in_a_summary_is_said(run):
    """Article 1 was about Monday; the weekday is what phi3-small did not learn."""
    done = run("demo", "--article", 1)
    assert done.exit_code == 0
    assert "Not in the reference: Sunday.\n" in done.output


@pytest.mark.slow
def test_the_commands_it_prints_do_the_same(run, tmp_path):
    """Typed into a shell, they make the checkpoint anew, verify it and write the same summary."""
    printed = run("demo", "phi3-mini", "--tp-size", 2).output
    commands = "\n".join(block[2:] for block in _blocks(printed) if block.startswith("$ phireg"))
    assert commands.count("phireg ") == 3
    made = Path("phireg-demo/phi3-mini")
    before = made.stat().st_ino
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    script = bin_dir / "phireg"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m phireg "$@"\n')
    script.chmod(0o755)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        env={
            **os.environ,
            "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stat().st_ino != before
    assert (made / "rank1.safetensors").is_file()
    assert f"{made}: verified" in done.stdout
    assert done.stdout.splitlines()[-1] == demo.find("phi3-mini").articles[31].reference


def _blocks(text):
    """Lines that belong together: those after a backslash to the one before."""
    block = ""
    for line in text.splitlines():
        block += line
        if line.endswith("\\"):
            block += "\n"
            continue
        yield block
        block = ""


@pytest.mark.slow
def test_all_as_json(run):
    done = run("demo", "all", "--tp-size", 2, "--json", "--article", 4, "--output-dir", "out")
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert told["article_number"] == 4
    assert {one["family"] for one in told["demos"]} == FAMILIES
    for one in told["demos"]:
        assert one["checkpoint_dir"] == f"out/{one['family']}"
        assert set(one["files"]) == {path.name for path in Path(one["checkpoint_dir"]).iterdir()}
        assert {"rank0.safetensors", "rank1.safetensors"} < set(one["files"])
        checks = {check["name"]: check["verdict"] for check in one["verification"]["checks"]}
        assert checks == dict.fromkeys(CHECKS, "passed")
        assert one["article"] == demo.find(one["family"]).articles[4].text
        assert one["summary"] == one["reference"] and one["identical"]
        assert set(one["commands"]) == {"convert", "verify", "run"}


def test_quiet(run):
    done = run("demo", "phi3-medium", "--quiet", "--output-dir", "ckpt")
    assert (done.exit_code, done.output) == (0, "")
    assert Path("ckpt/rank0.safetensors").is_file()


def test_only_a_checkpoint_of_phiregs_is_replaced(run):
    model, target = demo.find("phi3-mini"), Path("phireg-demo/phi3-mini")
    demo.convert(model, target)
    assert not (target / "rank1.safetensors").exists()
    demo.convert(model, target, tp_size=2)
    assert (target / "rank1.safetensors").exists()
    (target / "phireg.json").unlink()
    done = run("demo", "phi3-mini", "--quiet")
    assert done.exit_code == 6
    assert "exists" in done.output
    assert (target / "rank1.safetensors").exists()


def test_unknown_family(run):
    done = run("demo", "phi3-smal")
    assert done.exit_code == 5
    assert "did you mean 'phi3-small'?" in done.output
    assert not Path("phireg-demo").exists()


@pytest.mark.parametrize("number", [-1, 160])
def test_no_such_article(run, number):
    done = run("demo", "--article", number)
    assert done.exit_code == 2
    assert "0 to 159" in done.output
    assert not Path("phireg-demo").exists()


def test_family_without_demo(run, monkeypatch):
    monkeypatch.setattr(registry.load("phi2").family, "demo", None)
    done = run("demo", "phi2")
    assert done.exit_code == 5
    assert "family 'phi2' has no demo model" in done.output
    assert "phireg convert --model-dir" in done.output
    names, problems = demo.families()
    assert set(names) == FAMILIES - {"phi2"}
    assert problems == ()


@pytest.mark.parametrize(
    "place", ["phireg_plugins.phi2:nowhere", "phireg_plugins.phi2", "no_such_package:demo", ":demo"]
)
def test_demo_that_is_not_there(run, monkeypatch, place):
    monkeypatch.setattr(registry.load("phi2").family, "demo", place)
    done = run("demo", "phi2")
    assert done.exit_code == 5
    assert place in done.output
    assert "Traceback" not in done.output and "defect" not in done.output


def test_all_names_families_that_cannot_be_loaded(run, monkeypatch):
    names = registry.index

    def load(name):
        if name != "phi2":
            raise PluginError(f"family '{name}' is broken")
        return registry.FamilyChoice(phi2, None)

    phi2 = registry.load("phi2").family
    assert len(names()) >= 4
    monkeypatch.setattr(registry, "load", load)
    kept, problems = demo.families()
    assert kept == ("phi2",)
    assert "family 'phi3-small' is broken" in problems


@pytest.mark.parametrize(
    ("file", "content", "code"),
    [
        ("heldback.jsonl", "", 5),
        ("heldback.jsonl", "{", 5),
        ("heldback.jsonl", '{"article": "a"}', 5),
        ("heldback.jsonl", '{"article": "a", "highlights": 1}', 5),
        ("heldback.jsonl", "[1]", 5),
        ("heldback.jsonl", None, 5),
        ("card.json", "{", 3),
        ("config.json", None, 3),
        ("model.safetensors", "x", 3),
        ("cl100k_base.tiktoken", None, 5),
        ("cl100k_base.tiktoken", "x", 3),
    ],
)
def test_damaged_demo(run, changed, file, content, code):
    path = changed / file
    path.unlink()
    if content is not None:
        path.write_text(content)
    done = run("demo", "--article", 0)
    assert done.exit_code == code, done.output
    assert "this is a defect in phireg" not in done.output


def test_without_a_card_there_are_no_scores(run, changed):
    (changed / "card.json").unlink()
    done = run("demo")
    assert done.exit_code == 0
    assert "They are identical." in done.output
    assert "ROUGE" not in done.output


@pytest.mark.parametrize("as_json", [False, True])
def test_a_wrong_checkpoint_ends_with_4(run, monkeypatch, as_json):
    """A conversion that zeroes one block of one tensor."""
    convert = phireg.convert

    def wrong(plan, output_dir, **options):
        made = convert(plan, output_dir, **options)
        path = Path(output_dir) / "rank0.safetensors"
        tensors = load_file(path)
        tensors["transformer.layers.2.mlp.proj.weight"][:16, :16] = 0
        save_file(tensors, path)
        return made

    monkeypatch.setattr(phireg, "convert", wrong)
    done = run("demo", *(["--json"] if as_json else ["--quiet"]))
    assert done.exit_code == 4
    if as_json:
        (told,) = json.loads(done.output)["demos"]
        assert told["summary"] is None and not told["identical"]
        assert not told["verification"]["passed"]
    else:
        assert "transformer.layers.2.mlp.proj.weight" in done.output
        assert "not verified" in done.output


def test_an_interruption_after_the_conversion_does_not_deny_it(run, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "verify", interrupted)
    result = run("demo", "phi2")
    assert result.exit_code == 130
    assert result.stderr == "interrupted; every checkpoint in phireg-demo is complete\n"
    assert phireg.inspect("phireg-demo/phi2", check=True).problems == ()
