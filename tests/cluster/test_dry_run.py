"""`--dry-run` places every actor of every example, tells the memory it takes, and says what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
import yaml
from typer.testing import CliRunner

from cluster.cli import app
from cluster.config import Config, Resources, load
from cluster.dry_run import (
    Place,
    engine_lines,
    learner_lines,
    learner_memory,
    nodes_needed,
    place_of,
    rollout_memory,
    unplaced_lines,
)
from cluster.estimate import GIB, LearnerMemory
from cluster.node_types import ACCELERATORS, CLUSTER, INSTANCES, machine_for, node_types
from cluster.policy_shape import shape_of
from cluster.pools import placement

EXAMPLES = sorted(Path("examples").glob("*.yaml"))
SHORT = ["learner.tokens_per_microbatch=64", "rollout.engine.max_model_len=64"]
ON_GPUS = [p for p in EXAMPLES if p.stem.startswith("qwen")]


def lines_of(config: Config) -> list[str]:
    """What is said of the memory of a config."""
    shape, types = shape_of(config.policy), node_types()
    learner_at, engine_at = place_of(config.learner, types), place_of(config.rollout, types)
    learner = learner_memory(config, shape, learner_at.kind)
    return [
        *learner_lines(config, learner, learner_at, machine_for(config.learner, types)),
        *engine_lines(config, shape, rollout_memory(config, shape, engine_at), engine_at),
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
    ],
)
def test_what_does_not_fit_is_said_with_what_to_do(example: str, overrides: list[str], said: str) -> None:
    lines = lines_of(load(f"examples/{example}.yaml", overrides))
    assert any(said in line for line in lines), lines


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
