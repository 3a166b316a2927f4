"""Mutations of bytes, JSON and TOML: what a bad disk, a cut-off copy or an ill-meaning stranger makes of a file."""

import json
from collections.abc import Callable
from random import Random
from typing import Any

INTEGERS = (0, 1, 2, 3, 7, 255, 256, 4096, 65535, 65536, 2**21, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62,
            2**63 - 1, 2**63, 2**64 - 4096, 2**64 - 1)  # fmt: skip
TEXTS = ("", " ", "\n", "a\nb", "\r\n", "\x1b[31mred", "\x00", "\u2028", "é\u0301", "\u202e", "日本", "\U0001f600",
         "'", '"', "%s", "../../etc", "{0}", "x" * 3000, "\ud800", "nan", "1e999", "0x10", "-0", "timm:x")  # fmt: skip
RAWS = ("NaN", "-Infinity", "1e999", "9" * 5000, "[" * 3000 + "]" * 3000, '{"a":' * 3000, "[" * 200_000,
        '{"a":' * 900 + "1" + "}" * 900, "[" * 900 + "]" * 900)  # fmt: skip
"""What `json.dumps` would not write. In VALUES each has a stand-in, "@0@" and so on."""
STAND_INS = tuple(f"@{i}@" for i in range(len(RAWS)))
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, [], {}, [[]], [None], {"": {}},
    *TEXTS, *STAND_INS,
)  # fmt: skip


def mutate_bytes(rng: Random, content: bytes, others: list[bytes]) -> bytes:
    """One to three mutations anywhere in `content`."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = rng.choice(BYTES)(rng, content, others)
    return content


def place(rng: Random, content: bytes, width: int = 0) -> int:
    """A place for `width` bytes: anywhere, or near one of the two ends, where headers and tables stand."""
    last = max(0, len(content) - width)
    near = min(last, 300)
    return rng.choice((rng.randint(0, last), rng.randint(0, near), last - rng.randint(0, near)))


def flip(rng: Random, content: bytes, others: list[bytes]) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if changed:
            changed[min(place(rng, content), len(changed) - 1)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(rng: Random, content: bytes, others: list[bytes]) -> bytes:
    length = min(rng.choice((1, 2, 4, 8, 64, 512)), len(content))
    start = place(rng, content, length)
    run = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    return content[:start] + run + content[start + length :]


def integer(rng: Random, content: bytes, others: list[bytes]) -> bytes:
    width = rng.choice((1, 2, 4, 8))
    if len(content) < width:
        return content
    start = place(rng, content, width)
    return content[:start] + packed(rng, width) + content[start + width :]


def packed(rng: Random, width: int) -> bytes:
    """An extreme integer in `width` bytes, mostly little-endian."""
    value = rng.choice(INTEGERS) + rng.choice((0, 0, -1, 1))
    return (value % (1 << 8 * width)).to_bytes(width, rng.choice(("little", "little", "big")))


def truncate(rng: Random, content: bytes, others: list[bytes]) -> bytes:
    return content[: place(rng, content)]


def insert(rng: Random, content: bytes, others: list[bytes]) -> bytes:
    length = rng.choice((1, 2, 8, 100, 5000))
    start = place(rng, content)
    return content[:start] + rng.choice((bytes(length), rng.randbytes(length))) + content[start:]


def remove(rng: Random, content: bytes, others: list[bytes]) -> bytes:
    length = rng.choice((1, 2, 8, 100))
    start = place(rng, content, length)
    return content[:start] + content[start + length :]


def repeat(rng: Random, content: bytes, others: list[bytes]) -> bytes:
    length = rng.choice((1, 8, 64, 512))
    start = place(rng, content, length)
    return (
        content[: start + length] + content[start : start + length] * rng.choice((1, 2, 50)) + content[start + length :]
    )


def splice(rng: Random, content: bytes, others: list[bytes]) -> bytes:
    other = rng.choice(others)
    return content[: place(rng, content)] + other[place(rng, other) :]


BYTES: tuple[Callable[[Random, bytes, list[bytes]], bytes], ...] = (
    flip, flip, overwrite, integer, integer, truncate, insert, remove, repeat, splice,
)  # fmt: skip


# ---------------------------------------------------------------- JSON


def mutate_json(rng: Random, content: bytes, others: list[bytes]) -> bytes:
    """Valid JSON with other values in it; now and then broken JSON."""
    if rng.random() < 0.25:
        return mutate_bytes(rng, content, others)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):  # it was mutated before
        return mutate_bytes(rng, content, others)
    for _ in range(rng.choice((1, 1, 2))):
        value = change_value(rng, value)
    return dumped(value)


def change_value(rng: Random, value: Any) -> Any:
    """A copy of `value` with one node of it replaced, removed or added."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        action = rng.random()
        if action < 0.1:
            return {name: inner for name, inner in value.items() if name != key}
        if action < 0.2:
            return {**value, rng.choice((*TEXTS, "a" * 300)): rng.choice(VALUES)}
        return {**value, key: change_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        if rng.random() < 0.2:
            return value[:i] + value[i + 1 :]
        if rng.random() < 0.2:
            return value * rng.choice((2, 100))
        return [*value[:i], change_value(rng, value[i]), *value[i + 1 :]]
    return rng.choice((*VALUES, *INTEGERS))


def dumped(value: Any) -> bytes:
    """JSON in bytes, with what the stand-ins stand for."""
    text = json.dumps(value)
    for stand_in, raw in zip(STAND_INS, RAWS, strict=True):
        text = text.replace(f'"{stand_in}"', raw)
    return text.encode()


# ---------------------------------------------------------------- TOML and other lines of text


TOML_LINES = (
    "x = 1", "seed = 1", "seed = " + "9" * 5000, "seed = " + "[" * 3000 + "]" * 3000, "seed = 1979-05-27T07:32:00Z",
    "seed = [1, 'a', {b = 1}]", "[train]", "[[train]]", "[train.train]", "train.epochs = 1", f"epochs = {10**19}",
    '"\\u0000" = 1', '"a\\nb" = 1', "'' = ''", "é = 1", "\ufeffseed = 1", "seed = nan", "seed = +inf", "lr = 1e999",
    "seed = 0x" + "f" * 5000, "epochs = 0x" + "f" * 5000, "[" + ".".join("a" * 300) + "]", ".".join("b" * 2000) + "=1",
    'arms = ["dense", "dense"]', "[targets]", '[targets."../x"]', "seed = '''\n\n'''", "lr = '" + "x" * 5000 + "'",
    "a = {b = {c = {}}}", "x = " + "{a = " * 2000, "seed = " + "[" * 100_000, "\x1b = 1", 'train = "a\\u001b[31m"',
    '"\\ud800" = 1', "\r", "\x00", "#" + "\x7f",
)  # fmt: skip


LONGEST_ROW = 4 << 20  # past every reader's limit; repeated over again it would fill the memory of the case itself


def mutate_lines(rng: Random, content: bytes, others: list[bytes], lines: tuple[str, ...] = TOML_LINES) -> bytes:
    """A text with lines removed, repeated, swapped, replaced, or with another value after the "="."""
    if rng.random() < 0.25:
        return mutate_bytes(rng, content, others)
    rows = content.decode(errors="surrogateescape").split("\n")
    for _ in range(rng.choice((1, 1, 2, 4))):
        i, action = rng.randrange(len(rows)), rng.randrange(6)
        if action == 0:
            rows.insert(i, rng.choice(lines))
        elif action == 1:
            rows[i] = rows[i].partition("=")[0] + "= " + scalar(rng)
        elif action == 2:
            rows.insert(i, rows[rng.randrange(len(rows))])
        elif action == 3 and len(rows) > 1:
            del rows[i]
        elif action == 4:
            rows[i] = (rows[i] * rng.choice((2, 50)))[:LONGEST_ROW]
        else:
            rows[i] = rng.choice(lines)
    return "\n".join(rows).encode(errors="replace")


def scalar(rng: Random) -> str:
    """A value in TOML's notation, right or wrong."""
    text = dumped(rng.choice((*VALUES, *INTEGERS))).decode()
    return text.strip('"') if rng.random() < 0.2 else text
