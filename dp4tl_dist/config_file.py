"""Reading configs: TOML into frozen, strictly validated models. An unknown key is an error."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dp4tl_dist.errors import UserError
from dp4tl_dist.inputs import MAX_PARTS, parse_toml, read_text
from dp4tl_dist.limits import MAX_RANKS, MAX_SIDE, MAX_WORKERS, MOST

MAX_TOML_BYTES = 1 << 20
PRESETS = Path(__file__).parent / "presets"
SIDES = ("start_resolution", "val_resolution")

Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Part = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=MOST)]
CountOrNone = Annotated[int, Field(ge=0, le=MOST)]
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
SideOrNone = Annotated[int, Field(ge=0, le=MAX_SIDE)]
Workers = Annotated[int, Field(ge=0, le=MAX_WORKERS)]
Ranks = Annotated[int, Field(ge=1, le=MAX_RANKS)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0, le=MOST, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=MOST, allow_inf_nan=False)]


class Table(BaseModel):
    """Base of every config table: immutable, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Model = TypeVar("Model", bound=Table)


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file (or the resolved .json of an earlier run) as a dict; anything else is a UserError with the line."""
    try:
        text = read_text(path, limit=MAX_TOML_BYTES)
        content = json.loads(text) if path.suffix == ".json" else parse_toml(text)
        repr(content)  # a hexadecimal number of thousands of digits can be read, but neither shown nor written down
    except OSError as error:
        raise UserError(f"cannot read the config {path} ({error.strerror}): check --config") from error
    except UserError as error:
        raise UserError(f"{error}: check --config") from error
    except (ValueError, RecursionError) as error:  # syntax, letters, numbers of thousands of digits, nesting
        raise UserError(f"{path} is not valid {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a table of keys and values: is it a config?")
    return content


def find_config(name: str) -> Path:
    """The file that `--config` names: a path, or the name of a preset that ships with the package. What is there and is
    no file counts as named as well, for `read_toml` to tell; a folder only where no preset is called like it."""
    path, preset = Path(name), PRESETS / f"{name}.toml"
    if path.suffix or len(path.parts) != 1 or (path.exists() and not path.is_dir()):
        return path
    if not preset.exists():
        if path.is_dir():
            return path
        known = ", ".join(sorted(item.stem for item in PRESETS.glob("*.toml")))
        raise UserError(f"no config file and no preset is called {name!r}: pass a .toml file or one of {known}")
    return preset


def apply_overrides(content: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """`content` with each `a.b=value` set. Values are TOML; what is not valid TOML is taken as a string."""
    result: dict[str, Any] = dict(content)
    for override in overrides:
        dotted, sign, text = override.partition("=")
        keys = dotted.strip().split(".")
        if not sign or not all(keys) or len(keys) > MAX_PARTS:
            raise UserError(f"--set {override!r} is not of the form table.key=value")
        try:
            value = parse_toml(f"value = {text}")["value"]
            repr(value)  # as in `read_toml`
        except (ValueError, RecursionError):
            value = text.strip()
        here = result
        for key in keys[:-1]:
            inner = here.get(key, {})
            if not isinstance(inner, dict):
                raise UserError(f"--set {override!r}: {key!r} is a value, not a table")
            here[key] = dict(inner)
            here = here[key]
        here[keys[-1]] = value
    return result


def toml_string(text: str) -> str:
    """`text` as a TOML string: JSON's, but for DEL, which TOML wants escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def validate(model: type[Model], content: dict[str, Any], *, source: str) -> Model:
    """`content` as a `model`, or a UserError that names the key, the reason and, for a typo, the known keys."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        # What would follow from a wrong value is not a fault of its own.
        errors = [item for item in error.errors() if item["type"] != "default_factory_not_called"]
        first = errors[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole config"
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        if first["type"] == "extra_forbidden":
            known = ", ".join(_known_keys(model, first["loc"][:-1]))
            raise UserError(f"{source}: unknown key {where!r}{more}: known here are {known}") from error
        shown = f", not {first['input']!r}" if not isinstance(first["input"], dict) else ""
        raise UserError(f"{source}: {where}: {first['msg'].removeprefix('Value error, ')}{shown}{more}") from error


def load_config(model: type[Model], name: str, overrides: list[str] | None = None) -> Model:
    """Read, override and validate the config that `--config NAME` and `--set` describe."""
    path, overrides = find_config(name), overrides or []
    content = read_toml(path)
    if path.parent == PRESETS:
        for override in overrides:
            content = following(content, override.partition("=")[0].strip().split("."))
    return validate(model, apply_overrides(content, overrides), source=str(path))


def following(content: dict[str, Any], changed: Sequence[str]) -> dict[str, Any]:
    """`content` of a preset, less what it sets to fit its `resolution` alone, where that is the key that is changed:
    the other sides then follow from the new one, unless they are given, too."""
    if len(changed) == 1:
        return {key: value for key, value in content.items() if changed[0] != "resolution" or key not in SIDES}
    inner = content.get(changed[0])
    return {**content, changed[0]: following(inner, changed[1:])} if isinstance(inner, dict) else content


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys that the table at `location` takes; list indices and names in mappings are skipped."""
    here: Any = model
    for part in location:
        inner = here.model_fields[part].annotation if part in getattr(here, "model_fields", {}) else here
        here = next((kind for kind in _models_in(inner)), here)
    return sorted(here.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in getattr(annotation, "__args__", ()) for found in _models_in(inner)]
