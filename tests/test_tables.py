from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
import torch

from wsss import tables
from wsss.experiments import Record, _plain
from wsss.metrics import ConfusionMatrix


def make_record(**given):
    """A record with the fields that tables read; the others are empty."""
    about = {"python": "3.11.7", "torch": "2.8.0", "commit": "abc", "machine": "a CPU", "threads": 1}
    known = {
        "method": "more", "variant": "published", "arm": "full", "identity": "embedded", "seed": 0,
        "classes": ["boat", "train"], "environment": about, "wall_seconds": 60.0, "peak_memory_mb": 100.0,
        "metrics": {"test/decoder/decoder": {"miou": 0.5}},
    }  # fmt: skip
    return Record(**{field.name: None for field in fields(Record)} | known | given)


def scored(arm, seed, miou, **given):
    return make_record(arm=arm, seed=seed, metrics={"test/decoder/decoder": {"miou": miou}}, **given)


PRINTED = pd.DataFrame(
    {
        "arm": ["full", "w/o L_cre"],
        "dataset": "voc2012",
        "split": "val",
        "quantity": "miou",
        "unit": "percent",
        "value": [76.4, 65.0],
        "uncertainty": [np.nan, 0.5],
    }
)


def test_published_tables_keep_their_text_and_numbers():
    table = tables.published("more", 3)
    assert len(table) == 15 and (table["variant"] == "w/o GCR").sum() == 3
    assert table["value"].dtype == float and table["table"].tolist() == ["3"] * 15
    assert (table["class_name"] == "").all(), "an empty text stays a text"
    assert tables.published("more", "text")["value"].notna().any()


def test_every_published_table_can_be_read():
    names = [path.stem.rsplit("_", 1) for path in tables.PUBLISHED.glob("*_t*.csv")]
    assert len(names) >= 20
    for paper, table in names:
        assert len(tables.published(paper, table.removeprefix("table"))) > 0


def test_an_unknown_published_table_is_named_with_those_that_exist():
    with pytest.raises(FileNotFoundError, match="more_table9.*more_table3"):
        tables.published("more", 9)


def test_frame_holds_percent_and_plain_ratios_by_class():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([0, 0, 1, 1, 0]), torch.tensor([0, 0, 1, 0, 1]))
    record = make_record(metrics={"train/maps-given-labels/lam+crf": _plain(matrix.scores())})
    rows = tables.frame([record])
    assert list(rows.columns) == tables.COLUMNS
    first = rows.iloc[0]
    assert (first["split"], first["protocol"], first["map"]) == ("train", "maps-given-labels", "lam+crf")
    value = rows.set_index(["quantity", "class_name"])["value"]
    assert value["iou", "background"] == pytest.approx(50.0)  # 2 of 4 pixels
    assert value["iou", "boat"] == pytest.approx(100 / 3, abs=1e-3)  # 1 of 3
    assert value["miou", ""] == pytest.approx((50 + 100 / 3) / 2, abs=1e-3)
    assert value["recall", ""] == pytest.approx((200 / 3 + 50) / 2, abs=1e-3)
    assert value["confusion_ratio", "background"] == pytest.approx(0.5)
    assert value["confusion_ratio", ""] == pytest.approx(0.75)
    assert np.isnan(value["iou", "train"]), "a class in neither truth nor prediction has no IoU"


def test_frame_refuses_class_lists_of_another_length():
    with pytest.raises(ValueError):
        tables.frame([make_record(metrics={"test/decoder/decoder": {"iou": [0.5, 0.5]}})])


def test_summary_is_a_mean_over_seeds():
    records = [scored("full", seed, miou) for seed, miou in enumerate((0.5, 0.6, 0.7))]
    rows = tables.frame([*records, scored("x", 0, 0.4)])
    result = tables.summary(rows, ["arm"])
    assert result["arm"].tolist() == ["full", "x"] and result["n"].tolist() == [3, 1]
    np.testing.assert_allclose(result["mean"], [60.0, 40.0])
    np.testing.assert_allclose(result["std"], [10.0, np.nan])
    assert "| 40.0 |  | 1 |" in tables._markdown(tables._cells(result)), "no spread of one seed"


def test_summary_refuses_to_mix_two_values_of_a_seed():
    rows = tables.frame([scored("full", 0, 0.5), scored("w/o GCR", 0, 0.4)])
    with pytest.raises(ValueError, match="arm"):
        tables.summary(rows, "method")


def test_an_undefined_score_is_not_averaged_away():
    rows = tables.frame([scored("full", 0, 0.5), scored("full", 1, None)])
    assert tables.summary(rows, "arm")["mean"].isna().all()
    assert tables.compare(PRINTED, rows, "arm")["reproduced: embedded test"][0] == "undefined (2)"


def test_compare_heads_every_column_by_its_dataset():
    rows = tables.frame([scored("full", seed, miou) for seed, miou in enumerate((0.57, 0.58, 0.593))])
    table = tables.compare(PRINTED, rows, ["arm", "quantity"])
    heads = ["arm", "quantity", "published: voc2012 val", "reproduced: embedded test", "difference"]
    assert table.columns.tolist() == heads
    assert table.iloc[0].tolist() == ["full", "miou", "76.4", "58.1 ± 1.2 (3)", "-18.3"]
    assert table.iloc[1].tolist() == ["w/o L_cre", "miou", "65.0 ± 0.5", "not run", "not run"]
    assert (table != "").all(axis=None), "there is no blank"


def test_compare_shows_what_the_paper_does_not_report():
    rows = tables.frame([scored("extra", 0, 0.5)])
    table = tables.compare(PRINTED, rows, "arm").set_index("arm")
    assert table.loc["extra"].tolist() == ["not reported", "50.0 (1)", "not reported"]


def test_compare_without_any_run():
    table = tables.compare(PRINTED, tables.frame([]), "arm")
    assert table["reproduced"].tolist() == table["difference"].tolist() == ["not run", "not run"]


def test_compare_writes_ratios_with_two_decimals_or_as_printed():
    printed = PRINTED.assign(quantity="confusion_ratio", unit="ratio", value=[0.3, 0.9473], uncertainty=np.nan)
    record = make_record(metrics={"test/decoder/decoder": {"mean_confusion_ratio": 0.5}})
    table = tables.compare(printed, tables.frame([record]), "arm")
    assert table["published: voc2012 val"].tolist() == ["0.30", "0.9473"]
    assert table.loc[0, "reproduced: embedded test"] == "0.50 (1)" and table.loc[0, "difference"] == "+0.20"


@pytest.mark.parametrize(
    "published, reproduced, message",
    [
        (PRINTED.assign(split=["val", "test"]), [scored("full", 0, 0.5)], "published.*voc2012 val; voc2012 test"),
        (PRINTED, [scored("full", 0, 0.5), scored("full", 0, 0.5, identity="voc2012")], "more than one value"),
        (PRINTED, [scored("full", 0, 0.5), scored("b", 0, 0.5, identity="voc2012")], "embedded test; voc2012 test"),
        (pd.concat([PRINTED, PRINTED]), [scored("full", 0, 0.5)], "published.*more than one value"),
        (PRINTED.drop(columns="arm"), [scored("full", 0, 0.5)], "published frame has no column arm"),
    ],
)
def test_compare_refuses_rows_that_do_not_belong_together(published, reproduced, message):
    with pytest.raises(ValueError, match=message):
        tables.compare(published, tables.frame(reproduced), "arm")


@pytest.mark.parametrize(
    "committed, new, agrees",
    [
        ((0.57, 0.58, 0.59), 0.599, "yes"),  # 1.9 points away, twice the deviation is 2.0
        ((0.57, 0.58, 0.59), 0.601, "no"),
        ((0.58, 0.58, 0.58), 0.5849, "yes"),  # half a point is always allowed
        ((0.58,), 0.5849, "yes"),
        ((0.58,), 0.586, "no"),
        ((None,), None, "yes"),
        ((None,), 0.5, "no"),
        ((), 0.5, "not run"),
    ],
)
def test_agreement_with_committed_records(committed, new, agrees):
    old = tables.frame([scored("full", seed, miou) for seed, miou in enumerate(committed)] or [scored("other", 0, 0.5)])
    table = tables.compare(PRINTED[:1], tables.frame([scored("full", 0, new)]), "arm", old)
    assert table.loc[0, "agrees"] == agrees
    assert "committed: embedded test" in table.columns
    assert tables.AGREEMENT in tables.show(table, "t", "Caption.").data, "the caption states the rule"


def test_agreement_of_ratios_counts_points_of_a_hundredth():
    ratio = lambda value: tables.frame([make_record(metrics={"test/decoder/decoder": {"mean_confusion_ratio": value}})])
    assert tables.compare(PRINTED[:1], ratio(0.304), "arm", ratio(0.3)).loc[0, "agrees"] == "yes"
    assert tables.compare(PRINTED[:1], ratio(0.31), "arm", ratio(0.3)).loc[0, "agrees"] == "no"


def test_caption_says_what_the_numbers_are():
    records = [scored("full", seed, 0.5) for seed in range(3)]
    text = tables.caption("MoRe, Table 3", tables.frame(records), records)
    for part in ("MoRe, Table 3.", "dataset: embedded", "split: test", "protocol: decoder", "variant: published"):
        assert part in text
    assert "seed: 0, 1, 2" in text and "machine: a CPU" in text
    assert "machine: not run" in tables.caption("Nothing", tables.frame([]), [])


def test_show_is_the_same_html_for_the_same_rounded_numbers():
    a, b = (pd.DataFrame({"arm": ["a < b"], "value": [1.0 + error]}) for error in (0.0, 1e-9))
    shown = tables.show(a, "table-3", "A & B").data
    assert shown == tables.show(b, "table-3", "A & B").data
    assert 'id="T_table-3"' in shown and ">1.0<" in shown
    assert "a &lt; b" in shown and "A &amp; B" in shown
    assert repr(tables.show(a, "table-3", "A")) == "<IPython.core.display.HTML object>"


def test_a_table_id_is_a_plain_word():
    with pytest.raises(ValueError, match="letters"):
        tables.show(PRINTED, "../x", "")


def test_save_writes_three_forms_of_a_table(tmp_path):
    table = pd.DataFrame({"arm": ["w|o"], "value": [12.345], "quantity": ["miou"]})
    paths = tables.save(table, "t3", tmp_path / "tables", "A caption.")
    assert [path.name for path in paths] == ["t3.csv", "t3.md", "t3.html"]
    assert {path.name for path in (tmp_path / "tables").iterdir()} == {"t3.csv", "t3.md", "t3.html"}
    assert pd.read_csv(paths[0])["value"].tolist() == [12.3]
    lines = "| arm | value | quantity |\n| --- | --- | --- |\n| w\\|o | 12.3 | miou |\n\nA caption.\n"
    assert paths[1].read_text() == lines
    assert "A caption." in paths[2].read_text()


def test_save_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tables.save(PRINTED, "t", "", "") == [] and list(tmp_path.iterdir()) == []


def test_provenance_gathers_runs_of_one_origin():
    records = [make_record(seed=seed) for seed in (0, 1)]
    other = make_record(environment=records[0].environment | {"commit": "def", "uncommitted_changes": True})
    table = tables.provenance([*records, other])
    assert table["commit"].tolist() == ["abc", "def + uncommitted changes"]
    row = table.iloc[0]
    assert (row["seeds"], row["runs"], row["wall time"], row["peak memory"]) == ("0, 1", 2, "2.0 min", "100 MB")
    assert row["versions"] == "python 3.11.7, torch 2.8.0" and row["machine"] == "a CPU, 1 thread(s) a run"
