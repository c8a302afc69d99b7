"""The house is a test: rooms, the direction of imports, sizes, and that what a README names
exists.
"""

import ast
import re
from pathlib import Path

import pytest

import llmkd

ROOT = Path(llmkd.__file__).parent
REPO = ROOT.parent
ROOMS = (
    "errors types files shipped objectives data labels selection teachers models annotators "
    "trainers evaluation hub methods launch cli"
).split()
FILES = sorted(
    p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py" and "_shipped" not in p.parts
)
SCRIPTS = sorted((REPO / "scripts").rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llmkd."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "llmkd":
            yield from (alias.name for alias in node.names if alias.name in ROOMS)
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("llmkd."))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_point_down(path):
    here = room(path)
    assert here in ROOMS, f"{here} is a room nobody planned"
    for there in imported_rooms(ast.parse(path.read_text())):
        assert ROOMS.index(there) <= ROOMS.index(here), f"{here} must not import {there}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_are_small(path):
    text = path.read_text()
    limit = 150 if room(path) == "trainers" and path.name not in ("config.py", "base.py") else 400
    lines = [line for line in text.splitlines() if line.strip()]
    assert text.count("\n") <= 400 and len(lines) <= limit
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_things_have_docstrings(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} says nothing about itself"


def test_objectives_know_nothing_of_transformers():
    for path in (ROOT / "objectives").glob("*.py"):
        assert "transformers" not in path.read_text()


def test_scripts_hold_no_logic():
    for path in SCRIPTS:
        if path.name.startswith("run_"):
            assert path.read_text().count("\n") < 20


def test_paths_named_in_markdown_exist():
    wanted = re.compile(r"`((?:recipes|scripts|accelerate_configs|llmkd|tests)/[\w./-]+)`")
    for page in [
        REPO / "README.md",
        *REPO.glob("recipes/*/README.md"),
        *REPO.glob("scripts/**/*.md"),
    ]:
        for name in wanted.findall(page.read_text()):
            assert (REPO / name.rstrip("./")).exists(), f"{page.name} names {name}"
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
