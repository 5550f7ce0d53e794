"""Where notebooks run. That a batch runs on dask workers is tested in test_reproduce.py."""

import shlex
import sys

import dask
import dask_jobqueue  # noqa: F401  (brings the defaults of its configuration)
import pytest
import torch
from distributed.cli.dask_worker import main as dask_worker

from wsss import engines
from wsss.engines import EngineError, engine

JOBS = {"cores": 8, "memory": "64GB", "walltime": "2-00:00:00", "queue": "gpu"}
JOBS["job-extra-directives"] = ["--gres=gpu:1"]


def configured(**fields):
    """dask's own configuration of Slurm jobs, as a user would write it."""
    return dask.config.set({f"jobqueue.slurm.{field}": value for field, value in (JOBS | fields).items()})


def test_an_unknown_engine_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown engine 'ray'; choose from local, dask, slurm"):
        with engine("ray", 1, tmp_path):
            pass


@pytest.mark.parametrize("name, package", [("dask", "distributed"), ("slurm", "dask_jobqueue")])
def test_a_package_that_is_not_installed_is_named_with_the_remedy(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EngineError, match=f"--on {name}.*{package}.*pip install distributed dask-jobqueue"):
        with engine(name, 1, tmp_path):
            pass


@pytest.mark.parametrize(
    "visible, count, named", [("", 0, []), ("", 2, ["0", "1"]), ("3,5", 2, ["3", "5"]), ("3,5", 0, [])]
)
def test_gpus_are_those_that_the_process_may_use(monkeypatch, visible, count, named):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert engines.gpus() == named


def test_slurm_asks_for_what_the_configuration_lacks(tmp_path):
    with configured(memory=None, walltime=engines.LIBRARY_WALLTIME):
        remedy = r"set memory, walltime in .*jobqueue\.yaml, for example\njobqueue:\n  slurm:"
        with pytest.raises(EngineError, match=remedy):
            engines._slurm_cluster(tmp_path)


def write_sbatch(folder, monkeypatch, command):
    for name in ("sbatch", "scancel"):
        (folder / name).write_text(f"#!/bin/sh\n{command}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_slurm_that_is_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with configured(), pytest.raises(EngineError, match="--on slurm: no worker can be started: .*sbatch"):
        with engine("slurm", 1, tmp_path):
            pass


def test_slurm_that_refuses_a_job_is_quoted(tmp_path, monkeypatch):
    write_sbatch(tmp_path, monkeypatch, "echo invalid partition: gpu >&2; exit 1")
    with configured(), pytest.raises(EngineError, match="(?s)no worker can be started: .*invalid partition: gpu"):
        with engine("slurm", 1, tmp_path):
            pass


def test_a_slurm_job_is_one_worker_with_one_notebook_at_a_time_and_all_that_was_asked_for(tmp_path, monkeypatch):
    write_sbatch(tmp_path, monkeypatch, f"cp $1 {tmp_path}/$$.job; echo Submitted batch job 7")
    with configured(), engine("slurm", 2, tmp_path / "log") as opened:
        submitted, scheduler = list(tmp_path.glob("*.job")), opened.cluster.scheduler_address
        assert len(submitted) == 2 and not opened.free
    script = submitted[0].read_text()
    directives = {line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")}
    wanted = {"-J wsss", "-p gpu", "-n 1", "--cpus-per-task=8", "--mem=60G", "-t 2-00:00:00", "--gres=gpu:1"}
    assert wanted <= directives
    assert f"-o {tmp_path}/log/wsss-%J.out" in directives
    command = shlex.split(script.splitlines()[-1])
    assert command[:3] == [sys.executable, "-m", "distributed.cli.dask_worker"]
    options = dask_worker.make_context("worker", command[3:]).params
    assert options["nthreads"] == 1 and options["n_workers"] is None
    assert options["scheduler"] == scheduler
