"""The diffusion tool: follows words, repeats itself, takes any pipeline, and fails in one clear sentence."""

import io
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

from corpus.scenes import look
from learners.scenes_diffusion import MAX_TOKENS, build_pipeline, build_tokenizer, main, measure
from tools.base import CallFailed, load
from tools.diffusion import DiffusionTool
from tools.drawing import picture_seed
from tools.pipeline_files import SCENES

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / SCENES
PROMPT = "a red star at the top over a sea"


@pytest.fixture(scope="module")
def tool() -> DiffusionTool:
    return DiffusionTool()


def picture(tool: DiffusionTool, prompt: str) -> Image.Image:
    return Image.open(io.BytesIO(tool.run({"prompt": prompt}, ()).images[0].data))


def save_stable_diffusion(folder: Path, **changes: object) -> Path:
    """A random Stable Diffusion in the common shape: AutoencoderKL, byte-level CLIP tokenizer."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(vocab)}, merges=[], model_max_length=16)
    unet = UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
    )
    vae = AutoencoderKL(
        block_out_channels=[4, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=2,
    )
    config = CLIPTextConfig(
        vocab_size=len(vocab), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    parts = {
        "vae": vae,
        "unet": unet,
        "tokenizer": tokenizer,
        "text_encoder": CLIPTextModel(config),
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
    }
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder)
    return folder


def test_the_shipped_weights_are_small_and_name_no_folder_of_a_machine():
    files = [f for f in WEIGHTS.rglob("*") if f.is_file()]
    assert files and sum(f.stat().st_size for f in files) <= 4_000_000
    texts = [f.read_text() for f in files if f.suffix == ".json"]
    assert all(json.loads(t) is not None and "/root" not in t and "/home" not in t for t in texts)


def test_pictures_show_what_the_words_say(tool):
    right = measure(lambda prompt: picture(tool, prompt), 40)
    assert right["colour"] >= 0.8 and right["place"] >= 0.8 and right["shape"] >= 0.7, right


def test_words_in_another_order_and_other_words_are_understood(tool):
    seen = look(picture(tool, "Over the OCEAN, near the upper edge: scarlet stars, in watercolour, for my friend Ann"))
    assert (seen.colour, seen.place, seen.ground) == ("red", "top", "sea")


def test_the_same_call_gives_the_same_picture_and_another_seed_another_one(tool):
    first, again = tool.run({"prompt": PROMPT}, ()), DiffusionTool().run({"prompt": PROMPT}, ())
    other = DiffusionTool(seed=1).run({"prompt": PROMPT}, ())
    assert first.images == again.images and first.provenance == again.provenance
    assert first.images != other.images


def test_calls_from_several_threads_give_the_pictures_of_calls_in_turn(tool):
    prompts = [PROMPT, "a blue boat on the left", "a white house at the bottom in the snow"]
    alone = [tool.run({"prompt": p}, ()).images for p in prompts]
    together: dict[str, object] = {}
    workers = [
        threading.Thread(target=lambda p=p: together.__setitem__(p, tool.run({"prompt": p}, ()).images))
        for p in prompts
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [together[p] for p in prompts] == alone


def test_provenance_is_ready_for_json_and_says_how_to_draw_the_picture_again(tool):
    said = json.loads(json.dumps(tool.run({"prompt": PROMPT}, ()).provenance))
    assert said["model"] == SCENES and said["seed"] == picture_seed(0, PROMPT) and said["steps"] > 0
    assert "guidance" in said and "truncated" not in said


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_the_callers_fault(tool, prompt):
    with pytest.raises(CallFailed, match="empty"):
        tool.run({"prompt": prompt}, ())


@pytest.mark.parametrize("prompt", ["dragon", "\ud800 red", "\x00", "日本の富士山 🌋", "red " * 5000])
def test_odd_prompts_still_give_a_picture(tool, prompt):
    assert picture(tool, prompt).size == (64, 64)


def test_a_prompt_beyond_the_limit_is_cut_and_provenance_says_so(tool):
    assert tool.run({"prompt": "red star " * MAX_TOKENS}, ()).provenance["truncated"] is True
    assert "truncated" not in tool.run({"prompt": "one two three " * 500}, ()).provenance


def test_the_tokenizer_keeps_only_the_words_of_scenes():
    tokenizer = build_tokenizer()
    words = tokenizer.convert_ids_to_tokens(tokenizer("Three hearts, redwood; a sandy-RED ship's centre").input_ids)
    assert words[1:-1] == ["heart", "desert", "red", "boat", "middle"]


def test_any_other_pipeline_can_be_named(tmp_path):
    folder = save_stable_diffusion(tmp_path / "sd")
    tool = DiffusionTool(str(folder), steps=2, guidance=3.0, size=32)
    assert picture(tool, "a cat").size == (32, 32)
    assert tool.run({"prompt": "a cat " * 30}, ()).provenance["truncated"] is True


def test_a_missing_model_says_how_to_make_it(tmp_path):
    for model in (str(tmp_path / "none"), str(tmp_path), "tools/weights/nothing", "nothing"):
        with pytest.raises(FileNotFoundError, match=r"python -m learners\.scenes_diffusion"):
            DiffusionTool(model)


def test_a_broken_model_is_one_clear_error(tmp_path):
    folder = save_stable_diffusion(tmp_path / "sd")
    for weights in folder.glob("unet/*.safetensors"):
        weights.unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        DiffusionTool(str(folder))


def test_a_model_that_is_not_text_to_image_is_refused(tmp_path):
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="DDIMPipeline draws no picture from a prompt"):
        DiffusionTool(str(tmp_path))


@pytest.mark.parametrize("options", [{"steps": 0}, {"threads": 0}, {"size": 0}, {"size": 65}, {"size": -8}])
def test_an_option_out_of_range_is_refused_before_anything_is_loaded(options):
    with pytest.raises(ValueError, match="of the diffusion tool must be"):
        DiffusionTool("nothing", **options)


@pytest.mark.slow
def test_the_training_script_writes_a_pipeline_that_loads(tmp_path):
    command = [sys.executable, "-m", "learners.scenes_diffusion", str(tmp_path)]
    options = ["--minutes", "0.02", "--scenes", "8", "--prompts", "2"]
    ran = subprocess.run(command + options, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0 and "colour" in ran.stdout.splitlines()[-1], ran.stderr
    assert picture(DiffusionTool(str(tmp_path), steps=1), PROMPT).size == (64, 64)


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--scenes", "0"], ["--prompts", "-1"]])
def test_the_training_script_refuses_numbers_that_make_no_sense(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.setattr("sys.argv", ["scenes_diffusion", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "must be positive" in capsys.readouterr().err


def test_the_training_script_does_not_write_over_a_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["scenes_diffusion", str(tmp_path / "file")])
    with pytest.raises(SystemExit):
        main()
    assert "name a folder" in capsys.readouterr().err


def test_the_untrained_pipeline_fits_the_size_of_the_shipped_one():
    parts = build_pipeline().components.values()
    weights = sum(p.numel() for part in parts if hasattr(part, "parameters") for p in part.parameters())
    assert 2 * weights < 3_900_000


def test_the_tool_is_found_by_its_name():
    assert load("diffusion") is DiffusionTool
