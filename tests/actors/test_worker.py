"""A stage worker starts once, however many ask how it is, and says what ended it."""

from __future__ import annotations

import asyncio

import pytest

from actors.worker import StageWorker


class Slow(StageWorker):
    stage = "slow"
    setups = 0

    async def setup(self) -> None:
        self.setups += 1
        await asyncio.sleep(0.05)

    async def loop(self) -> None:
        await asyncio.sleep(60)


class Broken(Slow):
    async def setup(self) -> None:
        await super().setup()
        raise OSError("no such model")


class Ending(Slow):
    async def loop(self) -> None:
        raise OSError("the disk is gone")


def test_pings_of_a_worker_that_is_still_starting_wait_for_the_one_start() -> None:
    async def three() -> tuple[int, int]:
        worker = Slow(None)
        return len(await asyncio.gather(*(worker.ping() for _ in range(3)))), worker.setups

    assert asyncio.run(three()) == (3, 1)


@pytest.mark.parametrize(("worker", "why"), [(Broken(None), "no such model"), (Ending(None), "the disk is gone")])
def test_every_ping_of_a_worker_that_ended_says_why(worker: Slow, why: str) -> None:
    async def pinged() -> None:
        for _ in range(3):
            with pytest.raises(OSError, match=why):
                while True:
                    await worker.ping()
                    await asyncio.sleep(0.01)
        assert worker.setups == 1

    asyncio.run(pinged())
