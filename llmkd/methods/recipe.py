"""From a YAML file and flags to typed settings, with one clear error for every slip."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import yaml
from trl import TrlParser

from llmkd.errors import LlmkdError, MissingFileError, RecipeError

SECRETS = ("hub_token",)
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
        for key, inner in (("dataset_mixture", "id"), ("teachers", "model_name_or_path")):
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


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message}\n  - `--help` lists every key")


def read_recipe(argv: Sequence[str], types: tuple[type, ...]) -> Recipe:
    """Parse `[RECIPE.yaml | --config RECIPE.yaml] [--key value ...]`.

    Raises MissingFileError for a recipe that is not there and RecipeError for a file that is no
    mapping, an unknown key (with the nearest known one) or a value of the wrong type.
    """
    path, flags = _recipe_path(list(argv))
    parser = _Parser(cast(Any, types), prog="llmkd", allow_abbrev=False)
    # A true-or-false key has a second action, --no_key, without a type; the first one is the key.
    known = {action.dest: action for action in reversed(parser._actions)}
    from_file = _read_yaml(path) if path else {}
    for key in from_file:
        if key not in known:
            raise RecipeError.of(key, from_file[key], f"{path} has no such key", *_near(key, known))
    typed = {key: _typed(known[key], key, value) for key, value in from_file.items()}
    parser.set_defaults_with_config(**typed)
    values, rest = parser.parse_known_args(flags)
    if rest:
        name = rest[0].lstrip("-").split("=")[0].replace("-", "_")
        if rest[0].startswith("-"):
            raise RecipeError.of(rest[0], " ".join(rest[1:2]), "no such flag", *_near(name, known))
        raise RecipeError(f"{rest[0]!r} stands where no value is expected; flags are --key value")
    settings = {key: value for key, value in vars(values).items() if key in _fields(types)}
    named = set(typed) | {flag.lstrip("-").split("=")[0].replace("-", "_") for flag in flags}
    # --no_packing names packing
    given = {k: v for k, v in settings.items() if k in named or f"no_{k}" in named}
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


def _typed(action: argparse.Action, key: str, value: Any) -> Any:
    """A scalar of the file through the flag's own type, so that both are held to the same rule."""
    if value is None or isinstance(value, (dict, list)) or action.type is None:
        if isinstance(value, (dict, list)) and action.type in (int, float):
            raise RecipeError.of(key, value, f"must be a number, not a {type(value).__name__}")
        return value
    if isinstance(value, bool) and action.type in (int, float):
        raise RecipeError.of(key, value, f"must be {action.type.__name__}, not true or false")
    try:
        return action.type(str(value))  # type: ignore[operator]
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        wanted = getattr(action.type, "__name__", str(action.type))
        wanted = "true or false" if wanted == "string_to_bool" else wanted
        raise RecipeError.of(key, value, f"cannot be read as {wanted}") from error


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
