"""Ray's own killers on a cluster, one of the processes of jobs and one of nodes: python -m tests.chaos.killers SECONDS

Nodes are not started again by it.
"""

import random
import sys
import time
from typing import Any

import ray
from ray._private.test_utils import RayletKiller, WorkerKillerActor, get_and_run_resource_killer

PROCESSES, NODES = 20, 60  # seconds between two of them
NAMES = ("MapBatches", "MapWorker", "_write", "_read", "_one_by_one")  # tasks of a job


def _is_of_a_job(task: Any) -> bool:
    return task.name.startswith(NAMES) and random.random() < 0.5  # else it would always be the first


if __name__ == "__main__":
    ray.init()
    options = {"max_to_kill": None, "no_start": True}
    killers = {
        "processes": get_and_run_resource_killer(
            WorkerKillerActor, PROCESSES, namespace="processes", kill_filter_fn=lambda: _is_of_a_job, **options
        ),
        "nodes": get_and_run_resource_killer(RayletKiller, NODES, namespace="nodes", kill_delay_s=30, **options),
    }
    running = [killer.run.remote() for killer in killers.values()]
    time.sleep(float(sys.argv[1]))
    for what, killer in killers.items():
        killer.stop_run.remote()
        print(f"killed {len(ray.get(killer.get_killed_nodes.remote(), timeout=300))} {what}", flush=True)
