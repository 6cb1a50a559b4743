"""What makes training fast: rows without padding, lean LoRA, compiled blocks, products in fp8."""

from copy import deepcopy
from typing import Any

import torch
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from torch import Tensor, nn
from transformers import Trainer
from transformers.models.falcon.modeling_falcon import FalconDecoderLayer, FalconModel

from helpers.falcon import MAX_PACKED_LENGTH, MultiQueryAttention

MULTIPLIERS = -2048144789, -1028477387  # MurmurHash3's finalizer, as int32
FP8 = torch.float8_e4m3fn
RECOMPUTE = ("used_far_apart", "materialized_backward", "long_fusible_chains")


def hand_over_starts(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Tell a FalconModel where its packed rows begin: a forward pre-hook.

    TRL's collator says so in `cu_seq_lens_q`; without it, a row begins wherever a position is 0.
    Padded batches, which come with a mask, pass unchanged.

    Returns:
        `args` and `kwargs`, the mask being (n_rows + 1,) int32 if the rows are packed.

    Raises:
        ValueError: if a row is longer than `MAX_PACKED_LENGTH` tokens.

    Example:
        >>> positions = torch.tensor([[0, 1, 2, 0, 1]])    # rows of 3 and 2 tokens
        >>> hand_over_starts(None, (), {"position_ids": positions})[1]["attention_mask"]
        tensor([0, 3, 5], dtype=torch.int32)
    """
    starts, positions = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    if kwargs.get("attention_mask") is not None or positions is None:
        return args, kwargs
    if starts is None:
        begins = (positions[0] == 0).nonzero().flatten()
        starts = torch.cat([begins, begins.new_tensor([positions.shape[1]])])
    longest = kwargs.get("max_length_q") or int(starts.diff().max())
    if longest > MAX_PACKED_LENGTH:
        raise ValueError(
            f"a row of {longest} tokens is too long to pack: set MAX_LENGTH to "
            f"{MAX_PACKED_LENGTH} or less, or PACKED = False"
        )
    return args, kwargs | {"attention_mask": starts.to(torch.int32)}


def use_packed_rows(trainer: Trainer) -> None:
    """Lay the rows of a micro-batch end to end instead of padding them, none seeing another.

    TRL's own collator does the laying, its `padding_free=True`; TRL would not cut rows at
    `max_length` then, so the switch is turned after it has cut them.

    Args:
        trainer: an SFTTrainer of a Falcon with fused attention.

    Raises:
        ValueError: if the GPU is older than capability 8.0, or attention is not fused.

    Example:
        >>> from types import SimpleNamespace
        >>> use_packed_rows(SimpleNamespace(model=nn.Linear(2, 2)))
        Traceback (most recent call last):
        ...
        ValueError: packed rows need a GPU of capability 8.0 and fused attention: set PACKED = False
    """
    parts = list(trainer.model.modules())
    fused = any(isinstance(part, MultiQueryAttention) for part in parts)
    new = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    if not (fused and new):
        raise ValueError(
            "packed rows need a GPU of capability 8.0 and fused attention: set PACKED = False"
        )
    trainer.data_collator.padding_free = trainer.padding_free = True
    for part in parts:
        if isinstance(part, FalconModel):
            part.starts_hook = part.register_forward_pre_hook(hand_over_starts, with_kwargs=True)


class CounterDropout(nn.Module):
    """Dropout whose mask is computed from a seed and each value's position, and never kept.

    The backward pass, or a checkpoint's second forward, computes the same mask again: a compiled
    block then keeps no mask, and needs no generator's state.

    Args:
        p: share of the values that become 0; the others are divided by 1 - p.
        seed: () int32, shared by all layers, drawn anew for each forward of the model.
        salt: what tells this layer from the others.

    Source:
        Appleby, MurmurHash3, the 32-bit finalizer: https://github.com/aappleby/smhasher

    Example:
        >>> drop = CounterDropout(0.5, torch.tensor(3, dtype=torch.int32), salt=0)
        >>> kept = drop(torch.ones(10_000))
        >>> sorted(set(kept.tolist())), abs(kept.mean().item() - 1) < 0.05
        ([0.0, 2.0], True)
    """

    def __init__(self, p: float, seed: Tensor, salt: int) -> None:
        super().__init__()
        self.p = p
        salted = torch.tensor(salt, dtype=torch.int32, device=seed.device)
        self.register_buffer("seed", seed, persistent=False)
        self.register_buffer("salt", salted, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Drop values of `x`, any shape and dtype, while training."""
        if not self.training or not self.p:
            return x
        bits = torch.arange(x.numel(), device=x.device, dtype=torch.int32) ^ (self.seed + self.salt)
        bits = (bits ^ ((bits >> 16) & 0xFFFF)) * MULTIPLIERS[0]
        bits = (bits ^ ((bits >> 13) & 0x7FFFF)) * MULTIPLIERS[1]
        bits = bits ^ ((bits >> 16) & 0xFFFF)
        kept = bits >= int(self.p * 2**32 - 2**31)
        return torch.where(kept.view_as(x), x / (1 - self.p), torch.zeros_like(x))


def _unpacked(
    shape: tuple[int, int], dtype: torch.dtype, packed: Tensor, absmax: Tensor,
    absmax2: Tensor | None, code2: Tensor | None, offset: Tensor | None,
) -> Tensor:  # fmt: skip
    """The weight by bitsandbytes' own kernels, (out, in) as `shape` says."""
    ops = torch.ops.bitsandbytes
    if absmax2 is not None:
        absmax = ops.dequantize_blockwise(absmax, absmax2, code2, 256, torch.float32) + offset
    return ops.dequantize_4bit(packed.view(-1, 1), absmax, 64, "nf4", shape, dtype)


@torch.library.custom_op("helpers::lean_product", mutates_args=())
def lean_product(
    x: Tensor, out: int, packed: Tensor, absmax: Tensor,
    absmax2: Tensor | None, code2: Tensor | None, offset: Tensor | None,
) -> Tensor:  # fmt: skip
    """`x @ W.T` in 32 bits, as the tensor cores sum it up; W is unpacked here and kept by none.

    What an adapter adds is smaller than half a step of a bf16 product for many training steps: onto
    a product that is rounded already it would be lost. Onto this one it is not, and the sum is
    rounded once. `torch.addmm` does not help: on an H100 it rounds the product before it adds. The
    compiler sees one operation, of which it keeps no W, and which it computes again where
    checkpointing asks for it.

    Args:
        x: (n, in) 16 or 32 bits.
        out: rows of W.
        packed, absmax, absmax2, code2, offset: of a bitsandbytes NF4 weight with blocks of 64; the
            last three are None without double quantization.

    Returns:
        (n, out) float32.

    Example:
        >>> one = torch.ones(1)
        >>> byte = torch.full((32, 1), 0xFF, dtype=torch.uint8)    # 64 weights of level 1
        >>> lean_product(torch.ones(1, 64), 1, byte, one, None, None, None)
        tensor([[64.]])
    """
    weight = _unpacked((out, x.shape[1]), x.dtype, packed, absmax, absmax2, code2, offset)
    if x.is_cuda and x.dtype is not torch.float32:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return x.float() @ weight.t().float()


@lean_product.register_fake
def _(x: Tensor, out: int, *weight: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], out, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, out, *weight = inputs
    ctx.shape, ctx.dtype = (out, x.shape[1]), x.dtype
    ctx.save_for_backward(*weight)


def _gradients(ctx: Any, g: Tensor) -> tuple:
    weight = _unpacked(ctx.shape, ctx.dtype, *ctx.saved_tensors)
    return g.to(ctx.dtype) @ weight, *[None] * 6


lean_product.register_autograd(_gradients, setup_context=_save)


class LeanLora(LoraLinear4bit):
    """peft's 4-bit LoRA layer with one adapter: the same sum, in fewer passes over memory.

    peft clones the base's output, computes the adapter in 32 bits outside autocast, scales and
    adds. Here both products run in the dtype of the input, and their sum is rounded once.
    """

    float8 = False

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """(..., in) to (..., out), dtype of `x`; peft's own way if the adapter is off or merged."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return super().forward(x, *args, **kwargs)
        name = self.active_adapters[0]
        a, b = self.lora_A[name].weight.to(x.dtype), self.lora_B[name].weight * self.scaling[name]
        thin = nn.functional.linear(self.lora_dropout[name](x), a)
        product = product8(self, x) if self.float8 else self.product(x)
        return (product + nn.functional.linear(thin, b.to(x.dtype))).to(x.dtype)

    def product(self, x: Tensor) -> Tensor:
        """The base's product, (..., in) to (..., out) float32."""
        weight, state = self.base_layer.weight, self.base_layer.weight.quant_state
        double = state.nested and (state.state2.absmax, state.state2.code, state.offset)
        second = double or (None,) * 3
        y = lean_product(x.flatten(0, -2), state.shape[0], weight, state.absmax, *second)
        return y.view(*x.shape[:-1], -1)


def _draw(model: nn.Module, args: tuple) -> None:
    """Draw the seed of all masks from torch's generator: a forward pre-hook of the whole model."""
    if model.training:
        model.mask_seed.random_(0, 2**31 - 1)


def _plain(layer: LoraLinear4bit) -> bool:
    """What `lean_product` computes, and no more: NF4 in blocks of 64, no bias, LoRA as it was."""
    base = layer.base_layer
    nf4 = base.weight.quant_type == "nf4" and base.weight.blocksize == 64
    return nf4 and base.bias is None and not layer.lora_variant


def use_lean_lora(model: nn.Module, on: bool = True) -> int:
    """Switch peft's plain 4-bit LoRA layers to `LeanLora` with `CounterDropout`, or back.

    Layers with a bias, or not in NF4 with blocks of 64, stay peft's own.

    Args:
        model: with adapters; call it as a whole, since that is when the masks' seed is drawn. A
            generator restored from a checkpoint draws the same seeds again.
        on: False restores peft's classes and PyTorch's dropout.

    Returns:
        How many layers are lean now.

    Example:
        >>> use_lean_lora(nn.Linear(2, 2))
        0
    """
    layers = [m for m in model.modules() if isinstance(m, LoraLinear4bit) and _plain(m)]
    if "draw_hook" in vars(model):
        vars(model).pop("draw_hook").remove()
    if on and layers:
        device = layers[0].base_layer.weight.device
        model.mask_seed = torch.zeros((), dtype=torch.int32, device=device)
        model.draw_hook = model.register_forward_pre_hook(_draw)
    for number, layer in enumerate(layers):
        layer.__class__ = LeanLora if on else LoraLinear4bit
        for name, old in layer.lora_dropout.items():
            p = getattr(old, "p", 0.0)
            library = nn.Dropout(p) if p else nn.Identity()
            ours = CounterDropout(p, model.mask_seed, 7919 * number) if on else library
            layer.lora_dropout[name] = ours.train(layer.training)
    return len(layers) * on


def compile_blocks(model: nn.Module, on: bool = True, dynamic: bool | None = True) -> int:
    """Compile each decoder block by itself, at any length, or go back to running it as written.

    The compiler is told to compute GELU and dropout again in the backward pass instead of keeping
    them; its own rules forbid that. Settings are the process's own: the last call decides.

    Args:
        model: any model with Falcon's decoder layers.
        on: False takes compilation off and restores the compiler's rules.
        dynamic: as `torch.compile` takes it.

    Returns:
        How many blocks are compiled now; the first step compiles them, once for all.

    Example:
        >>> compile_blocks(nn.Linear(2, 2), on=False)
        0
    """
    torch._dynamo.config.specialize_float = on  # else checkpointing stops at dropout's rate
    torch._dynamo.config.optimize_ddp = not on  # else DDP cuts each block where a bucket ends
    for rule in RECOMPUTE:
        setattr(torch._functorch.config, f"ban_recompute_{rule}", not on)
    blocks = [m for m in model.modules() if isinstance(m, FalconDecoderLayer)]
    for block in blocks:
        block._compiled_call_impl = None
        if on:
            block.compile(dynamic=dynamic)
    return len(blocks) * on


def compile_alike(trainer: Trainer, resume: str | None) -> None:
    """Let a resumed run compile its blocks for the rows that the unbroken run compiled them for.

    The compiler chooses in which order a kernel sums by the first sizes that it sees. A run that
    goes on begins with another batch, so that its gradients may round otherwise (fp16 on an H100:
    1.5e-4 nats in the next loss, `results/h100/resume.json`). So before its first step it takes the
    run's very first micro-batch forward and back; gradients, random state and counts are as before.

    Args:
        trainer: about to go on. Without compiled blocks nothing happens.
        resume: the checkpoint; None for a fresh start, which needs nothing.

    Example:
        >>> from types import SimpleNamespace as Some
        >>> trainer = Some(model=nn.Linear(2, 2))
        >>> compile_alike(trainer, "checkpoint-4")    # nothing is compiled
        >>> hasattr(trainer, "training_step")
        False
    """
    compiled = resume and any(m._compiled_call_impl for m in trainer.model.modules())
    if not compiled:
        return
    step = trainer.training_step

    def after_the_first(model: nn.Module, inputs: Any, *rest: Any) -> Tensor:
        trainer.training_step = step
        kept = vars(trainer) | {"_metrics": deepcopy(getattr(trainer, "_metrics", None))}
        loaders = (state := trainer.accelerator.gradient_state).dataloader_references
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            step(model, next(iter(trainer.get_train_dataloader())), *rest)
        model.zero_grad()
        vars(trainer).update(kept)
        state.dataloader_references = loaders  # what was begun above is not at its end
        return step(model, inputs, *rest)

    trainer.training_step = after_the_first


PARTS = ("w", "absmax", "code", "absmax2", "code2", "offset")


def unpack(
    w: Tensor, absmax: Tensor, code: Tensor, absmax2: Tensor, code2: Tensor, offset: Tensor,
    shape: tuple[int, int],
) -> Tensor:  # fmt: skip
    """NF4 with double quantization as plain tensor operations, which the compiler can fuse.

    Args:
        w: (n / 2, 1) uint8, two codes a byte, the first in the upper half.
        absmax: (n / 64,) uint8, each block's scale.
        code: (16,) float32, NF4's levels.
        absmax2: (n / 64 / 256 rounded up,) float32, the scales of 256 scales.
        code2: (256,) float32, their levels.
        offset: () float32, their mean.
        shape: (out, in) of the weight, n values.

    Returns:
        `shape`, float32, bit for bit what bitsandbytes gives.

    Example:
        >>> one, zero = torch.ones(1), torch.zeros(1, dtype=torch.uint8)
        >>> w = torch.full((32, 1), 0x01, dtype=torch.uint8)    # codes 0, 1, 0, 1, ...
        >>> unpack(w, zero, torch.arange(16.0), one, one, one, (1, 64))[0, :4]    # times 1 * 1 + 1
        tensor([0., 2., 0., 2.])
    """
    scale = code2[absmax.int()] * absmax2.repeat_interleave(256)[: absmax.numel()] + offset
    codes = torch.stack((w.flatten() >> 4, w.flatten() & 15), -1).view(-1, 64)
    return (code[codes.int()] * scale[:, None]).view(shape)


def to_float8(x: Tensor, peak: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round to fp8 with one scale for all: `x` is about `rounded * scale`.

    Example:
        >>> rounded, scale = to_float8(torch.tensor([-2.0, 1.0]))    # 448 is the largest in fp8
        >>> rounded.float(), round(scale.item() * 448, 4)
        (tensor([-448.,  224.]), 2.0)
    """
    peak = x.abs().amax().float() if peak is None else peak
    times = 448.0 / peak.clamp_min(1e-12)
    return (x * times).clamp(-448, 448).to(FP8), 1 / times


class Product8(torch.autograd.Function):
    """x @ W.T in fp8 on tensor cores, W unpacked from NF4 at each call and kept by none."""

    @staticmethod
    def forward(ctx, x: Tensor, *weight: Tensor | tuple) -> Tensor:
        """(..., in) to (..., out) float32."""
        *parts, peak, shape = weight
        ctx.save_for_backward(*parts, peak)
        ctx.shape, ctx.dtype = shape, x.dtype
        x8, a = to_float8(x.flatten(0, -2))
        w8, b = to_float8(unpack(*parts, shape), peak)
        y = torch._scaled_mm(x8, w8.t(), a, b, out_dtype=torch.float32, use_fast_accum=True)
        return y.view(*x.shape[:-1], shape[0])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        """The gradient of x. Levels that seem to depend on it keep the compiler from keeping W."""
        w, absmax, code, *rest, peak = ctx.saved_tensors
        g8, g_scale = to_float8(gradient.flatten(0, -2))
        parts = (w, absmax, code + 0 * g_scale, *rest)
        w8, w_scale = to_float8(unpack(*parts, ctx.shape), peak)
        columns = w8.t().contiguous().t()
        dx = torch._scaled_mm(g8, columns, g_scale, w_scale, out_dtype=ctx.dtype)
        return dx.view(*gradient.shape[:-1], ctx.shape[1]), *[None] * (2 + len(parts))


def product8(layer: LeanLora, x: Tensor) -> Tensor:
    """A lean layer's base product in fp8, from the tensors that `use_float8` has registered.

    Example:
        >>> product8(nn.Linear(2, 2), torch.ones(1, 2))
        Traceback (most recent call last):
        ...
        AttributeError: 'Linear' object has no attribute 'q_w'
    """
    parts = [getattr(layer, "q_" + part) for part in PARTS]
    return Product8.apply(x, *parts, layer.q_peak, layer.q_shape)


def use_float8(model: nn.Module, on: bool = True) -> int:
    """Let lean layers multiply by their base weight in fp8, on a GPU of capability 9.0; or not.

    Args:
        model: after `use_lean_lora`, its weights NF4 with double quantization.
        on: False goes back to bitsandbytes' product.

    Returns:
        How many layers multiply in fp8 now.

    Example:
        >>> use_float8(nn.Linear(2, 2))
        0
    """
    layers = [m for m in model.modules() if isinstance(m, LeanLora)]
    for layer in layers:
        layer.float8 = on
        for name in [n for n in layer._buffers if n.startswith("q_")]:
            delattr(layer, name)
        if not on:
            continue
        weight, state = layer.base_layer.weight, layer.base_layer.weight.quant_state
        layer.q_shape, second = tuple(state.shape), state.state2
        tensors = (weight.data, state.absmax, state.code, second.absmax, second.code, state.offset)
        for part, tensor in zip(PARTS, tensors, strict=True):
            layer.register_buffer("q_" + part, tensor, persistent=False)
        peak = unpack(*tensors, layer.q_shape).abs().amax()
        layer.register_buffer("q_peak", peak, persistent=False)
    return len(layers) * on
