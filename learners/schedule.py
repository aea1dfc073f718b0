"""The learning rate over a run: linear warm-up, then constant, linear or cosine decay. A pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

#: Share of the run behind us (0..1) -> share of the way from the peak to the floor that is left (1..0).
_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


@dataclass(frozen=True)
class Schedule:
    """Learning rate of optimiser step 0, 1, 2, ...

    Attributes:
        lr: the peak.
        warmup_steps: steps of linear growth; step 0 has lr / warmup_steps.
        total_steps: step at which the floor is reached; needed unless the kind is `constant`.
        kind: constant | linear | cosine.
        min_ratio: the floor, as a share of the peak.

    Raises:
        ValueError: an unknown kind, or a number out of range.
    """

    lr: float
    warmup_steps: int = 0
    total_steps: int | None = None
    kind: str = "constant"
    min_ratio: float = 0.01

    def __post_init__(self) -> None:
        if self.kind not in _SHAPES:
            raise ValueError(f"there is no schedule '{self.kind}'; there are: {', '.join(_SHAPES)}")
        if not (math.isfinite(self.lr) and self.lr > 0 and self.warmup_steps >= 0 and 0 <= self.min_ratio <= 1):
            raise ValueError(f"a schedule needs lr > 0, warmup_steps >= 0 and min_ratio in 0..1, not {self}")
        if self.kind != "constant" and (self.total_steps is None or self.total_steps <= self.warmup_steps):
            raise ValueError(f"schedule '{self.kind}' needs total_steps above warmup_steps, not {self.total_steps}")

    def at(self, step: int) -> float:
        """The learning rate of that step."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        return self.after_warmup((step - self.warmup_steps) / ((self.total_steps or math.inf) - self.warmup_steps))

    def after_warmup(self, done: float) -> float:
        """The learning rate at a share `done` (0..1, clipped) of the decay."""
        left = _SHAPES[self.kind](min(1.0, max(0.0, done)))
        return self.lr * (self.min_ratio + (1.0 - self.min_ratio) * left)
