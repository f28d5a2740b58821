"""The profile of a made-up run against hand arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metareward.errors import UserError
from metareward.profiling.figures import StageFigures, advice, all_figures
from metareward.profiling.machine import Machine
from metareward.profiling.read import read_run
from metareward.profiling.table import as_dictionary, print_profile
from metareward.profiling.trace import write_trace


def figures_of(run: Path, machine: Machine | None) -> dict[str, StageFigures]:
    return {item.time.stage: item for item in all_figures(read_run(run), machine)}


def test_attempts_are_added_and_pauses_are_not(run: Path) -> None:
    time = read_run(run)
    assert [(item.ended, item.end - item.start) for item in time.attempts] == [
        ("killed", 6.0),
        ("finished", 17.0),
    ]
    stages = {item.stage: item for item in time.stages}
    assert time.wall == 23.0
    assert stages["judge"].seconds == 14.0
    assert stages["judge"].stopped == 4.0
    assert stages["train"].seconds == 5.0
    assert stages["train"].stopped == 0.0
    assert stages["start"].seconds == 3.0
    assert time.outside == 1.0  # half a second before the training, half after it
    assert stages["judge"].peak_memory == 2 * 2**30


def test_tokens_rates_and_imbalance_by_hand(run: Path) -> None:
    judge = figures_of(run, None)["judge"]
    # Both ranks' counts; the seconds are those of the wall.
    assert (judge.requests, judge.prompt_tokens, judge.reused_tokens, judge.new_tokens) == (
        40,
        2400,
        1800,
        820,
    )
    assert judge.tokens_per_s == pytest.approx(820 / 14 / 2)
    assert judge.share == pytest.approx(14 / 23)
    # Rank 0 worked 14 s, rank 1 10 s of 14.
    assert judge.time.imbalance == pytest.approx(14 / 12 - 1)
    assert judge.decode_bandwidth is None
    assert judge.limit is None


def test_mfu_and_bandwidth_by_hand(run: Path, machine: Machine) -> None:
    judge, train = (figures_of(run, machine)[name] for name in ("judge", "train"))
    # The ranks share one machine, so each has half of it.
    prefill = 2 * 300 * (2 * 32 + 88) + 2 * 10 * (88 + 40) + 4 * 2 * 2 * 2 * 6000
    assert judge.prefill_mfu == pytest.approx(prefill / 1.5 / 1e6)
    weights = (2 * 120 + 40) * 4 * 50
    cache = 2 * 2 * 1 * 2 * 4 * (9000 + 400)
    decode_bytes = weights + cache + 4 * 10 * 400
    assert judge.decode_bandwidth == pytest.approx(decode_bytes / 5.0 / 0.5e6)
    decode_flops = 2 * 400 * (2 * 32 + 88) + 2 * 400 * (88 + 40) + 4 * 2 * 2 * 2 * 20_000
    by_name = {item.phase: item for item in judge.phases}
    assert by_name["decode"].seconds == pytest.approx(5.0)
    assert by_name["decode"].limit == pytest.approx(max(decode_flops / 1e6, decode_bytes / 0.5e6))
    assert by_name["sample"].limit == pytest.approx(4 * 10 * 410 / 0.5e6)
    assert by_name["host"].limit == 0.0
    forward = 2 * 800 * 2 * 120 + 2 * 100 * 40 + 4 * 2 * 2 * 2 * 9000
    assert train.train_mfu == pytest.approx(3 * forward / 5.0 / 1e6)
    by_name = {item.phase: item for item in train.phases}
    # 75 of the 100 completion tokens went through a head that makes its two gradient products in the forward pass.
    early = 2 * 2 * 75 * 40
    assert by_name["forward"].limit == pytest.approx((forward + early) / 1e6)
    assert by_name["backward"].limit == pytest.approx((2 * forward - early) / 1e6)
    # 2 steps of each rank's half of 340 parameters (norms and the untied embedding included).
    assert by_name["optimizer"].limit == pytest.approx(28 * 340 / 2 * 2 / 0.5e6)


def test_a_gpu_of_the_table_is_held_against_its_data_sheet(run: Path) -> None:
    rates = {"bfloat16": 7e14, "float32": 5e13}
    gpu = Machine("NVIDIA H100 80GB HBM3", 8, 2e12, 3e12, rates, "2.13", "today", kind="cuda")
    assert gpu.sheet is not None
    assert (gpu.sheet.bfloat16, gpu.sheet.bandwidth) == (989.5e12, 3350e9)
    judge = figures_of(run, gpu)["judge"]
    measured = Machine("made up", 8, 2e12, 3e12, rates, "2.13", "today", kind="cuda")
    assert measured.sheet is None
    against = figures_of(run, measured)["judge"]
    assert judge.decode_bandwidth is not None
    assert against.decode_bandwidth is not None
    assert judge.decode_bandwidth == pytest.approx(against.decode_bandwidth / 2 * 3000 / 3350)


def test_the_advice_names_the_phase_with_most_to_gain(run: Path, machine: Machine) -> None:
    time = read_run(run)
    figures = all_figures(time, machine)
    over = {(item.time.stage, part.phase): part.over for item in figures for part in item.phases}
    stage, phase = max(over, key=lambda key: over[key])
    assert f"{phase} in {stage}" in advice(figures, time.wall, True)
    # A thousand times the bandwidth and rate: then only what computes nothing or is slow anyway is above its limit.
    assert "decode in judge" in advice(all_figures(time, None), time.wall, False)
    assert "--machine" in advice(all_figures(time, None), time.wall, False)
    assert "Nothing" in advice([], 0.0, True)


def test_the_tables_say_what_they_must(
    run: Path, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    time = read_run(run)
    print_profile(time, all_figures(time, machine), machine)
    shown = capsys.readouterr().out
    for text in (
        "judge",
        "14.0",
        "60.9%",
        "2,400",
        "75%",
        "820",
        "2.00 GiB",
        "16.7%",
        "outside stages",
        "wall time",
    ):
        assert text in shown, text
    assert "2 attempts: 1 killed or still running, 0 ended by an error; 4.0 s" in shown
    assert "measured on made up" in shown
    assert shown.strip().splitlines()[-1].startswith("Improve first: ")
    print_profile(time, all_figures(time, None), None)
    assert "no limits" in capsys.readouterr().out


def test_the_dictionary_is_json_and_whole(run: Path, machine: Machine) -> None:
    time = read_run(run)
    found = json.loads(json.dumps(as_dictionary(time, all_figures(time, machine), machine)))
    total = sum(stage["seconds"] for stage in found["stages"])
    assert total + found["outside_stages"] == pytest.approx(found["wall_seconds"])
    assert found["stages"][1]["phases"]["decode"]["seconds"] == 5.0


def test_a_run_that_goes_on_is_read_up_to_its_last_whole_line(run: Path) -> None:
    path = run / "spans" / "rank-0.jsonl"
    before = read_run(run).wall
    with path.open("a") as file:
        file.write('{"kind":"win')
    assert read_run(run).wall == before
    with path.open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"rank-0.jsonl, line 14 is not a span"):
        read_run(run)


def test_a_stage_killed_before_its_end_has_its_limits(run: Path, machine: Machine) -> None:
    for path in (run / "spans").glob("rank-*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        cut = [line for line in lines if line["kind"] not in ("stage", "end")]
        path.write_text("".join(json.dumps(line) + "\n" for line in cut))
    assert read_run(run).attempts[-1].ended == "killed"
    judge = figures_of(run, machine)["judge"]
    assert judge.decode_bandwidth is not None
    assert judge.time.peak_memory == 2**20
    # Without even a note of the model nothing is claimed about its limit.
    for path in (run / "spans").glob("rank-*.jsonl"):
        kept = [line for line in path.read_text().splitlines() if '"note"' not in line]
        path.write_text("".join(line + "\n" for line in kept))
    time = read_run(run)
    assert "Its limit is not known" in advice(all_figures(time, machine), time.wall, True)


def test_a_folder_without_spans_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no spans"):
        read_run(tmp_path)


def test_the_trace_is_one_that_viewers_read(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    count = write_trace(run, out)
    events = json.loads(out.read_text())["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert len(slices) == count
    assert {event["pid"] for event in slices} == {0, 1}
    names = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event["name"] == "thread_name"
    }
    rows: dict[str, list[dict]] = {}
    for event in slices:
        if event["pid"] == 0:
            rows.setdefault(names[0, event["tid"]], []).append(event)
    stages = [(event["name"], event["ts"] / 1e6, event["dur"] / 1e6) for event in rows["stages"]]
    assert stages == [
        ("start", 0.0, 2.0),
        ("judge 1", 2.0, 4.0),
        ("start", 1000.0, 1.0),
        ("judge 1", 1001.0, 10.0),
        ("train 1", 1011.5, 5.0),
    ]
    # Slices of a row neither overlap nor leave their stage.
    for event, after in zip(rows["windows"], rows["windows"][1:], strict=False):
        assert event["ts"] + event["dur"] <= after["ts"] + 1e-3
    assert [(event["name"], event["args"]["step"]) for event in rows["steps"]] == [("decode", 3)]
    with pytest.raises(UserError, match="cannot write"):
        write_trace(run, tmp_path / "missing" / "trace.json")
