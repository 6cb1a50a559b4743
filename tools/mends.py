"""Which of helpers.speed's mends a run of notebook 03 takes, and switching them on and off."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate.utils import AutocastKwargs
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import PreTrainedConfig, Trainer

from helpers.joined import full_scales
from helpers.memory import plan_memory
from helpers.profiles import GIB, Profile
from helpers.speed import compile_blocks, use_float8, use_lean_lora, use_packed_rows
from helpers.training import row_order
from tools.many_gpus import is_sharded

CONTEXT = 0.7 * GIB  # what a process takes beside the allocator: measured, results/h100/memory.json
RESERVE = 1.05  # what it holds over what is in use, as its segments grow: t4_limits.json
MOST_ROWS = 16  # of a micro-batch: more was never timed


@dataclass(frozen=True)
class Mends:
    """Which mends a run has: packed rows, lean LoRA, compiled blocks, products in fp8."""

    packed: bool = False
    lean: bool = False
    compiled: bool = False
    float8: bool = False


def choose_mends(
    profile: Profile, n_fused: int, packed: bool | None = None, lean: bool | None = None,
    compiled: bool | None = None, float8: bool | None = None,
) -> Mends:  # fmt: skip
    """Take what the machine allows, or what was asked for.

    By default a bf16 GPU gets all but fp8, alone or beside others; an fp16 one gets no packed rows
    either, which its attention has no kernel for; a CPU and a base in pieces (FSDP) get none.
    Where compiling fails, the run goes on uncompiled, and a line says so.

    Args:
        profile: the run's.
        n_fused: layers with fused attention, without which rows cannot be packed.
        packed, lean, compiled, float8: None leaves the choice to the machine.

    Raises:
        ValueError: if what was asked for cannot be had.

    Example:
        >>> from helpers.profiles import TINY
        >>> choose_mends(TINY, n_fused=6)
        Mends(packed=False, lean=False, compiled=False, float8=False)
    """
    newer = profile.on_gpu and profile.compute_dtype is torch.bfloat16
    default = profile.on_gpu and n_fused > 0 and not is_sharded()
    wanted = ((packed, default and newer), (lean, default), (compiled, default))
    asked = (ours if own is None else own for own, ours in wanted)
    mends = Mends(*asked, float8=bool(float8))
    if mends.compiled and (fault := compiling_fault(profile.device)):
        print(f"Compiling does not work here ({fault}): the run goes on uncompiled, more slowly.")
        mends = replace(mends, compiled=False)
    if mends.packed and not (newer and n_fused):
        raise ValueError(
            "PACKED = True needs a GPU of capability 8.0 and FUSED_ATTENTION: set PACKED = None"
        )
    if mends.float8 and not (mends.lean and newer and torch.cuda.get_device_capability() >= (9, 0)):
        raise ValueError(
            "FP8 = True needs a GPU of capability 9.0 and LEAN_LORA: set FP8 = None"
        )  # fmt: skip
    return mends


def compiling_fault(device: str) -> str:
    """Compile three operations, forward and backward; say what went wrong, or nothing.

    It fails where Triton has no kernels for the GPU, or no C compiler is installed.

    Example:
        >>> compiling_fault("no device")
        'RuntimeError'
    """
    try:
        x = torch.ones(8, 8, device=device, requires_grad=True)
        torch.compile(lambda x: torch.nn.functional.gelu(x * x).sum(), dynamic=True)(x).backward()
    except Exception as error:  # each stage of the compiler has its own
        return type(error).__name__
    return ""


def most_tokens(
    profile: Profile, mends: Mends, lengths: Sequence[int], batch_size: int, seed: int = 0
) -> int:
    """The tokens of the largest micro-batch of a run, padding included.

    Args:
        profile, mends: the run's.
        lengths: (n_rows,) tokens of each row to train on.
        batch_size: rows of a micro-batch; divides the rows of a step.
        seed: of the order of rows.

    Example:
        >>> from helpers.profiles import TINY    # 8 rows a step, at most 256 tokens each
        >>> most_tokens(TINY, Mends(), [100] * 9 + [300], batch_size=2)
        512
    """
    cut = np.minimum(lengths, profile.max_length)
    rows = profile.batch_size * profile.accumulation * int(os.environ.get("WORLD_SIZE", "1"))
    order = row_order(cut, rows, profile.max_steps, seed, packed=batch_size * mends.packed)
    table = cut[order].reshape(-1, batch_size)
    return int(table.sum(1).max() if mends.packed else table.max() * batch_size)


def fit_memory(
    profile: Profile, mends: Mends, config: PreTrainedConfig, lengths: Sequence[int],
    rank: int = 32, fixed: bool = False, memory: int = 0, seed: int = 0,
) -> Profile:  # fmt: skip
    """Choose micro-batch and checkpointing for a GPU from the plan; a step keeps its rows.

    As many rows as fit, up to the article's 16 and at least eight, with the activations of all
    layers kept, or of all but every eighth, fourth or second. Else at least four rows with all
    kept; else every layer is computed again, again with as many rows as fit. The plan counts the
    largest micro-batch of the run, and an optimizer whose state came back from a checkpoint.
    `CONTEXT` and `RESERVE` stand for what is not the allocator's, and for what it holds and does
    not use.

    Args:
        profile, mends: the run's.
        config: of the model; other models than Falcon's are left as they are, as is a CPU.
        lengths: (n_rows,) tokens of each row to train on.
        rank: of the adapters.
        fixed: leave the micro-batch, because somebody has set it; checkpointing is still chosen.
        memory: of the GPU, in bytes; 0 asks it.
        seed: of the order of rows.

    Example:
        >>> from helpers.profiles import T4
        >>> from transformers import FalconConfig
        >>> profile = fit_memory(T4, Mends(lean=True, compiled=True), FalconConfig(), [300] * 9,
        ...                      memory=15 * GIB)
        >>> profile.batch_size, profile.gradient_checkpointing, profile.checkpoint_every
        (16, True, 4)
    """
    if not profile.on_gpu or config.model_type != "falcon" or is_sharded():
        return profile
    memory = memory or torch.cuda.get_device_properties(profile.device).total_memory
    rows = profile.batch_size * profile.accumulation
    sizes = [n for n in range(min(rows, MOST_ROWS), 0, -1) if rows % n == 0]
    sizes = [profile.batch_size] if fixed else sizes
    some = [(n, every) for n in sizes for every in (0, 8, 4, 2) if n >= 8 or fixed]
    few = [(n, 0) for n in sizes if 4 <= n < 8]
    for batch, every in some + few + [(n, 1) for n in sizes]:
        tokens = most_tokens(profile, mends, lengths, batch, seed)
        plan = plan_memory(
            profile, config, 1, tokens, rank, every > 0, mends.lean, mends.compiled,
            every=every or 1,
        )  # fmt: skip
        if sum(plan.values()) * RESERVE + CONTEXT <= memory:
            break
    return replace(
        profile, batch_size=batch, accumulation=rows // batch, gradient_checkpointing=every > 0,
        checkpoint_every=every or 1,
    )  # fmt: skip


def use_mends(trainer: Trainer, mends: Mends) -> None:
    """Apply them to a built trainer, before `train()`; with none of them, change nothing.

    With lean LoRA in 16 bits autocast goes too: nothing is left that it has to cast, and it takes
    LayerNorms to 32 bits and back.

    Example:
        >>> use_mends(None, Mends())
    """
    if mends.packed:
        use_packed_rows(trainer)
    if mends.lean:
        use_lean_lora(trainer.model)
        if trainer.args.bf16 or trainer.args.fp16:
            trainer.accelerator.autocast_handler = AutocastKwargs(enabled=False)
    if mends.float8:
        use_float8(trainer.model)
    if mends.compiled:
        compile_blocks(trainer.model)


def undo_mends(model: nn.Module) -> None:
    """Give a trained model the library's own layers back.

    Example:
        >>> undo_mends(nn.Linear(2, 2))
    """
    compile_blocks(model, on=False)
    use_float8(model, on=False)
    use_lean_lora(model, on=False)
    for part in model.modules():
        if "starts_hook" in vars(part):
            vars(part).pop("starts_hook").remove()


def undo_double_quantization(model: nn.Module) -> int:
    """Keep every block's scale in 32 bits, as without double quantization; the weights stay equal.

    Returns:
        How many layers there are in four bits.

    Example:
        >>> undo_double_quantization(nn.Linear(2, 2))
        0
    """
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    for layer in layers:
        state = layer.weight.quant_state
        state.absmax = full_scales(state)
        state.nested, state.state2, state.offset = False, None, None
    return len(layers)
