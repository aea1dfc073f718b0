"""Where a run's policy comes from."""

from pathlib import Path
from unittest.mock import MagicMock

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError

from cluster.cold_start import cold_start, starting_policy
from cluster.config import Config, load
from cluster.servers import RunFailed
from replay.folders import written


def config(path: str) -> Config:
    learner = {"steps": 1, "prompts_per_step": 1, "samples_per_prompt": 2, "lr": 1}
    return Config.model_validate({"name": "x", "policy": {"path": path}, "learner": learner})


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert starting_policy(config(str(tmp_path)), str(tmp_path / "start")) == str(tmp_path)


def test_a_model_in_a_bucket_is_left_to_those_who_load_it(bucket: str) -> None:
    with pytest.raises(RunFailed, match=rf"there is no model in {bucket}/model, which policy\.path names"):
        starting_policy(config(f"{bucket}/model"), f"{bucket}/start")
    with written(f"{bucket}/model") as folder:
        Path(folder).mkdir()
        Path(folder, "config.json").touch()
    assert starting_policy(config(f"{bucket}/model"), f"{bucket}/start") == f"{bucket}/model"


@pytest.mark.parametrize("name", ["no/where/to/be/found", "nobody/nothing"])
def test_a_model_that_is_nowhere_is_named_in_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=f"'{name}' is neither a folder nor a model") as error:
        starting_policy(config(name), str(tmp_path / "start"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (GetTimeoutError("Get timed out"), r"waited 120 s .+ a learner's \(0\.5 CPU\); lower what `learner` asks for"),
        (ActorDiedError(), r"the process of the cold start died, .+ memory ran out: lower sft\.tokens_per_microbatch"),
    ],
)
def test_a_cold_start_that_has_no_place_or_dies_is_one_sentence(
    error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.cold_start.ColdStart", MagicMock())
    monkeypatch.setattr("cluster.cold_start.ray.wait", lambda refs, timeout: ([], refs))
    monkeypatch.setattr("cluster.cold_start.ray.get", MagicMock(side_effect=error))
    monkeypatch.setattr("cluster.cold_start.ray.kill", MagicMock())
    with pytest.raises(RunFailed, match=said) as failed:
        cold_start(load("examples/tiny.yaml", ["learner.cpus=0.5"]), str(tmp_path / "start"))
    assert "\n" not in str(failed.value)
