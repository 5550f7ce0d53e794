"""Where the notebooks of a batch run: in processes of this machine, on dask workers, or in Slurm jobs.

An engine is `free` to start a job or not, `start(function, *arguments)` returns a job, `ended(jobs)` waits for half a
second at most and returns those that are over, {job: why, or "" when it returned}, and `release()` gives back what is
free. Leaving its context stops what still runs. An engine never starts a job again that has died.

Importing this module imports neither dask nor torch.
"""

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path

ENGINES = ("local", "dask", "slurm")
TICK = 0.5  # seconds
CHECK = 60  # seconds


class EngineError(Exception):
    """An engine cannot be had; the message says why and what to do."""


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",")[: torch.cuda.device_count()] if named else list(map(str, range(torch.cuda.device_count())))


@contextmanager
def engine(name: str, at_once: int, logs: Path) -> Iterator["Processes | Dask"]:
    """Open an engine.

    Args:
        name: one of `ENGINES`. "local" takes `at_once` processes; "dask" one worker a GPU, or one for every two cores
            where there is none; "slurm" `at_once` jobs of one worker each.
        logs: folder for what Slurm jobs print.

    Raises:
        EngineError: a package is missing, Slurm's configuration lacks a field, or no worker can be started.
        ValueError: unknown name.
    """
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; choose from {', '.join(ENGINES)}")
    try:
        match name:
            case "local":
                opened = Processes(at_once)
            case "dask":
                opened = Dask(_local_cluster(), workers=len(gpus()) or max(1, cores() // 2))
            case "slurm":
                opened = Dask(_slurm_cluster(logs), workers=at_once)
    except ImportError as error:
        raise EngineError(f"--on {name}: {error}; install it with `pip install distributed dask-jobqueue`") from error
    except (OSError, RuntimeError) as error:
        raise EngineError(f"--on {name}: no worker can be started: {error}") from error
    try:
        yield opened
    finally:
        opened.close()


# ------------------------------------------------------------------------------------------------------- this machine


class Processes:
    """Every job in a process of its own, `at_once` of them side by side."""

    def __init__(self, at_once: int):
        self.at_once, self.running = at_once, []

    @property
    def free(self) -> bool:
        return len(self.running) < self.at_once

    def start(self, function: Callable, *arguments: object) -> multiprocessing.Process:
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=_alone, args=(function, *arguments), daemon=True)
        process.start()
        self.running.append(process)
        return process

    def ended(self, jobs: Iterable[multiprocessing.Process]) -> dict[multiprocessing.Process, str]:
        wait([process.sentinel for process in jobs], timeout=TICK)
        over = [process for process in jobs if not process.is_alive()]
        self.running = [process for process in self.running if process not in over]
        return {process: f"exit code {process.exitcode}" if process.exitcode else "" for process in over}

    def release(self) -> None:
        pass

    def close(self) -> None:
        for process in self.running:
            process.terminate()
        for process in self.running:
            process.join(timeout=30)
            process.kill()
            process.join()


def _alone(function: Callable, *arguments: object) -> None:
    """The whole of a job's process."""
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the parent as well, which then terminates this one
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # an exception, so that a kernel is shut down, too
    function(*arguments)


# ----------------------------------------------------------------------------------------------------- dask and Slurm


class Dask:
    """Every job on a worker of a dask cluster of its own; a worker has one job at a time.

    Jobs are tied to a worker, so that dask neither lets one wait behind another nor starts it again elsewhere.
    """

    def __init__(self, cluster, workers: int):
        import dask
        from distributed import Client

        # A worker that restarts on a busy machine takes longer than dask's 15 seconds, but is not lost.
        dask.config.set({"distributed.deploy.lost-worker-timeout": "2 minutes"})
        self.cluster, self.busy, self.checked = cluster, {}, time.monotonic()
        try:
            cluster.sync(_start, cluster, workers)
        except BaseException:
            with suppress(AssertionError):  # closing, dask wants every worker to have started
                cluster.close()
            raise
        self.client = Client(cluster)

    @property
    def free(self) -> list[tuple[str, object]]:
        """Addresses and names of the idle workers; a worker that replaces another has its name, and another address."""
        return [place for place in self._workers if place not in self.busy.values()]

    @property
    def _workers(self) -> list[tuple[str, object]]:
        return [(address, about["name"]) for address, about in self.cluster.scheduler_info["workers"].items()]

    def start(self, function: Callable, *arguments: object):
        place = self.free[0]
        job = self.client.submit(function, *arguments, workers=[place[0]], pure=False)
        self.busy[job] = place
        return job

    def ended(self, jobs: Iterable) -> dict:
        time.sleep(TICK)
        if time.monotonic() - self.checked > CHECK:  # workers that are lost, or jobs that Slurm has ended, are replaced
            self.cluster.scale(len(self.cluster.worker_spec))
            self.checked = time.monotonic()
        over = {}
        for job in jobs:
            if job.status == "finished":
                over[job] = ""
            elif job.done():
                over[job] = repr(job.exception())
            elif self.busy[job] not in self._workers:
                over[job] = "its worker is gone"
        for job in over:
            del self.busy[job]
        self.client.cancel(list(over))  # else dask would do a job again whose worker, and so its result, is gone
        return over

    def release(self) -> None:
        idle = set(self.cluster.worker_spec) - {name for _, name in self.busy.values()}
        if idle:
            self.cluster.sync(self.cluster.scale_down, idle)

    def close(self) -> None:
        self.client.close()
        self.cluster.close()


async def _start(cluster, workers: int) -> None:
    """Start workers, or submit the jobs that will; unlike `scale` of a cluster, this raises what goes wrong."""
    for _ in range(workers):
        cluster.worker_spec.update(cluster.new_worker_spec())
    await cluster


def _local_cluster():
    """A dask cluster on this machine, without workers as yet; worker i sees GPU i alone."""
    from distributed import LocalCluster

    devices = gpus()

    class Cluster(LocalCluster):
        def new_worker_spec(self):
            [(number, spec)] = super().new_worker_spec().items()
            env = {"CUDA_VISIBLE_DEVICES": devices[number]} if devices else {}
            return {number: spec | {"options": spec["options"] | {"env": env}}}

    quiet = {"dashboard_address": ":0", "silence_logs": logging.CRITICAL}  # states say what happens to a worker
    return Cluster(n_workers=0, threads_per_worker=1, memory_limit=0, **quiet)


LIBRARY_WALLTIME = "00:30:00"  # dask-jobqueue's own, which ends a training without anybody having chosen it


def _slurm_cluster(logs: Path):
    """A dask cluster of Slurm jobs with one worker each, without jobs as yet.

    Partition, time, memory and GPUs of a job are the user's, from dask's own configuration (jobqueue.slurm).
    """
    import dask
    from dask_jobqueue import SLURMCluster

    chosen = {field: dask.config.get(f"jobqueue.slurm.{field}") for field in ("cores", "memory", "walltime")}
    missing = [field for field, value in chosen.items() if value in (None, LIBRARY_WALLTIME)]
    if missing:
        raise EngineError(
            f"--on slurm: set {', '.join(missing)} in {Path(dask.config.PATH, 'jobqueue.yaml')}, for example\n"
            "jobqueue:\n  slurm:\n    cores: 8\n    memory: 64GB\n    walltime: '2-00:00:00'\n"
            "    job-extra-directives: ['--gres=gpu:1']"
        )
    one_thread = [*dask.config.get("jobqueue.slurm.worker-extra-args"), "--nthreads", "1"]
    return SLURMCluster(processes=1, worker_extra_args=one_thread, job_name="wsss", log_directory=str(logs))
