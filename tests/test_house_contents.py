"""What stands in the house: folders that are rooms, files that a person reads at once, tests in the rooms of what they
test, and a document that names what is there."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.test_house import FACE, ROOMS, ROOT, house_of, imported, inside, modules, room

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 80
# Tests that belong to no room.
BESIDE = ("examples", "families", "gpu", "house", "invariants", "masked_cuda")
# Tests that take their room's code by another way than an import.
BY_ANOTHER_WAY = {
    "cli/test_best_command.py": "the command line, by the helpers of test_errors.py",
    "cli/test_hub_reachable.py": "a process of its own",
    "cli/test_push_command.py": "the command line, by the helpers of test_errors.py",
    "cli/test_demo_assets.py": "what `lowvram-grpo demo` trains",
    "cli/test_resume_command.py": "the command line, by the helpers of test_errors.py",
    "cli/test_shell.py": "a process of its own",
    "plan/test_baseline.py": "by baseline.py beside it",
    "recipe/test_settings.py": "GRPOConfig, by the face",
    "rewards/test_accuracy_forms.py": "by benchmarks/accuracy_forms.py",
    "training/test_probe.py": "a trainer, by the helpers of test_out_of_memory.py",
    "training/test_trl_script.py": "a script as users write it",
    "training/test_trl_steps.py": "two trainers, by trl_pair.py beside it",
}


def test_every_folder_is_a_room_and_goes_into_the_wheel():
    house = modules(ROOT)
    assert {room(module) for module in house} == {*ROOMS, "__init__", "demo"}
    folders = {path.parent.relative_to(ROOT) for module, path in house.items() if room(module) != "benchmarks"}
    mapped = {".".join(folder.parts if folder.parts[0] == FACE else (FACE, *folder.parts)) for folder in folders}
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert {*packages} == mapped | {f"{FACE}.presets"}


def too_large(root: Path) -> list[str]:
    said = []
    for module, path in modules(root).items():
        source = path.read_text(encoding="utf-8")
        if (lines := len(source.splitlines())) > MOST_LINES:
            said.append(f"{module}: {lines} lines")
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            lines, kernel = node.end_lineno - node.lineno + 1, any("jit" in ast.unparse(d) for d in node.decorator_list)
            if lines > MOST_LINES_OF_A_FUNCTION and not (kernel and room(module) == "kernels"):
                said.append(f"{module}.{node.name}: {lines} lines")
    return said


def test_nothing_grows_beyond_what_a_person_reads_at_once(tmp_path):
    assert not too_large(ROOT)
    function = "def run():\n" + "    pass\n" * MOST_LINES_OF_A_FUNCTION
    files = {
        "kernels/fold.py": f"@jit\n{function}", "lowvram_grpo/cli/chat.py": f"@jit\nasync {function}",
        "lowvram_grpo/cli/app.py": "\n" * (MOST_LINES + 1), "lowvram_grpo/cli/eval.py": "\n" * MOST_LINES,
    }  # fmt: skip
    assert too_large(house_of(tmp_path, files)) == ["cli.app: 401 lines", "cli.chat.run: 81 lines"]


def misplaced(root: Path) -> list[str]:
    """Test files that stand in no room, or in one from which they import nothing."""
    house, said = modules(root), []
    for path in sorted((root / "tests").rglob("test_*.py")):
        place = path.relative_to(root / "tests")
        here = place.parts[0] if len(place.parts) > 1 else path.stem.split("_")[1]
        if here in BESIDE or place.as_posix() in BY_ANOTHER_WAY:
            continue
        source = "benchmarks.test" if here == "benchmarks" else "__init__"
        names = (n for node in ast.walk(ast.parse(path.read_text("utf-8"))) for n in imported(node, source, house))
        known = {room(found) for name in names if (found := inside(name, source, house))}
        if here not in ROOMS or here not in known:
            said.append(f"{place.as_posix()}: imports from {', '.join(sorted(known - {'__init__'})) or 'no room'}")
    return said


def test_tests_stand_in_the_rooms_of_what_they_test(tmp_path):
    assert not misplaced(ROOT)
    assert all((ROOT / "tests" / place).is_file() for place in BY_ANOTHER_WAY)
    files = {
        "lowvram_grpo/run/lock.py": "",
        "lowvram_grpo/errors.py": "",
        "benchmarks/tiers.py": "",
        "tests/run/test_lock.py": "from lowvram_grpo.run.lock import Lock",
        "tests/benchmarks/test_tiers.py": "import tiers",
        "tests/test_errors.py": "import lowvram_grpo.errors",
        "tests/policy/test_lock.py": "from lowvram_grpo.run import lock",
        "tests/test_lock.py": "from lowvram_grpo.run.lock import Lock",
        "tests/attic/test_x.py": "",
    }
    wrong = ["attic/test_x.py", "policy/test_lock.py", "test_lock.py"]
    assert [line.partition(":")[0] for line in misplaced(house_of(tmp_path, files))] == wrong


def test_no_file_of_tests_is_longer_than_a_module():
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
