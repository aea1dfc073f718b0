"""Look into a run's replay store, also while the run writes to it, and take trajectories out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cluster.config import ConfigError
from cluster.console import Progress

replay_app = typer.Typer(no_args_is_help=True, help=__doc__)

Uri = Annotated[str, typer.Argument(help="a run folder or its replay/: a path, file://... or s3://...")]
Name = Annotated[str, typer.Argument(metavar="TRAJECTORY_OR_GROUP", help="such as train-000012/3 or train-000012")]
FORMATS = {".parquet": "parquet", ".jsonl": "sft", ".html": "html"}
PAGE = 100  # trajectories on a page where no limit is given: their pictures are part of it


@replay_app.command()
def ls(uri: Uri) -> None:
    """List what is there: groups, trajectories by status and policy versions of each purpose."""
    from cluster import trajectories

    with trajectories.opened(uri) as view:
        trajectories.show_purposes(view)


@replay_app.command()
def show(
    uri: Uri, name: Name, as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False
) -> None:
    """Show all that is known of one trajectory, or of those of one group."""
    from cluster import trajectories

    with trajectories.opened(uri) as view:
        trajectories.show(view, name, as_json)


@replay_app.command()
def export(
    uri: Uri,
    out: Annotated[Path, typer.Argument(help="file to write: .parquet, .jsonl or .html")],
    format: Annotated[Literal["parquet", "sft", "html"] | None, typer.Option(help="by default as OUT ends")] = None,
    purpose: Annotated[str, typer.Option(help="train, or the name of an evaluation")] = "train",
    limit: Annotated[
        int | None, typer.Option(min=1, help=f"only the newest so many; by default all, {PAGE} for html")
    ] = None,
    min_reward: Annotated[
        float | None, typer.Option(help="only those with at least this reward, 0 to 1, under the strict rule")
    ] = None,
) -> None:
    """Write trajectories and their pictures to a file: a table, examples for SFT, or a page to read."""
    kind = _check_out(out, format)
    from cluster import trajectories
    from replay import export as exports

    with trajectories.opened(uri) as view:
        trajectories.check_purpose(view, purpose)
        least = 0.0 if kind == "sft" and min_reward is None else min_reward  # an example has a reward
        chosen = exports.select(view, purpose, least, limit or (PAGE if kind == "html" else None))
        if not chosen:
            why = "" if least is None else f": no reward is at least {least:g}, lower --min-reward"
            raise ConfigError(f"there is nothing of {purpose!r} to export{why}")
        if kind == "html":
            trajectories.write_page(view, out, chosen, f"{uri}: {purpose}")
        else:
            write = exports.parquet if kind == "parquet" else exports.sft
            write(view, out, chosen, Progress("trajectories", len(chosen)).show)
    print(f"{len(chosen)} trajectories in {out}, {out.stat().st_size / 2**20:.1f} MiB")


@replay_app.command()
def gather(
    service: Annotated[str, typer.Argument(help="what a service keeps, such as runs/tiny/service; also s3://...")],
    uri: Annotated[str, typer.Argument(help="the store to make, for train.store; also s3://...")],
    samples: Annotated[int, typer.Option(min=2, help="of a group: learner.samples_per_prompt")] = 8,
) -> None:
    """Make a store of the questions, documents and thumbs that users allowed to be trained on."""
    from cluster.gather import gather as make

    found = make(service, uri, samples)
    print(f"{found.questions} questions in {uri}, {found.answers} with their answers, {found.rated} with a thumb")


@replay_app.command()
def verify(uri: Uri) -> None:
    """Read every byte and count every promise anew; exit status 1 if something is wrong."""
    from cluster import trajectories
    from replay.verify import verify as check

    found = check(trajectories.store_of(uri))
    for line in [*(f"note: {note}" for note in found.notes), *found.problems]:
        print(line)
    size = (
        f"{found.rows} rows and {found.pictures} pictures in {found.segments} segments, {found.bytes / 2**20:.1f} MiB"
    )
    print(f"{size}: {f'{len(found.problems)} problems' if found.problems else 'all sound'}")
    raise typer.Exit(bool(found.problems))


def _check_out(out: Path, format: str | None) -> str:
    """The format to write."""
    kind = format or FORMATS.get(out.suffix.lower())
    if kind is None:
        raise ConfigError(f"cannot tell a format from {out}: end it in {', '.join(FORMATS)}, or say --format")
    if out.exists():
        raise ConfigError(f"{out} exists; remove it or choose another name")
    if not out.parent.is_dir():
        raise ConfigError(f"there is no folder {out.parent} to write {out.name} in; make it first")
    return kind
