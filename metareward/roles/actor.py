"""The actor: the model as it answers a user. It gets the prompt as it is, with nothing around it."""

from __future__ import annotations

from metareward.roles.templates import Message, user_message


def actor_messages(prompt: str) -> list[Message]:
    """The conversation whose next turn is the actor's response to `prompt`."""
    return user_message(prompt)
