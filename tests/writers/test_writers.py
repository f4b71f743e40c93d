"""Every transformers release is a writer: what it saved is converted to what it computed.

The recorded models are of every form in which a release wrote a config.json. The slow test lets the
releases write anew.
"""

import os
from pathlib import Path

import pytest

import phireg
from writers.matrix import MISREAD, RECORDED, TOLERANCE, error, models, releases, write

MODELS = sorted(RECORDED.glob("*/*"))
VARIABLE = "PHIREG_TRANSFORMERS"


def name(model):
    return f"{model.parent.name}-{model.name}"


def test_releases_are_recorded():
    assert {model.name for model in MODELS} >= {"4.45", "4.57", "5.0", "5.5", "5.24"}


@pytest.mark.parametrize("model", MODELS, ids=name)
def test_a_recorded_model(model, tmp_path):
    assert error(model, tmp_path / "checkpoint") < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, ids=name)
def test_a_recorded_model_is_verified(model, tmp_path):
    """By the installed transformers, which must read it as the writer did."""
    phireg.convert(phireg.plan(model, dtype="float32"), tmp_path / "checkpoint")
    verification = phireg.verify(tmp_path / "checkpoint", model)
    assert verification.verdict == "verified", [c.problems for c in verification.checks]


@pytest.mark.slow
def test_every_release(tmp_path):
    directory = os.environ.get(VARIABLE)
    if directory is None:
        pytest.skip(f"{VARIABLE} does not name a directory that tests/writers/environments.py made")
    found = releases(Path(directory))
    assert found
    errors, absent = {}, {}
    for release in found:
        for case, reason in write(Path(directory), release, tmp_path / release).items():
            absent[release, case] = reason
        for case, model in models(tmp_path / release).items():
            errors[release, case] = error(model, tmp_path / f"{release}-{case}")
    wrong = {key for key, off in errors.items() if not off < TOLERANCE}
    assert wrong == {key for key in MISREAD if key in errors}
    for (release, case), reason in absent.items():
        only = "5" if case.endswith("block") else "4" if case.endswith(("su", "bin")) else None
        assert only is not None and release.partition(".")[0] != only, (release, case, reason)
