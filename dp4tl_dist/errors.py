"""The errors that users see, and the exit codes that scripts rely on."""

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: everything is saved; run the same command again to continue
LONGEST_LINE = 2000


def printable(text: str) -> str:
    """`text` in one line: characters that do not print (line ends, terminal codes) are shown as escapes."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def one_line(text: str) -> str:
    """`text` with its lines in one, and printable; spaces inside a line are kept, as a path may have several."""
    return printable(" ".join(line.strip() for line in text.split("\n") if line.strip()))


class UserError(ValueError):
    """Bad input or config. Its text is one line: what is wrong, where, and what to do. Exit code 2.

    What it quotes may come from a stranger's file: it is made printable, and the middle of an endless line left out.
    """

    def __init__(self, text: str) -> None:
        line = printable(text)
        super().__init__(line if len(line) <= LONGEST_LINE else f"{line[:1500]} ... {line[-400:]}")


class InUseError(UserError):
    """What is asked for is held by another process."""


class Stopped(Exception):
    """A signal asked the run to end, and everything is saved. Exit code 75."""


class LostRank(RuntimeError):
    """A stage's ranks ended since one of them was lost, without an error of its own. Trying again may do."""


def one_of(name: str, value: str, known: "dict[str, object] | list[str] | tuple[str, ...]") -> str:
    """`value` if it is one of `known`, else a UserError that lists the known ones."""
    if value not in known:
        raise UserError(f"unknown {name} {value!r}: use one of {', '.join(sorted(known))}")
    return value
