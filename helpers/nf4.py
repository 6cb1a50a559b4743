"""NF4 by hand: the 16 levels, rounding block by block, and what the stored weights weigh.

Written to be read beside bitsandbytes, which does the same with fused kernels and packs two
indices into one byte; `tests/test_nf4.py` holds the two against each other, bit for bit. NF4
is not a float encoding: an index has no sign, exponent or mantissa, it is a place in a table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file, logging

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def nf4_levels(offset: float = 0.9677083) -> Tensor:
    """The 16 NF4 levels, from quantiles of the normal distribution.

    Seven levels below zero, zero itself and eight above it: the quantile function is taken
    at evenly spaced *probabilities*, so the levels themselves are not evenly spaced. All are
    divided by the largest, so that the two ends are -1 and 1.

    Args:
        offset: the outermost probability; 1 would put the outermost level at infinity.

    Returns:
        (16,) float32, ascending, from -1 to 1, with 0 at index 7.

    Source:
        bitsandbytes 0.50.2, `create_normal_map` (scipy's `norm.ppf` there, torch's float64
        `ndtri` here); Dettmers et al. (2023), QLoRA, section 3: https://arxiv.org/abs/2305.14314

    Example:
        >>> levels = nf4_levels()
        >>> levels[0].item(), levels[7].item(), levels[15].item()
        (-1.0, 0.0, 1.0)
        >>> (levels < 0).sum().item(), (levels > 0).sum().item()    # 7 + 1 + 8 = 16
        (7, 8)
    """
    if not 0.5 < offset < 1:
        raise ValueError(f"offset is a probability between 0.5 and 1, not {offset}")
    upper = torch.special.ndtri(torch.linspace(offset, 0.5, 9)[:-1].double())  # 8 above zero
    lower = -torch.special.ndtri(torch.linspace(offset, 0.5, 8)[:-1].double())  # 7 below zero
    levels = torch.cat([lower, torch.zeros(1), upper.flip(0)]).float()
    return levels / levels.max()


NF4_LEVELS = nf4_levels()


def uniform_levels() -> Tensor:
    """16 evenly spaced levels, for comparison; zero is not among them.

    Returns:
        (16,) float32, ascending, from -1 to 1.

    Example:
        >>> levels = uniform_levels()
        >>> round((levels[1] - levels[0]).item() * 15, 4)    # 15 gaps share a width of 2
        2.0
    """
    return torch.linspace(-1, 1, 16)


def fp4_levels() -> Tensor:
    """The 15 distinct values of bitsandbytes' 4-bit float, for comparison.

    One sign bit, two exponent bits and one mantissa bit make 16 patterns; two of them mean
    zero.

    Returns:
        (15,) float32, ascending, from -1 to 1.

    Source:
        bitsandbytes 0.50.2, `get_4bit_type("fp4")`.

    Example:
        >>> fp4_levels()[8:].mul(12).tolist()    # the positive half, in twelfths
        [0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0]
    """
    half = torch.tensor([0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0]) / 12
    return torch.cat([-half.flip(0), torch.zeros(1), half])


def quantize_with(weight: Tensor, levels: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Round every value of a weight to the nearest of any ascending levels, block by block.

    A value halfway between two levels goes to the lower one. The division is a product with
    the reciprocal: one rounding differs, and with it now and then the side of a halfway point.

    Args:
        weight: any shape; float16, bfloat16 or float32. The number of elements must be a
            multiple of `block_size`.
        levels: (n_levels,) float32, ascending, within [-1, 1].
        block_size: how many consecutive values share one scale.

    Returns:
        codes: (n_blocks, block_size) uint8, each from 0 to n_levels - 1.
        absmax: (n_blocks,) float32, one scale per block, in the unit of `weight`.

    Raises:
        ValueError: if the dtype is another one, the blocks do not divide the weight evenly,
            or the weight holds NaN or infinity.

    Example:
        >>> codes, absmax = quantize_with(torch.tensor([0.5, 2]), torch.tensor([0, 0.5, 1]), 2)
        >>> codes.tolist()    # 0.5 / 2.0 = 0.25 is halfway between levels 0 and 1
        [[0, 2]]
    """
    if weight.dtype not in FLOATS:
        raise ValueError(f"a weight is float16, bfloat16 or float32, not {weight.dtype}")
    if block_size < 1 or weight.numel() % block_size:
        raise ValueError(f"{weight.numel()} values do not fill blocks of {block_size}")
    blocks = weight.detach().float().reshape(-1, block_size).contiguous()
    absmax = blocks.abs().amax(dim=1)
    if not absmax.isfinite().all():
        raise ValueError("the weight holds NaN or infinity: load a sound checkpoint")
    scaled = blocks * (1.0 / absmax.clamp_min(1e-38)).unsqueeze(1)
    levels = levels.to(scaled.device)
    halfway = (levels[:-1] + levels[1:]) / 2
    return torch.bucketize(scaled, halfway).to(torch.uint8), absmax


def quantize_nf4(weight: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Round every value of a weight to the nearest of the 16 NF4 levels, block by block.

    Each block is divided by its largest absolute value, so that it lies in [-1, 1]; each
    value then becomes the index of the nearest level. Neither the mean nor the spread of the
    block is used. Written to be read: bitsandbytes finds the same indices and packs two of
    them into one byte.

    Args:
        weight: any shape; float16, bfloat16 or float32. The number of elements must be a
            multiple of `block_size`.
        block_size: how many consecutive values share one scale.

    Returns:
        codes: (n_blocks, block_size) uint8, each from 0 to 15.
        absmax: (n_blocks,) float32, one scale per block, in the unit of `weight`.

    Raises:
        ValueError: as `quantize_with`.

    Source:
        Dettmers et al. (2023), QLoRA, section 3: https://arxiv.org/abs/2305.14314

    Example:
        >>> codes, absmax = quantize_nf4(torch.tensor([0.0, 0.5, -2.0, 1.0]), block_size=4)
        >>> codes.tolist(), absmax.tolist()    # 0.5 / 2.0 = 0.25, nearest level 10
        ([[7, 10, 0, 12]], [2.0])
    """
    return quantize_with(weight, NF4_LEVELS, block_size)


def dequantize_nf4(
    codes: Tensor, absmax: Tensor, levels: Tensor = NF4_LEVELS, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Turn indices and scales back into values: level times scale.

    Args:
        codes: (n_blocks, block_size) uint8, as `quantize_nf4` returns them.
        absmax: (n_blocks,) float32, one scale per block.
        levels: (n_levels,) float32, the table that the codes point into.
        dtype: of the values; the product itself is always taken in float32.

    Returns:
        (n_blocks, block_size) `dtype`; reshape it to the shape of the weight.

    Raises:
        ValueError: if there is not one scale per block.

    Example:
        >>> codes = torch.tensor([[7, 0, 15, 15]], dtype=torch.uint8)
        >>> dequantize_nf4(codes, torch.tensor([2.0])).tolist()    # 0, -1, 1, 1 times 2
        [[0.0, -2.0, 2.0, 2.0]]
    """
    if codes.ndim != 2 or absmax.shape != codes.shape[:1]:
        raise ValueError(f"{tuple(absmax.shape)} scales do not fit {tuple(codes.shape)} codes")
    return (levels.to(codes.device)[codes.long()] * absmax.unsqueeze(1)).to(dtype)


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration with shapes and no values: it takes no memory.

    Example:
        >>> from transformers import FalconConfig
        >>> on_meta(FalconConfig()).num_parameters()    # Falcon-7B
        6921720704
    """
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def linear_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, int]]:
    """What gets quantized: every linear of the model but the head, whatever its architecture.

    Args:
        config: of any causal language model.

    Returns:
        (out, in) by the name of the layer. GPT-2 writes its weights the other way round; they are
        turned before they are rounded.

    Example:
        >>> from transformers import GPT2Config
        >>> shapes = linear_shapes(GPT2Config(n_embd=8, n_layer=1, n_head=2))
        >>> shapes["transformer.h.0.mlp.c_fc"]
        (32, 8)
    """
    model = on_meta(config)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    layers = {n: m for n, m in layers.items() if m is not model.get_output_embeddings()}
    turned = {n: -1 if isinstance(m, Conv1D) else 1 for n, m in layers.items()}
    return {n: tuple(m.weight.shape[:: turned[n]]) for n, m in layers.items()}


def count_linear_weights(config: PreTrainedConfig) -> int:
    """How many weights the four linears of all decoder layers hold: what gets quantized.

    Not counted, because they stay in 16 bits: the embedding, the head that is tied to it,
    the norms, and biases where there are any.

    Args:
        config: a transformers `FalconConfig`; of another model the shapes are added up.

    Returns:
        The number of weights, not bytes.

    Example:
        >>> from transformers import FalconConfig
        >>> small = FalconConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
        >>> count_linear_weights(small)    # 8*(8+2*4) + 8*8 + 8*32 + 32*8 = 704
        704
    """
    if config.model_type != "falcon":
        return sum(out * into for out, into in linear_shapes(config).values())
    hidden, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    shared = config.multi_query and not config.new_decoder_architecture
    kv_heads = 1 if shared else config.num_kv_heads
    query_key_value = hidden * (hidden + 2 * kv_heads * head)
    dense = hidden * hidden
    mlp = 2 * hidden * config.ffn_hidden_size  # dense_h_to_4h and dense_4h_to_h
    return config.num_hidden_layers * (query_key_value + dense + mlp)


def predicted_bits(double_quant: bool = True, block_size: int = 64, group_size: int = 256) -> float:
    """Bits that one weight costs on average, scales included.

    Args:
        double_quant: True where the scales themselves are rounded to 8 bits, in groups.
        block_size: weights that share one scale.
        group_size: scales that share one 32-bit number.

    Returns:
        Bits per weight.

    Source:
        Dettmers et al. (2023), QLoRA, section 3: https://arxiv.org/abs/2305.14314

    Example:
        >>> predicted_bits(double_quant=False)    # 4 + 32/64
        4.5
        >>> predicted_bits()    # 4 + 8/64 + 32/(64*256)
        4.126953125
    """
    if not double_quant:
        return 4 + 32 / block_size
    return 4 + 8 / block_size + 32 / (block_size * group_size)


def stored_parts(model: nn.Module) -> dict[str, int]:
    """What the `Linear4bit` layers of a model really hold, in bytes, by kind.

    Args:
        model: any module; also one that PEFT has wrapped.

    Returns:
        Bytes by kind: `codes` (two 4-bit indices a byte), `scales` (one per block of 64,
        8-bit under double quantization, else 32-bit), `group_scales` (32-bit, one per 256
        scales; 0 without double quantization) and `constants` (per layer, the tables and the
        mean of the scales, the same however large the layer is). Shared tables count once.

    Raises:
        ValueError: if no layer holds a quantized weight.

    Example:
        >>> from bitsandbytes.nn import Linear4bit
        >>> layer = Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu")
        >>> parts = stored_parts(layer)
        >>> parts["codes"], parts["scales"], parts["group_scales"]    # 4096/2, 4096/64, 4*1
        (2048, 64, 4)
    """
    weights = [p for p in model.parameters() if getattr(p, "quant_state", None) is not None]
    if not weights:
        raise ValueError(
            "no Linear4bit layer holds a quantized weight: use load_falcon(..., quantize=True)"
        )
    parts = {"codes": 0, "scales": 0, "group_scales": 0, "constants": 0}
    constants = {}
    for weight in weights:
        state, nested = weight.quant_state, weight.quant_state.state2
        parts["codes"] += weight.data.nbytes
        parts["scales"] += state.absmax.nbytes
        tables = [state.code]
        if nested is not None:
            parts["group_scales"] += nested.absmax.nbytes
            tables += [nested.code, state.offset]
        constants.update({table.data_ptr(): table.nbytes for table in tables})
    return parts | {"constants": sum(constants.values())}


def stored_bytes(model: nn.Module) -> int:
    """Bytes that the `Linear4bit` layers of a model really hold: the sum of `stored_parts`.

    Args:
        model: any module; also one that PEFT has wrapped.

    Returns:
        Bytes, without the embedding, the norms and any adapter.

    Raises:
        ValueError: if no layer holds a quantized weight.

    Example:
        >>> from bitsandbytes.nn import Linear4bit
        >>> layer = Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu")
        >>> stored_bytes(layer) == sum(stored_parts(layer).values())
        True
    """
    return sum(stored_parts(model).values())


def model_bytes_by_part(model: nn.Module) -> dict[str, int]:
    """Bytes of a model's parameters: linears, embeddings and head, norms and biases.

    A tied head counts once, with the embedding. Scales and tables of quantized weights count
    with the linears. Buffers, gradients and optimizer state are not parameters.

    Args:
        model: quantized or not; one on the meta device costs no memory.

    Returns:
        Bytes under `linears`, `embedding` and `norms`.

    Example:
        >>> from transformers import FalconConfig
        >>> small = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=10)
        >>> model = on_meta(FalconConfig(**small))
        >>> model_bytes_by_part(model)    # 704 * 2, 10*8 * 2, 2 norms * 2*8 * 2
        {'linears': 1408, 'embedding': 160, 'norms': 64}
    """
    parts = {"linears": 0, "embedding": 0, "norms": 0}
    packed, head = 0, model.get_output_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) or m is head]
    tables = {id(p) for m in tables for p in m.parameters(recurse=False)}
    for parameter in model.parameters():
        if getattr(parameter, "quant_state", None) is not None:
            packed += 1
        elif id(parameter) in tables:
            parts["embedding"] += parameter.nbytes
        else:
            parts["linears" if parameter.ndim == 2 else "norms"] += parameter.nbytes
    if packed:
        parts["linears"] += stored_bytes(model)
    return parts


def weight_map(model: str, revision: str | None = None) -> dict[str, str]:
    """Which file of a checkpoint holds which weight, read from its index.

    Args:
        model: Hub id or folder; of a Hub id only the index is fetched, if there is one.
        revision: commit or branch on the Hub.

    Returns:
        The name of the file for the name of each weight; safetensors before `.bin`. The same
        file for all where the checkpoint is not sharded.

    Raises:
        OSError: if there are no weights, or they cannot be fetched.

    Example:
        >>> from helpers.profiles import TINY
        >>> files = weight_map(TINY.model)
        >>> files["transformer.word_embeddings.weight"].endswith(".safetensors")
        True
    """
    for name in WEIGHT_FILES:
        try:
            path = cached_file(model, name, revision=revision)
        except OSError:
            continue
        if name.endswith(".json"):
            return json.loads(Path(path).read_text())["weight_map"]
        return dict.fromkeys(_open_weights(path).keys(), name)
    raise OSError(
        f"no weights found for {model!r}: connect to the network, or set MODEL to a local "
        "folder with safetensors or .bin files"
    )


def _open_weights(path: str) -> object:
    """Open a weight file without reading it: an object with `keys()` and the tensors."""
    if path.endswith(".safetensors"):
        return safe_open(path, framework="pt")
    return torch.load(path, map_location="cpu", mmap=is_zipfile(path), weights_only=True)


@contextmanager
def shard_bars(files: dict[str, str]) -> Iterator[None]:
    """While open, transformers reads a checkpoint shard by shard, with a progress bar for each.

    Left alone it shows one bar for all weights and takes them by name, from shards in turns.

    Args:
        files: which file holds which weight, as `weight_map` tells.

    Example:
        >>> weight = type("Weight", (), {"source_patterns": ["w"]})
        >>> with shard_bars({"w": "model-00001-of-00001.safetensors"}):
        ...     [name for name, _ in logging.tqdm([("w", weight)], desc="Loading weights")]
        ['w']
    """

    def bars(bar: type, args: tuple, kwargs: dict) -> object:
        shards: dict[str, list] = {}
        for name, weight in args[0] if kwargs.get("desc") == "Loading weights" else ():
            shards.setdefault(files.get(weight.source_patterns[0], ""), []).append((name, weight))
        each = (bar(shards[file], desc=file or kwargs["desc"]) for file in sorted(shards))
        return chain.from_iterable(each) if shards else bar(*args, **kwargs)

    before = logging.set_tqdm_hook(bars)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def read_weight(
    model: str, ending: str, revision: str | None = None, shape: tuple[int, int] | None = None
) -> Tensor:
    """Read one weight as it lies in the checkpoint, not the rest of the model.

    Args:
        model: Hub id or folder; of a Hub id one shard is fetched.
        ending: how the weight's name ends, such as ".h.0.self_attention.dense.weight"; a whole
            name also finds it where the checkpoint leaves out the front, as GPT-2's does.
        revision: commit or branch on the Hub.
        shape: turns a weight that lies the other way round, as in GPT-2.

    Returns:
        The first weight of that name, on the CPU, in the dtype it is stored in.

    Raises:
        KeyError: if no weight has such a name.
        OSError: if the file cannot be fetched.

    Example:
        >>> from helpers.profiles import TINY
        >>> read_weight(TINY.model, ".h.0.self_attention.dense.weight").dtype
        torch.bfloat16
    """
    files = weight_map(model, revision)
    name = next((n for n in files if n.endswith(ending) or ending.endswith(f".{n}")), None)
    if name is None:
        raise KeyError(f"{model} has no weight that ends in {ending!r}")
    opened = _open_weights(cached_file(model, files[name], revision=revision))
    weight = opened.get_tensor(name) if hasattr(opened, "get_tensor") else opened[name]
    return weight if shape in (None, tuple(weight.shape)) else weight.T.contiguous()
