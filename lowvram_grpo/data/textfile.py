"""Text files as people have them: UTF-8, with a byte order mark or without, and what Windows calls Unicode.

Recipes, worked examples, chat templates, reward files and data all come through here. Nothing is guessed: text in an
older encoding (GBK, Shift JIS, Windows-1252) looks valid in several of them, and would train on the wrong characters.
"""

from __future__ import annotations

import codecs
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lowvram_grpo.errors import UserError

# UTF-32's mark begins with UTF-16's, so the longer ones are looked for first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BLOCK = 1 << 20


def encoding_of(beginning: bytes) -> str:
    """The encoding that a file's first four bytes announce; UTF-8 without a byte order mark."""
    return next((name for mark, name in _MARKS if beginning.startswith(mark)), "utf-8")


def read_text(path: str | Path, what: str) -> str:
    """The whole text of a file, without its byte order mark, every line ended by a newline alone.

    Args:
        what: the file as it begins a sentence: `The recipe 'grpo.yaml'`.

    Raises:
        UserError: it can't be read, or is not text in UTF-8 or UTF-16.
    """
    try:
        content = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error.strerror or error}.") from error
    try:
        text = content.decode(encoding_of(content[:4]))
    except UnicodeDecodeError as error:
        raise _no_text(what, 1 + content[: error.start].count(b"\n"), content[error.start]) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def utf8_source(content: bytes) -> bytes:
    """A Python file's bytes as Python reads them: UTF-16 and UTF-32 become UTF-8, whatever else it is stays (a file may
    declare another encoding in its first lines)."""
    encoding = encoding_of(content[:4])
    return content.decode(encoding).encode() if encoding in ("utf-16", "utf-32") else content


@contextlib.contextmanager
def as_utf8(path: Path, what: str) -> Iterator[Path]:
    """The file itself where it is UTF-8 throughout, else a copy in UTF-8 that goes when the block is left.

    Raises:
        UserError: as `read_text`. The whole file is looked at, a block at a time: libraries read on behind a wrong
            byte, and make other characters of it.
    """
    with open(path, "rb") as file:
        encoding = encoding_of(file.read(4))
    if encoding in ("utf-8", "utf-8-sig"):
        for _ in _blocks(path, encoding, what):
            pass
        yield path
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        copy = Path(folder) / path.name
        with open(copy, "w", encoding="utf-8", newline="") as file:
            file.writelines(_blocks(path, encoding, what))
        yield copy


def _blocks(path: Path, encoding: str, what: str) -> Iterator[str]:
    decoder, line = codecs.getincrementaldecoder(encoding)(), 1
    with open(path, "rb") as file:
        while True:
            block = file.read(_BLOCK)
            held = decoder.getstate()[0]  # bytes of a character that the block before has cut
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                seen = held + block
                raise _no_text(what, line + seen[: error.start].count(b"\n"), seen[error.start]) from error
            line += text.count("\n")
            yield text
            if not block:
                return


def _no_text(what: str, line: int, byte: int) -> UserError:
    return UserError(
        f"{what} is not UTF-8 text (byte 0x{byte:02x} in line {line}); save it as UTF-8, which editors offer under "
        "Save As or as its encoding."
    )
