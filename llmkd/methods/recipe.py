"""From a YAML file and flags to typed settings, with one clear error for every slip."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import yaml
from trl import TrlParser

from llmkd.errors import LlmkdError, MissingFileError, RecipeError
from llmkd.methods.precision import warn_of_slow_bf16

SECRETS = ("hub_token",)
NEW_FOLDERS = ("general_stages",)  # paths that need not lead anywhere yet
NESTED = ("arms", "stages", "stage_settings")  # mappings of other keys are in them
KINDS = {"int": "a number", "float": "a number", "string_to_bool": "true or false"}
INNER_PATHS = {"dataset_mixture": "id", "teachers": "model_name_or_path"}
Kind = TypeVar("Kind")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Resolved settings: one flat mapping, and the dataclasses made of it.

    `settings` holds every key with its value after defaults, file and flags; `given` only the keys
    the file or the flags named.
    """

    settings: dict[str, Any]
    given: dict[str, Any]
    types: tuple[type, ...]

    def build(self, **changes: Any) -> tuple[Any, ...]:
        """The dataclasses, with `changes` laid over the settings."""
        return build(self.types, {**self.settings, **changes})

    def build_one(self, kind: type[Kind], **changes: Any) -> Kind:
        """One of the dataclasses, with `changes` laid over the settings."""
        return build((kind,), {**self.settings, **changes})[0]

    def with_changes(self, changes: Mapping[str, Any]) -> Recipe:
        """The recipe with an arm's changes laid over it."""
        return Recipe({**self.settings, **changes}, {**self.given, **changes}, self.types)

    def public(self) -> dict[str, Any]:
        """What may be written down: the given settings without secrets."""
        return {key: value for key, value in self.given.items() if key not in SECRETS}


def with_absolute_paths(recipe: Recipe, keys: Sequence[str], not_a_path: str = "") -> Recipe:
    """Local paths under `keys`, in mixtures and lists of teachers too, made absolute, so that a
    resume works from any folder.
    """

    def absolute(settings: dict[str, Any]) -> dict[str, Any]:
        changed = dict(settings)
        for key in {*keys} & {*settings}:
            changed[key] = _absolute(changed[key], not_a_path)
        for key in {*NEW_FOLDERS} & {*keys} & {*settings}:
            if changed[key]:
                changed[key] = str(Path(changed[key]).expanduser().absolute())
        for key, inner in INNER_PATHS.items():
            if isinstance(changed.get(key), list):
                parts = [dict(part) for part in changed[key] if isinstance(part, dict)]
                for part in parts:
                    for name in (inner, "label_store"):
                        if name in part:
                            part[name] = _absolute(part[name], not_a_path)
                changed[key] = parts
        return changed

    return Recipe(absolute(recipe.settings), absolute(recipe.given), recipe.types)


def _absolute(value: Any, not_a_path: str) -> Any:
    if isinstance(value, str) and value != not_a_path and Path(value).expanduser().exists():
        return str(Path(value).expanduser().absolute())
    return value


def named_paths(recipe: Recipe, keys: Sequence[str]) -> dict[str, str]:
    """Every local path the recipe or one of its arms names under `keys`, in mixtures and lists of
    teachers too, and is there; by its key, as `teachers[1].label_store` or `arms.a.label_store`.
    """
    arms = recipe.settings.get("arms")
    if isinstance(arms, str):
        arms = json.loads(arms)
    places = {"": recipe.settings, **{f"arms.{n}.": arm or {} for n, arm in (arms or {}).items()}}
    named: dict[str, Any] = {}
    for at, settings in places.items():
        named |= {f"{at}{key}": settings.get(key) for key in keys}
        for key, inner in INNER_PATHS.items():
            parts = settings.get(key) or []
            for place, part in enumerate(json.loads(parts) if isinstance(parts, str) else parts):
                named |= {f"{at}{key}[{place}].{n}": part.get(n) for n in (inner, "label_store")}
    return {k: v for k, v in named.items() if isinstance(v, str) and Path(v).expanduser().exists()}


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message}\n  - `--help` lists every key")


def read_recipe(argv: Sequence[str], types: tuple[type, ...]) -> Recipe:
    """Parse `[RECIPE.yaml | --config RECIPE.yaml] [--key value ...]`.

    Raises MissingFileError for a recipe that is not there and RecipeError for a file that is no
    mapping, an unknown key (with the nearest known one) or a value of the wrong type.
    """
    path, flags = _recipe_path(list(argv))
    return _parse(_read_yaml(path) if path else {}, flags, types, str(path))


def inner_recipe(settings: Mapping[str, Any], types: tuple[type, ...], key: str) -> Recipe:
    """Another method's recipe that stands under `key`; RecipeError names it with its key."""
    try:
        return _parse(dict(settings), [], types, key)
    except LlmkdError as error:
        raise type(error)(f"{key}.{error}") from error


def _parse(
    from_file: dict[str, Any], flags: list[str], types: tuple[type, ...], origin: str
) -> Recipe:
    parser = _Parser(cast(Any, types), prog="llmkd", allow_abbrev=False)
    keys = _Keys(parser)
    for key in from_file:
        if key not in keys.known:
            ways = _near(str(key), keys.known)
            raise RecipeError.of(str(key), from_file[key], f"{origin} has no such key", *ways)
    typed = {key: keys.typed(key, value, key) for key, value in from_file.items()}
    parser.set_defaults_with_config(**typed)
    values, rest = parser.parse_known_args(flags)
    if rest:
        name = rest[0].lstrip("-").split("=")[0].replace("-", "_")
        if rest[0].startswith("-"):
            ways = _near(name, keys.known)
            raise RecipeError.of(rest[0], " ".join(rest[1:2]), "no such flag", *ways)
        raise RecipeError(f"{rest[0]!r} stands where no value is expected; flags are --key value")
    settings = {
        key: keys.inside(key, value, key)
        for key, value in vars(values).items()
        if key in _fields(types)
    }
    named = set(typed) | {flag.lstrip("-").split("=")[0].replace("-", "_") for flag in flags}
    # --no_packing names packing
    given = {k: v for k, v in settings.items() if k in named or f"no_{k}" in named}
    warn_of_slow_bf16(settings)
    return Recipe(settings, given, types)


def method_of(argv: Sequence[str], methods: Mapping[str, tuple[type, ...]]) -> str:
    """Whose recipe `[RECIPE.yaml | --config RECIPE.yaml] [--key value ...]` is: the method whose
    dataclasses know the most of the keys it names; of equals the first. MissingFileError for a
    recipe that is not there.
    """
    path, flags = _recipe_path(list(argv))
    named = set(_read_yaml(path)) if path else set()
    for word in flags:
        if word.startswith("--"):
            key = word[2:].split("=")[0].replace("-", "_")
            named |= {key, key.removeprefix("no_")}
    known = {method: len(named & _fields(types)) for method, types in methods.items()}
    return max(known, key=lambda method: known[method])


def build(types: tuple[type, ...], settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """One instance of each dataclass from the keys of `settings` it has."""
    made = []
    for kind in types:
        names = {field.name for field in dataclasses.fields(kind) if field.init}
        try:
            made.append(kind(**{key: value for key, value in settings.items() if key in names}))
        except LlmkdError:
            raise
        except (ValueError, ImportError) as error:  # upstream's own checks of its arguments
            raise RecipeError(str(error)) from error
    return tuple(made)


def _fields(types: tuple[type, ...]) -> set[str]:
    return {field.name for kind in types for field in dataclasses.fields(kind) if field.init}


def _near(key: str, known: Mapping[str, Any]) -> list[str]:
    return [f"did you mean {match!r}?" for match in difflib.get_close_matches(key, known, n=1)] + [
        "`--help` lists every key"
    ]


def _recipe_path(argv: list[str]) -> tuple[Path | None, list[str]]:
    for place, word in enumerate(argv):
        if word.startswith("--config="):
            return Path(word.partition("=")[2]), argv[:place] + argv[place + 1 :]
    if "--config" in argv:
        place = argv.index("--config")
        if place + 1 >= len(argv):
            raise RecipeError("--config needs the path of a recipe")
        return Path(argv[place + 1]), argv[:place] + argv[place + 2 :]
    if argv and not argv[0].startswith("-"):
        return Path(argv[0]), argv[1:]
    return None, argv


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        from llmkd.shipped import shipped_recipes

        near = difflib.get_close_matches(str(path), [str(p) for p in shipped_recipes()], n=1)
        raise MissingFileError.of(
            "recipe",
            str(path),
            f"no such file (looked at {path.absolute()})",
            *(f"did you mean {match}?" for match in near),
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError.of("recipe", str(path), f"is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError.of("recipe", str(path), "must be a mapping of keys to values")
    _set_env(content.pop("env", None))
    return content


def _set_env(variables: Any) -> None:
    # The `env:` block of TRL's recipes.
    import os

    if variables is None:
        return
    if not isinstance(variables, dict):
        raise RecipeError.of("env", variables, "must be a mapping of names to values")
    os.environ.update({str(name): str(value) for name, value in variables.items()})


class _Keys:
    """The keys with the types of their flags, to which the values of a file are held, and those of
    mappings inside it: `arms`, `stages` and `stage_settings`.
    """

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        # A true-or-false key has a second action, --no_key, without a type; the first is the key.
        self.known = {action.dest: action for action in reversed(parser._actions)}
        self.never_null = {k for k, action in self.known.items() if action.default is not None}

    def typed(self, key: str, value: Any, shown: str) -> Any:
        """A scalar through the flag's own type; errors call it `shown`."""
        kind: Any = _plain(self.known[key].type)
        wanted = KINDS.get(getattr(kind, "__name__", ""))
        if value is None and wanted and key in self.never_null:
            raise RecipeError.of(shown, None, f"must be {wanted}", "leave it out for the default")
        if isinstance(value, (dict, list)) and wanted:
            raise RecipeError.of(shown, value, f"must be {wanted}, not a {type(value).__name__}")
        if value is None or isinstance(value, (dict, list)) or kind is None:
            return value
        if isinstance(value, bool) and kind in (int, float):
            raise RecipeError.of(shown, value, f"must be {kind.__name__}, not true or false")
        try:
            return cast(Any, self.known[key].type)(str(value))
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            named = "true or false" if wanted == KINDS["string_to_bool"] else kind.__name__
            raise RecipeError.of(shown, value, f"cannot be read as {named}") from error

    def inside(self, key: str, value: Any, at: str) -> Any:
        """A value with the settings in it typed. What has the right type already stays as it was
        written: keys of stages are hashes of it.
        """
        if isinstance(value, str) and key in NESTED:
            return self._of_json(key, value, at)
        if key in ("arms", "stage_settings") and isinstance(value, dict):
            return {name: self._mapping(inner, f"{at}.{name}") for name, inner in value.items()}
        if key == "stages" and isinstance(value, list):
            return [self._mapping(entry, f"{at}.{_name(entry)}") for entry in value]
        return value

    def _of_json(self, key: str, value: str, at: str) -> Any:
        try:
            given = json.loads(value)
        except json.JSONDecodeError:  # names of stages, or refused by whoever reads them
            return value
        found = self.inside(key, given, at)
        return value if found == given else found

    def _mapping(self, given: Any, at: str) -> Any:
        if not isinstance(given, dict):
            return given
        found = dict(given)
        for key in [key for key in given if key in self.known]:
            shown = f"{at}.{key}"
            value = self.typed(key, given[key], shown)
            same = isinstance(given[key], (int, float)) and value == given[key]  # 3 for 3.0
            found[key] = self.inside(key, given[key] if same else value, shown)
        return found


def _name(entry: Any) -> Any:
    """What errors call an entry of `stages`."""
    return entry.get("name", entry.get("stage")) if isinstance(entry, dict) else entry


def _plain(kind: Any) -> Any:
    """The type of a key; trl wraps that of one that may be null."""
    if getattr(kind, "__qualname__", "").startswith("_accept_none."):
        return kind.__closure__[0].cell_contents
    return kind


def help_text(prog: str, what: str, types: tuple[type, ...], *, everything: bool) -> str:
    """`--help` of a verb: its own keys, and with `everything` those of TrainingArguments too."""
    from transformers import TrainingArguments

    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    lines = [f"usage: {prog} [RECIPE.yaml | --config RECIPE.yaml] [--key value ...]", "", what]
    lines += [
        "",
        "--accelerate_config NAME  start on several processes: a shipped config or a path",
        "--num_processes N         with it: number of processes",
    ]
    for kind in types:
        fields = [f for f in dataclasses.fields(kind) if f.init and f.metadata.get("help")]
        own = [f for f in fields if everything or f.name not in inherited]
        if own:
            lines += ["", f"{(kind.__doc__ or kind.__name__).splitlines()[0]}"]
            lines += [line for f in own for line in _help_lines(f)]
    if not everything:
        lines += ["", "and every key of transformers.TrainingArguments: --help_all lists them"]
    return "\n".join(lines)


def _help_lines(field: dataclasses.Field[Any]) -> list[str]:
    import textwrap

    default = field.default
    shown = "" if default in (None, dataclasses.MISSING) else f" [{default}]"
    text = " ".join(str(field.metadata["help"]).replace("%%", "%").split())
    return [
        f"  --{field.name}{shown}",
        *textwrap.wrap(text, 90, initial_indent=" " * 6, subsequent_indent=" " * 6),
    ]
