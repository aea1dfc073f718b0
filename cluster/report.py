"""`report.html` of a run: what changed, learning curves, a table per kind of prompt, documents before and after.

One file, no network, made from the run folder alone; so it can be made again at any time.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2

from agent.document import render_html
from agent.render import CallOutcome
from cluster.run_folder import REPORT, SUMMARY, RunFolder
from evals.heldout import COLUMNS, class_of
from replay.view import View
from rewards.components import COUNTS, MARKS

PAIRS_PER_CLASS = 2
_CLASSES = {
    "search": "a real picture",
    "diffusion": "an invented scene",
    "code": "a chart",
    "edit": "a changed picture",
    "several": "several pictures",
    "none": "no picture",
}
#: (title, unit, metrics.jsonl keys) of each chart.
_CURVES = [
    ("Reward", "0 to 1", ["reward"]),
    ("Parts of the reward: rules", "0 to 1", ["reward/rule", "reward/rule_strict", "reward/fit", "reward/missed"]),
    (
        "Parts of the reward: tools",
        "0 to 1",
        ["reward/coverage", "reward/precision", "reward/r_tool", "reward/process"],
    ),
    ("Parts of the reward: judges", "0 to 1", ["reward/r_llm", "reward/r_mllm", "reward/r_mllm_published"]),
    ("Marks of the judges", "1 to 5", [f"reward/{name}" for name in MARKS]),
    ("Disagreement of the judges", "standard deviation", [f"reward/disagreement/{name}" for name in MARKS]),
    ("Counts a document", "", [f"reward/{name}" for name in COUNTS]),
    ("Seconds a step", "s", ["step_s", "wait_s", "forward_backward_s"]),
    ("Staleness", "optimiser steps", ["staleness", "staleness_max"]),
    ("Tokens an answer", "tokens", ["response_tokens"]),
    ("Policy against sampler", "KL, nats", ["kl_behaviour"]),
]


def write(folder: RunFolder) -> None:
    """Write the report of a finished run."""
    summary, steps = json.loads(folder.read(SUMMARY)), folder.steps()
    store = View(folder.replay)
    try:
        pairs = _pairs(store)
    finally:
        store.close()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True
    )
    page = environment.get_template("report.html").render(
        s=summary, classes=_CLASSES, curves=_curves(steps), pairs=pairs, shown=_CLASSES, percent="{:.1%}".format
    )
    folder.write(REPORT, page)


def _pairs(store: View) -> list[dict[str, Any]]:
    """Some held-out prompts of each kind, with the documents written before and after."""
    before, after = (
        {r["trajectory"].split("-", 1)[1]: r for r in _rows(store, f"{when}-heldout")} for when in ("before", "after")
    )
    common = sorted(before.keys() & after.keys())
    random.Random(0).shuffle(common)
    chosen = [
        name for kind in _CLASSES for name in [n for n in common if class_of(before[n]) == kind][:PAIRS_PER_CLASS]
    ]
    show = partial(_document, store)
    return [
        {
            "kind": class_of(before[n]),
            "question": before[n]["question"],
            "before": show(before[n]),
            "after": show(after[n]),
        }
        for n in chosen
    ]


def _rows(store: View, purpose: str) -> list[dict[str, Any]]:
    rows = store.get(store.find(purpose, ["scored"]), COLUMNS).to_pylist()
    return [r for r in rows if r["text"] is not None]


def _document(store: View, row: dict[str, Any]) -> dict[str, Any]:
    calls = [CallOutcome.of_row(c) for c in row["calls"]]
    blobs = store.blobs({*row["given"], *(i for c in calls for i in c.images)})
    html = render_html(row["text"], calls, blobs, [blobs[s] for s in row["given"]])
    return {"html": html, "right": row["accurate"], "reward": row["reward_strict"]}


def _curves(steps: Sequence[dict[str, Any]]) -> list[str]:
    """Charts as inline SVG."""
    from matplotlib.figure import Figure

    out = []
    for title, unit, keys in _CURVES:
        keys = [k for k in keys if any(k in s for s in steps)]
        if not keys:
            continue
        figure = Figure(figsize=(4.6, 2.6), layout="constrained")
        axes = figure.subplots()
        for key in keys:
            known = [s for s in steps if key in s]
            axes.plot(
                [s["step"] for s in known], [s[key] for s in known], label=key.removeprefix("reward/"), linewidth=1.4
            )
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_ylabel(unit, fontsize=8)
        axes.set_xlabel("optimiser step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(keys) > 1:
            axes.legend(fontsize=7, frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        out.append("<svg" + buffer.getvalue().partition("<svg")[2])
    return out
