"""How the package's modules may import one another."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import consequentialism as cw

PACKAGE = Path(cw.__file__).parent
# Each folder builds on those behind it; modules of the package's own folder (options, precision, ...) serve all.
FOLDERS = ("demo", "experiments", "insight", "optim", "nn", "functional", "autograd", "solve", "backend")
UPWARD = {("backend", "solve.cost")}  # which counts operations


def modules() -> dict[str, Path]:
    """Every module of the package by its name without the package's."""
    files = {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}
    return {name: file for name, file in files.items() if "__init__" not in name}


def imports(name: str, file: Path, known: dict[str, Path]) -> set[str]:
    """The modules of this package that one of them imports when it runs."""
    names: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = name.split(".")[: -node.level]
            source = ".".join([*folder, *([node.module] if node.module else [])])
            names |= {".".join(filter(None, (source, alias.name))) for alias in node.names} | {source}
    return names & known.keys()


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(name, file, known) for name, file in known.items()}


def test_imports_are_seen(graph: dict[str, set[str]]) -> None:
    assert "autograd.linear" in graph["functional.linear"]
    assert {name.split(".")[0] for name in graph if "." in name} == set(FOLDERS)


def test_a_folder_builds_on_those_below_it(graph: dict[str, set[str]]) -> None:
    height = {folder: -place for place, folder in enumerate(FOLDERS)}
    for name, used in graph.items():
        own = name.split(".")[0]
        above = [one for one in used if height.get(one.split(".")[0], -len(FOLDERS)) > height.get(own, 1)]
        assert not [one for one in above if (own, one) not in UPWARD], f"{name} imports {above}"


def test_there_is_no_circle(graph: dict[str, set[str]]) -> None:
    left = dict(graph)
    while left:
        free = {name for name, used in left.items() if not used & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {name: used for name, used in left.items() if name not in free}
