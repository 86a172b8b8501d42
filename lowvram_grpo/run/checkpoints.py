"""Whether a checkpoint is whole: `seal` writes down what belongs to it, `damage` says what is wrong with it.

transformers writes a checkpoint file by file into its final place, trainer_state.json last; a process that is killed, a
full disk or a power cut leaves a part of it, or files without their end.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from pathlib import Path

from lowvram_grpo.errors import CantWrite

MANIFEST = "files.json"
STATE = "trainer_state.json"
# What holds tensors is compared byte for byte. Of the rest it is enough to be there: people edit json.
_TENSORS = (".safetensors", ".pt", ".pth", ".bin")
CUT_OFF = "it was cut off while it was being saved"


def seal(folder: Path) -> None:
    """Write the manifest of a checkpoint that is complete."""
    files = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, _checksum(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    replace_text(folder / MANIFEST, json.dumps(files, indent=0))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, as a clause; None for a whole one. One without a manifest (of an earlier
    version, or of a process that was killed a moment too early) is judged by the form of its files."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if "global_step" not in state:
            return CUT_OFF
    except (OSError, ValueError, TypeError):
        return CUT_OFF
    try:
        if not (folder / MANIFEST).is_file():
            return next((why for path in sorted(folder.iterdir()) if (why := _malformed(path))), None)
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, (size, checksum) in files.items():
            if why := _differs(folder / name, size, checksum):
                return why
    except (OSError, ValueError, TypeError, AttributeError):
        return f"its {MANIFEST} or what it names can't be read"
    return None


def _differs(path: Path, size: int, checksum: int) -> str | None:
    if not path.is_file():
        return f"its {path.name} is missing"
    if path.suffix not in _TENSORS:
        return None
    if path.stat().st_size != size:
        return f"its {path.name} has {path.stat().st_size} of {size} bytes"
    return None if _checksum(path) == checksum else f"the content of its {path.name} has changed"


def _malformed(path: Path) -> str | None:
    if path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
        return f"its {path.name} is cut off"
    if path.suffix == ".safetensors":
        # The length of the header (8 bytes, little-endian), the header, the tensors at offsets from its end.
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length)) if length < os.path.getsize(path) else None
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            if 8 + length + max(ends, default=0) == os.path.getsize(path):
                return None
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            pass
        return f"its {path.name} is cut off"
    return None


def _checksum(path: Path) -> int:
    found = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found = zlib.crc32(block, found)
    return found


def replace_text(path: Path, text: str) -> None:
    """Write a file in one step: whoever reads it finds the old text or the new one.

    Raises:
        CantWrite: the disk is full, or not to be written to.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CantWrite(path, error) from error
