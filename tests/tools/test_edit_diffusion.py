"""Editing and image-to-image pipelines, tiny and random, through the tool's config path."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from replay.record import Blob
from tests.tools import tiny_pipelines as tiny
from tools.base import CallFailed, ToolResult, load
from tools.edit_diffusion import EditDiffusionTool


def blob(size: tuple[int, int], seed: int = 0, mode: str = "RGB") -> Blob:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise, mode).save(buffer, "PNG")
    return Blob(buffer.getvalue())


PICTURES = [blob((64, 64), seed) for seed in range(3)]
PROMPTS = ["make it red", "a long wish: turn the sky into a sea of gold", "x"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folders: dict[Any, str] = {}

    def folder(build: Any) -> str:
        if build not in folders:
            folders[build] = tiny.save(build, tmp_path_factory.mktemp(build.__name__))
        return folders[build]

    return folder


@pytest.fixture
def small_qwen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Qwen-Image-Edit family scales its input to a megapixel, which takes half a minute here; now to 64 x 64."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

    scaled = edit.calculate_dimensions
    monkeypatch.setattr(edit, "calculate_dimensions", lambda area, ratio: scaled(64 * 64, ratio))
    monkeypatch.setattr(plus, "VAE_IMAGE_SIZE", 64 * 64)
    monkeypatch.setattr(plus, "CONDITION_IMAGE_SIZE", 64 * 64)


def pixels(result: ToolResult | Exception) -> np.ndarray:
    assert isinstance(result, ToolResult), result
    return np.asarray(Image.open(io.BytesIO(result.images[0].data))).astype(int)


#: The published class of a family, or the image-to-image one that its text-to-image model becomes.
FAMILIES = [
    pytest.param(tiny.pix2pix, "StableDiffusionInstructPix2PixPipeline", {}, id="pix2pix"),
    pytest.param(tiny.sd, "StableDiffusionImg2ImgPipeline", {"strength": 0.9}, id="sd-img2img"),
    pytest.param(tiny.sd3, "StableDiffusion3Img2ImgPipeline", {"strength": 0.9}, id="sd3-img2img"),
    pytest.param(tiny.flux, "FluxImg2ImgPipeline", {"strength": 0.9}, id="flux-img2img"),
    pytest.param(tiny.qwen, "QwenImageImg2ImgPipeline", {"strength": 0.9}, id="qwen-img2img"),
    pytest.param(tiny.kontext, "FluxKontextPipeline", {"_auto_resize": False}, id="kontext"),
    pytest.param(tiny.flux2, "Flux2KleinPipeline", {}, id="flux2"),
    pytest.param(tiny.qwen_edit, "QwenImageEditPipeline", {}, id="qwen-edit"),
    pytest.param(tiny.qwen_edit_plus, "QwenImageEditPlusPipeline", {}, id="qwen-edit-plus"),
]


@pytest.mark.usefixtures("small_qwen")
@pytest.mark.parametrize(("family", "name", "extra"), FAMILIES)
def test_a_picture_is_edited_the_same_alone_and_in_a_batch_up_to_the_noise_of_floats(saved, family, name, extra):
    tool = EditDiffusionTool(saved(family), steps=2, batch=3, extra=extra)
    assert tool._pipeline.name == name
    calls = [({"prompt": p, "img_index": i}, [PICTURES[i]]) for i, p in enumerate(PROMPTS)]
    alone = [pixels(tool.run(*call)) for call in calls]
    batched = [pixels(result) for result in tool.run_many(calls)]
    assert all(a.shape == (64, 64, 3) and np.abs(a - b).max() <= 1 for a, b in zip(alone, batched, strict=True))
    assert np.abs(alone[0] - pixels(tool.run(calls[0][0], [PICTURES[1]]))).max() > 10


@pytest.mark.usefixtures("small_qwen")
@pytest.mark.parametrize("family", [tiny.qwen_edit_plus, tiny.flux2])
def test_several_reference_pictures_make_one_and_provenance_names_them_all(saved, family):
    tool = EditDiffusionTool(saved(family), steps=1, references=3)
    assert tool.spec.params["img_index"] == list[int] and tool.spec.image_params == ("img_index",)
    results = tool.run_many([({"prompt": "x", "img_index": [0, 1]}, PICTURES[:n]) for n in (1, 2, 3)])
    assert [pixels(r).shape for r in results] == [(64, 64, 3)] * 3
    assert [r.provenance["of"] for r in results if isinstance(r, ToolResult)][1] == [p.sha256 for p in PICTURES[:2]]
    assert np.abs(pixels(results[0]) - pixels(results[1])).max() > 1
    with pytest.raises(CallFailed, match="names 4 pictures: at most 3"):
        tool.run({"prompt": "x", "img_index": [0, 0, 0, 0]}, [PICTURES[0]] * 4)


@pytest.mark.parametrize(
    ("given", "size", "made"),
    [
        ((64, 64), None, (64, 64)),
        ((130, 70), None, (128, 64)),  # on the grid that every pipeline takes
        ((10, 20), None, (64, 128)),  # too small for some pipelines
        ((400, 100), 64, (256, 64)),  # one number is an area, but no side is below the least
        ((64, 128), 96, (64, 128)),
        ((64, 64), "96x64", (96, 64)),
    ],
)
def test_a_result_has_the_proportions_of_its_picture(saved, given, size, made):
    tool = EditDiffusionTool(saved(tiny.pix2pix), steps=1, size=size)
    assert pixels(tool.run({"prompt": "x", "img_index": 0}, [blob(given)])).shape == (made[1], made[0], 3)


def test_a_large_photo_is_shrunk_to_a_megapixel_before_it_is_edited(saved):
    tool = EditDiffusionTool(saved(tiny.flux2))
    drawing = tool._drawing({"prompt": "x", "img_index": 0}, [blob((3000, 2000))])
    assert drawing.size == drawing.images[0].size == (1248, 832)


def test_provenance_says_how_to_make_the_picture_again(saved):
    tool = EditDiffusionTool(saved(tiny.pix2pix), steps=2, guidance=3.0, parameters=["seed"])
    asked = {"prompt": "make it red", "img_index": 0, "seed": 7}
    first = tool.run(asked, [PICTURES[0]])
    model = saved(tiny.pix2pix)
    said = {"maker": model, "model": model, "steps": 2, "guidance": 3.0, "seed": 7, "of": [PICTURES[0].sha256]}
    assert first.provenance == said and first == tool.run(asked, [PICTURES[0]])
    assert first.images != tool.run(asked | {"seed": 8}, [PICTURES[0]]).images


def test_transparent_pictures_are_edited_on_white(saved):
    tool = EditDiffusionTool(saved(tiny.pix2pix), steps=1)
    assert pixels(tool.run({"prompt": "x", "img_index": 0}, [blob((64, 64), mode="RGBA")])).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        ([], "no picture to edit"),
        ([Blob(b"no picture")], "cannot be read"),
        ([Blob(PICTURES[0].data[:2000])], "cannot be read"),
        ([blob((900, 10))], "900 x 10"),
        (PICTURES[:2], "at most 1"),
    ],
)
def test_pictures_that_cannot_be_edited_are_the_calls_fault_and_cost_no_other_call(saved, images, reason):
    tool = EditDiffusionTool(saved(tiny.pix2pix), steps=1, batch=2)
    bad, good = ({"prompt": "x", "img_index": 0}, images), ({"prompt": "x", "img_index": 0}, [PICTURES[0]])
    failed, made = tool.run_many([bad, good])
    assert isinstance(failed, CallFailed) and reason in str(failed) and pixels(made).shape == (64, 64, 3)


def test_several_pictures_need_a_pipeline_that_takes_them(saved):
    with pytest.raises(ValueError, match="takes one picture: references above 1 need QwenImageEditPlus"):
        EditDiffusionTool(saved(tiny.pix2pix), references=2)


def test_a_model_that_edits_nothing_is_refused(tmp_path):
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(8, block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1, **blocks)
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="DDIMPipeline edits no picture"):
        EditDiffusionTool(str(tmp_path))


def test_the_tool_is_found_by_its_name():
    assert load("edit-diffusion") is EditDiffusionTool
