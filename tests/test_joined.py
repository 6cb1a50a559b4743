"""Decoder layers as two joined 4-bit products: the same bits, the same answers, and back again."""

import copy

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconDecoderLayer

from helpers import joined
from helpers.falcon import LINEARS, assert_quantized, load_falcon, use_fused_attention
from helpers.profiles import TINY
from tools.mends import undo_double_quantization


@pytest.fixture(scope="module")
def loaded():
    return load_falcon(TINY.model, TINY)


@pytest.fixture
def base(loaded):
    """The tiny Falcon in NF4 with fused attention."""
    model = copy.deepcopy(loaded)
    use_fused_attention(model)
    yield model
    use_fused_attention(model, False)


def adapt(base: nn.Module, targets: tuple[str, ...] = LINEARS, **settings):
    torch.manual_seed(0)
    lora = LoraConfig(
        r=4, lora_alpha=12, lora_dropout=0.1, target_modules=list(targets), task_type="CAUSAL_LM",
        init_lora_weights=False, **settings,
    )  # fmt: skip
    return get_peft_model(base, lora).eval()


def layer_of(model: nn.Module, number: int = 2) -> FalconDecoderLayer:
    return [m for m in model.modules() if isinstance(m, FalconDecoderLayer)][number]


def bits(model: nn.Module) -> list[torch.Tensor]:
    layers = [m for m in model.modules() if isinstance(m, joined.Linear4bit)]
    return [t.clone() for m in layers for t in (m.weight.data, m.weight.quant_state.absmax)]


def padded() -> dict[str, torch.Tensor]:
    """Three rows of unlike lengths, padded on the left."""
    ids = torch.randint(20, 900, (3, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :5] = mask[2, :9] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """Of the real tokens."""
    batch = padded()
    return model(**batch).logits[batch["attention_mask"].bool()]


def test_joined_weights_are_the_four_bit_for_bit(base) -> None:
    parts = joined._four(layer_of(base))
    query, up, dense, down = (dequantize_4bit(p.weight.data, p.weight.quant_state) for p in parts)
    assert joined.join_layers(base) == base.config.num_hidden_layers
    layer = layer_of(base)
    for product, expected in (
        (layer.into, torch.cat([query, up])),
        (layer.out_of, torch.cat([dense, down], 1)),
    ):
        state = QuantState(
            product.absmax, torch.Size(product.shape), blocksize=64, quant_type="nf4",
            dtype=query.dtype,
        )  # fmt: skip
        assert torch.equal(dequantize_4bit(product.w, state), expected)


def test_answers_stay_with_the_adapter_on_and_off_and_parting_gives_every_bit_back(base) -> None:
    model = adapt(base)
    before, on = bits(model), logits(model)
    with model.disable_adapter():
        off = logits(model)
    assert (on - off).abs().max() > 0.1
    assert joined.join_layers(model) == base.config.num_hidden_layers
    torch.testing.assert_close(logits(model), on, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), off, rtol=1e-4, atol=1e-4)
    assert joined.join_layers(model, on=False) == 0
    assert all(torch.equal(a, b) for a, b in zip(bits(model), before, strict=True))
    assert assert_quantized(model) == 4 * base.config.num_hidden_layers
    assert torch.equal(logits(model), on)


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_padded_batch_is_answered_token_for_token(base, cache: str | None) -> None:
    model, settings = adapt(base), {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 9}
    settings |= {"eos_token_id": None, "cache_implementation": cache, "disable_compile": True}
    expected = model.generate(**padded(), **settings)
    joined.join_layers(model)
    assert torch.equal(model.generate(**padded(), **settings), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_as_close_as_before(loaded, dtype: torch.dtype) -> None:
    """Joined and four by four, both against 32 bits."""
    model = adapt(copy.deepcopy(loaded))
    use_fused_attention(model)
    exact = logits(model)
    short = model.to(dtype)
    for part in short.modules():
        if isinstance(part, joined.Linear4bit):
            part.compute_dtype = dtype
    apart = (logits(short).float() - exact).norm()
    joined.join_layers(short)
    together = logits(short)
    use_fused_attention(model, False)
    assert together.dtype == dtype
    assert (together.float() - exact).norm() < 1.5 * apart < 0.1 * exact.norm()


def test_an_adapter_on_some_linears_joins_too(base) -> None:
    model = adapt(base, ("dense", "dense_h_to_4h"))
    on = logits(model)
    joined.join_layers(model)
    torch.testing.assert_close(logits(model), on, rtol=1e-4, atol=1e-4)


def test_one_compilation_holds_a_joined_layer(base) -> None:
    model = adapt(base)
    joined.join_layers(model)
    expected = logits(model)
    torch._dynamo.reset()
    layer = layer_of(model, 0)
    layer.compile(fullgraph=True, dynamic=False)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_joined_layers_hold_no_more_than_the_bits_and_their_scales(base) -> None:
    parts = joined._four(layer_of(base))
    n_bytes = sum(p.weight.numel() for p in parts)
    joined.join_layers(base)
    layer = layer_of(base)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in (layer.into.w, layer.out_of.w, parts[0].weight, parts[1].weight,
                      *layer.parked) if t.untyped_storage().nbytes()}  # fmt: skip
    assert sum(held.values()) == n_bytes
    assert parts[2].weight is None and parts[3].weight is None, "a stray call must be loud"


def test_what_cannot_be_joined_is_left_alone_or_refused(base, loaded) -> None:
    assert joined.join_layers(loaded) == 0, "without fused attention"
    model = adapt(base)
    joined.join_layers(model)
    with pytest.raises(RuntimeError, match="joined layers only answer"):
        model.train()(**padded())
    joined.join_layers(model.eval(), on=False)
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="only one plain, unmerged LoRA adapter"):
        joined.join_layers(model)


def test_undone_double_quantization_changes_no_weight_forward_or_backward(base) -> None:
    def run() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        out = model(**padded()).logits
        out.logsumexp(-1).mean().backward()
        return out, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    model = adapt(base)
    before = run()
    assert undo_double_quantization(model) == 4 * base.config.num_hidden_layers
    parts = [m for m in model.modules() if isinstance(m, joined.Linear4bit)]
    assert {m.weight.quant_state.absmax.dtype for m in parts} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(before, run(), strict=True))
