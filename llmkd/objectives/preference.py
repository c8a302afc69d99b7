"""Losses on pairs of responses: how far the policy's log-ratio lies from a preference.

`delta_N` is log(pi(y1)/ref(y1)) - log(pi(y2)/ref(y2)) in nats, token *sums* over the completions;
`logit_N` is the logit that response 1 is preferred to response 2, signed: 1 need not be the winner.
Reading beta * log(pi/ref) as a reward (DPO, arXiv 2305.18290), Bradley-Terry says
logit P(1 is preferred) = beta * delta, and every loss here is a distance between the two sides.

Writing D and L for one pair: swapping its responses and negating L changes no loss and no metric.
`total` is a sum over pairs and `count` the pairs. Metrics, the same for all losses:
`accuracy` (sign(D) = sign(L); a tie on either side counts half), `margin` (beta * D towards the
preferred response, nats), `target` (|L|, nats, after `max_logit`) and `squared_error`
((beta * D - L)^2). Margin and target are turned towards the preferred response because pairs come
in either order, so that their plain sums would say nothing.

Losses differ in scale: at the same learning rate a square with gradient 2 beta (beta D - L) moves
1/beta^2 times less than one with 2 (D - L/beta). AdamW forgives that, SGD and clipping do not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkd.errors import RecipeError
from llmkd.objectives.registry import near_names
from llmkd.objectives.targets import wide
from llmkd.types import LossTerm

PairLoss = Callable[..., LossTerm]


@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    """A loss `function(delta_N, logit_N, *, beta, **options) -> LossTerm` and what it needs.

    `options`: the keywords it takes beside beta. `wants_soft`: whether it reads the size of the
    logit or only its sign. `about`: one line for people.
    """

    name: str
    function: PairLoss
    options: tuple[str, ...]
    wants_soft: bool
    about: str


PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {}


def preference_loss(*, wants_soft: bool, about: str) -> Callable[[PairLoss], PairLoss]:
    """Enter a loss in the table under the name of its function."""

    def enter(function: PairLoss) -> PairLoss:
        name = function.__name__
        if name in PREFERENCE_LOSSES:
            raise ValueError(f"a preference loss named {name!r} exists already")
        keywords = inspect.signature(function).parameters.values()
        options = tuple(p.name for p in keywords if p.kind is p.KEYWORD_ONLY and p.name != "beta")
        PREFERENCE_LOSSES[name] = PreferenceLoss(name, function, options, wants_soft, about)
        return function

    return enter


def find_preference_loss(name: str) -> PreferenceLoss:
    """The loss called `name`; RecipeError with the nearest name where there is none."""
    if name in PREFERENCE_LOSSES:
        return PREFERENCE_LOSSES[name]
    problem = "there is no such preference loss"
    raise RecipeError.of("loss", name, problem, *near_names(name, PREFERENCE_LOSSES))


@preference_loss(wants_soft=True, about="square between beta * log-ratio and preference logit")
def irepo(
    delta_N: Tensor,
    logit_N: Tensor,
    *,
    beta: float,
    huber: float | None = None,
    max_logit: float | None = None,
) -> LossTerm:
    """(beta D - L)^2, squared nats (iREPO, arXiv 2405.15230; the place of beta is ours).

    The gradient is beta^2 times that of `rebel`. `huber`: beyond that many nats the square goes on
    as a straight line, 2 huber |r| - huber^2. `max_logit`: L is clamped to +-max_logit before.
    """
    delta_N, logit_N = _ready(delta_N, logit_N, beta, max_logit)
    return _term(_square(beta * delta_N - logit_N, huber), delta_N, logit_N, beta)


@preference_loss(wants_soft=True, about="irepo, each pair weighted 4p(1-p) by how open it is")
def irepo_weighted(
    delta_N: Tensor,
    logit_N: Tensor,
    *,
    beta: float,
    huber: float | None = None,
    max_logit: float | None = None,
) -> LossTerm:
    """4 p (1 - p) (beta D - L)^2 with p = sigma(L): weight 1 at a tie, 0 where all is certain.

    Up to a factor the inverse variance of a vote logit, and 8 times what `soft_dpo` is to second
    order around its minimum. Options as in `irepo`.
    """
    delta_N, logit_N = _ready(delta_N, logit_N, beta, max_logit)
    weight_N = 4.0 * torch.sigmoid(logit_N) * torch.sigmoid(-logit_N)
    residual_N = torch.where(weight_N > 0, beta * delta_N - logit_N, 0.0)  # 0 * inf is no number
    return _term(weight_N * _square(residual_N, huber), delta_N, logit_N, beta)


@preference_loss(wants_soft=True, about="cross-entropy between sigma(logit) and the policy")
def soft_dpo(
    delta_N: Tensor, logit_N: Tensor, *, beta: float, max_logit: float | None = None
) -> LossTerm:
    """-p log sigma(beta D) - (1 - p) log sigma(-beta D) with p = sigma(L), nats.

    The same minimiser as `irepo` where every L is attainable; there the second derivative by
    beta D is p (1 - p), so that near it this is irepo times p (1 - p) / 2.
    """
    delta_N, logit_N = _ready(delta_N, logit_N, beta, max_logit)
    p_N, other_N = torch.sigmoid(logit_N), torch.sigmoid(-logit_N)
    return _term(_cross_entropy(beta * delta_N, p_N, other_N), delta_N, logit_N, beta)


@preference_loss(wants_soft=False, about="cross-entropy to the majority's winner")
def dpo(delta_N: Tensor, logit_N: Tensor, *, beta: float) -> LossTerm:
    """-log sigma(sign(L) beta D), nats (arXiv 2305.18290): only who won counts, not how clearly.

    A tie (L = 0) is half a win for each.
    """
    delta_N, logit_N = _ready(delta_N, logit_N, beta)
    p_N = _majority(logit_N)
    return _term(_cross_entropy(beta * delta_N, p_N, 1.0 - p_N), delta_N, logit_N, beta)


@preference_loss(wants_soft=False, about="square to a fixed gap 1 / (2 beta) for the winner")
def ipo(delta_N: Tensor, logit_N: Tensor, *, beta: float, huber: float | None = None) -> LossTerm:
    """(D - sign(L) / (2 beta))^2, squared nats; beta is the paper's tau (arXiv 2310.12036, eq. 17).

    TRL divides D by the tokens of each completion first; here sums stay sums. `irepo` with one
    vote clipped to [eps, 1 - eps] has beta'^2 times this gradient at
    1 / (2 beta) = logit(1 - eps) / beta'. A tie has the target 0. `huber` as in `irepo`, on nats
    of D.
    """
    delta_N, logit_N = _ready(delta_N, logit_N, beta)
    residual_N = delta_N - torch.sign(logit_N) / (2.0 * beta)
    return _term(_square(residual_N, huber), delta_N, logit_N, beta)


@preference_loss(wants_soft=True, about="square between log-ratio and reward gap / beta")
def rebel(
    delta_N: Tensor,
    logit_N: Tensor,
    *,
    beta: float,
    huber: float | None = None,
    max_logit: float | None = None,
) -> LossTerm:
    """(D - L / beta)^2, squared nats: REBEL (arXiv 2404.16767) with eta = 1 / beta, L the gap.

    irepo / beta^2: the same minimiser, a gradient 1 / beta^2 times as large. `huber` as in `irepo`,
    on nats of D: huber / beta here is huber there.
    """
    delta_N, logit_N = _ready(delta_N, logit_N, beta, max_logit)
    return _term(_square(delta_N - logit_N / beta, huber), delta_N, logit_N, beta)


@preference_loss(wants_soft=False, about="dpo, unbiased where labels flip at a known rate")
def robust_dpo(delta_N: Tensor, logit_N: Tensor, *, beta: float, flip_rate: float) -> LossTerm:
    """[(1 - e) l(z) - e l(-z)] / (1 - 2 e), nats, with z = sign(L) beta D, l = -log sigma, e the
    flip rate (arXiv 2403.00409): its mean over flipped labels is dpo's loss on clean ones.

    Not bounded below for e > 0. A tie is half a win for each. RecipeError for a flip rate outside
    [0, 1/2).
    """
    check_flip_rate(flip_rate)
    delta_N, logit_N = _ready(delta_N, logit_N, beta)
    p_N = (_majority(logit_N) - flip_rate) / (1.0 - 2.0 * flip_rate)  # outside [0, 1] on purpose
    return _term(_cross_entropy(beta * delta_N, p_N, 1.0 - p_N), delta_N, logit_N, beta)


def check_flip_rate(flip_rate: float) -> None:
    """RecipeError unless 0 <= flip_rate < 1/2: at 1/2 a label says nothing."""
    if not 0.0 <= flip_rate < 0.5:
        raise RecipeError.of("flip_rate", flip_rate, "must lie in [0, 0.5)", "default: 0")


def check_positive(key: str, value: float | None) -> None:
    """RecipeError unless the value is None or a number > 0."""
    if value is not None and not value > 0.0:
        raise RecipeError.of(key, value, "must be > 0")


def _ready(
    delta_N: Tensor, logit_N: Tensor, beta: float, max_logit: float | None = None
) -> tuple[Tensor, Tensor]:
    """Both in float32 or float64, whichever delta allows; the logit clamped and without history."""
    check_positive("beta", beta)
    check_positive("max_logit", max_logit)
    if delta_N.shape != logit_N.shape:  # [N] and [N, 1] would be broadcast to N^2 pairs
        shapes = tuple(delta_N.shape), tuple(logit_N.shape)
        raise ValueError("delta is {}, the logit {}".format(*shapes))
    delta_N = wide(delta_N)
    logit_N = logit_N.detach().to(delta_N.dtype)
    if max_logit is not None:
        logit_N = logit_N.clamp(-max_logit, max_logit)
    return delta_N, logit_N


def _majority(logit_N: Tensor) -> Tensor:
    return 0.5 + 0.5 * torch.sign(logit_N)


def _cross_entropy(z_N: Tensor, p_N: Tensor, other_N: Tensor) -> Tensor:
    """-p log sigma(z) - other log sigma(-z); `other` is 1 - p, to all its digits."""
    return -p_N * F.logsigmoid(z_N) - other_N * F.logsigmoid(-z_N)


def _square(residual_N: Tensor, huber: float | None) -> Tensor:
    """r^2; beyond huber 2 huber |r| - huber^2, so written that a large r is never squared."""
    check_positive("huber", huber)
    if huber is None:
        return residual_N.square()
    size_N = residual_N.abs()
    near_N = size_N.clamp(max=huber)
    return near_N * (2.0 * size_N - near_N)


def _term(loss_N: Tensor, delta_N: Tensor, logit_N: Tensor, beta: float) -> LossTerm:
    delta_N, winner_N = delta_N.detach(), torch.sign(logit_N)
    sums = {
        "accuracy": 0.5 + 0.5 * winner_N * torch.sign(delta_N),
        "margin": beta * delta_N * winner_N,
        "target": logit_N.abs(),
        "squared_error": (beta * delta_N - logit_N).square(),
    }
    count = torch.tensor(loss_N.numel(), device=loss_N.device)
    return LossTerm(loss_N.sum(), count, {name: each_N.sum() for name, each_N in sums.items()})
