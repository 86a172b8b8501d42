"""The house: which room may know which. Imports are read from the source, those for type checkers and those inside of
functions too."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the roof down; a room imports only from rooms below it. docs/ARCHITECTURE.md shows the same list.
ROOMS = (
    "benchmarks",
    "cli",
    "bench",
    "jobs",
    "plan",
    "training",
    "rollout",
    "policy",
    "kernels",
    "recipe",
    "memory",
    "rewards",
    "data",
    "run",
    "faults",
    "objective",
    "errors",
)
# Rooms that may know fewer than those below them.
ONLY = {"kernels": {"objective", "errors"}}
# Wings of a room that do not know each other.
APART = ("kernels.sweep", "kernels.decode", "kernels.layer")
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 80


class Arrow(NamedTuple):
    """One import: `source` and `target` are modules without `lowvram_grpo.`; `place` is file:line."""

    source: str
    target: str
    place: str

    def __str__(self) -> str:
        return f"{self.place}: {self.source} imports {self.target}"


def modules(root: Path) -> dict[str, Path]:
    """Module -> file, of the package, of kernels/ and of benchmarks/; the package's face is `__init__`."""
    found = {}
    for folder, prefix in (("lowvram_grpo", ()), ("kernels", ("kernels",)), ("benchmarks", ("benchmarks",))):
        for path in sorted((root / folder).rglob("*.py")):
            parts = (*prefix, *path.relative_to(root / folder).with_suffix("").parts)
            found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


@cache
def arrows(root: Path) -> list[Arrow]:
    """Every import of one module of the house by another."""
    house = modules(root)
    found = []
    for source, path in house.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets = {_inside(name, source, house) for name in _imported(node, source, house)} - {None, source}
            place = f"{path.relative_to(root).as_posix()}:{getattr(node, 'lineno', 0)}"
            found += [Arrow(source, target, place) for target in sorted(targets)]
    return found


def _imported(node: ast.AST, source: str, house: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            is_package = house[source].stem == "__init__"
            package = ["lowvram_grpo", *source.split(".")][: -node.level + (1 if is_package else 0) or None]
            base = ".".join([*package, *filter(None, [node.module])])
        yield from (f"{base}.{alias.name}" for alias in node.names)


def _inside(name: str, source: str, house: dict[str, Path]) -> str | None:
    """The module of the house that an imported name belongs to."""
    if name.startswith("lowvram_grpo."):
        name = name.removeprefix("lowvram_grpo.")
    elif source.startswith("benchmarks."):
        name = f"benchmarks.{name}"  # scripts that import the one beside them
    else:
        return None
    whole = name
    while name:
        if name in house:
            return name
        name = name.rpartition(".")[0]
    # What the face offers. The version is no more than a number.
    return "__init__" if source.split(".")[0] != "benchmarks" and whole != "__version__" else None


def room(module: str) -> str:
    return module.split(".")[0]


def upward(found: list[Arrow]) -> list[str]:
    """Arrows that no room may have, each as one line."""
    said = []
    for arrow in found:
        here, there = room(arrow.source), room(arrow.target)
        if here == "__init__" or here == there:
            continue
        if there == "__init__" or ROOMS.index(there) < ROOMS.index(here):
            said.append(f"{arrow}, which stands above it")
        elif there not in ONLY.get(here, {there}):
            said.append(f"{arrow}; {here} may know {' and '.join(sorted(ONLY[here]))} alone")
    for arrow in found:
        here, there = (".".join(module.split(".")[:2]) for module in (arrow.source, arrow.target))
        if here != there and here in APART and there in APART:
            said.append(f"{arrow}; the two wings do not know each other")
    return said


def circles(found: list[Arrow]) -> list[str]:
    """Circles of files, each as the imports that close it."""
    known: dict[str, list[Arrow]] = {}
    for arrow in found:
        known.setdefault(arrow.source, []).append(arrow)
    done: set[str] = set()
    said: list[str] = []

    def visit(module: str, way: list[Arrow]) -> None:
        on_the_way = [arrow.source for arrow in way]
        if module in on_the_way:
            said.append("; ".join(map(str, way[on_the_way.index(module) :])))
            return
        if module in done:
            return
        for arrow in known.get(module, ()):
            visit(arrow.target, [*way, arrow])
        done.add(module)

    for module in sorted(known):
        visit(module, [])
    return said


def test_no_import_goes_up():
    found = arrows(ROOT)
    assert len(found) > 400
    said = upward(found)
    assert not said, "\n".join(said)


def test_no_circle_between_files():
    said = circles(arrows(ROOT))
    assert not said, "\n".join(said)


def _house(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    "line",
    [
        "from lowvram_grpo.jobs.train import run",
        "from lowvram_grpo.jobs import train",
        "import lowvram_grpo.jobs.train",
        "from ..jobs.train import run",
        "from lowvram_grpo import UserError",
        "if TYPE_CHECKING:\n    from lowvram_grpo.jobs.train import run",
        "def late():\n    from lowvram_grpo.jobs import train",
    ],
)
def test_a_planted_upward_import_is_named_with_its_line(line, tmp_path):
    files = {"lowvram_grpo/__init__.py": "", "lowvram_grpo/jobs/train.py": "", "lowvram_grpo/policy/load.py": line}
    (said,) = upward(arrows(_house(tmp_path, files)))
    number = 1 + line.count("\n")
    assert said.startswith(f"lowvram_grpo/policy/load.py:{number}: policy.load imports ")


def test_kernels_know_the_maths_and_no_more(tmp_path):
    files = {
        "kernels/linear_logps.py": "from lowvram_grpo.objective import x\nfrom lowvram_grpo.memory.host import upload",
        "kernels/sweep/fold.py": "from lowvram_grpo.kernels.decode.noise import noise",
        "kernels/decode/noise.py": "",
        "lowvram_grpo/objective.py": "",
        "lowvram_grpo/memory/host.py": "",
    }
    memory, wing = upward(arrows(_house(tmp_path, files)))
    assert "kernels/linear_logps.py:2" in memory and "may know errors and objective alone" in memory
    assert "kernels/sweep/fold.py:1" in wing and "wings" in wing


def test_a_planted_circle_is_named_with_its_lines(tmp_path):
    files = {
        "lowvram_grpo/run/a.py": "from lowvram_grpo.run.b import x",
        "lowvram_grpo/run/b.py": "\nfrom lowvram_grpo.run.c import x",
        "lowvram_grpo/run/c.py": "def late():\n    from lowvram_grpo.run import a",
        "benchmarks/d.py": "import e",
        "benchmarks/e.py": "from d import x",
    }
    said = circles(arrows(_house(tmp_path, files)))
    assert len(said) == 2
    assert all(f"lowvram_grpo/run/{place}" in said[1] for place in ("a.py:1", "b.py:2", "c.py:2"))


def test_the_document_shows_the_same_rooms():
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    plan = re.search(r"## The house\n.*?```\n(.*?)```", text, re.S).group(1)
    shown = re.findall(r"^(\w+)(?:/|\.py)  ", plan, re.M)
    assert tuple(shown) == ROOMS


def test_nothing_grows_beyond_what_a_person_reads_at_once():
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    large = []
    for module, path in modules(ROOT).items():
        source = path.read_text(encoding="utf-8")
        if source.count("\n") > MOST_LINES:
            large.append(f"{module}: {source.count(chr(10))} lines")
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef) or any("jit" in ast.unparse(d) for d in node.decorator_list):
                continue
            lines = node.end_lineno - node.lineno + 1
            if lines > MOST_LINES_OF_A_FUNCTION and f"`{node.name}`" not in text:
                large.append(f"{module}.{node.name}: {lines} lines")
    assert not large, "\n".join(large)


def test_tests_stand_in_the_rooms_of_what_they_test():
    beside = {"benchmarks", "gpu", "invariants", "masked_cuda"}
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= {*ROOMS, *beside}
    files = [path for path in (ROOT / "tests").rglob("*.py") if path.is_file()]
    assert not [f"{p.name}: {n} lines" for p in files if (n := p.read_text("utf-8").count("\n")) > MOST_LINES]


def test_what_the_document_names_is_there():
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    files = [
        path for folder in ("lowvram_grpo", "kernels", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    ]
    named = re.findall(r"`((?:[\w-]+/)*\w+\.py)(?::([\w.]+))?`", text)
    assert len(named) > 80 and any(function for _, function in named)
    missing = []
    for file, function in named:
        found = [path for path in files if f"/{path.relative_to(ROOT).as_posix()}".endswith(f"/{file}")]
        defined = {name for path in found for name in _defined(path)}
        if not found or (function and function not in defined):
            missing.append(f"{file}:{function}" if function else file)
    assert not missing, ", ".join(missing)


def _defined(path: Path) -> Iterator[str]:
    """Functions and classes of a file; methods with and without their class in front."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef))
