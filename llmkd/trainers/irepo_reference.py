"""Reference log-probabilities of pairs that came without: computed once, by the model training
starts from, and kept in every checkpoint, because a resumed run no longer has that model.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llmkd.data.pair_checks import pairs_digest
from llmkd.data.pair_collator import REFERENCES
from llmkd.errors import DataError, RecipeError
from llmkd.files import digest, read_json, write_json
from llmkd.models.log_probs import completion_log_probs

if TYPE_CHECKING:
    from llmkd.trainers.irepo import IrepoTrainer

FILE = "reference_logps.json"


class References:
    """Tables [pairs, 2] float64 in nats for the reference columns that data sets lack.

    A missing initial policy is the starting model with its adapter off. `number` gives the rows of
    a data set their places in the tables.
    """

    def __init__(self, starts_adapted: bool) -> None:
        self.sets: list[Dataset] = []
        self.tables: dict[str, Tensor] = {}
        self.starts_adapted = starts_adapted
        self._missing: set[str] = set()

    def number(self, rows: Any) -> Any:
        """The rows with a column `pair`; those that bring both references stay as they are."""
        missing = {name for name in REFERENCES if f"{name}_1" not in rows.column_names}
        if not missing:
            return rows
        self._missing |= missing
        first = sum(map(len, self.sets))
        self.sets.append(rows)
        return rows.add_column("pair", np.arange(first, first + len(rows)))

    @property
    def wanted(self) -> list[str]:
        """Names of the tables to be made. Where the rows bring `ref_logps` alone and there is no
        adapter to take off, nobody knows the initial policy.
        """
        known = self.starts_adapted or "ref_logps" in self._missing
        return [name for name in REFERENCES if name in self._missing and known]

    def ready(self, trainer: IrepoTrainer) -> None:
        """Compute the tables, or read them where a run goes on. A collective."""
        if not self.wanted or self.tables:
            return
        found = self._read(trainer) if trainer.state.global_step else self._compute(trainer)
        device = trainer.args.device
        self.tables = {name: torch.tensor(rows, device=device) for name, rows in found.items()}

    def look_up(self, name: str, inputs: dict[str, Any]) -> Tensor | None:
        """[B, 2] of a batch; None where nobody knows them (yet)."""
        if name in inputs:
            return inputs[name]
        table = self.tables.get(name)
        return None if table is None or "pair" not in inputs else table[inputs["pair"]]

    def _compute(self, trainer: IrepoTrainer) -> dict[str, np.ndarray]:
        prompts, completions = [], []
        for rows in self.sets:
            columns: Any = rows.select_columns(["prompt_ids", "ids_1", "ids_2"])
            for row in columns:
                prompts += [row["prompt_ids"]] * 2
                completions += [row["ids_1"], row["ids_2"]]
        found: dict[str, np.ndarray] = {}
        for name in self.wanted:
            off = name == "initial_logps" and self.starts_adapted
            known = None if off else found.get("ref_logps")
            sums = _shared(trainer, prompts, completions, off=off) if known is None else known
            found[name] = sums.reshape(-1, 2)
        return found

    @property
    def key(self) -> str:
        """Which pairs the tables belong to."""
        return digest([pairs_digest(rows) for rows in self.sets])

    def write(self, folder: Path) -> None:
        """Beside a checkpoint's weights."""
        if self.tables:
            lists = {name: table.tolist() for name, table in self.tables.items()}
            write_json(folder / FILE, {"pairs": self.key, **lists})

    def _read(self, trainer: IrepoTrainer) -> dict[str, np.ndarray]:
        step = f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        given = trainer.resumed_from
        named = isinstance(given, str | Path)
        folder = Path(given) if named else Path(str(trainer.args.output_dir)) / step
        held = read_json(folder / FILE)
        if held is None:
            raise RecipeError.of(
                "resume_from_checkpoint",
                str(folder),
                f"holds no {FILE}, and the model training began with is gone",
                "give the pairs with columns ref_logps_1 and _2, initial_logps_1 and _2",
                "begin again without resume_from_checkpoint",
            )
        if held.pop("pairs") != self.key:
            raise DataError.of(
                "train_dataset", str(folder), "the checkpoint was made with other pairs"
            )
        return {name: np.asarray(rows, float) for name, rows in held.items()}


def _shared(
    trainer: IrepoTrainer, prompts: list[list[int]], completions: list[list[int]], *, off: bool
) -> np.ndarray:
    """`completion_log_probs`, each rank a share, the same answer everywhere."""
    ranks, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]) + len(completions[at]))
    # All ranks ask equally often: the forward of a sharded model is a collective.
    order += order[: -len(order) % ranks]
    mine = order[rank::ranks]
    model = trainer.model_wrapped
    plain: Any = trainer.accelerator.unwrap_model(model)
    quiet = trainer.args.disable_tqdm or rank > 0
    label = "initial log-probabilities" if off else "reference log-probabilities"
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(mine), desc=label, disable=quiet, file=sys.stderr))
        if off:
            stack.enter_context(plain.disable_adapter())
        found = completion_log_probs(
            model,
            [prompts[at] for at in mine],
            [completions[at] for at in mine],
            batch_size=trainer.args.reference_batch_size,
            device=trainer.args.device,
            scorer=trainer.scorer,
            bar=bar.update,
        )
    shares = trainer.accelerator.gather(torch.tensor(found, device=trainer.args.device))
    all_of_them = np.zeros(len(prompts))
    held: Any = shares
    for at, share in enumerate(held.cpu().numpy().reshape(ranks, -1)):
        all_of_them[order[at::ranks]] = share
    return all_of_them


class ReadyReferences(TrainerCallback):
    """Makes the tables once the model stands where it will train."""

    def __init__(self, trainer: IrepoTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A collective; after it no batch asks for what is not there."""
        self.trainer.references.ready(self.trainer)
