"""RAD: whom to ask when some answers are worthless (Baykal et al., arXiv 2210.01213). Pure numpy.

A choice gives row i the probability q_i and wins sum q_i g_i of gains g >= 0. An adversary then
voids the m rows that hurt most: the rows on which the teacher is wrong. The value of q is what is
left; RAD takes the q whose value is largest. Among the rows it takes, the ones with more gain get
*less* probability.
"""

from __future__ import annotations

import numpy as np

from llmkd.errors import DataError, RecipeError

DEFAULT_MISTAKES = 0.1  # share of the pool; ours, measured by nobody
NOTHING = 1e-12  # gains up to here count as 0, so that 1 / g stays a number


def mistakes(setting: float | None, rows: int, held_out_error: float | None = None) -> int:
    """m, the number of rows in a pool of `rows` on which the teacher is wrong.

    `setting` is a share of the pool below 1 and a count from 1 on. Without it the teacher's error
    on held-out rows (a share; the paper measures it on 1,000) counts, and without that
    DEFAULT_MISTAKES. RecipeError where that is the whole pool or no such number.
    """
    given = setting if setting is not None else held_out_error
    given = DEFAULT_MISTAKES if given is None else given
    shares = setting is None or given < 1
    if not 0 <= given < np.inf or (shares and given > 1) or (not shares and given % 1):
        raise RecipeError.of(
            "selection_rad_mistakes", given, "must be a share in [0, 1) or a whole number of rows"
        )
    count = round(given * rows) if shares else int(given)
    if count >= rows:
        raise RecipeError.of(
            "selection_rad_mistakes",
            given,
            f"leaves no row of {rows} on which the teacher is right",
            "a share below 1, or a smaller count",
        )
    return count


def one_row(gains: np.ndarray, m: int) -> np.ndarray:
    """q [rows]: the best probabilities for one draw, in closed form.

    Gains in descending order: I* = argmax_{I > m} (I - m) / sum_{i <= I} 1/g_i, then
    q_i = (1/g_i) / sum_{j <= I*} 1/g_j for i <= I*, else 0. Uniform where the adversary can void
    every row that has a gain: nothing can be won then.
    """
    order, sorted_gains = _descending(gains, m)
    q = np.zeros(len(gains))
    if len(sorted_gains) <= m:
        return np.full(len(gains), 1 / len(gains))
    inverse = 1.0 / sorted_gains
    left = np.arange(1, len(inverse) + 1) - m
    last = int(np.argmax(left / np.cumsum(inverse))) + 1  # left <= 0 never is the largest
    q[order[:last]] = inverse[:last] / inverse[:last].sum()
    return q


def value(q: np.ndarray, gains: np.ndarray, m: int) -> float:
    """What q wins after the adversary voided the m largest of q_i g_i."""
    won = np.sort(np.asarray(q) * np.asarray(gains))
    return float(won[: len(won) - m].sum())


def marginals(gains: np.ndarray, m: int, batch: int) -> np.ndarray:
    """Probability of each row [rows], at most 1, to be in a batch of `batch` rows; their sum.

    `batch * one_row(gains, m)` where that stays below 1. Beyond, a row cannot be taken more than
    once, and what is over goes to further rows so that the value is the largest possible under the
    cap [ours; equal to a linear program's]: value = max_t (sum_i min(pi_i g_i, t) - m t), and for
    a given t the budget is best spent in descending order of gain, up to min(1, t / g_i) each.
    Concave in t, so that a golden-section search finds t. Rows without a gain come last, alike;
    all rows are alike where the adversary can void every row that has a gain.
    """
    rows = len(gains)
    if not 0 <= batch <= rows:
        raise DataError.of("selection", f"{batch} rows", f"there are only {rows}")
    order, sorted_gains = _descending(gains, m)
    if batch == 0 or len(sorted_gains) <= m:
        return np.full(rows, batch / rows)
    odds = np.zeros(rows)
    level = _best_level(sorted_gains, m, min(batch, len(sorted_gains)))
    odds[order[: len(sorted_gains)]] = _spend(sorted_gains, level, batch)
    rest = batch - odds.sum()
    if rest > 0 and len(sorted_gains) < rows:
        odds[order[len(sorted_gains) :]] += rest / (rows - len(sorted_gains))
    return odds


def dep_round(odds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows [batch], ascending: exactly round(sum of odds) of them, row i with probability odds_i.

    Dependent rounding (Gandhi et al. 2006): two undecided rows pass probability between them until
    one is decided, by a coin that keeps both expectations; neighbours are paired at random. Raises
    ValueError for odds outside [0, 1] or whose sum is not whole.
    """
    left = np.asarray(odds, dtype=np.float64)
    batch = round(float(left.sum()))
    if left.size and (left.min() < -1e-9 or left.max() > 1 + 1e-9):
        raise ValueError("probabilities must lie in [0, 1]")
    if abs(left.sum() - batch) > 1e-6:
        raise ValueError(f"probabilities sum to {left.sum()}, which is no whole number")
    chosen = left >= 1 - 1e-12
    open_rows = rng.permutation(np.flatnonzero((left > 1e-12) & ~chosen))
    coins = rng.random(len(open_rows))
    mine, held = -1, 0.0  # the one row that is undecided, and its probability
    for row, coin in zip(open_rows.tolist(), coins.tolist(), strict=True):
        other = float(left[row])
        if mine < 0:
            mine, held = row, other
            continue
        total = held + other
        if total < 1:  # one of the two goes out, the other holds both shares
            mine, held = (mine if coin * total < held else row), total
        else:  # one of the two comes in, the other holds what is over
            wins = coin * (2 - total) < 1 - other
            chosen[mine if wins else row] = True
            mine, held = (row if wins else mine), total - 1
            if held <= 1e-12:
                mine = -1
    if mine >= 0 and chosen.sum() < batch:  # the sum is whole: what is left is 0 or 1 but for noise
        chosen[mine] = True
    return np.flatnonzero(chosen)


def _descending(gains: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows by descending gain, and the gains above 0 in that order. DataError for a bad gain."""
    gains = np.asarray(gains, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(gains) | (gains < 0))
    if len(bad):
        raise DataError.of(
            "selection", float(gains[bad[0]]), f"is the gain of row {bad[0]}; it must be >= 0"
        )
    if not 0 <= m < len(gains):
        raise RecipeError.of(
            "selection_rad_mistakes", m, f"must be at least 0 and below the {len(gains)} rows"
        )
    order = np.argsort(-gains, kind="stable")
    return order, gains[order][: int((gains > NOTHING).sum())]


def _best_level(gains: np.ndarray, m: int, batch: int) -> float:
    """The t in [0, g_1] with the largest value (see `marginals`); each try costs O(log rows)."""
    inverse = np.concatenate([[0.0], np.cumsum(1.0 / gains)])  # of the first k rows, k = 0..n
    sums = np.concatenate([[0.0], np.cumsum(gains)])
    ascending, n = gains[::-1], len(gains)

    def won(t: float) -> float:
        capped = n - int(np.searchsorted(ascending, t, side="right"))  # rows with a gain above t
        if t * inverse[capped] >= batch:
            full = int(np.searchsorted(inverse[: capped + 1], batch / t, side="right")) - 1
            got, spent = t * full, t * inverse[full]
        else:
            full = min(n, capped + int(batch - t * inverse[capped]))
            got = t * capped + sums[full] - sums[capped]
            spent = t * inverse[capped] + full - capped
        part = gains[full] * max(0.0, batch - spent) if full < n else 0.0
        return got + part - m * t

    low, high, golden = 0.0, float(gains[0]), (5**0.5 - 1) / 2
    one, two = high - golden * (high - low), low + golden * (high - low)
    at_one, at_two = won(one), won(two)
    while high - low > 1e-15 * gains[0]:
        if at_one >= at_two:
            high, two, at_two = two, one, at_one
            one = high - golden * (high - low)
            if not low < one < two:
                break
            at_one = won(one)
        else:
            low, one, at_one = one, two, at_two
            two = low + golden * (high - low)
            if not one < two < high:
                break
            at_two = won(two)
    return max((low, one, two, high, float(gains[0])), key=won)


def _spend(gains: np.ndarray, level: float, batch: int) -> np.ndarray:
    """Probabilities of rows in descending order of gain: up to min(1, level / g) each till the
    batch is full; if it is not full at the end, the level rises for all.
    """
    most = np.minimum(1.0, level / gains)
    if batch >= len(gains):
        return np.ones(len(gains))
    if most.sum() < batch - 1e-9:
        low, high = level, float(gains[0])
        for _ in range(100):
            level = (low + high) / 2
            low, high = (level, high) if (level / gains).clip(max=1).sum() < batch else (low, level)
        return np.minimum(1.0, high / gains)
    before = np.concatenate([[0.0], np.cumsum(most)[:-1]])
    odds = np.clip(batch - before, 0.0, most)
    odds[odds < 1e-9] = 0.0  # the search's own noise
    return odds
