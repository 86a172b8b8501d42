"""What a machine that is lent takes along and gives back, and whether this checkout and a folder of results fit.

Numbers as of 2026-11; a file that breaks a limit is left behind there without a word in the run itself.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

MIB = 2**20
CARRIED = 64 * MIB
FILES, EACH, TOGETHER, FOLDERS = 8, 16 * MIB, 64 * MIB, 2
COMMAND = 2000
_NAME = re.compile(r"[A-Za-z0-9._-]+")


def coming_back(folder: Path) -> list[str]:
    """What is wrong with the files below `folder`, each thing in a sentence; [] where all of them come back."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    sizes = {path: path.lstat().st_size for path in files}
    wrong = []
    if len(files) > FILES:
        wrong.append(f"{len(files)} files; {FILES} come back")
    if sum(sizes.values()) > TOGETHER:
        wrong.append(f"{sum(sizes.values()) / MIB:.1f} MiB together; {TOGETHER // MIB} come back")
    for path, size in sizes.items():
        name = path.relative_to(folder)
        if size > EACH:
            wrong.append(f"{name} has {size / MIB:.1f} MiB; {EACH // MIB} come back")
        if len(name.parts) > FOLDERS + 1:
            wrong.append(f"{name} lies more than {FOLDERS} folders deep")
        if not all(_NAME.fullmatch(part) for part in name.parts) or path.is_symlink():
            wrong.append(f"{name} is a link, or has a name of other than letters, digits and . _ -")
    return wrong


def travelling(root: Path, carried: str = ".gpu-stage") -> int:
    """Bytes that a call sends: what git tracks or does not ignore, and the folder that `carry` names."""
    listed = subprocess.run(
        ["git", "-C", root, "ls-files", "-z", "-co", "--exclude-standard"], capture_output=True, check=True
    ).stdout
    files = {root / name.decode() for name in listed.split(b"\0") if name}
    files |= {path for path in (root / carried).rglob("*") if path.is_file()}
    return sum(path.lstat().st_size for path in files if path.exists())
