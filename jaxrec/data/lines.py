"""Files of JSON objects, one a line, that grow by appending."""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO


def json_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """("FILE:LINE", object) of a file of JSON objects, one a line. Raises ValueError naming the line that is none."""
    out = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{path}:{number}: an object was expected, not {type(entry).__name__}")
        out.append((f"{path}:{number}", entry))
    return out


def cut_torn_line(file: BinaryIO) -> int:
    """Take the line that a killed process left unfinished off the end of a file that is open for reading and writing,
    and locked where others write too; how many there were, 0 or 1."""
    end = at = file.seek(0, os.SEEK_END)
    tail = b""
    while at and b"\n" not in tail:
        size = min(at, 4096)
        at = file.seek(at - size)
        tail = file.read(size)
    complete = at + tail.rfind(b"\n") + 1
    if complete == end:
        return 0
    file.truncate(complete)
    return 1
