"""Why a prompt gives no pair. The reasons are counted and reported, so each has one name."""

from __future__ import annotations

from enum import StrEnum


class DropReason(StrEnum):
    """Returned in place of a pair."""

    TOO_FEW_SCORED = "too_few_scored"
    """Fewer than two responses have a score."""
    EQUAL_SCORES = "equal_scores"
    """The best and the worst score are the same."""
    SAME_RESPONSE = "same_response"
    """One response is the chosen and the rejected one (possible only from rho = 1/2 up)."""
    NOT_BETTER = "not_better"
    """The chosen response does not score above the rejected one (possible only from rho = 1/2 up)."""
    CHOSEN_TOO_LONG = "chosen_too_long"
    """The chosen text exceeds the iteration's limit."""
    NO_VERDICTS = "no_verdicts"
    """No comparison of the response's judgments has a readable winner."""
    TIED = "tied"
    """The judgments' Elo scores are the same."""
