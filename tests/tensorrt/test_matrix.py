"""Every family in every format, by the real compiler: what builds, and what is refused, is told."""

import pytest
from compiling import compile_spec
from specs import FAMILIES, FORMATS, spec_of

from phireg.errors import EngineError
from phireg.tensorrt.requirements import capability_problems, form_problems

pytestmark = pytest.mark.slow
# Turing, and the last two: each has dtypes that the one before lacks, but for the last.
GPUS = ("sm75", "sm80", "sm89", "sm120")


def builds(spec, *gpus, weights="embedded", rank=0):
    try:
        return len(compile_spec(spec, gpus, weights, rank)) > 0
    except EngineError as error:
        print(error)
        return False


@pytest.mark.parametrize(
    ("family", "form"),
    [
        *((family, form) for family in FAMILIES for form in FORMATS),
        *(("phi3.5-moe", form) for form in ("float16", "bfloat16", "kv_fp8")),
    ],
)
def test_what_builds_is_what_is_said(family, form):
    """It builds for the first and the last GPU that are said to do, not for the one before."""
    spec = spec_of(family, form)
    able = [gpu for gpu in GPUS if not list(capability_problems(spec, [gpu]))]
    assert able == list(GPUS[-len(able) :])
    for gpu in GPUS[:-1]:
        following = GPUS[GPUS.index(gpu) + 1]
        if gpu not in able and following in able:
            assert not builds(spec, gpu)
    assert builds(spec, able[0], able[-1])


@pytest.mark.parametrize("form", ["float16", "fp8", "int8_sq", "kv_fp8", "kv_int8"])
def test_weights_as_inputs(form):
    spec = spec_of("phi3-small", form)
    assert not list(form_problems(spec, "separate"))
    assert builds(spec, "sm120", weights="separate")


@pytest.mark.parametrize("family", ["phi3-small", "phi2"])
def test_a_rank_of_two(family):
    """Whose vocabulary the ranks do not divide."""
    assert builds(spec_of(family, "float16", tp_size=2), "sm89", rank=1)
