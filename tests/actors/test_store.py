"""The client of the store, without Ray."""

import asyncio
from unittest.mock import Mock

import pytest

from actors.store import StoreClient


def test_a_store_that_does_not_answer_is_said_with_the_verb_and_the_seconds() -> None:
    shard = Mock()
    shard.state.remote = lambda purpose: asyncio.sleep(60)
    store = StoreClient([shard])
    with pytest.raises(TimeoutError, match=r"the replay store did not answer `state` in 0\.05 s: see whether"):
        store.now(store.state("train"), 0.05)
