"""Build walkthrough.ipynb: Part I from the cells below, Part II from the notebook as it stands.

build.py OUT.ipynb [SECTION...] writes the notebook, or only the named sections of Part I ("0" is
what all of them need)."""
import json
import pathlib
import sys
import textwrap

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

HERE = pathlib.Path(__file__).parent
CELLS, SECTION = [], "0"


def section(name):
    global SECTION
    SECTION = name


def wrapped(paragraph):
    lines = paragraph.split("\n")
    marks = "|", "#", "$$", "<", "```", "    ", ">", "* "
    if any(line.startswith(marks) for line in lines):
        return paragraph
    return textwrap.fill(" ".join(lines), 94, break_long_words=False, break_on_hyphens=False)


def md(text):
    parts, fenced = [], False
    for paragraph in text.strip("\n").split("\n\n"):
        inside = fenced or "```" in paragraph
        fenced ^= paragraph.count("```") % 2
        parts.append(paragraph if inside else wrapped(paragraph))
    CELLS.append((SECTION, new_markdown_cell("\n\n".join(parts))))


def py(text):
    CELLS.append((SECTION, new_code_cell(text.strip("\n"))))


exec(compile((HERE / "part1.py").read_text(), "part1.py", "exec"))

out, only = pathlib.Path(sys.argv[1]), sys.argv[2:]
cells = [cell for name, cell in CELLS if not only or name in ["0", *only]]
if not only or "II" in only:
    old = json.loads((HERE / "part2.json").read_text())
    first, *rest = [nbformat.from_dict(cell) for cell in old]
    helper = new_code_cell((HERE / "part2_helper.py").read_text().strip("\n"))
    cells += [first, helper, *rest]
for i, cell in enumerate(cells):
    cell["id"] = f"cell-{i:03d}"
    if cell["cell_type"] == "code":
        cell["outputs"], cell["execution_count"] = [], None
book = new_notebook(cells=cells, metadata=dict(
    kernelspec=dict(display_name="Python 3", language="python", name="python3"),
    language_info=dict(name="python")))
nbformat.write(book, out)
print(len(cells), "cells")
