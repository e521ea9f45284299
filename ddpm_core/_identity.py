"""What of a configuration makes a run what it is."""

from dataclasses import asdict, fields
from typing import Any


def config_identity(config: Any, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of a dataclass as plain values to hash, but those named in `without`, which change no result.

    A keyword-only field counts only where it is not at its default, so that one that is added later leaves the hash
    of every run before it as it was.
    """
    values = asdict(config)
    options = {option.name: option.default for option in fields(config) if option.kw_only}
    return {
        name: value
        for name, value in values.items()
        if name not in without and (name not in options or value != options[name])
    }
