"""What is wrong with a value that was read, a line for each wrong field, for the person who wrote it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, Tag, ValidationError
from pydantic_core import ErrorDetails

from pipelines.errors import UserError

_FIELD_FIRST = re.compile(r"([\w.\[\]]+): ")

Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], values: Any, where: str) -> Model:
    """`values` as a `model`, or a `UserError` with a line for each wrong field."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        # a check over several sections finds several mistakes at once
        lines = (
            f"{where}: {line}" for problem in error.errors() for line in _told(problem, model).split("\n")
        )
        raise UserError("\n".join(lines)) from None


def _told(problem: ErrorDetails, model: type[BaseModel]) -> str:
    location = problem["loc"]
    # of a choice of sections its tag stands behind the field, which nobody wrote there
    tags = _choices(model, location[:1])
    tag = location[1] if len(location) > 1 and location[1] in tags else None
    field = _path(location if tag is None else (location[0], *location[2:]))
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        message = f"no such setting{_suggestion(location, model)}"
    elif problem["type"] == "missing":
        message = "is required and missing"
    elif problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        given = problem["input"]
        if isinstance(given, Mapping):
            field, given = f"{field}.kind", given.get("kind")
            message = f"must be {' or '.join(map(repr, tags))}, got {_written(given)}"
        else:
            message = f"must hold settings, got {_written(given)}"
    elif problem["type"] in ("model_type", "dataclass_type"):
        message = f"must hold settings, got {_written(problem['input'])}"
    elif problem["type"] in ("tuple_type", "list_type"):
        given = problem["input"]
        example = f", such as [{given}]" if isinstance(given, str) else ""
        message = f"must be a list{example}, got {_written(given)}"
    elif problem["type"] == "value_error":
        # a check over several fields names its field itself
        if named := _FIELD_FIRST.match(message):
            field, message = f"{field}.{named[1]}".removeprefix("."), message[named.end() :]
    else:
        message = f"{message[0].lower()}{message[1:]}, got {_written(problem['input'])}"
    return f"{field}: {message}"


def _path(location: Sequence[int | str]) -> str:
    """As it is written: data.stages[0].name"""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return "".join(parts).removeprefix(".")


def _written(value: Any) -> str:
    """A value as it stands in YAML, where null and an empty one are the same."""
    if value is None:
        return "nothing"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _suggestion(location: Sequence[int | str], model: type[BaseModel]) -> str:
    names: list[str] = list(model.model_fields)
    name = str(location[-1])
    if len(location) > 1:
        choices = _choices(model, location[:1])
        if choices:
            names = _settings(choices[str(location[1])])
            others = [tag for tag, section in choices.items() if name in _settings(section)]
            if others:
                return f"; it is one of {location[0]}.kind {' or '.join(others)}"
        else:
            names = _settings(_section_at(model, location[:-1]))
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(names)}" if names else ""


def _section_at(section: Any, location: Sequence[int | str]) -> Any:
    """What stands at a place below a section: the section of a field, or one of a list of them."""
    for part in location:
        if isinstance(part, int):
            section = next(iter(get_args(section)), None)
        else:
            field = getattr(section, "model_fields", {}).get(part)
            section = field.annotation if field is not None else None
    return section


def _choices(model: type[BaseModel], location: Sequence[int | str]) -> dict[str, Any]:
    """The sections that may stand at a field by their tags, if there are several."""
    field = model.model_fields.get(str(location[0])) if location else None
    found: dict[str, Any] = {}
    for choice in get_args(field.annotation) if field is not None else ():
        section, *rest = get_args(choice) or (choice,)
        found |= {part.tag: section for part in rest if isinstance(part, Tag)}
    return found


def _settings(section: Any) -> list[str]:
    if isinstance(section, type) and issubclass(section, BaseModel):
        return list(section.model_fields)
    return [field.name for field in fields(section)] if is_dataclass(section) else []
