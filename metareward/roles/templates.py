"""Prompt templates: load, check, fill.

A template is plain text with `{name}` where a value goes. It is checked once, when it is loaded, so that a
misspelt placeholder fails before any text is sampled. It is filled in one pass: what a value contains is
never read as a placeholder, so a response about `{instruction}` stays what it is.

A value cannot leave its tags. Where the template closes a tag, as in `</response>`, the same closing tag
inside a value gets a backslash, `<\\/response>`; every other character of a value is left alone, and text
that has no such tag is not changed at all. The tag names are taken from the template, so a template with tags
of its own is protected in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Literal

from metareward.errors import UserError

Role = Literal["judge", "meta_judge", "response_judge"]
Message = dict[str, str]

PLACEHOLDERS: Mapping[str, frozenset[str]] = {
    "judge": frozenset({"instruction", "response"}),
    "meta_judge": frozenset({"instruction", "response", "judgment_a", "judgment_b"}),
    "response_judge": frozenset({"instruction", "response_a", "response_b"}),
}

_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
# Also what people write who know another template language: "{{name}}", "{ name }". Read as text, such a slip
# would put the word "instruction" before the model instead of the instruction.
_MEANT_AS_PLACEHOLDER = re.compile(r"\{+[ \t]*([A-Za-z_][\w-]*)[ \t]*\}+")
_CLOSING_TAG = re.compile(r"</(\w+)>")


def load_template(role: Role, path: Path | None = None) -> str:
    """The template of a role: the packaged one, or the user's file.

    Args:
        role: "judge" (placeholders instruction, response), "meta_judge" (those, judgment_a and judgment_b) or "response_judge"
            (instruction, response_a and response_b).
        path: a UTF-8 text file; None takes the packaged template.

    Returns:
        The text, without blank space at either end.

    Raises:
        UserError: the file cannot be read, or a placeholder is missing, used twice, or unknown.
        ValueError: `role` is no role.
    """
    if role not in PLACEHOLDERS:
        raise ValueError(f"role must be one of {', '.join(PLACEHOLDERS)}, not {role!r}")
    if path is None:
        packaged = resources.files("metareward.roles") / "templates" / f"{role}.txt"
        text, name = packaged.read_text(encoding="utf-8"), str(packaged)
    else:
        text, name = _read(Path(path)), str(path)
    _check(text, PLACEHOLDERS[role], f"{role} template {name}")
    return text.strip()


def fill_template(template: str, values: Mapping[str, str]) -> str:
    """Put every value in its place, in one pass over the template.

    Args:
        template: from `load_template`.
        values: exactly one value for each placeholder of the template.

    Raises:
        ValueError: the names of the values are not those of the template's placeholders.
    """
    names, closing = _parts(template)
    if names != values.keys():
        raise ValueError(f"the template has placeholders {sorted(names)}, the values are {sorted(values)}")

    def value(match: re.Match[str]) -> str:
        text = values[match[1]]
        return closing.sub(r"\1\\/", text) if closing else text

    return _PLACEHOLDER.sub(value, template)


def user_message(content: str) -> list[Message]:
    """A conversation of one user turn, the form in which every role is asked."""
    return [{"role": "user", "content": content}]


@lru_cache(maxsize=16)
def _parts(template: str) -> tuple[frozenset[str], re.Pattern[str] | None]:
    # Cached because one template is filled hundreds of thousands of times in an iteration.
    names = frozenset(_PLACEHOLDER.findall(template))
    tags = sorted(set(_CLOSING_TAG.findall(template)))
    if not tags:
        return names, None
    # "</ RESPONSE >" closes the tag in a reader's eyes as well, so case and blanks do not matter.
    return names, re.compile(rf"(<\s*)/(?=\s*(?:{'|'.join(tags)})\b)", re.IGNORECASE)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"the template {path} is not UTF-8 text: save it as UTF-8") from error
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"the template {path} cannot be read ({reason}): check the path") from error


def _check(text: str, required: frozenset[str], name: str) -> None:
    wanted = ", ".join("{" + placeholder + "}" for placeholder in sorted(required))
    seen: list[str] = []
    for match in _MEANT_AS_PLACEHOLDER.finditer(text):
        placeholder = match[1]
        if placeholder not in required:
            raise UserError(f"{name} has the unknown placeholder {match[0]}: it may use only {wanted}")
        if match[0] != "{" + placeholder + "}":
            raise UserError(f"{name} has {match[0]}: write {{{placeholder}}} instead")
        if placeholder in seen:
            raise UserError(f"{name} has {{{placeholder}}} more than once: keep one")
        seen.append(placeholder)
    for placeholder in sorted(required - set(seen)):
        raise UserError(f"{name} lacks the placeholder {{{placeholder}}}: it needs {wanted}")
