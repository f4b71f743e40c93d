"""Settings of the whole test process.

Tests run side by side and their models are tiny, so torch computes in one thread here and in
processes that tests start. Where there is no GPU, Triton's interpreter runs the kernels; that is
chosen before anything imports Triton.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep neighbors in one process, which makes their fixtures once, until another is idle."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)
