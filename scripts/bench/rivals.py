"""Public distillation losses of other libraries, and ours, behind one call.

No rival is a dependency: each is imported when asked for, and `INSTALL` holds the line that gets
it. An adaptor only renames arguments and reshapes tensors. It uses the best public option there is
(for instance a sum and the caller's own division where a mean would be wrong) and refuses, with
`NotOffered`, what the public call has no argument for.

Letters: B sequences, T positions, V student entries, Vt teacher entries, Hs and Ht hidden sizes.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any, Literal

from torch import Tensor

from llmkd.objectives import OBJECTIVES, normalise
from llmkd.objectives.divergences import Divergence
from llmkd.objectives.fused import FusedLinearKD
from llmkd.types import DenseLogits, Head, HiddenTarget, LossTerm

IGNORE = -100
INSTALL = {
    "TRL GKD": "pip install trl==1.16.0",
    "TRL chunked": "pip install trl==1.16.0",
    "Liger": "pip install --no-deps liger-kernel==0.8.5",
    "torchtune": "pip install --no-deps torchtune==0.6.1 torchao==0.13.0 && pip install omegaconf"
    " antlr4-python3-runtime==4.9.3 sentencepiece tiktoken blobfile kagglehub",
    "torchtune chunked": "as torchtune",
    "orda": "pip install --no-deps orda-kernel==0.1.0",
    "TextBrewer": "pip install --no-deps textbrewer==0.2.1.post1 tensorboard",
    "DistillKit": "not on PyPI: a checkout of github.com/arcee-ai/DistillKit as --distillkit PATH",
}


class NotOffered(Exception):
    """The public call has no argument for what was asked."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One question's tensors and settings.

    `student` is [B, T, V] logits or [B, T, Hs] hidden states with `student_weight` [V, Hs]; the
    teacher likewise. `labels` int64 [B, T] lie on the position that predicts them, -100 is masked.
    `tokens` is what the sum is divided by (None: the positions counted here), `kd_weight` w of
    (1 - w) CE + w KD, `t2` whether T**2 multiplies the divergence (None: as the call does it).
    """

    student: Tensor
    teacher: Tensor
    labels: Tensor
    student_weight: Tensor | None = None
    teacher_weight: Tensor | None = None
    divergence: Literal["forward_kl", "js"] = "forward_kl"
    temperature: float = 1.0
    kd_weight: float = 1.0
    tokens: int | None = None
    token_weights: Tensor | None = None
    t2: bool | None = None

    @property
    def mask(self) -> Tensor:
        """True where a position counts, [B, T]."""
        return self.labels != IGNORE

    def heads(self) -> tuple[Tensor, Tensor]:
        """Both heads' weights; only for peers that take hidden states."""
        assert self.student_weight is not None and self.teacher_weight is not None
        return self.student_weight, self.teacher_weight


@dataclass(frozen=True)
class Answer:
    """A scalar loss in nats and, where the call reports it, the KL per counted position."""

    loss: Tensor
    kl: float | None = None


@dataclass(frozen=True)
class Peer:
    """One public loss. `offers` names what its arguments allow; `documents` are the objects whose
    docstrings a user would read, `ours` marks llmkd's own.
    """

    name: str
    takes: Literal["logits", "head"]
    call: Callable[[Case], Answer]
    offers: frozenset[str]
    documents: tuple[object, ...]
    package: str
    divergence: Literal["forward_kl", "js"] = "forward_kl"
    ours: bool = False

    def __call__(self, case: Case) -> Answer:
        """The loss; NotOffered where `case` asks for more than the call has arguments for."""
        wanted = {
            "mask": not bool(case.mask.all()),
            "temperature": case.temperature != 1.0,
            "mix": case.kd_weight != 1.0,
            "tokens": case.tokens is not None,
            "weights": case.token_weights is not None,
            "t2": case.t2 is not None,
            case.divergence: True,
        }
        for name, asked in wanted.items():
            if asked and name not in self.offers:
                raise NotOffered(name)
        return self.call(case)

    @property
    def version(self) -> str:
        """Installed version, or "source" where it runs from a path."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return "source"


def offered(function: Callable[..., Any], always: str, **needs: str) -> frozenset[str]:
    """`always` (words), and each of `needs` whose parameter is in the function's signature."""
    names = inspect.signature(function).parameters
    return frozenset(always.split()) | {key for key, name in needs.items() if name in names}


def flat(values: Tensor) -> Tensor:
    """Leading two dimensions made one."""
    return values.reshape(-1, *values.shape[2:])


def beta_of(case: Case) -> float:
    """GKD's beta for the case's divergence."""
    return 0.0 if case.divergence == "forward_kl" else 0.5


def trl_gkd() -> Peer:
    """TRL's dense loss of the experimental GKDTrainer."""
    from trl.experimental.gkd import GKDTrainer

    function = GKDTrainer.generalized_jsd_loss

    def call(case: Case) -> Answer:
        shared = {"labels": case.labels, "beta": beta_of(case), "temperature": case.temperature}
        pair = (case.student, case.teacher)
        if case.token_weights is None:
            return Answer(function(*pair, **shared, num_items_in_batch=case.tokens))
        rows = function(*pair, **shared, reduction="none").sum(-1)  # counted positions only
        return Answer((rows * case.token_weights[case.mask]).sum() / max(len(rows), 1))

    needs = {
        "mask": "labels",
        "js": "beta",
        "tokens": "num_items_in_batch",
        "weights": "reduction",
        "temperature": "temperature",
    }
    offers = offered(function, "forward_kl", **needs)
    return Peer("TRL GKD", "logits", call, offers, (function,), "trl")


def trl_chunked() -> Peer:
    """The loss head of TRL's stable DistillationTrainer; private by name, all the trainer has."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss as function

    def call(case: Case) -> Answer:
        loss, _, _ = function(
            case.student,
            case.teacher,
            *case.heads(),
            case.mask,
            beta_of(case),
            num_items_in_batch=case.tokens,
            temperature=case.temperature,
        )
        return Answer(loss)

    needs = {"mask": "completion_mask", "js": "beta", "tokens": "num_items_in_batch"}
    offers = offered(function, "forward_kl", **needs, temperature="temperature")
    return Peer("TRL chunked", "head", call, offers, (function,), "trl")


def liger(compiled: bool = False, chunk_size: int = 1024) -> Peer:
    """Liger's chunked JSD in plain torch; beta=0 is forward KL."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss as Loss

    def call(case: Case) -> Answer:
        student_weight, teacher_weight = case.heads()
        loss = Loss(
            weight_hard_loss=1.0 - case.kd_weight,
            weight_soft_loss=case.kd_weight,
            beta=beta_of(case),
            temperature=case.temperature,
            compiled=compiled,
            chunk_size=chunk_size,
        )
        labels = flat(case.labels)
        return Answer(
            loss(flat(case.student), student_weight, flat(case.teacher), teacher_weight, labels)
        )

    needs = {"mask": "ignore_index", "js": "beta", "mix": "weight_hard_loss"}
    offers = offered(Loss.__init__, "forward_kl", **needs, temperature="temperature")
    name = "Liger compiled" if compiled else "Liger"
    documents = (Loss, Loss.__init__, Loss.forward)
    return Peer(name, "head", call, offers, documents, "liger-kernel")


def torchtune(chunked: bool = False) -> Peer:
    """torchtune's ForwardKLLoss, whole or over eight chunks of logits."""
    from torchtune.modules.loss import ForwardKLLoss, ForwardKLWithChunkedOutputLoss

    def whole(case: Case) -> Answer:
        loss = ForwardKLLoss()
        inputs = flat(case.student), flat(case.teacher), flat(case.labels)
        if case.tokens is None:
            return Answer(loss(*inputs))
        return Answer(loss(*inputs, normalize=False) / case.tokens)

    def parts(case: Case) -> Answer:
        loss = ForwardKLWithChunkedOutputLoss()
        pair = (list(x.chunk(loss.num_output_chunks, 1)) for x in (case.student, case.teacher))
        return Answer(loss(*pair, case.labels))

    kind = ForwardKLWithChunkedOutputLoss if chunked else ForwardKLLoss
    offers = offered(kind.forward, "forward_kl", mask="labels", tokens="normalize")
    name = "torchtune chunked" if chunked else "torchtune"
    documents = (kind, kind.forward)
    return Peer(name, "logits", parts if chunked else whole, offers, documents, "torchtune")


def orda() -> Peer:
    """orda-kernel; without a GPU its torch form, which its authors call a reference."""
    from orda_kernel import SeparateTeacher, distillation_loss

    def call(case: Case) -> Answer:
        student_weight, teacher_weight = case.heads()
        variant: dict[str, Any] = {"kl_divergence": "forward"}
        if case.divergence == "js":
            variant = {"kl_divergence": "skew_js", "kl_beta": 0.5}
        loss = distillation_loss(
            flat(case.student),
            student_weight,
            flat(case.labels),
            SeparateTeacher(flat(case.teacher), teacher_weight),
            student_ce_weight=1.0 - case.kd_weight,
            kl_weight=case.kd_weight,
            kl_temperature=case.temperature,
            reduction="mean" if case.tokens is None else "sum",
            backend="torch",
            **variant,
        ).loss
        return Answer(loss if case.tokens is None else loss / case.tokens)

    needs = {
        "mask": "ignore_index",
        "js": "kl_beta",
        "mix": "student_ce_weight",
        "tokens": "reduction",
        "temperature": "kl_temperature",
    }
    offers = offered(distillation_loss, "forward_kl", **needs)
    documents = (distillation_loss, SeparateTeacher)
    return Peer("orda", "head", call, offers, documents, "orda-kernel")


def textbrewer() -> Peer:
    """TextBrewer's kd_ce_loss; the module of losses only, its trainer wants more packages."""
    from textbrewer.losses import kd_ce_loss

    def call(case: Case) -> Answer:
        return Answer(kd_ce_loss(case.student, case.teacher, case.temperature))

    offers = offered(kd_ce_loss, "forward_kl", temperature="temperature")
    return Peer("TextBrewer", "logits", call, offers, (kd_ce_loss,), "textbrewer")


def distillkit() -> Peer:
    """DistillKit's KLDLoss with a dense teacher."""
    from distillkit.lossfuncs.kl import KLDLoss, dense_kl_div
    from distillkit.signals import DenseSignal

    def call(case: Case) -> Answer:
        entries = case.teacher.shape[-1]
        signal = DenseSignal(1.0, None, entries, case.teacher)
        loss = KLDLoss(case.temperature)
        outputs = SimpleNamespace(logits=case.student)
        mask = case.mask[..., None]
        return Answer(loss(outputs, signal, mask=mask, num_items_in_batch=case.tokens))

    offers = offered(
        KLDLoss.__call__, "forward_kl temperature", mask="mask", tokens="num_items_in_batch"
    )
    documents = (KLDLoss, KLDLoss.__call__, dense_kl_div)
    return Peer("DistillKit", "logits", call, offers, documents, "distillkit")


def our_objective(name: str) -> Peer:
    """One of our plain forms by its name: forward_kl, js or ce_kd."""
    function = OBJECTIVES[name]
    divergence: Literal["forward_kl", "js"] = "js" if name == "js" else "forward_kl"

    def call(case: Case) -> Answer:
        settings: dict[str, Any] = {
            "teacher_temperature": case.temperature,
            "student_temperature": case.temperature,
            "weights_BT": case.token_weights,
            "t2_scale": bool(case.t2),
        }
        if name == "ce_kd":
            settings |= {"gold_BT": case.labels, "kd_weight": case.kd_weight}
            settings["divergence"] = case.divergence
        shared = min(case.student.shape[-1], case.teacher.shape[-1])
        target = DenseLogits(case.teacher, shared)
        return _answer(function(case.student, target, case.mask, **settings), case)

    offers = f"mask temperature tokens weights t2 {divergence}"
    if name == "ce_kd":
        offers += " mix js"
    of_type = (Divergence.__call__,) if isinstance(function, Divergence) else ()
    documents = (function, *of_type, DenseLogits)
    words = frozenset(offers.split())
    return Peer(name, "logits", call, words, documents, "llmkd", divergence, ours=True)


def our_head() -> Peer:
    """FusedLinearKD with the teacher's hidden states."""

    def call(case: Case) -> Answer:
        student_weight, teacher_weight = case.heads()
        fused: Any = FusedLinearKD(
            divergence=case.divergence,
            kd_weight=case.kd_weight,
            teacher_temperature=case.temperature,
            student_temperature=case.temperature,
            t2_scale=bool(case.t2),
        )
        shared = min(len(student_weight), len(teacher_weight))
        target = HiddenTarget(case.teacher, Head(teacher_weight), shared)
        term = fused(
            case.student,
            Head(student_weight),
            target,
            case.mask,
            gold_BT=case.labels,
            weights_BT=case.token_weights,
        )
        return _answer(term, case)

    words = frozenset("mask temperature mix tokens weights t2 forward_kl js".split())
    method = FusedLinearKD.__call__  # pyright: ignore[reportAttributeAccessIssue]
    documents = (FusedLinearKD, method, HiddenTarget)
    return Peer("FusedLinearKD", "head", call, words, documents, "llmkd", ours=True)


def _answer(term: LossTerm, case: Case) -> Answer:
    kl = term.metrics.get("kl")
    counted = max(int(term.count), 1)
    loss = normalise(term, case.tokens, world_size=1)
    return Answer(loss, None if kl is None else float(kl) / counted)


RIVALS: dict[str, Callable[[], Peer]] = {
    "TRL GKD": trl_gkd,
    "TRL chunked": trl_chunked,
    "Liger": liger,
    "torchtune": torchtune,
    "torchtune chunked": lambda: torchtune(chunked=True),
    "orda": orda,
    "DistillKit": distillkit,
    "TextBrewer": textbrewer,
}


def ours() -> list[Peer]:
    """llmkd's columns."""
    return [our_objective("forward_kl"), our_objective("js"), our_objective("ce_kd"), our_head()]


def installed(distillkit_path: str | None = None) -> tuple[list[Peer], dict[str, str]]:
    """Rivals that import here, and for each of the others the error that kept it out."""
    if distillkit_path:
        sys.path.insert(0, distillkit_path)
    found, missing = [], {}
    for name, load in RIVALS.items():
        try:
            found.append(load())
        except Exception as error:  # a rival may fail to import in any way it likes
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing
