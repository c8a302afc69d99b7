"""How far a student q lies from a soft label p: row forms, then one objective for each.

A row form takes `(log_p, log_q)` [N, M] in nats over the same events and gives [N] nats. It is the
definition; `fused.py` differentiates it by formula where it pays, by autograd elsewhere. A new
divergence is one function with `@divergence(name)` and one test with a value worked by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmkd.errors import RecipeError
from llmkd.objectives.registry import OBJECTIVES, near_names
from llmkd.objectives.targets import chosen_rows, covers_shared, log_events
from llmkd.types import LossTerm, Target

RowForm = Callable[..., Tensor]
ALMOST_NEVER = -1e30  # a logarithm whose exponential is 0 and which arithmetic survives


@dataclass(frozen=True, slots=True)
class Divergence:
    """A row form and what it needs.

    `everywhere`: p must be nowhere 0, else it is infinite; always (True), never, or at one value of
    one option, such as ("beta", 1.0). `options`: the settings it takes.
    """

    name: str
    rows: RowForm
    everywhere: bool | tuple[str, float]
    options: tuple[str, ...]

    @property
    def metric(self) -> str:
        """The name its sum is logged under."""
        return "kl" if self.name == "forward_kl" else self.name

    def __call__(
        self,
        student_BTV: Tensor,
        target: Target,
        mask_BT: Tensor,
        *,
        weights_BT: Tensor | None = None,
        teacher_temperature: float = 1.0,
        student_temperature: float = 1.0,
        t2_scale: bool = False,
        **options: float,
    ) -> LossTerm:
        """Sum in nats over the masked-in positions, each times its weight where given.

        Both sides have a temperature of their own; `t2_scale` multiplies by
        student_temperature**2, which gives the gradient back the size it has at temperature 1
        (Hinton et al. 2015, arXiv 1503.02531, section 2). The teacher speaks over its `shared`
        leading entries. The student's distribution runs over its whole head, so that its padding
        is pushed down; where the divergence would then be infinite (reverse_kl, jeffreys, js with
        beta 1, skew_reverse_kl with skew 0) both are conditioned on the shared entries.

        The one metric is the plain sum, without weights and T**2. Raises RecipeError (see `check`).
        """
        rows_N = chosen_rows(mask_BT)
        student_NV = student_BTV.reshape(-1, student_BTV.shape[-1]).index_select(0, rows_N)
        value_N = self.of_rows(
            student_NV,
            target.take(rows_N),
            teacher_temperature=teacher_temperature,
            student_temperature=student_temperature,
            **options,
        )
        plain = value_N.detach().sum()
        if weights_BT is not None:
            value_N = value_N * weights_BT.reshape(-1).index_select(0, rows_N)
        total = value_N.sum() * (student_temperature**2 if t2_scale else 1.0)
        return LossTerm(total, mask_BT.sum(), {self.metric: plain})

    def of_rows(
        self,
        student_NV: Tensor,
        target_N: Target,
        *,
        teacher_temperature: float = 1.0,
        student_temperature: float = 1.0,
        **options: float,
    ) -> Tensor:
        """[N] nats without T**2, of rows that were chosen already."""
        self.check(target_N, options)
        log_p, log_q = log_events(
            student_NV,
            target_N,
            teacher_temperature=teacher_temperature,
            student_temperature=student_temperature,
            shared_only=self.needs_everywhere(options),
        )
        return self.rows(log_p, log_q, **options)

    def needs_everywhere(self, options: dict[str, Any]) -> bool:
        """Whether it is infinite, under these options, where the label gives no probability."""
        if isinstance(self.everywhere, bool):
            return self.everywhere
        key, value = self.everywhere
        return options.get(key) == value

    def check(self, target: Target, options: dict[str, Any] | None = None) -> None:
        """RecipeError for a setting it does not know and for a label it is infinite on."""
        options = options or {}
        for key, value in options.items():
            if key not in self.options:
                raise RecipeError.of(key, value, f"is no setting of {self.name}")
            if not 0.0 <= value <= 1.0:
                raise RecipeError.of(key, value, "must lie in [0, 1]")
            if key == "skew" and value == 1.0:
                raise RecipeError.of(key, value, "compares a distribution with itself: always 0")
        if self.needs_everywhere(options) and not covers_shared(target):
            settings = ", ".join(f"{key}={value}" for key, value in options.items())
            raise RecipeError.of(
                "divergence",
                f"{self.name} {settings}".strip(),
                "is infinite on labels that give most tokens no probability (tail renorm, draws)",
                "a top k with label_tail bucket or smooth",
                "forward_kl, tvd or js with beta below 1",
            )


DIVERGENCES: dict[str, Divergence] = {}


def divergence(
    name: str,
    *,
    everywhere: bool | tuple[str, float] = False,
    options: tuple[str, ...] = (),
) -> Callable[[RowForm], Divergence]:
    """Enter a row form under `name`, as a divergence and as an objective."""

    def enter(rows: RowForm) -> Divergence:
        if name in OBJECTIVES:
            raise ValueError(f"an objective named {name!r} exists already")
        DIVERGENCES[name] = OBJECTIVES[name] = Divergence(name, rows, everywhere, options)
        return DIVERGENCES[name]

    return enter


def find_divergence(name: str) -> Divergence:
    """The divergence called `name`; RecipeError with the nearest name where there is none."""
    if name in DIVERGENCES:
        return DIVERGENCES[name]
    raise RecipeError.of(
        "divergence", name, "there is no such divergence", *near_names(name, DIVERGENCES)
    )


def _mean_log(log_a: Tensor, log_b: Tensor, share_a: float) -> Tensor:
    """log(share_a * a + (1 - share_a) * b). Two -inf would make logaddexp's gradient NaN."""
    log_a, log_b = log_a.clamp_min(ALMOST_NEVER), log_b.clamp_min(ALMOST_NEVER)
    return torch.logaddexp(log_a + math.log(share_a), log_b + math.log1p(-share_a))


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Sum of a (log a - log b); where a is 0 the product is 0, whatever the logarithms.

    The choice is made before the product: after it 0 * inf would make the gradient NaN.
    """
    a = log_a.exp()
    return (a * torch.where(a > 0, log_a - log_b, 0.0)).sum(-1)


@divergence("forward_kl")
def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(teacher || student) in nats; Hinton et al. 2015."""
    return _kl(log_p, log_q)


@divergence("soft_cross_entropy")
def soft_cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """-sum p log q in nats: `forward_kl` plus the teacher's entropy, equal in its gradient."""
    p = log_p.exp()
    return -(p * torch.where(p > 0, log_q, 0.0)).sum(-1)


@divergence("reverse_kl", everywhere=True)
def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(student || teacher) in nats; MiniLLM, arXiv 2306.08543 (its token form)."""
    return _kl(log_q, log_p)


@divergence("jeffreys", everywhere=True)
def jeffreys(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) + KL(q || p) in nats. PaddleClas (SSLD) calls half of it "JS"."""
    return _kl(log_p, log_q) + _kl(log_q, log_p)


@divergence("js", everywhere=("beta", 1.0), options=("beta",))
def js(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, in nats; at most ln 2.

    Generalised Jensen-Shannon of GKD, arXiv 2306.13649. As in TRL, beta = 0 is `forward_kl` and
    beta = 1 is KL(q || p) (infinite where p is 0), the limits after division by beta or 1 - beta.
    """
    if beta in (0.0, 1.0):
        return _kl(log_p, log_q) if beta == 0.0 else _kl(log_q, log_p)
    log_m = _mean_log(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1.0 - beta) * _kl(log_q, log_m)


@divergence("skew_kl", options=("skew",))
def skew_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """KL(p || skew p + (1 - skew) q) in nats; DistiLLM, arXiv 2402.03898. skew 0 is forward_kl."""
    return _kl(log_p, log_q if skew == 0.0 else _skewed(log_p, log_q, skew))


@divergence("skew_reverse_kl", everywhere=("skew", 0.0), options=("skew",))
def skew_reverse_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """KL(q || skew q + (1 - skew) p) in nats; DistiLLM, arXiv 2402.03898. skew 0 is reverse_kl."""
    return _kl(log_q, log_p if skew == 0.0 else _skewed(log_q, log_p, skew))


def _skewed(log_a: Tensor, log_b: Tensor, skew: float) -> Tensor:
    return log_a if skew == 1.0 else _mean_log(log_a, log_b, skew)


@divergence("tvd")
def tvd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Total variation, half the sum of |p - q|: no unit (not nats), at most 1.

    Differences within rounding (64 eps, relative) count as none: |x| has a kink at 0, and a student
    that matches its label would be pushed about by the signs of rounding errors.
    """
    p, q = log_p.exp(), log_q.exp()
    apart = (p - q).abs() > 64 * torch.finfo(p.dtype).eps * p
    return 0.5 * torch.where(apart, p - q, 0.0).abs().sum(-1)
