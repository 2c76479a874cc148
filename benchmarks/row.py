"""One figure with its goal."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """A line of the table: without a goal it is information."""

    measure: str
    figure: str
    goal: str = ""
    reached: bool = True
    value: float = 0.0  # the figure as a number, for comparisons

    def __str__(self) -> str:
        mark = "" if not self.goal else "ok" if self.reached else "MISSED"
        return f"{self.measure:48} {self.figure:52} {self.goal:28} {mark}"


def at_least(measure: str, value: float, goal: float, figure: str = "", unit: str = "/s") -> Row:
    """Return the row of a rate that should be at least *goal*."""
    return Row(measure, figure or f"{value:,.0f}{unit}", f">= {goal:,.0f}{unit}", value >= goal, value)
