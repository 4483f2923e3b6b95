"""What a user sees when something cannot be done: one line on stderr and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

# What an installation may lack -> what to install for it.
OPTIONAL = {
    "torchvision": "torchvision",
    "timm": "timm",
    "PIL": "pillow",
    "matplotlib": "matplotlib",
    "jinja2": "jinja2",
    "sklearn": "scikit-learn",
    "scipy": "scipy",
    "safetensors": "safetensors",
    "google": "protobuf",
    "pydantic": "pydantic",
    "jsonschema": "jsonschema",
}


class UserError(click.ClickException):
    """Something that the user gave, and how to put it right."""

    exit_code = 2


class Group(click.Group):
    """A group that reports every expected error as `error: ...` on one line."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Runs a command; see `click.Group.main`."""
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)
        try:
            outcome = super().main(*args, standalone_mode=False, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(2)
        except click.ClickException as error:
            _say(error.format_message())
            sys.exit(2)
        except click.Abort:
            _say("interrupted")
            sys.exit(130)
        except ModuleNotFoundError as error:
            package = OPTIONAL.get((error.name or "").partition(".")[0])
            if package is None:
                raise
            _say(f"this needs {package}, which is not installed; run `pip install {package}`")
            sys.exit(2)
        sys.exit(outcome if isinstance(outcome, int) else 0)


def _say(message: str) -> None:
    click.echo("error: " + " ".join(message.split()), err=True)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns the ValueError or TypeError that bad input causes in the library into a `UserError`.

    Only around calls that judge what the user gave: anywhere else such an error is a defect of the
    program, and its traceback is wanted.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
