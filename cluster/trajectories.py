"""Trajectories of a replay store for people: a table, plain lines, a page with pictures."""

from __future__ import annotations

import difflib
import json
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jinja2
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agent.document import render_html
from agent.render import CallOutcome
from cluster.config import ConfigError
from replay.export import COLUMNS, Chosen, batches, pictures, pictures_of, statuses
from replay.record import Blob, Status, incarnation, updates
from replay.storage import storage
from replay.view import View, is_store

#: Columns with one number a token; their sums are shown.
_PER_TOKEN = ("prompt_ids", "token_ids", "logprobs", "mask", "versions")
#: What a terminal would obey; answers are not trusted.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def opened(uri: str) -> closing[View]:
    """The store at `uri`, or that of the run folder at `uri`.

    Raises:
        StoreError: there is none.
    """
    return closing(View(store_of(uri)))


def store_of(uri: str) -> str:
    """The store that is meant: that of a run folder, or the one at `uri` itself."""
    inner = f"{uri.rstrip('/')}/replay"
    return inner if is_store(inner) else uri


def check_purpose(view: View, purpose: str) -> None:
    """ConfigError for one that the store does not have."""
    if purpose not in (there := view.purposes()):
        raise ConfigError(f"the store has no purpose {purpose!r}; it has {', '.join(there) or 'no trajectory yet'}")


def show_purposes(view: View) -> None:
    """Print a row a purpose."""
    table = Table("purpose", "groups", "ended", "trained", "trajectories", "policy")
    for column in table.columns[1:4]:
        column.justify = "right"
    for purpose in view.purposes():
        groups, counts = view.groups(purpose), view.counts(purpose)
        lines = [Text(f"{counts[s]} {s}") for s in Status if counts.get(s)]
        if lost := view.lost(purpose):
            lines.append(Text(f"{lost} lost", "bold red"))
        table.add_row(
            purpose,
            *(str(groups.get(key, 0)) for key in ("accepted", "ended", "trained")),
            Text("\n").join(lines),
            " to ".join(dict.fromkeys(map(_version, _versions(view, purpose)))),
        )
    Console().print(table if table.row_count else "the store is empty")


def _versions(view: View, purpose: str) -> tuple[int, ...]:
    """The oldest and the newest policy version of any token; nothing if there is no token."""
    names = view.find(purpose, [s for s in Status if s is not Status.PENDING])
    ranges = [pc.min_max(pc.list_flatten(rows["versions"])).as_py() for rows in batches(view, names, ["versions"])]
    found = [r for r in ranges if r["min"] is not None]
    return (min(r["min"] for r in found), max(r["max"] for r in found)) if found else ()


def _version(packed: int) -> str:
    return f"{incarnation(packed)}.{updates(packed)}"


def show(view: View, name: str, as_json: bool) -> None:
    """Print a trajectory or a group.

    Raises:
        ConfigError: there is no such one; the message names the nearest.
    """
    all_facts = list(facts(view, _find(view, name)))
    if as_json:
        one = all_facts[0] if all_facts[0]["trajectory"] == name else {"group": name, "trajectories": all_facts}
        print(json.dumps(one, ensure_ascii=False))
        return
    console = Console(highlight=False, soft_wrap=True)
    for i, fact in enumerate(all_facts):
        console.print(Text("\n" * bool(i) + f"{fact['trajectory']}  {_status(fact)}", "bold"))
        for label, value in _lines(fact):
            indented = textwrap.indent(printable(value), " " * 11).lstrip()
            console.print(Text.assemble((f"{label:<10} ", "cyan"), indented))


def _find(view: View, name: str) -> Chosen:
    known: list[str] = []
    for purpose in view.purposes():
        trajectories = view.find(purpose)
        if found := [t for t in trajectories if name in (t, _group(t))]:
            every = statuses(view, purpose)
            return {t: every[t] for t in found}
        known += trajectories
    nearest = difflib.get_close_matches(name, {*known, *map(_group, known)}, n=1, cutoff=0.0)
    raise ConfigError(
        f"the store has no trajectory or group {name!r}" + "".join(f"; the nearest is {n}" for n in nearest)
    )


def _group(trajectory: str) -> str:
    return trajectory.rpartition("/")[0]


def facts(view: View, chosen: Chosen) -> Iterator[dict[str, Any]]:
    """All that is known of each trajectory, as values that JSON holds; of what is one a token, counts and sums."""
    for rows in batches(view, list(chosen), COLUMNS):
        for row in rows.to_pylist():
            yield _fact(view, row, *chosen[row["trajectory"]])


def _fact(view: View, row: Mapping[str, Any], status: str, reason: str) -> dict[str, Any]:
    blobs = pictures(view, pictures_of(row))
    logprob = math.fsum(row["logprobs"] or ())
    return {
        **{key: value for key, value in row.items() if key not in _PER_TOKEN},
        "status": status,
        "reason": reason,
        "given": [_picture(blobs[sha]) for sha in row["given"] or ()],
        "prompt_tokens": len(row["prompt_ids"] or ()),
        "tokens": len(row["token_ids"] or ()),
        "charged_tokens": sum(row["mask"] or ()),
        "logprob_sum": logprob if math.isfinite(logprob) else None,
        "versions": [_version(v) for v in sorted(set(row["versions"] or ()))],
        "calls": [_call(call, blobs) for call in row["calls"]] if row["calls"] is not None else None,
        "components": dict(row["components"] or ()),
        "reasons": json.loads(row["reasons"] or "{}"),
    }


def _call(call: Mapping[str, Any], blobs: Mapping[str, Blob]) -> dict[str, Any]:
    parsed = {key: json.loads(call[key] or "{}") for key in ("params", "provenance")}
    return {**call, **parsed, "images": [_picture(blobs[sha]) for sha in call["images"] or ()]}


def _picture(blob: Blob) -> dict[str, Any]:
    return {"sha256": blob.sha256, "mime": blob.mime, "bytes": len(blob.data)}


def _status(fact: Mapping[str, Any]) -> str:
    return f"{fact['status']} ({fact['reason']})" if fact["reason"] else fact["status"]


def _wanted(fact: Mapping[str, Any]) -> str:
    """What the prompt asks for."""
    n = fact["image_num"] or 0
    number = {-1: "no picture", 0: "any number of pictures", 1: "1 picture", 99: "at least 1 picture"}
    return ", ".join([number.get(n, f"{n} pictures"), *(fact["tools"] or ["no tool required"])])


def _answer(fact: Mapping[str, Any]) -> str:
    """Numbers of the answer."""
    logprob = "not finite" if fact["logprob_sum"] is None else f"{fact['logprob_sum']:.3f}"
    tokens = f"{fact['tokens']} tokens, {fact['charged_tokens']} charged, after {fact['prompt_tokens']} of the prompt"
    made = f"{fact['worker']}, ended by {fact['finish']}, {fact['seconds'] or 0:.2f} s"
    return f"{tokens}; log-prob sum {logprob}; policy {', '.join(fact['versions'])}; {made}"


def printable(text: str) -> str:
    """Without what a terminal would obey."""
    return _CONTROL.sub("\ufffd", text)


def _lines(fact: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Label and value of all that there is to say."""
    yield "part of", f"{fact['purpose']}, prompt {fact['order']}, seed {fact['seed']}, attempt {fact['attempt'] + 1}"
    yield "question", fact["question"] or ""
    yield "wants", _wanted(fact)
    yield from (("given", _pictured(p)) for p in fact["given"])
    if fact["text"] is None:
        return
    yield "answer", fact["text"]
    yield "numbers", _answer(fact)
    for i, call in enumerate(fact["calls"] or (), 1):
        reason = f": {call['reason']}" if call["reason"] else ""
        said = [f"{call['source']} {call['status']} in {call['seconds'] or 0:.2f} s{reason}", call["description"] or ""]
        made = [f"{key} {json.dumps(call[key], ensure_ascii=False)}" for key in ("params", "provenance") if call[key]]
        yield f"call {i}", "\n".join(filter(None, said + made + [_pictured(p) for p in call["images"]]))
    if fact["reward"] is not None:
        strict = "none" if fact["reward_strict"] is None else f"{fact['reward_strict']:.4g}"
        yield "reward", f"{fact['reward']:.4g} (strict {strict}), {'right' if fact['accurate'] else 'wrong'} tools"
        yield "parts", ", ".join(f"{name} {value:.4g}" for name, value in fact["components"].items())
        if fact["reasons"]:
            yield "judges", "\n".join(f"{name}: {why}" for name, why in fact["reasons"].items())
        spent = {"rendered": fact["rendered.seconds"], "scored": fact["scored.seconds"]}
        yield "took", ", ".join(f"{s:.2f} s to be {what}" for what, s in spent.items() if s is not None)
    if fact["status"] == Status.TRAINED:
        yield "trained", f"in optimiser step {fact['step']}, advantage {fact['advantage']:+.3f}"


def _pictured(picture: Mapping[str, Any]) -> str:
    return f"{picture['sha256']} {picture['mime']} {picture['bytes']} bytes"


def write_page(view: View, out: Path, chosen: Chosen, title: str) -> None:
    """One HTML file that needs no network: the documents as a reader sees them, group by group."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for fact in facts(view, chosen):
        groups.setdefault(fact["group"], []).append(fact | {"html": _document(view, fact)})
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True
    )
    given = {name: _html(view, "", (), samples[0]["given"]) for name, samples in groups.items()}
    page = environment.get_template("replay.html").render(
        title=title, groups=groups, given=given, wanted=_wanted, answer=_answer, status=_status, number=len(chosen)
    )
    storage(out.parent).replace(out.name, page.encode())


def _document(view: View, fact: Mapping[str, Any]) -> str:
    """The answer as HTML; "" if there is none, or it was not rendered yet."""
    return "" if fact["text"] is None or fact["calls"] is None else _html(view, fact["text"], fact["calls"], ())


def _html(view: View, text: str, calls: Sequence[Mapping[str, Any]], given: Sequence[Mapping[str, Any]]) -> str:
    shas = [[p["sha256"] for p in call["images"]] for call in calls]
    blobs = pictures(view, [*(p["sha256"] for p in given), *(sha for of_call in shas for sha in of_call)])
    outcomes = [CallOutcome(**(dict(c) | {"images": tuple(of)})) for c, of in zip(calls, shas, strict=True)]
    return render_html(text, outcomes, blobs, [blobs[p["sha256"]] for p in given])
