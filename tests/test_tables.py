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
    assert "| 40.0 |  | 1 |" in tables.markdown(tables._cells(result)), "no spread of one seed"


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


# ------------------------------------------------------------------------------------------------ published row for row


def more_table3(**given):
    """Published rows with labels, and made-up records of two arms: three seeds of "full", one of "baseline"."""
    paper = tables.published("more", 3).assign(row=lambda f: f["variant"])
    name = "more.published_vit_tiny_80_b32-150_embedded_s{}-{}"
    records = [scored("full", seed, miou, name=name.format(seed, "aa")) for seed, miou in enumerate((0.5, 0.52, 0.57))]
    records.append(scored("baseline", 0, 0.4, name=name.format(0, "bb"), **given))
    ours = tables.frame(records).assign(row=lambda f: f["arm"], quantity="segmentation")
    return paper, ours


def regenerated(folder, paper, table, *arguments):
    tables.regenerate(paper, table, *arguments, folder / "tables")
    sheet = pd.read_csv(folder / f"as_published/{paper}_table{table}.csv", dtype=str, keep_default_na=False)
    return sheet.to_dict("records")


def test_a_regenerated_table_has_the_rows_of_the_published_one(tmp_path):
    paper, ours = more_table3()
    rows = regenerated(tmp_path, "more", 3, paper, ours, ["row", "quantity"])
    assert len(rows) == len(paper)
    where = ["method", "variant", "quantity"]
    assert [[row[column] for column in where] for row in rows] == paper[where].to_numpy().tolist()
    full, baseline = rows[14], rows[2]
    assert (full["value"], full["uncertainty"], full["published"], full["seeds"]) == ("53.0", "3.6", "76.4", "3")
    assert (full["dataset"], full["split"], full["protocol"], full["map"]) == ("embedded", "test", "decoder", "decoder")
    assert full["status"] == "reproduced" and full["backbone"] == "vit_tiny"
    assert full["runs"].split("; ") == [f"more.published_vit_tiny_80_b32-150_embedded_s{seed}-aa" for seed in range(3)]
    assert (baseline["value"], baseline["uncertainty"], baseline["seeds"]) == ("40.0", "", "1")
    other = rows[0]  # the precision of the baseline
    assert other["value"] == other["uncertainty"] == other["runs"] == other["seeds"] == ""
    assert other["published"] == "76.2"
    assert other["status"] == "not run: precision" and (other["dataset"], other["split"]) == ("voc2012", "val")


def test_a_score_that_does_not_exist_is_undefined(tmp_path):
    paper, ours = more_table3()
    rows = regenerated(tmp_path, "more", 3, paper, ours.assign(value=[50.0, np.nan, 50.0, 40.0]), ["row", "quantity"])
    assert (rows[14]["status"], rows[14]["value"], rows[14]["seeds"]) == ("undefined", "", "3") and rows[14]["runs"]


def test_rows_of_others_are_published_only_and_own_rows_say_what_was_not_run(tmp_path):
    paper = tables.published("more", 2)
    ours = more_table3()[1].query("arm == 'full'").assign(method="MoRe")
    rows = regenerated(tmp_path, "more", 2, tables.select(paper, dataset="voc2012", split="val"), ours, "method")
    own = [row for row in rows if row["method"] == "MoRe"]
    assert [row["status"] for row in own] == ["reproduced", "not run: voc2012 test", "not run: coco2014 val"]
    for row, printed in zip(rows, paper.to_dict("records")):
        if row["method"] != "MoRe":
            assert row["status"] == "published only" and row["dataset"] == printed["dataset"]
            assert row["value"] == row["published"]
            assert float(row["value"] or "nan") == pytest.approx(printed["value"], nan_ok=True)


def test_a_class_that_a_dataset_does_not_have_is_named(tmp_path):
    paper = tables.select(tables.published("more", 4), method="MoRe", quantity=["iou", "confusion_ratio"])
    record = make_record(
        name="more.published_vit_tiny_80_b32-150_embedded_s0-aa",
        metrics={"test/decoder/decoder": {"iou": [0.9, 0.5, 0.25], "confusion_ratio": [0.1, 0.123, 2]}},
    )
    rows = regenerated(tmp_path, "more", 4, paper, tables.frame([record]), ["class_name", "quantity"])
    own = [row for row in rows if row["method"] == "MoRe"]
    values = {(row["class_name"], row["quantity"]): (row["value"], row["status"]) for row in own}
    assert values["boat", "iou"] == ("50.0", "reproduced"), "percent have one decimal"
    assert values["boat", "confusion_ratio"] == ("0.12", "reproduced"), "and ratios two"
    assert values["sofa", "iou"] == ("", "not run: embedded has no sofa")
    assert values["boat", "iou_gain_vs_best_other"] == ("", "not run: iou_gain_vs_best_other")


def test_a_table_that_nothing_was_run_for_says_on_which_data(tmp_path):
    paper = tables.published("apc", 4).assign(row=lambda f: f["method"])
    rows = regenerated(tmp_path, "apc", 4, paper, tables.frame([]).assign(row=""), "row")
    assert [row["status"] for row in rows[-2:]] == ["published only", "not run: coco2014 val"]
    paper = tables.published("apc", 9)
    rows = regenerated(tmp_path, "apc", 9, paper, tables.frame([]), ["variant", "quantity"])
    assert rows[0]["status"] == "not run: cosine_distance_inter", "the paper does not say on which data"


def test_measurements_are_regenerated_in_the_units_of_the_paper(tmp_path):
    name = "apc.published_vit_tiny_80_b32-150_embedded_s{}-aa"
    records = [make_record(name=name.format(seed), seed=seed, wall_seconds=90.0 + 9 * seed) for seed in range(3)]
    hours = lambda record: record.wall_seconds / 3600
    ours = tables.measured(records, "train", "alone", train_time_h=hours, memory=lambda record: None)
    assert list(ours.columns) == tables.COLUMNS and len(ours) == 3, "what was not measured has no row"
    paper = tables.select(tables.published("apc", 6), method="APC")
    row = regenerated(tmp_path, "apc", 6, paper, ours, "quantity")[6]
    assert (row["value"], row["uncertainty"]) == ("0.0275", "0.0025")
    assert (row["published"], row["published_uncertainty"]) == ("1.5", "0.5")
    assert (row["status"], row["protocol"], row["unit"]) == ("reproduced", "alone", "hours")


def mixed(ours):
    return pd.concat([ours, ours.assign(map="cam", seed=7)])


@pytest.mark.parametrize(
    "paper, ours, message",
    [
        (lambda paper: paper.reset_index(drop=True)[::2].reset_index(drop=True), None, "under the index"),
        (lambda paper: pd.concat([paper, paper]), None, "each once"),
        (lambda paper: paper.assign(row="one"), None, "tell them apart"),
        (None, lambda ours: pd.concat([ours, ours]), "more than one value"),
        (None, mixed, "differ in one of dataset, split, protocol, map"),
    ],
)
def test_regenerate_refuses_rows_that_do_not_belong_together(tmp_path, paper, ours, message):
    theirs, own = more_table3()
    theirs, own = paper(theirs) if paper else theirs, ours(own) if ours else own
    with pytest.raises(ValueError, match=message):
        tables.regenerate("more", 3, theirs, own, ["row", "quantity"], tmp_path / "tables")
    assert not list(tmp_path.iterdir())


def test_regenerate_without_a_folder_checks_but_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paper, ours = more_table3()
    tables.regenerate("more", 3, paper, ours, ["row", "quantity"], "")
    with pytest.raises(ValueError):
        tables.regenerate("more", 3, paper, pd.concat([ours, ours]), ["row", "quantity"], "")
    assert not list(tmp_path.iterdir())


def test_a_column_that_says_published_only_is_one_of_numbers():
    shown = tables.show(pd.DataFrame({"row": ["a"], "ours": ["published only"]}), "t", "").data
    assert "#T_t_row0_col1 {\n  text-align: right" in shown and "col0 {" not in shown
