"""The batch runner, on notebooks of a few cells."""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from test_tables import make_record

from wsss import engines, experiments, reproduce, states
from wsss.reproduce import ReproduceError, Task, prepare, read_state, run

PARAMETERS = "seeds: int = 3  # x\nrate: float = 0.5  # x\nflip: bool = False  # x\nname: str = 'a'  # x"


def write_notebook(path, *cells, parameters=PARAMETERS):
    """A notebook of a `parameters` cell and `cells`, not executed."""
    first = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    notebook = new_notebook(cells=[first, *map(new_code_cell, cells)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


def texts(path):
    """Everything that the code cells of an executed notebook printed."""
    cells = nbformat.read(path, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


# ------------------------------------------------------------------------------------------------------------ tasks


def test_prepare_refuses_unknown_parameters(tmp_path):
    notebook = write_notebook(tmp_path / "04_more.ipynb")
    with pytest.raises(ReproduceError, match="04_more.ipynb: unknown parameter 'seed'; did you mean seeds?"):
        prepare([notebook], {"seed": 3})
    with pytest.raises(ReproduceError, match="'zzz'; it has seeds, rate, flip, name"):
        prepare([notebook], {"zzz": 3})


@pytest.mark.parametrize(
    "name, value", [("seeds", "many"), ("seeds", 1.5), ("seeds", True), ("flip", "1"), ("rate", "x"), ("name", 3)]
)
def test_prepare_refuses_values_of_another_type(tmp_path, name, value):
    kind = {"seeds": "int", "flip": "bool", "rate": "float", "name": "str"}[name]
    with pytest.raises(ReproduceError, match=f"00_a.ipynb: parameter '{name}' must be {kind}"):
        prepare([write_notebook(tmp_path / "00_a.ipynb")], {name: value})


def test_prepare_reads_text_as_the_declared_type(tmp_path):
    notebook = write_notebook(tmp_path / "00_a.ipynb")
    [task] = prepare([notebook], {"seeds": "3", "rate": "1e-3", "flip": "true", "name": "7"})
    assert task.parameters == {"seeds": 3, "rate": 1e-3, "flip": True, "name": "7"}
    assert prepare([notebook], {"rate": 1})[0].parameters == {"rate": 1.0}


def test_prepare_gives_shared_parameters_to_those_who_declare_them(tmp_path):
    first = write_notebook(tmp_path / "00_a.ipynb")
    second = write_notebook(tmp_path / "01_b.ipynb", parameters="x: int = 1")
    a, b = prepare([first, second], {}, {"seeds": 5, "x": 2})
    assert a.parameters == {"seeds": 5} and b.parameters == {"x": 2}


def test_prepare_lists_all_problems_at_once(tmp_path):
    notebooks = [write_notebook(tmp_path / f"0{i}_a.ipynb") for i in range(2)]
    with pytest.raises(ReproduceError) as raised:
        prepare(notebooks, {"sed": 1, "rate": "x"})
    assert len(str(raised.value).splitlines()) == 4


def test_prepare_refuses_a_parameter_without_a_type(tmp_path):
    with pytest.raises(ReproduceError, match="declare 'x'"):
        prepare([write_notebook(tmp_path / "00_a.ipynb", parameters="x = 1")], {})


def test_the_key_tells_code_and_parameters_but_not_text(tmp_path):
    path = write_notebook(tmp_path / "00_a.ipynb", "1 + 1")
    key = prepare([path], {})[0].key
    assert prepare([path], {"seeds": 1})[0].key != key
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(new_markdown_cell("a remark"))
    notebook.cells[1].execution_count = 1
    nbformat.write(notebook, path)
    assert prepare([path], {})[0].key == key
    write_notebook(path, "1 + 2")
    assert prepare([path], {})[0].key != key


def test_find_notebooks_by_number(tmp_path):
    for name in ("00_data", "04_more", "14_more_ablations", "x"):
        write_notebook(tmp_path / f"{name}.ipynb")
    names = lambda *numbers: [path.stem for path in reproduce.find_notebooks(numbers, tmp_path)]
    assert names() == ["00_data", "04_more", "14_more_ablations"]
    assert names("14", "4") == ["04_more", "14_more_ablations"]
    with pytest.raises(ReproduceError, match="no notebook 07; there are: 00_data"):
        names("07", "00")


def test_find_notebooks_by_paper(tmp_path):
    for name in ("00_data", "02_apc", "03_seco", "04_more", "12_apc_ablations", "14_more_ablations"):
        write_notebook(tmp_path / f"{name}.ipynb")
    found = [path.stem for path in reproduce.find_notebooks(["more", "apc"], tmp_path)]
    assert found == ["02_apc", "04_more", "12_apc_ablations", "14_more_ablations"]
    with pytest.raises(ReproduceError, match="no notebook bnr; there are: 00_data"):
        reproduce.find_notebooks(["bnr", "apc"], tmp_path)


def test_a_paper_is_known_by_its_notebook():
    numbers = {name: path.stem[:2] for name in reproduce.PAPERS for path in reproduce.find_notebooks([name])[:1]}
    assert [numbers[name] for name in ("bnr", "apc", "seco", "more")] == ["01", "02", "03", "04"]
    ablations = {path.stem.split("_")[1] for path in reproduce.find_notebooks() if "11" <= path.stem[:2] <= "14"}
    assert ablations == {"bnr", "apc", "seco", "more"} and len(set(reproduce.PAPERS)) == len(reproduce.PAPERS)


# -------------------------------------------------------------------------------------------------------------- run


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """One batch of four notebooks: one passes, one fails, the kernel of one dies, the process of one is killed."""
    folder = tmp_path_factory.mktemp("batch")
    kill = "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nimport time; time.sleep(60)"
    told = "print(seeds, os.getcwd().split('/')[-1], os.environ['OMP_NUM_THREADS'])"
    notebooks = [
        write_notebook(folder / "notebooks/00_passes.ipynb", "import os", told),
        write_notebook(folder / "notebooks/01_fails.ipynb", "1", "raise ValueError('too few\\nimages')", "print('no')"),
        write_notebook(folder / "notebooks/02_dies.ipynb", "import os", "os._exit(3)", "print('no')"),
        write_notebook(folder / "notebooks/03_killed.ipynb", kill, "print('no')"),
    ]
    tasks, out, stderr = prepare(notebooks, {"seeds": 7}), folder / "out", io.StringIO()
    with contextlib.redirect_stderr(stderr), pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        states = run(tasks, out, at_once=4)
    return argparse.Namespace(folder=folder, out=out, notebooks=notebooks, states=states, stderr=stderr.getvalue())


def test_a_notebook_that_passes_is_done(batch):
    state = batch.states["00_passes"]
    assert state["state"] == "done" and state["parameters"] == {"seeds": 7} and state["seconds"] > 0
    assert texts(batch.out / "notebooks/00_passes.ipynb") == "7 notebooks 1\n", "parameters, its own folder, one thread"
    assert json.loads((batch.out / "notebooks/00_passes.state.json").read_text()) == state


def test_a_notebook_that_fails_says_where_and_why(batch):
    state = batch.states["01_fails"]
    assert (state["state"], state["error"], state["message"]) == ("failed", "ValueError", "too few")
    cells = nbformat.read(batch.out / "notebooks/01_fails.ipynb", as_version=4).cells
    failing = [cell for cell in cells if "raise ValueError" in cell.source]
    assert state["cell"] == failing[0].execution_count == 4, "the number is that of In [4]"
    assert "no" not in texts(batch.out / "notebooks/01_fails.ipynb").split()


def test_a_dead_kernel_is_a_failure_although_papermill_calls_it_completed(batch):
    state = batch.states["02_dies"]
    assert (state["state"], state["error"], state["cell"]) == ("failed", "DeadKernelError", 4)


def test_a_killed_process_is_told_from_a_failure(batch):
    state = batch.states["03_killed"]
    assert state["state"] == "killed" and state["cell"] == 3 and state["cause"] == "exit code -9"
    assert state["attempt"] == 2, "it was started once more, and no more than that"


def test_each_notebook_has_a_progress_line(batch):
    last = batch.stderr.replace("\r", "\n").splitlines()
    for name, cells in (("00_passes", "4/4"), ("01_fails", "3/5"), ("02_dies", "3/5"), ("03_killed", "2/4")):
        assert any(name in line and f"{cells} cells" in line for line in last), name
    assert "failed in cell 4: ValueError: too few" in batch.stderr


def test_executed_notebooks_hold_nothing_of_papermill_or_this_machine(batch):
    for name in ("00_passes", "01_fails"):
        text = (batch.out / f"notebooks/{name}.ipynb").read_text()
        assert '"papermill"' not in text and str(batch.folder) not in text and sys.prefix not in text
        nbformat.validate(nbformat.reads(text, as_version=4))


def test_a_second_start_does_only_what_is_missing(batch):
    done = reproduce.state_path(batch.out, "00_passes")
    before = done.stat().st_mtime_ns
    write_notebook(batch.notebooks[1], "print('repaired')")
    states = run(prepare(batch.notebooks[:2], {"seeds": 7}), batch.out)
    assert [state["state"] for state in states.values()] == ["done", "done"]
    assert done.stat().st_mtime_ns == before
    assert texts(batch.out / "notebooks/01_fails.ipynb") == "repaired\n"
    (batch.out / "notebooks/00_passes.ipynb").unlink()
    assert not reproduce._is_done(prepare(batch.notebooks[:1], {"seeds": 7})[0], batch.out), "its result is gone"
    assert not reproduce._is_done(prepare(batch.notebooks[1:2], {"seeds": 8})[0], batch.out), "other parameters"


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """A batch on two dask workers, as of two GPUs. One notebook kills its worker the first time, one every time."""
    folder = tmp_path_factory.mktemp("workers")
    kill = "os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)"
    once = f"from pathlib import Path\nif not Path('flag').exists(): Path('flag').touch(); {kill}"
    place = "import os\nprint(os.getppid(), os.environ['CUDA_VISIBLE_DEVICES'], os.getcwd().split('/')[-1], seeds)"
    cells = {
        "00_killed_once": ("import os, signal, time", once, place),
        "01_killed": ("import os, signal, time", kill),
        "02_passes": (place,),
        "03_fails": ("raise ValueError('too few')",),
    }
    notebooks = [write_notebook(folder / f"notebooks/{name}.ipynb", *own) for name, own in cells.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "gpus", lambda: ["4", "7"])
        states = run(prepare(notebooks, {"seeds": 7}), folder / "out", on="dask")
    return argparse.Namespace(out=folder / "out", notebooks=notebooks, states=states)


def test_a_worker_that_dies_is_replaced_and_its_notebook_started_once_more(workers):
    state = workers.states["00_killed_once"]
    assert state["state"] == "done" and state["attempt"] == 2 and state["cause"] == "its worker is gone"
    state = workers.states["01_killed"]
    assert (state["state"], state["attempt"], state["cell"]) == ("killed", 2, 4)
    assert reproduce.describe(state) == "killed in cell 4: its worker is gone"


def test_a_worker_that_dies_does_not_touch_the_other_notebooks(workers):
    passes, fails = workers.states["02_passes"], workers.states["03_fails"]
    assert passes["state"] == "done" and passes["attempt"] == 1
    assert (fails["state"], fails["cell"], fails["message"], fails["attempt"]) == ("failed", 3, "too few", 1)


def test_every_worker_sees_a_gpu_of_its_own(workers):
    places = [texts(workers.out / f"notebooks/{name}.ipynb").split() for name in ("00_killed_once", "02_passes")]
    assert all(gpu in ("4", "7") and rest == ["notebooks", "7"] for _, gpu, *rest in places)


def test_a_second_start_on_another_engine_does_only_what_is_missing(workers, monkeypatch):
    before = {name: reproduce.state_path(workers.out, name).read_bytes() for name in workers.states}
    for notebook, name in zip(workers.notebooks, workers.states):
        if name in ("01_killed", "03_fails"):
            write_notebook(notebook, "print('repaired')")
    states = run(prepare(workers.notebooks, {"seeds": 7}), workers.out)
    assert {state["state"] for state in states.values()} == {"done"}
    for name in ("00_killed_once", "02_passes"):
        assert reproduce.state_path(workers.out, name).read_bytes() == before[name]


def gone_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# --------------------------------------------------------------------------------- notebooks that read other notebooks

WRITES_LATE = "import time; time.sleep(1)\nfrom pathlib import Path\nPath('a.txt').write_text(name)"
READS_IT = "from pathlib import Path\nprint('read', Path('a.txt').read_text())"


def write_reader(path, reads, *cells):
    """A notebook whose metadata names the notebooks that it reads."""
    notebook = nbformat.read(write_notebook(path, *cells), as_version=4)
    notebook.metadata["wsss"] = {"reads": reads}
    nbformat.write(notebook, path)
    return path


def started_and_ended(out, name):
    """Of a notebook that is done, in seconds."""
    path = reproduce.state_path(out, name)
    ended = path.stat().st_mtime
    return ended - json.loads(path.read_text())["seconds"], ended


@pytest.fixture
def readers(request, tmp_path, monkeypatch):
    """A notebook that writes, one that reads it, and one that reads that; `start` runs some of them, or all."""
    monkeypatch.setattr(engines, "gpus", lambda: ["4", "7"])
    folder, on = tmp_path / "notebooks", getattr(request, "param", "local")
    notebooks = [
        write_reader(folder / "21_reads_both.ipynb", ["07", "14", "20"], READS_IT, "print('again')"),
        write_notebook(folder / "14_writes.ipynb", WRITES_LATE),
        write_reader(folder / "20_reads.ipynb", ["14"], READS_IT),
    ]

    def start(*chosen):
        tasks = prepare([path for path in notebooks if not chosen or path.stem[:2] in chosen], {})
        return run(tasks, tmp_path / "out", 3, on)

    return argparse.Namespace(out=tmp_path / "out", notebooks=notebooks, start=start)


@pytest.mark.parametrize("readers", ["local", "dask"], indirect=True)
def test_a_notebook_starts_after_those_that_it_reads(readers):
    assert {state["state"] for state in readers.start().values()} == {"done"}
    assert texts(readers.out / "notebooks/20_reads.ipynb") == "read a\n"
    assert texts(readers.out / "notebooks/21_reads_both.ipynb") == "read a\nagain\n"
    writes, reads, both = (started_and_ended(readers.out, n) for n in ("14_writes", "20_reads", "21_reads_both"))
    assert writes[1] <= reads[0] + 0.1 and reads[1] <= both[0] + 0.1, "seconds are rounded to a tenth"


def test_a_notebook_runs_again_when_one_that_it_reads_does(readers):
    path = reproduce.state_path(readers.out, "21_reads_both")
    readers.start("14", "21")
    first = path.stat().st_mtime_ns
    readers.start("14", "21")
    assert path.stat().st_mtime_ns == first, "nothing has changed"
    write_notebook(readers.notebooks[1], WRITES_LATE.replace("name", "'b'"))
    readers.start("14", "21")
    assert texts(readers.out / "notebooks/21_reads_both.ipynb") == "read b\nagain\n"


def test_a_notebook_runs_again_when_one_that_it_reads_has_run_without_it(readers):
    readers.start()
    write_notebook(readers.notebooks[1], WRITES_LATE.replace("name", "'b'"))
    readers.start("14")
    readers.start()
    assert texts(readers.out / "notebooks/20_reads.ipynb") == "read b\n"
    assert texts(readers.out / "notebooks/21_reads_both.ipynb") == "read b\nagain\n"


def test_a_notebook_is_not_started_when_one_that_it_reads_fails(readers):
    write_notebook(readers.notebooks[1], "raise ValueError('too few')")
    found = readers.start()
    named = ("14_writes", "20_reads", "21_reads_both")
    assert [found[name]["state"] for name in named] == ["failed", "queued", "queued"]
    why = "it reads 14_writes, which is failed in cell 2: ValueError: too few"
    assert found["20_reads"]["cause"] == why and reproduce.describe(found["20_reads"]) == f"queued: {why}"
    assert found["21_reads_both"]["cause"] == f"{why}; 20_reads, which is queued: {why}"
    assert not (readers.out / "notebooks/20_reads.ipynb").exists()
    write_notebook(readers.notebooks[1], WRITES_LATE)
    assert {state["state"] for state in readers.start().values()} == {"done"}


def test_a_notebook_whose_sources_are_not_in_the_batch_just_starts(readers):
    (readers.notebooks[0].parent / "a.txt").write_text("from before")
    assert [state["state"] for state in readers.start("20").values()] == ["done"]


def test_a_notebook_reads_only_those_with_a_lower_number(tmp_path):
    later, itself = (write_reader(tmp_path / f"{n}_a.ipynb", ["04", "20"]) for n in ("14", "20"))
    with pytest.raises(ReproduceError) as raised:
        prepare([later, itself], {})
    message = "reads 20; a notebook reads only those with a lower number"
    assert str(raised.value) == f"14_a.ipynb: {message}\n20_a.ipynb: {message}"


def test_an_executed_notebook_still_says_what_it_reads(tmp_path):
    path = write_reader(tmp_path / "20_a.ipynb", ["14"], "1")
    reproduce.execute(prepare([path], {"seeds": 1})[0], tmp_path / "20_b.ipynb", lambda: None)
    assert prepare([tmp_path / "20_b.ipynb"], {})[0].reads == ("14",)


def test_a_running_state_without_its_process_was_killed(tmp_path):
    path = reproduce.state_path(tmp_path, "00_a")
    path.parent.mkdir()
    path.write_text(json.dumps({"state": "running", "pid": gone_pid(), "cell": 2}))
    assert read_state(tmp_path, "00_a")["state"] == "killed"
    path.write_text(json.dumps({"state": "running", "pid": os.getpid(), "cell": 2}))
    assert read_state(tmp_path, "00_a")["state"] == "running"
    assert read_state(tmp_path, "01_b") == {"state": "absent"}


def test_a_process_of_another_machine_runs_as_long_as_it_touches_its_state(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    path.write_text(json.dumps(states.running() | {"host": "elsewhere", "pid": gone_pid()}))
    assert states.read_state(path)["state"] == "running"
    long_ago = time.time() - states.LOST - 1
    os.utime(path, (long_ago, long_ago))
    assert states.read_state(path)["state"] == "killed"
    monkeypatch.setattr(states, "BEAT", 0.01)
    with states.beating(path):
        while path.stat().st_mtime == long_ago:
            time.sleep(0.01)
    assert states.read_state(path)["state"] == "running"


def test_run_refuses_a_folder_that_is_in_use(tmp_path):
    path = reproduce.state_path(tmp_path, "00_a")
    path.parent.mkdir()
    path.write_text(json.dumps({"state": "running", "pid": os.getpid(), "cell": 2}))
    with pytest.raises(ReproduceError, match=f"00_a is running.*process {os.getpid()}"):
        run([], tmp_path)


@contextlib.contextmanager
def without_root():
    """Permissions mean nothing to root: be somebody else for a while."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_run_into_a_read_only_folder_says_so_before_anything_starts():
    with tempfile.TemporaryDirectory() as folder:
        notebook = write_notebook(Path(folder) / "00_a.ipynb")
        tasks = prepare([notebook], {})
        os.chmod(folder, 0o555)
        try:
            with without_root(), pytest.raises(PermissionError, match="Make it writable, or choose another"):
                run(tasks, Path(folder) / "out")
            assert sorted(path.name for path in Path(folder).iterdir()) == ["00_a.ipynb"]
        finally:
            os.chmod(folder, 0o755)


@pytest.mark.parametrize("failures, passes", [(0, True), (1, True), (2, False)])
def test_a_kernel_that_does_not_start_is_tried_once_more(tmp_path, monkeypatch, failures, passes):
    calls = []

    def execute_notebook(*_, **__):
        calls.append(1)
        if len(calls) <= failures:
            raise RuntimeError("Kernel died before replying to kernel_info")

    monkeypatch.setattr(papermill, "execute_notebook", execute_notebook)
    task = Task(write_notebook(tmp_path / "00_a.ipynb"), {}, "key")
    with contextlib.nullcontext() if passes else pytest.raises(RuntimeError):
        reproduce.execute(task, tmp_path / "out.ipynb", lambda: None)
    assert len(calls) == min(failures + 1, 2)


def test_a_cell_that_fails_is_not_tried_again(tmp_path, monkeypatch):
    calls = []

    def execute_notebook(*_, on_cell_execute, **__):
        calls.append(1)
        on_cell_execute(cell=None, cell_index=0)
        raise RuntimeError("Kernel died")

    monkeypatch.setattr(papermill, "execute_notebook", execute_notebook)
    with pytest.raises(RuntimeError):
        reproduce.execute(Task(write_notebook(tmp_path / "00_a.ipynb"), {}, "key"), tmp_path / "o", lambda: None)
    assert len(calls) == 1


def test_stopping_the_batch_stops_its_notebooks(tmp_path):
    write_notebook(tmp_path / "00_sleeps.ipynb", "import os, time\nprint(os.getpid(), flush=True)", "time.sleep(300)")
    write_notebook(tmp_path / "01_waits.ipynb")
    code = (
        "from pathlib import Path; import signal, sys; from wsss.reproduce import find_notebooks, prepare, run\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "    run(prepare(find_notebooks(folder=Path('.')), {}), 'out', at_once=1)\n"
    )
    (tmp_path / "batch.py").write_text(code)
    process = subprocess.Popen([sys.executable, "batch.py"], cwd=tmp_path, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while read_state(tmp_path / "out", "00_sleeps").get("cell") != 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    worker = read_state(tmp_path / "out", "00_sleeps")["pid"]
    process.terminate()
    process.communicate(timeout=60)
    assert not states.alive(worker)
    assert not states.alive(int(texts(tmp_path / "out/notebooks/00_sleeps.ipynb"))), "the kernel is gone, too"
    state = json.loads(reproduce.state_path(tmp_path / "out", "00_sleeps").read_text())
    assert state["state"] == "killed" and state["cell"] == 3
    assert read_state(tmp_path / "out", "01_waits")["state"] == "queued"


def test_strip_keeps_the_content_and_drops_the_machine():
    prefix, home = sys.prefix, Path.home()
    cell = new_code_cell("1", metadata={"papermill": {}, "tags": [], "execution": {}})
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stderr", text=f"{prefix}/lib/x.py:3: {reproduce.ROOT}/data {home}/voc"),
        nbformat.v4.new_output("stream", name="stdout", text="/somewhere/ipykernel_12/345.py:1: Warning"),
        nbformat.v4.new_output("display_data", {"text/html": f"<a>{prefix}/x</a>", "image/png": "/a/b+c"}),
    ]
    notebook = new_notebook(cells=[cell], metadata={"papermill": {"input_path": "x"}})
    stripped = reproduce.strip(notebook)
    assert stripped.metadata == {} and stripped.cells[0].metadata == {}
    assert stripped.cells[0].outputs[0].text == f"lib/x.py:3: data {'voc' if home == reproduce.ROOT else '~/voc'}"
    assert stripped.cells[0].outputs[1].text == "<cell>:1: Warning"
    assert stripped.cells[0].outputs[2].data == {"text/html": "<a>x</a>", "image/png": "/a/b+c"}


# ----------------------------------------------------------------------------------------------- command and publish

ALL_PARAMETERS = (
    "dataset: str = 'embedded'  # x\ndata_root: str = ''  # x\nseeds: int = 3  # x\nretrain: bool = False  # x\n"
    "workers: int = 2  # x\nresults: str = '../results'  # x\nout: str = ''  # x"
)
WRITES = "from pathlib import Path\nif out: Path(out, 'tables').mkdir()\nif out: Path(out, 'tables/t.md').touch()"
READS = "print(dataset, seeds, retrain, len(list(Path(results, dataset).glob('runs/*/record.json'))), 'records')"

FAILED = {"state": "failed", "cell": 2, "error": "ZeroDivisionError", "message": "division by zero"}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with one notebook; all of its paths are relative to the folder of the project."""
    write_notebook(tmp_path / "notebooks/04_more.ipynb", WRITES, READS, parameters=ALL_PARAMETERS)
    monkeypatch.setattr(reproduce, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(reproduce.find_notebooks, "__defaults__", ((), tmp_path / "notebooks"))
    monkeypatch.setattr(reproduce.publish, "__defaults__", (tmp_path / "results",))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*words):
    parser = argparse.ArgumentParser()
    reproduce.add_arguments(parser)
    return reproduce.command(parser.parse_args(words))


def test_the_command_runs_resumes_and_starts_afresh(project, capsys, monkeypatch):
    assert call("--seeds", "1", "-p", "workers", "1") == 0
    out = project / "results/embedded/reproduced"
    printed = capsys.readouterr().out
    assert "04_more: done in" in printed and "results/embedded/reproduced/tables/t.md" in printed
    assert texts(out / "notebooks/04_more.ipynb") == "embedded 1 True 0 records\n"
    assert str(project) not in (out / "notebooks/04_more.ipynb").read_text()
    summary = json.loads((out / "state.json").read_text())
    assert summary["tables"] == ["t.md"] and summary["notebooks"]["04_more"]["state"] == "done"
    assert summary["notebooks"]["04_more"]["parameters"]["workers"] == 1, "a parameter given by name wins"

    assert call("--seeds", "1", "-p", "workers", "1") == 0, "nothing is left to do"
    assert json.loads((out / "state.json").read_text()) == summary

    monkeypatch.setattr(reproduce, "run", lambda *_: {"04_more": FAILED})
    assert call("--fresh") == 1
    assert "04_more: failed in cell 2: ZeroDivisionError: division by zero" in capsys.readouterr().out
    aside = [path for path in out.parent.iterdir() if path.name.startswith("reproduced-")]
    assert len(aside) == 1 and (aside[0] / "tables/t.md").exists(), "nothing is lost"
    assert sorted(path.name for path in out.iterdir()) == ["index.md", "state.json"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["-p", "sedes", "3"], "unknown parameter 'sedes'; did you mean seeds"),
        (["--dataset", "voc"], "voc2012"),
        (["--seeds", "0"], "one seed or more"),
        (["--notebooks", "99"], "no notebook 99"),
        (["--publish"], "04_more is absent"),
        (["--papers", "bnr"], "no notebook bnr; there are: 04_more"),
    ],
)
def test_the_command_refuses_bad_input_before_anything_runs(project, capsys, words, message):
    assert call(*words) == 2
    assert message in capsys.readouterr().err
    assert not (project / "results").exists()


@pytest.mark.parametrize(
    "words, message", [(["--on", "ray"], "invalid choice: 'ray'"), (["--papers", "more", "--notebooks", "04"], "not allowed with")]
)
def test_the_command_explains_its_options(project, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        call(*words)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_an_engine_that_cannot_be_had_is_said(project, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert call("--on", "dask") == 2
    assert "wsss reproduce: --on dask: " in capsys.readouterr().err
    assert read_state(project / "results/embedded/reproduced", "04_more")["state"] == "queued"


def test_a_run_at_the_papers_scale_has_a_device_to_itself(project, monkeypatch):
    calls = []
    keep = lambda tasks, out, at_once, on: calls.append((on, at_once, tasks[0].parameters["workers"])) or {}
    monkeypatch.setattr(reproduce, "run", keep)
    monkeypatch.setattr(experiments, "recipe_for", lambda dataset: dataset)
    for words in ([], ["--dataset", "voc2012"], ["--dataset", "voc2012", "--on", "dask"]):
        call(*words)
    monkeypatch.setattr(experiments, "recipe_for", lambda dataset: "voc2012-cpu")
    call("--dataset", "voc2012", "--on", "slurm")
    both = min(2, engines.cores())
    assert calls == [("local", None, both), ("local", 1, 1), ("dask", None, 1), ("slurm", None, 1)]


def finished(project, seeds=3):
    """A reproduction of the project's notebook that looks finished."""
    out = project / "results/embedded/reproduced"
    for folder in (out / "notebooks", out / "runs/a_s0", out / "runs/b_s0", out / "tables"):
        folder.mkdir(parents=True)
    state = {"state": "done", "parameters": {"seeds": seeds}, "cell": 2, "seconds": 1.0}
    reproduce.state_path(out, "04_more").write_text(json.dumps(state))
    (out / "runs/a_s0/record.json").write_text(json.dumps(asdict(make_record(name="a_s0"))))
    (out / "runs/a_s0/state.json").write_text(json.dumps({"state": "done"}))
    (out / "runs/a_s0/checkpoint.pt").write_bytes(b"weights")
    (out / "runs/b_s0/state.json").write_text(json.dumps({"state": "failed", "error": "x"}))
    (out / "tables/t.csv").write_text("arm\n")
    (project / "README.md").write_text("Read me.\n")
    return out


def test_publish_copies_records_and_tables_and_executes_the_notebooks(project, capsys):
    out = finished(project)
    regenerated = "method,variant,quantity,dataset,split,published,value,uncertainty,status,seeds,runs\n"
    regenerated += "MoRe,full,precision,embedded,test,76.2,70.0,1.7,reproduced,3,a_s0\n"
    (out / "as_published").mkdir()
    (out / "as_published/more_table3.csv").write_text(regenerated)
    path = "results/embedded/as_published/more_table3.csv"
    (project / "README.md").write_text(f"<!-- table: {path} precision -->\n<!-- end -->\n")
    assert call("--publish") == 0
    results = project / "results/embedded"
    assert (results / "as_published/more_table3.csv").read_text() == regenerated
    assert "[a_s0](runs/a_s0/record.json)" in (results / "index.md").read_text()
    assert "| MoRe | 76.2 | 70.0 ± 1.7 (3) |" in (project / "README.md").read_text()
    assert sorted(path.name for path in (results / "runs").rglob("*")) == ["a_s0", "record.json", "state.json"]
    assert [path.name for path in (results / "tables").iterdir()] == ["t.csv"]
    notebook = project / "notebooks/04_more.ipynb"
    assert texts(notebook) == "embedded 3 False 1 records\n", "executed with the parameters it is committed with"
    text = notebook.read_text()
    assert "papermill" not in text and "injected-parameters" not in text and str(project) not in text
    assert [path.name for path in notebook.parent.iterdir()] == ["04_more.ipynb"]


def test_publish_replaces_no_notebook_when_one_fails(project, monkeypatch):
    out = finished(project)
    other = write_notebook(project / "notebooks/05_other.ipynb", parameters=ALL_PARAMETERS)
    reproduce.state_path(out, other.stem).write_text(reproduce.state_path(out, "04_more").read_text())

    def run(tasks, folder):
        for task in tasks:
            write_notebook(folder / "notebooks" / task.notebook.name, "executed")
        return {"04_more": {"state": "done", "seconds": 1.0}, "05_other": FAILED}

    monkeypatch.setattr(reproduce, "run", run)
    before = {path: path.read_bytes() for path in other.parent.iterdir()}
    assert call("--publish") == 1
    assert {path: path.read_bytes() for path in other.parent.iterdir()} == before


def test_publish_refuses_a_single_seed(project, capsys):
    finished(project, seeds=1)
    assert call("--publish") == 2
    assert "04_more ran with 1 seed(s)" in capsys.readouterr().err
    assert not (project / "results/embedded/runs").exists()
