"""Runs the numbered notebooks in a batch: `wsss reproduce`, and `wsss reproduce --publish`.

Each notebook runs through papermill where an engine puts it: in a process of its own, on a dask worker, in a Slurm job.
That place keeps a state file beside the executed notebook: `queued`, `running` (with process, machine and cell),
`failed` (with cell and error), `killed`, or `done`, which is written last. What papermill itself notes down is not
used: it calls a killed run completed. A notebook whose place dies (out of memory, preempted) is started once more, after
the others, and goes on from the checkpoints of its runs; if that one dies, too, it stays `killed` until the next start.
A second start runs only what is not done with the same parameters and code; runs of the library that are done are not
trained again. A notebook that reads the tables of others names them in its metadata, {"wsss": {"reads": ["14"]}}: it
starts after those of them that are in the batch, and again whenever one of them has run.

This module imports no torch, so that every process starts at once.
"""

import argparse
import ast
import contextlib
import difflib
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nbformat
from tqdm import tqdm

from wsss import states
from wsss.engines import ENGINES, EngineError, cores, engine
from wsss.files import write_atomic, write_json

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
RESULTS = ROOT / "results"
PAPERS = tuple(path.stem.split("_")[1] for path in sorted(NOTEBOOKS.glob("0[1-9]_*.ipynb")))  # a notebook a paper
SEEDS_TO_PUBLISH = 3
ATTEMPTS = 2
KINDS = {kind.__name__: kind for kind in (bool, int, float, str, list, tuple, dict)}


class ReproduceError(RuntimeError):
    """The batch cannot start or go on; the message says why and what to do."""


@dataclass(frozen=True)
class Task:
    """A notebook to run.

    Attributes:
        parameters: replace its own.
        key: the content of notebook and parameters.
        reads: numbers of the notebooks whose tables it reads, all lower than its own.
    """

    notebook: Path
    parameters: dict[str, object]
    key: str
    reads: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.notebook.stem

    @property
    def number(self) -> str:
        return self.name.split("_")[0]


# ------------------------------------------------------------------------------------------------------------ tasks


def find_notebooks(wanted: Iterable[str] = (), folder: Path = NOTEBOOKS) -> list[Path]:
    """The notebooks NN_<paper>... whose number or paper is one of `wanted` ("04", "4", "more"), or all, in order.

    Raises:
        ReproduceError: no notebook has such a number or paper.
    """
    known = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    wanted = {word.zfill(2) for word in wanted}
    found = [path for path in known if not wanted or wanted & set(path.stem.split("_")[:2])]
    unknown = sorted(wanted - {part for path in found for part in path.stem.split("_")[:2]})
    if unknown or not known:
        listed = ", ".join(path.stem for path in known) or "none"
        missing = ", ".join(unknown) or "with a number"
        raise ReproduceError(f"{_shown(folder)}: no notebook {missing}; there are: {listed}")
    return found


def prepare(
    notebooks: Iterable[Path], parameters: Mapping[str, object], shared: Mapping[str, object] | None = None
) -> list[Task]:
    """Check everything before anything runs.

    Args:
        parameters: replace the parameters of every notebook. Text is read as a literal where the notebook declares
            another type, so that values of a command line can be passed on as they are.
        shared: the same, but only for the notebooks that declare them.

    Raises:
        ReproduceError: a notebook does not declare a parameter, declares another type for it, or reads a notebook
            without a lower number; lists all such cases.
    """
    tasks, problems = [], []
    for notebook in map(Path, notebooks):
        declared, values = _declared(notebook), {}
        given = {name: value for name, value in (shared or {}).items() if name in declared} | dict(parameters)
        for name, value in given.items():
            if name not in declared:
                near = difflib.get_close_matches(name, declared, 3)
                hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(declared) or 'none'}"
                problems.append(f"{notebook.name}: unknown parameter {name!r}; {hint}")
                continue
            try:
                values[name] = _typed(value, declared[name])
            except TypeError:
                kind = declared[name].__name__
                problems.append(f"{notebook.name}: parameter {name!r} must be {kind}, not {value!r}")
        task = Task(notebook, values, _key(notebook, values), _reads(notebook))
        late = [number for number in task.reads if number >= task.number]
        if late:
            what = f"reads {', '.join(late)}; a notebook reads only those with a lower number"
            problems.append(f"{notebook.name}: {what}")
        tasks.append(task)
    if problems:
        raise ReproduceError("\n".join(problems))
    return tasks


def _declared(notebook: Path) -> dict[str, type]:
    """Parameters of a notebook with their types, as papermill finds them."""
    import papermill

    types = {}
    for name, about in papermill.inspect_notebook(str(notebook)).items():
        annotation = about["inferred_type_name"].split("[")[0].strip()
        if annotation not in KINDS:
            raise ReproduceError(f"{notebook.name}: declare {name!r} as one of {', '.join(KINDS)}, not {annotation}")
        types[name] = KINDS[annotation]
    return types


def _typed(value: object, kind: type) -> object:
    """`value` as `kind`, or a TypeError. Only text and whole numbers are turned into something else."""
    if isinstance(value, str) and kind is not str:
        try:
            value = ast.literal_eval(value.capitalize() if kind is bool else value)
        except (ValueError, SyntaxError) as error:
            raise TypeError from error
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise TypeError
    return value


def _key(notebook: Path, parameters: Mapping[str, object]) -> str:
    """Hash of the notebook's code and the parameters: text between the cells and outputs may change freely."""
    code = [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps([code, parameters], sort_keys=True).encode()).hexdigest()[:16]


def _reads(notebook: Path) -> tuple[str, ...]:
    """The notebooks that a notebook reads, by its metadata."""
    return tuple(nbformat.read(notebook, as_version=4).metadata.get("wsss", {}).get("reads", ()))


# ------------------------------------------------------------------------------------------------------------ states


def state_path(out: Path, name: str) -> Path:
    """Where the state of the notebook `name` is kept."""
    return Path(out) / "notebooks" / f"{name}.state.json"


def read_state(out: Path, name: str) -> dict:
    """The true state of a notebook, see `states.read_state`."""
    return states.read_state(state_path(out, name))


def _refuse_running(out: Path) -> None:
    for path in sorted((Path(out) / "notebooks").glob("*.state.json")):
        name = path.name.removesuffix(".state.json")
        state = read_state(out, name)
        if state["state"] == "running":
            raise ReproduceError(
                f"{name} is running in {_shown(out)} already (process {state['pid']} on "
                f"{state.get('host', 'this machine')}); wait for it or stop it. "
                f"If that process is something else, delete {_shown(path)}"
            )


def describe(state: Mapping) -> str:
    """One line about a state."""
    match state["state"]:
        case "failed":
            return f"failed {_where(state)}: {state['error']}: {state['message']}"
        case "killed":
            return f"killed {_where(state)}" + (f": {state['cause']}" if "cause" in state else "")
        case "done":
            return f"done in {state['seconds']:.0f} s"
        case "queued" if "cause" in state:
            return f"queued: {state['cause']}"
        case other:
            return other


def _where(state: Mapping) -> str:
    return f"in cell {state['cell']}" if state.get("cell") else "before the first cell"


# --------------------------------------------------------------------------------------------------------------- run


def run(tasks: Sequence[Task], out: str | Path, at_once: int | None = None, on: str = "local") -> dict[str, dict]:
    """Execute what is not done yet, on an engine.

    Executed notebooks and their states go to <out>/notebooks, what they print to <out>/log. One progress line a
    notebook is drawn on stderr. Interrupting this process stops the notebooks; a later call goes on from there.

    Args:
        at_once: how many notebooks run side by side: by default half as many as there are cores, in Slurm all of them.
            Dask has one on each of its workers.
        on: one of `engines.ENGINES`.

    Returns:
        Name of each task -> its state in the end.

    Raises:
        ReproduceError: a notebook of `out` is running already.
        EngineError: the engine cannot be had.
        PermissionError: `out` cannot be written.
    """
    out = Path(out)
    _refuse_running(out)
    queue = []
    for task in sorted(tasks, key=lambda task: task.name):
        if not _is_done(task, out) or any(s in queue or _is_newer(s, task, out) for s in _sources(task, tasks)):
            queue.append(task)
    for task in queue:
        write_json(state_path(out, task.name), _queued(task, attempt=1))
    (out / "log").mkdir(parents=True, exist_ok=True)
    with _Progress(tasks, out) as progress:
        if queue:
            _run_all(queue, out, on, at_once or (len(queue) if on == "slurm" else max(1, cores() // 2)), progress)
    return {task.name: read_state(out, task.name) for task in tasks}


def _run_all(queue: list[Task], out: Path, on: str, at_once: int, progress: "_Progress") -> None:
    batch, running = list(queue), {}
    try:
        with engine(on, at_once, out / "log") as pool:
            while queue or running:
                while (task := _startable(queue, running.values(), batch, out)) and pool.free:
                    queue.remove(task)
                    running[pool.start(_work, task, out.resolve())] = task
                if not task:
                    pool.release()
                for job, cause in pool.ended(running).items():
                    task = running.pop(job)
                    attempt = _close(task, out, cause)
                    if attempt and attempt < ATTEMPTS:
                        write_json(state_path(out, task.name), _queued(task, attempt=attempt + 1, cause=cause))
                        queue.append(task)
                progress.update()
    finally:
        for task in running.values():
            _close(task, out, "the batch was stopped")
        progress.update()


def _startable(queue: list[Task], running: Collection[Task], batch: Sequence[Task], out: Path) -> Task | None:
    """The first of a queue whose sources are all done; one with a source that ended otherwise leaves the queue."""
    for task in list(queue):
        sources = _sources(task, batch)
        if any(source in queue or source in running for source in sources):
            continue
        ended = {source.name: read_state(out, source.name) for source in sources}
        missing = [f"{name}, which is {describe(state)}" for name, state in ended.items() if state["state"] != "done"]
        if not missing:
            return task
        queue.remove(task)
        write_json(state_path(out, task.name), _queued(task, cause=f"it reads {'; '.join(missing)}"))
    return None


def _sources(task: Task, batch: Sequence[Task]) -> list[Task]:
    """The tasks of a batch whose tables a task reads."""
    return [other for other in batch if other.number in task.reads]


def _is_newer(source: Task, task: Task, out: Path) -> bool:
    """Whether `source` ended after `task` did; both are done."""
    ended = [state_path(out, each.name).stat().st_mtime_ns for each in (source, task)]
    return ended[0] > ended[1]


def _is_done(task: Task, out: Path) -> bool:
    state = read_state(out, task.name)
    return state["state"] == "done" and state["key"] == task.key and (out / "notebooks" / task.notebook.name).exists()


def _queued(task: Task, **attempt: object) -> dict:
    return {"state": "queued", "key": task.key, "parameters": task.parameters, **attempt}


def _close(task: Task, out: Path, cause: str) -> int:
    """Write down that a notebook is gone which could not say so itself, and return its attempt; else 0."""
    state = read_state(out, task.name)
    if state["state"] in ("done", "failed"):
        return 0
    write_json(state_path(out, task.name), state | {"state": "killed", "cause": cause})
    return state["attempt"]


class _Progress:
    """One tqdm line a notebook, on stderr: name, cells done of all, state."""

    def __init__(self, tasks: Sequence[Task], out: Path):
        self.tasks, self.out, self.bars = tasks, out, {}

    def __enter__(self) -> "_Progress":
        width = max((len(task.name) for task in self.tasks), default=0)
        line = "{desc} |{bar:20}| {n_fmt}/{total_fmt} cells [{elapsed}{postfix}]"
        for position, task in enumerate(self.tasks):
            name = task.name.ljust(width)
            bar = tqdm(total=_cells(task), desc=name, position=position, file=sys.stderr, bar_format=line)
            self.bars[task.name] = bar
        self.update()
        return self

    def update(self) -> None:
        for name, bar in self.bars.items():
            state = read_state(self.out, name)
            running, said = state["state"] == "running", describe(state)
            if running and bar.postfix != said:
                bar.reset()  # its time starts now
            bar.n = bar.total if state["state"] == "done" else max(0, state.get("cell", 0) - 1)
            if bar.postfix != said or (running and sys.stderr.isatty()):
                bar.set_postfix_str(said)

    def __exit__(self, *_: object) -> None:
        for bar in self.bars.values():
            bar.close()


def _cells(task: Task) -> int:
    """Code cells that will run; papermill adds one that holds the parameters."""
    cells = nbformat.read(task.notebook, as_version=4).cells
    return sum(cell.cell_type == "code" and bool(cell.source.strip()) for cell in cells) + bool(task.parameters)


# --------------------------------------------------------------------------------------------- where a notebook runs


def _work(task: Task, out: Path) -> None:
    """Run one notebook that is queued, and keep its state."""
    path = state_path(out, task.name)
    state = states.read_state(path) | states.running() | {"cell": 0}
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # a kernel named python3 of the user would be another environment
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # notebooks stand side by side: more threads than cores slow all down
    start = time.perf_counter()

    def started() -> None:
        state["cell"] += 1
        write_json(path, state)

    write_json(path, state)
    with states.beating(path), _printing_to(out / "log" / f"{task.name}.log"):
        try:
            execute(task, out / "notebooks" / task.notebook.name, started)
        except Exception as error:
            print(error, file=sys.stderr)
            name, message = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error))
            state |= {"state": "failed", "error": name, "message": (message.strip().splitlines() or [""])[0]}
        else:
            state["state"] = "done"
    del state["pid"]
    write_json(path, state | {"seconds": round(time.perf_counter() - start, 1)})


@contextlib.contextmanager
def _printing_to(path: Path) -> Iterator[None]:
    """Send what this process and its children print to a file."""
    kept = os.dup(1), os.dup(2)
    with open(path, "w", buffering=1) as log:
        try:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
            yield
        finally:
            for stream, before in enumerate(kept, start=1):
                os.dup2(before, stream)
                os.close(before)


def execute(task: Task, output: Path, started: Callable[[], object]) -> None:
    """Execute a notebook into `output`, from its own folder and with relative paths only; strip what papermill adds.

    A kernel that does not start is tried once more: many that start at once may race for a port.

    Args:
        started: is called before each code cell.
    """
    import papermill

    folder, reached = task.notebook.resolve().parent, []

    def note(cell: nbformat.NotebookNode, cell_index: int) -> None:
        reached.append(cell_index)
        started()

    with contextlib.chdir(folder):
        for last in (False, True):
            try:
                papermill.execute_notebook(
                    task.notebook.name,
                    os.path.relpath(output, folder),
                    parameters=task.parameters,
                    kernel_name="python3",
                    language="python",
                    progress_bar=False,
                    on_cell_execute=note,
                    coalesce_streams=True,
                )
                return
            except Exception as error:
                if last or reached:
                    raise
                print(f"the kernel did not start ({error}); once more", file=sys.stderr)
            finally:
                if output.exists():
                    write_atomic(output, nbformat.writes(strip(nbformat.read(output, as_version=4))) + "\n")


def strip(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Take papermill's metadata and the paths of this machine out of a notebook, in place."""
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        for output in cell.get("outputs", []):
            if "text" in output:
                output.text = _without_machine_paths(output.text)
            for kind, content in output.get("data", {}).items():
                if kind.startswith("text/") and isinstance(content, str):
                    output.data[kind] = _without_machine_paths(content)
            if "traceback" in output:
                output.traceback = [_without_machine_paths(line) for line in output.traceback]
    return notebook


def _without_machine_paths(text: str) -> str:
    text = re.sub(r"[^\s\"']*/ipykernel_\d+/\d+\.py", "<cell>", text)
    for folder, short in ((sys.prefix, ""), (ROOT, ""), (Path.home(), "~/")):
        if len(Path(folder).parts) > 1:  # in some containers the home is /
            text = text.replace(f"{folder}/", short)
    return text


# ----------------------------------------------------------------------------------------------------------- publish


def publish(out: Path, notebooks: Sequence[Path], results: Path = RESULTS) -> dict[str, dict]:
    """Make a finished reproduction the committed one.

    Copies its records and tables to <results>/<dataset>/, executes `notebooks` with their default parameters, which
    read those records, and puts the executed ones in place of the old, all of them or none. Then the index of that
    folder, the README's tables and the pictures in docs/ beside <results> are generated anew.

    Args:
        out: folder of a reproduction of all `notebooks` with three seeds or more.

    Returns:
        Name of each notebook -> its state.

    Raises:
        ReproduceError: a notebook is not done, had too few seeds, or there are no records of exactly one dataset.
        PermissionError: a folder cannot be written.
    """
    from wsss import experiments

    states = {path.stem: read_state(out, path.stem) for path in notebooks}
    open_ends = [f"{name} is {describe(state)}" for name, state in states.items() if state["state"] != "done"]
    for name, state in states.items():
        seeds = state.get("parameters", {}).get("seeds", SEEDS_TO_PUBLISH)
        if seeds < SEEDS_TO_PUBLISH:
            open_ends.append(f"{name} ran with {seeds} seed(s)")
    if open_ends:
        raise ReproduceError(
            f"{_shown(out)} is no finished reproduction with {SEEDS_TO_PUBLISH} seeds: {'; '.join(open_ends)}. "
            f"Run `wsss reproduce --seeds {SEEDS_TO_PUBLISH}` first"
        )
    runs = [path for path in sorted((out / "runs").glob("*")) if experiments.read_state(path)["state"] == "done"]
    identities = {experiments.Record.read(run).identity for run in runs}
    if len(identities) != 1:
        found = ", ".join(sorted(identities)) or "none"
        raise ReproduceError(f"{_shown(out / 'runs')}: needs finished runs on one dataset; found: {found}")
    target = results / identities.pop()
    for run_folder in runs:
        for name in ("record.json", "state.json"):
            write_atomic(target / "runs" / run_folder.name / name, (run_folder / name).read_bytes())
    for table in _tables(out):
        write_atomic(target / table.relative_to(out), table.read_bytes())
    states = _execute_in_place(notebooks, out / "publish")
    if all(state["state"] == "done" for state in states.values()):
        from wsss import index

        index.write_index(target, find_notebooks())
        index.write_readme(results.parent / "README.md")
        index.write_pictures(notebooks, results.parent / "docs")
    return states


def _execute_in_place(notebooks: Sequence[Path], scratch: Path) -> dict[str, dict]:
    shutil.rmtree(scratch, ignore_errors=True)  # the records have changed: nothing in there is done
    states = run(prepare(notebooks, {}), scratch)
    if all(state["state"] == "done" for state in states.values()):
        for notebook in notebooks:
            write_atomic(notebook, (scratch / "notebooks" / notebook.name).read_bytes())
    return states


# ----------------------------------------------------------------------------------------------------------- command


def add_choice(parser: argparse.ArgumentParser) -> None:
    """The options that say what is reproduced."""
    parser.add_argument("--dataset", default="embedded", help="what to train and test on (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each run (default: %(default)s)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--papers", nargs="+", default=[], choices=PAPERS, help="all notebooks of these (default: all)")
    which.add_argument("--notebooks", nargs="+", default=[], metavar="NN", help="numbers, for a finer choice: 00 04")
    parser.add_argument(
        "-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="for every notebook"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `wsss reproduce`."""
    add_choice(parser)
    parser.add_argument("--data-root", metavar="PATH", help="folder that holds the dataset")
    parser.add_argument("--on", choices=ENGINES, default="local", help="what runs the notebooks (default: %(default)s)")
    parser.add_argument("--out", metavar="PATH", type=Path, help="default: results/<dataset>/reproduced")
    parser.add_argument("--fresh", action="store_true", help="start over; what is there is moved aside")
    parser.add_argument(
        "--publish",
        action="store_true",
        help="run nothing, but make the finished reproduction in --out the committed one",
    )


def command(arguments: argparse.Namespace) -> int:
    """Run `wsss reproduce`; 0 when every notebook is done, 1 when one is not, 2 when nothing could be started."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the notebooks are stopped, too
    out = arguments.out or RESULTS / arguments.dataset / "reproduced"
    try:
        states = publish(out, chosen_notebooks(arguments)) if arguments.publish else _reproduce(arguments, out)
    except (ReproduceError, EngineError, OSError) as error:
        print(f"wsss reproduce: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("wsss reproduce: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    place = out / "publish" if arguments.publish else out
    for name, state in states.items():
        print(f"{name}: {describe(state)}")
        if state["state"] in ("failed", "killed"):
            print(f"  see {_shown(place / 'notebooks' / name)}.ipynb and {_shown(place / 'log' / name)}.log")
    for table in _tables(out):
        print(_shown(table))
    if not arguments.publish:
        print(f"which table comes from what: {_shown(out / 'index.md')}")
    return 0 if all(state["state"] == "done" for state in states.values()) else 1


def chosen_notebooks(arguments: argparse.Namespace) -> list[Path]:
    """The notebooks that the options of `add_choice` name."""
    return find_notebooks(arguments.papers or arguments.notebooks)


def chosen_tasks(arguments: argparse.Namespace, own: Mapping[str, object]) -> list[Task]:
    """The tasks that the options of `add_choice` name; `own` are the parameters that a command sets itself.

    Raises:
        ReproduceError: an option has a value that does not exist.
    """
    from wsss.experiments import RECIPE_DATASETS

    if arguments.dataset not in RECIPE_DATASETS:
        raise ReproduceError(f"--dataset {arguments.dataset} is not one of {', '.join(RECIPE_DATASETS)}")
    if arguments.seeds < 1:
        raise ReproduceError(f"--seeds is {arguments.seeds}; one seed or more is needed")
    shared = {"dataset": arguments.dataset, "seeds": arguments.seeds, "retrain": True, **own}
    return prepare(chosen_notebooks(arguments), dict(arguments.parameter), shared)


def _reproduce(arguments: argparse.Namespace, out: Path) -> dict[str, dict]:
    from wsss import index
    from wsss.experiments import recipe_for

    # What trains in a Slurm job has a GPU even where this process has none.
    recipe = arguments.dataset if arguments.on == "slurm" else recipe_for(arguments.dataset)
    small = recipe in ("embedded", "voc2012-cpu")  # else one run takes all of a device
    own = {
        "data_root": os.path.relpath(arguments.data_root, NOTEBOOKS) if arguments.data_root else "",
        "workers": min(2, cores()) if small else 1,
        "out": os.path.relpath(out, NOTEBOOKS),
    }
    tasks = chosen_tasks(arguments, own)
    if arguments.fresh and out.exists():
        _refuse_running(out)
        out.rename(out.with_name(f"{out.name}-{time.strftime('%Y%m%d-%H%M%S')}"))
    states = run(tasks, out, 1 if arguments.on == "local" and not small else None, arguments.on)
    write_json(out / "state.json", {"notebooks": states, "tables": [path.name for path in _tables(out)]})
    index.write_index(out, find_notebooks())
    return states


def _tables(out: Path) -> list[Path]:
    """The tables that notebooks wrote, as shown in them and as published, and the pictures kept beside them."""
    found = [path for folder in ("tables", "as_published") for path in (out / folder).glob("*")]
    return sorted(path for path in found if path.suffix in (".csv", ".md", ".html", ".npz"))


def _shown(path: Path) -> str:
    return os.path.relpath(path)
