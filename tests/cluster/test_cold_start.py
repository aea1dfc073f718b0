"""Where a run's policy comes from."""

from pathlib import Path

import pytest

from cluster.cold_start import starting_policy
from cluster.config import Config
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
