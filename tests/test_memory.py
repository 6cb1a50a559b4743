"""benchmarks/memory.py: the allocator's record replayed, and recorded points predicted again."""

import json
from pathlib import Path

import pytest

from benchmarks.memory import GRID, live_at_peak, score

RECORDED = Path(__file__).resolve().parent.parent / "results/h100/memory.json"


def entry(action: str, addr: int, size: int) -> dict:
    frame = {"filename": "/x/peft/tuners/lora/bnb.py", "line": 7, "name": "forward"}
    return {"action": action, "addr": addr, "size": size, "frames": [frame]}


def test_the_record_tells_what_was_alive_at_the_peak() -> None:
    trace = [entry("alloc", 1, 100), entry("alloc", 2, 300), entry("alloc", 3, 300),
             entry("free_completed", 2, 300), entry("alloc", 4, 50)]  # fmt: skip
    found = live_at_peak(trace)
    assert found["bytes"] == 700 and found["at"] == 3
    assert [group[:2] for group in found["groups"]] == [[300, 2], [100, 1]]
    assert found["groups"][0][2] == "bnb.py:7 forward"


def test_what_was_made_before_the_record_counts_when_it_goes() -> None:
    trace = [entry("free_completed", 9, 80), entry("alloc", 1, 100)]
    assert live_at_peak(trace)["bytes"] == 20


def test_the_grid_is_large_enough_and_scores_no_calibration_point() -> None:
    scored = [(g[0], str(g[1]), *g[2:4], size) for g in GRID for size in g[4]]
    others = [(g[0], str(g[1]), *g[2:4], size) for g in GRID for size in g[5]]
    assert len(scored) >= 24 and len(set(scored)) == len(scored)
    assert not set(scored) & set(others)


@pytest.mark.skipif(not RECORDED.exists(), reason="results/h100/memory.json is not recorded yet")
def test_todays_plan_meets_every_recorded_point() -> None:
    figures = score(json.loads(RECORDED.read_text()))
    faults = [point["error"] for point in figures["points"] if "error" in point]
    assert figures["scored"] >= 24 and not faults
    assert figures["worst_error"] <= 0.05
