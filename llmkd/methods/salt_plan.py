"""What the arms of a SALT run share: folder, text, tokenizer, rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedTokenizerBase

from llmkd.data import (
    DataConfig,
    Documents,
    TokenRows,
    load_tokenizer,
    prepare_rows,
    train_bpe,
)
from llmkd.errors import RecipeError, RunFolderError
from llmkd.files import digest, digest_texts, read_json, whole_folder, write_json, write_text
from llmkd.methods.recipe import Recipe
from llmkd.methods.run_folder import RunFolder, result_settings, settings_key
from llmkd.methods.stage import Stage
from llmkd.trainers import SaltConfig


@dataclass
class Plan:
    """What all arms share."""

    recipe: Recipe
    folder: Path
    data: DataConfig
    training: SaltConfig
    arms: dict[str, dict[str, Any]]
    run: RunFolder
    main: bool
    tokenizer: PreTrainedTokenizerBase | None = None
    rows: TokenRows | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> Plan:
        """Settings to plan; sets up ranks."""
        data, _, teacher, _, training = recipe.build()
        _ = training.device  # sets up the process group, so that ranks can be asked for
        folder = Path(training.output_dir)
        main = PartialState().is_main_process
        if not main:
            disable_progress_bars()
        arms = {name: changes or {} for name, changes in (teacher.arms or {"": {}}).items()}
        return cls(recipe, folder, data, training, arms, RunFolder(folder, main=main), main)

    @property
    def several(self) -> bool:
        """Whether arms lie in folders of their own."""
        return list(self.arms) != [""]

    def say(self, text: str) -> None:
        """One line to the person watching, from one rank."""
        if self.main:
            from rich.console import Console

            Console().print(text, style="dim", highlight=False, soft_wrap=True)

    def claim(self) -> None:
        """Refuse a folder that holds another recipe's run; with overwrite_run, delete that one."""
        overwrite = self.recipe.build()[2].overwrite_run
        try:
            self.run.claim(None, self.recipe.settings, overwrite=False)
        except RunFolderError:
            if not overwrite or self.run.facts() is None:  # only runs of ours are ever deleted
                raise
            PartialState().wait_for_everyone()
            self.run.clear()
        PartialState().wait_for_everyone()

    def begin(self) -> None:
        """Write the parent's `run.json` and `recipe.yaml` (a single arm writes its own)."""
        if self.several:
            recipe = {**self.recipe.public(), "output_dir": str(self.folder)}
            facts = {
                "kind": "salt",
                "name": "salt",
                "arms": list(self.arms),
                "seed": self.training.seed,
                "settings": result_settings(self.recipe.settings),
            }
            recipe.pop("overwrite_run", None)
            self.run.begin(settings_key(self.recipe.settings), facts, recipe)

    def stage(self, name: str, changes: dict[str, Any], folder: Path | None = None) -> Stage:
        """A stage of this run; the single unnamed arm takes the run's own folder."""
        assert self.rows is not None and self.tokenizer is not None
        return Stage(
            name=name or "salt",
            recipe=self.recipe,
            changes=changes,
            folder=folder or (self.folder / name if name else self.folder),
            rows=self.rows,
            tokenizer=self.tokenizer,
            say=self.say,
        )


def make_tokenizer(plan: Plan, documents: Documents) -> PreTrainedTokenizerBase:
    """The named tokenizer, the student's or teacher's own, or a BPE trained on the train split."""
    _, student, teacher, _, _ = plan.recipe.build()
    for key, name, revision in (
        ("tokenizer_name_or_path", plan.data.tokenizer_name_or_path, None),
        ("model_name_or_path", student.model_name_or_path, student.model_revision),
        ("teacher_model_name_or_path", teacher.teacher_model_name_or_path, None),
    ):
        if name:
            return load_tokenizer(name, revision, key=key)
    if not isinstance(documents.train, Dataset):
        raise RecipeError.of(
            "tokenizer_name_or_path", None, "a stream cannot train a tokenizer", "name one"
        )
    folder, size = plan.folder / "tokenizer", plan.data.tokenizer_vocab_size
    with PartialState().main_process_first():
        key = digest([digest_texts(documents.train["text"]), size])
        known = read_json(folder / "llmkd.json")
        if known and known["key"] == key:
            plan.say(f"tokenizer: reused (same text, {size} entries, key {key})")
            return load_tokenizer(str(folder))
        plan.say(f"tokenizer: training a byte-level BPE of {size} entries")
        with whole_folder(folder) as aside:
            tokenizer = train_bpe(documents.train["text"], size, aside)
            write_json(aside / "llmkd.json", {"key": key})
        return tokenizer


def make_rows(plan: Plan, documents: Documents) -> TokenRows:
    """Packed rows, and the held-out text as `held_out.jsonl` for the harness."""
    assert plan.tokenizer is not None
    with PartialState().main_process_first():
        rows = prepare_rows(documents, plan.tokenizer, plan.data, plan.say)
    if plan.main:
        lines = (json.dumps({"text": t}, ensure_ascii=False) for t in documents.held_out["text"])
        write_text(plan.folder / "held_out.jsonl", "".join(f"{line}\n" for line in lines))
    return rows
