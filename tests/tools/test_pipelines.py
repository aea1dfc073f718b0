"""Families of diffusers pipelines, tiny and random, through the tool's config path: alone, batched, out of memory."""

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tools import tiny_pipelines as tiny
from tools.base import CallFailed, ToolResult
from tools.diffusion import DiffusionTool
from tools.pipelines import OutOfMemory

PROMPTS = ["a cat", "a long prompt about a red dog that runs through the snow", "x", "two boats"]
FAMILIES = [tiny.sd, tiny.sd3, tiny.flux, tiny.flux2, tiny.qwen]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], str]:
    folders: dict[Any, str] = {}

    def folder(build: Any) -> str:
        if build not in folders:
            folders[build] = tiny.save(build, tmp_path_factory.mktemp(build.__name__))
        return folders[build]

    return folder


def pixels(result: ToolResult | Exception) -> np.ndarray:
    assert isinstance(result, ToolResult), result
    return np.asarray(Image.open(io.BytesIO(result.images[0].data))).astype(int)


def calls(prompts: list[str], **more: Any) -> list[tuple[dict[str, Any], tuple]]:
    return [({"prompt": prompt, **more}, ()) for prompt in prompts]


@contextmanager
def memory_for(tool: DiffusionTool, most: int) -> Iterator[list[int]]:
    """The UNet of a tool fails as a GPU does above so many pictures (half of its rows are guidance's); what it saw."""
    seen: list[int] = []

    def count(module: Any, args: Any) -> None:
        seen.append(len(args[0]) // 2)
        if seen[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    hook = tool._pipeline._pipeline.unet.register_forward_pre_hook(count)
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_is_the_same_alone_and_in_a_batch_up_to_the_noise_of_floats(saved, family):
    alone = DiffusionTool(saved(family), steps=2, size=64)
    together = DiffusionTool(saved(family), steps=2, size=64, batch=len(PROMPTS))
    one_by_one = [pixels(alone.run(*call)) for call in calls(PROMPTS)]
    batched = [pixels(result) for result in together.run_many(calls(PROMPTS))]
    assert all(a.shape == (64, 64, 3) and np.abs(a - b).max() <= 1 for a, b in zip(one_by_one, batched, strict=True))
    assert np.abs(one_by_one[0] - one_by_one[1]).max() > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_repeats_itself_and_guidance_and_steps_matter_where_the_pipeline_has_them(saved, family):
    tool = DiffusionTool(saved(family), size=64, steps=2, parameters=["guidance", "steps", "seed"])
    asked = {"prompt": "a cat", "guidance": "3", "steps": 2, "seed": 5}
    first = tool.run(asked)
    assert first == tool.run(asked)
    said = {"steps": 2, "guidance": 3.0, "seed": 5, "maker": saved(family), "model": saved(family)}
    assert first.provenance == said
    for change in ({"steps": 3}, {"seed": 6}, {"guidance": "9"}):
        if family is tiny.flux2 and "guidance" in change:
            continue  # random and untrained, it has guidance in name
        assert tool.run(asked | change).images != first.images, change


def test_the_small_model_of_the_tree_draws_the_same_in_a_batch_up_to_the_noise_of_floats():
    prompts = ["a red star at the top over a sea", "a blue boat on the left", "a green tree", "x", "a yellow moon"]
    alone, together = DiffusionTool(), DiffusionTool(batch=3)
    batched = [pixels(result) for result in together.run_many(calls(prompts))]
    apart = [np.abs(pixels(alone.run(*call)) - b) for call, b in zip(calls(prompts), batched, strict=True)]
    assert max(a.max() for a in apart) <= 1 and np.mean(apart) < 1e-3


def test_calls_of_several_sizes_and_a_bad_one_come_back_in_their_order(saved):
    tool = DiffusionTool(saved(tiny.sd), steps=1, batch=4, parameters=["size"])
    sizes = ["64x96", "128", "64x96", "1x1", "96x64"]
    results = tool.run_many([({"prompt": "a cat", "size": size}, ()) for size in sizes])
    assert isinstance(results[3], CallFailed) and "64 to 2048" in str(results[3])
    made = [pixels(r).shape[:2] for r in results if isinstance(r, ToolResult)]
    assert made == [(96, 64), (128, 128), (96, 64), (64, 96)]


def test_a_batch_that_does_not_fit_is_halved_for_good_and_every_picture_is_made(saved, caplog):
    tool = DiffusionTool(saved(tiny.sd), steps=1, size=32, batch=4, guidance=3.0)
    expected = [r.images for r in map(lambda c: tool.run(*c), calls(PROMPTS))]
    with memory_for(tool, 2) as seen, caplog.at_level(logging.WARNING):
        results = tool.run_many(calls(PROMPTS))
        assert seen == [4, 2, 2] and "at most 2 at once" in caplog.text
        tool.run_many(calls(PROMPTS))
        assert seen[3:] == [2, 2]
    assert len(expected) == 4 and all(pixels(r).shape == (32, 32, 3) for r in results)


def test_a_picture_that_does_not_fit_alone_costs_its_own_call_and_is_infrastructure(saved):
    tool = DiffusionTool(saved(tiny.sd), steps=1, size=32, batch=2, guidance=3.0)
    with memory_for(tool, 0), pytest.raises(OutOfMemory, match="does not hold one 32 x 32 picture"):
        tool.run({"prompt": "a cat"})
    assert pixels(tool.run({"prompt": "a cat"})).shape == (32, 32, 3)
    tool.check()


def test_a_call_that_breaks_its_batch_fails_alone(saved):
    tool = DiffusionTool(saved(tiny.sd), steps=1, size=32, batch=4)
    encoder = tool._pipeline._pipeline.text_encoder
    poison = tool._pipeline._pipeline.tokenizer("a q").input_ids

    def refuse(module: Any, args: Any, kwargs: Any = None) -> None:
        ids = args[0][:, : len(poison)]
        if (ids == ids.new_tensor(poison)).all(1).any():
            raise RuntimeError("poison")

    with_poison = ["a cat", "a q", "a dog", "two boats"]
    hook = encoder.register_forward_pre_hook(refuse)
    results = tool.run_many(calls(with_poison))
    hook.remove()
    assert [isinstance(r, ToolResult) for r in results] == [True, False, True, True]
    assert "poison" in str(results[1]) and not isinstance(results[1], CallFailed)


def test_a_dead_accelerator_is_told_to_the_health_check(saved):
    tool = DiffusionTool(saved(tiny.sd), steps=1, size=32)
    tool.check()

    def die(*_: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    tool._pipeline._pipeline.unet.register_forward_pre_hook(die)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tool.run({"prompt": "a cat"})
    with pytest.raises(RuntimeError, match="this process cannot use it any more"):
        tool.check()


def test_what_the_config_does_not_say_is_the_pipelines_own(saved):
    tool = DiffusionTool(saved(tiny.sd), size=32)
    said = tool.run({"prompt": "a cat"}).provenance
    assert (said["steps"], said["guidance"]) == (50, 7.5)


def test_parameters_that_a_config_opens_are_in_the_spec_and_checked(saved):
    tool = DiffusionTool(saved(tiny.sd), parameters=["size", "steps", "guidance", "seed"], steps=1)
    assert tool.spec.params == {"prompt": str, "size": str, "steps": int, "guidance": str, "seed": int}
    assert DiffusionTool.spec.params == {"prompt": str} and "1024x768" in tool.spec.when
    good = {"prompt": "a cat", "size": "70 x 64", "steps": 1, "guidance": "1", "seed": 3}
    assert pixels(tool.run(good)).shape == (64, 64, 3)
    bad = [("size", "huge"), ("size", "64x9999"), ("steps", 0), ("steps", 10**6), ("guidance", "much")]
    for name, value in [*bad, ("guidance", "nan"), ("guidance", "-1"), ("seed", -1)]:
        with pytest.raises(CallFailed, match=name):
            tool.run(good | {name: value})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"parameters": ["strength"]}, "no parameter 'strength' can be opened"),
        ({"extra": {"num_inference_steps": 3}}, "extra may not hold 'num_inference_steps'"),
        ({"extra": {"guidanse": 3}}, "it may hold .*negative_prompt"),
        ({"batch": 0}, "batch of the diffusion tool must be at least 1"),
        ({"size": "64x"}, "size of the diffusion tool must be"),
    ],
)
def test_options_that_make_no_sense_are_refused(saved, options, reason):
    with pytest.raises(ValueError, match=reason):
        DiffusionTool(saved(tiny.sd), **options)


def test_the_pipelines_own_arguments_pass_through(saved):
    plain = DiffusionTool(saved(tiny.sd), steps=1, size=32, batch=2)
    blurred = DiffusionTool(saved(tiny.sd), steps=1, size=32, batch=2, extra={"negative_prompt": "blurred"})
    assert plain.run({"prompt": "a cat"}).images != blurred.run({"prompt": "a cat"}).images
    assert len(blurred.run_many(calls(PROMPTS))) == 4


def test_an_editing_model_is_refused_for_drawing(saved):
    with pytest.raises(ValueError, match="use it as `edit-diffusion`"):
        DiffusionTool(saved(tiny.pix2pix))
