"""Text as people's editors write it: marks of other encodings, line ends, names that look alike.

Knows bytes and characters; does not know what a text says.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
import unicodedata
from pathlib import Path

_LONGEST_CELL = 2**24  # characters of a csv file
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, but tab and newline
_MOST_PIPED = 2**26  # bytes


def decode_text(data: bytes, name: str) -> str:
    """Decode a text file's bytes: UTF-8, or what its first bytes say; its lines then end at "\\n" alone.

    Raises:
        ValueError: names it, where it is no such text.
    """
    encoding = next((encoding for mark, encoding in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no {encoding.upper()} text (byte {error.start}); save it as UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{name} is no text: it holds zero bytes; if it is UTF-16, save it as UTF-8")
    return text.replace("\r\n", "\n")


def read_text(path: Path) -> str:
    """Read a text file, see `decode_text`; raises ValueError also for a device or pipe that goes on for long."""
    with path.open("rb") as file:
        data = file.read(None if path.is_file() else _MOST_PIPED)
    if len(data) == _MOST_PIPED and not path.is_file():
        raise ValueError(f"{path} is no file, and goes on after {_MOST_PIPED >> 20} MB; give a file")
    return decode_text(data, str(path))


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file. They end at a newline and nowhere else: other separators belong to the text."""
    lines = read_text(path).split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read the rows of a csv file by the names in its header; cells that say nothing are left out.

    Raises:
        ValueError: it is no csv file, its header has a name twice, or a row more cells than the header; named.
    """
    csv.field_size_limit(_LONGEST_CELL)
    try:
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""), skipinitialspace=True)
        rows, header = list(reader), [composed(name) for name in reader.fieldnames or ()]
    except csv.Error as error:
        raise ValueError(f"{path} is no csv file ({error})") from error
    if twice := next((name for name in header if name and header.count(name) > 1), ""):
        raise ValueError(f"{path} has the column {twice!r} twice in its header; leave one out")
    if wrong := next((number for number, row in enumerate(rows, 1) if None in row), 0):
        raise ValueError(f"{path}: row {wrong} has more cells than the header; put quotes around text with commas")
    return [{composed(key): value for key, value in row.items() if value} for row in rows]


def composed(name: str) -> str:
    """A name as people compare it: accents composed (some systems store them apart), no space around."""
    return unicodedata.normalize("NFC", printable(name)).strip()


def printable(name: str) -> str:
    """A name that can be written: bytes of a file's name that are no text become "?"."""
    return name.encode(errors="replace").decode()


def shortened(text: str, most: int = 80) -> str:
    """A text that others wrote, or the beginning of a long one, for a message."""
    return text if len(text) <= most else f"{text[:most]}..."


def without_commands(text: str) -> str:
    """A text that others wrote, a class name say, without the characters that would command the terminal."""
    return _COMMANDS.sub("\ufffd", text)
