"""Falcon in four bits, really: loading, the proof, and attention as Falcon means it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Cache,
    FalconConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StaticCache,
)
from transformers.models.falcon import modeling_falcon

from helpers.nf4 import shard_bars, weight_map
from helpers.profiles import Profile

OLD_KEYS = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_kv_heads",
}
FALCON_TYPES = ("falcon", "RefinedWebModel", "RefinedWeb")
MAX_PACKED_LENGTH = 2048  # tokens a row; an upper bound on the longest is all that the kernel needs
LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
_LIBRARY_MASK = modeling_falcon.create_causal_mask


def _explain(error: Exception, model: str, constant: str) -> Exception:
    """Replace a loader's long text by one sentence; keep what is already a sentence of ours."""
    if Path(model).exists():
        return error
    return OSError(
        f"could not fetch {model!r} ({type(error).__name__}): connect to the network, "
        f"or set {constant} to a local folder"
    )


def load_config(model: str, revision: str | None = None) -> PreTrainedConfig:
    """Read a model's configuration without remote code, whatever age its checkpoint has.

    Older copies of Falcon-7B call themselves `RefinedWebModel` and write `n_layer` and `n_head`;
    transformers refuses the first and silently ignores the second.

    Args:
        model: Hub id or folder.
        revision: commit or branch on the Hub.

    Returns:
        `FalconConfig` for any Falcon, else the configuration that `AutoConfig` finds.

    Raises:
        OSError: if it cannot be fetched.

    Example:
        >>> from helpers.profiles import TINY
        >>> load_config(TINY.model).multi_query
        True
    """
    try:
        raw, _ = PreTrainedConfig.get_config_dict(model, revision=revision)
        if raw.get("model_type") not in FALCON_TYPES:
            return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _explain(error, model, "MODEL") from error
    known = {OLD_KEYS.get(key, key): value for key, value in raw.items()}
    for key in ("auto_map", "model_type", "architectures", "transformers_version"):
        known.pop(key, None)
    return FalconConfig(**known)


def load_tokenizer(model: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with a pad token that is not the end-of-text token.

    If pad and end were the same token, a collator that masks padding by id would also mask
    the end, and the model would never learn to stop. Falcon has `>>SUFFIX<<`, which no text
    of ours uses and which needs no new embedding row. Other tokenizers keep their own pad token
    if it is not the end, else get another special one; GPT-2 has none, and its longest token
    takes the part, as a pad vanishes from text: no word must be one.

    Args:
        model: Hub id or folder.
        revision: commit or branch on the Hub.

    Returns:
        The tokenizer; typed special tokens are split into ordinary ones when it is called with
        `split_special_tokens=True`.

    Raises:
        OSError: if it cannot be fetched.
        ValueError: if it has no end-of-text token.

    Example:
        >>> from helpers.profiles import TINY
        >>> tokenizer = load_tokenizer(TINY.model)
        >>> tokenizer.pad_token, tokenizer.eos_token_id
        ('>>SUFFIX<<', 11)
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _explain(error, model, "MODEL") from error
    if (end := tokenizer.eos_token) is None:
        raise ValueError(f"{model} has no end-of-text token, so answers never end: set MODEL")
    special = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    spare = [t for t in tokenizer.get_vocab() if t == ">>SUFFIX<<"]
    spare += [tokenizer.pad_token, *(t for t in special if "pad" in t.lower()), tokenizer.unk_token]
    spare += [t for t in special if t != tokenizer.bos_token][::-1]
    spare += sorted(tokenizer.get_vocab(), key=lambda t: (len(t), t))[::-1]
    tokenizer.pad_token = next(t for t in spare if t not in (None, end))
    return tokenizer


@contextmanager
def quantize_falcon_linears() -> Iterator[None]:
    """While open, Falcon is built from plain `nn.Linear`, which transformers can quantize.

    transformers >= 5.5 puts 4-bit layers only where `type(module) is nn.Linear`. Falcon's
    own layers are a subclass of it, so `load_in_4bit=True` leaves all of them in 16 bits.
    The subclass differs only in rounding: it multiplies and adds in two steps.

    Example:
        >>> with quantize_falcon_linears():
        ...     modeling_falcon.FalconLinear is nn.Linear
        True
    """
    kept = modeling_falcon.FalconLinear
    modeling_falcon.FalconLinear = nn.Linear
    try:
        yield
    finally:
        modeling_falcon.FalconLinear = kept


def assert_quantized(model: PreTrainedModel) -> int:
    """Prove that every linear of every decoder layer holds 4-bit weights.

    `model.is_loaded_in_4bit` is no proof: it repeats what was asked for.

    Args:
        model: a loaded model, with or without an adapter.

    Returns:
        The number of `Linear4bit` layers; for Falcon four in each decoder layer.

    Raises:
        AssertionError: with the first layer that is not quantized.

    Example:
        >>> assert_quantized(nn.Linear(2, 2))
        Traceback (most recent call last):
        ...
        AssertionError: no 4-bit layer at all: load with load_falcon(quantize=True)
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    if not layers:
        raise AssertionError("no 4-bit layer at all: load with load_falcon(quantize=True)")
    for name, layer in layers.items():
        packed = layer.weight.dtype == torch.uint8 or layer.weight.quant_state is not None
        assert packed, f"{name} is a Linear4bit that still holds {layer.weight.dtype} weights"
    head = getattr(model, "get_output_embeddings", str)()
    kinds = (nn.Linear, modeling_falcon.FalconLinear)
    plain = [n for n, m in model.named_modules() if type(m) in kinds and m is not head]
    plain = [n for n in plain if "lora_" not in n]
    assert not plain, f"{len(plain)} linear layers are not quantized, the first is {plain[0]}"
    if model.config.model_type == "falcon":
        expected = len(LINEARS) * model.config.num_hidden_layers
        assert len(layers) == expected, f"{len(layers)} 4-bit layers, expected {expected}"
    return len(layers)


def check_shards(model: str) -> None:
    """Say which shard of a local model folder is missing, before any of them is read.

    Raises:
        FileNotFoundError: with the names of the missing files.

    Example:
        >>> check_shards("a/hub-id")    # nothing local to check
    """
    for index in Path(model).glob("*.index.json") if Path(model).is_dir() else ():
        wanted = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(name for name in wanted if not (Path(model) / name).exists())
        if missing:
            raise FileNotFoundError(
                f"{model} lacks {len(missing)} of {len(wanted)} shards ({', '.join(missing)}): "
                "copy them there, or download the model again"
            )


def nf4_config(profile: Profile, storage: torch.dtype = torch.uint8) -> BitsAndBytesConfig:
    """The article's quantization: NF4, double quantization, the profile's compute dtype.

    `storage` is the dtype that the packed bits are stored under, and changes none of them.

    Example:
        >>> from helpers.profiles import TINY
        >>> nf4_config(TINY).bnb_4bit_quant_type
        'nf4'
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=profile.compute_dtype,
        bnb_4bit_quant_storage=storage,
    )


def load_falcon(
    model: str, profile: Profile, quantize: bool = True, revision: str | None = None,
    storage: torch.dtype = torch.uint8,
) -> PreTrainedModel:  # fmt: skip
    """Load a causal language model, Falcon first of all, in NF4 or in the compute dtype.

    Safetensors shards are preferred, `.bin` shards are read where there are no others: one after
    the other, each with its bar, mapped and not read whole. No remote code is run. On a CPU,
    bitsandbytes' repacking of 4-bit weights for AVX512-BF16 is turned off: it has no backward,
    and training after an evaluation would go wrong.

    Args:
        model: Hub id or folder.
        profile: gives device and compute dtype.
        quantize: False loads the weights in the compute dtype instead.
        revision: commit or branch on the Hub.
        storage: dtype that packed 4-bit weights are stored under; FSDP shards floating point only.

    Returns:
        The model in eval mode on `profile.device`; with `quantize`, proven to be in four bits.

    Raises:
        FileNotFoundError: if a local folder lacks a shard.
        OSError: if it cannot be fetched.
        AssertionError: if a linear layer was not quantized.

    Source:
        Dettmers et al. (2023), QLoRA: https://arxiv.org/abs/2305.14314

    Example:
        >>> from helpers.profiles import TINY
        >>> model = load_falcon(TINY.model, TINY)
        >>> assert_quantized(model) == 4 * model.config.num_hidden_layers
        True
    """
    check_shards(model)
    config = load_config(model, revision)
    try:
        with quantize_falcon_linears(), shard_bars(weight_map(model, revision)):
            loaded = AutoModelForCausalLM.from_pretrained(
                model,
                config=config,
                revision=revision,
                dtype=profile.compute_dtype,
                device_map=profile.device_map,
                quantization_config=nf4_config(profile, storage) if quantize else None,
                trust_remote_code=False,
            )
    except OSError as error:
        raise _explain(error, model, "MODEL") from error
    if quantize:
        assert_quantized(loaded)
    if not profile.on_gpu:
        keep_cpu_layout(loaded)
    return loaded.eval()


def keep_cpu_layout(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    It repacks at the first forward without gradients; from then on the layer has no backward
    and gradients below it are wrong, with one warning.

    Example:
        >>> layer = Linear4bit(64, 64)
        >>> keep_cpu_layout(nn.Sequential(layer))
        >>> layer.support_avx512bf16_for_cpu
        False
    """
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def packed_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    """Causal attention inside each of several rows laid end to end, none of which sees another.

    The kernel is the one behind PyTorch's own flash attention; it takes many query heads to one
    key/value head as they are.

    Args:
        q: (1, heads, length, dim), float16 or bfloat16, on a GPU of capability 8.0 or newer.
        k, v: (1, 1, length, dim), the one key/value head.
        starts: (n_rows + 1,) int32, where each row begins, and the length of all. No row may be
            longer than `MAX_PACKED_LENGTH`; `helpers.speed.hand_over_starts` checks that.

    Returns:
        (1, length, heads * dim), dtype of `q`.

    Raises:
        NotImplementedError: on a CPU, which has no such kernel.

    Example:
        >>> q = torch.zeros(1, 71, 5, 64)    # rows of 3 and 2 tokens, were this a GPU
        >>> packed_attention(q, q[:, :1], q[:, :1], torch.tensor([0, 3, 5], dtype=torch.int32))
        Traceback (most recent call last):
        ...
        NotImplementedError: packed rows need a GPU of capability 8.0: set PACKED = False
    """
    if not q.is_cuda:
        raise NotImplementedError("packed rows need a GPU of capability 8.0: set PACKED = False")
    q, k, v = (rearrange(t, "1 h l d -> l h d") for t in (q, k, v))
    longest = MAX_PACKED_LENGTH
    out = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, starts, longest, longest, 0.0, True, False
    )[0]
    return rearrange(out, "l h d -> 1 l (h d)")


class MultiQueryAttention(modeling_falcon.FalconAttention):
    """Falcon's attention with its one key/value head shared by all query heads, in fast kernels.

    The library hands the kernel 71 query heads and one key/value head, which only the slow
    fp32 kernel takes. Here many queries get an expanded view of the head; a single query (one
    new token) is turned instead: its heads become rows of one head. Same numbers, same layers.
    A mask of one dimension is no mask: it says where each of several packed rows begins.
    """

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None = None,
        attention_mask: Tensor | None = None,
        layer_past: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        """Attend; (batch, length, hidden) in and out, in the dtype of the input."""
        qkv = self.query_key_value(hidden_states)
        return self.dense(self.attend(qkv, attention_mask, layer_past, position_embeddings)), None

    def attend(
        self, qkv: Tensor, mask: Tensor | None, past: Cache | None, turns: tuple[Tensor, Tensor]
    ) -> Tensor:
        """What lies between the two products: (batch, length, heads * dim + 2 * dim) to hidden."""
        qkv = rearrange(qkv, "b l (h d) -> b h l d", d=self.head_dim)
        q, k, v = qkv.split([self.num_heads, 1, 1], dim=1)
        q, k = modeling_falcon.apply_rotary_pos_emb(q, k, *turns)
        if past is not None:
            k, v = past.update(k, v, self.layer_idx)
        if mask is not None and mask.ndim == 1:
            return packed_attention(q, k, v, mask)
        if q.shape[2] == 1:
            q = rearrange(q, "b h 1 d -> b 1 h d")
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return rearrange(out, "b 1 h d -> b 1 (h d)")
        k, v = (t.expand(-1, self.num_heads, -1, -1) for t in (k, v))
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return rearrange(out, "b h l d -> b l (h d)")


def causal_mask_or_none(**kwargs) -> Tensor | None:
    """A mask only where one is needed: no padding, or padding on the right, needs none.

    With padding on the right every real token sees only real tokens before it, so causal
    attention alone is exact; what padding computes is masked in the loss. The starts of packed
    rows, one dimension, go on as they are.
    """
    mask, past = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    if mask is not None and mask.ndim == 1:
        return mask
    seen = 0 if past is None else past.get_seq_length()
    if kwargs["inputs_embeds"].shape[1] == 1 or seen or isinstance(past, StaticCache):
        return _LIBRARY_MASK(**kwargs)
    if mask is None or (mask.ndim == 2 and bool(mask[:, 0].all())):
        return None
    return _LIBRARY_MASK(**kwargs)


def use_fused_attention(model: nn.Module, on: bool = True) -> int:
    """Switch a Falcon's attention to `MultiQueryAttention`, or back to the library's.

    Only multi-query Falcons with rotary positions are touched (Falcon-7B, the tiny one).

    Args:
        model: the model, bare or with an adapter; other architectures are left alone.
        on: False restores the library's class and its mask.

    Returns:
        How many layers now run the fused attention.

    Example:
        >>> use_fused_attention(nn.Linear(2, 2))
        0
    """
    modeling_falcon.create_causal_mask = causal_mask_or_none if on else _LIBRARY_MASK
    switched = 0
    for layer in model.modules():
        if isinstance(layer, modeling_falcon.FalconAttention):
            fits = (
                layer.multi_query and not layer.new_decoder_architecture and not layer.config.alibi
            )
            sdpa = layer.config._attn_implementation == "sdpa"
            layer.__class__ = (
                MultiQueryAttention if on and fits and sdpa else modeling_falcon.FalconAttention
            )
            switched += isinstance(layer, MultiQueryAttention)
    return switched
