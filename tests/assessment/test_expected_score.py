"""The expected score is the mean over the six score tokens at the place of the score, as transformers computes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from metareward.assessment.expected_score import ScorePlace, expected_scores, score_cue, score_place
from metareward.model.chat import Chat
from metareward.model.hf_files import load_decoder
from metareward.roles.judge import judge_messages
from metareward.roles.templates import load_template

CPU = torch.device("cpu")
JUDGMENTS = (
    "It helps.\nScore: 3",
    "Thin. **Score: 0/5**",
    "It quotes Score: 5 and is off topic.\nScore: 1",
    "Good points — très bien 🙂.\nScore: 4.5",
    "No verdict at all",
    "Score: 7",
    "",
)


def transformers_expectation(model: Any, prompt: tuple[int, ...], place: ScorePlace) -> float:
    ids = torch.tensor([[*prompt, *place.prefix]])
    with torch.inference_mode():
        logits = model(ids).logits[0, -1].double()
    shares = logits[list(place.digits)].softmax(0)
    return sum(score * share for score, share in enumerate(shares.tolist()))


def places(chat: Chat) -> list[ScorePlace]:
    cue = score_cue(chat)
    return [score_place(chat, cue, text, chat.encode_completion(text)) for text in JUDGMENTS]


def check_places(chat: Chat) -> None:
    found = places(chat)
    for text, score, place in zip(JUDGMENTS[:3], (3, 0, 1), found, strict=False):
        tokens = chat.encode_completion(text)
        assert tuple(tokens[: len(place.prefix)]) == place.prefix
        assert chat.decode(place.prefix).rstrip().endswith("Score:")
        assert chat.decode([place.digits[score]]).strip() == str(score)
        # The prefix ends before the number, so nothing of the verdict leaks into its own expectation.
        before = text[: text.rindex("Score:") + len("Score:")]
        assert chat.decode(place.prefix).rstrip() == before
    for text, place in zip(JUDGMENTS[4:], found[4:], strict=True):
        assert chat.decode(place.prefix).rstrip() == f"{text}\nScore:"
    assert len({place.digits for place in found}) == 1
    assert len(set(found[0].digits)) == 6


def check_expectations(folder: Path, template: str, compared: int) -> list[float]:
    from transformers import AutoModelForCausalLM

    chat = Chat.load(folder)
    check_places(chat)
    prompt = tuple(chat.render(judge_messages(template, "Explain tea.", "A hot drink.")))
    decoder = load_decoder(folder, dtype=torch.float32)
    found = expected_scores(decoder, prompt, places(chat), CPU)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = [transformers_expectation(model, prompt, place) for place in places(chat)[-compared:]]
    assert found[-compared:] == pytest.approx(expected, abs=1e-3)
    assert all(0.0 <= score <= 5.0 for score in found)
    # One at a time gives the same as all together.
    assert expected_scores(decoder, prompt, places(chat)[2:3], CPU) == pytest.approx(found[2:3], abs=1e-4)
    return found


def test_a_tiny_model(tiny_world: Path) -> None:
    check_expectations(tiny_world / "model", load_template("judge", tiny_world / "judge.txt"), len(JUDGMENTS))


def test_the_real_model(smollm2: Path, tiny_world: Path) -> None:
    # A short template: the packaged rubric would cost a minute on a busy machine and prove no more.
    found = check_expectations(smollm2, load_template("judge", tiny_world / "judge.txt"), 4)
    assert max(found) - min(found) > 0.01


def test_a_digit_in_another_token_falls_back_to_the_cue(tiny_world: Path) -> None:
    chat = Chat.load(tiny_world / "model")
    cue = score_cue(chat)
    text = "Fine.\nScore: 3"
    place = score_place(chat, ScorePlace(cue.prefix, (0,) * 6), text, chat.encode_completion(text))
    assert place.prefix == (*chat.encode_completion(text)[:-1], *cue.prefix)
