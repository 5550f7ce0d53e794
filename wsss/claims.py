"""From claims to verdicts, by one rule that was fixed before the runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path

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
        varied = [c for c in rows.columns if c not in ("seed", "value") and rows[c].nunique() > 1]
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
    supported = lambda n: stats.nct.sf(stats.t.ppf(0.975, n - 1), n - 1, effect * math.sqrt(n) / spread)
    return next(n for n in count(SEEDS_NEEDED) if supported(n) >= power)


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
