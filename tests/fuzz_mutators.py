"""Mutations of files for tests/fuzz.py: of bytes, and of what the bytes mean.

A mutation of single bytes is mostly stopped by a checksum or a length at the front. So the files
whose structure is known here are also taken apart, changed inside and put together again with right
checksums and lengths: PNG chunks, boxes of MP4 and HEIF, RIFF chunks, the JSON header of
safetensors, zip archives, and JSON.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

NUMBERS: tuple[int, ...] = (
    0,
    1,
    2,
    3,
    7,
    8,
    15,
    16,
    127,
    128,
    255,
    256,
    1000,
    32767,
    32768,
    65535,
    65536,
)
NUMBERS += (2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
VALUES: tuple[Any, ...] = (None, True, -1, 0, 1.5, 10**9, 10**20, -(10**12), 1e308, "", "x", "../x")
VALUES += ("\0", "\ud800", [], {}, [[]], [1], {"a": 1}, "F32", "a" * 300, "/etc/passwd", "\x1b[31m")

Mutator = Callable[[random.Random, bytes], bytes]


def mutate(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """The data with one to four mutations of any kind; structured ones where they apply."""
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        inner = structured(data)
        if inner is not None and rng.random() < 0.5:
            try:
                data = inner(rng, data)
                continue
            except (ValueError, KeyError, IndexError, OverflowError, struct.error):
                pass  # an earlier mutation broke its structure
            except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError):
                pass
        data = rng.choice(PLAIN)(rng, data, corpus)
    return data[: 1 << 20]


# --- bytes ---------------------------------------------------------------------------------------


def _place(rng: random.Random, data: Sequence[Any]) -> int:
    """Headers are at the beginning, and matter most."""
    return int(len(data) * rng.random() ** rng.choice((1, 2, 4)))


def _flip(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    if not data:
        return b"\0"
    changed = bytearray(data)
    changed[_place(rng, data)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _byte(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    changed = bytearray(data or b"\0")
    changed[_place(rng, changed)] = rng.randrange(256)
    return bytes(changed)


def _number(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """A number of 1 to 8 bytes, as lengths and counts are."""
    size = rng.choice((1, 2, 4, 8))
    value = rng.choice((*NUMBERS, len(data), len(data) + 1)) & (1 << 8 * size) - 1
    at = _place(rng, data)
    raw = value.to_bytes(size, rng.choice(("little", "big")))
    return data[:at] + raw + data[at + size :]


def _cut(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _remove(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = _place(rng, data)
    return data[:at] + data[at + rng.choice((1, 2, 4, 16, 200)) :]


def _repeat(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at, length = _place(rng, data), rng.choice((1, 4, 16, 64, 500))
    return data[:at] + data[at : at + length] * rng.choice((2, 3, 50)) + data[at + length :]


def _insert(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = _place(rng, data)
    return data[:at] + rng.randbytes(rng.choice((1, 2, 4, 16))) + data[at:]


def _splice(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """The beginning of this one and the end of another."""
    other = rng.choice(corpus)
    return data[: _place(rng, data)] + other[_place(rng, other) :]


def _graft(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """A piece of another one in the middle."""
    other, at = rng.choice(corpus), _place(rng, data)
    start = _place(rng, other)
    piece = other[start : start + rng.choice((4, 16, 64, 300))]
    return data[:at] + piece + data[at + rng.choice((0, len(piece))) :]


PLAIN = (_flip, _byte, _number, _number, _cut, _remove, _repeat, _insert, _splice, _graft)


# --- structures ----------------------------------------------------------------------------------


def structured(data: bytes) -> Mutator | None:
    """The mutator that knows the structure of this data; None for others."""
    if data.startswith(b"\x89PNG"):
        return _png
    if data[4:8] in (b"ftyp", b"moov", b"wide", b"mdat"):
        return _boxes
    if data.startswith(b"RIFF"):
        return _riff
    if data.startswith(b"PK\x03\x04"):
        return _zip
    if len(data) > 9 and data[8:9] == b"{" and data[:8] != b"":
        return _safetensors
    if data[:1] in (b"{", b"["):
        return _json
    return None


def _inside(rng: random.Random, data: bytes) -> bytes:
    return rng.choice(PLAIN[:8])(rng, data, ())


def _png(rng: random.Random, data: bytes) -> bytes:
    chunks, at = [], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    place = _place(rng, chunks)
    kind, body = chunks[place]
    action = rng.randrange(5)
    if action == 0:
        chunks.insert(rng.randrange(len(chunks) + 1), (kind, body))
    elif action == 1:
        del chunks[place]
    elif action == 2 and kind in (b"IDAT", b"zTXt"):
        chunks[place] = (kind, zlib.compress(_inside(rng, zlib.decompress(body))))
    else:
        chunks[place] = (kind, _inside(rng, body))
    made = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    ]
    return data[:8] + b"".join(made)


_HOLDERS = {
    b"moov",
    b"trak",
    b"mdia",
    b"minf",
    b"stbl",
    b"meta",
    b"iprp",
    b"ipco",
    b"moof",
    b"traf",
}
_HOLDERS |= {b"edts", b"dinf", b"udta", b"mvex"}


def _places_of_boxes(data: bytes, start: int, stop: int) -> list[tuple[int, int]]:
    found = []
    while start + 8 <= stop:
        size = struct.unpack(">I", data[start : start + 4])[0]
        if size < 8 or start + size > stop:
            break
        found.append((start, size))
        kind = data[start + 4 : start + 8]
        if kind in _HOLDERS:
            skip = 12 if kind == b"meta" else 8
            found += _places_of_boxes(data, start + skip, start + size)
        start += size
    return found


def _boxes(rng: random.Random, data: bytes) -> bytes:
    """A change in one box's size, kind or content; boxes around it keep their sizes."""
    boxes = [
        box for box in _places_of_boxes(data, 0, len(data)) if data[box[0] + 4 :][:4] != b"mdat"
    ]
    at, size = rng.choice(boxes)
    action = rng.randrange(5)
    if action == 0:
        value = rng.choice((*NUMBERS[:-4], size - 1, size + 1, size * 2)) & 2**32 - 1
        return data[:at] + struct.pack(">I", value) + data[at + 4 :]
    if action == 1:
        return data[: at + 4] + rng.choice([data[b + 4 : b + 8] for b, _ in boxes]) + data[at + 8 :]
    if action == 2:
        return data[: at + 4] + b"free" + data[at + 8 :]
    # A number in its content: versions, counts, sizes, times, places.
    inside = at + 8 + 4 * rng.randrange(max(1, min(size - 8, 400) // 4))
    value = rng.choice(NUMBERS) & 2**32 - 1
    return data[:inside] + struct.pack(">I", value) + data[inside + 4 :]


def _riff(rng: random.Random, data: bytes) -> bytes:
    chunks, at = [], 12
    while at + 8 <= len(data):
        (length,) = struct.unpack("<I", data[at + 4 : at + 8])
        chunks.append((at, length))
        at += 8 + length + length % 2
    at, length = rng.choice(chunks)
    if rng.random() < 0.3:
        value = rng.choice((*NUMBERS[:-4], length - 1, length + 1)) & 2**32 - 1
        return data[: at + 4] + struct.pack("<I", value) + data[at + 8 :]
    body = _inside(rng, data[at + 8 : at + 8 + length])
    body += b"\0" * (len(body) % 2)
    rest = data[at + 8 + length + length % 2 :]
    made = data[12 : at + 4] + struct.pack("<I", len(body)) + body + rest
    return b"RIFF" + struct.pack("<I", len(made) + 4) + data[8:12] + made


def _zip(rng: random.Random, data: bytes) -> bytes:
    """An entry changed, renamed, removed or repeated in an archive that is written anew."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    place = _place(rng, entries)
    name, body = entries[place]
    action = rng.randrange(6)
    if action == 0:
        names = (name + "x", name.rpartition("/")[0] + "/code/a.py", "constants.pkl", "../" + name)
        entries[place] = (rng.choice(names), body)
    elif action == 1:
        del entries[place]
    elif action == 2:
        entries.append((name, _inside(rng, body)))
    else:
        pickled = [i for i, entry in enumerate(entries) if entry[0].endswith(".pkl")] or [place]
        place = rng.choice(pickled)
        entries[place] = (entries[place][0], _inside(rng, entries[place][1]))
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, body in entries:
            archive.writestr(zipfile.ZipInfo(name), body)
    return made.getvalue()


def _safetensors(rng: random.Random, data: bytes) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    head = _json(rng, data[8 : 8 + length])
    return struct.pack("<Q", len(head)) + head + data[8 + length :]


def _json(rng: random.Random, data: bytes) -> bytes:
    """One value of a JSON text changed, removed, renamed, repeated or nested."""
    root = {"": json.loads(data)}
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], (dict, list)):
                walk(value[key])

    walk(root)
    holder, key = rng.choice(places)
    action = rng.randrange(6)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[rng.choice(("x", "", "latents", "__metadata__", "a" * 300))] = holder.pop(key)
    elif action == 2:
        for _ in range(rng.choice((1, 70, 900))):
            holder[key] = [holder[key]]
    elif action == 3 and isinstance(holder[key], (int, float)):
        holder[key] = holder[key] + rng.choice((-1, 1, 0.5, *NUMBERS))
    else:
        holder[key] = rng.choice(VALUES)
    return json.dumps(root.get("")).encode()
