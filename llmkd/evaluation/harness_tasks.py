"""From what a user writes after `--tasks` to tasks lm_eval can run, with every mistake found early.

A task is a name lm_eval knows, a name found under an include path or among the tasks llmkd ships, a
glob over such names, a YAML file, or a folder of YAML files. lm_eval reads relative `data_files`
against the working directory; here the folder of the YAML and the run folder are tried too. Where a
path changes, lm_eval is given a small YAML that `include`s the original: its own, public mechanism.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from llmkd.errors import HubError, MissingExtraError, MissingFileError, RecipeError

# dataset_path values that read local files (the `datasets` packaged builders)
FILE_BUILDERS = {"arrow", "csv", "json", "pandas", "parquet", "text", "webdataset", "xml"}


@dataclass(frozen=True)
class TaskSet:
    """Tasks that exist and whose local files exist; nothing is downloaded until `build`."""

    names: tuple[str, ...]
    manager: Any
    sources: dict[str, str] = field(default_factory=dict)
    data_files: dict[str, list[str]] = field(default_factory=dict)

    def build(self) -> dict[str, list[Any]]:
        """Fresh lm_eval task objects by requested name; reads (and downloads) the data.

        Raises HubError where the data cannot be fetched, RecipeError where a task does not fit its
        data or needs what llmkd does not do (code execution, images).
        """
        return {name: self._build_one(name) for name in self.names}

    def _build_one(self, name: str) -> list[Any]:
        try:
            loaded = self.manager.load([name])
        except ConnectionError as error:
            raise HubError.of(
                "tasks",
                name,
                f"its data cannot be fetched: {error}",
                "check the network, or fetch once and set HF_HUB_OFFLINE=1",
                "or write a task YAML with `dataset_path: json` over a local file",
            ) from error
        except Exception as error:  # lm_eval, jinja and datasets raise whatever they like here
            where = self.sources.get(name, "lm_eval")
            raise RecipeError.of(
                "tasks",
                name,
                f"lm_eval cannot build it: {type(error).__name__}: {error}",
                f"compare the fields of {where} with the columns of its data",
            ) from error
        for task in loaded["tasks"].values():
            unsafe, images = (getattr(task, f, False) for f in ("UNSAFE_CODE", "MULTIMODAL"))
            if unsafe or images:
                what = "runs generated code" if unsafe else "needs images or sound"
                raise RecipeError.of("tasks", name, what, "run it with the stock `lm_eval`")
        group = loaded.get("groups", {}).get(name)
        return [group] if group is not None else list(loaded["tasks"].values())


def shipped_task_folders() -> list[Path]:
    """The `tasks/` folders of the recipes: in the wheel, else at the root of the checkout."""
    here = Path(__file__).resolve()
    shipped, checkout = here.parents[1] / "_shipped" / "recipes", here.parents[2]
    if shipped.is_dir():
        return sorted(shipped.glob("*/tasks"))
    is_checkout = (checkout / "pyproject.toml").is_file()
    return sorted(checkout.glob("recipes/*/tasks")) if is_checkout else []


def import_lm_eval() -> Any:
    """The `lm_eval` module, or MissingExtraError with the pip command."""
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise MissingExtraError.of(
            "lm_eval", None, f"cannot be imported ({error})", "pip install 'llmkd[eval]'"
        ) from error
    return lm_eval


@contextmanager
def open_tasks(
    specs: Sequence[str], include_path: Sequence[Path] = (), data_roots: Sequence[Path] = ()
) -> Iterator[TaskSet]:
    """Resolve `specs`; the set is valid inside the block, which owns a temporary folder.

    `data_roots` (run folders) are tried for relative data files: before the working directory for
    tasks that llmkd ships, after it and the YAML's own folder for all others.
    Raises RecipeError (unknown task, nothing asked), MissingFileError (YAML, folder, data file).
    """
    import_lm_eval()
    if not specs:
        raise RecipeError.of("tasks", list(specs), "is empty", "name one: --tasks heldout_bpb")
    for folder in include_path:
        if not Path(folder).is_dir():
            raise MissingFileError.of("include_path", str(folder), "is not a folder")
    with TemporaryDirectory(prefix="llmkd-tasks-") as scratch:
        finder = _Finder(Path(scratch), [*shipped_task_folders(), *map(Path, include_path)])
        names = finder.resolve(specs)
        sources, data_files = finder.localise(names, [Path(root) for root in data_roots])
        yield TaskSet(names, finder.manager, sources, data_files)


class _Finder:
    """Holds lm_eval's index while names are looked up and paths made absolute."""

    def __init__(self, scratch: Path, folders: list[Path]) -> None:
        self.scratch = scratch
        self.folders = folders
        self.manager = self._index(folders)
        self.wrapped: dict[Path, Path] = {}  # YAML we wrote -> the one it includes
        self.beside: dict[str, Any] = {}  # tasks from YAML files named on the command line

    @staticmethod
    def _index(folders: Sequence[Path], include_defaults: bool = False) -> Any:
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=list(folders), include_defaults=include_defaults)  # type: ignore[arg-type]

    def resolve(self, specs: Sequence[str]) -> tuple[str, ...]:
        """Names in the order asked, each once. Indexing lm_eval's own 14,000 tasks takes 10 s, so
        it is done only when the local ones do not answer."""
        names: list[str] = []
        plain: list[int] = []
        for spec in specs:
            if self._is_path(spec):
                names += self._from_path(Path(spec).expanduser())
            else:
                plain.append(len(names))
                names.append(spec)
        self.manager.task_index.update(self.beside)
        if not all(self._is_local(name) for name in names):
            self.manager = self._index(self.folders, include_defaults=True)
            self.manager.task_index.update(self.beside)
        expanded: list[str] = []
        for position, name in enumerate(names):
            expanded += self._match(name) if position in plain else [name]
        return tuple(dict.fromkeys(expanded))

    def _is_path(self, spec: str) -> bool:
        if spec.endswith((".yaml", ".yml")) or "/" in spec:
            return True
        return spec not in self.manager.task_index and Path(spec).is_dir()

    def _is_local(self, name: str) -> bool:
        """Whether the local index alone can run it; a group's members may be anywhere."""
        entry = self.manager.task_index.get(name)
        return entry is not None and entry.kind.name != "GROUP"

    def _match(self, name: str) -> list[str]:
        index = self.manager.task_index
        if name in index:
            return [name]
        if any(sign in name for sign in "*?["):
            found = self.manager.match_tasks([name])
            if found:
                return list(found)
        near = difflib.get_close_matches(name, [*self.manager.all_tasks, *self.beside], n=5)
        ways = ["`lm_eval ls tasks` lists all; a local YAML needs --include_path or its path"]
        if near:
            ways.insert(0, f"did you mean {', '.join(near)}?")
        raise RecipeError.of("tasks", name, "no such task", *ways)

    def _from_path(self, path: Path) -> list[str]:
        """Task names of one YAML file, or of every task file directly inside a folder."""
        if not path.exists():
            way = "give a registered name, a YAML file or a folder of them"
            raise MissingFileError.of("tasks", str(path), "no such file or folder", way)
        if path.is_file() and path.suffix != ".yaml":
            raise RecipeError.of("tasks", str(path), "lm_eval reads files that end in .yaml")
        folder = path if path.is_dir() else path.parent
        files = sorted(folder.glob("*.yaml"), key=lambda file: (file.name != path.name, file.name))
        if not files:
            raise MissingFileError.of("tasks", str(path), "holds no .yaml file")
        found = self._wrap_siblings(files)
        if path.is_file():
            names = [name for name, file in found.items() if file == path.resolve()]
            if not names:
                raise RecipeError.of("tasks", str(path), _why_no_task(path))
            return names
        names = [name for name in found if self.beside[name].kind.name != "GROUP"]
        if not names:
            raise RecipeError.of("tasks", str(path), "none of its .yaml files defines a task")
        return names

    def _wrap_siblings(self, files: Sequence[Path]) -> dict[str, Path]:
        """Index the files of one folder without walking what lies below it (a .venv, say)."""
        folder = self.scratch / f"beside-{len(self.wrapped)}"
        folder.mkdir()
        for number, file in enumerate(files):
            self._wrap(folder / f"{number:06}.yaml", {"include": str(file.resolve())})
        index = self._index([folder]).task_index
        self.beside.update(index)
        return {n: self.wrapped[e.yaml_path] for n, e in index.items() if e.yaml_path is not None}

    def _wrap(self, path: Path, fields: dict[str, Any]) -> None:
        path.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
        self.wrapped[path] = Path(fields["include"])

    def localise(
        self, names: Sequence[str], data_roots: Sequence[Path]
    ) -> tuple[dict[str, str], dict[str, list[str]]]:
        """Make the data files of every task behind `names` absolute: (YAML, files) by task."""
        sources: dict[str, str] = {}
        data_files: dict[str, list[str]] = {}
        folder = self.scratch / "localised"
        folder.mkdir()
        for name in self._leaves(names):
            entry: Any = self.manager.task_index[name]
            if entry.yaml_path is None:
                continue
            original = self.wrapped.get(entry.yaml_path) or Path(entry.yaml_path).resolve()
            sources[name] = str(original)
            cfg = entry.cfg or {}
            kwargs = cfg.get("dataset_kwargs") or {}
            if cfg.get("dataset_path") not in FILE_BUILDERS or not kwargs.get("data_files"):
                continue
            search = _Search(name, original, self._roots(original, data_roots))
            absolute = kwargs | {"data_files": search.every(kwargs["data_files"])}
            if search.found:
                data_files[name] = search.found
                fields = {"include": str(original), "task": name, "tag": []}
                fields["dataset_kwargs"] = absolute
                self._wrap(folder / f"{len(data_files):06}.yaml", fields)
        # the entry replaces the original's; tags and groups keep pointing at the name
        self.manager.task_index.update(self._index([folder]).task_index)
        return sources, data_files

    @staticmethod
    def _roots(original: Path, data_roots: Sequence[Path]) -> list[Path]:
        here = [Path.cwd(), original.parent]
        shipped = any(original.is_relative_to(folder) for folder in shipped_task_folders())
        return list(dict.fromkeys([*data_roots, *here] if shipped else [*here, *data_roots]))

    def _leaves(self, names: Sequence[str]) -> list[str]:
        """Tasks behind groups and tags, each once; members written inline have no entry."""
        leaves: dict[str, None] = {}
        waiting, seen = list(names), set()
        while waiting:
            name = waiting.pop(0)
            entry = self.manager.task_index.get(name)
            if entry is None or name in seen:
                continue
            seen.add(name)
            if entry.kind.name == "TAG":
                waiting += sorted(entry.tags)
            elif entry.kind.name == "GROUP":
                waiting += _members((entry.cfg or {}).get("task"))
            else:
                leaves[name] = None
        return list(leaves)


@dataclass
class _Search:
    """Looks for the data files of one task in `roots`, in order."""

    task: str
    original: Path
    roots: list[Path]
    found: list[str] = field(default_factory=list)

    def every(self, value: Any) -> Any:
        """`data_files` in the shape it came in (text, list, or either by split), made absolute."""
        if isinstance(value, dict):
            return {split: self.every(one) for split, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.every(one) for one in value]
        return self._one(str(value))

    def _one(self, value: str) -> str:
        if "://" in value:
            return value
        path = Path(value).expanduser()
        for root in [Path("/")] if path.is_absolute() else self.roots:
            full = root / path
            if full.is_file() or (any(sign in value for sign in "*?[") and _matches(root, path)):
                self.found.append(str(full.resolve()))
                return self.found[-1]
        ways = [] if path.is_absolute() else [f"looked in {', '.join(map(str, self.roots))}"]
        if value == "held_out.jsonl":
            ways.append(
                "a run folder of llmkd salt holds one: name it as MODEL, or start where it lies"
            )
        else:
            ways.append("run in the folder that the path starts from, as lm_eval would have it")
        ways.append("or put the file there, or write its absolute path into the YAML")
        key = f"{self.original}: data_files of {self.task}"
        raise MissingFileError.of(key, value, "no such file", *ways)


def _members(field_task: Any) -> list[str]:
    """Names in a group's `task:` field: texts, or mappings that name a task or hold a group."""
    if isinstance(field_task, str):
        return [field_task]
    names: list[str] = []
    for one in field_task or []:
        if isinstance(one, dict):
            names += _members(one.get("task")) + _members(one.get("group"))
        else:
            names.append(one)
    return names


def _matches(root: Path, pattern: Path) -> bool:
    relative = pattern.relative_to(pattern.anchor) if pattern.is_absolute() else pattern
    return next(root.glob(str(relative)), None) is not None


def _why_no_task(path: Path) -> str:
    """What lm_eval's index holds against a YAML it silently skipped."""

    class Loader(yaml.SafeLoader):
        """Knows lm_eval's `!function` tags without importing what they name."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: suffix)
    try:
        fields = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return f"is not YAML: {error}"
    if not isinstance(fields, dict):
        return "is not a mapping of keys to values"
    if not {"task", "group", "class", "include"} & fields.keys():
        return "has no `task:` key, so lm_eval takes it for a template"
    return "lm_eval does not read it; is the file that it includes there?"
