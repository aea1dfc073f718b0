"""The config is validated whole, and says what is wrong in one line."""

import re
from pathlib import Path

import pytest
import yaml

from cluster.config import Config, ConfigError, load, scores_calls, takes_turns

LEARNER = "steps: 1, prompts_per_step: 4, samples_per_prompt: 2, lr: 1.0e-6"
GOOD = f"""
name: x
policy: {{path: some/model}}
learner: {{{LEARNER}}}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "c.yaml").write_text(GOOD)
    return tmp_path / "c.yaml"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner.promts_per_step=3", "unknown key 'learner.promts_per_step'; did you mean 'prompts_per_step'?"),
        ("lerner.steps=3", "unknown key 'lerner'; did you mean 'learner'?"),
        ("tools.code.timout_s=3", "did you mean 'timeout_s'?"),
        ("judges.text.jugde=x", "did you mean 'judge'?"),
        ("learner.steps=many", "learner.steps: input should be a valid integer"),
        ("learner.steps=0", "learner.steps: input should be greater than 0"),
        ("learner.samples_per_prompt=1", "learner.samples_per_prompt: input should be greater than 1"),
        ("reward.kind=great", "reward.kind: input should be 'default' or 'published', not 'great'"),
        ("learner.updates_per_step=3", "must be a multiple of learner.updates_per_step"),
        (
            "learner={steps: 2, warmup_steps: 2, schedule: linear, prompts_per_step: 4, samples_per_prompt: 2, lr: 1}",
            "below",
        ),
        ("weights=ncl", "weights: input should be 'host', 'nccl' or 'ipc', not 'ncl'"),
        ("weights=nccl", "weights: nccl needs learner.gpus and rollout.gpus"),
        ("weights=ipc", "weights: ipc needs learner.gpus and rollout.gpus"),
        ("policy.path=null", "policy needs one of `path`"),
        ("policy={tiny: {}}", "add an `sft` section"),
        ("learner.steps", "must read key=value"),
        ("learner.loss=ppo", "learner: there is no loss 'ppo'; there are: grpo, gspo, cispo, rloo, sft"),
        ("learner.loss_options.clip=1", "loss 'grpo' has no option 'clip'; it has: clip_low, clip_high, dual_clip"),
        ("learner.advantage=gae", "there is no advantage 'gae'; there are: grpo, dr_grpo"),
        ("learner.aggregation=mean", "there is no aggregation 'mean'"),
        ("learner.correction={tis: {}}", "there is no correction 'tis'; there are: truncate_tokens"),
        (
            "learner.correction.truncate_tokens={cap: -1}",
            "'cap' of correction 'truncate_tokens' must be a number of at",
        ),
        (
            "learner.loss_options={dual_clip: 0.5}",
            "learner: option 'dual_clip' of loss 'grpo' must be a number above 1",
        ),
        (
            f"learner={{{LEARNER}, loss: rloo, credit_calls: 0.1}}",
            "set learner.credit_calls to 0, or take another loss",
        ),
        (
            f"learner={{{LEARNER}, loss: rloo, advantage: reinforce_pp, kl: {{coef: 0.1, into: reward}}}}",
            "set learner.kl.into to loss, or take another advantage or loss",
        ),
        (
            "learner.deepspeed={gradient_accumulation_steps: 2}",
            "learner.deepspeed: gradient_accumulation_steps is the learner's own; set learner.tokens_per_microbatch",
        ),
        ("learner.deepspeed={zero_optimization: {stage: 3}}", "zero_optimization.stage is the learner's own"),
        ("learner.deepspeed={bf16: {enabled: true}}", "bf16.enabled is the learner's own; set learner.dtype"),
        ("learner.kl.estimator=k4", "there is no KL estimator 'k4'; there are: k1, k2, k3"),
        ("learner.kl={into: reward, unbiased: true}", "learner.kl.unbiased is for a KL in the loss"),
        ("learner.overlong.buffer=256", "learner.overlong.buffer must be below rollout.max_tokens"),
        ("rollout.engine.logprobs_mode=raw_logits", "logprobs_mode must be processed_logprobs, not raw_logits"),
        ("name.x=1", "'name' holds a value, not keys"),
    ],
)
def test_a_wrong_key_or_value_is_named(path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(path, [override])
    assert message in str(error.value)


def test_a_missing_key_is_named(path: Path) -> None:
    path.write_text(GOOD.replace("lr: 1.0e-6", ""))
    with pytest.raises(ConfigError, match=r"learner\.lr: field required"):
        load(path)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "", "x: 'y"])
def test_a_file_that_holds_no_keys_is_refused(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config file"):
        load(tmp_path / "none.yaml")


def test_overrides_win_and_engine_options_pass_through(path: Path) -> None:
    config = load(
        path, ["learner.steps=7", "rollout.engine.max_model_len=512", "learner.deepspeed={zero_optimization: {}}"]
    )
    assert config.learner.steps == 7
    assert config.rollout.engine == {"max_model_len": 512}
    assert config.learner.deepspeed == {"zero_optimization": {}}


def test_samples_of_another_policy_are_corrected_by_default(path: Path) -> None:
    assert load(path).learner.correction == {"truncate_tokens": {}, "mask_sequences": {}}
    assert load(path, ["learner.correction={}"]).learner.correction == {}


def recipes() -> list[str]:
    """The configs of docs/learning.md's table."""
    table = Path("docs/learning.md").read_text().split("## Published recipes")[1]
    return [line.split("`")[1] for line in table.splitlines() if line.startswith("| ") and "`{" in line]


@pytest.mark.parametrize("recipe", recipes())
def test_every_recipe_in_the_docs_is_valid(path: Path, recipe: str) -> None:
    load(path, ["rollout.max_tokens=20480", *(f"learner.{k}={v}" for k, v in yaml.safe_load(recipe).items())])


def test_an_adapter_has_pefts_names_and_ranks_that_share_sequences_must_come_out_even(path: Path) -> None:
    lora = load(path, ["learner.lora={r: 8}"]).learner.lora
    assert lora is not None and (lora.r, lora.lora_alpha, lora.target_modules) == (8, 32, "all-linear")
    with pytest.raises(ConfigError, match=r"learner\.lora\.alpha.*did you mean 'lora_alpha'"):
        load(path, ["learner.lora={r: 8, alpha: 16}"])
    served = ["learner.lora={r: 32}", "rollout.engine={enable_lora: true, max_lora_rank: 32}"]
    load(path, served)
    for change, wrong in (
        ("learner.lora=null", "needs learner.lora"),
        ("rollout.engine.max_lora_rank=16", "must be at least learner.lora.r, 32"),
    ):
        with pytest.raises(ConfigError, match=wrong):
            load(path, [*served, change])
    with pytest.raises(ConfigError, match=r"learner\.ranks must be a multiple of learner\.sequence_parallel"):
        load(path, ["learner.ranks=3", "learner.sequence_parallel=2"])


def test_cuda_ipc_is_for_a_learner_and_an_engine_that_share_a_gpu(path: Path) -> None:
    assert load(path, ["weights=ipc", "learner.gpus=0.5", "rollout.gpus=0.5"]).weights == "ipc"
    with pytest.raises(
        ConfigError, match=r"weights: ipc needs .* rollout\.gpus are shares that .* 1 at most, not 1 and 1"
    ):
        load(path, ["weights=ipc", "learner.gpus=1", "rollout.gpus=1"])


ONE_GPU = ["learner.gpus=0.6", "rollout.gpus=0.4"]
TURNS = ["rollout.engine.enable_sleep_mode=true", "learner.max_staleness=0"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [*TURNS, "learner.gpus=1", "rollout.gpus=1"],
            r"rollout\.engine\.enable_sleep_mode needs learner and engine on",
        ),
        ([*TURNS, "learner.max_staleness=2"], r"have nothing to write meanwhile, so learner\.max_staleness must be 0"),
        ([*TURNS, "learner.gpus=1"], r"enable_sleep_mode needs .* are shares that add up to 1 at most, not 1 and 0"),
        (
            [*ONE_GPU, *TURNS, "weights=nccl"],
            r"weights: nccl is for GPUs apart; where .* take turns on one, use ipc or",
        ),
        ([*ONE_GPU, *TURNS, "rollout.workers=2"], r"so rollout\.workers must be at most learner\.ranks, 1"),
    ],
)
def test_a_learner_and_an_engine_that_share_a_gpu_can_take_turns(
    path: Path, overrides: list[str], message: str
) -> None:
    assert takes_turns(load(path, TURNS)), "without a GPU, for the tests"
    assert takes_turns(load(path, [*ONE_GPU, *TURNS, "weights=ipc"]))
    load(path, ["learner.gpus=0.5", "rollout.gpus=0.25", "rollout.workers=2"])  # which Ray may place anywhere
    with pytest.raises(ConfigError, match=message):
        load(path, overrides)


@pytest.mark.parametrize(
    ("stage", "optimizer", "weights", "message"),
    [
        (3, "{device: nvme}", "null", r"offload_optimizer to nvme needs nvme_path, .* and zero_stage 3"),
        (
            2,
            "{device: nvme, nvme_path: /disk}",
            "null",
            r"offload_optimizer to nvme needs nvme_path, .* and zero_stage 3",
        ),
        (3, "{device: nvme, nvme_path: /disk}", "{device: nvme}", r"offload_param to nvme needs nvme_path"),
        (
            3,
            "{device: cpu}",
            "{device: nvme, nvme_path: /disk}",
            r"resumes weights on nvme .* only with offload_optimizer",
        ),
    ],
)
def test_what_deepspeed_cannot_offload_to_nvme_is_refused(
    path: Path, stage: int, optimizer: str, weights: str, message: str
) -> None:
    def of(stage: int, optimizer: str, weights: str) -> Config:
        zero = f"{{offload_optimizer: {optimizer}, offload_param: {weights}}}"
        return load(path, [f"learner.zero_stage={stage}", f"learner.deepspeed={{zero_optimization: {zero}}}"])

    disk = "{device: nvme, nvme_path: /disk}"
    assert of(3, disk, disk) and of(3, disk, "null") and of(2, "null", "null")
    with pytest.raises(ConfigError, match=message):
        of(stage, optimizer, weights)


@pytest.mark.parametrize(
    "recipe",
    [
        "loss: gspo, credit_calls: 0.1",  # its gradient flows through single tokens
        "loss: gspo, advantage: reinforce_pp, kl: {coef: 0.1, into: reward}",
        "loss: rloo, advantage: rloo, kl: {coef: 0.1, into: reward}",  # summed over the sequence
        "loss: rloo, advantage: reinforce_pp, kl: {coef: 0.1}",  # the same for all tokens without a KL in the reward
    ],
)
def test_a_loss_is_refused_only_the_advantages_that_it_would_smear(path: Path, recipe: str) -> None:
    load(path, [f"learner={{{LEARNER}, {recipe}}}"])


def test_deepspeeds_own_options_are_untouched(path: Path) -> None:
    zero, bf16 = "{offload_optimizer: {device: cpu}}", "{bf16_optimizer_states: true}"
    own = f"{{optimizer: {{type: SGD}}, zero_optimization: {zero}, bf16: {bf16}}}"
    assert load(path, [f"learner.deepspeed={own}"]).learner.deepspeed == yaml.safe_load(own)


def test_the_resolved_config_reads_back_the_same(path: Path, tmp_path: Path) -> None:
    config = load(path)
    (tmp_path / "resolved.yaml").write_text(config.dump())
    assert load(tmp_path / "resolved.yaml") == config


def test_the_run_folder_is_absolute(path: Path) -> None:
    assert Path(load(path).folder).is_absolute()


@pytest.mark.parametrize("example", sorted(p.name for p in Path("examples").glob("*.yaml")))
def test_every_example_is_valid(example: str) -> None:
    assert isinstance(load(Path("examples") / example), Config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward.terms={ruel: {weight: 1}}", "unknown component 'ruel'; did you mean 'rule'"),
        ("reward.terms={rule: {weight: .nan}}", "component 'rule' has the weight nan"),
        ("reward.terms={rule: {weight: 1, gates: {beauty: 0}}}", "unknown gate of component 'rule': 'beauty'"),
        ("reward.terms={rule: {weight: 1, gate: {fit: 0}}}", "unknown key 'reward.terms.rule.gate'"),
        ("learner.credit_calls=.nan", "learner.credit_calls"),
        (
            "reward={kind: default, shuffled: true, terms: {r_llm: {weight: 1, gates: {images: 0}}}}",
            "is not from 0 to 1",
        ),
    ],
)
def test_a_reward_that_cannot_be_summed_is_refused(path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(path, [override])


def test_single_calls_are_scored_only_where_somebody_reads_it(path: Path) -> None:
    assert not scores_calls(load(path))
    assert scores_calls(load(path, ["learner.credit_calls=0.5"]))
    assert scores_calls(load(path, ["reward.terms={rule: {weight: 1, gates: {process: 0}}}"]))


def test_a_control_with_shuffled_rewards_credits_no_calls(path: Path) -> None:
    assert load(path, ["reward.shuffled=true"]).reward.shuffled
    with pytest.raises(ConfigError, match=r"a control has learner\.credit_calls 0"):
        load(path, ["reward.shuffled=true", "learner.credit_calls=0.1"])
