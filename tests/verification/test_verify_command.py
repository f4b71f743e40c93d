"""The command's table, its exit codes, and the page it writes."""

import pytest
from helpers.command_line import run_phireg
from verify_sources import converted, source

import phireg


def run(*arguments):
    return run_phireg("verify", *arguments)


def test_the_command_passes_and_writes_the_page(tmp_path):
    page = tmp_path / "out.html"
    ran = run(converted("phi2"), "--model-dir", source("phi2"), "--report", page)
    assert ran.exit_code == 0
    assert " ".join(ran.stdout.split()).endswith(": verified")  # long paths are folded
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(("place", "code"), [("typo/out.html", 2), (".", 6)])
def test_a_report_that_cannot_be_written_is_reported_before_verifying(
    place, code, tmp_path, monkeypatch
):
    monkeypatch.setattr(phireg, "verify", None)
    ran = run(converted("phi2"), "--model-dir", source("phi2"), "--report", tmp_path / place)
    assert ran.exit_code == code
    assert "--report" in ran.output or "name of a file" in ran.output
    assert list(tmp_path.iterdir()) == []


def test_the_command_fails_with_4_and_names_the_place(damaged):
    ran = run(damaged, "--model-dir", source("phi3-small"))
    assert ran.exit_code == 4
    assert "layer 1 attention" in ran.stdout
    assert "not verified" in ran.stdout


def test_quick_says_what_it_leaves_out():
    ran = run(converted("phi2"), "--model-dir", source("phi2"), "--quick")
    assert ran.exit_code == 0
    assert "not checked: logits, ranks" in " ".join(ran.stdout.split())


def test_a_directory_that_is_no_checkpoint(tmp_path):
    assert run(source("phi2"), "--model-dir", source("phi2")).exit_code == 3
    assert run(tmp_path / "none", "--model-dir", source("phi2")).exit_code == 3
