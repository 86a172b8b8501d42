"""The house: which room may know which. Imports are read from the source: those for type checkers, those inside of
functions, and names of modules in strings, by which importlib would load them."""

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
    "integrations",
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
FACE = "lowvram_grpo"
# Folders of the package without code.
DATA = ("demo", "presets")
# Rooms that may know fewer than those below them.
ONLY = {"kernels": {"objective", "errors"}}
# Wings of a room that do not know each other.
APART = ("kernels.sweep", "kernels.decode", "kernels.layer", "kernels.recurrent")


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
            targets = {inside(name, source, house) for name in imported(node, source, house)} - {None, source}
            place = f"{path.relative_to(root).as_posix()}:{getattr(node, 'lineno', 0)}"
            found += [Arrow(source, target, place) for target in sorted(targets)]
    return found


def imported(node: ast.AST, source: str, house: dict[str, Path]) -> Iterator[str]:
    """Names of modules and of what is in them, as `a.b.c`."""
    if isinstance(node, ast.Import):
        yield from (f"{FACE}." if alias.name == FACE else alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            is_package = house[source].stem == "__init__"
            package = [FACE, *filter(lambda part: part != "__init__", source.split("."))]
            package = package[: -node.level + (1 if is_package else 0) or None]
            base = ".".join([*package, *filter(None, [node.module])])
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Attribute):  # behind any import that binds the package
        yield from (name for name in [ast.unparse(node)] if name.startswith(f"{FACE}."))
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield from re.findall(rf"^{FACE}\.[\w.]*$", node.value)


def inside(name: str, source: str, house: dict[str, Path]) -> str | None:
    """The module of the house that an imported name belongs to; `__init__` is the face, and what nobody can tell."""
    above = source.startswith("benchmarks.")
    first, dot, rest = name.partition(".")
    if first == FACE and dot:
        if rest == "__version__" or rest.split(".")[0] in DATA:  # no more than a number; no code
            return None
        return _module(rest, house) or (None if above else "__init__")
    if above:  # scripts that import the one beside them
        return _module(f"benchmarks.{name}", house)
    # A checkout has these on its path too; `kernels` alone is Hugging Face's.
    return _module(name, house) if first in ("benchmarks", "kernels") else None


def _module(name: str, house: dict[str, Path]) -> str | None:
    while name:
        if name in house:
            return name
        name = name.rpartition(".")[0]
    return None


def room(module: str) -> str:
    return module.split(".")[0]


def upward(found: list[Arrow]) -> list[str]:
    """Arrows that no room may have, each as one line."""
    said = []
    for arrow in found:
        here, there = room(arrow.source), room(arrow.target)
        if here == "__init__" or here == there:
            continue
        if not {here, there} <= {*ROOMS, "__init__"}:
            said.append(f"{arrow}; there is no such room")
        elif there == "__init__" or ROOMS.index(there) < ROOMS.index(here):
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


def house_of(folder: Path, files: dict[str, str]) -> Path:
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
        "from lowvram_grpo import *",
        "from lowvram_grpo import jobs",
        "from lowvram_grpo.jobs import *",
        "import lowvram_grpo.jobs.train as jobs",
        "import lowvram_grpo as face",
        "from .. import jobs",
        "from benchmarks.timing import median",
        "from kernels.runtime import jit",
        "load = importlib.import_module('lowvram_grpo.jobs.train')",
        "load = importlib.import_module('.train', 'lowvram_grpo.jobs')",
        "load = importlib.import_module(f'lowvram_grpo.{room}')",
        "import lowvram_grpo.memory.ledger; lowvram_grpo.jobs.train.run()",
        "from lowvram_grpo.attic.trunk import x",
        "if TYPE_CHECKING:\n    from lowvram_grpo.jobs.train import run",
        "def late():\n    from lowvram_grpo.jobs import train",
    ],
)
def test_a_planted_upward_import_is_named_with_its_line(line, tmp_path):
    others = ("__init__", "jobs/__init__", "jobs/train", "attic/trunk", "memory/ledger")
    files = {f"lowvram_grpo/{name}.py": "" for name in others}
    files |= {"kernels/runtime.py": "", "benchmarks/timing.py": "", "lowvram_grpo/memory/guard.py": line}
    said = upward(arrows(house_of(tmp_path, files)))
    number = 1 + line.count("\n")
    assert said and all(s.startswith(f"lowvram_grpo/memory/guard.py:{number}: memory.guard imports ") for s in said)


@pytest.mark.parametrize(
    "line",
    [
        "import lowvram_grpo.errors as errors",
        "from ..errors import UserError",
        "from . import ledger",
        "from kernels import get_kernel  # Hugging Face's",
        "from lowvram_grpo import __version__",
        "places = files('lowvram_grpo.presets'), files('lowvram_grpo.memory')",
        "known = name == 'lowvram_grpo'",
    ],
)
def test_what_lies_below_may_be_known(line, tmp_path):
    files = {f"lowvram_grpo/{name}.py": "" for name in ("__init__", "errors", "memory/__init__", "memory/ledger")}
    found = arrows(house_of(tmp_path, {**files, "kernels/head.py": "", "lowvram_grpo/memory/guard.py": line}))
    assert not upward(found) and not circles(found)


def test_kernels_know_the_maths_and_no_more(tmp_path):
    files = {
        "kernels/linear_logps.py": "from lowvram_grpo.objective import x\nfrom lowvram_grpo.memory.host import upload",
        "kernels/sweep/fold.py": "from lowvram_grpo.kernels.decode.noise import noise",
        "kernels/decode/noise.py": "",
        "lowvram_grpo/objective.py": "",
        "lowvram_grpo/memory/host.py": "",
    }
    memory, wing = upward(arrows(house_of(tmp_path, files)))
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
    said = circles(arrows(house_of(tmp_path, files)))
    assert len(said) == 2
    assert all(f"lowvram_grpo/run/{place}" in said[1] for place in ("a.py:1", "b.py:2", "c.py:2"))


def test_the_document_shows_the_same_rooms():
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    plan = re.search(r"## The house\n.*?```\n(.*?)```", text, re.S).group(1)
    shown = re.findall(r"^(\w+)(?:/|\.py)  ", plan, re.M)
    assert tuple(shown) == ROOMS
