"""The arithmetic of inconsistencies, on made-up tables with known answers, and on the papers' own."""

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from wsss import inconsistencies
from wsss.inconsistencies import conflicts, iou_bound, margins, same_number, says, value

COLUMNS = "paper table method variant backbone dataset split quantity class_name unit value note".split()
USUAL = {"backbone": "RN", "dataset": "voc2012", "split": "val", "quantity": "segmentation", "unit": "percent"}


def rows(*given):
    """Rows of published tables: (paper, table, method, value, anything else)."""
    named = [dict(zip(("paper", "table", "method", "value"), row)) | row[4] for row in given]
    return pd.DataFrame([dict.fromkeys(COLUMNS, "") | USUAL | row for row in named], columns=COLUMNS)


def variant(name, **other):
    return {"variant": name} | other


# ------------------------------------------------------------------------------------------------------- the list

LIST = """\
## P
- M1 [arith] 0.13 - 0.19 is -0.06, not -7.0 %; of 82,081.
- S2 No kind, RN101.

## Between papers (same method)
| method | quantity | values |
| --- | --- | --- |
| A | IoU boat, VOC val | 80.6 P, 77.3 Q (same ratio 0.19) |
| B | COCO val | dash P; 45.0 Q |
| C | VOC val, test | 72.1, 71.7 P (RN101); 72.0, 73.0 Q |
| D | pseudo mask, train | 68.7 P; 66.0 Q |
| E | backbone | ResNet38 P; ResNet101 Q (same COCO 36.8) |

## Checked
- no entry
"""


@pytest.fixture
def listed(tmp_path):
    (tmp_path / inconsistencies.LIST).write_text(LIST)
    return tmp_path


def test_entries_of_the_list(listed):
    assert inconsistencies.entries(listed).to_numpy().tolist() == [
        ["M1", "more", "arith", "0.13 - 0.19 is -0.06, not -7.0 %; of 82,081."],
        ["S2", "seco", "", "No kind, RN101."],
    ]
    path = listed / inconsistencies.LIST
    path.write_text(LIST + "- M1 [scope] again\n")
    with pytest.raises(ValueError, match=r"inconsistencies.md: .* twice: \['M1'\]"):
        inconsistencies.entries(listed)
    path.write_text("nothing")
    with pytest.raises(ValueError, match="no such line"):
        inconsistencies.entries(listed)


def test_listed_conflicts(listed):
    found = inconsistencies.listed_conflicts(listed).drop(columns="text")
    assert found.to_numpy().tolist() == [
        ["A", "voc2012", "val", "iou", "boat", {"80.6", "77.3"}],
        ["B", "coco2014", "val", "segmentation", "", {"dash", "45.0"}],
        ["C", "voc2012", "val", "segmentation", "", {"72.1", "72.0"}],
        ["C", "voc2012", "test", "segmentation", "", {"71.7", "73.0"}],
        ["D", "voc2012", "train", "pseudo_mask", "", {"68.7", "66.0"}],
        ["E", "", "", "backbone", "", set()],
    ]


@pytest.mark.parametrize(
    "numbers, answer",
    [
        (["-0.06"], True), (["0.06"], False), (["0.13", "0.19"], True), (["-0.19"], False), (["-7.0"], True),
        (["-7"], False), (["82,081"], True), (["82"], False), (["0.1"], False), (["101"], False), ([], True),
    ],
)  # fmt: skip
def test_a_text_says_numbers_as_they_are_written(listed, numbers, answer):
    assert says(inconsistencies.entries(listed)["text"][0], *numbers) is answer


def test_every_entry_is_checked_or_has_a_place(listed):
    entries, check = inconsistencies.entries(listed), {"M1": ("0.13", "-0.06", True)}
    table = inconsistencies.checked(entries, check, {"S2": "notebook 04"})
    assert table[["entry", "printed", "computed, or handled in", "holds"]].to_numpy().tolist() == [
        ["M1", "0.13", "-0.06", "yes"],
        ["S2", "", "notebook 04", "no arithmetic"],
    ]
    assert inconsistencies.checked(entries, {"M1": ("a", "b", False)}, {"S2": "c"})["holds"][0] == "no"
    with pytest.raises(ValueError, match="entries that are left out: S2"):
        inconsistencies.checked(entries, check, {})
    with pytest.raises(ValueError, match="entries that are in both: M1"):
        inconsistencies.checked(entries, check, {"M1": "c", "S2": "c"})
    with pytest.raises(ValueError, match="entries that are not listed: M9"):
        inconsistencies.checked(entries, check, {"S2": "c", "M9": "c"})


def test_a_place_in_a_notebook_must_exist(tmp_path):
    path = tmp_path / "04_more.ipynb"
    cells = [new_markdown_cell("# 04 More\n\n## 2 The graph\ntext"), new_code_cell("## 3 no heading")]
    nbformat.write(new_notebook(cells=cells), path)
    assert inconsistencies.section(path, "2 The graph") == "04_more.ipynb, 2 The graph"
    with pytest.raises(ValueError, match="04_more.ipynb: no heading '3 no heading'; it has 04 More, 2 The graph"):
        inconsistencies.section(path, "3 no heading")


# ------------------------------------------------------------------------------------------------------ arithmetic


def test_the_bound_of_the_iou_is_reached_without_missed_pixels_and_never_passed():
    tp, fp, fn = np.random.default_rng(0).integers(1, 1000, (3, 500))
    assert (100 * tp / (tp + fp + fn) <= iou_bound(fp / tp) + 1e-9).all()
    np.testing.assert_allclose(100 * tp / (tp + fp), iou_bound(fp / tp))
    assert iou_bound(0.75) == pytest.approx(57.142857) and iou_bound(0.75, 0.005) == pytest.approx(57.306590)


def test_class_pairs_that_cannot_be():
    pair = lambda name, iou, ratio, **more: [
        ("p", "3", "A", iou, {"quantity": "iou", "class_name": name} | more),
        ("p", "3", "A", ratio, {"quantity": "confusion_ratio", "class_name": name} | more),
    ]
    given = [
        *pair("train", 58.0, 0.75), *pair("cow", 57.3, 0.75), *pair("cow", 57.4, 0.75, split="test"),
        *pair("", 58.0, 0.75), *pair("cat", 58.0, 0.75, table="text"),
        ("p", "3", "A", 90.0, {"quantity": "iou", "class_name": "dog"}),
    ]  # fmt: skip
    found = inconsistencies.class_pairs(rows(*given)).set_index(["class_name", "split"])["possible"]
    assert found.to_dict() == {("train", "val"): False, ("cow", "val"): True, ("cow", "test"): False}


def test_one_result_with_several_numbers():
    given = [
        ("p", "1", "A", 70.0, {}), ("p", "2", "A", 71.0, {}), ("q", "1", "A", 70.0, {"backbone": ""}),
        ("p", "1", "B", 70.0, {}), ("q", "1", "B", 70.0, {"backbone": "other"}),
        ("p", "1", "C", 70.0, {}), ("p", "1", "C", 75.0, {"backbone": "other"}),  # two rows of one table
        ("p", "1", "D", np.nan, {}), ("q", "1", "D", 45.0, {}),
        ("p", "1", "E", np.nan, {}), ("q", "1", "E", np.nan, {"backbone": "other"}),
        ("p", "1", "F", 70.0, {}), ("q", "1", "F", 60.0, variant("ablation")),
        ("p", "1", "G", 70.0, {}), ("q", "1", "G", 60.0, {"split": "test"}),
        ("p", "1", "H", 70.0, {}), ("p", "text", "H", 60.0, {}),
    ]  # fmt: skip
    found = conflicts(rows(*given))
    assert found["method"].tolist() == ["A", "D"] and found["numbers"].tolist() == [{"70.0", "71.0"}, {"dash", "45.0"}]
    assert found["sources"][0] == "70.0 p 1 (RN), 71.0 p 2 (RN), 70.0 q 1 (-)"
    [alike] = same_number(rows(*given)).itertuples()
    assert (alike.method, alike.value, alike.backbones) == ("B", 70.0, "RN p 1, other q 1")


def test_two_names_of_one_backbone_are_one():
    given = [("p", "1", "A", 70.0, {"backbone": "ViT-B"}), ("q", "1", "A", 70.0, {"backbone": "ViT-B/16"})]
    assert same_number(rows(*given)).empty


def quote(quantity, margin, arms, **other):
    return ("p", "text", "Own", margin, variant(arms, quantity=f"delta_{quantity}", **other))


def test_margins_of_the_prose():
    given = [
        ("p", "2", "Own", 76.4, {}), ("p", "3", "Own", 76.4, variant("full")),
        ("p", "3", "Own", 65.0, variant("w/o X")),
        ("p", "2", "Rival", 73.3, {}), ("p", "5", "Rival", 73.3, {}), ("q", "2", "Rival", 70.0, {}),
        ("p", "4", "Own", 0.23, {"quantity": "confusion_ratio", "class_name": "boat", "unit": "ratio"}),
        ("p", "4", "Rival", 0.53, {"quantity": "confusion_ratio", "class_name": "boat", "unit": "ratio"}),
        ("p", "1", "Own", 71.3, variant("+PSA", quantity="pseudo_mask")),
        ("p", "1", "Rival", 70.2, variant("+PSA", quantity="pseudo_mask")),
        ("p", "8", "Own", 68.6, variant("+HV-BiLSTM+CRF", quantity="precision")),
        ("p", "8", "Own", 70.3, variant("+HV-BiLSTM+CRF+AKP", quantity="precision")),
        ("p", "7", "Own", 72.3, variant("AKP", quantity="precision")),
        quote("segmentation", 3.1, "full vs best of all (Rival)"), quote("segmentation", -11.5, "w/o X vs full"),
        quote("confusion_ratio", -30, "full vs Rival", class_name="boat"),
        quote("pseudo_mask", 1.1, "full vs Rival"),
        quote("precision", 1.7, "AKP vs max pooling", note="Sec. 4, from Table 8 (Table 7 differs)"),
    ]  # fmt: skip
    found = margins(rows(*given))
    assert found["computed"].tolist() == [3.1, -11.4, -30.0, 1.1, 1.7]
    assert found["agree"].tolist() == [True, False, True, True, True]
    with pytest.raises(ValueError, match="0 numbers with arm = 'w/o Z'"):
        margins(rows(*given, quote("segmentation", 1.0, "w/o Z vs full")))
    with pytest.raises(ValueError, match="2 numbers with arm = 'full'"):
        margins(rows(*given, ("p", "9", "Own", 77.0, {})))


def test_a_value_is_the_one_of_its_row():
    given = rows(("p", "1", "A", 70.0, {}), ("p", "2", "A", 70.0, {}), ("p", "3", "A", 71.0, {}))
    assert value(given, method="A", table="3") == 71.0 and value(given[:2], method="A") == 70.0
    with pytest.raises(ValueError, match="2 numbers with paper = 'p', method = 'A'"):
        value(given, paper="p", method="A")
    with pytest.raises(ValueError, match="0 numbers with method = 'B'"):
        value(given, method="B")


# ----------------------------------------------------------------------------------------------- the papers' tables


def test_the_list_of_conflicts_between_the_papers_is_complete_and_right():
    found = conflicts(inconsistencies.printed()).set_index(inconsistencies.RESULT)["numbers"]
    listed = inconsistencies.listed_conflicts()
    listed = listed[listed["quantity"] != "backbone"].set_index(inconsistencies.RESULT)["numbers"]
    assert found.to_dict() == listed.to_dict()


def test_one_pair_of_the_papers_cannot_be():
    pairs = inconsistencies.class_pairs(inconsistencies.printed())
    [impossible] = pairs[~pairs["possible"]].itertuples()
    assert (impossible.paper, impossible.method, impossible.class_name) == ("seco", "ToCo", "train")
    assert len(pairs) == 39
