"""The config: one YAML file, validated whole before anything starts. An unknown key is an error that names the nearest.

vLLM's and DeepSpeed's own options pass through untouched under `rollout.engine` and `learner.deepspeed`; those that a
key of ours says are refused there.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from replay.storage import in_bucket, storage
from rewards import components
from rewards.components import Terms
from tools.base import imported

#: Of a URL: a bucket of S3 (also the ARN of an access point), or a local file.
_PLACE = re.compile(r"s3://[\w.:-]+(/[^@?]*)?$|file:///")


#: vLLM's `max_lora_rank` where none is given.
VLLM_LORA_RANK = 16

#: DeepSpeed's options that the learner sets itself, and the keys that say the same.
_LEARNERS_OWN = {
    "train_batch_size": "learner.prompts_per_step and samples_per_prompt",
    "train_micro_batch_size_per_gpu": "learner.tokens_per_microbatch",
    "gradient_accumulation_steps": "learner.tokens_per_microbatch",
    "managed_gradient_accumulation": "learner.tokens_per_microbatch",
    "gradient_clipping": "learner.grad_clip",
    "scheduler": "learner.schedule",
    "bf16.enabled": "learner.dtype",
    "zero_optimization.stage": "learner.zero_stage",
}


class ConfigError(ValueError):
    """The config is wrong; the message says which key, why, and what would be right."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Resources(_Section):
    """What one actor or replica asks Ray for."""

    cpus: float = Field(0.1, ge=0)
    gpus: float = Field(0.0, ge=0)
    resources: dict[str, float] = {}


class Prompts(_Section):
    """Prompt sets: `builtin:grammar`, or a .parquet or .jsonl file with the columns of docs/prompts.md."""

    train: str = "builtin:grammar"
    count: int = Field(4000, gt=0, description="training prompts taken")
    heldout: str | None = Field("builtin:grammar", description="never trained on; measured before and after")
    unseen: str | None = Field(None, description="a second set, reported beside")
    heldout_count: int = Field(200, gt=0)


class TinyPolicy(_Section):
    """Size of a Llama that is built and cold-started here."""

    vocab_size: int = 2048
    hidden_size: int = 256
    layers: int = 4
    heads: int = 4


class Policy(_Section):
    """The model that learns: `path` (folder or hub name), or a `tiny` one that is built on first use."""

    path: str | None = None
    tiny: TinyPolicy | None = None
    system_prompt: Literal["none", "protocol"] = "protocol"
    multimodal: bool = False


class Sft(_Section):
    """The cold start."""

    documents: int = Field(6000, gt=0)
    right: float = Field(0.5, ge=0, le=1, description="share of documents with the right plan of tools")
    epochs: float = Field(4.0, gt=0)
    documents_per_step: int = Field(32, gt=0)
    lr: float = Field(2e-3, gt=0)
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int = Field(2, gt=0)
    tokens_per_microbatch: int = Field(4096, gt=0)


class Rollout(Resources):
    """vLLM workers."""

    workers: int = Field(1, gt=0)
    concurrency: int = Field(64, gt=0, description="samples under way in one worker")
    max_tokens: int = Field(256, gt=0)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    threads: int = Field(1, gt=0)
    engine: dict[str, Any] = {}


class Autoscaling(_Section):
    """How many replicas a tool has: one for every `target` calls that run or wait, within bounds."""

    min: int = Field(1, gt=0)
    max: int = Field(gt=0)
    target: float = Field(4.0, gt=0)


class ToolPool(Resources):
    """One tool as a Serve deployment; `options` go to the tool's constructor."""

    use: str | None = Field(None, description="the implementation: built in, an entry point, module:class; or its name")
    options: dict[str, Any] = {}
    replicas: int = Field(1, gt=0)
    autoscaling: Autoscaling | None = Field(None, description="instead of `replicas`")
    concurrency: int = Field(8, gt=0, description="calls at once in a replica")
    queue: int = Field(256, gt=0, description="calls of one client that wait; beyond it the server refuses at once")
    timeout_s: float = Field(30.0, gt=0, description="seconds that a call may take, each time it is tried")

    @property
    def most(self) -> int:
        """Replicas that there may be."""
        return self.autoscaling.max if self.autoscaling else self.replicas


class JudgePool(Resources):
    """One judge as a Serve deployment: `judge` is `module:class`."""

    judge: str
    replicas: int = Field(1, gt=0)
    concurrency: int = Field(8, gt=0)
    timeout_s: float = Field(60.0, gt=0)
    options: dict[str, Any] = {}


class Judges(_Section):
    text: JudgePool = JudgePool(judge="rewards.judges.rubric:RubricTextJudge")
    image: JudgePool = JudgePool(judge="rewards.judges.rubric:RubricImageJudge")


class Term(_Section):
    """One term of a reward: docs/rewards.md."""

    weight: float
    gates: dict[str, float] = Field({}, description="component -> floor; 0 closes the term where the component is 0")
    range: tuple[float, float] = Field((0.0, 1.0), description="values of the component that count as 0 and as 1")


class Reward(_Section):
    kind: Literal["default", "published"] = "default"
    terms: dict[str, Term] | None = Field(None, description="component -> term, instead of those of `kind`")
    shuffled: bool = Field(False, description="control: rewards are dealt to other prompts' documents")


class Train(_Section):
    """Which part of the loop runs, for work on one part without the other."""

    only: Literal["rollout", "learn"] | None = Field(
        None, description="rollout: fill the store, for `learner.steps` steps; learn: train on `store`, without engines"
    )
    store: str | None = Field(None, description="a saved store to begin with; it is copied, and stays as it is")


class ReplayStore(Resources):
    """The replay store: actors of one shard each, and what is kept of groups that have ended."""

    cpus: float = Field(0.01, ge=0)
    shards: int = Field(1, gt=0)
    max_bytes: int | None = Field(None, gt=0)
    max_age_s: float | None = Field(None, gt=0)


class Workers(Resources):
    """Scorers, and what renderers share with them."""

    workers: int = Field(1, gt=0)
    concurrency: int = Field(16, gt=0)


class Render(Workers):
    """Renderers."""

    document_s: float = Field(300.0, gt=0, description="seconds that all calls of a document may take")


class ServedPolicy(_Section):
    """A policy behind the service."""

    model: str = Field(description="its folder, also s3://...")
    weight: float = Field(1.0, ge=0, description="share of the questions that name no policy")


class Serving(Resources):
    """The HTTP service; `cpus` and the like are the gateway's."""

    policies: dict[str, ServedPolicy] = Field({}, description="by name; without any, what this run trained")
    replicas: int = Field(1, gt=0, description="agents of each policy")
    autoscaling: Autoscaling | None = Field(None, description="instead of `replicas`")
    requests_per_minute: int = Field(120, gt=0, description="of each API key")
    documents_at_once: int = Field(32, gt=0, description="of each API key")
    body_mib: float = Field(32.0, gt=0)
    deadline_s: float = Field(600.0, gt=0, description="seconds that a document may take")
    folder: str | None = Field(None, description="documents, pictures and the audit log; by default in the run folder")
    keep_days: float = Field(30.0, gt=0)
    learn: bool = Field(False, description="keep what users allow to be trained on, for `llmi replay gather`")


class Kl(_Section):
    """The cost of leaving the reference, which is the policy that the run starts from."""

    coef: float = Field(0.0, ge=0, description="0: there is no reference")
    estimator: str = "k3"
    into: Literal["loss", "reward"] = "loss"
    unbiased: bool = Field(
        False, description="in the loss: weighed by the ratio, so that the gradient of k1 and k3 is the KL's"
    )


class Overlong(_Section):
    """The cost of an answer that nears `rollout.max_tokens`, or is cut off there."""

    buffer: int = Field(0, ge=0, description="last tokens over which the reward falls by `penalty`; 0: it does not")
    penalty: float = Field(1.0, ge=0)
    masked: bool = Field(False, description="answers that were cut off do not count in the loss")


class Lora(_Section):
    """An adapter that is trained instead of the weights; the names are PEFT's."""

    r: int = Field(16, gt=0)
    lora_alpha: int = Field(32, gt=0)
    target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False


class Learner(Resources):
    """DeepSpeed ranks and the recipe."""

    ranks: int = Field(1, gt=0)
    threads: int = Field(1, gt=0)
    steps: int = Field(gt=0)
    prompts_per_step: int = Field(gt=0)
    samples_per_prompt: int = Field(gt=1)
    updates_per_step: int = Field(1, gt=0, description="minibatches that a step's groups are dealt into")
    passes: int = Field(1, gt=0, description="times that a step goes through its groups")
    tokens_per_microbatch: int = Field(4096, gt=0)
    max_staleness: int = Field(1, ge=0)
    loss: str = "grpo"
    loss_options: dict[str, float] = {}
    aggregation: str | None = Field(None, description="by default the one that the loss was published with")
    advantage: str = "grpo"
    credit_calls: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="advantage that a call's score adds to its tag's tokens; 0: none",
    )
    correction: dict[str, dict[str, float]] = Field(
        {"truncate_tokens": {}, "mask_sequences": {}}, description="of samples by another policy; name: options"
    )
    kl: Kl = Kl()
    entropy_bonus: float = Field(0.0, ge=0)
    dynamic_sampling: bool = Field(False, description="groups whose rewards are all equal are replaced by others")
    overlong: Overlong = Overlong()
    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    grad_clip: float = Field(1.0, gt=0)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    zero_stage: Literal[1, 2, 3] = 2
    gradient_checkpointing: bool = Field(False, description="make activations again in the backward pass")
    sequence_parallel: int = Field(1, gt=0, description="ranks that share each sequence (Ulysses)")
    lora: Lora | None = None
    deepspeed: dict[str, Any] = {}
    checkpoint_every: int = Field(20, gt=0)
    keep: int = Field(2, gt=0, description="newest checkpoints that are kept; the best one is kept besides")


class Config(_Section):
    """A run."""

    name: str
    run_dir: str = Field("runs", description="where run folders lie: a folder, or s3://BUCKET/PATH")
    pool: str | None = Field(None, description="attach to the running tool and judge servers of this name")
    seed: int = 0
    stall_s: float = Field(1800.0, gt=0, description="seconds without an optimiser step after which a run gives up")
    train: Train = Train()
    prompts: Prompts = Prompts()
    policy: Policy
    sft: Sft | None = None
    rollout: Rollout = Rollout()
    weights: Literal["host", "nccl", "ipc"] = Field(
        "host", description="how new weights reach the engines: host memory works everywhere; nccl and ipc need GPUs"
    )
    tools: dict[str, ToolPool] = {n: ToolPool() for n in ("search", "diffusion", "code", "edit")}
    judges: Judges = Judges()
    reward: Reward = Reward()
    store: ReplayStore = ReplayStore()
    render: Render = Render()
    score: Workers = Workers()
    serve: Serving = Serving()
    learner: Learner

    @property
    def folder(self) -> str:
        """The run folder: `s3://...`, or absolute, as `ray job submit` throws the working directory away."""
        if in_bucket(self.run_dir):
            return f"{self.run_dir.rstrip('/')}/{self.name}"
        return str((Path(self.run_dir.removeprefix("file://")) / self.name).expanduser().absolute())

    def dump(self) -> str:
        """The resolved config as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, also in a bucket, and apply `key.sub=value` overrides (values are YAML).

    Raises:
        ConfigError: the file, a key or a value is wrong.
    """
    try:
        raw = yaml.safe_load(_text(str(path)))
    except FileNotFoundError:
        raise ConfigError(f"no config file {path}; examples/ holds some") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold keys and values, it holds {type(raw).__name__}")
    for override in overrides:
        _apply(raw, override)
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in _explain(error))) from None
    _check(config, path)
    return config


def _text(path: str) -> str:
    if not in_bucket(path):
        return Path(path).read_text()
    folder, _, name = path.rpartition("/")
    return storage(folder, read_only=True).map(name).to_pybytes().decode()


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r} must read key=value")
    *parents, last = key.split(".")
    for parent in parents:
        raw = raw.setdefault(parent, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"override {override!r}: {parent!r} holds a value, not keys")
    raw[last] = yaml.safe_load(value)


def _check(config: Config, path: str | Path) -> None:
    """What one field cannot see by itself."""
    if (config.policy.path is None) == (config.policy.tiny is None):
        raise ConfigError(f"{path}: policy needs one of `path` (a model) and `tiny` (one to build)")
    places = {"run_dir": config.run_dir, "train.store": config.train.store, "policy.path": config.policy.path}
    for key, url in places.items():
        if url and "://" in url and not _PLACE.match(url):  # which is not printed: it may hold a secret
            raise ConfigError(
                f"{path}: {key} must be a path or s3://BUCKET/PATH; credentials come from AWS's chain, not from here"
            )
    if config.train.only == "learn" and config.train.store is None:
        raise ConfigError(f"{path}: train.only=learn needs a saved store in train.store")
    if config.policy.tiny and config.sft is None:
        raise ConfigError(f"{path}: a tiny policy knows nothing yet: add an `sft` section")
    if config.weights != "host" and not (config.learner.gpus and config.rollout.gpus):
        raise ConfigError(
            f"{path}: weights: {config.weights} needs learner.gpus and rollout.gpus; `host` needs neither"
        )
    if config.learner.schedule != "constant" and config.learner.warmup_steps >= config.learner.steps:
        raise ConfigError(f"{path}: learner.warmup_steps must be below learner.steps, or the schedule constant")
    if config.learner.ranks % config.learner.sequence_parallel:
        raise ConfigError(f"{path}: learner.ranks must be a multiple of learner.sequence_parallel")
    if config.learner.prompts_per_step % config.learner.updates_per_step:
        raise ConfigError(f"{path}: learner.prompts_per_step must be a multiple of learner.updates_per_step")
    problems = (_judge_error, _reward_error, _sharing_error, _adapter_error, _recipe_error, _deepspeed_error)
    if wrong := next(filter(None, (problem(config) for problem in problems)), ""):
        raise ConfigError(f"{path}: {wrong}")


def reward_terms(config: Config) -> Terms | None:
    """The config's own terms."""
    terms = config.reward.terms
    return None if terms is None else {name: components.Term(**term.model_dump()) for name, term in terms.items()}


def scores_calls(config: Config) -> bool:
    """Whether anything reads the scores of single calls."""
    terms = config.reward.terms or {}
    return config.learner.credit_calls > 0 or any("process" in (name, *t.gates) for name, t in terms.items())


def shares_gpu(config: Config) -> bool:
    """Whether each engine goes to the GPU of a learner rank."""
    meant = config.weights == "ipc" or takes_turns(config)
    return meant and config.learner.gpus > 0 and config.train.only is None


def takes_turns(config: Config) -> bool:
    """Whether the engines sleep while the learner works."""
    return bool(config.rollout.engine.get("enable_sleep_mode"))


def _judge_error(config: Config) -> str:
    for name, pool in config.judges:
        try:
            imported(pool.judge)
        except LookupError as error:
            return f"judges.{name}.judge: {error}"
    return ""


def _reward_error(config: Config) -> str:
    terms = reward_terms(config)
    try:
        if terms is not None:
            components.check(terms)
    except ValueError as error:
        return f"reward.terms: {error}"
    if config.reward.shuffled and config.learner.credit_calls:
        return "reward.shuffled deals rewards alone: a control has learner.credit_calls 0"
    return ""


def _sharing_error(config: Config) -> str:
    c, gpus = config.learner, config.learner.gpus + config.rollout.gpus
    for key, used in (
        ("weights: ipc", config.weights == "ipc"),
        ("rollout.engine.enable_sleep_mode", takes_turns(config)),
    ):
        if used and (gpus > 1 or bool(c.gpus) != bool(config.rollout.gpus)):
            return (
                f"{key} needs learner and engine on one GPU, so learner.gpus and rollout.gpus are shares that add up "
                f"to 1 at most, not {c.gpus:g} and {config.rollout.gpus:g}"
            )
    if takes_turns(config) and c.max_staleness:
        return (
            f"rollout.engine.enable_sleep_mode: engines that sleep while the learner works have nothing to write "
            f"meanwhile, so learner.max_staleness must be 0, not {c.max_staleness}"
        )
    if takes_turns(config) and config.weights == "nccl":
        return "weights: nccl is for GPUs apart; where learner and engine take turns on one, use ipc or host"
    if shares_gpu(config) and config.rollout.workers > c.ranks:
        return (
            f"each engine shares the GPU of a learner rank, so rollout.workers must be at most learner.ranks, {c.ranks}"
        )
    return ""


def _adapter_error(config: Config) -> str:
    """An adapter reaches the engines alone, and not merged into all weights, if they have vLLM's `enable_lora`."""
    lora, engine = config.learner.lora, config.rollout.engine
    if not engine.get("enable_lora"):
        return ""
    if lora is None:
        return "rollout.engine.enable_lora needs learner.lora, the adapter to serve"
    if config.weights != "host":
        return f"weights: {config.weights} cannot send adapters; use host, or leave out rollout.engine.enable_lora"
    if engine.get("max_lora_rank", VLLM_LORA_RANK) < lora.r:
        return f"rollout.engine.max_lora_rank must be at least learner.lora.r, {lora.r}"
    return ""


def _recipe_error(config: Config) -> str:
    from learners.advantages import ADVANTAGES, BY_TOKEN
    from learners.losses import LOSSES
    from learners.objective import make_objective  # imports torch: seconds that `llmi --help` need not take

    recipe, sampler, kl = config.learner, config.rollout, config.learner.kl
    try:
        make_objective(recipe.loss, recipe.loss_options, recipe.aggregation, recipe.correction, kl.estimator, 1.0)
    except ValueError as error:
        return f"learner: {error}"
    if kl.unbiased and kl.into == "reward":
        return "learner.kl.unbiased is for a KL in the loss; a KL in the reward has no gradient"
    if recipe.advantage not in ADVANTAGES:
        return f"learner: there is no advantage '{recipe.advantage}'; there are: {', '.join(ADVANTAGES)}"
    if LOSSES[recipe.loss].of_sequence:
        refused = f"learner.loss: {recipe.loss} would spread the credit of single tokens over the whole answer"
        if recipe.credit_calls:
            return f"{refused}: set learner.credit_calls to 0, or take another loss"
        if recipe.advantage in BY_TOKEN and kl.coef and kl.into == "reward":
            return f"{refused}: set learner.kl.into to loss, or take another advantage or loss"
    if recipe.overlong.buffer >= sampler.max_tokens:
        return "learner.overlong.buffer must be below rollout.max_tokens, at which an answer is cut off"
    mode = sampler.engine.get("logprobs_mode", "processed_logprobs")
    if mode != "processed_logprobs":
        return (
            f"rollout.engine.logprobs_mode must be processed_logprobs, not {mode}: the learner corrects with the "
            "log-probs of what was sampled from"
        )
    return ""


def _deepspeed_error(config: Config) -> str:
    for key, ours in _LEARNERS_OWN.items():
        section, _, option = key.rpartition(".")
        given = config.learner.deepspeed.get(section) if section else config.learner.deepspeed
        if isinstance(given, dict) and option in given:
            return f"learner.deepspeed: {key} is the learner's own; set {ours} instead"
    zero = config.learner.deepspeed.get("zero_optimization") or {}
    optimizer, weights = (zero.get(what) or {} for what in ("offload_optimizer", "offload_param"))
    for what, asked in (("offload_optimizer", optimizer), ("offload_param", weights)):
        if asked.get("device") == "nvme" and not (config.learner.zero_stage == 3 and asked.get("nvme_path")):
            return f"learner.deepspeed: {what} to nvme needs nvme_path, a folder on the nodes' disks, and zero_stage 3"
    if weights.get("device") == "nvme" and optimizer.get("device") != "nvme":
        return (
            "learner.deepspeed: DeepSpeed resumes weights on nvme (offload_param) only with offload_optimizer there too"
        )
    return ""


def _explain(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        keys = [str(p) for p in problem["loc"]]
        where = ".".join(keys)
        if problem["type"] == "extra_forbidden":
            known = _fields(keys[:-1])
            near = difflib.get_close_matches(keys[-1], known, 1, 0.4)
            yield f"unknown key {where!r}" + (
                f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(known))}"
            )
        else:
            given = f", not {problem['input']!r}" if problem["type"] != "missing" else ""
            yield f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}{given}"


def _fields(keys: Sequence[str]) -> list[str]:
    """Names of the fields of the section at `keys`; keys of a mapping (a tool's name) are stepped over."""
    section: type[BaseModel] = Config
    for key in keys:
        if key in section.model_fields:
            section = next(iter(_models(section.model_fields[key].annotation)), section)
    return list(section.model_fields)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for a in getattr(annotation, "__args__", ()) for m in _models(a)]
