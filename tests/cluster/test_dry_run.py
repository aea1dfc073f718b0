"""`--dry-run` places every actor of every example, tells the memory it takes, and says what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
import yaml
from typer.testing import CliRunner

from cluster.cli import app
from cluster.config import Config, Resources, load, shares_gpu
from cluster.dry_run import (
    MAX_IN_CPU,
    SUB_GROUP,
    SWAP_BUFFERS,
    SWAPPED_WEIGHT,
    Place,
    engine_lines,
    learner_lines,
    learner_memory,
    nodes_needed,
    place_of,
    rollout_memory,
    shared_lines,
    together,
    unplaced_lines,
)
from cluster.estimate import GIB, LearnerMemory
from cluster.node_types import ACCELERATORS, CLUSTER, INSTANCES, machine_for, node_types
from cluster.policy_shape import shape_of
from cluster.pools import placement

EXAMPLES = sorted(Path("examples").glob("*.yaml"))
SHORT = ["learner.tokens_per_microbatch=64", "rollout.engine.max_model_len=64"]
ON_GPUS = [p for p in EXAMPLES if p.stem.startswith("qwen")]


#: A learner rank and an engine on a GPU.
SHARED = ["learner.gpus=0.6", "rollout.gpus=0.4", "rollout.resources={}", "rollout.workers=4"]
TURNS = ["rollout.engine.enable_sleep_mode=true", "learner.max_staleness=0"]


def lines_of(config: Config) -> list[str]:
    """What is said of the memory of a config."""
    shape, types = shape_of(config.policy), node_types()
    learner_at = place_of(config.learner, types)
    engine_at = learner_at if shares_gpu(config) else place_of(config.rollout, types)
    learner, engine = learner_memory(config, shape, learner_at.kind), rollout_memory(config, shape, engine_at)
    return [
        *learner_lines(config, learner, learner_at, machine_for(config.learner, types)),
        *engine_lines(config, shape, engine, engine_at),
        *shared_lines(config, learner, engine, learner_at),
    ]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_a_dry_run_shows_config_actors_and_memory_and_starts_nothing(example: Path) -> None:
    done = CliRunner().invoke(app, ["train", str(example), "--dry-run"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    config = load(example)
    assert done.output.startswith(config.dump())
    rows = done.output[done.output.index("placement") :]
    assert all(name in rows for name, _, _ in placement(config))
    assert all(part in rows for part in ("weights", "optimizer", "activations", "log-probs", "KV cache"))
    assert not ray.is_initialized()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_the_cluster_has_a_place_for_every_actor_of_every_example(example: Path) -> None:
    rows, types = placement(load(example)), node_types()
    assert unplaced_lines(rows, types) == []
    head = sum(n * asked.cpus for _, n, asked in rows if not asked.resources)
    assert head <= 32  # of ray_cluster.yaml's head, which takes what asks for no other node


@pytest.mark.parametrize("example", ON_GPUS, ids=lambda p: p.stem)
def test_the_published_recipes_fit_their_accelerators(example: Path) -> None:
    learner, *engine = lines_of(load(example))
    assert "and fits H100 (79.1 GiB)" in learner
    assert engine[0].startswith("rollout: an engine has KV cache for")


def test_the_accelerators_of_the_cluster_file_are_known_and_as_many_as_it_offers_by_name() -> None:
    for name, node in yaml.safe_load(CLUSTER.read_text())["available_node_types"].items():
        kind, number, _ = INSTANCES[node["node_config"]["InstanceType"]]
        assert number == node["resources"].get(name, 0)
        assert kind in ACCELERATORS or number == 0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["learner.resources={lerner: 1}"], "which no node type of ray_cluster.yaml offers"),
        (["rollout.resources={rollout: 8}", "rollout.gpus=8"], "more than one rollout node has"),
        (["learner.ranks=64"], "64 x learner take 8 learner nodes; ray_cluster.yaml allows 4"),
        (
            [f"tools.{tool}={{replicas: 5, gpus: 1, resources: {{tools: 1}}}}" for tool in ("edit", "diffusion")],
            "10 tools nodes are needed in all; ray_cluster.yaml allows 8",
        ),
    ],
)
def test_what_has_no_place_is_named(overrides: list[str], said: str) -> None:
    (line,) = unplaced_lines(placement(load("examples/qwen3-4b.yaml", overrides)), node_types())
    assert said in line


def test_nodes_are_counted_by_what_each_holds() -> None:
    nodes = nodes_needed(placement(load("examples/qwen3-30b-a3b.yaml")), node_types())
    assert nodes == {"rollout": 2, "learner": 2}  # 4 engines of 2 GPUs on nodes of 4, 16 ranks on nodes of 8


@pytest.mark.parametrize(
    ("example", "overrides", "said"),
    [
        (
            "qwen3-4b",
            ["learner.gradient_checkpointing=false"],
            "does not fit H100 (79.1 GiB): most of it could go if you set learner.gradient_checkpointing",
        ),
        ("qwen3-30b-a3b", [*SHORT, "learner.zero_stage=2"], "set learner.zero_stage to 3"),
        ("qwen3-30b-a3b", [*SHORT, "learner.ranks=2"], "take more learner.ranks"),
        ("qwen3-30b-a3b", ["rollout.engine.tensor_parallel_size=1"], "an engine asks for 2 GPUs and uses 1"),
        ("qwen3-30b-a3b", ["rollout.engine.tensor_parallel_size=1"], "an engine does not fit L40S (44.4 GiB)"),
        ("qwen3-4b", ["rollout.engine.max_num_seqs=4"], "of its 4 sequences, all of them can reach 32,768 tokens"),
        (
            "qwen3-4b",
            ["rollout.engine.kv_cache_memory_bytes=1073741824", "rollout.engine.max_model_len=4096"],
            "KV cache for 7,281 tokens",
        ),
        (
            "qwen3-4b",
            [*SHARED, "weights=ipc"],
            "that needs 112.1 GiB and does not fit H100 (79.1 GiB): lower rollout.engine.gpu_memory_utilization to "
            "0.48, or let them take turns: rollout.engine.enable_sleep_mode, with learner.max_staleness 0",
        ),
        (
            "qwen3-4b",
            [*SHARED, *TURNS],
            "does not fit H100 (79.1 GiB): lower rollout.engine.gpu_memory_utilization to 0.79",
        ),
        (
            "qwen3-4b",
            [*SHARED, *TURNS, "rollout.engine.gpu_memory_utilization=0.79"],
            "learner and engine on one GPU, by turns: that needs 78.5 GiB and fits H100 (79.1 GiB)",
        ),
    ],
)
def test_what_does_not_fit_is_said_with_what_to_do(example: str, overrides: list[str], said: str) -> None:
    lines = lines_of(load(f"examples/{example}.yaml", overrides))
    assert any(said in line for line in lines), lines


def test_a_learner_rank_and_the_engine_on_its_gpu_are_placed_together() -> None:
    config, types = load("examples/qwen3-4b.yaml", [*SHARED, *TURNS, "learner.ranks=16"]), node_types()
    rows = together(config, placement(config))
    assert rows[-1] == ("learner with an engine", 16, Resources(cpus=8, gpus=1, resources={"learner": 1}))
    assert nodes_needed(rows, types)["learner"] == 2 and unplaced_lines(rows, types) == []
    apart = load("examples/qwen3-4b.yaml", [*SHARED, *TURNS, "rollout.resources={rollout: 1}"])
    (line,) = unplaced_lines(together(apart, placement(apart)), types)
    assert line.startswith("learner with an engine asks for 1 GPUs and {'learner': 1.0, 'rollout': 1.0}, more than one")


def test_a_share_of_a_gpu_is_not_cut_in_two() -> None:
    machine = machine_for(Resources(resources={"learner": 1}), node_types())
    assert machine is not None
    found = [machine.holds(Resources(gpus=share, resources={"learner": 0.1})) for share in (0.3, 0.5, 0.6, 1.0, 2.0)]
    assert found == [24, 16, 8, 8, 4]


def test_what_lies_on_a_disk_goes_through_the_nodes_memory() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    optimizer, weights = DeepSpeedZeroOffloadOptimizerConfig(), DeepSpeedZeroOffloadParamConfig()
    assert {"optimizer": optimizer.buffer_count, "param": weights.buffer_count} == SWAP_BUFFERS
    assert (DeepSpeedZeroConfig().sub_group_size, weights.buffer_size) == (SUB_GROUP, SWAPPED_WEIGHT)
    assert weights.max_in_cpu == MAX_IN_CPU

    disk = "{device: nvme, nvme_path: /disk}"
    weights_on = "{device: nvme, nvme_path: /disk, max_in_cpu: 1000}"
    offload = f"sub_group_size: 1000, offload_optimizer: {disk}, offload_param: {weights_on}"
    zero = f"learner.deepspeed={{zero_optimization: {{{offload}}}}}"
    config = load("examples/qwen3-4b.yaml", ["learner.zero_stage=3", zero])
    shape = shape_of(config.policy)
    states = learner_memory(config, shape, "gpu").states
    part = -(-shape.params // 8)
    assert states.disk == (16 + 2) * part - 2 * 1000
    assert states.host == 2 * part + 2 * 1000 + 4 * 4 * 1000 + 2 * 5 * 10**8, "gradients, and what it goes through"
    assert states.weights == states.optimizer == states.held == 0


def test_more_offloaded_than_a_node_has_is_said() -> None:
    config = load("examples/qwen2.5-vl-32b.yaml", ["learner.ranks=1"])
    types = node_types()
    machine = machine_for(config.learner, types)
    assert machine is not None
    memory = learner_memory(config, shape_of(config.policy), "gpu")
    small = type(machine)(machine.name, machine.accelerator, machine.number, 256.0, machine.resources, machine.most)
    *_, line = learner_lines(config, memory, Place("gpu", "H100", 79.1), small)
    assert line == f"learner: 1 ranks offload {memory.states.host / GIB:.0f} GiB to a node that has 256"


def test_where_the_accelerator_is_not_known_the_smallest_that_fits_is_named() -> None:
    config = load("examples/qwen3-4b.yaml")
    shape, nowhere = shape_of(config.policy), Place("gpu", "accelerator", None)
    assert rollout_memory(config, shape, nowhere) is None
    (learner,) = learner_lines(config, learner_memory(config, shape, "gpu"), nowhere)
    (engine,) = engine_lines(config, shape, None, nowhere)
    assert learner.endswith("and fits L40S (44.4 GiB) or larger")
    assert engine.endswith("and fits A10G (22.0 GiB) or larger")


def test_adapters_long_sequences_and_a_reference_are_counted() -> None:
    def of(*overrides: str) -> LearnerMemory:
        config = load("examples/qwen3-4b.yaml", list(overrides))
        return learner_memory(config, shape_of(config.policy), "gpu")

    plain, adapter = of(), of("learner.lora={r: 16}", "learner.kl.coef=0.1")
    assert adapter.states.weights == plain.states.weights and adapter.reference == 0
    assert adapter.states.optimizer < plain.states.optimizer / 50
    assert of("learner.kl.coef=0.1").reference == plain.states.weights
    assert of("learner.sequence_parallel=4").activations < plain.activations / 2


def test_without_gpus_the_memory_is_this_machines() -> None:
    place = place_of(Resources(), node_types())
    assert place.kind == "cpu"
    assert place.gib
