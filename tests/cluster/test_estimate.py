"""Memory estimates against published figures, DeepSpeed's own estimate, and what DeepSpeed and autograd really keep."""

from __future__ import annotations

import gc
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants as hub
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config, Qwen3MoeConfig

from cluster.config import Policy, TinyPolicy
from cluster.estimate import (
    GIB,
    Shape,
    activations,
    buffers,
    engine_memory,
    kv_token,
    layer_activations,
    logprobs,
    lora_params,
    model_states,
)
from cluster.policy_shape import NoShape, shape_of
from learners.engine import Learner
from learners.head import PIECE
from learners.packing import Sample
from learners.sft import build_policy

#: `total_size` of model.safetensors.index.json on the hub, in bfloat16, over 2; for SmolLM2 what the hub counts.
PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "Qwen/Qwen3-4B-Instruct-2507": 8_044_936_192 // 2,
    "Qwen/Qwen3-30B-A3B-Instruct-2507": 61_064_245_248 // 2,
    "Qwen/Qwen2.5-VL-7B-Instruct": 16_584_333_312 // 2,
    "Qwen/Qwen2.5-VL-32B-Instruct": 66_905_436_672 // 2,
}
#: OPT-13B, of which the PagedAttention paper tells the cache.
OPT_13B = Shape(
    params=12_853_473_280, layers=40, hidden=5120, vocab=50272, heads=40, kv_heads=40, head_dim=128, intermediate=20480
)

COMMON = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
FAMILIES = {
    "llama": LlamaConfig(**COMMON),
    "qwen3": Qwen3Config(**COMMON),
    "qwen3_moe": Qwen3MoeConfig(**COMMON, num_experts=8, num_experts_per_tok=4, moe_intermediate_size=96),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_have_the_published_number_of_weights(name: str) -> None:
    assert shape_of(Policy(path=name)).params == PUBLISHED[name]


def test_a_built_policy_has_the_size_that_its_config_says(tmp_path: Path) -> None:
    tiny = TinyPolicy(vocab_size=300, hidden_size=128, layers=2, heads=2)
    build_policy(tmp_path, ["some words " * 50], **tiny.model_dump())
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    read, told = shape_of(Policy(path=str(tmp_path))), shape_of(Policy(tiny=tiny))
    assert read.params == model.num_parameters()
    assert told.params - read.params == (told.vocab - read.vocab) * 128  # a small corpus yields fewer merges


def test_a_model_in_the_cache_of_the_hub_needs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    home = tmp_path / "models--some--model"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    FAMILIES["llama"].save_pretrained(home / "snapshots" / "abc")
    assert shape_of(Policy(path="some/model")).layers == 3
    with pytest.raises(NoShape, match=r"policy\.path 'other/model' is no folder, and the hub gives no config\.json"):
        shape_of(Policy(path="other/model"))


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(NoShape, match=r"holds no config\.json"):
        shape_of(Policy(path=str(tmp_path)))


def test_a_model_that_writes_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(NoShape, match="vit"):
        shape_of(Policy(path=str(tmp_path)))


@pytest.mark.parametrize(("stage", "bytes_"), [(1, 31.4e9), (3, 1.9e9)])
def test_states_of_7_5_billion_weights_on_64_ranks_are_those_of_figure_1_of_the_zero_paper(
    stage: int, bytes_: float
) -> None:
    s = model_states(7_500_000_000, 64, stage)
    assert s.weights + s.gradients + s.optimizer == pytest.approx(bytes_, rel=0.02)


@pytest.mark.parametrize("ranks", [1, 8])
def test_the_optimizer_step_takes_what_deepspeed_estimates_for_stage_2(ranks: int) -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    _, estimated = estimate_zero2_model_states_mem_needs(10**9, num_gpus_per_node=ranks, cpu_offload=False)
    s = model_states(10**9, ranks, 2)
    assert s.weights + s.optimizer + s.step == pytest.approx(estimated, rel=1e-6)


@pytest.mark.parametrize(("weights_on", "on_host"), [("gpu", 16), ("cpu", 18)])
def test_what_is_offloaded_lands_where_deepspeed_says(weights_on: str, on_host: int) -> None:
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    estimated, *_ = estimate_zero3_model_states_mem_needs(
        10**9, 0, num_gpus_per_node=8, cpu_offload_params=weights_on == "cpu", additional_buffer_factor=1
    )
    s = model_states(10**9, 8, 3, optimizer_on="cpu", weights_on=weights_on)
    assert s.host * 8 == estimated == on_host * 10**9
    assert (s.optimizer, s.step, s.gradients) == (0, 0, 0)
    assert s.weights == (0 if weights_on == "cpu" else 10**9 // 4)
    assert model_states(10**9, 8, 3).held == 10**9 // 4 and model_states(10**9, 8, 2).held == 0
    on_disk = model_states(10**9, 8, 3, optimizer_on="nvme", weights_on="nvme", max_in_cpu=10**8)
    assert on_disk.disk == 2 * 10**9 + 2 * 25 * 10**6 and on_disk.host == 2 * 10**9 // 8 + 2 * 10**8


def test_an_adapter_has_the_gradients_and_the_optimizer_of_its_own_numbers_alone() -> None:
    shape = shape_of(Policy(path="Qwen/Qwen3-4B-Instruct-2507"))
    trained = lora_params(shape, 16)
    assert trained == 16 * 36 * (2560 + 4096 + 2 * (2560 + 1024) + 4096 + 2560 + 3 * (2560 + 9728))
    s = model_states(shape.params, 8, 2, trained=trained)
    assert s.weights == 2 * shape.params
    assert s.optimizer == pytest.approx(12 * trained / 8, rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_keeps_the_states_that_are_estimated(tmp_path: Path, stage: int, dtype: str) -> None:
    build_policy(tmp_path, ["some words " * 50], vocab_size=300, hidden_size=256, layers=2, heads=2)
    params = shape_of(Policy(path=str(tmp_path))).params
    seen: dict[str, int] = {}
    with closing(Learner(tmp_path, lr=1e-3, zero_stage=stage, dtype=dtype, threads=1)) as learner:
        adam = learner._engine.optimizer.optimizer
        take = adam.step

        def spy(*args: object, **kwargs: object) -> object:
            seen["step"] = sum(p.grad.nbytes for g in adam.param_groups for p in g["params"] if p.grad is not None)
            return take(*args, **kwargs)

        adam.step = spy
        answers = [(np.array([5, 6]), np.array([7, 8]), 1.0), (np.array([5]), np.array([9]), -1.0)]
        learner.step([Sample(p, a, np.full(len(a), -1.0), np.ones(len(a)), advantage=g) for p, a, g in answers])
        held = {id(t): t for state in adam.state.values() for t in state.values() if torch.is_tensor(t)}
        adam_bytes = sum(t.nbytes for t in held.values()) + sum(p.nbytes for p in adam.state)
        tensors = [getattr(p, "ds_tensor", p) for p in learner.model.parameters()]
        weights = sum(t.nbytes for t in tensors)
    width = {"float32": 4, "bfloat16": 2}[dtype]
    s = model_states(params, 1, stage, width)
    assert weights == pytest.approx(s.weights, rel=0.02)
    assert adam_bytes == pytest.approx(s.optimizer, rel=0.02)
    assert seen["step"] == pytest.approx(s.step - width * params, rel=0.02)


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return getattr(torch, request.param)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_autograd_keeps_no_more_activations_than_estimated_and_not_much_less(
    tmp_path: Path, family: str, dtype: torch.dtype, checkpointing: bool
) -> None:
    FAMILIES[family].save_pretrained(tmp_path)
    shape = shape_of(Policy(path=str(tmp_path)))
    model = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=dtype, attn_implementation="sdpa").train()
    tokens, width = 256, dtype.itemsize
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    kept = kept_for_backward(model, tokens)
    told = activations(shape, tokens, width, checkpointing=checkpointing)
    if checkpointing:  # what is made again was not kept by the forward pass
        told -= tokens * layer_activations(shape, width) + width * tokens**2
    assert 0.6 * told < kept < 1.02 * told


def kept_for_backward(model: PreTrainedModel, tokens: int) -> int:
    """Bytes that autograd holds after a forward pass over a row of two sequences, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            held[place] = tensor
        return tensor

    positions = torch.cat([torch.arange(tokens // 2), torch.arange(tokens // 2)])[None]
    gc.collect()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hidden = model.base_model(
            input_ids=torch.ones_like(positions), position_ids=positions, attention_mask=None, use_cache=False
        )
    assert hidden.last_hidden_state.requires_grad
    return sum(t.untyped_storage().nbytes() for t in held.values())


def test_a_sequence_that_ranks_share_takes_each_of_them_its_part() -> None:
    alone, shared = (activations(OPT_13B, 1024, sequence_parallel=n) for n in (1, 4))
    mask = (1 + 2 * OPT_13B.layers) * 1024**2
    assert alone - mask == 4 * (shared - mask)


def test_logits_are_counted_up_to_those_that_exist_at_a_time() -> None:
    head = 4 * OPT_13B.vocab * OPT_13B.hidden
    assert logprobs(OPT_13B, 10, PIECE) == 14 * 10 * OPT_13B.vocab + head
    assert logprobs(OPT_13B, 10**6, PIECE) == 14 * PIECE + head
    assert logprobs(OPT_13B, 10**6, PIECE, head_learns=False) == 14 * PIECE


def test_buffers_are_no_larger_than_the_model() -> None:
    sizes = {"reduce": 500, "live": 1000, "prefetch": 50}
    assert buffers(10_000, 2, 2, **sizes) == 2 * 500
    assert buffers(10_000, 3, 2, **sizes) == 2 * (500 + 1050)
    assert buffers(100, 3, 4, **sizes) == 4 * 200


def test_a_token_of_opt_13b_takes_the_800_kb_of_the_paged_attention_paper() -> None:
    assert kv_token(OPT_13B) == 800 * 1024


@pytest.mark.parametrize(("parallel", "share"), [(2, 1 / 2), (4, 1 / 4), (8, 1 / 4)])
def test_heads_are_split_over_accelerators_until_each_has_one(parallel: int, share: float) -> None:
    shape = shape_of(Policy(path="Qwen/Qwen3-30B-A3B-Instruct-2507"))
    assert kv_token(shape, parallel) == share * kv_token(shape)


def test_the_cache_gets_what_weights_and_work_leave() -> None:
    def of(room: float, parallel: int = 1) -> tuple[int, int]:
        m = engine_memory(
            OPT_13B,
            tensor_parallel=parallel,
            width=2,
            kv_width=2,
            batched_tokens=8192,
            sequences=256,
            room=room,
            context=2 * GIB,
        )
        return m.kv_cache, m.tokens

    assert of(20 * GIB)[0] < 0
    assert of(20 * GIB)[1] == 0
    assert of(40 * GIB)[0] - of(39 * GIB)[0] == GIB
    assert of(40 * GIB, 2)[1] > 2 * of(40 * GIB)[1]
