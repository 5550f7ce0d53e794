"""What does not fit together in the papers' own numbers: the list of it, and the arithmetic behind the list."""

import re
from collections.abc import Mapping
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd

from wsss.tables import PUBLISHED, published

LIST = "inconsistencies.md"
PAPER = {"M": "more", "V": "more", "S": "seco", "A": "apc", "B": "bnr"}  # by the letter of an entry
WHOLE = ["", "full"]  # variants of a row that stands for a method, and not for an ablation of it
RESULT = ["method", "dataset", "split", "quantity", "class_name"]  # what one number is measured by
TABLE_8 = {  # what the prose of APC calls the rows of its table 8
    "max pooling": "+HV-BiLSTM+CRF",
    "AKP": "+HV-BiLSTM+CRF+AKP",
    "AKP only": "+HV-BiLSTM+CRF+AKP",
    "+PCL": "+HV-BiLSTM+CRF+AKP+PCL",
}


# ---------------------------------------------------------------------------------------------- what is printed


def printed(folder: str | Path = PUBLISHED) -> pd.DataFrame:
    """Every number that the papers print, with the columns of `tables.published`; table "text" is the prose."""
    stems = [path.stem.split("_", 1) for path in sorted(Path(folder).glob("*_t*.csv"))]
    return pd.concat([published(paper, rest.removeprefix("table"), folder) for paper, rest in stems], ignore_index=True)


def value(rows: pd.DataFrame, **where: str) -> float:
    """The number in the one row whose columns equal `where`.

    Raises:
        ValueError: there is no such row, or they have several numbers.
    """
    for column, wanted in where.items():
        rows = rows[rows[column] == wanted]
    found = rows["value"].unique()
    if len(found) != 1:
        raise ValueError(f"value: {len(found)} numbers with {', '.join(f'{k} = {v!r}' for k, v in where.items())}")
    return float(found[0])


# ------------------------------------------------------------------------------------------------------- the list


def entries(folder: str | Path = PUBLISHED) -> pd.DataFrame:
    """The entries of the list: entry ("M1"), paper, kind ("arith", "text/table", ..., "" where not said), text.

    Raises:
        ValueError: the file has no entries, or two with the same name.
    """
    path = Path(folder) / LIST
    found = re.findall(r"^- ([A-Z])(\d+) (?:\[([a-z/]+)\] )?(.+)$", path.read_text(), re.MULTILINE)
    rows = [(f"{letter}{number}", PAPER[letter], kind, text) for letter, number, kind, text in found]
    table = pd.DataFrame(rows, columns=["entry", "paper", "kind", "text"])
    if table.empty or table["entry"].duplicated().any():
        twice = table.loc[table["entry"].duplicated(), "entry"].tolist()
        raise ValueError(f"{path}: expected lines `- M1 [kind] text`, each name once; twice: {twice or 'no such line'}")
    return table


def says(text: str, *numbers: str) -> bool:
    """Whether a text has all these numbers, written like that ("-9.2", "82,081"); signs count."""
    return set(numbers) <= set(re.findall(r"[-+]?\d+(?:[.,]\d+)*", text))


def checked(
    listed: pd.DataFrame, checks: Mapping[str, tuple[str, str, bool]], places: Mapping[str, str]
) -> pd.DataFrame:
    """Every entry with its arithmetic, or with the place that handles it.

    Args:
        listed: as from `entries`.
        checks: entry -> what the papers print, what that gives, whether the entry holds.
        places: entry -> where this workbook handles what no arithmetic can settle.

    Returns:
        entry, kind, the list says, printed, computed, holds ("yes", "no", or "no arithmetic").

    Raises:
        ValueError: an entry is left out, is in both, or is not listed.
    """
    both, known = set(checks) & set(places), set(listed["entry"])
    left_out, unknown = known - set(checks) - set(places), (set(checks) | set(places)) - known
    for names, problem in ((left_out, "are left out"), (both, "are in both"), (unknown, "are not listed")):
        if names:
            raise ValueError(f"{LIST}: entries that {problem}: {', '.join(sorted(names))}")
    rows = []
    for entry, kind, text in listed[["entry", "kind", "text"]].itertuples(index=False):
        shown, gives, holds = checks.get(entry, ("", places.get(entry), None))
        rows.append((entry, kind, text, shown, gives, {True: "yes", False: "no", None: "no arithmetic"}[holds]))
    return pd.DataFrame(rows, columns=["entry", "kind", "the list says", "printed", "computed, or handled in", "holds"])


def section(notebook: str | Path, heading: str) -> str:
    """"04_more.ipynb, 4.2 Uncertain relations": a place to send readers to.

    Raises:
        ValueError: the notebook has no such heading.
    """
    text = [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "markdown"]
    found = re.findall(r"^#+ (.+?)\s*$", "\n".join(text), re.MULTILINE)
    if heading not in found:
        raise ValueError(f"{notebook}: no heading {heading!r}; it has {', '.join(found)}")
    return f"{Path(notebook).name}, {heading}"


# ------------------------------------------------------------------------------------------------- IoU and FP / TP


def iou_bound(ratio: np.ndarray | float, rounding: float = 0.0) -> np.ndarray | float:
    """The highest IoU (percent) that a class with the confusion ratio FP/TP can have: 100 / (1 + FP/TP).

    IoU = TP / (TP + FP + FN) = 1 / (1 + FP/TP + FN/TP), and FN >= 0. `rounding`: by how much the ratio may really be
    smaller than printed, half of its last digit.
    """
    return 100 / (1 + ratio - rounding)


def class_pairs(rows: pd.DataFrame) -> pd.DataFrame:
    """Classes whose IoU and confusion ratio are printed: paper, table, method, split, class_name, iou, confusion_ratio.

    Two columns are added: `bound`, the highest IoU that the ratio allows, both rounded in favour of the paper (two
    decimals of the ratio, one of the IoU), and `possible`.
    """
    both = rows[rows["quantity"].isin(["iou", "confusion_ratio"])]
    both = both[both["class_name"].ne("") & both["table"].ne("text")]
    names = ["paper", "table", "method", "split", "class_name"]
    pairs = both.pivot(index=names, columns="quantity", values="value").dropna().reset_index().rename_axis(columns=None)
    pairs["bound"] = iou_bound(pairs["confusion_ratio"], 0.005)
    return pairs.assign(possible=pairs["iou"] - 0.05 <= pairs["bound"])


# --------------------------------------------------------------------------------------------------- between papers


def conflicts(rows: pd.DataFrame) -> pd.DataFrame:
    """One result, several numbers: results that tables print differently, a dash included.

    A result is a method (not its ablations) on a data set, split, quantity and class. Rows of one and the same table
    are told apart by that table, as a reference network with two backbones is.

    Returns:
        The columns `RESULT`, numbers (set of text, "dash" for none) and sources ("80.6 more 4 (ViT-B), ...").
    """
    whole = rows[rows["table"].ne("text") & rows["variant"].isin(WHOLE) & ~rows["quantity"].str.contains("_vs_")]
    found = []
    for key, own in whole.groupby(RESULT, sort=False):
        own = own.assign(number=[_number(value) for value in own["value"]])
        by_table = own.groupby(["paper", "table"])["number"].agg(frozenset)
        if by_table.nunique() > 1:
            said = (f"{row.number} {row.paper} {row.table} ({row.backbone or '-'})" for row in own.itertuples())
            found.append((*key, frozenset(own["number"]), ", ".join(said)))
    return pd.DataFrame(found, columns=[*RESULT, "numbers", "sources"])


def _number(value: float) -> str:
    return "dash" if pd.isna(value) else f"{value:.1f}"


def same_number(rows: pd.DataFrame) -> pd.DataFrame:
    """One number, several networks: a result that tables print alike but with other backbones.

    Returns:
        The columns `RESULT`, value, and backbones ("ResNet38 apc 2, ResNet101 more 1"). ViT-B and ViT-B/16 are one.
    """
    whole = rows[rows["table"].ne("text") & rows["variant"].isin(WHOLE) & rows["backbone"].ne("")]
    found = []
    for key, own in whole.groupby([*RESULT, "value"], sort=False):
        if own["backbone"].str.removesuffix("/16").nunique() > 1:
            said = ", ".join(f"{row.backbone} {row.paper} {row.table}" for row in own.itertuples())
            found.append((*key, said))
    return pd.DataFrame(found, columns=[*RESULT, "value", "backbones"])


def listed_conflicts(folder: str | Path = PUBLISHED) -> pd.DataFrame:
    """The list's table "Between papers", one row a result: `RESULT`, numbers, text.

    A row about backbones has the quantity "backbone" and no data set, split or numbers.
    """
    part = (Path(folder) / LIST).read_text().partition("## Between papers")[2].partition("\n## ")[0]
    table = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|")]
    found = []
    kinds = {"IoU": "iou", "mask": "pseudo_mask", "backbone": "backbone"}
    for method, quantity, text in ((cell.strip() for cell in cells) for cells in table[2:]):
        words = quantity.replace(",", "").split()
        kind = next((kinds[word] for word in words if word in kinds), "segmentation")
        dataset = "" if kind == "backbone" else "coco2014" if "COCO" in words else "voc2012"
        splits = [word for word in words if word in ("train", "val", "test")] or [""]
        numbers = re.findall(r"dash|\b\d+\.\d\b", re.sub(r"\(.*?\)", "", text))
        for position, split in enumerate(splits):
            own = numbers[position :: len(splits)]  # several splits take turns: "72.1, 71.7 MoRe"
            found.append((method, dataset, split, kind, words[1] if kind == "iou" else "", frozenset(own), text))
    return pd.DataFrame(found, columns=[*RESULT, "numbers", "text"])


# ----------------------------------------------------------------------------------------------------------- margins


def margins(rows: pd.DataFrame) -> pd.DataFrame:
    """The margins that the prose quotes, from the rows of the tables that they are between.

    Returns:
        paper, quantity, class_name, dataset, split, margin ("full vs ToCo"), first, second, printed, computed, agree;
        printed and computed in points, 100 times the difference for ratios.

    Raises:
        ValueError: an arm of a margin has no row, or rows with several numbers.
    """
    quoted = rows[rows["table"].eq("text") & rows["quantity"].str.startswith("delta_")]
    found = []
    for row in quoted.itertuples():
        quantity = row.quantity.removeprefix("delta_")
        where = {"paper": row.paper, "dataset": row.dataset, "split": row.split, "quantity": quantity}
        own = rows[rows["table"].ne("text") & rows["class_name"].eq(row.class_name)]
        for column, wanted in where.items():
            own = own[own[column] == wanted]
        named = re.search(r"Table (\d+)", row.note)
        own = own[own["table"] == named[1]] if named else own
        first, second = (_arm(own, row.method, arm) for arm in row.variant.split(" vs "))
        computed = round((first - second) * (100 if own["unit"].eq("ratio").all() else 1), 1)
        place = (row.paper, quantity, row.class_name, row.dataset, row.split, row.variant)
        found.append((*place, first, second, row.value, computed, computed == row.value))
    names = ["paper", "quantity", "class_name", "dataset", "split", "margin", "first", "second", "printed", "computed"]
    return pd.DataFrame(found, columns=[*names, "agree"])


def _arm(rows: pd.DataFrame, method: str, arm: str) -> float:
    """The number of an arm: another method (in brackets where it is described), the method ("full"), or a row of it."""
    described = re.search(r"\((.+)\)", arm)
    name = described[1] if described else TABLE_8.get(arm, arm)
    if name in set(rows["method"]) or name == "full":
        own = rows[rows["method"] == (method if name == "full" else name)]
        own = own[own["variant"].isin(WHOLE)] if own["variant"].isin(WHOLE).any() else own
    else:
        own = rows[rows["method"].eq(method) & rows["variant"].eq(name)]
    return value(own.assign(arm=arm), arm=arm)
