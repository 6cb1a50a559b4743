"""Packed rows, lean LoRA, masks computed twice, even micro-batches and NF4 unpacked in the open."""

from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.falcon.modeling_falcon import FalconModel

from benchmarks import training as benchmark
from helpers import falcon, speed
from helpers.falcon import LINEARS, load_falcon, use_fused_attention
from helpers.profiles import A100, TINY
from helpers.training import deal_evenly, row_order
from tools import mends
from tools.mends import Mends, choose_mends, undo_mends, use_mends


@pytest.fixture
def adapted():
    """The tiny Falcon with adapters that do something."""
    torch.manual_seed(0)
    lora = LoraConfig(
        r=4, lora_alpha=12, lora_dropout=0.0, target_modules=list(LINEARS), task_type="CAUSAL_LM",
        init_lora_weights=False,
    )  # fmt: skip
    model = get_peft_model(load_falcon(TINY.model, TINY), lora).train()
    yield model
    undo_mends(model)
    use_fused_attention(model, False)


def seed_of(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int32)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_drops_the_share_asked_for_and_keeps_the_mean(p: float) -> None:
    out = speed.CounterDropout(p, seed_of(11), 0)(torch.ones(400, 1000))
    dropped = (out == 0).float()
    assert dropped.mean().item() == pytest.approx(p, abs=0.002)
    assert out.mean().item() == pytest.approx(1, abs=0.005)
    for axis in (0, 1):  # no stripes: every row and every column loses about as much
        assert dropped.mean(axis).std() < 1.5 * (p * (1 - p) / dropped.shape[axis]) ** 0.5
    both = (dropped[:, 1:] * dropped[:, :-1]).mean().item()
    assert both == pytest.approx(p * p, abs=0.004), "neighbours fall together"


def test_dropout_depends_on_seed_and_layer_and_on_nothing_else() -> None:
    x, seed = torch.ones(1000), seed_of(1)
    one, other = speed.CounterDropout(0.5, seed, 0), speed.CounterDropout(0.5, seed, 7919)
    first = one(x)
    assert torch.equal(first, one(x)) and not torch.equal(first, other(x))
    seed.fill_(2)
    assert not torch.equal(first, one(x)), "the seed is shared, and drawn in place"
    assert torch.equal(one.eval()(x), x)


def test_backward_and_compiled_dropout_have_the_forward_s_mask() -> None:
    drop = speed.CounterDropout(0.3, seed_of(5), 3)
    x = torch.ones(64, 32, requires_grad=True)
    out = drop(x)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    assert torch.equal(torch.compile(drop, dynamic=True)(x), out)


def logits_and_gradients(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    logits = model(input_ids=ids).logits
    logits.float().logsumexp(-1).mean().backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    return logits.detach(), torch.cat(grads)


def test_lean_lora_is_peft_s_sum_forward_and_backward(adapted) -> None:
    ids = torch.randint(20, 900, (2, 24), generator=torch.Generator().manual_seed(3))
    logits, grads = logits_and_gradients(adapted, ids)
    assert speed.use_lean_lora(adapted) == 4 * adapted.config.num_hidden_layers
    lean_logits, lean_grads = logits_and_gradients(adapted, ids)
    torch.testing.assert_close(lean_logits, logits, rtol=1e-4, atol=1e-4)
    assert (lean_grads - grads).norm() < 1e-4 * grads.norm() and grads.norm() > 0
    with adapted.disable_adapter():
        off = adapted(input_ids=ids).logits
    undo_mends(adapted)
    kinds = {type(m) for m in adapted.modules() if isinstance(m, LoraLinear4bit)}
    assert kinds == {LoraLinear4bit} and not adapted._forward_pre_hooks
    assert not any(isinstance(m, speed.CounterDropout) for m in adapted.modules())
    assert torch.equal(adapted(input_ids=ids).logits, logits)
    with adapted.disable_adapter():
        assert torch.equal(adapted(input_ids=ids).logits, off)


def test_what_a_first_step_has_learned_is_not_rounded_away() -> None:
    """B is 2e-4 up or down, as AdamW's first step leaves it; bf16 knows 1.35 to 0.004."""
    torch.manual_seed(0)
    packed, state = quantize_4bit(torch.randn(512, 512) * 0.06, quant_type="nf4")
    weight = dequantize_4bit(packed, state).bfloat16()
    x, thin = torch.randn(64, 512).bfloat16(), torch.randn(64, 32).bfloat16() * 0.6
    b = ((torch.randint(0, 2, (512, 32)) * 2 - 1) * 2e-4).bfloat16()
    exact, part = x.double() @ weight.double().t(), thin.double() @ b.double().t()

    def survives(y: Tensor) -> float:
        return (((y.double() - exact) * part).sum() / part.square().sum()).item()

    product = speed.lean_product(x, 512, packed, state.absmax, None, None, None)
    assert survives((product + thin @ b.t()).bfloat16()) == pytest.approx(1, abs=0.05)
    onto_a_rounded_product = torch.addmm(x @ weight.t(), thin, b.t())
    assert survives(onto_a_rounded_product) < 0.5


def test_a_lean_layer_rounds_the_sum_of_both_products_once(adapted) -> None:
    """As the test above, through a layer of the model, in bf16."""
    layer = next(m for m in adapted.modules() if isinstance(m, LoraLinear4bit))
    speed.use_lean_lora(adapted.eval())
    base, name = layer.base_layer, layer.active_adapters[0]
    weight = dequantize_4bit(base.weight.data, base.weight.quant_state).bfloat16().double()
    a, b = layer.lora_A[name].weight.data, layer.lora_B[name].weight.data
    a.copy_(torch.randn_like(a) * 0.06)
    b.copy_((torch.randint(0, 2, b.shape) * 2 - 1) * 2e-4)
    x = torch.randn(4096, layer.in_features).bfloat16() * 20
    thin = nn.functional.linear(x, a.bfloat16()).double()
    part = thin @ b.bfloat16().double().t() * layer.scaling[name]
    off = layer(x).double() - x.double() @ weight.t()
    assert ((off * part).sum() / part.square().sum()).item() == pytest.approx(1, abs=0.05)


def test_a_bias_is_not_lost(adapted) -> None:
    """A lean layer has none: one with a bias stays peft's."""
    ids = torch.randint(20, 900, (1, 8), generator=torch.Generator().manual_seed(3))
    layer = next(m for m in adapted.modules() if isinstance(m, LoraLinear4bit))
    layer.base_layer.bias = nn.Parameter(torch.ones(layer.out_features), requires_grad=False)
    logits = adapted(input_ids=ids).logits
    assert speed.use_lean_lora(adapted) == 4 * adapted.config.num_hidden_layers - 1
    torch.testing.assert_close(adapted(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("nested", [True, False], ids=["double", "once"])
def test_the_lean_product_and_its_gradient_are_the_plain_one_s(nested: bool) -> None:
    torch.manual_seed(0)
    packed, state = quantize_4bit(torch.randn(96, 64), quant_type="nf4", compress_statistics=nested)
    second = (state.state2.absmax, state.state2.code, state.offset) if nested else (None,) * 3
    x = torch.randn(5, 64, requires_grad=True)
    y = speed.lean_product(x, 96, packed, state.absmax, *second)
    plain = x @ dequantize_4bit(packed, state).t()
    torch.testing.assert_close(y, plain)
    ours, theirs = (torch.autograd.grad(v.square().sum(), x) for v in (y, plain))
    torch.testing.assert_close(ours, theirs)
    torch.library.opcheck(speed.lean_product, (x, 96, packed, state.absmax, *second))


def test_masks_follow_torch_s_generator_and_checkpointing_sees_them_again(adapted) -> None:
    ids = torch.randint(20, 900, (2, 24), generator=torch.Generator().manual_seed(3))
    for layer in adapted.modules():
        if isinstance(layer, LoraLinear4bit):
            layer.lora_dropout["default"] = nn.Dropout(0.3)
    speed.use_lean_lora(adapted)
    torch.manual_seed(7)
    logits, grads = logits_and_gradients(adapted, ids)
    assert not torch.equal(logits_and_gradients(adapted, ids)[0], logits)
    adapted.gradient_checkpointing_enable({"use_reentrant": False})
    adapted.enable_input_require_grads()
    torch.manual_seed(7)
    again, checkpointed = logits_and_gradients(adapted, ids)
    assert torch.equal(again, logits)
    torch.testing.assert_close(checkpointed, grads)
    state = torch.get_rng_state()
    adapted.eval()(input_ids=ids)
    assert torch.equal(torch.get_rng_state(), state), "an evaluation draws nothing"


def by_hand(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    """What the packed kernel computes, row by row."""
    rows = []
    for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        qi, ki, vi = (t[:, :, a:b] for t in (q, k, v))
        ki, vi = (t.expand(-1, q.shape[1], -1, -1) for t in (ki, vi))
        rows.append(scaled_dot_product_attention(qi, ki, vi, is_causal=True)[0])
    return torch.cat(rows, 1).transpose(0, 1).flatten(1)[None]


@pytest.mark.parametrize("given", [True, False], ids=["starts", "positions"])
def test_packed_rows_do_not_see_each_other(adapted, monkeypatch, given: bool) -> None:
    """The kernel is a GPU's; everything around it runs here."""
    monkeypatch.setattr(falcon, "packed_attention", by_hand)
    use_fused_attention(adapted)
    rows = [torch.randint(20, 900, (n,)) for n in (7, 12, 5)]
    alone = torch.cat([adapted(input_ids=row[None]).logits[0] for row in rows])
    body = next(m for m in adapted.modules() if isinstance(m, FalconModel))
    body.starts_hook = body.register_forward_pre_hook(speed.hand_over_starts, with_kwargs=True)
    batch = {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
    }
    starts = {"cu_seq_lens_q": torch.tensor([0, 7, 19, 24], dtype=torch.int32), "max_length_q": 12}
    packed = adapted(**batch, **(starts if given else {})).logits[0]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    undo_mends(adapted)
    assert not body._forward_pre_hooks
    leaky = adapted(**batch).logits[0]
    assert (leaky - alone).abs().max() > 0.1, "without the hook a row sees those before it"


def test_padded_batches_pass_the_hook_and_long_rows_are_refused() -> None:
    positions, mask = torch.arange(3000)[None], torch.ones(1, 3000)
    padded = {"attention_mask": mask, "position_ids": positions}
    assert speed.hand_over_starts(None, (), padded)[1] is padded
    with pytest.raises(ValueError, match="a row of 3000 tokens is too long to pack"):
        speed.hand_over_starts(None, (), {"position_ids": positions})


def test_packing_is_refused_below_capability_8(monkeypatch) -> None:
    trainer = SimpleNamespace(model=nn.Sequential(), data_collator=SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(speed, "MultiQueryAttention", nn.Sequential)
    with pytest.raises(ValueError, match="packed rows need a GPU of capability 8.0"):
        speed.use_packed_rows(trainer)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    speed.use_packed_rows(trainer)
    assert trainer.data_collator.padding_free


def test_a_machine_gets_what_it_allows(monkeypatch) -> None:
    from helpers.profiles import T4

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(mends, "compiling_fault", lambda device: "")
    assert choose_mends(TINY, 6) == choose_mends(T4, 0) == choose_mends(A100, 0) == Mends()
    assert choose_mends(T4, 32) == Mends(lean=True, compiled=True)  # its attention packs nothing
    assert choose_mends(A100, 32) == Mends(True, True, True)
    assert choose_mends(A100, 32, packed=False, compiled=False) == Mends(lean=True)
    with pytest.raises(ValueError, match="PACKED = True needs a GPU of capability 8.0"):
        choose_mends(T4, 32, packed=True)
    with pytest.raises(ValueError, match="FP8 = True needs a GPU of capability 9.0"):
        choose_mends(A100, 32, float8=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_mends(A100, 32) == Mends(True, True, True)  # DDP: each card holds all
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert choose_mends(A100, 32) == Mends()
    use_mends(None, Mends())


def test_micro_batches_are_even_and_a_step_keeps_its_rows() -> None:
    lengths = torch.randint(48, 525, (172,), generator=torch.Generator().manual_seed(1)).tolist()
    plain = row_order(lengths, 64, 6, seed=2)
    packed = row_order(lengths, 64, 6, seed=2, packed=16)
    for step in range(0, 384, 64):
        assert sorted(plain[step : step + 64]) == sorted(packed[step : step + 64])
        sizes = [
            sum(lengths[i] for i in packed[a : a + 16]) for a in range(step, step + 64, 16)
        ]  # fmt: skip
        assert max(sizes) < 1.02 * min(sizes), sizes
    assert sorted(deal_evenly([3, 2, 2, 1], 4)) == [0, 1, 2, 3]


def test_nf4_unpacks_bit_for_bit_as_bitsandbytes_does(adapted) -> None:
    from bitsandbytes.functional import dequantize_4bit

    speed.use_lean_lora(adapted)
    assert speed.use_float8(adapted) > 0
    for layer in [m for m in adapted.modules() if isinstance(m, speed.LeanLora)][:4]:
        parts = [getattr(layer, "q_" + part) for part in speed.PARTS]
        weight = layer.base_layer.weight
        expected = dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(speed.unpack(*parts, layer.q_shape), expected)
        assert layer.q_peak == expected.abs().max()
    assert speed.use_float8(adapted, on=False) == 0
    assert not any(hasattr(m, "q_w") for m in adapted.modules())


def test_a_product_in_fp8_is_close_forward_and_backward(adapted, monkeypatch) -> None:
    def plain(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, out_dtype, **_) -> Tensor:
        assert a.dtype == b.dtype == torch.float8_e4m3fn and b.stride(0) == 1
        return ((a.float() * a_scale) @ (b.float() * b_scale)).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", plain)
    speed.use_lean_lora(adapted)
    speed.use_float8(adapted)
    layer = next(m for m in adapted.modules() if isinstance(m, speed.LeanLora))
    x = torch.randn(2, 5, layer.in_features, requires_grad=True)
    results = []
    for product in (lambda x: speed.product8(layer, x), layer.base_layer):
        y = product(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        results.append((y.detach(), grad))
    for ours, exact in zip(*results, strict=True):
        assert 0 < (ours - exact).norm() < 0.08 * exact.norm()


def test_a_second_run_fills_what_the_first_lacked() -> None:
    def pace(value: float, peak: float) -> dict:
        return {"useful_tokens_per_s": {"value": value}, "peak_gib": peak}

    first = {
        "seed": pace(100, 16),
        "ablation": {"8 x 8 rows": pace(400, 8), "late": {"error": "x"}},
    }
    second = {"ablation": {"8 x 8 rows, checkpointing": pace(300, 4)}}
    old = {"commit": "x", "ablation": {"8 x 8 rows": pace(200, 9)}, "second_run": second}
    both = benchmark.joined(first, old, note="old")
    assert list(both["ablation"]) == ["8 x 8 rows"]
    assert both["second_run"] == {"commit": "x", "ablation": {}, "note": "old"}
    assert both["third_run"] == second
    assert both["memory_points"] == {
        "8 x 8 rows": {"share_of_seed_peak": 0.5, "ratio": 4},
        "8 x 8 rows, checkpointing": {"share_of_seed_peak": 0.25, "ratio": 3},
    }
