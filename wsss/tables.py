"""Tables: what a paper printed beside what was reproduced, with the spread over seeds and where it all comes from.

Numbers travel in one long format, one value a row. `published` reads the papers' tables as they were printed, `frame`
turns records into the same kind of rows, `summary` takes means over seeds, `compare` sets both side by side. Records
hold fractions; frames and tables hold percent, except for ratios (`RATIOS`).
"""

import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from wsss.files import write_atomic

if TYPE_CHECKING:
    from IPython.display import HTML

    from wsss.experiments import Record

PUBLISHED = Path(__file__).resolve().parents[1] / "results" / "published"
PERCENT = ("miou", "iou", "precision", "recall", "pixel_accuracy")
RATIOS = ("confusion_ratio",)
COLUMNS = [
    "method", "variant", "arm", "dataset", "seed", "split", "protocol", "map", "quantity", "class_name", "value", "run"
]  # fmt: skip
PLACE = ["dataset", "split", "protocol", "map"]
AGREEMENT = (
    "A new value agrees with the committed one when the two means differ by no more than twice the committed standard "
    "deviation over seeds, or by 0.5 points (0.005 of a ratio), whichever is more."
)
NOT_RUN, NOT_REPORTED, UNDEFINED = "not run", "not reported", "undefined"
REPRODUCED, PUBLISHED_ONLY = "reproduced", "published only"
AS_PUBLISHED = "as_published"  # folder of the regenerated tables
# The methods whose rows a paper ran itself; the last one is its own proposal.
OWN_METHODS = {"bnr": ("TransCAM", "BNR"), "apc": ("APC",), "seco": ("SeCo",), "more": ("MoRe",)}
NUMBERS = rf"[+-]?\d.*|{NOT_RUN}|{NOT_REPORTED}|{UNDEFINED}.*|{PUBLISHED_ONLY}|"  # cells that are set to the right


def published(paper: str, table: str | int, folder: str | Path = PUBLISHED) -> pd.DataFrame:
    """One table of a paper as printed, one value a row.

    Args:
        paper: "more", "seco", "apc" or "bnr".
        table: number of the table (1, "1"), or "text" for numbers quoted in prose.
        folder: where the CSV files lie; their columns are explained in its README.md.

    Returns:
        The columns of the file; `value` and `uncertainty` are floats, all others are text ("" where empty).

    Raises:
        FileNotFoundError: there is no such table; the message names those that exist.
    """
    sheet = _as_text(paper, table, folder)
    return sheet.assign(value=pd.to_numeric(sheet["value"]), uncertainty=pd.to_numeric(sheet["uncertainty"]))


def _as_text(paper: str, table: str | int, folder: str | Path = PUBLISHED) -> pd.DataFrame:
    """The cells of a published table, letter by letter."""
    path = Path(folder) / (f"{paper}_text.csv" if table == "text" else f"{paper}_table{table}.csv")
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*_t*.csv"))) or "none"
        raise FileNotFoundError(f"{path}: there is no such published table; known: {known}")
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def frame(records: Sequence["Record"]) -> pd.DataFrame:
    """All scores of some runs in long format.

    Returns:
        The columns `COLUMNS`, one value a row. `dataset` is the dataset's identity, `map` has "+crf" behind it where a
        CRF was used, `class_name` is "" for a mean over classes, `run` is the name of the run. Values are percent for
        the quantities in `PERCENT` and plain for those in `RATIOS`; NaN where a score is undefined.
    """
    rows = []
    for record in records:
        run = (record.method, record.variant, record.arm, record.identity, record.seed)
        classes = ("background", *record.classes)
        for key, scores in record.metrics.items():
            place = key.split("/")
            for name, value in scores.items():
                quantity = name.removeprefix("mean_")
                if quantity not in PERCENT + RATIOS:
                    continue
                named = zip(classes, value, strict=True) if isinstance(value, list) else [("", value)]
                factor = 100.0 if quantity in PERCENT else 1.0
                for class_name, number in named:
                    number = float("nan") if number is None else number * factor
                    rows.append((*run, *place, quantity, class_name, number, record.name))
    return pd.DataFrame(rows, columns=COLUMNS)


def measured(
    records: Sequence["Record"], split: str, protocol: str = "", **quantities: Callable[["Record"], float | None]
) -> pd.DataFrame:
    """What runs measured besides scores, in the long format of `frame`.

    Args:
        split, protocol: what to write into these columns.
        quantities: name of a quantity -> its value for a record, in the unit of the table that it is for; None where
            the run did not measure it, which gives no row.
    """
    rows = []
    for record in records:
        run = (record.method, record.variant, record.arm, record.identity, record.seed, split, protocol, "")
        values = {quantity: value(record) for quantity, value in quantities.items()}
        rows += [(*run, quantity, "", value, record.name) for quantity, value in values.items() if value is not None]
    return pd.DataFrame(rows, columns=COLUMNS)


def select(frame: pd.DataFrame, **where: object) -> pd.DataFrame:
    """The rows of a long frame whose columns have the given values: a value, or a list of allowed ones.

    Raises:
        KeyError: the frame has no such column.
    """
    chosen = pd.Series(True, frame.index)
    for column, value in where.items():
        chosen &= frame[column].isin(value if isinstance(value, list) else [value])
    return frame[chosen]


def summary(frame: pd.DataFrame, by: str | Sequence[str]) -> pd.DataFrame:
    """Mean and spread over seeds.

    Args:
        frame: rows in long format.
        by: columns that tell the rows of the result apart.

    Returns:
        The columns `by`, then `mean`, `std` (over n - 1; NaN, printed as a blank, for one seed) and `n`, in the order
        of first appearance. The mean is NaN where the score of any seed is undefined.

    Raises:
        ValueError: a group has two values of one seed, so that a mean would not be one over seeds.
    """
    by = [by] if isinstance(by, str) else list(by)
    twice = frame.duplicated([*by, "seed"])
    if twice.any():
        row = frame[twice].iloc[0]
        where = ", ".join(f"{column} = {row[column]!r}" for column in [*by, "seed"])
        varied = [c for c in frame.columns if c not in (*by, "seed", "value", "run") and frame[c].nunique() > 1]
        raise ValueError(
            f"summary: more than one value for {where}; filter the frame, or add one of these columns to `by`: "
            + ", ".join(varied)
        )
    values = frame.groupby(by, sort=False, dropna=False)["value"]
    result = pd.DataFrame({"mean": values.mean(skipna=False), "std": values.std(skipna=False), "n": values.size()})
    return result.reset_index()


def compare(
    published: pd.DataFrame,
    reproduced: pd.DataFrame,
    on: str | Sequence[str],
    committed: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Published and reproduced numbers side by side, one row for each combination of the columns `on`.

    Every column of numbers is headed by its own dataset and split ("published: voc2012 val", "reproduced: embedded
    test"), so that no number stands under a name it does not belong to. The difference is reproduced - published; where
    the datasets differ it only says how far apart they are.

    With `committed`, the frame of the committed records, two more columns say whether a new run came out like the
    committed one. A new value agrees when |new mean - committed mean| <= max(2 * committed standard deviation, 0.5
    points); one committed seed has no deviation, and a point of a ratio is 0.01. The rule is part of the caption.

    Args:
        published: rows as `published` reads them, relabelled so that the columns `on` use the words of the records
            (for example quantity "segmentation" -> "miou").
        reproduced: rows of `frame`, filtered to one dataset, split, protocol and map. May be empty.
        on: columns that both have.

    Returns:
        Text cells: "58.1 ± 1.2 (3)" is a mean, its standard deviation and the number of seeds. "not run" where there
        is no record, "not reported" where the paper has no number, "undefined" where a score does not exist.

    Raises:
        ValueError: a frame has more than one dataset or split, two values for one row, or lacks a column of `on`.
    """
    on = [on] if isinstance(on, str) else list(on)
    for name, rows in (("published", published), ("reproduced", reproduced), ("committed", committed)):
        missing = [] if rows is None else [column for column in on if column not in rows.columns]
        if missing:
            raise ValueError(f"compare: the {name} frame has no column {', '.join(missing)}")
    theirs, ours = _printed_values(published, on), _means(reproduced, on)
    old = None if committed is None else _means(committed, on)
    theirs_head, ours_head = heading("published", published), heading("reproduced", reproduced)
    rows = []
    for key in dict.fromkeys([*theirs, *ours]):
        value, text, ratio = theirs.get(key, (float("nan"), NOT_REPORTED, False))
        new = ours.get(key)
        row = dict(zip(on, key)) | {theirs_head: text, ours_head: _mean_text(new)}
        row["difference"] = _difference(new, value, ratio)
        if old is not None:
            row |= {heading("committed", committed): _mean_text(old.get(key)), "agrees": _agrees(new, old.get(key))}
        rows.append(row)
    table = pd.DataFrame(rows)
    if old is not None:
        table.attrs["note"] = AGREEMENT
    return table


def heading(name: str, rows: pd.DataFrame) -> str:
    """`name: dataset split`, which must be the same in all rows."""
    places = rows[["dataset", "split"]].drop_duplicates()
    if len(places) > 1:
        found = "; ".join(" ".join(map(str, place)) for place in places.itertuples(index=False))
        raise ValueError(f"compare: the {name} frame mixes datasets or splits ({found}); filter it to one")
    place = " ".join(part for part in (places.iloc[0] if len(places) else []) if part)
    return f"{name}: {place}" if place else name


def _printed_values(published: pd.DataFrame, on: list[str]) -> dict[tuple, tuple[float, str, bool]]:
    """Key -> (value, its text, whether it is a ratio)."""
    twice = published.duplicated(on)
    if twice.any():
        key = dict(published.loc[twice, on].iloc[0])
        raise ValueError(f"compare: the published frame has more than one value for {key}; filter it")
    cells = {}
    for row in published.to_dict("records"):
        ratio, value, spread = row.get("unit") == "ratio", row["value"], row.get("uncertainty")
        text = NOT_REPORTED if pd.isna(value) else _as_printed(value, ratio)
        if pd.notna(value) and pd.notna(spread):
            text += f" ± {_as_printed(spread, ratio)}"
        cells[tuple(row[column] for column in on)] = (value, text, ratio)
    return cells


def _as_printed(value: float, ratio: bool) -> str:
    """At least one decimal (two for a ratio), and all that the paper gives."""
    return f"{value:.{max(_decimals(ratio), len(repr(float(value)).partition('.')[2]))}f}"


def _decimals(ratio: bool) -> int:
    return 2 if ratio else 1


def _means(frame: pd.DataFrame, on: list[str]) -> dict[tuple, dict]:
    """Key -> {mean, std, n, ratio}."""
    if frame.empty:
        return {}
    ratios = frame.assign(ratio=frame["quantity"].isin(RATIOS)).groupby(on, sort=False)["ratio"].first()
    rows = summary(frame, on).to_dict("records")
    return {
        tuple(row[column] for column in on): row | {"ratio": ratio} for row, ratio in zip(rows, ratios, strict=True)
    }


def _mean_text(cell: dict | None) -> str:
    if cell is None:
        return NOT_RUN
    if pd.isna(cell["mean"]):
        return f"{UNDEFINED} ({cell['n']})"
    decimals = _decimals(cell["ratio"])
    spread = "" if pd.isna(cell["std"]) else f" ± {cell['std']:.{decimals}f}"
    return f"{cell['mean']:.{decimals}f}{spread} ({cell['n']})"


def _difference(new: dict | None, value: float, ratio: bool) -> str:
    if new is None:
        return NOT_RUN
    if pd.isna(value):
        return NOT_REPORTED
    return UNDEFINED if pd.isna(new["mean"]) else f"{new['mean'] - value:+.{_decimals(ratio)}f}"


def _agrees(new: dict | None, old: dict | None) -> str:
    """The rule `AGREEMENT`; two undefined scores agree."""
    if new is None or old is None:
        return NOT_RUN
    if pd.isna(new["mean"]) or pd.isna(old["mean"]):
        return "yes" if pd.isna(new["mean"]) and pd.isna(old["mean"]) else "no"
    points = 0.005 if old["ratio"] else 0.5
    allowed = points if pd.isna(old["std"]) else max(2 * old["std"], points)
    return "yes" if abs(new["mean"] - old["mean"]) <= allowed else "no"


def caption(title: str, frame: pd.DataFrame, records: Sequence["Record"]) -> str:
    """A caption that says what the numbers of `frame` are: dataset, split, protocol, map, variant, seeds, machine."""
    said = {column: frame[column] for column in ("dataset", "split", "protocol", "map", "variant", "seed")}
    said["machine"] = [record.environment["machine"] for record in records]
    listed = {name: ", ".join(map(str, dict.fromkeys(values))) or NOT_RUN for name, values in said.items()}
    return f"{title.rstrip('.')}. " + "; ".join(f"{name}: {value}" for name, value in listed.items()) + "."


def provenance(records: Sequence["Record"]) -> pd.DataFrame:
    """Where numbers come from: one row for each method, variant, dataset, commit, set of versions and machine.

    Returns:
        method, variant, dataset, commit, versions, machine, seeds, runs, and over those runs the total wall time
        ("12.3 min") and the largest peak memory ("812 MB").
    """
    rows = []
    for record in records:
        about = dict(record.environment)
        changed = about.pop("uncommitted_changes", False)
        commit = about.pop("commit") + (" + uncommitted changes" if changed else "")
        machine = f"{about.pop('machine')}, {about.pop('threads')} thread(s) a run"
        about.pop("device", None)  # the machine's name tells
        versions = ", ".join(f"{name} {value}" for name, value in about.items())
        place = (record.method, record.variant, record.identity, commit, versions, machine)
        rows.append((*place, record.seed, record.wall_seconds, record.peak_memory_mb))
    keys = ["method", "variant", "dataset", "commit", "versions", "machine"]
    groups = pd.DataFrame(rows, columns=[*keys, "seed", "seconds", "memory"]).groupby(keys, sort=False)
    table = groups.agg(
        seeds=("seed", lambda seeds: ", ".join(map(str, sorted(set(seeds))))),
        runs=("seed", "size"),
        seconds=("seconds", "sum"),
        memory=("memory", "max"),
    ).reset_index()
    table["wall time"] = table.pop("seconds").map(lambda seconds: f"{seconds / 60:.1f} min")
    table["peak memory"] = table.pop("memory").map(lambda memory: f"{memory:.0f} MB")
    return table


# -------------------------------------------------------------------------------------- published tables, row for row


def regenerate(
    paper: str, table: str | int, theirs: pd.DataFrame, ours: pd.DataFrame, on: str | Sequence[str], folder: str | Path
) -> None:
    """Write the counterpart of a published table, row for row: <paper>_table<N>.csv in `as_published` beside `folder`.

    It has the rows and the columns of the published file. A row that was reproduced holds our mean over seeds and its
    standard deviation, with our dataset, split and backbone; the row of another paper's method keeps what was printed.
    More columns follow: `published` and `published_uncertainty` (as printed), `status`, `seeds` (how many), `protocol`,
    `map` and `runs` (their names). The status is "reproduced", "undefined" (there are runs, but no such score),
    "published only", or, for a row of the paper's own methods that has no counterpart, "not run: " and what is missing.

    Args:
        theirs: rows of `published(paper, table)` under the index that they have there, labelled so that the columns
            `on` tell them apart. Rows that are left out have no counterpart.
        ours: rows of `frame` or of `measured`, labelled in the same words. May be empty; what matches no row of
            `theirs` is left out.
        on: columns that both have.
        folder: where the other tables go; "" writes nothing.

    Raises:
        ValueError: `theirs` is not of this table or has two rows of one key; ours has two values of one seed for a row,
            or values of several datasets, splits, protocols or maps.
    """
    on = [on] if isinstance(on, str) else list(on)
    sheet, where = _as_text(paper, table), f"regenerate: {paper} table {table}"
    same = theirs["value"].equals(pd.to_numeric(sheet["value"]).reindex(theirs.index))
    if not same or theirs.index.has_duplicates or theirs.duplicated(on).any():
        raise ValueError(
            f"{where}: pass rows of `published({paper!r}, {table!r})`, each once, under the index that they have "
            f"there, and with labels {', '.join(on)} that tell them apart"
        )
    keys = dict(zip(theirs.index, map(tuple, theirs[on].to_numpy())))
    ours = ours.loc[[key in keys.values() for key in map(tuple, ours[on].to_numpy())]]
    places = ours[[*on, *PLACE]].drop_duplicates()
    if places.duplicated(on).any():
        key = dict(places.loc[places.duplicated(on), on].iloc[0])
        raise ValueError(f"{where}: our rows for {key} differ in one of {', '.join(PLACE)}; filter them to one")
    runs = ours.groupby(on, sort=False)["run"].agg(lambda names: "; ".join(dict.fromkeys(names)))
    found = summary(ours, on).merge(places, on=on).merge(runs.rename("runs").reset_index(), on=on).to_dict("records")
    found = {tuple(cell[column] for column in on): cell for cell in found}
    pairs = [(row, found.get(keys.get(index))) for index, row in enumerate(sheet.to_dict("records"))]
    reached = pd.DataFrame([row for row, cell in pairs if cell], columns=sheet.columns)
    lines = [_with_ours(row, cell) if cell else _without_ours(row, reached, ours) for row, cell in pairs]
    if folder != "":
        path = Path(folder).with_name(AS_PUBLISHED) / f"{paper}_table{table}.csv"
        write_atomic(path, pd.DataFrame(lines).to_csv(index=False))


def _with_ours(row: dict, ours: dict) -> dict:
    """The line of a published row that has a counterpart, as text."""
    decimals = max(_decimals(row["unit"] == "ratio"), len(row["value"].partition(".")[2]))
    form = f".{decimals}f" if row["unit"] in ("percent", "ratio") else ".3g"
    text = lambda number: "" if pd.isna(number) else f"{number:{form}}"
    line = row | {"backbone": _backbone(ours["runs"]), "dataset": ours["dataset"], "split": ours["split"]}
    line |= {"value": text(ours["mean"]), "uncertainty": text(ours["std"])}
    line |= {"published": row["value"], "published_uncertainty": row["uncertainty"]}
    line |= {"status": UNDEFINED if pd.isna(ours["mean"]) else REPRODUCED, "seeds": str(ours["n"])}
    return line | {name: ours[name] for name in ("protocol", "map", "runs")}


def _without_ours(row: dict, reached: pd.DataFrame, ours: pd.DataFrame) -> dict:
    """The line of a published row that has none; `reached` are those that have one, `ours` what they have."""
    line = row | {"published": row["value"], "published_uncertainty": row["uncertainty"], "status": PUBLISHED_ONLY}
    line |= dict.fromkeys(("seeds", "protocol", "map", "runs"), "")
    if row["method"] not in OWN_METHODS[row["paper"]]:
        return line
    missing = f"{row['dataset']} {row['split']}".strip() or row["quantity"]
    if (row["dataset"], row["split"]) in set(zip(reached["dataset"], reached["split"])):
        known = row["class_name"] in set(reached["class_name"])
        missing = row["quantity"] if known else f"{ours['dataset'].iloc[0]} has no {row['class_name']}"
    return line | {"value": "", "uncertainty": "", "status": f"{NOT_RUN}: {missing}"}


def _backbone(runs: str) -> str:
    """The part of a run's name that is its backbone, see `Experiment.name`."""
    return re.match(r"[^.]+\.[^_]+_(.+?)_\d+_b\d+-\d+_", runs)[1]


# ---------------------------------------------------------------------------------------------------------- output


def show(table: pd.DataFrame, id: str, caption: str) -> "HTML":
    """The table for a notebook: the same HTML whenever the numbers, rounded, are the same.

    Args:
        id: name of the table, also of its HTML elements; letters, digits and hyphens.
        caption: states dataset, split, protocol, variant, seeds and machine; `caption()` writes one.
    """
    from IPython.display import HTML

    return HTML(_html(table, id, caption))


def save(table: pd.DataFrame, id: str, folder: str | Path, caption: str) -> list[Path]:
    """Write <id>.csv, <id>.md and <id>.html into `folder`, each in one piece; the numbers are rounded as shown.

    With `folder` "" nothing is written, so that a notebook can pass its parameter `out` on.

    Returns:
        The paths written.
    """
    if folder == "":
        return []
    markup = _html(table, id, caption)
    folder, cells = Path(folder), _cells(table)
    return [
        write_atomic(folder / f"{id}.csv", cells.to_csv(index=False)),
        write_atomic(folder / f"{id}.md", f"{markdown(cells)}\n{_full_caption(table, caption)}\n"),
        write_atomic(folder / f"{id}.html", markup + "\n"),
    ]


def _html(table: pd.DataFrame, id: str, caption: str) -> str:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", id):
        raise ValueError(f"table id {id!r}: use letters, digits and hyphens, a letter first")
    cells = _cells(table)
    cells.columns = [html.escape(str(name)) for name in cells.columns]
    numbers = [name for name in cells.columns if cells[name].str.fullmatch(NUMBERS).all()]
    style = cells.style.set_uuid(id).hide(axis="index")
    style = style.format(escape="html").set_caption(html.escape(_full_caption(table, caption)))
    style = style.set_table_styles(
        [
            {"selector": "caption", "props": "caption-side: bottom; text-align: left; padding-top: 0.5em"},
            {"selector": "th, td", "props": "text-align: left; padding: 0.2em 0.8em"},
        ]
    )
    return style.set_properties(subset=numbers, **{"text-align": "right"}).to_html()


def _full_caption(table: pd.DataFrame, caption: str) -> str:
    return " ".join(filter(None, (caption, table.attrs.get("note"))))


def _cells(table: pd.DataFrame) -> pd.DataFrame:
    """The table as text: floats with one decimal (ratios with two), blanks for NaN, a named index as columns."""
    table = table.reset_index(drop=not any(table.index.names))
    ratio = table["quantity"].isin(RATIOS) if "quantity" in table.columns else pd.Series(False, index=table.index)
    return pd.DataFrame(
        {column: [_cell(value, r) for value, r in zip(table[column], ratio)] for column in table.columns}, dtype=object
    )


def _cell(value: object, ratio: bool) -> str:
    if pd.isna(value):
        return ""
    return f"{value:.{_decimals(ratio)}f}" if isinstance(value, float) else str(value)


def markdown(cells: pd.DataFrame) -> str:
    """A table in Markdown; pipes and line breaks in its cells are escaped."""
    escape = lambda value: str(value).replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")
    lines = [cells.columns, ["---"] * len(cells.columns), *cells.itertuples(index=False)]
    return "".join("| " + " | ".join(map(escape, line)) + " |\n" for line in lines)
