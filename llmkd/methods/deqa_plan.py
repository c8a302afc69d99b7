"""What the arms of a DeQA-Score run share: folder, rated rows, levels, tokens of the rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, disable_progress_bars
from trl import get_quantization_config

from llmkd.data.levels import LevelConfig, Levels
from llmkd.data.score_config import ScoreDataConfig
from llmkd.data.score_rows import ScoreRows, load_score_rows
from llmkd.data.score_tokens import ImageRows, ScoreEncoder, ScorePrompt, tokenize_scores
from llmkd.errors import LlmkdError, RecipeError, RunFolderError
from llmkd.methods.deqa_config import MEASURING_KEYS, PATH_KEYS, ScorerModelConfig, TargetConfig
from llmkd.methods.recipe import Recipe, named_paths
from llmkd.methods.run_folder import RunFolder, check_writable, result_settings, settings_key
from llmkd.models.scorer import SavedLevels, window_of
from llmkd.models.scorer_files import load_processor, sees_images
from llmkd.teachers.loading import commit_of, load_config, model_fingerprint
from llmkd.trainers import ScoreConfig

KEY = "model_name_or_path"


@dataclass
class Plan:
    """What all arms share. `processor`, `levels` and `rows` are there after `read`."""

    recipe: Recipe
    folder: Path
    data: ScoreDataConfig
    model: ScorerModelConfig
    asked: LevelConfig
    target: TargetConfig
    training: ScoreConfig
    arms: dict[str, dict[str, Any]]
    run: RunFolder
    main: bool
    rank: int
    world: int
    processor: Any = None
    encoder: Any = None
    levels: Levels | None = None
    rows: ScoreRows | None = None
    fingerprint: str = ""  # of the model that training starts from
    sees: bool = False
    replaces: bool = False
    tokens: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Recipe) -> Plan:
        """Settings to plan; sets up ranks."""
        data, model, asked, target, training = recipe.build()
        _ = training.device  # sets up the process group, so that ranks can be asked for
        state, folder = PartialState(), Path(training.output_dir)
        main = state.is_main_process
        if not main:
            disable_progress_bars()
        arms = {name: changes or {} for name, changes in (target.arms or {"": {}}).items()}
        run, ranks = RunFolder(folder, main=main), (state.process_index, state.num_processes)
        made = (recipe, folder, data, model, asked, target, training, arms, run, main)
        return cls(*made, *ranks)

    @property
    def several(self) -> bool:
        """Whether arms lie in folders of their own."""
        return list(self.arms) != [""]

    def say(self, text: str) -> None:
        """One line to the person watching, from one rank."""
        if self.main:
            from rich.console import Console

            Console().print(text, style="dim", highlight=False, markup=False, soft_wrap=True)

    def settings(self, changes: dict[str, Any]) -> dict[str, Any]:
        """What decides an arm's model."""
        found = {**self.recipe.settings, **changes}
        return {key: value for key, value in found.items() if key not in MEASURING_KEYS}

    def key(self, changes: dict[str, Any], *facts: Any) -> str:
        """Hash of all that decides it, once rows and model are known."""
        assert self.rows is not None and self.levels is not None
        prompt = [self.levels.ids_L, self.levels.prefix]
        known = (self.rows.fingerprint, self.fingerprint, prompt)
        return settings_key(self.settings(changes), *known, *facts)

    def claim(self) -> None:
        """Refuse folders that hold another recipe's run, unless overwrite_run is set; nothing is
        deleted before everything new was checked. New arms may be added to an old run.
        """
        check_writable("output_dir", self.folder)
        rows = None if self.rows is None else self.rows.fingerprint
        for name, changes in {"": {}, **self.arms}.items():
            run = RunFolder(self.folder / name if name else self.folder, main=self.main)
            self.unless_overwritten(partial(run.claim, None, self.settings(changes), rows=rows))

    def unless_overwritten(self, check: Callable[[], None]) -> None:
        """Run a check of a folder; its refusal counts only where nothing is to be overwritten."""
        try:
            check()
        except RunFolderError:
            # only runs of ours are ever deleted
            if not self.target.overwrite_run or self.run.facts() is None:
                raise
            self.replaces = True

    def read(self) -> None:
        """Model's config and tokenizer, levels, rated rows; nothing is written."""
        name, revision = str(self.model.model_name_or_path), self.model.model_revision
        config = load_config(name, revision, KEY)
        self.sees = sees_images(config)
        if self.data.image_column is not None and not self.sees:
            problem = f"{name} reads text only"
            way = "model_name_or_path: an image-text model"
            raise RecipeError.of("image_column", self.data.image_column, problem, way)
        if self.sees and get_quantization_config(self.model) is not None:
            raise RecipeError.of(
                "load_in_4bit", True, "image-text models are not quantised here", "leave it out"
            )
        self.processor = load_processor(name, revision, key=KEY)
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.levels = self.asked.find(tokenizer)
        window = window_of(config, tokenizer, self.training.max_length)
        self.encoder = ScoreEncoder(self.processor, self.levels, ScorePrompt.of(self.asked), window)
        self.fingerprint = str(model_fingerprint(name, commit_of(name, revision)))
        with PartialState().main_process_first():
            self.rows = load_score_rows(self.data, self.say, values=self.levels.values_L)
        self.claim()

    def tokenized(self, split: str, seed: int, targets_NL: np.ndarray) -> Dataset | ImageRows:
        """Rows of a split in the trainer's format, with these targets; tokens are made once a
        seed. A seed draws the questions of training rows.
        """
        rows, training = getattr(self.rows, split), split == "train"
        key = (split, seed if training else None)
        if key not in self.tokens:
            zeros = np.zeros_like(targets_NL)
            made = tokenize_scores(
                rows, self.encoder, lambda _: zeros, training=training, seed=seed
            )
            cut = self._cut(made.rows) if isinstance(made.rows, ImageRows) else made.cut
            if cut:
                most = self.encoder.max_length
                self.say(f"{cut} of {len(rows)} texts ({split}) lost their middle: over {most}")
            self.tokens[key] = made.rows
        found = self.tokens[key]
        if isinstance(found, Dataset):
            return found.remove_columns("target").add_column("target", targets_NL.tolist())  # type: ignore[call-arg]
        own = copy.copy(found)
        own.targets_NL = targets_NL
        return own

    def _cut(self, rows: ImageRows) -> int:
        """How many texts of image rows lose their middle. Ranks share the rows, and all raise the
        error of the first that has one.
        """
        error, cut = None, 0
        try:
            cut = rows.check(self.rank, self.world)
        except LlmkdError as found:
            error = found
        shared = gather_object([(error, cut)])
        if (first := next((one for one, _ in shared if one is not None), None)) is not None:
            raise first
        return sum(count for _, count in shared)

    def begin(self) -> None:
        """From here on the folder is this run's; call it while the folder is held. With several
        arms the run has a `run.json` and a `recipe.yaml` of its own.
        """
        PartialState().wait_for_everyone()
        self.claim()  # again: until it was held, another process may have worked here
        if self.replaces:
            self.run.clear(named_paths(self.recipe, PATH_KEYS))
        PartialState().wait_for_everyone()
        if self.several:
            recipe = {**self.recipe.public(), "output_dir": str(self.folder)}
            recipe.pop("overwrite_run", None)
            facts = {
                "kind": "deqa",
                "name": "deqa",
                "arms": list(self.arms),
                "seed": self.training.seed,
                "settings": result_settings(self.settings({})),
                **self.facts(),
            }
            self.run.begin(self.key({}), facts, recipe)
        PartialState().wait_for_everyone()

    def facts(self) -> dict[str, Any]:
        """What every run folder of this run says of rows, levels and model."""
        rows, levels = self.rows, self.levels
        assert rows is not None and levels is not None
        scales = {str(name): [one.low, one.high] for name, one in rows.scales.items()}
        return {
            "data": {
                "source": self.data.source,
                "fingerprint": rows.fingerprint,
                "train_rows": len(rows.train),
                "validation_rows": len(rows.validation),
                "eval_rows": len(rows.held_out),
                "scales": scales,
                "counts": rows.counts,
            },
            "levels": {"words": levels.words, "values": levels.values_L, "prefix": levels.prefix},
            "student": {
                "source": self.model.model_name_or_path,
                "fingerprint": self.fingerprint,
                "images": self.sees,
            },
        }

    def saved_levels(self) -> SavedLevels:
        """What lies beside a model as `levels.json`, so that its folder scores alone."""
        rows, levels, data = self.rows, self.levels, self.data
        assert rows is not None and levels is not None
        kind = "images" if data.image_column else "messages" if data.messages_column else "text"
        ends = {(scale.low, scale.high) for scale in rows.scales.values()}
        return SavedLevels(
            levels,
            ScorePrompt.of(self.asked),
            template=data.text_template,
            inputs=kind,
            scale=next(iter(ends)) if len(ends) == 1 else None,
            max_length=self.training.max_length,
        )
