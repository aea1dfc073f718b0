"""The command line: one command, `llmi`. Exit status 0 done, 1 it failed, 2 wrong usage or config."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.config import Config, ConfigError, load
from cluster.judge import EXAMPLE, judge_app
from cluster.replay import replay_app
from cluster.reward import reward_app

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(replay_app, name="replay")
app.add_typer(judge_app, name="judge")
app.add_typer(reward_app, name="reward")

ConfigFile = Annotated[Path, typer.Argument(help="YAML config, such as examples/tiny.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, such as learner.steps=10")]


@app.callback()
def options(debug: Annotated[bool, typer.Option(help="show tracebacks")] = False) -> None:
    """llmi: trains and runs agents that write documents with pictures."""
    os.environ["LLMI_DEBUG"] = "1" if debug else ""


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="go on from the run folder's last checkpoint")] = False,
    dry_run: Annotated[bool, typer.Option(help="print the config and where everything goes; start nothing")] = False,
) -> None:
    """Train a policy by reinforcement learning (cold-starts it first if it does not exist yet)."""
    run = load(config, overrides or [])
    if dry_run:
        from cluster import dry_run as plan

        plan.show(run)
        return
    from cluster import train as driver

    summary = driver.train(run, resume)
    _print_summary(summary, run)


@app.command()
def sft(config: ConfigFile, overrides: Overrides = None) -> None:
    """Cold start: build the config's tiny policy and train it on synthetic documents."""
    run = load(config, overrides or [])
    from cluster.cold_start import cold_start
    from cluster.pools import init_ray

    init_ray()
    print(f"policy in {cold_start(run, f'{run.folder}/start')}")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="what the document is to be about")],
    model: Annotated[str, typer.Option(help="policy folder, such as runs/tiny/policy; also s3://...")],
    output: Annotated[Path, typer.Option("--output", "-o", help="file to write: .html, .md or .json")],
    image: Annotated[list[Path] | None, typer.Option(help="a picture of yours; may be given several times")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="of the sampling")] = None,
    scale: Annotated[int, typer.Option(help="tries of everything, 1 to 16: more is slower and better")] = 1,
    config: Annotated[
        Path | None, typer.Option(help="YAML config with the tools; by default that of the model's run, or tiny.yaml")
    ] = None,
) -> None:
    """Write one document, in this process."""
    from cluster import generate as writer
    from cluster.serve import policy_folder

    chosen = config or writer.config_of(model)
    run = load(chosen, [])
    told = f"with the tools of {chosen}"
    writer.generate(run, policy_folder(run, model), prompt, image or [], seed, scale, output, told)


@app.command()
def serve(
    config: ConfigFile,
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option(help="policy folder, also s3://...; by default what the run trained")
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port to listen on")] = 8000,
    write: Annotated[
        Path | None, typer.Option(help="write this file for `serve deploy` on a cluster, and start nothing")
    ] = None,
) -> None:
    """Answer prompts over HTTP with the trained policy, until Ctrl-C."""
    run = load(config, overrides or [])
    from cluster import serve as service

    if write is not None:
        from cluster.serve_file import to_yaml

        write.write_text(to_yaml(run, service.served(run, model), host, port))
        print(f"wrote {write}; `serve deploy {write}` starts it, and again when it has changed")
        return
    service.serve(run, model, host, port)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="a module of benchmarks/")],
    overrides: Overrides = None,
    config: Annotated[Path, typer.Option(help="YAML config to start from")] = EXAMPLE,
) -> None:
    """Run a benchmark of this project; the last line is one JSON object."""
    from cluster import bench as benchmark

    print(json.dumps(benchmark.run(name, config, overrides or [])))


@app.command()
def doctor(fix: Annotated[bool, typer.Option(help="mend what can be mended")] = False) -> None:
    """Say what is wrong with this machine, in plain words."""
    from cluster import doctor as doc

    raise typer.Exit(doc.run(fix))


def _print_summary(summary: dict, run: Config) -> None:
    if "reward_before" in summary:
        print(f"reward         {summary['reward_before']:.3f} -> {summary['reward_after']:.3f}")
        print(f"tool accuracy  {summary['tool_accuracy_before']:.3f} -> {summary['tool_accuracy_after']:.3f}")
    print(f"{summary['steps']} steps in {summary['wall_s']:.0f} s, at most {summary['peak_pss_mib']} MiB of memory")
    print(f"{summary['trajectories_trained']} documents trained, {summary['trajectories_lost']} lost")
    print(f"report  {run.folder}/report.html\npolicy  {run.folder}/policy")


def main() -> None:
    """Entry point: turns errors into one clear line on stderr."""
    try:
        app(standalone_mode=True)
    except ConfigError as error:
        print(f"llmi: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("llmi: interrupted; `llmi train CONFIG --resume` goes on", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if os.environ.get("LLMI_DEBUG"):
            raise
        print(f"llmi: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
