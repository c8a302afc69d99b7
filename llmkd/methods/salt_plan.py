"""What the arms of a SALT run share: folder, text, tokenizer, rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import datasets.config
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
from llmkd.files import digest, digest_texts, whole_folder, write_text
from llmkd.methods.recipe import Recipe, named_paths
from llmkd.methods.run_folder import RunFolder, result_settings, settings_key
from llmkd.methods.salt_config import PATH_KEYS
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
    replaces: bool = False  # overwrite_run, and there is a run to overwrite

    @classmethod
    def of(cls, recipe: Recipe) -> Plan:
        """Settings to plan; sets up ranks."""
        data, _, teacher, _, training, _ = recipe.build()
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
        """Refuse a folder that holds another recipe's run, unless overwrite_run is set.

        Nothing is deleted here: that waits until everything new has been checked.
        """
        self._claim(self.run, self.recipe.settings)

    def claim_stages(self, stages: list[Stage]) -> None:
        """The same for every arm and the teacher, now that the text is known."""
        for stage in stages:
            self._claim(stage.run, stage.settings, stage.rows.fingerprint)

    def _claim(self, run: RunFolder, settings: dict[str, Any], rows: str | None = None) -> None:
        try:
            run.claim(None, settings, rows=rows)
        except RunFolderError:
            # only runs of ours are ever deleted
            if not self.recipe.settings["overwrite_run"] or self.run.facts() is None:
                raise
            self.replaces = True

    def begin(self, documents: Documents) -> None:
        """From here on the folder is this run's: tokenizer, held-out text and, with several arms,
        the parent's `run.json` and `recipe.yaml` (a single arm writes its own).
        """
        PartialState().wait_for_everyone()
        if self.replaces:
            self.run.clear(named_paths(self.recipe, PATH_KEYS))
        if self.main:
            texts = documents.held_out["text"]
            lines = (json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts)
            write_text(self.folder / "held_out.jsonl", "".join(lines))
            assert self.tokenizer is not None
            with whole_folder(self.folder / "tokenizer") as aside:
                self.tokenizer.save_pretrained(aside)
        PartialState().wait_for_everyone()
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
    _, student, teacher, _, _, _ = plan.recipe.build()
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
    size = plan.data.tokenizer_vocab_size
    with PartialState().main_process_first():
        key = digest([digest_texts(documents.train["text"]), size])
        # In the cache, not in the run's folder: that one may hold another run.
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "llmkd" / f"bpe-{key}"
        if folder.is_dir():
            plan.say(f"tokenizer: reused (same text, {size} entries, key {key})")
            return load_tokenizer(str(folder))
        plan.say(f"tokenizer: training a byte-level BPE of {size} entries")
        with whole_folder(folder) as aside:
            train_bpe(documents.train["text"], size, aside)
        return load_tokenizer(str(folder))


def make_rows(plan: Plan, documents: Documents) -> TokenRows:
    """Packed rows; the main process makes them, the others find them in the cache."""
    assert plan.tokenizer is not None
    with PartialState().main_process_first():
        return prepare_rows(documents, plan.tokenizer, plan.data, plan.say)
