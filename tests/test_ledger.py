"""The ledger of claims, on made-up claims, tables and notebooks with known answers."""

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from wsss import claims, reproduce, tables
from wsss.claims import LedgerError, Verdict, ledger, overall

STATED = {"p-01": "A beats B.", "p-02": "B beats C.", "p-03": "D is fast.", "q-01": "E beats F.", "q-02": "F is new."}


def write_notebook(folder, name, *sources):
    cells = [new_markdown_cell("# p-01, p-02, q-01: text is no test"), *map(new_code_cell, sources)]
    nbformat.write(new_notebook(cells=cells), folder / f"{name}.ipynb")


def save(folder, name, *lines):
    """A table of verdicts as the notebooks save it; a line is (claim, verdict, effect)."""
    verdicts = [
        Verdict(claim, STATED.get(claim, ""), effect, effect - 1, effect + 1, 3, verdict, f"{claim} in {name}")
        for claim, verdict, effect in lines
    ]
    tables.save(claims.table(verdicts), name, folder, "made up")


@pytest.fixture
def project(tmp_path):
    """Two notebooks that write verdicts on five claims, and one that writes none."""
    published, notebooks, folder = (tmp_path / name for name in ("published", "notebooks", "tables"))
    published.mkdir(), notebooks.mkdir()
    rows = [(claim[0], claim, text) for claim, text in STATED.items()]
    pd.DataFrame(rows, columns=["paper", "claim_id", "claim"]).to_csv(published / "claims.csv", index=False)
    write_notebook(notebooks, "00_data", "x = 'p-01'")
    first = 'tables.save(claims.table(told), "p-verdicts", folder, "...")'
    cells = ("import wsss", "judge('p-01')", "judge('p-02', 'p-01')", f"never('p-03')\n{first}")
    write_notebook(notebooks, "11_p", *cells)
    write_notebook(notebooks, "20_all", "judge('q-01'); judge('p-02'); never('q-02')", 'save(t, "all-verdicts", f, t)')
    no = "not testable here"
    several = (("p-01", "supported", 2.0), ("p-01", "inconclusive", 0.5))
    save(folder, "p-verdicts", *several, ("p-02", no, 0), ("p-03", no, 0))
    decided = (("q-01", "inconclusive (n = 2)", 3.0), ("p-02", "not supported", -4.0))
    save(folder, "all-verdicts", *decided, ("q-02", no, 0.0))
    save(folder, "other", ("p-01", "supported", 9.0))
    return tmp_path


def read(project):
    return ledger(project / "tables", project / "notebooks", "made-up", project / "published")


def test_every_claim_is_there_in_the_order_of_the_list_with_its_lines(project):
    told = read(project)
    assert told[["claim_id", "verdict", "of this line", "effect", "notebook", "cells"]].to_numpy().tolist() == [
        ["p-01", "inconclusive", "supported", "+2.00", "11_p.ipynb", "2, 3"],
        ["p-01", "inconclusive", "inconclusive", "+0.50", "11_p.ipynb", "2, 3"],
        ["p-02", "not supported", "not supported", "-4.00", "20_all.ipynb", "1"],
        ["p-03", "not testable here", "not testable here", "+0.00", "11_p.ipynb", "4"],
        ["q-01", "inconclusive", "inconclusive (n = 2)", "+3.00", "20_all.ipynb", "1"],
        ["q-02", "not testable here", "not testable here", "+0.00", "20_all.ipynb", "1"],
    ]
    assert told["paper"].tolist() == ["p"] * 4 + ["q"] * 2 and told["claim"].tolist()[2] == "B beats C."
    first = told.iloc[0]
    assert (first["95 % interval"], first["seeds"], first["note"]) == ("[+1.00, +3.00]", "3", "p-01 in p-verdicts")


def test_a_line_without_a_test_names_no_data(project):
    told = read(project).set_index("claim_id")["data set"]
    assert told["p-03"] == told["q-02"] == "" and told["p-02"] == told["q-01"] == "made-up"


def test_a_line_without_a_test_gives_way_to_a_test_of_another_notebook_only(project):
    assert "p-02 in p-verdicts" not in set(read(project)["note"])
    lines = (("q-01", "supported", 3.0), ("q-01", "not testable here", 0.0), ("p-02", "not testable here", 0.0))
    save(project / "tables", "all-verdicts", *lines, ("q-02", "supported", 1.0))
    told = read(project)
    assert told["claim_id"].tolist() == ["p-01", "p-01", "p-02", "p-02", "p-03", "q-01", "q-01", "q-02"]
    assert set(told.loc[told["claim_id"] == "p-02", "verdict"]) == {"not testable here"}, "nobody tests it"
    assert set(told.loc[told["claim_id"] == "q-01", "verdict"]) == {"inconclusive"}, "a part of it is not tested"


@pytest.mark.parametrize(
    "lines, verdict",
    [
        (["supported"], "supported"),
        (["supported", "supported"], "supported"),
        (["supported", "inconclusive"], "inconclusive"),
        (["supported", "not supported"], "not supported"),
        (["inconclusive", "inconclusive (n = 1)"], "inconclusive"),
        (["inconclusive (n = 0)"], "inconclusive"),
        (["inconclusive (n = 2)", "not supported"], "not supported"),
        (["not testable here", "not supported"], "not supported"),
        (["not testable here", "supported"], "inconclusive"),
        (["not testable here", "not testable here"], "not testable here"),
    ],
)
def test_the_verdict_of_a_claim_follows_from_its_lines(lines, verdict):
    assert overall(lines) == overall(lines[::-1]) == verdict


def test_a_claim_without_a_line_is_refused(project):
    save(project / "tables", "all-verdicts", ("q-01", "supported", 3.0))
    with pytest.raises(LedgerError, match="tables: no line on q-02; let a notebook test"):
        read(project)


def test_a_line_for_an_unknown_claim_is_refused(project):
    save(project / "tables", "all-verdicts", ("q-01", "supported", 3.0), ("q-09", "supported", 3.0))
    with pytest.raises(LedgerError, match="verdicts.csv, line 3: claims.csv has no claim 'q-09'; correct 20_all.ipynb"):
        read(project)


@pytest.mark.parametrize("word", ["true", "Supported", "inconclusive (n = )", "supported?", ""])
def test_an_unknown_verdict_is_refused(project, word):
    save(project / "tables", "all-verdicts", ("q-01", word, 3.0), ("q-02", "supported", 1.0))
    with pytest.raises(LedgerError, match="all-verdicts.csv, line 2: unknown verdict .*; write one of: supported, not"):
        read(project)


def test_a_missing_table_is_refused(project):
    (project / "tables/all-verdicts.csv").unlink()
    with pytest.raises(LedgerError, match="all-verdicts.csv: .* 20_all.ipynb saves; run .* --notebooks 20`"):
        read(project)


def test_a_table_that_no_notebook_saves_is_refused(project):
    save(project / "tables", "old-verdicts", ("p-01", "supported", 2.0))
    with pytest.raises(LedgerError, match="old-verdicts.csv: no notebook in .* saves this table; delete it"):
        read(project)


def test_a_table_without_a_column_is_refused(project):
    path = project / "tables/p-verdicts.csv"
    pd.read_csv(path).drop(columns=["seeds", "note"]).to_csv(path, index=False)
    with pytest.raises(LedgerError, match="p-verdicts.csv: no column seeds, note; run `wsss reproduce --notebooks 11`"):
        read(project)


def test_a_claim_that_its_notebook_does_not_name_is_refused(project):
    save(project / "tables", "all-verdicts", ("q-01", "supported", 3.0), ("p-01", "supported", 3.0))
    with pytest.raises(LedgerError, match="line 3: no code cell of 20_all.ipynb names p-01; write the id"):
        read(project)


def test_notebooks_without_verdicts_or_with_the_same_ones_are_refused(project):
    with pytest.raises(LedgerError, match="published: no notebook saves a table"):
        ledger(project / "tables", project / "published", "made-up", project / "published")
    write_notebook(project / "notebooks", "21_more", 'tables.save(t, "p-verdicts", folder, text)')
    with pytest.raises(LedgerError, match="21_more.ipynb: 11_p.ipynb saves a table p-verdicts, too"):
        read(project)


# ------------------------------------------------------------------------------------------------- what is committed


TABLES = reproduce.RESULTS / "embedded/tables"


def test_the_committed_ledger_has_every_claim_of_every_paper():
    told = ledger(TABLES, reproduce.NOTEBOOKS, "embedded")
    listed = pd.read_csv(tables.PUBLISHED / "claims.csv")["claim_id"].tolist()
    assert told["claim_id"].drop_duplicates().tolist() == listed and len(listed) == 116
    assert told.loc[told["verdict"] == "not testable here", "note"].ne("").all(), "a reason for each"


def test_the_committed_ledger_is_that_of_the_committed_verdicts():
    saved = pd.read_csv(TABLES / "claims-ledger.csv", dtype=str, keep_default_na=False)
    pd.testing.assert_frame_equal(saved, ledger(TABLES, reproduce.NOTEBOOKS, "embedded"), check_dtype=False)


def test_the_notebook_of_the_ledger_waits_for_all_that_write_verdicts():
    [notebook] = reproduce.find_notebooks(["21"])
    reads = nbformat.read(notebook, as_version=4).metadata["wsss"]["reads"]
    assert {path.stem[:2] for path in claims._writers(reproduce.NOTEBOOKS).values()} <= set(reads)
