"""Plans: a text that lists the steps of an interleaved sequence, and the steps in it. Source: spec of Loom, "Data"."""

from __future__ import annotations

import re

_NAMED = re.compile(r"\bstep\s*(\d{1,9})\s*[:.)]\s*", re.IGNORECASE)
"""`Step1:`, `step 2.`, anywhere in the text."""
_NUMBERED = re.compile(r"(?:^|(?<=[,;.]))\s*(\d{1,9})[:.)](?=\s)\s*", re.MULTILINE)
"""`1. ` at the start of a line or after a comma, semicolon or full stop."""
_ORIGINAL = re.compile(r"Step\d+:\s*(.*?)(?=,\s*Step|$)")
_AROUND = " \t\r\n,;"


def parse_steps(text: str, original: bool = False) -> list[str]:
    """Returns the texts of the steps in `text`, in order; none if it lists no steps.

    Steps begin with `Step 1:`, `step1.` or the like, or else with `1.`; they are numbered one after the other and
    parted by line breaks, commas or semicolons. A number out of turn (`as in Step 1:`) belongs to the text around it.

    Args:
      text: the plan.
      original: read it as the published training code did: `StepN:` spelled just so, parted by `, Step`, and with line
        breaks only the last step is found (needed only to compare with recorded rows).
    """
    if original:
        return [step.strip() for step in _ORIGINAL.findall(text)]
    for pattern in (_NAMED, _NUMBERED):
        marks = _in_turn(list(pattern.finditer(text)))
        if marks:
            ends = [mark.start() for mark in marks[1:]] + [len(text)]
            return [text[mark.end() : end].strip(_AROUND) for mark, end in zip(marks, ends, strict=True)]
    return []


def _in_turn(marks: list[re.Match[str]]) -> list[re.Match[str]]:
    """Returns the marks that count on from the first one, one by one."""
    kept: list[re.Match[str]] = []
    for mark in marks:
        if not kept or int(mark[1]) == int(kept[-1][1]) + 1:
            kept.append(mark)
    return kept
