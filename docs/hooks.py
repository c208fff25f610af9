"""How the pages are built: the generated table, and the headings of our docstrings."""

import re

import griffe

import jaxquant

MARKER = "<!-- dtype-table -->"


def on_page_markdown(markdown: str, **kwargs) -> str:
    """The table is computed by the package, so that it cannot go stale."""
    return markdown.replace(MARKER, jaxquant.dtype_table().markdown()) if MARKER in markdown else markdown


class Headings(griffe.Extension):
    """Our docstrings have one `Example:`; the parser knows the section as `Examples:`."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
