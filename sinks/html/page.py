"""Renders the data of runs as one HTML page.

Guarantees: no text of a training ends the block of data or becomes markup; the security policy lets
the browser run only the page's own script and plotly, and load nothing from elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence
from pathlib import Path

import msgspec

from .data import Data

_STATIC = Path(__file__).with_name("static")
_CSS = (_STATIC / "page.css").read_text("utf-8")
_JS = "'use strict';\n(() => {{\n{}}})();\n".format(
    "".join(
        (_STATIC / f"{name}.js").read_text("utf-8")
        for name in ("base", "metrics", "results", "page")
    )
)
_HASH = base64.b64encode(hashlib.sha256(_JS.encode()).digest()).decode()
_POLICY = "; ".join(
    [
        "default-src 'none'",
        f"script-src 'self' file: 'sha256-{_HASH}'",
        "style-src 'unsafe-inline'",
        "img-src 'self' file: data: blob:",
        "base-uri 'none'",
        "form-action 'none'",
    ]
)


def page(runs: Sequence[Data], *, compares: bool = False) -> bytes:
    """Return the page of one run, or a comparison of several."""
    if compares:
        runs = [_metrics_only(run) for run in runs]
    shown = msgspec.json.encode({"compares": compares, "runs": runs}).decode()
    title = "comparison" if compares else str(runs[0].about.get("name") or runs[0].run)
    return _PAGE.format(
        policy=html.escape(_POLICY),
        title=html.escape("".join(c if c.isprintable() else "?" for c in title)),
        css=_CSS,
        data=shown.replace("<", "\\u003c"),
        js=_JS,
    ).encode("utf-8", "backslashreplace")


def _metrics_only(run: Data) -> Data:
    return msgspec.structs.replace(
        run, curves={}, matrices={}, histograms={}, tables={}, texts=[], pictures={}
    )


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{css}</style>
</head>
<body>
<noscript>This page draws its charts with JavaScript, which is switched off here.</noscript>
<div id="page"></div>
<script type="application/json" id="data">{data}</script>
<script src="plotly.min.js"></script>
<script>{js}</script>
</body>
</html>
"""
