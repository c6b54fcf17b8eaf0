"""What an expression of PromQL is made of, as far as tests ask."""

from __future__ import annotations

import re

_WORDS = {"by", "without", "on", "ignoring", "group_left", "group_right", "and", "or", "unless"}
_WORDS |= {"bool", "offset", "inf", "nan", "atan2", "start", "end"}
_LABELS = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_NAME = re.compile(r"[a-zA-Z_:][\w:]*(?!\w)(?!\s*\()")


def metrics_of(expression: str) -> set[str]:
    """The names of the series that an expression reads; `$variables` of dashboards may be in it."""
    text = re.sub(r'"(?:[^"\\]|\\.)*"', '""', expression)
    text = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\$\{?\w+\}?", " ", text)
    text = _LABELS.sub(" ", text)
    text = re.sub(r"\b\d[\w.]*", " ", text)
    found = {found[0] for found in _NAME.finditer(text) if not re.match(r"\s*\(", text[found.end() :])}
    return {name for name in found if name.lower() not in _WORDS}
