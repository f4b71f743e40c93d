"""One process for each rank, started as torchrun starts them."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Sequence


def run_processes(count: int, arguments: Sequence[str]) -> int:
    """Run ``phireg ARGUMENTS`` in ``count`` processes with torchrun's environment.

    A signal to this process goes to all of them. Each has its share of the CPU cores, unless
    OMP_NUM_THREADS says otherwise.

    Returns:
        The exit code of the process that failed first, rank 0's if it is among them; 0 if none
        did; 128 and the signal's number after a signal.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    logging.disable(logging.CRITICAL)  # the processes say themselves what went wrong
    try:
        elastic_launch(config, sys.executable)("-m", "phireg", *arguments)
    except ChildFailedError as error:
        failures = error.failures
        code = (failures.get(0) or failures[min(failures)]).exitcode
        return int(code) if code >= 0 else 128 - int(code)
    except SignalException as error:
        return 128 + int(error.sigval)
    finally:
        logging.disable(logging.NOTSET)
    return 0
