"""NF4 by hand against bitsandbytes, sizes against what layers hold, and the silent 16 bits."""

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from einops import rearrange
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FalconConfig, FalconForCausalLM

from helpers.falcon import assert_quantized, quantize_falcon_linears
from helpers.nf4 import (
    NF4_LEVELS,
    count_linear_weights,
    dequantize_nf4,
    fp4_levels,
    model_bytes_by_part,
    nf4_levels,
    predicted_bits,
    quantize_nf4,
    quantize_with,
    read_weight,
    stored_bytes,
    stored_parts,
    uniform_levels,
    weight_map,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 64}


def bitsandbytes_codes(weight: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """The other road: quantize, then unpack two indices from each byte."""
    packed, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
    codes = rearrange([packed >> 4, packed & 15], "two n 1 -> (n two)")
    return codes.reshape(-1, block_size), state.absmax


def assert_same_codes(weight: Tensor, block_size: int = 64) -> Tensor:
    codes, absmax = quantize_nf4(weight, block_size)
    expected, scales = bitsandbytes_codes(weight, block_size)
    assert torch.equal(codes, expected)
    assert torch.equal(absmax, scales)
    return codes


def load(folder: Path, double_quant: bool = True, **kwargs) -> nn.Module:
    """What the article's cell does, with today's transformers and nothing mended."""
    wanted = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=wanted, dtype=torch.float32, device_map={"": "cpu"}, **kwargs
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small random Falcon in bf16, in several shards."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("falcon")
    model = FalconForCausalLM(FalconConfig(**SMALL)).bfloat16()
    model.save_pretrained(path, max_shard_size="200KB")
    return path


@pytest.fixture(scope="module", params=[True, False], ids=["double", "single"])
def quantized(folder, request) -> tuple[nn.Module, bool]:
    with quantize_falcon_linears():
        return load(folder, double_quant=request.param), request.param


# Levels


def test_levels_are_bitsandbytes_table_bit_for_bit():
    assert torch.equal(nf4_levels(), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(NF4_LEVELS, nf4_levels())


def test_levels_are_what_scipy_gives():
    drawn_up = bnb.create_normal_map()  # 256 long: the 16 levels, and zeros as padding
    assert torch.equal(nf4_levels(), drawn_up.unique())


def test_another_offset_gives_other_levels():
    assert not torch.equal(nf4_levels(0.99), NF4_LEVELS)
    assert nf4_levels(0.99).diff().min() > 0


@pytest.mark.parametrize("offset", [0.5, 1.0, 2.0, -0.1])
def test_an_offset_that_is_no_upper_probability_is_refused(offset):
    with pytest.raises(ValueError, match="between 0.5 and 1"):
        nf4_levels(offset)


def test_fp4_levels_are_bitsandbytes_values():
    assert torch.equal(fp4_levels(), bnb.get_4bit_type("fp4", device="cpu").unique())


def test_only_the_uniform_levels_are_evenly_spaced():
    gaps = {
        "uniform": uniform_levels().diff(),
        "nf4": NF4_LEVELS.diff(),
        "fp4": fp4_levels().diff(),
    }
    widest = {name: (gap.max() / gap.min()).item() for name, gap in gaps.items()}
    assert widest["uniform"] == pytest.approx(1, abs=1e-5)
    assert widest["nf4"] > 3
    assert widest["fp4"] > 3


# Codes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_random_weights_get_the_same_codes(dtype, block_size):
    torch.manual_seed(0)
    weight = (torch.randn(96, 512) * 0.02).to(dtype)
    codes = assert_same_codes(weight, block_size)
    assert codes.unique().numel() == 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 3.0, 0.0371])
def test_values_halfway_between_levels_get_the_same_codes(dtype, scale):
    halfway = ((NF4_LEVELS[:-1] + NF4_LEVELS[1:]) / 2 * scale).to(dtype)
    up = torch.nextafter(halfway, torch.full_like(halfway, 9.0))
    down = torch.nextafter(halfway, torch.full_like(halfway, -9.0))
    block = torch.zeros(64, dtype=dtype)
    block[:45] = torch.cat([halfway, up, down])
    block[63] = scale
    assert_same_codes(block)


def test_a_tie_goes_to_the_lower_level():
    block = torch.zeros(64)
    block[:15] = (NF4_LEVELS[:-1] + NF4_LEVELS[1:]) / 2
    block[63] = 1.0
    codes = assert_same_codes(block)
    assert codes[0, :15].tolist() == list(range(15))


@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_themselves_come_back(dtype):
    block = NF4_LEVELS.repeat(4).to(dtype)
    assert assert_same_codes(block)[0].tolist() == list(range(16)) * 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_zeros_get_the_code_of_zero(dtype):
    weight = torch.zeros(3, 64, dtype=dtype)
    weight[1] = torch.linspace(-1, 1, 64)
    codes = assert_same_codes(weight)
    assert codes[0].unique().tolist() == codes[2].unique().tolist() == [7]


@pytest.mark.parametrize("size", [1e-44, 1e-40, 1e-38, 1e-30, 1e30, 3e38])
def test_tiny_and_huge_weights_get_the_same_codes(size):
    torch.manual_seed(0)
    assert_same_codes((torch.rand(4, 64) * 2 - 1) * size)


def test_a_block_knows_nothing_of_its_neighbours():
    torch.manual_seed(0)
    weight = torch.randn(2, 64)
    alone, _ = quantize_nf4(weight[0])
    weight[1] *= 1000
    together = assert_same_codes(weight)
    assert torch.equal(together[0], alone[0])


def test_blocks_run_across_rows_and_follow_strides():
    torch.manual_seed(0)
    assert_same_codes(torch.randn(6, 32))  # a block is two rows
    codes, _ = quantize_nf4(torch.randn(64, 32).T)
    assert codes.shape == (32, 64)


def test_only_the_largest_absolute_value_is_used():
    torch.manual_seed(0)
    block = torch.randn(64)
    codes, absmax = quantize_nf4(block)
    scaled_codes, scaled_absmax = quantize_nf4(8 * block)
    assert torch.equal(codes, scaled_codes)
    assert torch.equal(8 * absmax, scaled_absmax)
    assert not torch.equal(codes, quantize_nf4(block + 1)[0])


def test_fp4_by_the_same_road_restores_bitsandbytes_values():
    torch.manual_seed(0)
    weight = torch.randn(32, 64)
    codes, absmax = quantize_with(weight, fp4_levels())
    expected = bnb.dequantize_4bit(*bnb.quantize_4bit(weight, blocksize=64, quant_type="fp4"))
    restored = dequantize_nf4(codes, absmax, fp4_levels())
    assert torch.allclose(restored, expected, rtol=1e-3, atol=0)  # its CPU table is rounded to 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_restored_values_are_bitsandbytes_values(dtype):
    torch.manual_seed(0)
    weight = torch.randn(32, 128).to(dtype)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    restored = dequantize_nf4(*quantize_nf4(weight), dtype=dtype).reshape(weight.shape)
    assert torch.equal(restored, bnb.dequantize_4bit(packed, state))


def rms(values: Tensor, levels: Tensor) -> float:
    codes, absmax = quantize_with(values, levels)
    restored = dequantize_nf4(codes, absmax, levels).reshape(values.shape)
    return (restored - values).square().mean().sqrt().item()


def test_nf4_rounds_normal_values_best_and_uniform_values_not():
    torch.manual_seed(0)
    normal, flat = torch.randn(2**16), torch.rand(2**16) * 2 - 1
    assert rms(normal, NF4_LEVELS) < 0.95 * rms(normal, uniform_levels())
    assert rms(normal, NF4_LEVELS) < 0.95 * rms(normal, fp4_levels())
    assert rms(flat, uniform_levels()) < 0.95 * rms(flat, NF4_LEVELS)


@pytest.mark.parametrize(
    ("weight", "block_size", "words"),
    [
        (torch.zeros(65), 64, "65 values do not fill blocks of 64"),
        (torch.zeros(64), 0, "do not fill blocks of 0"),
        (torch.zeros(64, dtype=torch.int8), 64, "not torch.int8"),
        (torch.full((64,), float("nan")), 64, "NaN or infinity"),
        (torch.full((64,), float("inf")), 64, "NaN or infinity"),
    ],
)
def test_bad_weights_are_refused_in_a_sentence(weight, block_size, words):
    with pytest.raises(ValueError, match=words):
        quantize_nf4(weight, block_size)


def test_scales_that_do_not_fit_the_codes_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        dequantize_nf4(torch.zeros(2, 64, dtype=torch.uint8), torch.zeros(3))


# Sizes


def test_falcon_7b_has_6_625_951_744_weights_to_quantize():
    config = FalconConfig()
    with torch.device("meta"):
        model = FalconForCausalLM(config)
    linears = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert len(linears) == 128
    assert count_linear_weights(config) == sum(m.weight.numel() for m in linears) == 6_625_951_744


@pytest.mark.parametrize(
    "shape",
    [
        {"multi_query": True},
        {"multi_query": False},
        {"new_decoder_architecture": True, "num_kv_heads": 1},
        {"multi_query": True, "ffn_hidden_size": 96},
    ],
)
def test_linear_weights_of_other_falcons(shape):
    config = FalconConfig(**SMALL, **shape)
    with torch.device("meta"):
        layers = FalconForCausalLM(config).transformer.h
    linears = [m for m in layers.modules() if isinstance(m, nn.Linear)]
    assert count_linear_weights(config) == sum(m.weight.numel() for m in linears)


@pytest.mark.parametrize("double_quant", [True, False])
def test_predicted_bits_are_what_a_large_weight_costs(double_quant):
    weight = torch.randn(512, 1024)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant
    )
    held = packed.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if double_quant else 0)
    assert held * 8 / weight.numel() == predicted_bits(double_quant)


def test_stored_bytes_are_what_a_checkpoint_of_the_model_would_hold(quantized):
    model, double_quant = quantized
    kinds = ("weight", "absmax", "nested_absmax", "quant_map", "nested_quant_map")
    saved = [
        tensor.nbytes
        for layer in model.modules()
        if isinstance(layer, Linear4bit)
        for name, tensor in layer.state_dict().items()
        if name.split(".")[-1] in kinds
    ]
    offsets = 4 * 8 if double_quant else 0  # one float32 mean per layer, saved as text
    assert stored_bytes(model) == sum(saved) + offsets


def test_what_grows_with_the_weights_is_within_one_percent_of_the_prediction(quantized):
    model, double_quant = quantized
    parts = stored_parts(model)
    constants = parts.pop("constants")
    predicted = count_linear_weights(model.config) * predicted_bits(double_quant) / 8
    assert sum(parts.values()) == pytest.approx(predicted, rel=0.01)
    assert parts["codes"] * 2 == count_linear_weights(model.config)
    assert constants <= 8 * (16 * 4 + 256 * 4 + 4)
    assert (parts["group_scales"] > 0) is double_quant


def test_an_adapter_changes_nothing_in_the_count(folder):
    with quantize_falcon_linears():
        model = load(folder)
    before = stored_parts(model)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["query_key_value", "dense"]))
    assert stored_parts(adapted) == before


@pytest.mark.parametrize("module", [nn.Linear(64, 64), Linear4bit(64, 64)], ids=["plain", "empty"])
def test_a_model_without_quantized_weights_is_refused(module):
    with pytest.raises(ValueError, match="no Linear4bit layer holds a quantized weight"):
        stored_bytes(module)


def test_parts_add_up_to_the_model(folder, quantized):
    plain = FalconForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    parts = model_bytes_by_part(plain)
    assert sum(parts.values()) == sum(p.nbytes for p in plain.parameters())
    assert parts["linears"] == 2 * count_linear_weights(plain.config)
    model, _ = quantized
    assert model_bytes_by_part(model)["linears"] == stored_bytes(model)
    assert model_bytes_by_part(model)["embedding"] == 64 * 128 * 4  # float32: the compute dtype


# Checkpoint files


def one_file(folder: Path, target: Path, sharded: bool, safetensors: bool) -> dict[str, Tensor]:
    """Write the small Falcon again, as another kind of checkpoint."""
    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
    stem, ending = ("model", ".safetensors") if safetensors else ("pytorch_model", ".bin")
    names = list(tensors)
    halves = [names[::2], names[1::2]] if sharded else [names]
    where = {}
    for number, half in enumerate(halves, start=1):
        file = f"{stem}-{number:05}-of-00002{ending}" if sharded else f"{stem}{ending}"
        where |= dict.fromkeys(half, file)
        half_tensors = {name: tensors[name] for name in half}
        (save_file if safetensors else torch.save)(half_tensors, target / file)
    if sharded:
        (target / f"{stem}{ending}.index.json").write_text(json.dumps({"weight_map": where}))
    return tensors


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("safetensors", [True, False])
def test_every_kind_of_checkpoint_is_read(folder, tmp_path, sharded, safetensors):
    tensors = one_file(folder, tmp_path, sharded, safetensors)
    files = weight_map(str(tmp_path))
    assert set(files) == set(tensors)
    assert len(set(files.values())) == (2 if sharded else 1)
    name = "transformer.h.1.mlp.dense_4h_to_h.weight"
    weight = read_weight(str(tmp_path), ".h.1.mlp.dense_4h_to_h.weight")
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, tensors[name])


def test_a_folder_without_weights_and_a_weight_nobody_has(folder, tmp_path):
    with pytest.raises(OSError, match="set MODEL to a local folder"):
        weight_map(str(tmp_path))
    with pytest.raises(KeyError, match="ends in '.h.99.dense'"):
        read_weight(str(folder), ".h.99.dense")


# The trap


def test_without_the_mend_falcon_stays_in_16_bits_and_says_it_does_not(folder):
    model = load(folder)
    assert model.is_loaded_in_4bit, "transformers no longer claims it: look at the mend again"
    count = sum(isinstance(module, Linear4bit) for module in model.modules())
    assert count == 0, "transformers quantizes Falcon by itself: quantize_falcon_linears can go"
    with pytest.raises(AssertionError, match="no 4-bit layer"):
        assert_quantized(model)
    with pytest.raises(ValueError, match="no Linear4bit layer"):
        stored_bytes(model)


def test_with_the_mend_every_linear_holds_the_codes_of_the_checkpoint(folder):
    with quantize_falcon_linears():
        model = load(folder)
    assert assert_quantized(model) == 4 * SMALL["num_hidden_layers"]
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            assert layer.weight.dtype == torch.uint8
            codes, _ = quantize_nf4(read_weight(str(folder), f"{name}.weight"))
            packed = layer.weight.data
            stored = rearrange([packed >> 4, packed & 15], "two n 1 -> (n two)")
            assert torch.equal(codes.flatten(), stored)
