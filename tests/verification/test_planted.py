"""Every planted conversion error is detected, and located, by the bytes and by the logits alone."""

import pytest
from planted import PLANTED
from verify_sources import copied, source

import phireg

NUMERIC = [name for name, planted in PLANTED.items() if planted.numeric]


def damaged(name, tmp_path):
    planted = PLANTED[name]
    directory = copied(planted.family, planted.tp, tmp_path / "checkpoint", planted.dtype)
    planted.damage(directory, planted.family)
    return planted, directory


def places(check):
    return [(problem.layer, problem.part) for problem in check.problems if problem.part]


@pytest.mark.parametrize("name", PLANTED)
def test_bytes_and_config_show_it(name, tmp_path):
    planted, directory = damaged(name, tmp_path)
    verification = phireg.verify(
        directory, source(planted.family), family=planted.family, checks=("config", "weights")
    )
    assert not verification.passed
    texts = "\n".join(str(problem) for check in verification.checks for problem in check.problems)
    assert planted.says in texts
    wrong = [place for check in verification.checks for place in places(check)]
    if planted.place and "config.json" not in texts:
        assert set(wrong) == {planted.place, *planted.also}


@pytest.mark.parametrize("name", NUMERIC)
def test_logits_alone_show_where(name, tmp_path):
    planted, directory = damaged(name, tmp_path)
    verification = phireg.verify(
        directory, source(planted.family), family=planted.family, checks=("logits",)
    )
    (check,) = verification.checks
    assert check.verdict == "failed"
    assert places(check)[0] == planted.place
    if verification.logits is not None and planted.place[0] == 1:  # not a mistake of all layers
        assert set(verification.logits.wrong_places) == {planted.place, *planted.also}
