"""Values as JSON can hold them; imports nothing heavy, so that commands answer at once."""

from __future__ import annotations

import math
from typing import Any


def plain(value: Any, *, words: bool = False) -> Any:
    """A value as JSON can hold it: NaN and infinities become None, tuples lists, keys text.

    Args:
        value: numbers, text, None, and containers of them.
        words: what JSON lacks becomes text instead ("nan", a path), so that a log keeps it.
    """
    if isinstance(value, dict):
        return {str(key): plain(item, words=words) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item, words=words) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value) if words else None
    if words and not isinstance(value, (str, int, float, type(None))):
        return str(value)
    return value
