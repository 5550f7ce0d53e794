"""What every committed notebook keeps to, and a proof that nbval compares outputs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from test_environment import MACHINE
from test_reproduce import texts, write_notebook

from wsss.reproduce import KINDS, NOTEBOOKS, Task, execute

FILES = sorted(NOTEBOOKS.glob("*.ipynb"))
CELL_LINES = 25
CONFIG = Path(__file__).parent / "nbval_sanitize.cfg"


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def test_is_a_valid_python_notebook_with_a_number(path, notebook):
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert re.fullmatch(r"\d\d_[a-z0-9_]+\.ipynb", path.name)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")


def test_has_one_cell_of_typed_commented_literals(path, notebook):
    [cell] = [cell for cell in notebook.cells if "parameters" in tags(cell)]
    lines, names = cell.source.splitlines(), []
    for statement in ast.parse(cell.source).body:
        assert isinstance(statement, ast.AnnAssign), f"line {statement.lineno}: write name: type = literal"
        name, kind = statement.target.id, ast.unparse(statement.annotation).split("[")[0]
        assert type(ast.literal_eval(statement.value)) is KINDS[kind], f"{name} is not {kind}"
        assert re.search(r"  # \S", lines[statement.end_lineno - 1]), f"{name} has no comment"
        names.append(name)
    assert names and list(papermill.inspect_notebook(str(path))) == names, "papermill must find all of them"


def test_outputs_are_committed_and_without_errors(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "executed from top to bottom"
    assert not [o for cell in code_cells(notebook) for o in cell.outputs if o.output_type == "error"]


def test_cells_are_short(notebook):
    long = [cell.source.splitlines()[0] for cell in code_cells(notebook) if len(cell.source.splitlines()) > CELL_LINES]
    assert not long, f"more than {CELL_LINES} lines: {long}"


def test_nothing_of_this_machine_or_of_papermill_is_left(notebook):
    assert "papermill" not in notebook.metadata
    for cell in notebook.cells:
        assert "papermill" not in cell.metadata and "injected-parameters" not in tags(cell)
        assert not MACHINE.search(cell.source), cell.source
        for text in map(str, compared(cell, ("text/",))):
            assert not MACHINE.search(text), text


# -------------------------------------------------------------------------------------------------------------- nbval


def compared(cell, kinds=("text/plain", "text/html", "text/markdown")):
    """The outputs of a cell that nbval compares as text: stdout, stderr and `kinds`."""
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            yield output.text
        yield from (content for kind, content in output.get("data", {}).items() if kind.startswith(kinds))


def test_nbval_has_something_to_compare(notebook):
    ignored = {"nbval-ignore-output", "nbval-skip"}
    cells = [cell for cell in code_cells(notebook) if not ignored & set(tags(cell)) and any(compared(cell))]
    assert cells, "strip no outputs and do not ignore all of them"


def nbval(*paths):
    """What nbval says of notebooks, with the options of `make test`: exit code and output."""
    options = ["-p", "no:cacheprovider", "--nbval", "--nbval-current-env", "--nbval-sanitize-with", str(CONFIG)]
    folder = paths[0].parent
    command = [sys.executable, "-m", "pytest", "-rA", "--color=no", f"--rootdir={folder}", *options, *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    return result.returncode, result.stdout


TQDM = "import time\nfrom tqdm import tqdm\nfor _ in tqdm(range(3), desc='steps'): time.sleep(0.01)"


def test_nbval_passes_what_is_the_same_and_fails_what_is_not(tmp_path):
    unexecuted = write_notebook(tmp_path / "source.ipynb", "object()", TQDM, "print(seeds)", "seeds + 1")
    same, other = tmp_path / "same.ipynb", tmp_path / "other.ipynb"
    execute(Task(unexecuted, {}, ""), same, lambda: None)
    assert "steps: 100%" in texts(same), "the bar is compared, too"
    assert sum(any(compared(cell)) for cell in nbformat.read(same, as_version=4).cells) == 4
    changed = nbformat.read(same, as_version=4)
    assert changed.cells[3].outputs[0].text == "3\n"
    changed.cells[3].outputs[0].text = "4\n"
    nbformat.write(changed, other)

    code, said = nbval(same, other)
    assert code == 1 and "1 failed, 9 passed" in said
    assert re.search(r"FAILED .*other.ipynb::Cell 3", said)
    assert len(re.findall(r"PASSED .*same.ipynb::Cell \d", said)) == 5


def test_nbval_sanitises_addresses_and_progress_bars_only():
    from nbval.plugin import get_sanitize_patterns

    def clean(text):
        for pattern, replacement in get_sanitize_patterns(CONFIG.read_text()):
            text = re.sub(pattern, replacement, text)
        return text

    assert clean("<object at 0x7f3a5c0b1d20>") == "<object at ADDRESS>"
    assert clean("runs: 100%|████| 3/3 [00:02<00:00,  1.31run/s]") == "runs: 100%|3/3 TQDM"
    assert clean("runs: 100%|██| 3/3 [01:00:02<?, ?run/s]") == "runs: 100%|3/3 TQDM"
    for text in ("| 58.1 | 3/3 |", "58.1 ± 1.2 (3)", "0x1f", "[0.1, 0.2]", "in 3.2 s", "|a| 1/2 [x]"):
        assert clean(text) == text
