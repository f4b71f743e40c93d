"""``phireg demo``: its output, its checkpoints and its exit codes."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from helpers.command_line import run_phireg
from helpers.program import shell_words
from helpers.tiny_phi3 import make_tiny_phi3
from safetensors.torch import load_file, save_file

import phireg
from phireg import demo, registry
from phireg.errors import PluginError
from phireg.tensorrt import package

ROOT = Path(__file__).parents[2]
PERFECT = {"phi2", "phi3-mini", "phi3-small", "phi3-medium", "phi3.5-mini"}  # on article 4
FAMILIES = PERFECT | {"phi3.5-moe", "phi4", "phi4-mini"}
CHECKS = ["structure", "config", "weights", "reading", "logits", "ranks"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """phireg in an empty directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return run_phireg


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """A copy of phi3-small's demo, which the family now has instead of its own."""
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
    assert Path("phireg-demo/phi3-small/rank0.safetensors").is_file()
    for name in CHECKS[:5]:
        assert any(line.startswith(name) and " passed " in line for line in lines)
    assert "They are identical." in lines
    assert any("160" in line and "0.946" in line for line in lines)
    assert "next" in lines and lines[-1].startswith("  phireg ")
    done = run("demo", "--article", 1)
    assert done.exit_code == 0
    assert "Sunday" in done.output, "article 1 was about Monday"


@pytest.mark.slow
def test_an_engine_is_built_and_its_network_proven(run):
    done = run("demo", "phi3-medium", "--engine", "--tp-size", 2, "--json")
    assert done.exit_code == 0, done.output
    (document,) = json.loads(done.stdout)["demos"]
    engine = document["engine"]
    assert [check["name"] for check in engine["verification"]["checks"]] == ["files", "network"]
    assert engine["verification"]["passed"]
    for rank in range(2):
        file = Path("phireg-demo/phi3-medium-engine", f"rank{rank}.engine")
        assert file.stat().st_size == engine["files"][file.name]
    assert "--device cuda" in engine["gpu_commands"]["verify"]
    other = Path("phireg-demo/phi3-medium-engine/rank1.engine")
    whole = other.read_bytes()
    other.write_bytes(whole[:-1])
    assert run("demo", "phi3-medium", "--engine", "--quiet").exit_code == 6, "it was changed"
    other.write_bytes(whole)
    again = run("demo", "phi3-medium", "--engine", "--quiet")  # both are replaced
    assert again.exit_code == 0, again.output
    assert not Path("phireg-demo/phi3-medium-engine/rank1.engine").exists()
    built = Path("phireg-demo/phi3-medium-engine/phireg-build.json")
    built.write_text(built.read_text().replace(demo.NOTE, ""))
    assert run("demo", "phi3-medium", "--engine", "--quiet").exit_code == 6, "build made it"


def test_without_tensorrt_nothing_is_begun(run, monkeypatch):
    monkeypatch.setattr(package, "installed", dict)
    package.load_package.cache_clear()
    done = run("demo", "--engine")
    assert done.exit_code == 7
    assert "phireg[rtx]" in done.output
    assert not Path("phireg-demo").exists()


@pytest.mark.slow
def test_the_commands_it_prints_do_the_same(run):
    """Read by a shell, they make the checkpoint anew, verify it and write the same summary."""
    printed = run("demo", "phi3-mini", "--tp-size", 2).output
    commands = "\n".join(block[2:] for block in _blocks(printed) if block.startswith("$ phireg"))
    assert commands.count("phireg ") == 3
    checkpoint = Path("phireg-demo/phi3-mini")
    before = checkpoint.stat().st_ino
    text = ""
    for _, *words in shell_words(commands, "phireg"):
        done = run(*words)
        assert done.exit_code == 0, done.output
        text += done.stdout
    assert checkpoint.stat().st_ino != before
    assert (checkpoint / "rank1.safetensors").is_file()
    assert f"{checkpoint}: verified" in text
    assert text.splitlines()[-1] == demo.find("phi3-mini").articles[31].reference


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
    document = json.loads(done.output)
    assert document["article_number"] == 4
    assert {entry["family"] for entry in document["demos"]} == FAMILIES
    for entry in document["demos"]:
        directory = Path(entry["checkpoint_dir"])
        assert directory == Path("out") / entry["family"]
        assert set(entry["files"]) == {path.name for path in directory.iterdir()}
        assert {"rank0.safetensors", "rank1.safetensors"} < set(entry["files"])
        checks = {check["name"]: check["verdict"] for check in entry["verification"]["checks"]}
        assert checks == dict.fromkeys(CHECKS, "passed")
        assert entry["article"] == demo.find(entry["family"]).articles[4].text
        assert entry["summary"] and entry["identical"] == (entry["family"] in PERFECT)
        assert set(entry["commands"]) == {"convert", "verify", "run"}


def test_a_demo_replaces_what_a_demo_made(run):
    model, target = demo.find("phi3-mini"), Path("phireg-demo/phi3-mini")
    demo.convert(model, target)
    assert not (target / "rank1.safetensors").exists()
    demo.convert(model, target, tp_size=2)
    assert (target / "rank1.safetensors").exists()


def of_another_model(target, model):
    make_tiny_phi3(Path("model"))
    phireg.convert(phireg.plan("model"), target)


def quantized(target, model):
    phireg.convert(phireg.plan(model.directory, qformat="int8_wo"), target)


def by_convert(target, model):
    phireg.convert(phireg.plan(model.directory, family=model.family), target)


def edited(target, model):
    demo.convert(model, target)
    with (target / "config.json").open("a") as file:
        file.write("\n")


def with_a_file_of_the_users(target, model):
    demo.convert(model, target)
    (target / "thesis.tex").write_text("years")


def with_a_tokenizer_of_the_users(target, model):
    demo.convert(model, target)
    (target / "vocab.json").write_text("{}")


def without_its_manifest(target, model):
    demo.convert(model, target)
    (target / "phireg.json").unlink()


@pytest.mark.parametrize(
    "make",
    [of_another_model, quantized, by_convert, edited, with_a_file_of_the_users,
     with_a_tokenizer_of_the_users, without_its_manifest],
    ids=lambda make: make.__name__,
)  # fmt: skip
def test_a_demo_replaces_nothing_else(make, run):
    target = Path("phireg-demo/phi3-mini")
    make(target, demo.find("phi3-mini"))
    before = {path: path.read_bytes() for path in target.iterdir()}
    done = run("demo", "phi3-mini", "--quiet")
    assert done.exit_code == 6, done.output
    assert str(target) in done.output
    assert {path: path.read_bytes() for path in target.iterdir()} == before


@pytest.mark.parametrize(
    ("args", "code", "named"),
    [
        (["phi3-smal"], 5, "'phi3-small'"),
        (["--article", -1], 2, "0 to 159"),
        (["--article", 160], 2, "0 to 159"),
    ],
)
def test_wrong_usage_of_the_demo(run, args, code, named):
    done = run("demo", *args)
    assert done.exit_code == code
    assert named in done.output
    assert not Path("phireg-demo").exists()


def test_family_without_demo(run, monkeypatch):
    monkeypatch.setattr(registry.load("phi2").family, "demo", None)
    done = run("demo", "phi2")
    assert done.exit_code == 5
    assert "'phi2'" in done.output
    names, problems = demo.families()
    assert set(names) == FAMILIES - {"phi2"}
    assert problems == ()


@pytest.mark.parametrize("place", ["phireg_plugins.phi2:nowhere", "no_such_package:demo", ":demo"])
def test_a_demo_that_does_not_exist(run, monkeypatch, place):
    monkeypatch.setattr(registry.load("phi2").family, "demo", place)
    done = run("demo", "phi2")
    assert done.exit_code == 5
    assert place in done.output
    assert "Traceback" not in done.output and "defect" not in done.output


def test_broken_families_are_named(run, monkeypatch):
    def load(name):
        if name != "phi2":
            raise PluginError(f"family '{name}' is broken")
        return registry.FamilyChoice(phi2, None)

    phi2 = registry.load("phi2").family
    monkeypatch.setattr(registry, "load", load)
    kept, problems = demo.families()
    assert kept == ("phi2",) and "family 'phi3-small' is broken" in problems


@pytest.mark.parametrize(
    ("file", "content", "code"),
    [
        ("heldback.jsonl", '{"article": "a"}', 5),
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


def test_a_wrong_checkpoint_ends_with_4(run, monkeypatch):
    """A conversion that zeroes one block of one tensor."""
    convert = demo.write_checkpoint

    def wrong(plan, output_dir, **options):
        converted = convert(plan, output_dir, **options)
        path = Path(output_dir) / "rank0.safetensors"
        tensors = load_file(path)
        tensors["transformer.layers.2.mlp.proj.weight"][:16, :16] = 0
        save_file(tensors, path)
        return converted

    monkeypatch.setattr(demo, "write_checkpoint", wrong)
    done = run("demo", "--json")
    assert done.exit_code == 4
    (entry,) = json.loads(done.output)["demos"]
    assert entry["summary"] is None and not entry["identical"]
    assert not entry["verification"]["passed"]
    done = run("demo", "--quiet", "--output-dir", "another")
    assert done.exit_code == 4
    assert "transformer.layers.2.mlp.proj.weight" in done.output


def test_an_interruption_after_the_conversion_keeps_the_checkpoint(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(phireg, "verify", interrupted)
    result = run("demo", "phi2")
    assert result.exit_code == 130
    assert "phireg-demo" in result.stderr
    assert phireg.inspect("phireg-demo/phi2", check=True).problems == ()


def test_a_damaged_demo_stops_nobody_else(monkeypatch, tmp_path):
    whole, find = demo.find("phi3-small").directory, demo.find

    def damaged(family):
        if family == "phi2":
            raise PluginError("the demo of family 'phi2' is damaged")
        return find(family)

    monkeypatch.setattr(demo, "find", damaged)
    assert demo.family_of([tmp_path]) is None
    assert demo.family_of([tmp_path, whole]) == "phi3-small"


@pytest.mark.parametrize("family", demo.families()[0])
def test_a_demo_model_and_its_checkpoint_are_known(family, tmp_path):
    """Families may share a tokenizer, and phi3.5-mini has the model of phi3-mini."""
    model = demo.find(family)
    assert demo.family_of([model.directory]) == family.replace("3.5-mini", "3-mini")
    demo.convert(model, tmp_path / "ckpt")
    assert demo.family_of([tmp_path / "ckpt"]) == family
    (tmp_path / "ckpt" / "phireg.json").write_text("{")
    assert demo.find(demo.family_of([tmp_path / "ckpt"])).articles == model.articles
