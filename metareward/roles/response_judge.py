"""The response judge: asks which of two responses to an instruction is better, and reads it.

No role of the paper's loop, whose judge scores one response at a time (section 2.1); this one assesses models against each other,
as AlpacaEval and Arena-Hard do. It is asked in both orders by the caller, for judges prefer a position.
"""

from __future__ import annotations

from metareward.roles.templates import Message, fill_template, user_message
from metareward.roles.winner import Winner, winner_parser

_parse = winner_parser("(?:response|answer)")


def response_judge_messages(
    template: str, instruction: str, response_a: str, response_b: str
) -> list[Message]:
    """The conversation whose next turn names the better of two responses to `instruction`.

    Args:
        template: from `load_template("response_judge", ...)`.
        instruction: the prompt that both answer.
        response_a: the response shown first.
        response_b: the response shown second.
    """
    values = {"instruction": instruction, "response_a": response_a, "response_b": response_b}
    return user_message(fill_template(template, values))


def parse_better_response(text: str) -> Winner | None:
    """Who wins: "first" for Response A, "second" for Response B, None where the text does not say so; see `winner`."""
    return _parse(text)
