"""The learning rate over a run."""

from __future__ import annotations

from typing import Any

import pytest

from learners.schedule import Schedule


def test_it_warms_up_linearly_and_then_stays() -> None:
    rates = [Schedule(1.0, warmup_steps=4).at(s) for s in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(("kind", "half"), [("linear", 0.505), ("cosine", 0.505)])
def test_it_decays_to_its_floor_and_stays_there(kind: str, half: float) -> None:
    schedule = Schedule(1.0, warmup_steps=2, total_steps=12, kind=kind, min_ratio=0.01)
    assert schedule.at(2) == pytest.approx(1.0)
    assert schedule.at(7) == pytest.approx(half)
    assert schedule.at(12) == schedule.at(99) == pytest.approx(0.01)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "polynomial"},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"warmup_steps": -1},
        {"min_ratio": 2.0},
        {"kind": "cosine"},
        {"kind": "cosine", "total_steps": 5, "warmup_steps": 5},
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="schedule"):
        Schedule(**({"lr": 1.0} | options))
