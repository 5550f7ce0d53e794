"""Every published table has its regenerated counterpart, row for row, and every number comes from the runs it names.

The numbers are computed here once more, straight from the records, without the code that made the tables.
"""

import json
import statistics
from functools import cache

import pandas as pd
import pytest

from wsss.data.classes import SCENE_CLASSES
from wsss.index import published_tables
from wsss.reproduce import RESULTS
from wsss.tables import OWN_METHODS

EMBEDDED = RESULTS / "embedded"
TABLES = published_tables()
# The columns of a published table that say which row this is; the others hold its number and where that is from.
WHO = ["paper", "table", "method", "variant", "supervision", "stage", "quantity", "class_name", "unit", "note"]
MORE = ["published", "published_uncertainty", "status", "seeds", "protocol", "map", "runs"]


def read(path):
    return pd.read_csv(path, dtype=str, keep_default_na=False)


@pytest.fixture(params=TABLES, ids=lambda table: "_table".join(map(str, table)))
def pair(request):
    """A published table and its counterpart."""
    name = "{}_table{}.csv".format(*request.param)
    return read(RESULTS / "published" / name), read(EMBEDDED / "as_published" / name)


def rows(pair):
    return zip(pair[0].to_dict("records"), pair[1].to_dict("records"), strict=True)


def kind(row):
    return row["status"].partition(":")[0]


def test_there_are_24_tables():
    count = {paper: sum(each == paper for each, _ in TABLES) for paper in OWN_METHODS}
    assert count == {"bnr": 5, "apc": 9, "seco": 5, "more": 5}
    found = {path.stem for path in (EMBEDDED / "as_published").iterdir()}
    assert found == {f"{paper}_table{number}" for paper, number in TABLES}


def test_the_rows_and_columns_are_those_of_the_published_table(pair):
    published, ours = pair
    assert list(ours.columns) == [*published.columns, *MORE]
    assert ours[WHO].equals(published[WHO])
    assert ours["published"].tolist() == published["value"].tolist()
    assert ours["published_uncertainty"].tolist() == published["uncertainty"].tolist()


def test_every_row_is_reproduced_or_says_why_not(pair):
    for printed, row in rows(pair):
        own = row["method"] in OWN_METHODS[row["paper"]]
        empty = not (row["seeds"] or row["runs"] or row["protocol"] or row["map"])
        place = all(row[column] == printed[column] for column in ("dataset", "split", "backbone"))
        match kind(row):
            case "reproduced":
                assert row["value"] and int(row["seeds"]) == len(seeds_of(row)) >= 3 and row["uncertainty"]
                assert row["dataset"] == "embedded" and row["split"] in ("train", "test")
            case "undefined":
                assert row["value"] == row["uncertainty"] == "" and row["runs"] and row["dataset"] == "embedded"
            case "published only":
                assert not own and empty and place
                assert (row["value"], row["uncertainty"]) == (printed["value"], printed["uncertainty"])
            case "not run":
                assert own and empty and place and row["value"] == row["uncertainty"] == ""
            case other:
                pytest.fail(f"unknown status {other!r}")


def test_what_was_not_run_is_what_this_benchmark_cannot_give(pair):
    for printed, row in rows(pair):
        if kind(row) != "not run":
            continue
        reason, elsewhere = row["status"].removeprefix("not run: "), printed["dataset"] == "coco2014"
        if elsewhere or printed["split"] == "test":
            assert reason == f"{printed['dataset']} {printed['split']}", "one column of ours stands beside VOC val"
        elif printed["class_name"] not in ("", "background", *SCENE_CLASSES):
            assert reason == f"embedded has no {printed['class_name']}"
        else:
            assert reason == printed["quantity"] and "vs_best_other" in reason, f"needs no other paper's network: {row}"


# ----------------------------------------------------------------------------------------------- numbers once more


@cache
def record(run):
    return json.loads((EMBEDDED / "runs" / run / "record.json").read_text())


def seeds_of(row):
    """Seed -> records of a row: one, or for a ratio of two runs both."""
    found = {}
    for run in row["runs"].split("; "):
        found.setdefault(record(run)["seed"], []).append(record(run))
    return found


def score(row, record):
    """The score of a row in a record: percent, or a ratio."""
    scores = record["metrics"]["/".join((row["split"], row["protocol"], row["map"]))]
    names = {"confusion_ratio": "mean_confusion_ratio", "precision": "mean_precision", "recall": "mean_recall"}
    if row["class_name"]:
        value = scores[row["quantity"]][["background", *record["classes"]].index(row["class_name"])]
    else:
        value = scores[names.get(row["quantity"], "miou")]
    return value if value is None or row["unit"] == "ratio" else 100 * value


def by_size(row, key):
    """A token that has a value for each image size; the paper's sizes are ten times ours."""
    side = int(row["variant"].rpartition("x")[2]) // 10
    return lambda record: record["tokens"][key][record["tokens"]["sizes"].index(side)]


def measurement(row):
    """What a row takes from one record, in the unit of the paper."""
    if row["paper"] == "apc" and row["table"] == "1":
        key = {"segmentation": "size_miou", "inference_time_s": "size_seconds", "gpu_memory_gb": "size_memory_mb"}
        factor = {"segmentation": 100, "inference_time_s": 1, "gpu_memory_gb": 1 / 1024}[row["quantity"]]
        return lambda record: factor * by_size(row, key[row["quantity"]])(record)
    return {
        "train_time_h": lambda record: record["wall_seconds"] / 3600,
        "train_time_min": lambda record: record["wall_seconds"] / 60,
        "gpu_memory_gb": lambda record: record["peak_memory_mb"] / 1024,
        "cosine_distance_inter": lambda record: record["tokens"]["inter"],
        "cosine_distance_intra": lambda record: record["tokens"]["intra"],
    }.get(row["quantity"], lambda record: score(row, record))


def value(row, records):
    """The value of a row for one seed."""
    if row["quantity"] == "ratio_to_fully_supervised":
        whole = {record["method"]: score(row, record) for record in records}
        return 100 * whole["seco"] / whole["supervised"]
    [single] = records
    return measurement(row)(single)


def test_every_number_is_the_mean_over_the_runs_that_it_names(pair):
    for row in pair[1].to_dict("records"):
        if kind(row) == "undefined":
            assert None in [value(row, records) for records in seeds_of(row).values()]
        if kind(row) != "reproduced":
            continue
        values = [value(row, records) for _, records in sorted(seeds_of(row).items())]
        for text, number in ((row["value"], statistics.mean(values)), (row["uncertainty"], statistics.stdev(values))):
            digits = len(text.partition(".")[2])
            in_digits = row["unit"] not in ("percent", "ratio")  # three of them, wherever the point is
            rounding = 0.005 * abs(number) if in_digits else 0.5 * 10**-digits
            assert float(text) == pytest.approx(number, abs=rounding + 1e-9), (row["variant"], row["quantity"], values)
            assert in_digits or digits >= (2 if row["unit"] == "ratio" else 1)


def test_the_runs_are_of_the_method_and_the_arm_of_their_row(pair):
    methods = {"BNR": "transcam", "TransCAM": "transcam", "APC": "apc", "SeCo": "seco", "MoRe": "more"}
    for row in pair[1].to_dict("records"):
        for records in seeds_of(row).values() if row["runs"] else ():
            for one in records:
                first = one
                while first.get("source"):
                    first = record(first["source"])
                expected = {methods.get(row["method"], "supervised")}
                expected |= {"supervised"} if row["quantity"] == "ratio_to_fully_supervised" else set()
                assert first["method"] in expected and first["variant"] == "published"
                assert row["backbone"] == one["recipe"]["backbone"]
                if row["method"] == "TransCAM":
                    assert first["recipe"]["weight_refined"] == 0
                if row["method"] == "BNR":
                    assert first["recipe"]["weight_refined"] > 0
                if row["variant"] == "full":
                    assert first["arm"] == "full"
