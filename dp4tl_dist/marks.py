"""What a reader must know of a number: it was made from a training before its end, or changed since its stage."""

from collections.abc import Iterable, Sequence

from dp4tl_dist.errors import UserError
from dp4tl_dist.files import read_json, unfinished_in
from dp4tl_dist.records import output_digest, read_record
from dp4tl_dist.stages import Graph, Trial

MARK = "\N{DAGGER}"
"""Behind the name of an arm with numbers that have marks."""


class Marks:
    """The marks of a run's trials. What has been looked at is remembered."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._altered: dict[str, bool] = {}

    def altered(self, name: str) -> bool:
        """Whether the stage is done, and its output is not what the stage made."""
        if name not in self._altered:
            stage = self.graph.stages[name]
            try:
                record = read_record(self.graph, stage)
                made = record.get("output") if record.get("status") == "done" else None
                self._altered[name] = isinstance(made, str) and made != output_digest(stage)
            except (UserError, OSError):
                self._altered[name] = False  # a damaged record is of a stage that is not done
        return self._altered[name]

    def of(self, trial: Trial, transfers: Iterable[str]) -> list[str]:
        """The marks of a trial's results that those of its transfer stages hold, a line each."""
        names = list(transfers)
        found = [
            f"the output of {name} was changed after it was made"
            for name in (*trial.selection, trial.pretrain, *names)
            if self.altered(name)
        ]
        for name in names:
            try:
                result = read_json(self.graph.stages[name].output)
            except UserError:
                continue  # no number, and nothing to mark
            lines = unfinished_in(result) if isinstance(result, dict) else []
            found += [f"made from {line}, before its training's end" for line in lines]
        return list(dict.fromkeys(found))


def marked(name: str, marks: Sequence[str]) -> str:
    """An arm's name as tables show it."""
    return f"{name} {MARK}" if marks else name
