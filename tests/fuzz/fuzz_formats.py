"""Mutations that know a format: zip archives of arrays or of torch, safetensors headers, pickles."""

import io
import json
import pickle
import struct
import warnings
import zipfile
import zlib
from random import Random

from fuzz_mutate import INTEGERS, change_value, dumped, mutate_bytes, mutate_json, packed

DESCRS = (
    "'<i8'", "'>i8'", "'<i4'", "'<f8'", "'|O'", "'?'", "'S0'", "'V0'", "'U0'", "'<U2147483647'", "'V2147483647'",
    "'<c16'", "'<M8[ns]'", "'(1000000000,)<i8'", "('<i8', (2,))", "[('a', '<i8'), ('b', '|O')]", "[('a', '<i8')] * 9",
    "5", "None", "'" + "a" * 20_000 + "'", "'a\\nb'", "'x\ny'", "'<f16'", "[" * 300 + "]" * 300, "{1: 1}", "'\x1b[31m'",
)  # fmt: skip
SHAPES = (
    "()", "(0,)", "(1,)", "(3,)", "(4,)", "(24,)", "(-1,)", "(True,)", "(1.5,)", "(0, 4611686018427387904)", "None",
    "5", f"({2**62},)", f"({2**63},)", f"({2**32}, {2**32})", f"({2**33},)", f"({2**27},)", "(" + "1," * 65 + ")",
    "('a',)", "(" + "9" * 5000 + ",)", "(2, 2)", "((1,),)",
)  # fmt: skip
CANARY = "canary"
"""What a pickle would make in the current folder if it were run."""
PICKLE = b"cos\nmkdir\n(V" + CANARY.encode() + b"\ntR."
BOMB = zlib.compress(bytes(64 << 20), 9)[2:-4]
"""64 MiB of zeros as a deflate stream."""

# ---------------------------------------------------------------- zip


def members(content: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(item.filename, archive.read(item)) for item in archive.infolist()]


def zipped(parts: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    target = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(target, "w", compression) as archive:
        warnings.simplefilter("ignore")  # duplicate names are meant
        for name, part in parts:
            archive.writestr(zipfile.ZipInfo(name), part, compression)
    return target.getvalue()


def shuffle_members(rng: Random, parts: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """Members renamed, removed, doubled or exchanged."""
    i, j = rng.randrange(len(parts)), rng.randrange(len(parts))
    names = (
        "meta",
        "meta.npy",
        "../meta.npy",
        "/etc/x.npy",
        "a" * 3000,
        "\n.npy",
        "é.npy",
        "indices.npy",
        "votes.npy",
        "",
    )
    return rng.choice((
        [*parts[:i], (rng.choice(names), parts[i][1]), *parts[i + 1 :]],
        parts[:i] + parts[i + 1 :],
        [*parts, (parts[i][0], parts[j][1])],
        [*parts[:i], (parts[i][0], parts[j][1]), *parts[i + 1 :]],
        [*parts, *((f"{n}.npy", parts[i][1]) for n in range(300))],
    ))  # fmt: skip


def lie_in_directory(rng: Random, content: bytes) -> bytes:
    """An extreme number in a field of the zip's own records (sizes, offsets, flags, checksums)."""
    marks = [b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"]
    places = [(i, mark) for mark in marks for i in _find_all(content, mark)]
    if not places:
        return content
    start, _ = rng.choice(places)
    width = rng.choice((2, 4))
    at = start + 4 + 2 * rng.randrange(21)
    return content[:at] + packed(rng, width) + content[at + width :]


def _find_all(content: bytes, mark: bytes) -> list[int]:
    found, at = [], content.find(mark)
    while at >= 0:
        found.append(at)
        at = content.find(mark, at + 1)
    return found


def zip_bomb(name: str, claimed: int) -> bytes:
    """An archive of one deflated member of 64 MiB that claims to hold `claimed` bytes."""
    path = name.encode()
    crc = zlib.crc32(bytes(64 << 20)) if claimed == 64 << 20 else 0
    sizes = struct.pack("<IIIHH", crc, len(BOMB), claimed, len(path), 0)
    local = b"PK\x03\x04" + struct.pack("<HHHHH", 20, 0, 8, 0, 0x21) + sizes + path
    central = (
        b"PK\x01\x02"
        + struct.pack("<HHHHHH", 20, 20, 0, 8, 0, 0x21)
        + sizes
        + struct.pack("<HHHII", 0, 0, 0, 0, 0)
        + path
    )
    start = len(local) + len(BOMB)
    return local + BOMB + central + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), start, 0)


# ---------------------------------------------------------------- npz


def mutate_npz(rng: Random, content: bytes, others: list[bytes]) -> bytes:
    """An .npz with another header, dtype, shape, meta, pickled objects, doubled members, or lies about its sizes."""
    action = rng.randrange(10)
    if action < 2:
        return mutate_bytes(rng, content, others)
    if action == 2:
        return lie_in_directory(rng, content)
    if action == 3 and rng.random() < 0.1:
        return zip_bomb(rng.choice(("meta.npy", "votes.npy")), rng.choice((0, 100, 64 << 20, 2**32 - 1)))
    parts = members(content)
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.15 and parts:
            parts = shuffle_members(rng, parts)
            continue
        i = rng.randrange(len(parts)) if parts else 0
        if parts:
            parts[i] = (parts[i][0], _mutate_npy(rng, *parts[i], others=[part for _, part in parts]))
    return zipped(parts, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))


def _mutate_npy(rng: Random, name: str, content: bytes, *, others: list[bytes]) -> bytes:
    if len(content) < 10:
        return mutate_bytes(rng, content, others)
    start = 10 + int.from_bytes(content[8:10], "little")
    header, body = content[10:start].decode("latin1"), content[start:]
    action = rng.random()
    if name.startswith("meta") and action < 0.6:
        return _meta_npy(
            mutate_json(rng, body.decode("utf-32-le", "replace").encode(errors="replace") or b"{}", [b"{}"])
        )
    if action < 0.25:
        return mutate_bytes(rng, content, others)
    if action < 0.5:  # other numbers in place
        at = 8 * rng.randrange(max(1, len(body) // 8))
        return content[:start] + body[:at] + packed(rng, 8) + body[at + 8 :]
    if action < 0.6:
        return _npy("'|O'", "(1,)", rng.choice((PICKLE, pickle.dumps([None]), body)))
    if action < 0.65:
        return (
            content[:6]
            + rng.choice((b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x09"))
            + packed(rng, 4)
            + content[12:]
        )
    shape = header[header.find("(") : header.find(")") + 1] or "()"
    descr = header[header.find("'descr': ") + 9 : header.find(", 'fortran")] or "'<i8'"
    if action < 0.85:
        shape = rng.choice((*SHAPES, str((len(body) // 8 + rng.choice((-1, 1)),))))
    if action > 0.75:
        descr = rng.choice(DESCRS)
    return _npy(descr, shape, body, order=rng.choice(("False", "False", "True", "2", "None")))


def _npy(descr: str, shape: str, body: bytes, *, order: str = "False") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode("latin1", "replace")
    if len(header) < 65536:
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(header)) + header + body


def _meta_npy(text: bytes) -> bytes:
    wide = text.decode(errors="replace")
    return _npy(f"'<U{len(wide)}'", "()", wide.encode("utf-32-le"))


# ---------------------------------------------------------------- safetensors and state.pt


def mutate_safetensors(rng: Random, content: bytes, others: list[bytes]) -> bytes:
    """Another header: huge shapes, offsets that overlap or leave the file, unknown types, nesting, wrong lengths."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, content, others)
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(sorted(header))
        if rng.random() < 0.4 or not isinstance(header[name], dict) or "shape" not in header[name]:
            header = change_value(rng, header)
            header = header if isinstance(header, dict) and header else {"x": header}
            continue
        key, value = rng.choice((
            ("shape", [rng.choice(INTEGERS) for _ in range(rng.choice((0, 1, 2, 9)))]),
            ("shape", [2**32, 2**32]), ("shape", [0, 2**63]), ("shape", []),
            ("data_offsets", [rng.choice(INTEGERS), rng.choice(INTEGERS)]),
            ("data_offsets", [0, len(body)]), ("data_offsets", [0, 0]), ("data_offsets", [8, 4]),
            ("data_offsets", [len(body), len(body) + 64]),
            ("dtype", rng.choice(("F64", "F16", "BF16", "F8_E4M3", "F8_E8M0", "F4", "BOOL", "U64", "C64", "x", ""))),
        ))  # fmt: skip
        header = {**header, name: {**header[name], key: value}}
    text = dumped(header)
    if rng.random() < 0.1:
        text = text[:-1] + b"," + text[1:]  # every name twice
    said = rng.choice((len(text),) * 8 + (0, len(text) - 1, len(text) + 1, 2**40, 2**64 - 1))
    return struct.pack("<Q", said) + text + body


def mutate_state(rng: Random, content: bytes, others: list[bytes]) -> bytes:
    """A torch archive with other pickle opcodes, other records, or lies in its directory."""
    action = rng.random()
    if action < 0.2:
        return mutate_bytes(rng, content, others)
    if action < 0.3:
        return lie_in_directory(rng, content)
    parts = members(content)
    if action < 0.4:
        return zipped(shuffle_members(rng, parts))
    names = [name for name, _ in parts]
    i = next(n for n, name in enumerate(names) if name.endswith("data.pkl"))
    if action < 0.5:
        i = rng.randrange(len(parts))
    parts[i] = (names[i], _mutate_pickle(rng, parts[i][1]))
    return zipped(parts)


def _mutate_pickle(rng: Random, content: bytes) -> bytes:
    start = b"\x80\x02"
    hostile = (
        PICKLE, start + PICKLE, start + b"]" * 50_000 + b"a" * 49_999 + b".", start + b"(" * 100_000 + b".", b"", b".",
        start + b"X\xff\xff\xff\x7f.", start + b"j\xff\xff\xff\xff.", start + b"]q\x00h\x00a.", start + b"}.",
        start + b"K\x01.", start + b"N.", start + b"\x8b\xff\xff\xff\x7f.", start + b"(Kz(tQ.",
        start + b"cbuiltins\neval\nX\x01\x00\x00\x001\x85R.", start + b"ctorch\nDoubleStorage\n.",
        start + b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
    )  # fmt: skip
    action = rng.random()
    if action < 0.15:
        return rng.choice(hostile)
    if action < 0.6:  # the integers of the pickle: K is one byte, M two, J four
        spots = [(at, width) for mark, width in ((b"K", 1), (b"M", 2), (b"J", 4)) for at in _find_all(content, mark)]
        for _ in range(rng.choice((1, 1, 2))):
            if spots:
                at, width = rng.choice(spots)
                content = content[: at + 1] + packed(rng, width) + content[at + 1 + width :]
        return content
    if action < 0.75:  # an integer that takes more bytes
        spots = _find_all(content, b"K")
        if spots:
            at = rng.choice(spots)
            return content[:at] + b"\x8a\x09" + packed(rng, 8) + b"\x00" + content[at + 2 :]
    return mutate_bytes(rng, content, [content])
