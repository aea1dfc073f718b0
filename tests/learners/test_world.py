"""Ranks that cannot meet say so."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from learners.world import free_port, join, led

#: A rank that waits 2 s for the other, and whose leader works for longer: `python -c LED RANK PORT`.
LED = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
from learners import world

world.ALIVE_S = 0.3
rank, port = map(int, sys.argv[1:])
store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
dist.barrier()
dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2))

def work():
    assert rank == 0
    time.sleep(5)
    return {"found": 7}

print(world.led(work, rank, 2), world.led(lambda: None, rank, 2))
dist.barrier()
"""


def test_a_rank_whose_peers_do_not_come_says_where_it_waited() -> None:
    port = free_port()
    with pytest.raises(RuntimeError, match=f"rank 0 of 2 did not meet the others at 127.0.0.1:{port} within 1 s"):
        join(0, 2, "127.0.0.1", port, timeout_s=1.0)
    assert not dist.is_initialized()


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match=f"127.0.0.1:{port}"):
            join(0, 1, "127.0.0.1", port, timeout_s=1.0)


def test_ranks_wait_for_what_rank_0_does_alone_for_longer_than_they_would_for_a_silent_one() -> None:
    command, port, tree = [sys.executable, "-c", LED], str(free_port()), Path(__file__).parents[2]
    ranks = [subprocess.Popen([*command, str(r), port], stdout=subprocess.PIPE, text=True, cwd=tree) for r in range(2)]
    assert [rank.communicate(timeout=60)[0].strip() for rank in ranks] == ["{'found': 7} None"] * 2


def test_a_world_of_one_is_led_without_a_group() -> None:
    assert led(lambda: 7, 0, 1) == 7
    with pytest.raises(ZeroDivisionError):
        led(lambda: 1 / 0, 0, 1)


def test_a_free_port_is_not_one_that_a_call_may_be_given() -> None:
    """Whoever calls a port of Linux's own range before anybody listens there may be given it, and reach itself."""
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = {free_port() for _ in range(200)}
    assert len(ports) > 100 and max(ports) < low
