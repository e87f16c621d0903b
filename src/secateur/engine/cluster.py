"""Jobs spread over a Ray cluster, each in a fresh process there as :class:`secateur.engine.workers.Workers` runs it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from secateur.engine.workers import Workers
from secateur.errors import InternalError, SecateurError, refuse

Answer = dict[str, Any] | SecateurError
_OUTPUT: Final = "output"


@contextmanager
def ray_cluster() -> Iterator[Any]:
    """The cluster that ``RAY_ADDRESS`` names or that runs on this machine already; else one of this machine, for now.

    Raises:
        RequestError: Ray is not installed.
        InternalError: it cannot be reached or started.
    """
    try:
        import ray
    except ImportError:
        refuse("no-ray", "a comparison on a Ray cluster", "Ray is not installed", "pip install 'secateur[ray]'")
    own = not ray.is_initialized()
    try:
        if own:
            ray.init(log_to_driver=False, include_dashboard=False)
    except (RuntimeError, ConnectionError, ValueError) as error:
        found = " ".join(str(error).split())[:200]
        raise InternalError("no-cluster", "a comparison on a Ray cluster", found, "see: ray status") from error
    try:
        yield ray
    finally:
        if own:
            ray.shutdown()


def spread(
    ray: Any, module: str, function: str, jobs: Mapping[str, Mapping[str, Any]], threads: int, gpus: int
) -> Iterator[tuple[str, Answer]]:
    """What a function gives for every job, by its key, as they finish.

    Args:
        ray: from ``ray_cluster``.
        module, function: as of ``Workers.run``.
        jobs: by key. One that says no ``output`` gets one in a temporary folder of its host, deleted afterwards.
        threads: cores that each takes.
        gpus: GPUs that each takes.
    """
    task = ray.remote(_job).options(num_cpus=threads, num_gpus=gpus, max_retries=0)
    running = {task.remote(module, function, dict(job)): key for key, job in jobs.items()}
    while running:
        (done, *_), _ = ray.wait(list(running), num_returns=1)
        key = running.pop(done)
        try:
            answer = ray.get(done)
        except ray.exceptions.RayError as error:
            found = " ".join(str(error).split())[:200]
            yield key, InternalError("worker-died", "a job on the Ray cluster", found)
            continue
        failed = answer.get("error")
        yield key, answer["result"] if failed is None else SecateurError.revived(failed, answer["exit_code"])


def _job(module: str, function: str, job: dict[str, Any]) -> dict[str, Any]:
    """One job, on whatever host it lands."""
    with tempfile.TemporaryDirectory() as folder, Workers(module, Path(folder)) as workers:
        try:
            return {"result": workers.run(function, {_OUTPUT: str(Path(folder) / "out"), **job})}
        except SecateurError as error:
            return {"error": error.as_dict(), "exit_code": error.exit_code}
