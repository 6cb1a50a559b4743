"""Falcon's own gift to decoding: a decoder layer as two joined 4-bit products instead of four."""

import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from torch import Tensor, nn
from transformers import Cache
from transformers.models.falcon.modeling_falcon import FalconDecoderLayer

from helpers.falcon import MultiQueryAttention

Projection = Linear4bit | LoraLinear4bit


def full_scales(state: QuantState) -> Tensor:
    """The 32-bit scales of NF4 blocks, double quantization undone just as bitsandbytes undoes it.

    Returns:
        (n_blocks,) float32.

    Example:
        >>> full_scales(QuantState(torch.tensor([2.0]))).tolist()    # quantized once only
        [2.0]
    """
    if not state.nested:
        return state.absmax
    return dequantize_blockwise(state.absmax, state.state2).float() + state.offset


def join_columns(parts: list[Tensor], rows: int) -> Tensor:
    """Lay row after row of several packed weights, or of their scales, side by side.

    Example:
        >>> a, b = torch.tensor([1, 2, 3, 4]), torch.tensor([8, 9])    # 2 x 2 and 2 x 1
        >>> join_columns([a, b], 2).tolist()
        [1, 2, 8, 3, 4, 9]
    """
    return torch.cat([part.reshape(rows, -1) for part in parts], 1).flatten()


def _base(layer: Projection) -> Linear4bit:
    """The 4-bit layer under an adapter, or the layer itself."""
    return getattr(layer, "base_layer", layer)


def _thin(layer: Projection) -> tuple[Tensor, Tensor]:
    """The one active LoRA pair of a layer, (rank, in) and scaled (out, rank); rank 0 without."""
    if not isinstance(layer, LoraLinear4bit):
        (out, into), device = layer.weight.quant_state.shape, layer.weight.device
        return torch.zeros(0, into, device=device), torch.zeros(out, 0, device=device)
    (name,) = layer.active_adapters
    a, b = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
    return a.float(), b.float() * layer.scaling[name]


class JoinedProduct(nn.Module):
    """Two 4-bit products in one call, and two LoRA pairs as one, which peft's switch turns off.

    Args:
        layers: two linears in NF4, with or without an adapter.
        rows: True if both read the same input, and their outputs come out side by side; False
            if each reads its own part of the input, and their outputs are summed.
    """

    def __init__(self, *layers: Projection, rows: bool = True) -> None:
        super().__init__()
        bases = [_base(layer) for layer in layers]
        states, self.dtype = [x.weight.quant_state for x in bases], bases[0].compute_dtype
        (out, into), (out2, into2) = (state.shape for state in states)
        packed, scales = [x.weight.data for x in bases], [full_scales(state) for state in states]
        thin = [_thin(layer) for layer in layers]
        if rows:
            self.shape = (out + out2, into)
            w, absmax = torch.cat(packed), torch.cat(scales)
            a, b = torch.cat([a for a, _ in thin]), torch.block_diag(*[b for _, b in thin])
        else:
            self.shape = (out, into + into2)
            w, absmax = join_columns(packed, out)[:, None], join_columns(scales, out)
            a, b = torch.block_diag(*[a for a, _ in thin]), torch.cat([b for _, b in thin], 1)
        self.switch = [layer for layer in layers if isinstance(layer, LoraLinear4bit)]
        parts = {"w": w, "absmax": absmax, "a": a.to(self.dtype), "b": b.to(self.dtype)}
        for name, tensor in parts.items():
            self.register_buffer(name, tensor.contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), dtype of `x`."""
        inner = x.to(self.dtype)
        y = torch.ops.bitsandbytes.gemm_4bit(inner, self.w, self.shape, self.absmax, 64, "nf4")
        if self.switch and not self.switch[0].disable_adapters:
            thin = nn.functional.linear(inner, self.a).flatten(0, -2)
            y = torch.addmm(y.flatten(0, -2), thin, self.b.t()).view_as(y)
        return y.to(x.dtype)


class JoinedLayer(FalconDecoderLayer):
    """A decoder layer that only answers: two products, one into its two branches, one out of them.

    Attention and MLP read the same LayerNorm, so `query_key_value` and `dense_h_to_4h` are rows of
    one matrix; what they give is summed, so `dense` and `dense_4h_to_h` are columns of another.
    """

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        layer_past: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        """(batch, length, hidden) in and out, in the dtype of the input."""
        if self.training:
            raise RuntimeError("joined layers only answer: join_layers(model, on=False) to train")
        attention, wide = self.self_attention, self.mlp.dense_h_to_4h.out_features
        y = self.into(self.input_layernorm(hidden_states))
        qkv, up = y.split([y.shape[-1] - wide, wide], -1)
        seen = attention.attend(qkv, attention_mask, layer_past, position_embeddings)
        return hidden_states + self.out_of(torch.cat([seen, self.mlp.act(up)], -1)), None


def _four(layer: FalconDecoderLayer) -> list[Projection]:
    attention, mlp = layer.self_attention, layer.mlp
    return [attention.query_key_value, mlp.dense_h_to_4h, attention.dense, mlp.dense_4h_to_h]


def _fits(layer: FalconDecoderLayer) -> bool:
    """Parallel branches on one LayerNorm, fused attention, NF4 in blocks of 64 that end with rows.

    Raises:
        ValueError: if an adapter is merged, or more than one is active.
    """
    if not isinstance(layer.self_attention, MultiQueryAttention) or not layer.config.parallel_attn:
        return False
    for part in _four(layer):
        base = _base(part)
        state = getattr(base.weight, "quant_state", None)
        if state is None or base.bias is not None or base.weight.dtype is not torch.uint8:
            return False
        if (state.quant_type, state.blocksize, state.shape[1] % 64) != ("nf4", 64, 0):
            return False
        if base is not part and (
            part.merged or part.lora_variant or len(part.active_adapters) != 1
        ):
            raise ValueError(
                "only one plain, unmerged LoRA adapter can be joined: set JOINED = False"
            )
    return True


def join_layers(model: nn.Module, on: bool = True) -> int:
    """Join each decoder layer's four 4-bit weights into two, and its LoRA pairs too; or part them.

    The bits stay as they are; only double quantization is undone, 0.3 GB for Falcon-7B. The
    adapter is copied, in the compute dtype: join again if it changed. While joined, two of the
    four layers have no weight, since theirs lies in the joined one: part before anything else
    than answering. Layers of another build are left alone.

    Args:
        model: in eval mode with fused attention, with or without an adapter.
        on: False gives back the four layers, bit for bit.

    Returns:
        How many decoder layers are joined now.

    Raises:
        ValueError: if an adapter is merged, or more than one is active.

    Example:
        >>> join_layers(nn.Linear(2, 2))
        0
    """
    layers = [m for m in model.modules() if isinstance(m, FalconDecoderLayer)]
    for layer in [m for m in layers if isinstance(m, JoinedLayer)]:
        _part(layer)
    chosen = [layer for layer in layers if on and _fits(layer)]
    for layer in chosen:
        query, up, dense, down = _four(layer)
        layer.into, layer.out_of = JoinedProduct(query, up), JoinedProduct(dense, down, rows=False)
        joined, at = layer.into.w, 0
        for weight in (_base(query).weight, _base(up).weight):
            weight.data = joined[at : (at := at + len(weight))]
        layer.parked = (_base(dense).weight, _base(down).weight)
        for part, weight in zip((dense, down), layer.parked, strict=True):
            weight.data = weight.data.new_empty(0, 1)
            _base(part).weight = None
        layer.__class__ = JoinedLayer
    return len(chosen)


def _part(layer: JoinedLayer) -> None:
    """Undo `join_layers` for one layer."""
    query, up, dense, down = (_base(part) for part in _four(layer))
    for base in (query, up):
        base.weight.data = base.weight.data.clone()
    widths = [weight.quant_state.shape[1] // 2 for weight in layer.parked]
    columns = layer.out_of.w.view(layer.out_of.shape[0], -1).split(widths, 1)
    for base, weight, part in zip((dense, down), layer.parked, columns, strict=True):
        weight.data = part.reshape(-1, 1)
        base.weight = weight
    del layer.into, layer.out_of, layer.parked
    layer.__class__ = FalconDecoderLayer
