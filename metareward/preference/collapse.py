"""Which figures of an iteration pass the limits of the recipe: the signs of a judge that is no judge any more.

The paper's table 5 is the warning: within two iterations its meta-judge preferred the judgment with the higher score in 97.7 %
of comparisons, and its judge's mean went from 4.1 to above 4.7. Numbers in, sentences out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from metareward.config import GuardSettings


@dataclass(frozen=True)
class Measured:
    """A figure of one iteration. `observations`: how many judgments or comparisons it is a figure of; None: nothing to measure."""

    name: str
    value: float | None
    observations: int


@dataclass(frozen=True)
class Breach:
    """A figure that is beyond its limit; `setting` is the limit's name in the recipe's [guard]."""

    name: str
    value: float
    limit: float
    observations: int
    setting: str

    def sentence(self) -> str:
        """What was measured, and against what."""
        told = {
            "parse_rate": f"only {self.value:.1%} of {self.observations} judgments could be read",
            "score_entropy": f"the entropy of {self.observations} scores is only {self.value:.2f} nat",
            "mean_drift": f"the mean of {self.observations} scores is {self.value:+.2f} points from iteration 1",
            "position_preference": f"the meta-judge prefers one position in {self.value:.1%} of {self.observations} comparisons",
            "higher_score_preference": (
                f"the meta-judge prefers the higher score in {self.value:.1%} of {self.observations} comparisons"
            ),
        }[self.name]
        return f"{told} (guard.{self.setting} = {self.limit:g})"


def position_bias(first_preference: float | None) -> float | None:
    """How often the preferred position wins, whichever it is: 1/2 is unbiased, 1 always the same position."""
    return None if first_preference is None else max(first_preference, 1.0 - first_preference)


def breaches(measured: Iterable[Measured], settings: GuardSettings) -> list[Breach]:
    """The figures beyond their limits, in the order given.

    A figure of fewer than `settings.min_observations` observations is chance more than bias, and passes; so does one that is
    exactly at its limit.

    Raises:
        ValueError: a figure that has no limit.
    """
    limits = {
        "parse_rate": ("min_parse_rate", settings.min_parse_rate),
        "score_entropy": ("min_score_entropy", settings.min_score_entropy),
        "mean_drift": ("max_mean_drift", settings.max_mean_drift),
        "position_preference": ("max_position_preference", settings.max_position_preference),
        "higher_score_preference": ("max_higher_score_preference", settings.max_higher_score_preference),
    }
    found = []
    for item in measured:
        if item.name not in limits:
            raise ValueError(f"there is no limit on {item.name}")
        setting, limit = limits[item.name]
        if item.value is None or item.observations < settings.min_observations:
            continue
        beyond = item.value < limit if setting.startswith("min_") else abs(item.value) > limit
        if beyond:
            found.append(Breach(item.name, item.value, limit, item.observations, setting))
    return found
