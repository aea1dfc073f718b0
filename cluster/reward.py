"""Instruments of a reward: is it gamed?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from agent.render import CallOutcome
from cluster import trajectories
from cluster.config import ConfigError
from evals.audit import Audit, Scored, audit
from replay.export import batches, statuses
from replay.record import updates
from replay.view import View
from rewards.base import Rendered

reward_app = typer.Typer(no_args_is_help=True, help=__doc__)

_COLUMNS = ["group", "versions", "question", "text", "calls", "image_num", "tools", "finish", "reward"]
_COLUMNS += ["components", "reasons"]
_LONGEST = 2000  # characters of a document that are printed
_MARKS = {1: "better", -1: "worse", 0: ""}


@reward_app.callback()
def reward() -> None:
    """Instruments of a reward: is it gamed?"""


@reward_app.command("audit")
def audit_run(
    run: Annotated[str, typer.Argument(help="a run folder or its replay/: a path, file://... or s3://...")],
    purpose: Annotated[str, typer.Option(help="train, or the name of an evaluation")] = "train",
    show: Annotated[int, typer.Option(min=0, help="documents shown of each finding and disagreement, at most")] = 5,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="write those documents to an .html page")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Look for gaming of the reward in a run, also while it goes on; docs/rewards.md says what is looked for."""
    if out is not None and out.exists():
        raise ConfigError(f"{out} exists; remove it or choose another name")
    with trajectories.opened(run) as view:
        trajectories.check_purpose(view, purpose)
        docs = list(_scored(view, purpose))
        if not docs:
            raise ConfigError(f"no document of {purpose!r} in {run} has a reward yet")
        found = audit(docs, show)
        named = [*(d.trajectory for d in found.disagreements), *(t for f in found.findings for t in f.documents)]
        if out is not None:
            every = statuses(view, purpose)
            trajectories.write_page(view, out, {name: every[name] for name in named}, f"{run}: audit of {purpose}")
    print(json.dumps(found.row())) if as_json else _show(found, {d.trajectory: d for d in docs})


def _scored(view: View, purpose: str) -> Iterator[Scored]:
    for rows in batches(view, view.find(purpose), ["trajectory", *_COLUMNS]):
        yield from (_document(row) for row in rows.to_pylist() if row["reward"] is not None)


def _document(row: dict[str, Any]) -> Scored:
    calls = [CallOutcome.of_row(call) for call in row["calls"]]
    doc = Rendered(
        row["question"],
        row["text"],
        calls,
        row["image_num"],
        tuple(row["tools"]),
        finished=row["finish"] == "stop",
    )
    at = max(map(updates, row["versions"]), default=0)
    reasons = json.loads(row["reasons"] or "{}")
    return Scored(row["trajectory"], row["group"], at, doc, row["reward"], dict(row["components"]), reasons)


def _show(found: Audit, docs: dict[str, Scored]) -> None:
    console = Console(highlight=False)
    console.print(f"{found.documents} documents of {found.groups} prompts")
    if found.trends:
        table = Table("mean of prompts", "first third", "last third", "std errors", "")
        for column in table.columns[1:4]:
            column.justify = "right"
        for t in found.trends:
            table.add_row(
                t.name, f"{t.early:.3f}", f"{t.late:.3f}", f"{t.z:+.1f}", _MARKS[t.better] or "changed" * t.changed
            )
        console.print(table)
    else:
        console.print("too few prompts to compare beginning and end")
    for name, r in found.follows.items():
        console.print(f"correlation of reward and {name} among samples of a prompt: {r:+.2f}")
    console.print(f"\nWhat may be gaming ({len(found.findings)})" if found.findings else "\nNothing looks like gaming")
    for finding in found.findings:
        where = f" ({', '.join(finding.documents)})" if finding.documents else ""
        console.print(trajectories.printable(f"- {finding.kind}: {finding.what}{where}"), markup=False)
    if found.disagreements:
        console.print("\nWhere judges and rules are farthest apart")
    for d in found.disagreements:
        console.print(f"\n{d.trajectory}: judges {d.judges:.2f}, rules {d.rules:.2f}", style="bold")
        of = docs[d.trajectory].doc
        said = "".join(f"\n--- {name}: {why}" for name, why in docs[d.trajectory].reasons.items())
        console.print(trajectories.printable(f"{of.question}\n---\n{of.text[:_LONGEST]}{said}"), markup=False)
