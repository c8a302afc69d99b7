"""What the arms of an ERNIE-Tiny run share: folder, task, general text, tokenizer, teachers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import disable_progress_bars
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from llmkd.data import (
    GeneralRows,
    TaskConfig,
    TaskRows,
    check_not_the_task,
    general_rows,
    load_documents,
    load_task,
    load_tokenizer,
    tokenizer_digest,
)
from llmkd.data.places import means_path
from llmkd.errors import DataError, RecipeError, RunFolderError
from llmkd.files import whole_folder
from llmkd.methods.ernie_config import PATH_KEYS, ErnieTinyConfig, GeneralText
from llmkd.methods.ernie_stages import StageSpec
from llmkd.methods.recipe import Recipe, named_paths
from llmkd.methods.run_folder import RunFolder, check_writable, result_settings, settings_key
from llmkd.models.build import check_window
from llmkd.models.student import StudentShape
from llmkd.teachers.loading import commit_of, load_config, model_fingerprint
from llmkd.teachers.stored import store_folder
from llmkd.trainers import LatentDistillConfig


@dataclass
class Plan:
    """What all arms share. `teachers` are facts of each role once it is there."""

    recipe: Recipe
    folder: Path
    task: TaskConfig
    general: GeneralText
    config: ErnieTinyConfig
    training: LatentDistillConfig
    arms: dict[str, dict[str, Any]]
    run: RunFolder
    main: bool
    tokenizer: PreTrainedTokenizerBase | None = None
    task_rows: TaskRows | None = None
    general_rows: GeneralRows | None = None
    teachers: dict[str, dict[str, Any]] = field(default_factory=dict)
    replaces: bool = False
    models: dict[str, str] = field(default_factory=dict)  # fingerprints of what else is named
    measured: dict[str, Any] = field(default_factory=dict)  # sizes and latency by shape

    @classmethod
    def of(cls, recipe: Recipe) -> Plan:
        """Settings to plan; sets up ranks."""
        task, general, _, config, training = recipe.build()
        _ = training.device  # sets up the process group, so that ranks can be asked for
        folder = Path(training.output_dir)
        main = PartialState().is_main_process
        if not main:
            disable_progress_bars()
        arms = {name: changes or {} for name, changes in (config.arms or {"": {}}).items()}
        run = RunFolder(folder, main=main)
        return cls(recipe, folder, task, general, config, training, arms, run, main)

    @property
    def several(self) -> bool:
        """Whether arms lie in folders of their own."""
        return list(self.arms) != [""]

    @property
    def kind(self) -> str | None:
        """The task's kind; None without a task."""
        return None if self.task_rows is None else self.task_rows.kind

    def configs(self) -> dict[str, ErnieTinyConfig]:
        """Each arm's teachers and stages."""
        return {
            name: self.recipe.with_changes(changes).build_one(ErnieTinyConfig)
            for name, changes in self.arms.items()
        }

    def specs(self) -> dict[str, list[StageSpec]]:
        """Each arm's stages."""
        return {name: config.specs() for name, config in self.configs().items()}

    @property
    def augment(self) -> str | None:
        """The function that adds rows to the task's, in all arms that have one."""
        named = {config.augment for config in self.configs().values()} - {None}
        return next(iter(named), None)

    def say(self, text: str) -> None:
        """One line to the person watching, from one rank."""
        if self.main:
            from rich.console import Console

            Console().print(text, style="dim", highlight=False, soft_wrap=True)

    def claim(self) -> None:
        """Refuse folders that hold another recipe's run, unless overwrite_run is set.

        Nothing is deleted here: that waits until everything new has been checked. New arms may be
        added to an old run.
        """
        runs = {
            "": self.run,
            **{name: RunFolder(self.folder / name, main=self.main) for name in self.arms if name},
        }
        check_writable("output_dir", self.folder)
        if self._has_general_stages():
            check_writable("general_stages", self.general_folder)
        for name, run in runs.items():
            settings = {**self.recipe.settings, **self.arms.get(name, {})}
            self._unless_overwritten(partial(run.claim, None, settings))

    def _has_general_stages(self) -> bool:
        """Whether any arm begins with a stage that may lie in `general_folder`."""
        firsts = [specs[0] for specs in self.specs().values()]
        return any(s.data == "general" and s.teacher in ("pretrained", "none") for s in firsts)

    def _unless_overwritten(self, check: Callable[[], None]) -> None:
        try:
            check()
        except RunFolderError:
            # only runs of ours are ever deleted
            if not self.config.overwrite_run or self.run.facts() is None:
                raise
            self.replaces = True

    def _claim_inputs(self) -> None:
        """The same for task, text and teacher, now that they are known."""
        old, new = (_fingerprints(facts) for facts in (self.run.facts() or {}, self.facts()))
        for part in [part for part in new if part in old and old[part] != new[part]]:
            raise RunFolderError.of(
                "output_dir",
                str(self.folder),
                f"holds a run of the same settings, but its {part} was another "
                f"({old[part]} -> {new[part]})",
                "choose another --output_dir",
                "--overwrite_run true replaces the old run",
            )

    def pretrained_facts(self) -> dict[str, Any]:
        """Name and fingerprint of the pretrained teacher."""
        self.teacher_config()  # read from the Hub, if it is there, its commit is known
        name = str(self.config.teacher_model_name_or_path)
        commit = commit_of(name, self.config.teacher_model_revision)
        return {"source": name, "fingerprint": model_fingerprint(name, commit)}

    def read(self) -> None:
        """Tokenizer, task and general text, as far as stages need them; nothing is written."""
        self._check_stores()
        self._warn_of_heads()
        specs = [spec for arm in self.specs().values() for spec in arm]
        self.read_rows(general=any(spec.data == "general" for spec in specs))
        self._unless_overwritten(self._claim_inputs)

    def _check_stores(self) -> None:
        """MissingFileError for a store that is named and not there, whether a stage reads it or
        not: a slip in its path, or a soft loss that was forgotten.
        """
        for config in self.configs().values():
            for entry in [vars(config), *config.soft_entries]:
                name = entry.get("label_store")
                if name and (means_path(name) or "/" not in name):  # else the Hub would be asked
                    store_folder(name)

    def _warn_of_heads(self) -> None:
        for name, specs in self.specs().items():
            heads = [spec.name for spec in specs if spec.predicts]
            if heads and not specs[-1].predicts:
                self.say(
                    f"{name or 'stages'}: warning: {specs[-1].name} comes after {heads[-1]} and "
                    "does not train the task head; the student's task scores may fall"
                )

    def read_rows(self, *, general: bool) -> None:
        """Tokenizer, task and, where asked for, general text."""
        name = self.config.teacher_model_name_or_path
        assert name is not None
        self.tokenizer = load_tokenizer(
            name,
            self.config.teacher_model_revision,
            key="teacher_model_name_or_path",
            needs_end=False,
        )
        self._same_tokenizers(self.tokenizer)
        with PartialState().main_process_first():
            if self.task.task_dataset:
                self.task_rows = load_task(
                    self.task,
                    self.tokenizer,
                    self.say,
                    augment=self.augment,
                    seed=self.training.seed,
                )
            if general:
                self._read_general(self.tokenizer)
        self._check_windows()
        self._check_ranks()

    def _check_ranks(self) -> None:
        """DataError where the ranks' own calls of `augment` made different rows."""
        own = None if self.task_rows is None else self.task_rows.taught_fingerprint
        if self.augment and len(set(gather_object([own]))) > 1:
            raise DataError.of(
                "augment",
                self.augment,
                "made other rows on another rank",
                "let its rows depend on its arguments alone, e.g. random.Random(seed)",
            )

    def _read_general(self, tokenizer: PreTrainedTokenizerBase) -> None:
        documents = load_documents(self.general)
        if self.task_rows is not None:
            check_not_the_task(documents, self.task_rows, self.general.source)
        self.general_rows = general_rows(
            documents,
            tokenizer,
            max_length=self.general.max_length,
            max_eval_rows=self.general.max_eval_rows,
            say=self.say,
        )

    def teacher_config(self, role: str = "pretrained") -> PretrainedConfig:
        """The config of the teacher in a role, read without its weights."""
        given = self.config.finetuned_teacher_name_or_path
        if role == "finetuned" and given:
            revision = self.config.finetuned_teacher_revision
            return load_config(given, revision, "finetuned_teacher_name_or_path")
        name, revision = self.config.teacher_model_name_or_path, self.config.teacher_model_revision
        return load_config(str(name), revision, "teacher_model_name_or_path")

    def _same_tokenizers(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """RecipeError where a fine-tuned teacher or a loaded student cuts text differently."""
        for (name, revision), key in self.named_models().items():
            own = load_tokenizer(name, revision, key=key, needs_end=False)
            if tokenizer_digest(own) != tokenizer_digest(tokenizer):
                sizes = f"{len(own):,} entries, the teacher's has {len(tokenizer):,}"
                raise RecipeError.of(
                    key,
                    name,
                    "has another tokenizer than teacher_model_name_or_path "
                    f"{self.config.teacher_model_name_or_path!r} ({sizes}); their states at one "
                    "place would speak of different tokens",
                    "take models of one family",
                )

    def named_models(self) -> dict[tuple[str, str | None], str]:
        """Every fine-tuned teacher and every student that is named, in any arm: id and revision to
        the key of the recipe.
        """
        config = self.config
        named: dict[tuple[Any, str | None], str] = {}
        given = config.finetuned_teacher_name_or_path, config.finetuned_teacher_revision
        named[given] = "finetuned_teacher_name_or_path"
        for changes in self.arms.values():
            shape = self.recipe.with_changes(changes).build_one(StudentShape)
            own = shape.student_name_or_path, shape.student_revision
            named.setdefault(own, "student_name_or_path")
        for arm in self.configs().values():
            for place, entry in enumerate(arm.soft_entries):
                own = entry.get("model_name_or_path"), entry.get("revision")
                named.setdefault(own, f"teachers[{place}]")
        return {found: key for found, key in named.items() if found[0] is not None}

    def claim_models(self, stores: dict[str, str]) -> None:
        """Refuse a folder whose run had other weights or labels under the same names; `stores` are
        fingerprints by name.
        """
        models = {
            name: str(model_fingerprint(name, commit_of(name, revision)))
            for name, revision in self.named_models()
        }
        self.models = {**models, **stores}
        self._unless_overwritten(self._claim_inputs)

    def _check_windows(self) -> None:
        self.check_window(self.teacher_config(), "teacher_model_name_or_path")

    def check_window(self, config: PretrainedConfig, key: str) -> None:
        """RecipeError where a model's positions cannot hold the rows of task or general text."""
        if self.general_rows is not None:
            check_window(config, self.general.max_length, key)
        if self.task_rows is not None:
            check_window(config, self.task.task_max_length, key, "task_max_length")

    def begin(self) -> None:
        """From here on the folder is this run's; call it while the folder is held."""
        PartialState().wait_for_everyone()
        self.claim()  # again: until it was held, another process may have worked here
        self._unless_overwritten(self._claim_inputs)
        if self.replaces:
            self.run.clear(named_paths(self.recipe, PATH_KEYS))
        PartialState().wait_for_everyone()
        if self.main:
            assert self.tokenizer is not None
            with whole_folder(self.folder / "tokenizer") as aside:
                self.tokenizer.save_pretrained(aside)
        if self.several or not self.run.finished_ever():  # a single arm's export ends its own run
            recipe = {**self.recipe.public(), "output_dir": str(self.folder)}
            recipe.pop("overwrite_run", None)
            facts = {
                "kind": "ernie-tiny",
                "name": "ernie-tiny",
                **({"arms": list(self.arms)} if self.several else {}),
                "settings": result_settings(self.recipe.settings),
                **self.facts(),
            }
            self.run.begin(settings_key(self.recipe.settings), facts, recipe)
        PartialState().wait_for_everyone()

    def facts(self) -> dict[str, Any]:
        """What every run folder of this run says of seed, task and text."""
        facts: dict[str, Any] = {"seed": self.training.seed, "task": None, "general": None}
        facts["pretrained"] = self.pretrained_facts()
        if self.models:
            facts["models"] = self.models
        if self.task_rows is not None:
            rows = self.task_rows
            facts["task"] = {
                "source": self.task.task_dataset,
                "kind": rows.kind,
                "labels": list(rows.label_names),
                "metric": self.metric,
                "train_examples": len(rows.train),
                "eval_examples": len(rows.held_out),
                "max_length": self.task.task_max_length,
                "fingerprint": rows.fingerprint,
            }
        if self.task_rows is not None and self.task_rows.augmented is not None:
            facts["augmented"] = {
                "function": self.augment,
                "rows": len(self.task_rows.augmented),
                "fingerprint": self.task_rows.augmented_fingerprint,
            }
        if self.general_rows is not None:
            facts["general"] = {
                "source": self.general.source,
                "fingerprint": self.general_rows.fingerprint,
                "train_tokens": self.general_rows.train_tokens,
                "max_length": self.general.max_length,
            }
        return facts

    @property
    def metric(self) -> str:
        """The task's main score."""
        from llmkd.evaluation.task_metrics import main_metric

        assert self.task_rows is not None
        kind, classes = self.task_rows.kind, self.task_rows.labels
        return main_metric(kind, self.task.task_metric, classes=classes, key="task_metric")

    @property
    def general_folder(self) -> Path:
        """Where stages lie that no task had a part in."""
        named = self.config.general_stages
        return Path(named) if named else self.folder.absolute().parent / "ernie-tiny-general"


def _fingerprints(facts: dict[str, Any]) -> dict[str, str]:
    """What a run was made of, by name: task, text and models."""
    parts = {p: facts.get(p) or {} for p in ("task", "augmented", "general", "pretrained")}
    found = {part: fact["fingerprint"] for part, fact in parts.items() if fact}
    return {**found, **(facts.get("models") or {})}
