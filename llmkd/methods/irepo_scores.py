"""Log-probabilities of responses under a policy, in parts that ranks share and a kill keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from llmkd.data.parts import Parts, run_parts
from llmkd.files import digest
from llmkd.methods.irepo_plan import Plan
from llmkd.methods.irepo_policy import Policy, answering
from llmkd.models.log_probs import completion_log_probs

SCORED_AT_ONCE = 256  # responses in one part


def run_all(plan: Plan, parts: Parts, make: Any, label: str) -> None:
    """The missing parts, shared by the ranks; all ranks leave together."""
    quiet = bool(plan.training.disable_tqdm)
    run_parts(parts, make, rank=plan.rank, world=plan.world, label=label, say=plan.say, quiet=quiet)
    PartialState().wait_for_everyone()


def policy_log_probs(
    plan: Plan,
    folder: Path,
    rows: list[tuple[list[int], list[int]]],
    policy: Policy,
    label: str,
    *,
    as_trained: bool = False,
) -> np.ndarray:
    """Token sums in nats, [N] float64, of (prompt ids, response ids); `as_trained` with the
    rounding of the training step, so that its first log-ratios are 0.
    """
    batches = [rows[i : i + SCORED_AT_ONCE] for i in range(0, len(rows), SCORED_AT_ONCE)]
    parts = Parts(folder, len(batches), plan.part_key("log_probs", digest(rows), policy))
    parts.claim()
    if not parts.done:
        with answering(policy, plan.policy, plan.device) as model:

            def make(part: int) -> list[dict[str, Any]]:
                found = _log_probs(plan, model, batches[part], as_trained=as_trained)
                return [{"logp": float(one)} for one in found]

            run_all(plan, parts, make, label)
    PartialState().wait_for_everyone()
    return np.array([row["logp"] for row in parts.rows()])


def _log_probs(
    plan: Plan, model: Any, rows: list[tuple[list[int], list[int]]], *, as_trained: bool
) -> np.ndarray:
    args = plan.training
    return completion_log_probs(
        model,
        [prompt for prompt, _ in rows],
        [answer for _, answer in rows],
        batch_size=args.reference_batch_size,
        device=plan.device,
        memory_mib=args.head_memory_mib,
        autocast=_autocast(args) if as_trained else None,
    )


def _autocast(args: Any) -> torch.dtype | None:
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
