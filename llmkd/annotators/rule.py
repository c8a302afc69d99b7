"""Responses compared by a Python function of the user's own."""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from llmkd.annotators.base import Item
from llmkd.annotators.checks import AGAIN, KEY, as_annotation, raised
from llmkd.data.places import way_to
from llmkd.errors import AnnotatorError, LlmkdError, MissingFileError, RecipeError
from llmkd.files import digest
from llmkd.labels.preference import Annotation

SHAPE = "def my_rule(prompt, responses): ...  # or (prompt, response); with `seed` if it draws"


class RuleAnnotator:
    """Asks `file.py:function` or `package.module:function` (or a function itself).

    `function(prompt, responses)` sees all K responses of a prompt and returns what `checks.FORMS`
    lists; `function(prompt, response)`, told by that name, is called for each and returns its
    score. `prompt` is a text or the messages of a chat. One that has a parameter `seed` gets an
    integer below 2**32 made of the run's seed and the row (and of the response, for one of a
    single response): a resumed run draws the same votes.

    RecipeError or MissingFileError for a name that leads nowhere and for another signature;
    AnnotatorError that names the row where the function raises or returns something else.
    """

    def __init__(
        self,
        function: str | Callable[..., Any],
        *,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        self._function = find_function(function) if isinstance(function, str) else function
        self.name = name or (function if isinstance(function, str) else _called(function))
        self.seed = seed
        if not callable(self._function):
            raise RecipeError.of("function", function, "is no function", "my_rules.py:function")
        self._each, self._seeded = _signature(self.name, self._function)
        self._source = _source(self._function)

    @property
    def fingerprint(self) -> str:
        """Hash of the source of the function's whole file, and of the seed where it takes one. What
        that file imports is not in it.
        """
        return digest(["rule", self._source, self.seed if self._seeded else None])

    def load(self, device: Any) -> None:
        """Nothing to load."""

    def release(self) -> None:
        """Nothing to give back."""

    def annotate(self, items: Sequence[Item]) -> list[Annotation]:
        """One call an item, or one a response."""
        return [self._one(item) for item in items]

    def _one(self, item: Item) -> Annotation:
        if self._each:
            found: Any = [self._call(item, response) for response in item.responses]
        else:
            found = self._call(item, None)
        return as_annotation(found, len(item.responses), name=self.name, row=item.row)

    def _call(self, item: Item, response: str | None) -> Any:
        options: dict[str, Any] = {}
        if self._seeded:
            # Of the response too: equal noise on all responses would cancel in their differences.
            options["seed"] = int(digest([self.seed, item.row, response]), 16) % 2**32
        prompt = copy.deepcopy(item.prompt)  # the function may change what it is given
        try:
            if response is None:
                return self._function(prompt, list(item.responses), **options)
            return self._function(prompt, response, **options)
        except Exception as error:
            raise AnnotatorError.of(
                KEY,
                self.name,
                f"row {item.row}: {raised(error)}",
                AGAIN,
            ) from error


def find_function(name: str) -> Callable[..., Any]:
    """The function that `file.py:function` or `package.module:function` names; the code is run from
    this machine, never downloaded. RecipeError or MissingFileError where there is none.
    """
    place, colon, function = name.rpartition(":")
    if not (place and colon and function.isidentifier()):
        raise RecipeError.of(
            KEY, name, "names no function", "my_rules.py:function", "my_package.module:function"
        )
    module = _file_module(name, place) if place.endswith(".py") else _installed(name, place)
    found = getattr(module, function, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value)]
        near = difflib.get_close_matches(function, known, n=1)
        raise RecipeError.of(
            KEY,
            name,
            f"{function} {'is not in' if found is None else 'is no function of'} {place}",
            *(f"did you mean {match!r}?" for match in near),
        )
    return found


def _file_module(name: str, place: str) -> ModuleType:
    path = Path(place).expanduser().absolute()
    if not path.is_file():
        raise MissingFileError.of(KEY, name, f"no such file (looked at {path})", *way_to(place))
    known = f"_llmkd_rule_{digest(str(path))}"
    spec = importlib.util.spec_from_file_location(known, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[known] = module  # dataclasses and pickle look a module up by its name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[known]
        raise _not_imported(name, error) from error
    return module


def _installed(name: str, place: str) -> ModuleType:
    try:
        return import_module(place)
    except Exception as error:
        raise _not_imported(name, error) from error


def _not_imported(name: str, error: Exception) -> LlmkdError:
    return RecipeError.of(
        KEY,
        name,
        f"cannot be imported: {raised(error)}",
        "install it (pip install -e FOLDER), or PYTHONPATH=FOLDER",
        "a single file is named with its ending: my_rules.py:function",
    )


def _signature(name: str, function: Callable[..., Any]) -> tuple[bool, bool]:
    """Whether it takes one response a call, and whether it takes `seed`."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # built in, without a signature
        return False, False
    if inspect.iscoroutinefunction(function):
        raise RecipeError.of(KEY, name, "is async, and nobody awaits it", "def, not async def")
    seeded, each = "seed" in parameters, "response" in parameters
    try:
        inspect.signature(function).bind("", [], **({"seed": 0} if seeded else {}))
        fits = not each or list(parameters)[1] == "response"
    except TypeError:
        fits = False
    if not fits:
        problem = f"takes {inspect.signature(function)}, not (prompt, responses)"
        raise RecipeError.of(KEY, name, problem, SHAPE) from None
    return each, seeded


def _source(function: Callable[..., Any]) -> str:
    """Hash of the file a function is written in, else of its own source, else its name."""
    try:
        path = inspect.getsourcefile(inspect.unwrap(function))
        if path and Path(path).is_file():
            return digest([_called(function), hashlib.sha256(Path(path).read_bytes()).hexdigest()])
        return digest(inspect.getsource(function))
    except (OSError, TypeError):
        return digest([getattr(function, "__module__", ""), _called(function)])


def _called(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)
