"""A Parquet file's checksum in its own footer: CRC-32 of all bytes, as they were before it came in.

So it travels with the file, and covers the footer too.
"""

import re
import zlib
from pathlib import Path
from typing import BinaryIO

ENTRY = "crc32"  # of the JSON object that the footer holds
EMPTY = "-" * 8
_BLOCK_BYTES = 1 << 20
_PLACE = re.compile(rb'"crc32": "([0-9a-f]{8}|-{8})"')


def seal(file: BinaryIO) -> None:
    """Put the checksum of a whole file where its footer has `EMPTY` under `ENTRY`."""
    crc, place, _ = _sum(file)
    file.seek(place)
    file.write(crc)


def is_intact(path: Path) -> bool:
    """Whether a sealed file has the bytes that it was sealed with; all are read."""
    with open(path, "rb") as file:
        crc, _, found = _sum(file)
    return crc == found


def _sum(file: BinaryIO) -> tuple[bytes, int, bytes]:
    """The checksum, the byte at which it stands, and what stands there; none in a file without."""
    size = file.seek(0, 2)
    file.seek(max(size - 8, 0))
    left = start = max(size - 8 - int.from_bytes(file.read(4), "little"), 0)
    file.seek(0)
    crc = 0
    while left and (block := file.read(min(left, _BLOCK_BYTES))):
        crc, left = zlib.crc32(block, crc), left - len(block)
    footer = file.read()
    found = _PLACE.search(footer)
    if found is None:
        return b"", size, b"none"
    footer = footer[: found.start(1)] + EMPTY.encode() + footer[found.end(1) :]
    return b"%08x" % zlib.crc32(footer, crc), start + found.start(1), found[1]
