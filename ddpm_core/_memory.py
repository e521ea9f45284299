"""What follows from a process is computed once."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from ddpm_core.process import LinearGaussianProcess

Key = ParamSpec("Key")
Result = TypeVar("Result")


def of_process(
    function: Callable[Concatenate[LinearGaussianProcess, Key], Result],
) -> Callable[Concatenate[LinearGaussianProcess, Key], Result]:
    """function(process, *key), computed once for each process and hashable key, and forgotten with the process.

    So no table outlives its process, nor keeps an accelerator's memory. The result must not refer to the process.
    """
    memory: WeakKeyDictionary[LinearGaussianProcess, dict[object, Result]] = WeakKeyDictionary()

    @wraps(function)
    def remembered(process: LinearGaussianProcess, *key: Key.args, **named: Key.kwargs) -> Result:
        known = memory.setdefault(process, {})
        place = (key, tuple(named.items()))
        if place not in known:
            known[place] = function(process, *key, **named)
        return known[place]

    return remembered
