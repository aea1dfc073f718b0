"""Instruments of a judge: does it deserve trust?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from cluster.config import ConfigError, JudgePool, load
from cluster.console import Progress
from evals import pairs, planted
from evals.judge_check import Trust, check, direct
from rewards.base import Judge
from tools.base import imported

judge_app = typer.Typer(no_args_is_help=True, help=__doc__)

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tiny.yaml"
#: What each number of `Trust` says, for the table.
_MEANING = {
    "agreement": "decided as known, best 1",
    "position_bias": "marks for being first, best 0",
    "flips": "decided by the order, best 0",
    "length_bias": "above 0: likes length",
    "image_count_bias": "above 0: likes pictures",
    "self_consistency": "decided so again, best 1",
    "calibration_error": "margins that mislead, best 0",
}


@judge_app.callback()
def judge() -> None:
    """Instruments of a judge: does it deserve trust?"""


@judge_app.command("check")
def check_judges(
    config: Annotated[Path, typer.Argument(help="YAML config whose judges are checked")] = EXAMPLE,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as judges.text.judge=m:Mine")] = None,
    only: Annotated[
        Literal["text", "image"] | None, typer.Option("--judge", help="one of them; by default both")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--pairs", help="JSON lines, as docs/judges.md tells; else built in")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="times that each pair is asked in order")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Ask a config's judges about pairs of which one document is known to be better, and say how they do."""
    pools = load(config, overrides or []).judges
    try:
        known = pairs.load(file) if file else planted.pairs()
    except pairs.PairsError as error:
        raise ConfigError(str(error)) from None
    found: dict[str, Trust] = {}
    for name in [only] if only else pairs.JUDGES:
        if mine := [pair for pair in known if pair.judge == name]:
            trust = found[name] = _check(name, getattr(pools, name), mine, repeats, quiet=as_json)
            if trust.agreement is None:
                raise RuntimeError(f"no pair has all its verdicts of the {name} judge: {trust.first_failure}")
    if not found:
        raise ConfigError(f"{file} holds no pair for the {only} judge")
    print(json.dumps({name: trust.row() for name, trust in found.items()})) if as_json else _show(found)


def _check(name: str, pool: JudgePool, known: Sequence[pairs.Pair], repeats: int, quiet: bool) -> Trust:
    judge = _judge(name, pool)
    progress = Progress(f"asking the {name} judge about {len(known)} pairs, round", repeats + 1)
    try:
        return check(
            direct(judge),
            known,
            repeats,
            at_once=pool.concurrency,
            begin=getattr(judge, "forget", lambda: None),
            on_progress=lambda done, total: None if quiet else progress.show(done),
        )
    finally:
        getattr(judge, "close", lambda: None)()


def _judge(name: str, pool: JudgePool) -> Judge:
    """The judge of a config, in this process."""
    try:
        made: Judge = imported(pool.judge)(**pool.options)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(f"judges.{name}: cannot make the judge {pool.judge!r}: {error}") from None
    return made


def _show(found: Mapping[str, Trust]) -> None:
    rows = {name: trust.row() for name, trust in found.items()}
    table = Table("", *found, "")
    for column in table.columns[1:-1]:
        column.justify = "right"
    for key, meaning in _MEANING.items():
        table.add_row(key.replace("_", " "), *(_number(row[key]) for row in rows.values()), meaning)
    table.add_row("pairs", *(str(t.pairs) for t in found.values()))
    table.add_row("failures", *(str(t.failures) for t in found.values()), "verdicts that are none")
    table.add_section()
    for flaw in sorted({flaw for trust in found.values() for flaw in trust.by_flaw}):
        table.add_row(flaw, *(_number(trust.by_flaw.get(flaw)) for trust in found.values()), "agreement")
    Console().print(table)
    for name, trust in found.items():
        if trust.first_failure:
            print(f"the {name} judge failed, the first time: {trust.first_failure}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{round(value, 2) + 0.0:.2f}"  # no -0.00
