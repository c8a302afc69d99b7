"""What the iterations of an iREPO run share: folder, prompts, tokenizer, annotators, the start."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from datasets import disable_progress_bars
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from llmkd.annotators.base import Annotator
from llmkd.annotators.config import AnnotatorConfig, make_annotators
from llmkd.data import load_documents, load_tokenizer
from llmkd.data.preferences import PairRows, PreferenceConfig, load_preferences
from llmkd.data.prompts import PromptConfig, PromptRows, load_prompts, slices
from llmkd.errors import LlmkdError, RunFolderError
from llmkd.files import digest
from llmkd.methods import salt
from llmkd.methods.irepo_config import (
    PATH_KEYS,
    LoopConfig,
    PolicyConfig,
    answer_settings,
    held_out_annotators,
    paths_inside,
    start_recipe,
)
from llmkd.methods.irepo_policy import Policy
from llmkd.methods.recipe import Recipe, named_paths
from llmkd.methods.run_folder import RunFolder, check_writable, result_settings, settings_key
from llmkd.methods.salt_plan import Plan as SaltPlan
from llmkd.methods.salt_plan import make_tokenizer
from llmkd.models.build import StudentConfig, check_vocabulary, model_config
from llmkd.models.sample import Sampler, SamplingConfig, check_room
from llmkd.teachers.loading import commit_of, load_config, model_fingerprint
from llmkd.trainers import IrepoConfig


@dataclass
class Plan:
    """What all iterations share. `start` and `prompts` are there after `read`."""

    recipe: Recipe
    folder: Path
    prompt_config: PromptConfig
    policy: PolicyConfig
    sampling: SamplingConfig
    annotation: AnnotatorConfig
    offline: PreferenceConfig
    loop: LoopConfig
    training: IrepoConfig
    run: RunFolder
    main: bool
    rank: int
    world: int
    device: Any
    tokenizer: Any = None
    prompts: PromptRows | None = None
    pairs: PairRows | None = None  # of a preference file
    shares: list[list[dict[str, Any]]] = field(default_factory=list)
    start: Policy | None = None
    key: str = ""
    replaces: bool = False

    @classmethod
    def of(cls, recipe: Recipe) -> Plan:
        """Settings to plan; sets up ranks."""
        made = recipe.build()
        training = made[-1]
        device = training.device  # sets up the process group, so that ranks can be asked for
        state, folder = PartialState(), Path(training.output_dir)
        if not state.is_main_process:
            disable_progress_bars()
        return cls(
            recipe,
            folder,
            *made,
            run=RunFolder(folder, main=state.is_main_process),
            main=state.is_main_process,
            rank=state.process_index,
            world=state.num_processes,
            device=device,
        )

    @property
    def given(self) -> bool:
        """Whether the pairs come from a preference file: nothing is sampled to train on."""
        return bool(self.offline.preference_dataset)

    @property
    def iterations(self) -> int:
        """How many there are."""
        return 1 if self.given else self.loop.iterations

    def say(self, text: str) -> None:
        """One line to the person watching, from one rank."""
        if self.main:
            from rich.console import Console

            Console().print(text, style="dim", highlight=False, soft_wrap=True)

    def claim(self) -> None:
        """Refuse a folder that holds another recipe's run, unless overwrite_run is set; nothing is
        deleted before everything new was checked.
        """
        check_writable("output_dir", self.folder)
        self._claim(None)

    def _claim(self, key: str | None) -> None:
        try:
            self.run.claim(key, self.settings)
        except RunFolderError:
            # only runs of ours are ever deleted
            if not self.loop.overwrite_run or self.run.facts() is None:
                raise
            self.replaces = True

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the result; how many iterations follow does not where each has its own
        number of prompts.
        """
        found = dict(self.recipe.settings)
        for key in ("annotators", "held_out_annotators"):
            found[key] = answer_settings(found[key])
        if self.loop.prompts_per_iteration is not None:
            found.pop("iterations")
        return found

    def begin(self) -> None:
        """From here on the folder is this run's; call it while the folder is held."""
        PartialState().wait_for_everyone()
        self.claim()  # again: until it was held, another process may have worked here
        self._claim(self.key)
        if self.replaces:
            named = named_paths(self.recipe, PATH_KEYS)
            self.run.clear({**named, **paths_inside(self.recipe)})
        PartialState().wait_for_everyone()

    def read(self) -> None:
        """Tokenizer and prompts, checked against the policy, and the key of all that decides;
        nothing is written.
        """
        for held_out in (False, True):
            self.annotators(held_out=held_out)  # what their constructors refuse, while it is early
        key = "start"
        if self.policy.start:
            config, self.tokenizer = self._new_start()
            fingerprint = digest(result_settings(self.start_recipe().settings))
        else:
            key, source = "model_name_or_path", str(self.policy.model_name_or_path)
            config = load_config(source, self.policy.model_revision, key)
            self.tokenizer = load_tokenizer(source, self.policy.model_revision, key=key)
            commit = commit_of(source, self.policy.model_revision)
            self.start = Policy(source, self.policy.model_revision or commit)
            fingerprint = model_fingerprint(source, commit)
        check_vocabulary(config.get_text_config(), self.tokenizer, key)
        window = getattr(config.get_text_config(), "max_position_embeddings", None)
        window = min((w for w in (window, self.training.max_length) if w), default=None)
        check_room(1, window, self.sampling.max_new_tokens)
        room = None if window is None else window - self.sampling.max_new_tokens
        with PartialState().main_process_first():
            self.prompts = self._given_rows(window, room) if self.given else self._prompts(room)
        if not self.given:
            loop, seed = self.loop, self.prompt_config.prompt_seed
            each = loop.prompts_per_iteration
            self.shares = slices(self.prompts.train, loop.iterations, each, seed)
        self.key = settings_key(self.settings, self.prompts.fingerprint, fingerprint)
        self._claim(self.key)

    def _prompts(self, room: int | None) -> PromptRows:
        return load_prompts(self.prompt_config, self.tokenizer, self.say, window=room)

    def _given_rows(self, window: int | None, room: int | None) -> PromptRows:
        """The preference file's pairs, and held-out prompts: a file's, or those of its own held-out
        pairs.
        """
        self.pairs = load_preferences(self.offline, self.tokenizer, window=window)
        if long := self.pairs.dropped["long"]:
            self.say(f"{long} pairs are longer than the window of {window} tokens: left out")
        if self.prompt_config.prompt_dataset or self.prompt_config.held_out_dataset:
            prompts = self._prompts(room)
            key = digest([self.pairs.fingerprint, prompts.fingerprint])
            return PromptRows([], prompts.held_out, key, prompts.dropped)
        rows: dict[str, Any] = {}
        for row in cast(Any, self.pairs.held_out or []):
            names = ("row", "prompt", "prompt_ids")
            rows.setdefault(str(row["prompt_ids"]), {name: row[name] for name in names})
        fits = [r for r in rows.values() if room is None or len(r["prompt_ids"]) <= room]
        dropped = {"long": len(rows) - len(fits)}
        return PromptRows([], fits, self.pairs.fingerprint, dropped)

    def say_what_is_measured(self) -> None:
        """A word where nothing is held out: nobody then knows what the run was worth."""
        if self.prompts is not None and not self.prompts.held_out:
            key = "held_out_pairs" if self.given else "held_out_prompts"
            self.say(f"nothing is held out: no win rate, no KL will be measured (--{key} 64)")

    def start_recipe(self) -> Recipe:
        """The recipe of llmkd salt that makes the start policy."""
        return start_recipe(self.policy, str(self.folder / "start"))

    def _new_start(self) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
        plan = SaltPlan.of(self.start_recipe())
        tokenizer = make_tokenizer(plan, load_documents(plan.data))
        student = plan.recipe.build_one(StudentConfig)
        if student.model_name_or_path:
            name, revision = student.model_name_or_path, student.model_revision
            return load_config(name, revision, "start.model_name_or_path"), tokenizer
        shape = cast(dict[str, Any], student.model_config)
        return model_config(shape, tokenizer, "start.model_config"), tokenizer

    def pretrain(self) -> None:
        """The start policy, where the recipe makes one."""
        if self.policy.start:
            self.start = Policy(str(salt.run(self.start_recipe())))

    def begin_run(self) -> None:
        """Write what the run is."""
        recipe = {**self.recipe.public(), "output_dir": str(self.folder)}
        recipe.pop("overwrite_run", None)
        assert self.prompts is not None
        facts = {
            "kind": "irepo",
            "name": "irepo",
            "iterations": self.iterations,
            "seed": self.training.seed,
            "policy": {
                "source": self.policy.model_name_or_path or "start",
                "revision": self.start and self.start.revision,
                "use_peft": self.policy.use_peft,
            },
            "data": {
                "source": self.offline.preference_dataset or self.prompt_config.source,
                "fingerprint": self.prompts.fingerprint,
                "prompts": len(self.prompts.train),
                "held_out_prompts": len(self.prompts.held_out),
            },
            "sampling": self.sampler().settings(),
            "annotators": [a.name for a in self.annotators()],
            "settings": result_settings(self.settings),
        }
        self.run.begin(self.key, facts, recipe)
        PartialState().wait_for_everyone()

    def sampler(self) -> Sampler:
        """A sampler with the recipe's settings; it holds no model yet."""
        return Sampler(self.sampling, self.tokenizer)

    def annotators(self, *, held_out: bool = False) -> list[Annotator]:
        """Fresh annotators of the loop, or of the held-out win rate; none where none is named."""
        config = held_out_annotators(self.annotation, self.loop) if held_out else self.annotation
        if not config.annotators:
            return []
        try:
            return make_annotators(config, seed=self.training.seed, folder=self.folder)
        except LlmkdError as error:
            own = held_out and bool(self.loop.held_out_annotators)
            raise type(error)(f"held_out_{error}" if own else str(error)) from error

    def part_key(self, *facts: Any) -> str:
        """Key of a phase's parts. A policy that lies in the run counts by its place there: the run
        may be named in another way, or moved.
        """
        return digest([self.key, *(self._named(one) for one in facts)])

    def _named(self, fact: Any) -> Any:
        if not isinstance(fact, Policy):
            return fact
        here, found = self.folder.absolute(), dict(vars(fact))
        for key in ("source", "adapter"):
            if found[key] and (path := Path(found[key]).absolute()).is_relative_to(here):
                found[key] = str(path.relative_to(here))
        return found
