"""A backend that repeats the start of an article; and one that dies on the way."""

from phireg.executor import Sampling
from phireg.generation.backend import Description

CALLS = []
"""Every batch that was generated, as a list of prompts."""
FAIL_AFTER = [None]
"""Batches that succeed before the backend is killed, if it is to be."""
NLL = [[0.5, 1.5]]


DESCRIPTION = Description(vocab_size=10_000, positions=512, max_batch=8, max_beams=2)


def describe(place, options):
    return DESCRIPTION


def process_rank():
    return 0, 1


def load(place, options):
    return Fake()


def run_worker(place, options):
    raise AssertionError


class Fake:
    name, device, dtype, processes = "fake", "cpu", "float32", 1
    description = DESCRIPTION

    def generate(self, request):
        assert request.sampling == Sampling()
        if FAIL_AFTER[0] is not None and len(CALLS) > FAIL_AFTER[0]:
            raise KeyboardInterrupt
        CALLS.append([tuple(prompt) for prompt in request.prompts])
        return [list(prompt[: 5 + len(prompt) % 7]) for prompt in request.prompts]

    def mean_nll(self, prompts, continuations):
        if NLL[0] is None:
            return None
        assert all(len(prompt) == 1 for prompt in prompts)
        return [NLL[0][n % 2] for n in range(len(continuations))]

    def peak_memory(self):
        return 1000 * len(CALLS)

    def close(self):
        pass
