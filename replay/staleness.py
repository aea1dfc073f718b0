"""How far sampling may run ahead of learning: counted when groups are submitted, never guessed from speeds.

A group is *running* from its submission until all of its samples are scored or have ended, *waiting* from then until
it is trained or dropped, and *open* all that time. A step trains `batch` groups; if no more than
`(max_staleness + 1) * batch` are open, a group written when it was submitted is trained at most `max_staleness` steps
later, unless others overtake it: its tool was slow, its worker died. What was overtaken for too long is found when it
is claimed for training, by `Store.claim`: it is queued anew, and stays open. So no token is ever trained that is older
than the bound; and groups that are always slow fill the places, until the learner has to wait for them.

It cannot starve. If a step lacks groups and none runs, there is room for what it lacks; what runs comes to an end, in
time or by its lease; a dropped group is no longer open; and while the learner waits, nothing gets older.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Capacity:
    """What may be submitted. Everything is counted in groups.

    Source: AReaL (arXiv 2505.24298, section 5.1), `min(concurrency - running, (max_staleness + version + 1) * batch -
    (accepted + running))` with `accepted` the groups trained or waiting. Every step trains `batch` groups, so `accepted
    = version * batch + waiting`, and the version cancels out. Counting what is open alone is right too where that does
    not hold: after a resume with another batch, and for a clone of a run, whose store is new.

    Args:
        max_staleness: optimiser steps between the version of a group's oldest token and the step that trains it.
        batch: groups that an optimiser step trains.
        concurrency: most groups running at once.
        steps: optimiser steps of the run; nothing is submitted that they cannot use.

    Raises:
        ValueError: a number that would let nothing in.
    """

    max_staleness: int
    batch: int
    concurrency: int
    steps: int

    def __post_init__(self) -> None:
        if self.max_staleness < 0 or self.batch < 1 or self.concurrency < 1:
            raise ValueError(f"max_staleness must be at least 0, batch and concurrency at least 1: {self}")

    def left(self, step: int, waiting: int, running: int) -> int:
        """Groups that may be submitted now, after `step` optimiser steps."""
        ahead = min(self.max_staleness + 1, self.steps - step)
        return max(0, min(self.concurrency - running, ahead * self.batch - (waiting + running)))
