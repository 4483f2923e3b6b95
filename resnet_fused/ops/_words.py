"""A user's word on which way layers take: an environment variable, or a block of code."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

WORDS = ("auto", "never", "always")


class Word:
    """One of `WORDS`.

    Args:
        environment: the variable that holds it; "auto" where there is none.
    """

    def __init__(self, environment: str) -> None:
        self._environment = environment
        self._read: str | None = None
        self._preferred: list[str] = []

    def __call__(self) -> str:
        """The innermost `preferring`'s, else what the environment says, read once.

        Raises:
            ValueError: it is none of `WORDS`.
        """
        if self._preferred:
            return self._preferred[-1]
        if self._read is None:
            word = os.environ.get(self._environment) or WORDS[0]
            if word not in WORDS:
                raise ValueError(
                    f"environment variable {self._environment} is {word!r}; accepted are "
                    f"{', '.join(WORDS)}"
                )
            self._read = word
        return self._read

    @contextlib.contextmanager
    def preferring(self, word: str) -> Iterator[None]:
        """Has a word stand in for the environment's, in all threads: for checks and timings."""
        self._preferred.append(word)
        try:
            yield
        finally:
            self._preferred.remove(word)

    def cache_clear(self) -> None:
        """Has the environment be read again."""
        self._read = None
