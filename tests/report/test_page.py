"""report.html: self-contained, escaped, the same every time, and honest about what is not there."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from metareward.errors import UserError
from metareward.report.page import number, write_report

pytest.importorskip("matplotlib", reason="the report needs matplotlib")
pytest.importorskip("jinja2", reason="the report needs jinja2")
from tests.report.browser import Browser, find_browser

MakeRun = Callable[..., Path]
LIMIT = 3_000_000


class Page(HTMLParser):
    """Tags, ids, links and the text outside of styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def page_of(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_one_run(run: Path, assess: Callable[[Path, str, Any], None]) -> None:
    assess(run, "win.json", {"win_rate": {"value": 0.625, "interval": {"low": 0.5, "high": 0.75}}})
    out = write_report([run])
    assert out == run / "report.html"
    assert out.stat().st_size < LIMIT
    page = page_of(out)
    assert page.tags.count("svg") >= 15
    assert len(page.ids) == len(set(page.ids)), "every id once"
    for text in (
        "Scores the judge gives",
        "Biases of the meta-judge",
        "Time by stage",
        "Better answer, chosen",
        "0.625",
    ):
        assert text in page.text
    assert "the entropy of 60 scores is only 0.10 nat (guard.min_score_entropy = 0.5)" in page.text
    assert "No win rate" not in page.text
    assert "do it with metareward assess judge ... --json RUN/assessments/NAME.json" in page.text


def test_nothing_is_fetched(run: Path) -> None:
    out = write_report([run])
    page = page_of(out)
    assert all(link.startswith(("#", "data:")) for link in page.links), page.links
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags) - {"link"}
    anchors = {link[1:] for link in page.links if link.startswith("#") and link != "#"}
    assert anchors <= set(page.ids)
    html = out.read_text(encoding="utf-8")
    assert not re.search(r"@import|url\((?!#)", html)


def test_text_from_models_is_escaped(run: Path, assess: Callable[[Path, str, Any], None]) -> None:
    assess(run, "odd.json", {"<script>alert(2)</script>": {"spearman": 0.5, "$a$ & b": 1.0}, "model": "<b>"})
    out = write_report([run])
    html, page = out.read_text(encoding="utf-8"), page_of(out)
    assert "script" not in page.tags
    assert "<script" not in html
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert "alert(2)</script> / spearman" in page.text
    assert page.tags.count("style") == html.count("<style")


def test_colours_come_from_the_page(run: Path) -> None:
    html = write_report([run]).read_text(encoding="utf-8")
    assert not re.search(r"#0[abc]00[0-9a-f]{2}", html), "a stand-in colour is left"
    drawings = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert drawings
    for drawing in drawings:
        assert not re.search(r"(?:fill|stroke): #", drawing)
    used = set(re.findall(r"var\((--[\w-]+)\)", html))
    themes = html.split("prefers-color-scheme: dark")
    for name in used:
        assert all(f"{name}:" in theme for theme in themes), name


def test_the_same_files_give_the_same_page(run: Path, tmp_path: Path) -> None:
    first = write_report([run]).read_bytes()
    assert write_report([run], tmp_path / "again.html").read_bytes() == first


def test_several_runs_side_by_side(tmp_path: Path, made: MakeRun) -> None:
    roots = [
        made(tmp_path / "a" / "demo"),
        made(tmp_path / "b" / "demo", judge=False, text="calm"),
        made(tmp_path / "c", iterations=1),
        made(tmp_path / "d", iterations=0),
    ]
    out = write_report(roots)
    assert out == roots[0] / "comparison.html"
    page = page_of(out)
    for text in ("a/demo", "b/demo", "iteration.0.meta_judge: True -> False", "not finished"):
        assert text in page.text
    assert len(page.ids) == len(set(page.ids))
    assert not (roots[0] / "report.html").exists()


def test_a_run_that_has_only_begun_says_what_is_missing(tmp_path: Path, made: MakeRun) -> None:
    page = page_of(write_report([made(tmp_path / "begun", iterations=0)]))
    for text in ("No judgments yet", "No training step yet", "No pair of answers has been selected yet"):
        assert text in page.text


def test_a_run_without_a_meta_judge(tmp_path: Path, made: MakeRun) -> None:
    page = page_of(write_report([made(tmp_path / "baseline", judge=False)]))
    assert "No comparisons: they come with the meta-judge" in page.text
    assert "Scores the judge gives" in page.text


def test_long_texts_keep_the_page_small(tmp_path: Path, made: MakeRun) -> None:
    out = write_report([made(tmp_path / "long", text="<&>" * 100_000, prompts=6)])
    assert out.stat().st_size < LIMIT
    assert "more characters; see metareward show" in page_of(out).text.replace("`", "")


def test_a_half_written_iteration(run: Path) -> None:
    """Killed in the midst of the judge stage: answers, but no judgments."""
    for name in ("judgments", "actor_pairs", "comparisons", "judge_pairs"):
        (run / "iteration-2" / f"{name}.jsonl").unlink()
    assert "Length of the answers" in page_of(write_report([run])).text


def test_a_place_that_cannot_be_written(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*missing/report\.html"):
        write_report([run], tmp_path / "missing" / "report.html")


@pytest.mark.parametrize("module", ["matplotlib", "jinja2"])
def test_without_the_libraries(run: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"needs {module}: pip install 'metareward\[report\]'"):
        write_report([run])
    assert not (run / "report.html").exists()


def test_in_a_browser(
    run: Path, tmp_path: Path, made: MakeRun, assess: Callable[[Path, str, Any], None]
) -> None:
    """Desktop and phone, light and dark: nothing in the console, nothing fetched, no sideways scroll."""
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium or Chrome on the PATH")
    assess(run, "win.json", {"a long name " * 5: {"win_rate": {"value": 0.6, "low": 0.4, "high": 0.8}}})
    other = made(tmp_path / "a-run-with-a-rather-long-name-that-goes-on-and-on", text="word" * 200)
    with Browser(program, tmp_path / "profile") as browser:
        for page in (write_report([run]), write_report([run, other])):
            backs = set()
            for width in (390, 1280):
                for scheme in ("light", "dark"):
                    seen = browser.look(page, width, scheme)
                    assert seen.problems == []
                    assert seen.requests == [page.as_uri()]
                    assert seen.overflow == 0, (width, scheme)
                    backs.add(seen.colours)
            assert len(backs) == 2, "light and dark differ, widths do not"


def test_the_browser_test_can_fail(tmp_path: Path) -> None:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium or Chrome on the PATH")
    page = tmp_path / "bad.html"
    page.write_text(
        '<div style="width: 3000px">x</div><img src="missing.png"><script>console.error(1); throw Error("2")</script>'
    )
    with Browser(program, tmp_path / "profile") as browser:
        seen = browser.look(page, 390, "light")
    assert seen.overflow > 1000
    assert len(seen.requests) == 2
    assert len(seen.problems) >= 2


def test_a_moved_run_can_still_be_drawn(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.move(run, moved)
    assert write_report([moved]).is_file()


def test_counts_and_shares_are_told_apart() -> None:
    assert [number(value) for value in (0, 1, 12_000, 0.0, 1.0, 132.2922, None)] == [
        "0", "1", "12,000", "0.000", "1.000", "132.292", "none",
    ]  # fmt: skip
