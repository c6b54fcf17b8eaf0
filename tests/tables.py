"""The tables of a page of documentation."""

from __future__ import annotations


def tables(text: str) -> list[list[list[str]]]:
    """Return the tables of a page, each as rows of cells, the header first."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
            if not set("".join(cells)) <= set("-|"):
                found[-1].append(cells)
        elif found[-1]:
            found.append([])
    return [table for table in found if table]
