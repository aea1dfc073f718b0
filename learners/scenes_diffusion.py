"""Train the small text-to-image model of the `diffusion` tool: `python -m learners.scenes_diffusion OUT`.

A latent diffusion model in the shape of Stable Diffusion, small enough for one CPU core: an AutoencoderTiny maps
64 x 64 pixels to 8 x 8 x 8 latents, a UNet with about a million parameters removes noise from them (v-prediction,
Salimans and Ho 2022, on a cosine schedule rescaled to zero terminal SNR, Lin et al. 2023), and a one-layer CLIP text
encoder reads the words. The tokenizer keeps only the words that the scenes know, wherever they stand, so any wording
of a scene is the same few tokens. The result is an ordinary StableDiffusionPipeline folder in fp16.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from random import Random

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # diffusers imports DeepSpeed, which else looks for accelerators

import numpy as np
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from corpus.scenes import CENTRES, COLOURS, GROUNDS, PLACES, SHAPES, describe, draw, look
from tools.diffusion import DiffusionTool
from tools.pipeline_files import silence

WORDS = (*SHAPES, *COLOURS, *PLACES, *GROUNDS)
MAX_TOKENS = 12
LATENT_CHANNELS = 8
_START, _END = "<|startoftext|>", "<|endoftext|>"

#: Other words for the same things; the tokenizer reads them as the word of the vocabulary.
SYNONYMS = {
    "circle": ("ball", "disc", "disk", "round"),
    "square": ("box",),
    "house": ("home", "hut", "cottage"),
    "tree": ("fir", "pine"),
    "boat": ("sailboat", "ship"),
    "red": ("crimson", "scarlet"),
    "purple": ("violet",),
    "middle": ("centre", "center", "centred", "centered", "central"),
    "top": ("upper",),
    "bottom": ("lower",),
    "meadow": ("grass", "grassy", "field"),
    "sea": ("ocean", "water"),
    "desert": ("sand", "sandy", "dune", "dunes"),
    "night": ("midnight", "starry", "nighttime"),
    "snow": ("snowy", "winter", "snowfield"),
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the scenes' words; everything else in a prompt is dropped."""
    vocab = {word: i for i, word in enumerate((_START, _END, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=_END))
    plurals = [normalizers.Replace(Regex(rf"\b{w}(s|es|'s)\b"), w) for w in SHAPES]
    others = [normalizers.Replace(Regex(rf"\b({'|'.join(s)})\b"), word) for word, s in SYNONYMS.items()]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *others, *plurals])
    known = Regex(rf"\b({'|'.join(WORDS)})\b")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(known, behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A {_END}", special_tokens=[(_START, vocab[_START]), (_END, vocab[_END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_START,
        eos_token=_END,
        unk_token=_END,
        pad_token=_END,
        model_max_length=MAX_TOKENS,
    )


def build_pipeline() -> StableDiffusionPipeline:
    """The untrained pipeline, in float32."""
    tokenizer = build_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderTiny(
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        num_encoder_blocks=(0, 0, 1, 2),
        num_decoder_blocks=(3, 3, 2, 0),
        latent_channels=LATENT_CHANNELS,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=64,
    )
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=True,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def paint(count: int, rng: Random) -> tuple[Tensor, Tensor]:
    """Draw scenes.

    Returns:
        Pictures (count, 3, 64, 64) in uint8 and their four words (count, 4) as indices into WORDS, int64.
    """
    pictures, words = [], []
    for _ in range(count):
        shape, colour, place, ground = (rng.choice(kind) for kind in (SHAPES, COLOURS, PLACES, GROUNDS))
        pictures.append(np.asarray(draw(shape, colour, place, ground, rng)))
        words.append([WORDS.index(word) for word in (shape, colour, place, ground)])
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), torch.tensor(words)


def mosaics(pictures: Tensor, words: Tensor, rng: Random) -> Tensor:
    """Pictures (count, 3, 64, 64) of four objects each, cut out of `pictures`: an autoencoder learns more from them."""
    tiles = []
    for picture, place in zip(pictures, words[:, 2].tolist(), strict=True):
        x, y = (min(max(round(64 * c) - 16 + rng.randint(-7, 7), 0), 32) for c in CENTRES[WORDS[place]])
        tiles.append(picture[:, y : y + 32, x : x + 32])
    cut = torch.stack(tiles)
    top, low = (torch.cat([cut, cut[torch.randperm(len(cut))]], 3)[torch.randperm(len(cut))] for _ in range(2))
    return torch.cat([top, low], 2)


def _rate(share: float, peak: float) -> float:
    """Linear warm-up over 3 % of the time, then a half cosine down to nothing."""
    return peak * min(share / 0.03, 0.5 + 0.5 * math.cos(math.pi * share))


def _fit(name: str, parameters: list[Tensor], seconds: float, peak: float, loss_of: Callable[[], Tensor]) -> float:
    """Step on `loss_of()` until `seconds` have passed; the parameters end as the moving average of their values.

    Returns:
        The last losses, averaged.
    """
    optimiser = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=1e-3)
    average = [p.detach().clone() for p in parameters]
    start, said, step, recent = time.thread_time(), 0.0, 0, 0.0
    while (passed := time.thread_time() - start) < seconds or step == 0:
        optimiser.param_groups[0]["lr"] = _rate(min(passed / seconds, 1.0), peak)
        optimiser.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        step += 1
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(0.999, step / (10 + step)))
        recent += (loss.item() - recent) * max(0.01, 1 / step)
        if passed - said > 30:
            said = passed
            print(f"{name}: {passed:.0f} of {seconds:.0f} s, {step} steps, loss {recent:.4f}", flush=True)
    for p, mean in zip(parameters, average, strict=True):
        p.data.copy_(mean)
    return recent


def train_autoencoder(vae: AutoencoderTiny, pictures: Tensor, seconds: float, batch: int = 12) -> float:
    """Fit the autoencoder; its latents end with mean 0 and deviation 1 in every channel.

    The latents are normalised by the statistics of the batch while training, and a little noise on them teaches the
    decoder to forgive the UNet's errors. At the end the statistics move into the encoder's last convolution.

    Returns:
        The last training losses, averaged (mean absolute error of pixels in 0..1, weighted).
    """
    vae.to(memory_format=torch.channels_last).train()
    half = torch.cpu.get_capabilities().get("avx512_bf16", False)  # bfloat16 is slower where it is emulated

    def loss_of() -> Tensor:
        x = pictures[torch.randint(len(pictures), (batch,))].to(memory_format=torch.channels_last).float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            latents = vae.encoder(x).float()
            mean, std = latents.mean((0, 2, 3), keepdim=True), latents.std((0, 2, 3), keepdim=True)
            latents = (latents - mean) / (std + 1e-4)
            decoded = vae.decoder(latents + 0.08 * torch.randn_like(latents)).float()
        # What stands out from its surroundings counts more than the wide, smooth grounds.
        around = F.interpolate(F.avg_pool2d(x, 32), scale_factor=32, mode="bilinear")
        contrast = (x - around).abs().amax(1, keepdim=True)
        error = (decoded - x) / 2
        return ((1 + 3 * contrast) * (error.abs() + error.square())).mean()

    loss = _fit("autoencoder", list(vae.parameters()), seconds, 3e-3, loss_of)
    _settle(vae, pictures[:512])
    return loss


@torch.no_grad()
def _settle(vae: AutoencoderTiny, pictures: Tensor) -> None:
    vae.eval()
    latents = vae.encoder(pictures.float() / 127.5 - 1)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    last = vae.encoder.layers[-1]
    last.weight /= std[:, None, None, None]
    last.bias.copy_((last.bias - mean) / std)


def prompts(words: Tensor) -> Tensor:
    """Token ids (batch, MAX_TOKENS) of random wordings: words in any order, some left out, sometimes all."""
    batch = len(words)
    keep = torch.rand(batch, 4) < torch.tensor([0.97, 0.97, 0.85, 0.8])
    keep &= torch.rand(batch, 1) > 0.08
    order = (torch.rand(batch, 4) + 10 * ~keep).argsort(1)
    ids = torch.where(keep, words + 2, 1).gather(1, order)
    return torch.cat([torch.zeros(batch, 1, dtype=torch.long), ids, torch.ones(batch, MAX_TOKENS - 5).long()], 1)


def train_unet(
    pipeline: StableDiffusionPipeline, latents: Tensor, words: Tensor, seconds: float, batch: int = 32
) -> float:
    """Fit UNet and text encoder together; they end with the moving average of their weights.

    Args:
        latents: (count, LATENT_CHANNELS, 8, 8).
        words: (count, 4), see `paint`.

    Returns:
        The last training losses, averaged (mean squared error of v).
    """
    unet, encoder = pipeline.unet.train(), pipeline.text_encoder.train()
    alphas = pipeline.scheduler.alphas_cumprod

    def loss_of() -> Tensor:
        pick = torch.randint(len(latents), (batch,))
        clean, noise, t = latents[pick], torch.randn(batch, *latents.shape[1:]), torch.randint(len(alphas), (batch,))
        a, s = alphas[t].sqrt()[:, None, None, None], (1 - alphas[t]).sqrt()[:, None, None, None]
        read = encoder(prompts(words[pick])).last_hidden_state
        return F.mse_loss(unet(a * clean + s * noise, t, read).sample, a * noise - s * clean)

    loss = _fit("unet", [*unet.parameters(), *encoder.parameters()], seconds, 2e-3, loss_of)
    unet.eval()
    encoder.eval()
    return loss


@torch.no_grad()
def encode(vae: AutoencoderTiny, pictures: Tensor) -> Tensor:
    """Latents (count, LATENT_CHANNELS, 8, 8) of uint8 pictures (count, 3, 64, 64)."""
    return torch.cat([vae.encoder(part.float() / 127.5 - 1) for part in pictures.split(64)]).contiguous()


def measure(draws: Callable[[str], Image.Image], count: int, seed: int = 1) -> dict[str, float]:
    """Share of pictures of `count` random wordings that show the shape, the colour, the place and the ground asked."""
    rng, kinds = Random(seed), {"shape": SHAPES, "colour": COLOURS, "place": PLACES, "ground": GROUNDS}
    right = dict.fromkeys(kinds, 0)
    for _ in range(count):
        scene = {kind: rng.choice(words) for kind, words in kinds.items()}
        seen = look(draws(describe(**scene, rng=rng, full=True)))
        for kind, word in scene.items():
            right[kind] += getattr(seen, kind) == word
    return {kind: hits / count for kind, hits in right.items()}


def train(out: Path, minutes: float, scenes: int, seed: int = 0) -> None:
    """Paint, fit the autoencoder (a third of the time), fit the UNet (the rest), save in fp16.

    Args:
        minutes: computing time of one thread; what other programs take from it does not count.
        scenes: pictures to draw.
    """
    silence()
    torch.manual_seed(seed)
    end, rng = time.thread_time() + minutes * 60, Random(seed)
    pipeline = build_pipeline()
    pictures, words = paint(scenes, rng)
    train_autoencoder(
        pipeline.vae, torch.cat([pictures, mosaics(pictures, words, rng)]), (end - time.thread_time()) / 3
    )
    latents = encode(pipeline.vae, pictures)
    train_unet(pipeline, latents, words, end - time.thread_time())
    pipeline.to(dtype=torch.float16).save_pretrained(out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the small text-to-image pipeline of drawn scenes.")
    parser.add_argument("out", type=Path, help="folder that the pipeline is written to")
    parser.add_argument("--minutes", type=float, default=45.0, help="computing time, without waiting")
    parser.add_argument("--scenes", type=int, default=12_000, help="pictures to draw")
    parser.add_argument("--prompts", type=int, default=200, help="prompts to measure the result with")
    args = parser.parse_args()
    if args.minutes <= 0 or args.scenes < 1 or args.prompts < 1:
        parser.error("--minutes, --scenes and --prompts must be positive")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"{args.out} is a file: name a folder")
    train(args.out, args.minutes, args.scenes)
    tool = DiffusionTool(str(args.out))

    def draws(prompt: str) -> Image.Image:
        return Image.open(BytesIO(tool.run({"prompt": prompt}, ()).images[0].data))

    print({kind: round(share, 3) for kind, share in measure(draws, args.prompts).items()})


if __name__ == "__main__":
    main()
