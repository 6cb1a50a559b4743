"""Which of helpers.speed's mends a run of notebook 03 takes, and switching them on and off."""

from dataclasses import dataclass, replace

import torch
from accelerate.utils import AutocastKwargs
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import Trainer

from helpers.joined import full_scales
from helpers.profiles import GIB, Profile
from helpers.speed import compile_blocks, use_float8, use_lean_lora, use_packed_rows
from tools.many_gpus import is_sharded


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

    By default a bf16 GPU gets all but fp8, alone or beside others; a CPU, a T4 and a base in
    pieces (FSDP) get none.

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
    default = newer and n_fused > 0 and not is_sharded()
    asked = (default if want is None else want for want in (packed, lean, compiled))
    mends = Mends(*asked, float8=bool(float8))
    if mends.packed and not (newer and n_fused):
        raise ValueError(
            "PACKED = True needs a GPU of capability 8.0 and FUSED_ATTENTION: set PACKED = None"
        )
    if mends.float8 and not (mends.lean and newer and torch.cuda.get_device_capability() >= (9, 0)):
        raise ValueError(
            "FP8 = True needs a GPU of capability 9.0 and LEAN_LORA: set FP8 = None"
        )  # fmt: skip
    return mends


def without_checkpointing(profile: Profile, mends: Mends, memory: int = 0) -> Profile:
    """Keep activations where they fit: packed and compiled, on a GPU of 24 GiB or more.

    Args:
        profile, mends: the run's.
        memory: of the GPU, in bytes; 0 asks it.

    Example:
        >>> from helpers.profiles import A100
        >>> both = Mends(packed=True, compiled=True)
        >>> [without_checkpointing(A100, both, n * GIB).gradient_checkpointing for n in (15, 40)]
        [True, False]
    """
    if not (mends.packed and mends.compiled and profile.on_gpu):
        return profile
    memory = memory or torch.cuda.get_device_properties(profile.device).total_memory
    again = profile.gradient_checkpointing and memory < 24 * GIB
    return replace(profile, gradient_checkpointing=again)


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
