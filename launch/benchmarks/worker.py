"""A process that holds one workload and runs it when asked.

Each variant of a benchmark has a process of its own, so that libraries cannot disturb one another
(thread pools, numbers of devices, start methods), and the variants take turns.

Reads one JSON line with the workload, then one line a run; writes one JSON line for each.
"""

import importlib
import json
import os
import sys
import time
import warnings

__all__ = ["main"]


def main() -> None:
    """Serves runs until its input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print must not mix with the answers

    def answer(**fields) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    warnings.filterwarnings("ignore")
    order = json.loads(sys.stdin.readline())
    import jax

    jax.config.update("jax_num_cpu_devices", order["num_devices"])
    from launch.benchmarks.workload import PeerMissing

    try:
        module = importlib.import_module(f"launch.benchmarks.{order['module']}")
        workload = getattr(module, order["function"])(**order["options"])
    except PeerMissing as error:
        answer(missing=str(error))
        return
    facts = dict(workload.run())  # the first run pays for allocation and threads
    answer(warm_up_seconds=workload.warm_up_seconds, note=workload.note, facts=facts)
    for _ in sys.stdin:
        started = time.perf_counter()
        facts = dict(workload.run())
        answer(seconds=time.perf_counter() - started, facts=facts)


if __name__ == "__main__":
    main()
