"""How the pages are built: the generated table, and the headings of our docstrings."""

import re

import griffe

import jaxquant

TABLES = {
    "<!-- dtype-table -->": lambda: jaxquant.dtype_table().markdown(),
    "<!-- gguf-names -->": lambda: ", ".join(jaxquant.io.gguf.ARCHITECTURES),
    "<!-- gguf-types -->": lambda: jaxquant.io.gguf.support_table(),
    "<!-- hf-formats -->": lambda: jaxquant.io.hf.support_table(),
}


def on_page_markdown(markdown: str, **kwargs) -> str:
    """Tables are computed by the package, so that they cannot go stale."""
    for marker, table in TABLES.items():
        markdown = markdown.replace(marker, table()) if marker in markdown else markdown
    return markdown


class Headings(griffe.Extension):
    """Our docstrings have one `Example:`; the parser knows the section as `Examples:`."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
