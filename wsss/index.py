"""What readers open first, generated: the index of a results folder, and the README's tables and pictures.

All of it is read off files that are there already: the tables that `tables.regenerate` wrote, the records of the runs
that these name, and the notebooks, whose calls tell which cell regenerates which table.
"""

import ast
import base64
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pandas as pd

from wsss import tables
from wsss.files import write_atomic
from wsss.reproduce import PAPERS, ROOT
from wsss.tables import AS_PUBLISHED, NOT_RUN, OWN_METHODS, PUBLISHED, PUBLISHED_ONLY, REPRODUCED, UNDEFINED

RECIPES = ROOT / "wsss" / "recipes"
PICTURE = "docs-"  # the tag docs-<name> of a notebook cell: its picture is docs/<name>.png
TABLE = re.compile(r"(?P<start><!-- table: (?P<path>\S+) (?P<what>[^\n]+?) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
HEAD = """\
# The published tables, regenerated

Every table of the four papers, row for row, as it comes out here. A file has the rows and columns of the published one.
Where `status` is `reproduced`, value, spread over seeds, dataset, split and backbone are ours, and `published` has what
was printed, to which `note` belongs; times are those of the machine that the record of a run names. Rows of other
people's methods keep their printed value and say `published only`; a row of the paper's own that has no counterpart
says what was not run. `undefined`: there are runs, but a score that does not exist in one of them. The index counts
rows by status. All of it is written by `wsss reproduce`.

"""


@dataclass(frozen=True)
class Place:
    """A code cell of a notebook: its number, as in `In [3]`, and the heading that it stands under."""

    notebook: Path
    cell: int
    heading: str


def published_tables() -> list[tuple[str, int]]:
    """(paper, number) of every published table."""
    names = [re.fullmatch(r"(\w+)_table(\d+)", path.stem) for path in PUBLISHED.glob("*_table*.csv")]
    return sorted(((name[1], int(name[2])) for name in names), key=lambda name: (PAPERS.index(name[0]), name[1]))


def regenerating_cells(notebooks: Iterable[Path]) -> dict[tuple[str, int], Place]:
    """(paper, number) of a table -> the cell that calls `tables.regenerate` for it.

    Raises:
        ValueError: two cells regenerate one table, so that the later one would overwrite the other's.
    """
    found = {}
    for notebook in notebooks:
        heading, count = "", 0
        for cell in nbformat.read(notebook, as_version=4).cells:
            if cell.cell_type == "markdown":
                heading = ([heading] + re.findall(r"^#+ [\d. ]*(.+)", cell.source, re.MULTILINE))[-1]
            elif cell.cell_type == "code":
                count += 1
                for table in _regenerated(cell.source):
                    place = found.setdefault(table, Place(notebook, count, heading))
                    if place != Place(notebook, count, heading):
                        raise ValueError(
                            f"{notebook.name}: In [{count}] regenerates {' table '.join(map(str, table))}, and so does "
                            f"{place.notebook.name}, In [{place.cell}]; keep one"
                        )
    return found


def _regenerated(source: str) -> list[tuple[str, int]]:
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    calls = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "regenerate"]
    return [(ast.literal_eval(call.args[0]), int(ast.literal_eval(call.args[1]))) for call in calls]


# ------------------------------------------------------------------------------------------------------------- index


def write_index(folder: str | Path, notebooks: Iterable[Path]) -> Path:
    """Write <folder>/index.md: for every published table its file, notebook, runs and recipes, or that it is missing.

    Args:
        folder: results: as_published/, tables/ and runs/ are looked for in it.
        notebooks: where the tables come from.

    Returns:
        The path written.
    """
    folder, cells = Path(folder), regenerating_cells(notebooks)
    lines, details, missing = [], "", []
    for paper, number in published_tables():
        path = folder / AS_PUBLISHED / f"{paper}_table{number}.csv"
        place, title = cells.get((paper, number)), f"{OWN_METHODS[paper][-1]}, table {number}"
        where = f"{_link(place.notebook, folder, place.notebook.stem)}, In [{place.cell}]" if place else "no notebook"
        if not path.exists():
            missing.append(f"- {title}: {where}")
            continue
        rows = pd.read_csv(path, dtype=str, keep_default_na=False)
        runs = _with_sources(folder / "runs", "; ".join(rows["runs"]).split("; "))
        kinds = Counter(status.partition(":")[0] for status in rows["status"])
        shown = sorted((folder / "tables").glob(f"{paper}-table{number}[.-]*md"))
        recipes = dict.fromkeys(run.partition(".")[0] for run in runs)
        line = {
            "table": _link(path, folder, title),
            "what": place.heading if place else "",
            "notebook": where,
            "beside the published": ", ".join(_link(file, folder, file.stem) for file in shown),
            **{kind: kinds[kind] for kind in (REPRODUCED, UNDEFINED, PUBLISHED_ONLY, NOT_RUN)},
            "runs": f"[{len(runs)}](#{paper}-table-{number})" if runs else "0",
            "recipes": ", ".join(_link(RECIPES / f"{name}.toml", folder, name) for name in recipes),
        }
        lines.append(line)
        details += _details(title, rows, runs, folder)
    text = HEAD + (tables.markdown(pd.DataFrame(lines)) if lines else "")
    if missing:
        text += "\n".join(["\nNot here, because their notebooks were not run to the end:\n", *missing, ""])
    return write_atomic(folder / "index.md", text + details)


def _details(title: str, rows: pd.DataFrame, runs: list[str], folder: Path) -> str:
    """The section of a table: what was not run, and its runs, folded."""
    lacking = Counter(rows["status"][rows["status"].str.startswith(NOT_RUN)].str.removeprefix(f"{NOT_RUN}: "))
    text = f"\n## {title.replace(',', '')}\n\n"
    if lacking:
        text += "Not run: " + "; ".join(f"{what} (rows: {count})" for what, count in lacking.items()) + ".\n\n"
    if runs:
        links = ["- " + _link(folder / "runs" / run / "record.json", folder, run) for run in runs]
        text += "\n".join([f"<details><summary>Runs: {len(runs)}</summary>\n", *links, "\n</details>\n"])
    return text


def _with_sources(folder: Path, names: Iterable[str]) -> list[str]:
    """Names of runs, each once, each after those that it builds on."""
    found = {}
    for name in filter(None, names):
        record = folder / name / "record.json"
        source = json.loads(record.read_text()).get("source", "") if record.exists() else ""
        found |= dict.fromkeys([*_with_sources(folder, [source]), name])
    return list(found)


def _link(path: Path, folder: Path, text: str) -> str:
    return f"[{text}]({os.path.relpath(path, folder)})"


# ------------------------------------------------------------------------------------------------------------ README


def write_readme(readme: Path = ROOT / "README.md") -> Path:
    """Write the README's tables anew, each between the comments <!-- table: PATH WHAT --> and <!-- end -->.

    PATH is a CSV file, seen from the README's folder. Of a regenerated table, WHAT is the quantity whose rows are
    shown, for example segmentation; of any other one its columns, with " | " between them.

    Raises:
        ValueError: there is no such quantity or column; the README stays as it was.
    """

    def anew(match: re.Match) -> str:
        path = readme.parent / match["path"]
        table = (_headline if path.parent.name == AS_PUBLISHED else _columns)(path, match["what"])
        return match["start"] + tables.markdown(table) + match["end"]

    return write_atomic(readme, TABLE.sub(anew, readme.read_text()))


def _headline(path: Path, quantity: str) -> pd.DataFrame:
    """Published and reproduced values of a regenerated table side by side, as text."""
    paper, number = path.stem.split("_table")
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    if quantity not in set(rows["quantity"]):
        known = ", ".join(rows["quantity"].unique())
        raise ValueError(f"{path}: no row has the quantity {quantity!r} that the README names; there are {known}")
    rows = rows[rows["quantity"].eq(quantity)]
    printed, ours = tables.published(paper, number).loc[rows.index], rows[rows["status"].eq(REPRODUCED)]
    several = rows["method"].nunique() > 1
    names = [method if variant in ("", "full") else f"{method}, {variant}" if several else variant
             for method, variant in zip(rows["method"], rows["variant"])]  # fmt: skip
    spread = rows["uncertainty"].where(rows["uncertainty"].eq(""), " ± " + rows["uncertainty"])
    values = (rows["value"] + spread + " (" + rows["seeds"] + ")").where(rows["status"].eq(REPRODUCED), rows["status"])
    heads = tables.heading("published", printed), tables.heading("reproduced", ours)
    return pd.DataFrame({"": names, heads[0]: rows["published"].replace("", tables.NOT_REPORTED), heads[1]: values})


def _columns(path: Path, names: str) -> pd.DataFrame:
    """Some columns of a table as it stands."""
    table, wanted = pd.read_csv(path, dtype=str, keep_default_na=False), names.split(" | ")
    if missing := [name for name in wanted if name not in table.columns]:
        known = " | ".join(table.columns)
        raise ValueError(f"{path}: no column {missing[0]!r}, which the README names; there are {known}")
    return table[wanted]


def write_pictures(notebooks: Iterable[Path], folder: Path = ROOT / "docs") -> list[Path]:
    """Write <folder>/<name>.png from every notebook cell with the tag docs-<name>.

    Raises:
        ValueError: such a cell does not have exactly one picture.
    """
    written = []
    for notebook in notebooks:
        for cell in nbformat.read(notebook, as_version=4).cells:
            for tag in cell.metadata.get("tags", []):
                if not tag.startswith(PICTURE):
                    continue
                pictures = [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
                if len(pictures) != 1:
                    raise ValueError(
                        f"{notebook.name}: In [{cell.execution_count}] has the tag {tag} and {len(pictures)} pictures; "
                        "tag a cell that was executed and draws one"
                    )
                name = tag.removeprefix(PICTURE)
                written.append(write_atomic(folder / f"{name}.png", base64.b64decode(pictures[0])))
    return written
