"""Which machine an actor lands on: the node types of ray_cluster.yaml, and the accelerators of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from cluster.config import Resources

CLUSTER = Path(__file__).resolve().parents[1] / "ray_cluster.yaml"

#: GiB that torch reports for one (`torch.cuda.get_device_properties`), which is less than its name says; by size.
ACCELERATORS = {
    "A10G": 22.0,
    "L4": 22.0,
    "A100-40GB": 39.4,
    "L40S": 44.4,
    "A100-80GB": 79.1,
    "H100": 79.1,
    "H200": 139.7,
}


@dataclass(frozen=True)
class Machine:
    """A node type: how many accelerators of which kind, GiB of memory, and what it offers to those who ask by name."""

    name: str
    accelerator: str | None
    number: int
    memory_gib: float
    resources: Mapping[str, float]
    most: int

    def holds(self, asked: Resources) -> int:
        """How many such actors find place on one of these."""
        whole = 1 / int(1 / asked.gpus) if 0 < asked.gpus < 1 else asked.gpus  # a share is of one GPU
        offers = dict(self.resources) | {"GPU": float(self.number)}
        wants = asked.resources | ({"GPU": whole} if whole else {})
        return int(min((offers.get(name, 0.0) / amount for name, amount in wants.items() if amount), default=0))


#: AWS's instance types (aws.amazon.com/ec2/instance-types): accelerator, how many, GiB of memory.
INSTANCES: dict[str, tuple[str | None, int, float]] = {
    "g5.12xlarge": ("A10G", 4, 192),
    "g6.12xlarge": ("L4", 4, 192),
    "g6e.4xlarge": ("L40S", 1, 128),
    "g6e.12xlarge": ("L40S", 4, 384),
    "p4d.24xlarge": ("A100-40GB", 8, 1152),
    "p4de.24xlarge": ("A100-80GB", 8, 1152),
    "p5.48xlarge": ("H100", 8, 2048),
    "p5en.48xlarge": ("H200", 8, 2048),
    "m6i.8xlarge": (None, 0, 128),
}


def node_types(path: Path = CLUSTER) -> list[Machine]:
    """The node types of a Ray cluster file; one whose instance type is not in `INSTANCES` has no known accelerator."""
    if not path.is_file():
        return []
    file = yaml.safe_load(path.read_text())
    found = []
    for name, node in file["available_node_types"].items():
        kind, number, memory = INSTANCES.get(node["node_config"].get("InstanceType"), (None, 0, 0.0))
        offers = node["resources"]
        most = node.get("max_workers", 1 if name == file["head_node_type"] else file["max_workers"])
        found.append(Machine(name, kind, int(offers.get("GPU", number)), memory, offers, most))
    return found


def machine_for(asked: Resources, types: list[Machine]) -> Machine | None:
    """The node type that offers a resource which an actor asks for by name, or None."""
    return next((m for m in types if set(asked.resources) & set(m.resources)), None)


def unplaced(name: str, count: int, asked: Resources, types: list[Machine]) -> str:
    """Why `count` actors of this kind cannot be placed on the cluster, in one sentence; "" if they can."""
    if not asked.resources:
        return ""  # any node will do, and which there are besides the cluster file's is not known here
    machine = machine_for(asked, types)
    if machine is None:
        return f"{name} asks for {asked.resources}, which no node type of {CLUSTER.name} offers"
    each = machine.holds(asked)
    if each == 0:
        return f"{name} asks for {asked.gpus:g} GPUs and {asked.resources}, more than one {machine.name} node has"
    if (needed := -(-count // each)) > machine.most:
        return f"{count} x {name} take {needed} {machine.name} nodes; {CLUSTER.name} allows {machine.most}"
    return ""


def this_accelerator() -> tuple[str, float] | None:
    """Name and GiB of this machine's accelerator, if it has one."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return found.name, found.total_memory / 2**30
