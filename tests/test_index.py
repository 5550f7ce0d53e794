"""The generated parts of what readers open first, and that the committed ones are what is generated now."""

import base64
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from wsss import index, reproduce
from wsss.files import write_atomic
from wsss.reproduce import RESULTS, ROOT, find_notebooks

EMBEDDED = RESULTS / "embedded"
PNG = b"\x89PNG, made up"
COLUMNS = "method,variant,quantity,dataset,split,value,uncertainty,published,status,seeds,runs"


def write_notebook(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=list(cells)), path)
    return path


def picture(tag, *pictures):
    outputs = [new_output("display_data", {"image/png": base64.b64encode(png).decode()}) for png in pictures]
    return new_code_cell("draw()", metadata={"tags": ["remove-input", tag]}, outputs=outputs, execution_count=1)


def regenerated(folder, name, *rows):
    path = folder / f"as_published/{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([COLUMNS, *rows]) + "\n")
    return path


# ------------------------------------------------------------------------------------------------------- as committed


def test_the_committed_index_is_fresh(tmp_path):
    before = (EMBEDDED / "index.md").read_text()
    shutil.copytree(EMBEDDED / "as_published", tmp_path / "as_published")
    (tmp_path / "tables").symlink_to(EMBEDDED / "tables")
    (tmp_path / "runs").symlink_to(EMBEDDED / "runs")
    written = index.write_index(tmp_path, find_notebooks()).read_text()
    here = os.path.relpath(ROOT, tmp_path)
    assert written.replace(here, "../..") == before, "run `wsss reproduce --publish`, or index.write_index"


def test_every_link_of_the_committed_index_leads_somewhere():
    text = (EMBEDDED / "index.md").read_text()
    links = set(re.findall(r"\]\(([^)#]+)\)", text))
    assert len(links) > 100 and not [link for link in links if not (EMBEDDED / link).exists()]
    anchors = set(re.findall(r"\]\(#([^)]+)\)", text))
    headings = {line[3:].lower().replace(" ", "-") for line in text.splitlines() if line.startswith("## ")}
    assert anchors and anchors <= headings


def test_the_committed_index_misses_no_table():
    text = (EMBEDDED / "index.md").read_text()
    assert len(index.published_tables()) == 24 and "Not here" not in text
    cells = index.regenerating_cells(find_notebooks())
    assert set(cells) == set(index.published_tables())


def test_the_readmes_tables_are_fresh(tmp_path):
    (tmp_path / "results").symlink_to(RESULTS)
    readme = shutil.copy(ROOT / "README.md", tmp_path)
    text = (ROOT / "README.md").read_text()
    assert len(index.TABLE.findall(text)) == text.count("<!-- table: ") >= 4
    assert index.write_readme(tmp_path / "README.md").read_text() == text, f"{readme}: `wsss reproduce --publish`"


def test_the_readmes_pictures_are_those_of_the_notebooks(tmp_path):
    written = index.write_pictures(find_notebooks(), tmp_path)
    assert {path.name for path in written} == {path.name for path in (ROOT / "docs").glob("*.png")}
    for path in written:
        assert path.read_bytes() == (ROOT / "docs" / path.name).read_bytes(), path.name
    shown = set(re.findall(r"\(docs/(\S+\.png)\)", (ROOT / "README.md").read_text()))
    assert len(shown) >= 3 and shown <= {path.name for path in written}


# ------------------------------------------------------------------------------------------------------------ made up


def test_the_index_says_what_is_there_and_what_is_missing(tmp_path):
    notebook = write_notebook(
        tmp_path / "notebooks/14_more.ipynb",
        new_markdown_cell("# MoRe"),
        new_code_cell("x = 1"),
        new_markdown_cell("## 2 Table 3: parts\n\ntext"),
        new_code_cell('tables.regenerate("more", 3, paper, ours, "row", folder)'),
        new_code_cell('tables.regenerate("more", 4, paper, ours, "row", folder)'),
    )
    run, source = "deeplab.published_a_80_b1-1_x_s0-1", "transcam.published_b_80_b1-1_x_s0-2"
    results = tmp_path / "results"
    regenerated(
        results,
        "more_table3",
        f"MoRe,full,segmentation,x,test,50.0,1.0,76.4,reproduced,3,{run}",
        f"MoRe,full,recall,x,test,,,76.4,undefined,3,{run}",
        "MoRe,a,precision,voc2012,test,,,76.4,not run: voc2012 test,,",
        "Other,,precision,voc2012,val,1,,1,published only,,",
    )
    (results / f"runs/{run}").mkdir(parents=True)
    (results / f"runs/{run}/record.json").write_text(f'{{"source": "{source}"}}')
    (results / "tables").mkdir()
    for name in ("more-table3.md", "more-table3-released.md", "more-table33.md", "more-table3.csv"):
        (results / "tables" / name).touch()
    text = index.write_index(results, [notebook]).read_text()
    [line] = [line for line in text.splitlines() if line.startswith("| [MoRe, table 3](as_published/more_table3.csv)")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:3] == ["Table 3: parts", "[14_more](../notebooks/14_more.ipynb), In [2]"]
    assert cells[3] == "[more-table3-released](tables/more-table3-released.md), [more-table3](tables/more-table3.md)"
    assert cells[4:9] == ["1", "1", "1", "1", "[2](#more-table-3)"]
    assert [cell.split("]")[0] for cell in cells[9].split(", ")] == ["[transcam", "[deeplab"]
    assert f"- [{source}](runs/{source}/record.json)\n- [{run}]" in text, "a run stands after the one that it builds on"
    assert "Not run: voc2012 test (rows: 1)." in text
    missing = text.partition("Not here")[2].splitlines()
    assert "- MoRe, table 4: [14_more](../notebooks/14_more.ipynb), In [3]" in missing
    assert "- APC, table 1: no notebook" in missing and sum(line.startswith("- ") for line in missing[:30]) >= 23


def test_the_index_of_an_empty_folder_misses_everything(tmp_path):
    text = index.write_index(tmp_path / "results", []).read_text()
    assert text.count(": no notebook\n") == 24 and "|" not in text


def test_two_cells_for_one_table_are_refused(tmp_path):
    calls = [new_code_cell('tables.regenerate("more", 3, paper, ours, "row", folder)') for _ in range(2)]
    notebook = write_notebook(tmp_path / "14_more.ipynb", *calls)
    with pytest.raises(ValueError, match=r"In \[2\] regenerates more table 3, and so does 14_more.ipynb, In \[1\]"):
        index.regenerating_cells([notebook])


def test_a_table_of_the_readme_is_written_between_its_marks(tmp_path):
    regenerated(
        tmp_path,
        "more_table3",
        "MoRe,baseline,precision,x,test,40.0,2.0,76.2,reproduced,3,r",
        "MoRe,baseline,recall,x,test,1.0,,1,reproduced,1,r",
        "MoRe,full,precision,x,test,,,,undefined,3,r",
        "MoRe,w/o GCR,precision,x,test,50.0,,81.6,reproduced,1,r",
    )
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- table: as_published/more_table3.csv precision -->\nold\n\n<!-- end -->\nb\n")
    index.write_readme(readme)
    written = (
        "a\n<!-- table: as_published/more_table3.csv precision -->\n"
        "|  | published: voc2012 val | reproduced: x test |\n| --- | --- | --- |\n"
        "| baseline | 76.2 | 40.0 ± 2.0 (3) |\n| MoRe | not reported | undefined |\n"
        "| w/o GCR | 81.6 | 50.0 (1) |\n<!-- end -->\nb\n"
    )
    assert readme.read_text() == written
    assert index.write_readme(readme).read_text() == written, "written twice, it is the same"


def test_columns_of_another_table_stand_in_the_readme_as_they_are(tmp_path):
    write_atomic(tmp_path / "tables" / "scores.csv", 'arm,"maps, given",other\nMoRe,60.1 ± 1.0 (3),5\n')
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table: tables/scores.csv arm | maps, given -->\n<!-- end -->\n")
    written = index.write_readme(readme).read_text()
    assert written.splitlines()[1:4] == ["| arm | maps, given |", "| --- | --- |", "| MoRe | 60.1 ± 1.0 (3) |"]
    readme.write_text("<!-- table: tables/scores.csv arm | miou -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match=r"no column 'miou', which the README names; there are arm \| maps, given \| other"):
        index.write_readme(readme)


def test_a_table_of_the_readme_that_does_not_exist_is_refused(tmp_path):
    regenerated(tmp_path, "more_table3", "MoRe,baseline,recall,x,test,1.0,,1,reproduced,1,r")
    readme = tmp_path / "README.md"
    for name, error, message in (
        ("more_table3.csv iou", ValueError, "no row has the quantity 'iou' that the README names; there are recall"),
        ("more_table4.csv iou", FileNotFoundError, "more_table4.csv"),
    ):
        readme.write_text(f"<!-- table: as_published/{name} -->\n<!-- end -->\n")
        before = readme.read_text()
        with pytest.raises(error, match=message):
            index.write_readme(readme)
        assert readme.read_text() == before


def test_pictures_come_from_tagged_cells(tmp_path):
    cells = new_code_cell("1"), picture("docs-a", PNG), picture("other", PNG + b"other")
    notebook = write_notebook(tmp_path / "01_a.ipynb", *cells)
    assert index.write_pictures([notebook], tmp_path / "docs") == [tmp_path / "docs/a.png"]
    assert (tmp_path / "docs/a.png").read_bytes() == PNG


@pytest.mark.parametrize("pictures", [(), (PNG, PNG)])
def test_a_tagged_cell_has_one_picture(tmp_path, pictures):
    notebook = write_notebook(tmp_path / "01_a.ipynb", picture("docs-a", *pictures))
    with pytest.raises(ValueError, match=rf"01_a.ipynb: In \[1\] has the tag docs-a and {len(pictures)} pictures"):
        index.write_pictures([notebook], tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_importing_the_command_imports_neither_torch_nor_pandas():
    code = "import sys, wsss.reproduce; print([name for name in ('torch', 'pandas') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=reproduce.ROOT)
    assert done.stdout.strip() == "[]"
