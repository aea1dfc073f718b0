"""TRL's GRPOTrainer in a process of its own: the other side of `llmi bench trl`. TRL comes with the `dev` extra."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from transformers import TrainerCallback

from cluster.config import Config
from cluster.word_craft import reward


@ray.remote
class TrlRival:
    """Trains with TRL as a run's config says, and measures any policy; `progress` answers meanwhile."""

    def __init__(self) -> None:
        self._progress = (0, 0)

    def progress(self) -> tuple[int, int]:
        """(units done, units in all) of what it is at."""
        return self._progress

    def train(self, config: Config, model: str, folder: str, questions: Sequence[str], steps: int) -> list[float]:
        """Train; returns when each step was done, in seconds of one clock.

        Args:
            config: its number of steps alone is not followed.
            model: folder of the policy to start from.
            folder: the new policy is in `checkpoint-STEPS` of it.
        """
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        watch = _Watch(lambda done: self._tell(done, steps))
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=_rewards,
            args=GRPOConfig(output_dir=folder, max_steps=steps, save_steps=steps, **_options(config)),
            train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": q}] for q in questions]}),
            callbacks=[watch],
        )
        trainer.train()
        return watch.ended

    def measure(self, model: str, questions: Sequence[str], config: Config) -> list[float]:
        """Rewards of a policy's answers to the questions, a step's samples at a time."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.manual_seed(config.seed)
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        policy = AutoModelForCausalLM.from_pretrained(model, dtype=config.learner.dtype).eval()
        sampling = {"do_sample": True, "temperature": config.rollout.temperature, "top_p": config.rollout.top_p}
        size, rewards = config.learner.prompts_per_step * config.learner.samples_per_prompt, list[float]()
        for start in range(0, len(questions), size):
            asked = questions[start : start + size]
            inputs = tokenizer.apply_chat_template(
                [[{"role": "user", "content": q}] for q in asked],
                add_generation_prompt=True,
                padding=True,
                return_tensors="pt",
                return_dict=True,
            )
            ids = policy.generate(**inputs, max_new_tokens=config.rollout.max_tokens, top_k=0, **sampling)
            texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            rewards += map(reward, asked, texts)
            self._tell(len(rewards), len(questions))
        return rewards

    def _tell(self, done: int, of: int) -> None:
        self._progress = (done, of)


class _Watch(TrainerCallback):
    """Notes when each step was done, the last one with its checkpoint, and tells how many are."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self.ended: list[float] = []
        self._tell = tell

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ended.append(time.monotonic())
        self._tell(len(self.ended))

    def on_save(self, *_: Any, **__: Any) -> None:
        self.ended[-1] = time.monotonic()


def _rewards(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    return [reward(p[-1]["content"], c[0]["content"]) for p, c in zip(prompts, completions, strict=True)]


def _options(config: Config) -> dict[str, Any]:
    """TRL's options for the recipe of a config."""
    c, sampler = config.learner, config.rollout
    return {
        "per_device_train_batch_size": c.prompts_per_step * c.samples_per_prompt,
        "num_generations": c.samples_per_prompt,
        "max_completion_length": sampler.max_tokens,
        "temperature": sampler.temperature,
        "top_p": sampler.top_p,
        "loss_type": "dapo",  # the mean over all tokens
        "epsilon": c.loss_options["clip_low"],
        "epsilon_high": c.loss_options["clip_high"],
        "scale_rewards": "group",
        "beta": c.kl.coef,
        "learning_rate": c.lr,
        "adam_beta1": c.betas[0],
        "adam_beta2": c.betas[1],
        "weight_decay": c.weight_decay,
        "lr_scheduler_type": "constant",
        "max_grad_norm": c.grad_clip,
        "gradient_checkpointing": c.gradient_checkpointing,
        "model_init_kwargs": {"dtype": "float32"},
        "bf16": c.dtype == "bfloat16",
        "use_cpu": True,
        "seed": config.seed,
        "save_strategy": "steps",
        "report_to": [],
        "disable_tqdm": True,
    }
