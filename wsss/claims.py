"""From claims to verdicts, by one rule that was fixed before the runs, and the ledger of all verdicts."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
from scipy import stats

from wsss.tables import PUBLISHED

SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE = "supported", "not supported", "inconclusive"
NOT_TESTABLE = "not testable here"
SEEDS_NEEDED = 3
RULE = f"""\
The verdict on a claim, fixed before the runs:

- Both arms of a comparison are trained with the same seeds; the effect is the mean over seeds of the paired difference
  (first arm - second arm), with its two-sided 95 % t interval.
- supported: the whole interval lies on the claimed side of 0, or of the margin where the claim states one.
- not supported: the whole interval lies on the other side.
- inconclusive: the interval holds 0 (or the margin), or there are fewer than {SEEDS_NEEDED} seeds, which is then said.
- A ranking is supported when every step between neighbours is, not supported when any step is not supported, and
  inconclusive otherwise; its effect and interval are those of the step that decides, the one with the least room.
- A seed does not count in which a value is undefined, as the precision of a class that is never predicted.
- not testable here: the claim needs data, models or measurements that this workbook does not have.
- Each claim is tested by itself, without a correction for the number of claims.
- On the embedded benchmark a verdict is about the direction of an effect in a network of about a million parameters,
  not about its size in the networks of the papers.
"""
OVERALL = """\
A claim may have several lines: its parts, or readings of it. Its verdict is

- supported, if all lines are;
- not supported, if any line is;
- not testable here, if all lines are;
- inconclusive otherwise, also where a part is supported and another cannot be tested.

A line that only says that a notebook cannot test the claim is left out where another notebook tests it.
"""


@dataclass(frozen=True)
class Verdict:
    """What the runs say about a claim.

    Attributes:
        effect, low, high: mean paired difference and the ends of its interval, in the units of the values (points for
            scores in percent); NaN where there is none.
        n: number of paired seeds.
        verdict: "supported", "not supported", "inconclusive", "inconclusive (n = ...)" or "not testable here".
        note: what a reader should know, for example the reason why a claim is not testable.
    """

    claim_id: str
    claim: str
    effect: float
    low: float
    high: float
    n: int
    verdict: str
    note: str = ""


def claims(paper: str, folder: str | Path = PUBLISHED) -> pd.DataFrame:
    """The claims of a paper: paper, claim_id, claim, evidence, quantity, expected_direction_or_value.

    Raises:
        ValueError: no claims are listed for `paper`.
    """
    table = _all_claims(Path(folder))
    own = table[table["paper"] == paper].reset_index(drop=True)
    if own.empty:
        raise ValueError(f"claims.csv has no paper {paper!r}; it has {', '.join(table['paper'].unique())}")
    return own


@cache
def _all_claims(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "claims.csv", dtype=str, keep_default_na=False)


def _statement(claim_id: str) -> str:
    table = _all_claims(PUBLISHED).set_index("claim_id")["claim"]
    if claim_id not in table.index:
        raise ValueError(f"claims.csv has no claim {claim_id!r}; ids look like {table.index[0]!r}")
    return table[claim_id]


def by_seed(frame: pd.DataFrame, **where: object) -> dict[int, float]:
    """Values by seed of the rows of a long frame whose columns equal `where`, for example arm="full", quantity="miou".

    Raises:
        ValueError: a seed has more than one value; the message names the columns that tell them apart.
    """
    rows = frame
    for column, value in where.items():
        rows = rows[rows[column] == value]
    if rows["seed"].duplicated().any():
        varied = [c for c in rows.columns if c not in ("seed", "value", "run") and rows[c].nunique() > 1]
        raise ValueError(f"by_seed: more than one value for a seed; also say which {' or '.join(varied)}")
    return dict(zip(rows["seed"], rows["value"]))


def paired(
    a: Mapping[int, float],
    b: Mapping[int, float],
    claimed: str,
    claim_id: str,
    margin: float = 0.0,
    note: str = "",
) -> Verdict:
    """Verdict on the claim that arm `a` scores more (">") or less ("<") than arm `b`; see `RULE`.

    Args:
        a, b: values by seed. A seed that only one arm has, or whose value is undefined (NaN), is left out, and the note
            says so.
        margin: by how much at least, >= 0, in the units of the values.

    Raises:
        ValueError: `claimed` is not ">" or "<", the margin is negative, or the claim is not listed.
    """
    if claimed not in (">", "<"):
        raise ValueError(f"paired: claimed is {claimed!r}; use '>' or '<'")
    if not margin >= 0:
        raise ValueError(f"paired: margin is {margin}; it is the least size of the effect, so it cannot be negative")
    seeds = [seed for seed in sorted(set(a) & set(b)) if math.isfinite(a[seed]) and math.isfinite(b[seed])]
    alone, undefined = sorted(set(a) ^ set(b)), sorted(set(a) & set(b) - set(seeds))
    for missing, why in ((alone, "seeds in one arm only"), (undefined, "undefined in seeds")):
        if missing:
            note = "; ".join(filter(None, (note, f"{why}: {', '.join(map(str, missing))}")))
    differences = np.array([a[seed] - b[seed] for seed in seeds], dtype=float)
    effect = float(differences.mean()) if seeds else math.nan
    low, high = _interval(differences)
    sign = 1.0 if claimed == ">" else -1.0
    verdict = _judge(*sorted((sign * low - margin, sign * high - margin)), len(seeds))
    return Verdict(claim_id, _statement(claim_id), effect, low, high, len(seeds), verdict, note)


def _interval(differences: np.ndarray) -> tuple[float, float]:
    """Two-sided 95 % t interval of the mean; NaN below the seeds needed."""
    n = len(differences)
    if n < SEEDS_NEEDED:
        return math.nan, math.nan
    half = stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / math.sqrt(n)
    return float(differences.mean() - half), float(differences.mean() + half)


def _judge(low: float, high: float, n: int) -> str:
    """The rule for an interval that was turned so that the claimed side is above 0."""
    if n < SEEDS_NEEDED:
        return f"{INCONCLUSIVE} (n = {n})"
    if low > 0:
        return SUPPORTED
    return NOT_SUPPORTED if high < 0 else INCONCLUSIVE


def seeds_to_support(effect: float, spread: float, power: float = 0.8) -> int:
    """How many seeds `RULE` needs to support a true effect in a share `power` of repetitions.

    Args:
        effect: true mean of the paired differences, > 0.
        spread: their standard deviation over seeds, > 0; they are taken as normal.

    Raises:
        ValueError: effect or spread is not positive.
    """
    if not (effect > 0 and spread > 0):
        raise ValueError(f"seeds_to_support: effect {effect} and spread {spread} must both be above 0")
    return next(n for n in count(SEEDS_NEEDED) if _power(effect, spread, n) >= power)


def _power(effect: float, spread: float, n: int) -> float:
    """The share of repetitions with n seeds whose interval lies above 0."""
    return stats.nct.sf(stats.t.ppf(0.975, n - 1), n - 1, effect * math.sqrt(n) / spread)


def seeds_to_decide(effect: float, low: float, high: float, n: int, most: int = 100) -> float:
    """How many seeds would tell an effect from 0, whichever side it is on, if it truly were as measured.

    Args:
        effect, low, high, n: as in a `Verdict`: the measured effect and its interval over n seeds.

    Returns:
        The number with which four of five repetitions have an interval on the side of the effect; inf where it is above
        `most`, as for an effect of 0.
    """
    spread = (high - low) / 2 * math.sqrt(n) / stats.t.ppf(0.975, n - 1)
    if not (effect and spread and _power(abs(effect), spread, most) >= 0.8):
        return math.inf
    return seeds_to_support(abs(effect), spread)


def ranking(arms: Mapping[str, Mapping[int, float]], claim_id: str, note: str = "") -> Verdict:
    """Verdict on the claim that `arms`, given from first to last, score in falling order; see `RULE`.

    Args:
        arms: name of an arm -> its values by seed.

    Raises:
        ValueError: fewer than two arms, or what `paired` raises.
    """
    names = list(arms)
    if len(names) < 2:
        raise ValueError(f"ranking: {claim_id}: needs two arms or more, not {len(names)}")
    steps = {f"{a} > {b}": paired(arms[a], arms[b], ">", claim_id) for a, b in zip(names, names[1:])}
    refuted = [step for step in steps.values() if step.verdict == NOT_SUPPORTED]
    few = [step for step in steps.values() if step.n < SEEDS_NEEDED]
    if refuted:
        decides = min(refuted, key=lambda step: step.high)
    elif few:
        decides = min(few, key=lambda step: step.n)
    else:
        decides = min(steps.values(), key=lambda step: step.low)
    said = "; ".join(f"{name}: {_signed(step.effect)} {step.verdict}" for name, step in steps.items())
    notes = "; ".join(filter(None, (note, said)))
    return Verdict(
        claim_id, decides.claim, decides.effect, decides.low, decides.high, decides.n, decides.verdict, notes
    )


def not_testable(claim_id: str, reason: str) -> Verdict:
    """The verdict "not testable here", with the reason as its note."""
    return Verdict(claim_id, _statement(claim_id), math.nan, math.nan, math.nan, 0, NOT_TESTABLE, reason)


def table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """claim_id, claim, verdict, effect, 95 % interval, seeds and note, as text, in the order given."""
    rows = []
    for v in verdicts:
        interval = "" if math.isnan(v.low) else f"[{_signed(v.low)}, {_signed(v.high)}]"
        rows.append((v.claim_id, v.claim, v.verdict, _signed(v.effect), interval, str(v.n or ""), v.note))
    return pd.DataFrame(rows, columns=["claim_id", "claim", "verdict", "effect", "95 % interval", "seeds", "note"])


def _signed(value: float) -> str:
    return "" if math.isnan(value) else f"{value:+.2f}"


# ---------------------------------------------------------------------------------------------------------- the ledger

LINE = ["claim_id", "verdict", "effect", "95 % interval", "seeds", "note"]  # what is read of a table of verdicts
VERDICTS = re.compile(rf"{SUPPORTED}|{NOT_SUPPORTED}|{INCONCLUSIVE}( \(n = \d+\))?|{NOT_TESTABLE}")


class LedgerError(ValueError):
    """The ledger would not be complete, or would say what nobody tested; the message names the file and the remedy."""


def ledger(
    tables: str | Path, notebooks: str | Path, dataset: str, published: str | Path = PUBLISHED
) -> pd.DataFrame:
    """Every claim of the papers with all lines that the notebooks wrote on it, and its verdict by `OVERALL`.

    The notebooks that write verdicts are those that save a table "...-verdicts". The cells of a line are those of its
    notebook whose code names the claim.

    Args:
        tables: folder of the tables of verdicts, as `table` makes and `wsss.tables.save` writes them.
        notebooks: folder of the notebooks, NN_*.ipynb.
        dataset: identity of the data that the verdicts are on.
        published: folder of claims.csv.

    Returns:
        One row a line, in the order of claims.csv and of the notebooks: paper, claim_id, claim, verdict (of the claim,
        the same in all of its lines), of this line, effect, 95 % interval, seeds, data set ("" where nothing was
        tested), notebook (its file name), cells (their numbers, as in In [5]) and note; all text.

    Raises:
        LedgerError: no notebook saves such tables, or two save the same; a table is missing, has no notebook, lacks a
            column, has an unknown claim or verdict, or a claim that its notebook does not name in a cell; or a claim
            has no line.
    """
    listed = _all_claims(Path(published))[["paper", "claim_id", "claim"]]
    written = _writers(Path(notebooks))
    for path in sorted(Path(tables).glob("*-verdicts.csv")):
        if path.stem not in written:
            raise LedgerError(f"{path}: no notebook in {notebooks} saves this table; delete it")
    lines = pd.concat(_lines(Path(tables) / f"{name}.csv", path, listed["claim_id"]) for name, path in written.items())

    lines["tested"] = lines["verdict"] != NOT_TESTABLE
    anywhere = lines.groupby("claim_id")["tested"].transform("any")
    here = lines.groupby(["claim_id", "notebook"])["tested"].transform("any")
    lines = lines[here | ~anywhere]
    without = [claim for claim in listed["claim_id"] if claim not in set(lines["claim_id"])]
    if without:
        raise LedgerError(
            f"{tables}: no line on {', '.join(without)}; let a notebook test them, or say with claims.not_testable why "
            "it cannot"
        )
    lines = listed.merge(lines.rename(columns={"verdict": "of this line"}), on="claim_id", how="left", sort=False)
    lines["verdict"] = lines.groupby("claim_id")["of this line"].transform(overall)
    lines["data set"] = ["" if verdict == NOT_TESTABLE else dataset for verdict in lines["of this line"]]
    first = ["paper", "claim_id", "claim", "verdict", "of this line", "effect", "95 % interval", "seeds", "data set"]
    return lines[[*first, "notebook", "cells", "note"]]


def overall(verdicts: Iterable[str]) -> str:
    """The verdict on a claim from those of its lines, see `OVERALL`; "inconclusive (n = 1)" is "inconclusive"."""
    found = {verdict.partition(" (n = ")[0] for verdict in verdicts}
    if NOT_SUPPORTED in found:
        return NOT_SUPPORTED
    return found.pop() if len(found) == 1 else INCONCLUSIVE


def _writers(folder: Path) -> dict[str, Path]:
    """The tables of verdicts that notebooks save, and the notebook of each."""
    writers = {}
    for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")):
        for name in re.findall(r"save\(.*?[\"']([a-z0-9-]+-verdicts)[\"']", "\n".join(_code(path))):
            if name in writers:
                raise LedgerError(f"{path}: {writers[name].name} saves a table {name}, too; give one another name")
            writers[name] = path
    if not writers:
        raise LedgerError(f'{folder}: no notebook saves a table "...-verdicts"; read another folder')
    return writers


def _code(notebook: Path) -> list[str]:
    """The sources of the code cells; the first is In [1]."""
    return [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]


def _lines(path: Path, notebook: Path, known: pd.Series) -> pd.DataFrame:
    """A table of verdicts, checked, with the notebook and the cells that its claims are named in."""
    number = notebook.stem[:2]
    if not path.exists():
        raise LedgerError(
            f"{path}: there is no such table, which {notebook.name} saves; run `wsss reproduce --notebooks {number}`, "
            "or read another folder"
        )
    lines = pd.read_csv(path, dtype=str, keep_default_na=False)
    missing = [column for column in LINE if column not in lines.columns]
    if missing:
        raise LedgerError(f"{path}: no column {', '.join(missing)}; run `wsss reproduce --notebooks {number}` anew")
    code, cells = _code(notebook), {}
    for row, line in enumerate(lines.itertuples(index=False), start=2):
        if line.claim_id not in set(known):
            raise LedgerError(f"{path}, line {row}: claims.csv has no claim {line.claim_id!r}; correct {notebook.name}")
        if not VERDICTS.fullmatch(line.verdict):
            words = ", ".join((SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE, NOT_TESTABLE))
            raise LedgerError(f"{path}, line {row}: unknown verdict {line.verdict!r}; write one of: {words}")
        naming = [cell for cell, source in enumerate(code, start=1) if re.search(rf"{line.claim_id}\b", source)]
        if not naming:
            raise LedgerError(
                f"{path}, line {row}: no code cell of {notebook.name} names {line.claim_id}; write the id where it is "
                "tested"
            )
        cells[line.claim_id] = ", ".join(map(str, naming))
    return lines[LINE].assign(notebook=notebook.name, cells=lines["claim_id"].map(cells))
