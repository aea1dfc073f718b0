"""Ranks that cannot meet say so."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch.distributed as dist

from learners.world import free_port, join


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


def test_a_free_port_is_not_one_that_a_call_may_be_given() -> None:
    """Whoever calls a port of Linux's own range before anybody listens there may be given it, and reach itself."""
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = {free_port() for _ in range(200)}
    assert len(ports) > 100 and max(ports) < low
