"""An iREPO run folder as the loop leaves it, with numbers made up; no model in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmkd.files import write_json

RUN: dict[str, Any] = {
    "kind": "irepo",
    "name": "irepo",
    "status": "done",
    "iterations": 2,
    "seed": 17,
    "policy": {"source": "HuggingFaceTB/SmolLM2-135M-Instruct", "use_peft": False},
    "data": {
        "source": "trl-lib/ultrafeedback-prompt",
        "fingerprint": "feedbeef00000005",
        "prompts": 400,
        "held_out_prompts": 40,
    },
    "annotators": ["rule", "big"],
    "settings": {
        "loss": "irepo",
        "beta": 0.1,
        "reference": "previous",
        "temperature": 1.0,
        "num_responses": 4,
        "max_new_tokens": 24,
        "pairs": "best_worst",
        "prompt_dataset": "trl-lib/ultrafeedback-prompt",
        "annotators": [
            {"type": "rule", "function": "/home/someone/my_rules.py:score", "name": "rule"},
            {"type": "reward", "models": ["org/reward-a", "org/reward-b"], "name": "big"},
        ],
    },
    "versions": {"torch": "2.13.0"},
    "wall_seconds": 1234.0,
    "command": "llmkd irepo recipes/irepo/quickstart.yaml",
}


def metrics(number: int) -> dict[str, Any]:
    """`metrics.json` of policy `number`, better and farther from the start with each."""
    held_out: dict[str, Any] = {
        "responses": 40,
        "kl_initial": {"mean": 2.0 * number, "se": 0.25, "per_token": 0.1 * number},
        "reward": {"mean": 1.0 + number, "values": [number + i / 20 for i in range(40)]},
        "lengths": [10 + number + i % 7 for i in range(40)],
        "distinct_1": 0.4,
        "distinct_2": 0.8125 - number / 10,
        "truncated": 0.05,
    }
    if not number:
        seconds = {"evaluate": 30.0}
        return {"iteration": 0, "held_out": held_out, "annotators": [], "seconds": seconds}
    soft = 0.5 + 0.1 * number
    win = {"soft": soft, "hard": soft, "low": soft - 0.06, "high": soft + 0.06}
    held_out |= {"win_rate_start": win, "win_rate_previous": {**win, "soft": 0.55}}
    held_out |= {"kl_previous": {"mean": 2.0, "se": None, "per_token": 0.1}}
    return {
        "iteration": number,
        "prompts": 200,
        "responses": 800,
        "dropped": {"duplicate": 31, "truncated": 7, "empty": 0},
        "prompts_without_pair": 12,
        "pairs": 188,
        "mean_abs_logit": 1.25,
        "train": {"loss": 0.75, "accuracy": 0.625, "margin": 0.2},
        "held_out": held_out,
        "annotators": [
            {
                "name": "rule",
                "questions": 1200,
                "first_lean": 0.0,
                "orders_disagree": None,
                "agreement_with": {"big": 0.7125},
            },
            {
                "name": "big",
                "questions": 1200,
                "first_lean": 1.5,
                "orders_disagree": 0.75,
                "agreement_with": {"rule": 0.7125},
            },
        ],
        "seconds": {"sample": 60.0, "annotate": 20.0, "reference": 5.0, "train": 100.0},
        "warnings": ["31 responses said the <same>"] if number == 2 else [],
    }


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_answers(folder: Path, number: int, rows: int = 30) -> None:
    """Held-out responses in two parts, row after row, and what was said of them."""
    place = folder / f"iteration-{number}"
    held_out = [
        {
            "row": row,
            "prompt": [{"role": "user", "content": f"prompt {row} <b>?"}] if row % 2 else f"p{row}",
            "responses": [f"policy {number} row {row}", "other"],
            "ids": [[1, 0], [2, 0]],
            "finished": [True, True],
        }
        for row in range(rows)
    ]
    write_lines(place / "held_out" / "part-00000.jsonl", held_out[:10])
    write_lines(place / "held_out" / "part-00001.jsonl", held_out[10:])
    if number:
        verdicts = [
            {
                "row": row,
                "against": against,
                "response": f"policy {number} row {row}",
                "other": f"policy {number - 1 if against == 'previous' else 0} row {row}",
                "logit": float(row - 15),
                "score": 1.5,
                "other_score": None,
            }
            for against in ("previous", "start")
            for row in range(rows)
        ]
        write_lines(place / "held_out_verdicts.jsonl", verdicts)


def write_align_run(folder: Path, iterations: int = 2, **changes: Any) -> Path:
    """The whole folder; `iterations` of the two are done."""
    write_json(folder / "run.json", RUN | changes)
    for number in range(iterations + 1):
        write_json(folder / f"iteration-{number}" / "metrics.json", metrics(number))
        write_answers(folder, number)
    return folder
