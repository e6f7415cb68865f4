"""What a page carries in its script elements, read back."""

import base64
import gzip
import json
import re


def _content(head, text):
    return json.loads(gzip.decompress(base64.b64decode(text)) if "data-gzip" in head else text)


def figure_of(page, name):
    """A figure: its legends, its specification with the rows, and what the page chooses from."""
    inside = page[page.index(f'<figure data-figure="{name}">') :].split("</figure>")[0]
    return _content(*re.search(r"<script([^>]*)>(.*?)</script>", inside, re.S).groups())


def trials_of(page):
    """{column: values} of all trials."""
    head, text = re.search(r'<script([^>]*class="trials")>(.*?)</script>', page, re.S).groups()
    values = _content(head, text)["values"]
    count = next(len(column) for column in values.values() if isinstance(column, list))
    values = {key: values[column["as"]] if "as" in column else column for key, column in values.items()}
    return {key: column if isinstance(column, list) else [column["all"]] * count for key, column in values.items()}


def bare(page):
    """The page without Vega and without what it carries: its HTML, styles and own script."""
    return re.sub(r'<script (id="vega"|type=)[^>]*>.*?</script>', "", page, flags=re.S)
