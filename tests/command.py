"""`resnet-fused` in this process: its exit code checked, its JSON read strictly."""

from __future__ import annotations

import json
from typing import Any

from click.testing import CliRunner, Result

from resnet_fused.cli import main


def run(*arguments: object, code: int = 0) -> Result:
    """Runs a command line that has to end with this exit code."""
    result = CliRunner().invoke(main, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def as_json(*arguments: object, code: int = 0) -> Any:
    """What it prints with `--json`, and nothing on stderr."""
    result = run(*arguments, "--json", code=code)
    assert result.stderr == ""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(result.stdout, parse_constant=refuse)
