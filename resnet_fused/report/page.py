"""The page: one HTML file that needs no other, with both pictures inside."""

from __future__ import annotations

import base64
from typing import Any

import jinja2

from resnet_fused.report.picture import draw


def render(content: dict[str, Any], picture: bytes | None = None) -> str:
    """Renders the page.

    Args:
        content: the record of `resnet-fused verify --json`.
        picture: its light PNG if that is drawn already.

    Returns:
        HTML text. Whatever the record holds (file names, reasons) is escaped.
    """
    environment = templates()
    environment.filters |= {"sci": _scientific, "fixed": _fixed, "percent": _percent}
    drawn = {"light": picture or draw(content, "light"), "dark": draw(content, "dark")}
    pictures = {theme: base64.b64encode(png).decode() for theme, png in drawn.items()}
    layers = content["verification"]["layers"]
    worst = max((x["bound_use"] for x in layers if x["bound_use"] is not None), default=None)
    reasons = {row["implementation"]: row["why"] for row in content["explanation"]["rows"]}
    return environment.get_template("template.html").render(
        **content, pictures=pictures, worst=worst, reasons=reasons
    )


def templates() -> jinja2.Environment:
    """The pages' templates: what they are given is escaped, what they lack is an error."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("resnet_fused.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _scientific(value: float | None) -> str:
    return "none" if value is None else f"{value:.2e}"


def _fixed(value: float | None, digits: int = 3) -> str:
    return "none" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"
