"""What a training step needs of a GPU's memory, counted before anything is loaded."""

import gc
from traceback import clear_frames

import torch
from transformers import PreTrainedConfig, Trainer, TrainingArguments

from helpers.profiles import GIB, Profile

# What one decoder layer keeps of a token until its backward pass, by (lean, compiled): how many
# vectors of the hidden size and of the feed-forward size in 16 bits, in 32 bits (which autocast
# makes), in 8 bits (dropout's masks), and of both key and value. Counted from the saved tensors;
# where it is compiled, from what the allocator's record shows alive at the peak. Lean and compiled:
# the LayerNorm's output, queries, attention's output, the layer's output; what comes before GELU;
# key, value and the turned key.
KEPT = {  # h16, ffn16, h32, ffn32, h8, ffn8, kv16, kv32
    (True, False): (7, 2, 0, 0, 3, 1, 1.5, 0),
    (True, True): (4, 1, 0, 0, 0, 0, 1.5, 0),
    (False, False): (7, 1, 1, 1, 3, 1, 0, 0),
    (False, True): (2, 2, 3, 0, 3, 0, 0, 1.5),
}
# What a layer needs for a moment above that, in hidden vectors of 16 bits a token: at its worst
# with kept activations, at its worst when it is computed again, and beside an unpacked weight.
MOMENT = {
    (True, False): (24, 45.6, 6),
    (True, True): (25, 38.2, 5),
    (False, False): (21, 47.6, 8),
    (False, True): (23, 29, 10),
}
VOCABULARY_CHUNK, TOKEN_CHUNK = 32768, 4096  # of TRL's loss, which never makes all logits at once
CUBLAS = 32 * 2**20  # what matrix products ask the allocator for, once
PAGED_FROM = 100_000  # numbers; bitsandbytes leaves the state of smaller tensors in the allocator


def plan_memory(
    profile: Profile, config: PreTrainedConfig, batch_size: int | None = None,
    length: int | None = None, rank: int = 32, checkpointing: bool | None = None,
    lean: bool = False, compiled: bool = False, packed: bool = False, every: int | None = None,
) -> dict[str, float]:  # fmt: skip
    """Predict the peak of a QLoRA step's memory by part, before anything is loaded.

    It counts what PyTorch's allocator gives out, and nothing else: not the CUDA context, not what
    the allocator holds in reserve, and not the paged optimizer's state, two numbers for each one
    trained, which lies in memory that CUDA moves between host and GPU. With activations kept,
    every layer's saved tensors wait for the backward pass; with checkpointing only its input does,
    and one layer at a time is computed again. A compiled layer of peft's own LoRA keeps two tensors
    more: bitsandbytes' products before attention and before GELU, which the compiler does not
    compute again (docs/memory.md).

    Args:
        profile: gives dtype, batch size, length and checkpointing where they are not given.
        config: a `FalconConfig` (multi-query).
        batch_size, length: rows and tokens of one micro-batch, padding included.
        rank: of the adapters, on all four linears of every layer.
        checkpointing: True computes activations again in the backward pass.
        lean, compiled: the mends of `helpers.speed`; without lean LoRA autocast is on. Compiled
            and checkpointed without lean LoRA was never measured.
        packed: counts the same; attention saves as much either way.
        every: with checkpointing, only the first of so many layers is computed again.

    Returns:
        Bytes by part: weights, embedding, adapters, gradients, optimizer, activations, logits,
        workspace (what a layer needs for a moment, as far as the logits' room does not hold it).
        Their sum is the peak.

    Source:
        Dettmers et al. (2023), QLoRA, section 3 for the 4.127 bits: https://arxiv.org/abs/2305.14314

    Example:
        >>> from helpers.profiles import A100
        >>> from transformers import FalconConfig
        >>> plan = plan_memory(A100, FalconConfig())    # Falcon-7B
        >>> round(plan["weights"] / GIB, 2), round(plan["adapters"] / 4)
        (3.18, 65273856)
    """
    h, ffn, layers = config.hidden_size, config.ffn_hidden_size, config.num_hidden_layers
    shapes = ((h, h + config.head_dim * 2), (h, h), (h, ffn), (ffn, h))
    size, held = profile.compute_dtype.itemsize, "paged" not in profile.optim
    tokens = (batch_size or profile.batch_size) * (length or profile.max_length)
    again = profile.gradient_checkpointing if checkpointing is None else checkpointing
    sides = [rank * n for shape in shapes for n in shape]
    chunk = min(tokens, TOKEN_CHUNK) * min(config.vocab_size, VOCABULARY_CHUNK)
    # three residuals, of 32 bits if autocast is on, and one gradient of 32 bits
    logits = chunk * size + tokens * h * (3 * (size if lean else 4) + 4)
    every = (every or profile.checkpoint_every) * again
    waiting, moment = _layers(config, tokens, size, rank, every, lean, compiled)
    return {
        "weights": layers * sum(a * b for a, b in shapes) * (4 + 8 / 64 + 32 / (64 * 256)) / 8,
        "embedding": (config.vocab_size + 2 * layers + 2) * h * size,
        **dict.fromkeys(("adapters", "gradients"), 4 * layers * sum(sides)),
        "optimizer": 8 * layers * sum(n for n in sides if held or n < PAGED_FROM),
        "activations": waiting,
        "logits": logits,
        "workspace": max(moment - logits, 0) + CUBLAS * profile.on_gpu,
    }


def _layers(
    config: PreTrainedConfig, tokens: int, size: int, rank: int, every: int, lean: bool,
    compiled: bool,
) -> tuple[float, float]:  # fmt: skip
    """Bytes of all layers that wait for the backward pass, and what it needs for a moment."""
    layers, redone = config.num_hidden_layers, -(-config.num_hidden_layers // every) if every else 0
    (kept, moment), (stays, other) = (
        _layer(config, tokens, size, rank, again, lean, compiled) for again in (False, True)
    )
    gone = (layers - 1) % (every or 1)  # kept layers above the last that is computed again
    moment = max(moment * (redone < layers), (other - gone * kept) * (redone > 0))
    return redone * stays + (layers - redone) * kept, moment


def _layer(
    config: PreTrainedConfig, tokens: int, size: int, rank: int, again: bool, lean: bool,
    compiled: bool,
) -> tuple[float, float]:  # fmt: skip
    """Bytes of one layer that wait for its backward pass, and what it needs for a moment."""
    h, ffn, kv = config.hidden_size, config.ffn_hidden_size, config.head_dim * 2
    h16, ffn16, h32, ffn32, h8, ffn8, kv16, kv32 = KEPT[lean, compiled]
    token = size * (h16 * h + ffn16 * ffn + kv16 * kv + 4 * rank) + h8 * h + ffn8 * ffn
    token += 4 * (h32 * h + ffn32 * ffn + kv32 * kv + config.num_attention_heads + 2)
    layer, hidden = tokens * token, tokens * h * size
    if not compiled:  # the adapters, cast to 16 bits, are kept as well
        layer += size * rank * (6 * h + 2 * ffn + kv)
    kept, redone, beside = (n * hidden for n in MOMENT[lean, compiled])
    weight = h * ffn * (size + 2 * 4 / 64)  # unpacked, and its scales in 32 bits, twice
    if not again:
        return layer, max(kept, beside + weight)
    products = tokens * size * (h + kv + ffn) * compiled
    stays = hidden * (1 if lean else 4 / size) + products * (not lean)
    return stays, max(redone, layer + beside + weight)


def memory_table(plan: dict[str, float]) -> str:
    """The plan as lines, the largest part first, and their sum.

    Args:
        plan: bytes by part, as `plan_memory` gives it.

    Example:
        >>> print(memory_table({"weights": 1.0 * GIB, "logits": 3.0 * GIB}))
        logits           3.000 GiB, the largest part
        weights          1.000 GiB
        together         4.000 GiB
    """
    parts = sorted(plan.items(), key=lambda part: -part[1])
    lines = [f"{name:12} {size / GIB:9.3f} GiB" for name, size in parts]
    lines[0] += ", the largest part"
    return "\n".join([*lines, f"{'together':12} {sum(plan.values()) / GIB:9.3f} GiB"])


def out_of_memory(plan: dict[str, float] | None, args: TrainingArguments) -> str:
    """The sentence for a GPU that was too small all the same: the largest part, and what to set.

    Args:
        plan: bytes by part; None leaves the part out.
        args: an `SFTConfig`, whose micro-batch did not fit.

    Example:
        >>> from types import SimpleNamespace as Some
        >>> out_of_memory(None, Some(per_device_train_batch_size=8, max_length=512))
        'Out of GPU memory: set BATCH_SIZE = 4 and run the page again from that cell.'
        >>> plan = {"activations": 9.0 * GIB, "weights": 3.0 * GIB}
        >>> out_of_memory(plan, Some(per_device_train_batch_size=1, max_length=512))[:75]
        "Out of GPU memory; the plan's largest part is activations, 9.0 of 12.0 GiB:"
    """
    part, rows = "", args.per_device_train_batch_size
    if plan:
        most = max(plan, key=lambda name: plan[name])
        part = f"; the plan's largest part is {most}, {plan[most] / GIB:.1f} of "
        part += f"{sum(plan.values()) / GIB:.1f} GiB"
    smaller = f"BATCH_SIZE = {rows // 2}" if rows > 1 else f"MAX_LENGTH = {args.max_length // 2}"
    return f"Out of GPU memory{part}: set {smaller} and run the page again from that cell."


def page_again(optimizer: torch.optim.Optimizer | None) -> int:
    """Put an optimizer's state back where CUDA pages it, after a resume.

    `load_state_dict` makes new tensors of it in the allocator, where nothing is paged: for
    Falcon-7B 0.49 GiB, which a T4 may lack. The numbers stay as they are.

    Args:
        optimizer: as a callback is given it; one that pages nothing is left alone.

    Returns:
        How many tensors were moved.

    Example:
        >>> page_again(torch.optim.AdamW([torch.zeros(1, requires_grad=True)]))
        0
    """
    inner, moved = getattr(optimizer, "optimizer", optimizer), 0
    for number, state in inner.state.items() if getattr(inner, "is_paged", False) else ():
        for name, value in state.items():
            plain = type(value) is torch.Tensor and not getattr(value, "is_paged", False)
            if plain and value.shape == number.shape and value.numel() >= PAGED_FROM:
                state[name] = inner.get_state_buffer(number, dtype=value.dtype).copy_(value)
                moved += 1
    return moved


def give_back(trainer: Trainer, error: BaseException) -> None:
    """Let go of a broken step's gradients, optimizer and cached memory; the model stays.

    Raises:
        BaseException: the error itself in one of several processes, as the others wait for it.

    Example:
        >>> from types import SimpleNamespace as Some
        >>> model = torch.nn.Linear(1, 1)
        >>> model(torch.ones(1)).backward()
        >>> idle = Some(free_memory=list)    # called, it does nothing
        >>> alone, handler = Some(world_size=1), Some()
        >>> trainer = Some(args=alone, model=model, accelerator=idle, callback_handler=handler)
        >>> give_back(trainer, KeyError())
        >>> model.weight.grad is None
        True
    """
    if trainer.args.world_size > 1:
        raise error
    clear_frames(error.__traceback__)  # they hold the step's activations
    trainer.model.zero_grad()
    handler = trainer.callback_handler
    trainer.optimizer = trainer.lr_scheduler = handler.optimizer = handler.lr_scheduler = None
    trainer.accelerator.free_memory()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
