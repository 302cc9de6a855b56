"""Parts that all pages share: the frame of a page, escaped text, badges and small tables."""

from __future__ import annotations

import base64
import gzip
import html
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

#: Nothing may be fetched from anywhere: a page holds all it needs and tells nobody that it was opened.
_POLICY = (
    "default-src 'none'; img-src data: blob: 'self' file:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline' blob:; connect-src data: blob:; font-src data: blob:; worker-src blob:"
)

_FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
{head}<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body class="{kind}">
{body}
{scripts}</body>
</html>
"""


@cache
def asset(name: str) -> str:
    """Text of a file that comes with this package."""
    return (resources.files(__package__) / "assets" / name).read_text(encoding="utf-8")


@cache
def packed_asset(name: str) -> str:
    """The same, compressed, in base64; the same bytes every time."""
    return base64.b64encode(gzip.compress(asset(name).encode(), mtime=0)).decode("ascii")


def text(value: object) -> str:
    """Text for HTML, quotes included."""
    return html.escape(str(value), quote=True)


def data_block(name: str, content: Any) -> str:
    """Values for the scripts of a page, as an element that holds JSON."""
    # "</script>" in a name must not end the element, and JSON has no NaN.
    packed = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        packed = packed.replace(sign, f"\\u{ord(sign):04x}")
    return f'<script type="application/json" id="{name}">{packed}</script>\n'


def page(title: str, kind: str, body: str, *, head: str = "", data: str = "", scripts: Sequence[str] = ()) -> str:
    """A whole page.

    Parameters
    ----------
    title : str
        Not escaped yet.
    kind : str
        Class of the body.
    body, head, data : str
        HTML; ``head`` comes first of all, so that it can be read without the rest.
    scripts : sequence of str
        Names of assets to run, in order.
    """
    running = "".join(f"<script>{asset(name)}</script>\n" for name in scripts)
    return _FRAME.format(
        policy=_POLICY,
        head=head,
        title=text(title),
        style=asset("report.css"),
        kind=kind,
        body=body,
        scripts=data + running,
    )


def badge(verdict: str | None) -> str:
    """A verdict as a coloured word; a dash for none."""
    return '<span class="none">-</span>' if verdict is None else f'<span class="badge {verdict}">{verdict}</span>'


def swatch(color: Sequence[int]) -> str:
    """A small square of a structure's colour."""
    return f'<i class="swatch" style="background:rgb({color[0]},{color[1]},{color[2]})"></i>'


def score(value: float | None, digits: int = 2) -> str:
    """A number between 0 and 1; a dash for none."""
    return '<span class="none">-</span>' if value is None else f"{value:.{digits}f}"


def millilitres(volume_ml: float) -> str:
    """A volume with about three digits, without its unit."""
    return f"{volume_ml:,.0f}" if volume_ml >= 99.5 else f"{volume_ml:.3g}"


def duration(seconds: float | None) -> str:
    """Seconds in words that fit the length."""
    if seconds is None:
        return "-"
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 99.5 else f"{minutes / 60:.1f} h"


def tile(head: str, value: str, remark: str = "", kind: str = "") -> str:
    """A number to be seen first; ``value`` and ``remark`` are HTML."""
    below = f"<small>{remark}</small>" if remark else ""
    return f'<div class="tile {kind}"><span>{text(head)}</span><b>{value}</b>{below}</div>'


def pairs_table(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values, the values as HTML."""
    return '<table class="pairs">' + "".join(f"<tr><th>{text(k)}</th><td>{v}</td></tr>" for k, v in rows) + "</table>"


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as "section.key" to value, in their order."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, ensure_ascii=False)
    return flat


def model_table(model: Mapping[str, Any]) -> str:
    """What made the result, and under which licences."""
    if model.get("name") in (None, "none"):
        return pairs_table([("model", "none: the result is the warped atlas")])
    weights = str(model.get("weights_licence") or "-")
    shown = text(weights)
    if "NC" in weights.upper().replace("_", "-").split("-") or "non-commercial" in weights.lower():
        shown += ' <span class="badge review">no commercial use</span>'
    rows = [
        ("model", f"<b>{text(model['name'])}</b>"),
        ("what it is", text(model.get("summary") or "-")),
        ("prompt", text(model.get("prompt") or "-")),
        ("licence of its code", text(model.get("code_licence") or "-")),
        ("licence of its weights", shown),
    ]
    if model.get("licence_accepted"):
        rows.append(("licence accepted on", text(model["licence_accepted"])))
    return pairs_table(rows)


def footer(versions: Mapping[str, Any]) -> str:
    """Who made it, and what it may not be used for."""
    made = text(versions.get("atlassegfm", ""))
    return (
        f"<footer>AtlasSegFM {made}. For research; not a medical device. "
        "This page holds no names of patients beyond those of the result folders, and loads nothing from anywhere."
        "</footer>"
    )
