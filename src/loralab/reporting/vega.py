"""Vega: the library that a page carries, and figures as files. Nothing is fetched; imported when first used."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from typing import Any

from loralab.records.fingerprints import cache_folder

SNIPPET = "window.vegaEmbed = vegaEmbed;"
SCALE = 2.0  # pixels of a PNG for one of the figure's


def bundle() -> str:
    """Vega, Vega-Lite and vega-embed as one script, made by vl-convert-python; seconds once, then of the user's cache.
    Nothing in it ends a script element."""
    import vl_convert

    path = cache_folder() / f"vega-{version('vl-convert-python')}.js"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    if text.endswith("\n//whole"):
        return text
    text = str(vl_convert.javascript_bundle(SNIPPET)).replace("</script", "<\\/script") + "\n//whole"
    with suppress(OSError):  # a cache that cannot be written costs seconds, no report
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    return text


def drawn(spec: Mapping[str, Any], kind: str) -> bytes:
    """A Vega-Lite figure as ``svg``, ``png`` or ``pdf``."""
    import vl_convert

    text = json.dumps(spec)
    if kind == "svg":
        return str(vl_convert.vegalite_to_svg(text)).encode()
    if kind == "png":
        return bytes(vl_convert.vegalite_to_png(text, scale=SCALE))
    return bytes(vl_convert.vegalite_to_pdf(text))
