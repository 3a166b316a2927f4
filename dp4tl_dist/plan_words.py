"""What a stage says of its config, in the words of the run that the user wrote."""

import re

from dp4tl_dist.config import ModelConfig, OptimConfig, Table, TaskConfig
from dp4tl_dist.stage import Stage


def in_the_runs_words(stage: Stage, text: str) -> str:
    """A stage's words about its config with the keys of the run's: train.lr of a probe is transfer.lp.lr."""
    text = text.removeprefix(f"{stage.name}: ")
    verb, *rest = stage.name.split("-")
    table = {"transfer": f"transfer.{rest[0] if rest else ''}", "surrogate": "surrogate", "pretrain": "pretrain",
             "influence": "influence"}.get(verb, "")  # fmt: skip
    if verb == "surrogate" and rest:
        table = f"surrogates.{'-'.join(rest).replace('~', '-')}"
    if not table or text.startswith("influence."):
        return text
    keys: dict[str, type[Table]] = {"train": OptimConfig, "model": ModelConfig, "task": TaskConfig}
    known = "|".join(f"{name}\\.(?:{'|'.join(kind.model_fields)})" for name, kind in keys.items())
    found = re.compile(rf"(?<![\w./-])({known})\b")  # and no file, like train.beton
    return found.sub(lambda match: f"{table}.{match[1].removeprefix('train.' if verb == 'transfer' else '')}", text)
