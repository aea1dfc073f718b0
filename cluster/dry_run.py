"""`llmi train CONFIG --dry-run`: the resolved config, where every actor goes, what memory it takes there, and in plain
words what has no place or does not fit. Nothing is started.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from cluster.config import Config, Resources, shares_gpu, takes_turns
from cluster.estimate import (
    CONTEXT,
    GIB,
    EngineMemory,
    LearnerMemory,
    Shape,
    activations,
    buffers,
    engine_memory,
    kv_token,
    logprobs,
    lora_params,
    model_states,
    swap_buffers,
)
from cluster.node_types import ACCELERATORS, CLUSTER, Machine, machine_for, node_types, this_accelerator, unplaced
from cluster.policy_shape import NoShape, shape_of
from cluster.pools import placement, shared

Row = tuple[str, int, Resources]

#: Bytes of a number, by the names that vLLM, DeepSpeed and this config give to formats; others are of 2 bytes.
WIDTHS = {"float32": 4, "float": 4, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
#: vLLM 0.32: `vllm/config/cache.py`, and `vllm/engine/arg_utils.py` for an engine inside a program.
UTILIZATION, BATCHED_TOKENS, SEQUENCES = 0.92, 8192, 256
#: DeepSpeed 0.19: `deepspeed/runtime/zero/config.py` and `offload_config.py`.
SUB_GROUP, SWAP_BUFFERS, SWAPPED_WEIGHT, MAX_IN_CPU = 10**9, {"optimizer": 4, "param": 5}, 10**8, 10**9


@dataclass(frozen=True)
class Place:
    """Where one rank or one engine's part sits: "gpu" or "cpu", the name of that, and its GiB (None: not known)."""

    kind: str
    name: str
    gib: float | None


def show(config: Config, console: Console | None = None) -> None:
    """Print all of it."""
    console = console or Console()
    print(config.dump())
    rows, types = placement(config), node_types()
    console.print(_placement_table(config, rows, types))
    for line in unplaced_lines(together(config, rows), types):
        console.print(line, soft_wrap=True)
    try:
        shape = shape_of(config.policy)
    except NoShape as error:
        console.print(f"memory is not estimated: {error}", soft_wrap=True)
        return
    learner_at = place_of(config.learner, types)
    engine_at = learner_at if shares_gpu(config) else place_of(config.rollout, types)
    learner = learner_memory(config, shape, learner_at.kind)
    engine = rollout_memory(config, shape, engine_at)
    console.print(_memory_table(config, shape, learner, engine, learner_at, engine_at))
    for line in [
        *learner_lines(config, learner, learner_at, machine_for(config.learner, types)),
        *engine_lines(config, shape, engine, engine_at),
        *shared_lines(config, learner, engine, learner_at, machine_for(config.learner, types)),
        *_cpu_lines(config, learner, engine),
    ]:
        console.print(line, soft_wrap=True)


def together(config: Config, rows: Sequence[Row]) -> list[Row]:
    """The rows of a placement, with a learner rank and the engine on its GPU as one."""
    if not shares_gpu(config):
        return list(rows)
    apart = [row for row in rows if row[0] not in ("learner", "rollout")]
    return [*apart, ("learner with an engine", config.learner.ranks, shared(config))]


def unplaced_lines(rows: Sequence[Row], types: list[Machine]) -> list[str]:
    """What the cluster of ray_cluster.yaml has no place for, a sentence each."""
    lines = [line for name, n, asked in rows if (line := unplaced(name, n, asked, types))]
    nodes = nodes_needed(rows, types)
    for machine in types:
        if not lines and nodes[machine.name] > machine.most:
            lines.append(
                f"{nodes[machine.name]} {machine.name} nodes are needed in all; {CLUSTER.name} allows {machine.most}"
            )
    return lines


def nodes_needed(rows: Sequence[Row], types: list[Machine]) -> Counter[str]:
    """Nodes of each type that these actors take; those that ask for nothing by name go wherever there is room."""
    nodes: Counter[str] = Counter()
    for _, n, asked in rows:
        if (machine := machine_for(asked, types)) and (each := machine.holds(asked)):
            nodes[machine.name] += -(-n // each)
    return nodes


def place_of(asked: Resources, types: list[Machine]) -> Place:
    """By the node type that is asked for, or else this machine's accelerator; without GPUs, this machine's memory."""
    if not asked.gpus:
        return Place("cpu", "this machine", psutil.virtual_memory().total / GIB)
    machine = machine_for(asked, types)
    if machine is not None:
        return Place("gpu", machine.accelerator or "accelerator", ACCELERATORS.get(machine.accelerator or ""))
    here = this_accelerator()
    return Place("gpu", *here) if here else Place("gpu", "accelerator", None)


def learner_memory(config: Config, shape: Shape, kind: str) -> LearnerMemory:
    """Memory of one rank of a config; a sample may be longer than a micro-batch, and then passes alone."""
    from learners.head import PIECE

    c = config.learner
    trained = lora_params(shape, c.lora.r) if c.lora else None
    zero: dict[str, Any] = {"stage": c.zero_stage} | dict(c.deepspeed.get("zero_optimization") or {})
    width = WIDTHS.get(c.dtype, 2)
    longest = config.rollout.engine.get("max_model_len", 0)
    tokens = longest if c.sequence_parallel > 1 else max(c.tokens_per_microbatch, longest)
    split = c.ranks if zero["stage"] == 3 else 1
    states = model_states(
        shape.params,
        c.ranks,
        zero["stage"],
        width,
        trained=trained,
        optimizer_on=_device(zero, "optimizer"),
        weights_on=_device(zero, "param"),
        max_in_cpu=int((zero.get("offload_param") or {}).get("max_in_cpu", MAX_IN_CPU)),
    )
    through = _swap_buffers(zero, -(-(trained or shape.params) // c.ranks), width)
    return LearnerMemory(
        states=replace(states, host=states.host + through),
        reference=-(-shape.params // split) * width if c.kl.coef and not c.lora else 0,
        activations=activations(
            shape, tokens, width, checkpointing=c.gradient_checkpointing, sequence_parallel=c.sequence_parallel
        ),
        logprobs=logprobs(shape, -(-tokens // c.sequence_parallel), PIECE, width, head_learns=c.lora is None),
        buffers=buffers(
            shape.params,
            zero["stage"],
            width,
            reduce=int(zero.get("reduce_bucket_size", 5e8)),
            live=int(zero.get("stage3_max_live_parameters", 1e9)),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
        ),
        context=CONTEXT[kind],
    )


def _device(zero: Mapping[str, Any], what: str) -> str:
    device = (zero.get(f"offload_{what}") or {}).get("device", "none")
    return "gpu" if device == "none" else str(device)


def _swap_buffers(zero: Mapping[str, Any], part: int, width: int) -> int:
    """Bytes that offload to NVMe goes through."""
    count = {
        what: int(zero[f"offload_{what}"].get("buffer_count", n)) if _device(zero, what) == "nvme" else 0
        for what, n in SWAP_BUFFERS.items()
    }
    weight = int((zero.get("offload_param") or {}).get("buffer_size", SWAPPED_WEIGHT))
    return swap_buffers(
        part, width, int(zero.get("sub_group_size", SUB_GROUP)), count["optimizer"], count["param"], weight
    )


def rollout_memory(config: Config, shape: Shape, place: Place) -> EngineMemory | None:
    """Memory of one accelerator of a rollout engine; None if neither its size nor that of its KV cache is known."""
    engine = config.rollout.engine
    parallel = engine.get("tensor_parallel_size", 1)
    width = WIDTHS.get(engine.get("dtype", "auto"), 2)
    context = CONTEXT[place.kind]
    sizes: dict[str, Any] = {
        "tensor_parallel": parallel,
        "width": width,
        "kv_width": WIDTHS.get(engine.get("kv_cache_dtype", "auto"), width),
        "batched_tokens": engine.get("max_num_batched_tokens", BATCHED_TOKENS),
        "sequences": engine.get("max_num_seqs", SEQUENCES),
        "context": context,
    }
    given = engine.get("kv_cache_memory_bytes")
    if given is None and place.kind == "cpu":
        from actors.engine import KV_CACHE_BYTES as given
    if given is not None:
        bare = engine_memory(shape, room=0.0, **sizes)
        return engine_memory(shape, room=float(given - bare.kv_cache), **sizes)
    if place.gib is None:
        return None
    return engine_memory(shape, room=engine.get("gpu_memory_utilization", UTILIZATION) * place.gib * GIB, **sizes)


def learner_lines(config: Config, memory: LearnerMemory, place: Place, machine: Machine | None = None) -> Iterator[str]:
    """Whether a rank fits, in one sentence; and one more if its node's memory cannot hold what is offloaded."""
    need = f"learner: a rank needs {memory.total / GIB:.1f} GiB"
    if place.kind == "gpu" and place.gib is None:
        yield f"{need} and fits {_smallest(memory.total)}"
    elif place.kind == "gpu":
        yield f"{need} and {_fits(memory.total, place)}" + ("" if _fit(memory.total, place) else f": {_advice(memory)}")
    if machine and machine.memory_gib and memory.states.host:
        ranks = min(config.learner.ranks, machine.holds(config.learner))
        host = ranks * memory.states.host / GIB
        if host > 0.8 * machine.memory_gib:
            yield f"learner: {ranks} ranks offload {host:.0f} GiB to a node that has {machine.memory_gib:.0f}"


def _advice(memory: LearnerMemory) -> str:
    """What to do about the largest part."""
    states = memory.states
    ways = {
        memory.activations: "set learner.gradient_checkpointing, or learner.sequence_parallel",
        memory.logprobs + memory.buffers: "lower the DeepSpeed buckets",
        states.gradients + states.weights: "set learner.zero_stage to 3, or take more learner.ranks",
        states.optimizer: "take more learner.ranks, or offload the optimizer (learner.deepspeed.zero_optimization)",
    }
    return f"most of it could go if you {ways[max(ways)]}"


def engine_lines(config: Config, shape: Shape, memory: EngineMemory | None, place: Place) -> Iterator[str]:
    """Whether an engine fits and how many full sequences it can hold; and whether it asks for the GPUs that it uses."""
    c, engine = config.rollout, config.rollout.engine
    parallel = engine.get("tensor_parallel_size", 1) * engine.get("pipeline_parallel_size", 1)
    if c.gpus and c.gpus != parallel and not (shares_gpu(config) and parallel == 1):
        yield f"rollout: an engine asks for {c.gpus:g} GPUs and uses {parallel}: set rollout.gpus to that"
    if memory is None:
        least = _engine_least(config, shape)
        yield f"rollout: an engine needs {least / GIB:.1f} GiB on each of its accelerators and fits {_smallest(least)}"
        return
    length = engine.get("max_model_len")
    if place.kind == "gpu" and memory.tokens < (length or 1):
        need = (memory.total - max(0, memory.kv_cache)) / GIB
        yield (
            f"rollout: an engine does not fit {place.name} ({place.gib:.1f} GiB): weights and work take {need:.1f} GiB "
            f"of what it may use, and the KV cache of one sequence does not fit beside them: raise "
            f"tensor_parallel_size and rollout.gpus"
        )
    elif length:
        wanted = engine.get("max_num_seqs", SEQUENCES)
        full = memory.tokens // length
        rest = "all of them" if full >= wanted else f"{full} of them"
        yield (
            f"rollout: an engine has KV cache for {memory.tokens:,} tokens: of its {wanted} sequences, {rest} can "
            f"reach {length:,} tokens at a time"
        )


def shared_lines(
    config: Config, learner: LearnerMemory, engine: EngineMemory | None, place: Place, machine: Machine | None = None
) -> Iterator[str]:
    """Whether learner and engine fit one GPU together, or by turns: asleep, an engine keeps its libraries alone."""
    if not shares_gpu(config) or engine is None or place.gib is None:
        return
    turns = takes_turns(config)
    beside = learner.kept if turns else learner.total  # an engine that works
    need = max(learner.total + engine.context, beside + engine.total)
    line = (
        f"learner and engine on one GPU, {'by turns' if turns else 'at a time'}: that needs {need / GIB:.1f} GiB and "
    )
    ways = []
    if _fit(max(learner.total + engine.context, beside + engine.total - max(0, engine.kv_cache)), place):
        room = 1 - beside / (place.gib * GIB)
        ways.append(f"lower rollout.engine.gpu_memory_utilization to {int(100 * room) / 100:g}")
    if not turns:
        ways.append("let them take turns: rollout.engine.enable_sleep_mode, with learner.max_staleness 0")
    yield line + _fits(need, place) + ("" if _fit(need, place) else f": {', or '.join(ways)}".rstrip(": "))
    if turns and machine and machine.memory_gib:
        pairs = min(config.learner.ranks, machine.holds(shared(config)))
        host = pairs * (learner.states.host + engine.weights) / GIB
        if host > 0.8 * machine.memory_gib:
            yield f"learner ranks and sleeping engines put {host:.0f} GiB into a node that has {machine.memory_gib:.0f}"


def _engine_least(config: Config, shape: Shape) -> int:
    """Bytes that an engine needs on an accelerator of unknown size: one whole sequence in its KV cache."""
    engine = config.rollout.engine
    bare = rollout_memory(config, shape, Place("gpu", "", 0.0))
    assert bare is not None
    parallel = engine.get("tensor_parallel_size", 1)
    one = engine.get("max_model_len", 0) * kv_token(shape, parallel, WIDTHS.get(engine.get("dtype", "auto"), 2))
    return int((bare.total + one) / engine.get("gpu_memory_utilization", UTILIZATION))


def _cpu_lines(config: Config, learner: LearnerMemory, engine: EngineMemory | None) -> Iterator[str]:
    """Without accelerators all share this machine's memory."""
    need = learner.total * config.learner.ranks * (not config.learner.gpus)
    if engine is not None:
        need += engine.total * config.rollout.workers * (not config.rollout.gpus)
    if need:
        here = place_of(Resources(), [])
        yield f"what learns and writes without a GPU takes {need / GIB:.1f} GiB and {_fits(need, here)}"


def _fit(need: int, place: Place) -> bool:
    return place.gib is not None and need <= place.gib * GIB


def _fits(need: int, place: Place) -> str:
    return ("fits " if _fit(need, place) else "does not fit ") + f"{place.name} ({place.gib:.1f} GiB)"


def _smallest(need: int) -> str:
    fitting = [name for name, gib in ACCELERATORS.items() if need <= gib * GIB]
    return f"{fitting[0]} ({ACCELERATORS[fitting[0]]:.1f} GiB) or larger" if fitting else "no accelerator known here"


def _placement_table(config: Config, rows: Sequence[Row], types: list[Machine]) -> Table:
    table = Table("actor", "number", "CPU each", "GPU each", "other", "node type", title="placement")
    for name, n, r in rows:
        other = ", ".join(f"{k}: {v:g}" for k, v in r.resources.items())
        place = shared(config) if name in ("learner", "rollout") and shares_gpu(config) else r
        table.add_row(name, str(n), f"{r.cpus:g}", f"{r.gpus:g}", other, _node(place, types))
    table.add_section()
    sums = (f"{sum(n * getattr(r, k) for _, n, r in rows):g}" for k in ("cpus", "gpus"))
    nodes = ", ".join(f"{n} {name}" for name, n in nodes_needed(together(config, rows), types).items())
    table.add_row("all", str(sum(n for _, n, _ in rows)), *sums, "", nodes)
    return table


def _node(asked: Resources, types: list[Machine]) -> str:
    machine = machine_for(asked, types)
    if machine is None:
        return "any with GPUs" if asked.gpus else "any"
    return f"{machine.name}: {machine.number} x {machine.accelerator}" if machine.accelerator else machine.name


def _memory_table(
    config: Config,
    shape: Shape,
    learner: LearnerMemory,
    engine: EngineMemory | None,
    learner_at: Place,
    engine_at: Place,
) -> Table:
    s = learner.states
    heads = "a learner rank", "an engine" if config.rollout.gpus <= 1 else "a GPU of an engine"
    table = Table("GiB", *heads, title=f"memory: {shape.params / 1e6:,.1f} M parameters", highlight=False)
    for column in table.columns[1:]:
        column.justify = "right"
    parts: list[tuple[str, int | None, int | None]] = [
        ("weights", s.weights, engine.weights if engine else None),
        ("the reference's weights", learner.reference, None),
        ("optimizer", s.optimizer, None),
        ("gradients", s.gradients, None),
        ("activations", learner.activations, engine.working if engine else None),
        ("log-probs", learner.logprobs, None),
        ("or, in their place, the optimizer's step", s.step, None),
        ("communication buffers", learner.buffers, None),
        ("KV cache", None, engine.kv_cache if engine else None),
        ("libraries, about", learner.context, engine.context if engine else None),
    ]
    for name, *numbers in parts:
        table.add_row(name, *(f"{n / GIB:.2f}" if n is not None else "" for n in numbers))
    table.add_section()
    table.add_row("all", *(f"{m.total / GIB:.2f}" if m else "?" for m in (learner, engine)))
    table.add_row("of", *(f"{p.name}, {p.gib:.1f}" if p.gib else "?" for p in (learner_at, engine_at)))
    asleep = engine.weights if engine and takes_turns(config) else 0
    for where, offloaded, slept in (("memory", s.host, asleep), ("disk (NVMe)", s.disk, 0)):
        if offloaded or slept:
            table.add_row(
                f"offloaded to the node's {where}", *(f"{n / GIB:.2f}" if n else "" for n in (offloaded, slept))
            )
    return table
