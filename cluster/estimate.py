"""Memory of a learner rank and of an engine, in bytes on one accelerator: pure functions of the policy's shape and the
sizes that a config asks for. `llmi train CONFIG --dry-run` prints them.

They are upper estimates of what the tensors take; tests hold them against published figures, against what DeepSpeed
keeps and against what autograd keeps. `CONTEXT` alone, and pictures inside a policy that sees, are not counted out.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30

#: CUDA, NCCL's buffers, CUDA graphs and the gaps of the allocator: a round number. On the CPU: libraries, no tensors.
CONTEXT = {"gpu": 2 * GIB, "cpu": GIB // 2}


@dataclass(frozen=True)
class Shape:
    """What of a causal language model decides how much memory it takes.

    Attributes:
        params: numbers in all weights, of a vision tower too; a tied output head counts once.
        layers, hidden, vocab: of the decoder.
        heads, kv_heads, head_dim: of its attention.
        intermediate: width of the gated MLP, or of one expert.
        experts: how many of them a token passes; 0 in a dense model.
        qk_norm: queries and keys are normalised, as in Qwen3.
        linear: inputs and outputs of all linear layers but the head, added up.
    """

    params: int
    layers: int
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    experts: int = 0
    qk_norm: bool = False
    linear: int = 0


@dataclass(frozen=True)
class States:
    """Bytes of a rank's model states. `step` is what the optimiser step needs while no gradient is being made, `held`
    what ZeRO-3 never gives back of the gradients'; `host` and `disk` are what is offloaded."""

    weights: int
    gradients: int
    optimizer: int
    step: int
    held: int
    host: int
    disk: int


@dataclass(frozen=True)
class LearnerMemory:
    """Bytes of one learner rank. Passes and optimiser step take turns, so that the larger of them counts."""

    states: States
    reference: int
    activations: int
    logprobs: int
    buffers: int
    context: int

    @property
    def kept(self) -> int:
        """While nothing is learnt."""
        s = self.states
        return s.weights + s.optimizer + s.held + self.reference + self.buffers + self.context

    @property
    def total(self) -> int:
        passes = self.states.gradients - self.states.held + self.activations + self.logprobs
        return self.kept + max(passes, self.states.step)


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of one accelerator of an engine; `tokens` is how many its KV cache holds, `kv_cache` may be negative."""

    weights: int
    working: int
    context: int
    kv_cache: int
    tokens: int

    @property
    def total(self) -> int:
        return self.weights + self.working + self.context + max(0, self.kv_cache)


def lora_params(shape: Shape, rank: int) -> int:
    """Numbers in an adapter of all linear layers but the head: rank x (inputs + outputs) each (arXiv 2106.09685)."""
    return rank * shape.linear


def model_states(
    params: int,
    ranks: int,
    stage: int,
    width: int = 2,
    *,
    trained: int | None = None,
    optimizer_on: str = "gpu",
    weights_on: str = "gpu",
    max_in_cpu: int = 0,
) -> States:
    """Weights, gradients and Adam's states under ZeRO (arXiv 1910.02054, section 5 and figure 1), K = 12.

    A weight takes `width` bytes, its gradient as many, Adam's float32 copy and two moments 12. Stage 1 splits the last
    over the ranks, stage 3 all of them. Where the learner differs from the paper: it reduces gradients once a step, so
    that stages 1 and 2 keep them whole until then. DeepSpeed's step turns a rank's part of the gradient into float32.

    Args:
        width: bytes of a number in the forward pass.
        trained: how many of the weights have a gradient, those of an adapter for instance; None for all.
        optimizer_on, weights_on: gpu, cpu or nvme (DeepSpeed's offload; weights with stage 3 only).
        max_in_cpu: of the rank's weights, so many stay in the node's memory before others go to NVMe.
    """
    trained = params if trained is None else trained
    split, part = stage == 3, -(-trained // ranks)
    weights = width * (-(-params // ranks) if split else params)
    gradients = width * (part if split else trained)
    adam, step = 12 * part, (width + 4) * part
    held = gradients if split else 0
    away = {"cpu": 0, "nvme": 0}
    if optimizer_on != "gpu":
        away[optimizer_on] += 16 * part
        away["cpu"] += held if optimizer_on == "nvme" else 0
        gradients = 0 if split else gradients
        adam = step = held = 0
    if weights_on != "gpu":
        stay = min(weights, width * max_in_cpu) if weights_on == "nvme" else weights
        away["cpu"] += stay
        away["nvme"] += weights - stay
        weights = 0
    return States(weights, gradients, adam, step, held, away["cpu"], away["nvme"])


def swap_buffers(part: int, width: int, sub_group: int, states: int, weights: int, weight: int) -> int:
    """Bytes of a rank's buffers in the node's memory that offload to NVMe goes through, filled or not.

    ZeRO-Infinity (arXiv 2104.07857, section 5.3): `buffer_count` buffers, `states` of `offload_optimizer` and `weights`
    of `offload_param`, 0 where that does not lie on NVMe.

    Args:
        part: numbers in the rank's part of the optimiser, which steps over `sub_group` of them at a time.
        width: bytes of a weight in the forward pass.
        weight: numbers in a buffer of weights, `offload_param.buffer_size`.
    """
    return 4 * states * min(part, sub_group) + width * weights * weight


def layer_activations(shape: Shape, width: int = 2) -> int:
    """Bytes a token that one decoder layer keeps for its backward pass.

    Counted as in Korthikanti et al. (arXiv 2205.05198, section 4), over again for what Transformers' Llama and Qwen
    layers keep: RMS norms work in float32; attention keeps queries, keys and values at full number of heads, and its
    output, but no scores; the gated MLP keeps four tensors of its width; each expert that a token passes, its input and
    its output too.
    """
    attention = shape.heads * shape.head_dim
    norm = 4 + 2 * width  # float32 input, normalised, scaled
    bytes_ = 2 * norm * shape.hidden + 5 * width * attention
    if shape.qk_norm:
        bytes_ += (4 + width) * (attention + shape.kv_heads * shape.head_dim)
    if shape.experts:
        return bytes_ + shape.experts * width * (4 * shape.intermediate + 2 * shape.hidden)
    return bytes_ + 4 * width * shape.intermediate


def activations(
    shape: Shape, tokens: int, width: int = 2, *, checkpointing: bool = False, sequence_parallel: int = 1
) -> int:
    """Bytes kept for the backward pass of a micro-batch; the output head is `logprobs`.

    A row of several sequences has a mask of tokens x tokens, which each layer keeps in the width of its numbers. With
    checkpointing, only the inputs of all layers are kept, and one layer at a time is made again (arXiv 1604.06174).
    Ulysses splits all but the mask over `sequence_parallel` ranks (arXiv 2309.14509).
    """
    mine = -(-tokens // sequence_parallel)
    layer = mine * layer_activations(shape, width) + width * tokens**2
    last = mine * (4 + 2 * width) * shape.hidden + tokens**2  # the last norm, and the mask that all layers share
    if checkpointing:
        return shape.layers * mine * shape.hidden * width + layer + last
    return shape.layers * layer + last


def logprobs(shape: Shape, tokens: int, piece: int, width: int = 2, *, head_learns: bool = True) -> int:
    """Bytes from hidden states to log-probs and back, of at most `piece` logits at a time (`learners.head.PIECE`).

    A logit takes `width` bytes, its log-probability in float32, and two temporaries of that size; the gradient of a
    head that learns is summed up in float32.
    """
    return (width + 12) * min(tokens * shape.vocab, piece) + 4 * shape.vocab * shape.hidden * head_learns


def buffers(params: int, stage: int, width: int, reduce: int, live: int, prefetch: int) -> int:
    """Bytes of DeepSpeed's communication buffers: gradients on their way, and with stage 3, the weights that are whole
    at a time (deepspeed.ai/docs/config-json: `reduce_bucket_size`, `stage3_max_live_parameters`,
    `stage3_prefetch_bucket_size`, all in numbers)."""
    whole = min(params, live + prefetch) if stage == 3 else 0
    return width * (min(params, reduce) + whole)


def kv_token(shape: Shape, tensor_parallel: int = 1, width: int = 2) -> int:
    """Bytes of one token in the KV cache of one accelerator: a key and a value, each layer and head.

    PagedAttention, arXiv 2309.06180, section 3. A head is never cut: beyond one each, accelerators hold copies.
    """
    return 2 * shape.layers * -(-shape.kv_heads // tensor_parallel) * shape.head_dim * width


def engine_memory(
    shape: Shape,
    *,
    tensor_parallel: int,
    width: int,
    kv_width: int,
    batched_tokens: int,
    sequences: int,
    room: float,
    context: int,
) -> EngineMemory:
    """Memory of one accelerator of a vLLM engine.

    Weights are split over `tensor_parallel` accelerators. vLLM runs the largest batch once, and gives what is left of
    `room` to the KV cache (`vllm/v1/worker/gpu_worker.py`, `determine_available_memory`).

    Args:
        batched_tokens: of one forward pass; `sequences` of them are sampled from, in float32.
        room: bytes that the engine may use, `gpu_memory_utilization` of the accelerator.
    """
    weights = -(-shape.params * width // tensor_parallel)
    layer = batched_tokens * width * (4 * shape.hidden + 3 * -(-_mlp(shape) // tensor_parallel))
    working = layer + 3 * 4 * sequences * shape.vocab
    kv_cache = int(room) - weights - working - context
    tokens = max(0, kv_cache) // kv_token(shape, tensor_parallel, kv_width)
    return EngineMemory(weights, working, context, kv_cache, tokens)


def _mlp(shape: Shape) -> int:
    return shape.intermediate * max(1, shape.experts)
