"""Where a run's policy comes from."""

from pathlib import Path

import pytest

from cluster.cold_start import starting_policy
from cluster.config import Config
from cluster.servers import RunFailed


def config(path: str) -> Config:
    learner = {"steps": 1, "prompts_per_step": 1, "samples_per_prompt": 2, "lr": 1}
    return Config.model_validate({"name": "x", "policy": {"path": path}, "learner": learner})


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert starting_policy(config(str(tmp_path)), tmp_path / "start") == str(tmp_path)


@pytest.mark.parametrize("name", ["no/where/to/be/found", "nobody/nothing"])
def test_a_model_that_is_nowhere_is_named_in_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=f"'{name}' is neither a folder nor a model") as error:
        starting_policy(config(name), tmp_path / "start")
    assert "\n" not in str(error.value)
