"""Messages to token ids and back, through the model's own chat template.

Text becomes ids once. A prompt is rendered to ids by `render`; a written completion (a seed example) is
encoded by `encode_completion`; a sampled one is already ids. Prompt ids followed by completion ids are what
is trained on, so the prompt is a prefix of the whole by construction.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from metareward.errors import UserError
from metareward.model.hf_files import read_json

logger = logging.getLogger(__name__)

PROBE = "Zq7 probe"


class Chat:
    """The tokenizer, chat template and stop ids of one model directory.

    Attributes: `end_of_turn`, the id that closes an assistant's message in the template; `stop_ids`, every
    id at which sampling ends: end_of_turn, the tokenizer's eos and those of config.json and
    generation_config.json.
    """

    end_of_turn: int
    stop_ids: frozenset[int]

    def __init__(
        self, tokenizer: Any, name: str, template_kwargs: Mapping[str, Any], eos_ids: Iterable[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._name = name
        self._template_kwargs = dict(template_kwargs)
        self._special_tokens = _special_tokens(tokenizer)
        self._leading_bos = _leading_bos(tokenizer)
        configured = set(eos_ids)
        if tokenizer.eos_token_id is not None:
            configured.add(int(tokenizer.eos_token_id))
        self.end_of_turn = self._find_end_of_turn(configured)
        self.stop_ids = frozenset(configured | {self.end_of_turn})

    @staticmethod
    def load(directory: Path, template_kwargs: Mapping[str, Any] | None = None) -> Chat:
        """Read a model directory's tokenizer. `template_kwargs` go to every rendering (Qwen3:
        {"enable_thinking": False}).

        Some templates write today's date; give them a fixed one (Llama 3.2: {"date_string": "26 Jul
        2024"}), or a run that goes on after midnight renders other prompts.

        Raises UserError when there is no tokenizer, no chat template, or the template fails.
        """
        # Imported here: transformers takes seconds, and not every command needs a tokenizer.
        from transformers import AutoTokenizer

        directory = Path(directory)
        if not directory.is_dir():
            raise UserError(f"There is no model directory {directory}: check the path.")
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        except Exception as error:
            raise UserError(
                f"{directory} has no tokenizer that transformers can load ({_first_line(error)}):"
                " copy the tokenizer files there."
            ) from None
        if not tokenizer.chat_template:
            raise UserError(
                f"The tokenizer in {directory} has no chat template:"
                " use a chat model, or add a chat_template.jinja."
            )
        return Chat(tokenizer, str(directory), template_kwargs or {}, _configured_eos(directory))

    def render(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of the conversation up to where the assistant begins to write, with one BOS where the model
        has one.

        A special token spelled out in a message's text is broken by a space ("<|im_end|>" becomes "<
        |im_end|>"), so that no prompt or judged response can end its own turn and write the verdict.
        """
        ids = self._encode(self._apply_template(messages, add_generation_prompt=True))
        if self._leading_bos is None:
            return ids
        while len(ids) > 1 and ids[0] == ids[1] == self._leading_bos:
            del ids[0]
        return ids if ids[0] == self._leading_bos else [self._leading_bos, *ids]

    def encode_completion(self, text: str) -> list[int]:
        """Ids of an assistant's text and the end-of-turn id; special tokens in the text are broken as in
        `render`.
        """
        return [*self._encode(self._break_special_tokens(text)), self.end_of_turn]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of sampled ids, without special tokens and without the stop id at the end."""
        ids = list(ids)
        if ids and ids[-1] in self.stop_ids:
            del ids[-1]
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _apply_template(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        safe = [{**m, "content": self._break_special_tokens(m["content"])} for m in messages]
        try:
            return self._tokenizer.apply_chat_template(
                safe, add_generation_prompt=add_generation_prompt, tokenize=False, **self._template_kwargs
            )
        except Exception as error:
            raise UserError(
                f"The chat template of {self._name} failed ({_first_line(error)}):"
                " change the messages or the template."
            ) from None

    def _break_special_tokens(self, text: str) -> str:
        for token in self._special_tokens:
            if token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def _find_end_of_turn(self, eos_ids: set[int]) -> int:
        """The first special or eos id that the template writes after an assistant's text."""
        turn = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": PROBE}]
        rendered = self._apply_template(turn, add_generation_prompt=False)
        _, found, tail = rendered.rpartition(PROBE)
        if not found:
            raise UserError(
                f"The chat template of {self._name} does not write the assistant's text:"
                " use another template."
            )
        special = eos_ids | {i for i, t in self._tokenizer.added_tokens_decoder.items() if t.special}
        for token in self._encode(tail):
            if token in special:
                return token
        if self._tokenizer.eos_token_id is None:
            raise UserError(f"{self._name} has no end-of-turn token: set eos_token in tokenizer_config.json.")
        return int(self._tokenizer.eos_token_id)


def _special_tokens(tokenizer: Any) -> list[str]:
    """Every special token's spelling, longest first, so that none is broken inside a longer one."""
    spellings = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    spellings.update(tokenizer.all_special_tokens)
    return sorted((s for s in spellings if len(s) > 1), key=lambda s: (-len(s), s))


def _leading_bos(tokenizer: Any) -> int | None:
    """The BOS id that the tokenizer itself puts before plain text, or None."""
    ids = tokenizer("a")["input_ids"]
    return ids[0] if ids and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else None


def _configured_eos(directory: Path) -> set[int]:
    ids: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        if (directory / name).is_file():
            eos = read_json(directory / name).get("eos_token_id")
            ids.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return ids


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
