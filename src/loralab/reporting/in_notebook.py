"""Figures as a notebook draws them: the library that draws them is in the cell's output, and nothing is fetched."""

import json
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

import altair as alt

from loralab.reporting.vega import bundle


class NotebookFigure(alt.LayerChart):
    """An Altair chart that Altair's default renderer, which would fetch its library, does not draw."""

    def _repr_mimebundle_(self, *args: Any, **kwds: Any) -> Any:
        if alt.renderers.active != "default":
            return super()._repr_mimebundle_(*args, **kwds)
        return {"text/html": _html(self.to_dict()), "text/plain": repr(self)}


def shown(spec: Mapping[str, Any], title: str) -> NotebookFigure:
    """The figure of ``spec`` with a title above it."""
    chart: NotebookFigure = NotebookFigure.from_dict(dict(spec), validate=False).properties(title=title)
    return chart


def _html(spec: Mapping[str, Any]) -> str:
    """The script is a function, since a notebook is one page, where the library's names may be declared once."""
    name = f"loralab-{uuid4().hex}"
    text = json.dumps(spec).replace("</", "<\\/")
    script = f'(() => {{{bundle()}\nvegaEmbed("#{name}", {text});\n}})();'
    return f'<div id="{name}"></div><script>{script}</script>'
