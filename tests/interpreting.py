"""Triton's interpreter without work that nobody sees, which takes over half of its time here.

What a kernel computes stays the same, and so does what the interpreter checks.
"""

import dataclasses
import functools
from typing import Any

from triton.runtime import interpreter


def quicken() -> None:
    _check_no_overflow_in_vain()
    _replace_once()
    _look_up_types_once()


def _check_no_overflow_in_vain() -> None:
    """Each sum and product of integers is computed again in int64, for an assertion that is off."""
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(
            options, sanitize_overflow=False
        )


def _replace_once() -> None:
    """Replace the functions of ``triton.language`` once a launch.

    The interpreter goes through all names again in every function that a kernel calls, and finds
    them replaced. What such a call is the first to replace (of ``triton.language.core``, for
    ``tl.sum`` and its like) is never put back, so that is done once in all.
    """
    replace = interpreter._patch_lang
    languages = (interpreter.tl, interpreter.tl.core)
    of_launch: set[int] = set()
    for_good: set[int] = set()
    known: dict[int, frozenset[int]] = {}

    def needed(names: dict[str, Any]) -> frozenset[int]:
        """Which of ``languages`` a module sees. Of both: ids, because modules stay."""
        if id(names) not in known:
            seen = [one for one in languages if any(value is one for value in names.values())]
            known[id(names)] = frozenset(map(id, seen))
        return known[id(names)]

    def once(fn: Any) -> Any:
        missing = needed(fn.__globals__) - of_launch - for_good
        if of_launch:  # a function that the kernel calls: nobody looks at what comes back
            if missing:
                for_good.update(missing)
                replace(fn)
            return None
        scope = replace(fn)
        of_launch.update(needed(fn.__globals__))
        put_back = scope.restore

        def restore() -> None:
            of_launch.clear()
            put_back()

        scope.restore = restore
        return scope

    interpreter._patch_lang = once


def _look_up_types_once() -> None:
    """Triton fills a table of all types for each look-up."""
    look_up = interpreter._get_np_dtype
    of_scalar = functools.cache(look_up)
    pointer = interpreter.tl.pointer_type

    def once(kind: Any) -> Any:
        return look_up(kind) if isinstance(kind.scalar, pointer) else of_scalar(kind.scalar)

    interpreter._get_np_dtype = once
