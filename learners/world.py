"""The ranks of a learner: how a process joins them, and how it leaves.

DeepSpeed takes its accelerator and its rank from the environment; so `join` sets the rank before it imports DeepSpeed,
and nothing else in this folder imports it at module level.
"""

from __future__ import annotations

import os
import random
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

#: Seconds after which rank 0 says again that it is at work.
ALIVE_S = 5.0

#: DeepSpeed's shared-memory all-reduce: built with a C++ compiler at start-up, and only used for inference.
_UNUSED_OP = "deepspeed_shm_comm"

#: Below those of Linux for outgoing connections (32768 to 60999), above those of Ray's workers (10002 to 19999).
_PORTS = range(20_000, 32_768)

#: Variables that tell libraries of a rank's place.
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class RankLost(RuntimeError):
    """Another rank of the learner died or did not answer in time; this one cannot go on."""


@contextmanager
def together(rank: int, world_size: int) -> Iterator[None]:
    """Wraps what all ranks do together: raises RankLost if one is missing."""
    try:
        yield
    except RankLost:
        raise
    except RuntimeError as e:
        if world_size > 1 and (isinstance(e, dist.DistError) or "gloo" in str(e)):
            raise RankLost(
                f"rank {rank} of {world_size} lost another: it died, or did not answer in time "
                f"({str(e).splitlines()[0]}); resume from the last checkpoint, with any number of ranks"
            ) from e
        raise


def free_port(address: str = "127.0.0.1") -> int:
    """A TCP port of this machine that nobody listens on now, and that Linux by itself gives to no outgoing connection.

    A rank that calls before the first one listens may be given the port that it calls, and then talks to itself.

    Raises:
        OSError: none of a hundred was free.
    """
    for port in random.SystemRandom().sample(_PORTS, 100):
        with suppress(OSError), socket.create_server((address, port)):
            return port
    raise OSError(f"no port of {address} is free among a hundred from {_PORTS.start} to {_PORTS.stop - 1}")


def join(rank: int, world_size: int, master_addr: str, master_port: int, timeout_s: float) -> torch.device:
    """Joins the process group of `world_size` ranks and returns this rank's device.

    A rank on a GPU machine sees one GPU, its own. `master_port` 0 picks a free port, for a world of one.

    Raises:
        ValueError: the rank is outside the world, or the port is missing.
        RuntimeError: this process is already in a group, the port is taken, or the others did not come in time.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside a world of {world_size}")
    if master_port == 0 and world_size > 1:
        raise ValueError(f"{world_size} ranks need a master_port that all of them know, not 0")
    if dist.is_initialized():
        raise RuntimeError("this process already holds a learner; close it before making another one")
    cuda = torch.cuda.is_available()
    if master_addr in ("127.0.0.1", "localhost"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    timeout, place = timedelta(seconds=timeout_s), f"{master_addr}:{master_port}"
    backend = "nccl" if cuda else "gloo"
    try:
        store = _store(rank, world_size, master_addr, master_port, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (OSError, dist.DistError) as e:
        who = f"rank {rank} of {world_size}"
        raise RuntimeError(f"{who} did not meet the others at {place} within {timeout_s:g} s: {e}") from e
    os.environ.update(zip(_PLACE, (str(rank), str(world_size), "0", master_addr, str(store.port)), strict=True))
    # DeepSpeed's calls of torch's older collectives warn once a call site and process.
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    import deepspeed

    deepspeed.ops.__compatible_ops__[_UNUSED_OP] = False
    deepspeed.init_distributed(dist_backend=backend)
    return torch.device("cuda", 0) if cuda else torch.device("cpu")


def _store(rank: int, world_size: int, address: str, port: int, timeout: timedelta) -> dist.TCPStore:
    """The ranks' meeting place. Rank 0 listens at `address` alone; left to itself it would on every interface."""
    if rank > 0:
        return dist.TCPStore(address, port, world_size, is_master=False, timeout=timeout)
    server = socket.create_server((address, port))
    port = server.getsockname()[1]
    return dist.TCPStore(address, port, world_size, is_master=True, timeout=timeout, master_listen_fd=server.detach())


def leave() -> None:
    """Leaves the process group; a later `join` of this process may have another rank and port."""
    import deepspeed

    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()
    for name in _PLACE:  # or what comes next in this process would take itself for a rank
        os.environ.pop(name, None)


def led(work: Callable[[], T], rank: int, world_size: int) -> T:
    """What the work of rank 0 gives, on every rank. It may take any time: rank 0 says meanwhile that it lives.

    Raises:
        RuntimeError: another rank is missing; or, on rank 0, whatever the work raises.
    """
    if world_size == 1:
        return work()
    future = background(work) if rank == 0 else None
    box: list[tuple[T] | None] = [None]  # what it gave, once it has
    while box[0] is None:
        if future is not None and wait([future], ALIVE_S).done:
            box = [(future.result(),)]
        dist.broadcast_object_list(box, src=0)
    return box[0][0]


def background(work: Callable[[], T]) -> Future[T]:
    """Do it in a thread that no end of a process waits for."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def reduced(values: list[float], op: dist.ReduceOp.RedOpType, device: torch.device) -> list[float]:
    """`values` combined element by element over all ranks."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op)
    return tensor.tolist()


def gathered(own: dict[str, Any]) -> dict[str, Any]:
    """The union of all ranks' dictionaries, on every rank."""
    parts: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, own)
    return {key: value for part in parts for key, value in part.items()}
