"""Merge an adapter into its base, so that both leave as one model in 16 bits.

    python tools/merge.py                          the newest adapter, into artifacts/merged
    python tools/merge.py OUT=/mnt/disk/merged     somewhere else: Falcon-7B needs 14 GB there
    python tools/merge.py ROUNDED=False            into the weights as they were published

The checkpoint is read one weight at a time, changed, and written shard by shard: no GPU takes part,
and the memory holds one shard and one weight, never a model. Beside the weights lie what other
engines read: config.json, the tokenizer, a chat template, a stop for the tags, a Modelfile.
"""

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from huggingface_hub import snapshot_download
from peft import load_peft_weights
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from helpers.checkpoints import find_adapter
from helpers.falcon import LINEARS, check_shards, load_config, load_tokenizer
from helpers.profiles import check_disk, detect_profile
from helpers.prompts import ASSISTANT, HUMAN
from tools.script_args import override

PROFILE = "auto"
BASE = None  # None: the profile's own
REVISION = None
ADAPTER = None  # None: artifacts, then the Hub or the embedded one
OUT = "artifacts/merged"
ROUNDED = True  # round each adapted weight to NF4 and back first: what the adapter was trained on

DTYPE = torch.bfloat16
UNSUPPORTED = {
    "use_dora": "DoRA",
    "fan_in_fan_out": "transposed weights",
    "rank_pattern": "a rank for each layer",
    "alpha_pattern": "an alpha for each layer",
    "modules_to_save": "whole modules beside the adapters",
    "lora_bias": "biases of its own",
}

# The same text as helpers.prompts.format_prompt, for engines that read Jinja.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'HUMAN_TAG ' + message['content'].strip() + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'ASSISTANT_TAG ' + message['content'].strip() + ('\\n' if not loop.last else eos_token) }}"
    "{% else %}{{ message['content'].strip() + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT_TAG' }}{% endif %}"
).replace("HUMAN_TAG", HUMAN).replace("ASSISTANT_TAG", ASSISTANT)  # fmt: skip

MODELFILE = f"""\
# For Ollama, after the conversion to GGUF. It takes no adapters any more, only merged models.
FROM ./merged-q8_0.gguf
TEMPLATE \"\"\"{{{{- range .Messages }}}}{{{{- if eq .Role "user" }}}}{HUMAN} {{{{ .Content }}}}
{{{{ else if eq .Role "assistant" }}}}{ASSISTANT} {{{{ .Content }}}}
{{{{ end }}}}{{{{- end }}}}{ASSISTANT}\"\"\"
PARAMETER stop "{HUMAN}"
PARAMETER stop "<|endoftext|>"
"""


def read_scale(config: dict[str, Any]) -> float:
    """Give the factor in front of B·A; refuse an adapter that is more than B·A.

    Args:
        config: what adapter_config.json holds.

    Returns:
        alpha / r, or alpha / √r for a rank-stabilised adapter.

    Raises:
        ValueError: with what the adapter has besides.

    Example:
        >>> read_scale({"lora_alpha": 32, "r": 16}), read_scale({"lora_alpha": 4, "r": 4})
        (2.0, 1.0)
        >>> read_scale({"lora_alpha": 32, "r": 16, "use_dora": True})
        Traceback (most recent call last):
        ValueError: the adapter has DoRA: merge it with peft's own merge_and_unload()
    """
    more = [words for key, words in UNSUPPORTED.items() if config.get(key)]
    more += ["biases"] if config.get("bias", "none") != "none" else []
    if more:
        found = ", ".join(more)
        raise ValueError(f"the adapter has {found}: merge it with peft's own merge_and_unload()")
    rank = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    return config["lora_alpha"] / rank


def read_adapter(folder: str | Path) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """Read an adapter as pairs of small matrices.

    Args:
        folder: of a saved adapter.

    Returns:
        {weight: (A, B)} with A of shape (r, in) and B of shape (out, r), under the name that the
        weight has in the base's checkpoint; and the factor in front of B·A.

    Raises:
        ValueError: if the adapter cannot be merged this way.
    """
    scale = read_scale(json.loads((Path(folder) / "adapter_config.json").read_text()))
    weights = load_peft_weights(str(folder), device="cpu")
    a_name, b_name = ".lora_A.weight", ".lora_B.weight"
    pairs = {
        name.removeprefix("base_model.model.").replace(a_name, ".weight"): (
            weight,
            weights[name.replace(a_name, b_name)],
        )
        for name, weight in weights.items()
        if name.endswith(a_name)
    }
    return pairs, scale


def round_to_nf4(weight: Tensor) -> Tensor:
    """Round a weight to NF4 with double quantization and back: what the adapter was trained on.

    Example:
        >>> round_to_nf4(torch.ones(1, 64)).unique().tolist()    # a block's largest value stays
        [1.0]
    """
    codes, state = quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(codes, state).to(weight.dtype)


def merge_weight(
    weight: Tensor, pair: tuple[Tensor, Tensor] | None, scale: float, rounded: bool = True
) -> Tensor:
    """Add what the adapter learned to one weight; sum in 32 bits, result in 16.

    Args:
        weight: (out, in), any floating dtype.
        pair: A (r, in) and B (out, r); None for a weight without an adapter.
        scale: the factor in front of B·A.
        rounded: round the weight to NF4 first, as in training. A weight without an adapter is
            never rounded.

    Returns:
        W + scale · B·A, in bfloat16.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> pair = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [0.0]])
        >>> merge_weight(torch.zeros(2, 2), pair, 2.0, rounded=False).tolist()    # 2 · B · A
        [[2.0, 4.0], [0.0, 0.0]]
    """
    if pair is None:
        return weight.to(DTYPE)
    a, b = (matrix.float() for matrix in pair)
    if weight.shape != (b.shape[0], a.shape[1]):
        shapes = f"{tuple(weight.shape)}, the adapter {(b.shape[0], a.shape[1])}"
        raise ValueError(f"the weight is {shapes}: name the base it was trained on with BASE=")
    kept = round_to_nf4(weight) if rounded else weight
    return (kept.float() + scale * (b @ a)).to(DTYPE)


def shards(folder: Path) -> list[Path]:
    """List a checkpoint's weight files, safetensors before .bin.

    Raises:
        FileNotFoundError: if there are none, or the index names one that is missing.
    """
    check_shards(str(folder))
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if found := sorted(folder.glob(pattern)):
            return found
    raise FileNotFoundError(f"{folder} holds no weights: name a folder or a Hub id with BASE=")


def read_shard(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield a shard's weights one by one; none is held longer than its turn."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
    else:
        yield from torch.load(path, map_location="cpu", mmap=True, weights_only=True).items()


def merge_shards(
    base: Path, adapter: str | Path, out: Path, rounded: bool = True
) -> dict[str, int]:
    """Write the merged weights, shard by shard.

    Args:
        base: folder of the base's checkpoint.
        adapter: folder of the adapter.
        out: folder to write to; it exists.
        rounded: see `merge_weight`.

    Returns:
        {"weights": all, "merged": those with an adapter, "bytes": written}.

    Raises:
        ValueError: if the adapter has a pair for which the base has no weight.
    """
    pairs, scale = read_adapter(adapter)
    files, index, left, total = shards(base), {}, set(pairs), 0
    for number, path in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        merged = {
            weight: merge_weight(value, pairs.get(weight), scale, rounded).contiguous()
            for weight, value in read_shard(path)
        }
        left -= merged.keys()
        total += sum(value.nbytes for value in merged.values())
        index |= dict.fromkeys(merged, name)
        save_file(merged, out / name, metadata={"format": "pt"})
        del merged  # before the next shard is read
    if left:
        raise ValueError(f"the base has no {min(left)}: name the one it was trained on with BASE=")
    about = {"metadata": {"total_size": total}, "weight_map": index}
    (out / "model.safetensors.index.json").write_text(json.dumps(about, indent=2) + "\n")
    return {"weights": len(index), "merged": len(pairs), "bytes": total}


def write_companions(model: str, out: Path, revision: str | None = None) -> None:
    """Write what other engines read beside the weights.

    Falcon-7B shares one key/value head among all query heads; `multi_query` says so, but
    transformers writes `num_kv_heads` as the number of query heads, and llama.cpp's converter
    believes it and fails. Here it is 1, which transformers does not look at.

    Args:
        model: Hub id or folder of the base, for its configuration and tokenizer.
        out: folder to write to.
        revision: of the base on the Hub.
    """
    config = load_config(model, revision)
    if config.model_type == "falcon" and config.multi_query and not config.new_decoder_architecture:
        config.num_kv_heads = 1
    config.architectures = config.architectures or ["FalconForCausalLM"]
    config.dtype = DTYPE
    config.save_pretrained(out)
    tokenizer = load_tokenizer(model, revision)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(out)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    GenerationConfig(**ends).save_pretrained(out)  # stop_strings here would make generate() raise
    (out / "Modelfile").write_text(MODELFILE)


def merge(
    model: str, adapter: str | Path, out: Path, revision: str | None = None, rounded: bool = True
) -> dict[str, int]:
    """Merge an adapter into its base and write one model.

    Args:
        model: Hub id or folder of the base.
        adapter: folder of the adapter.
        out: folder to write to; what lies there is replaced.
        revision: of the base on the Hub.
        rounded: see `merge_weight`.

    Returns:
        What `merge_shards` counted.

    Raises:
        ValueError: if base and adapter do not fit each other.
        OSError: if the disk is too full, or the base cannot be fetched.
    """
    kinds = ["*.safetensors*", "*.json", "*.bin"]
    base = Path(model)
    if not base.is_dir():
        base = Path(snapshot_download(model, revision=revision, allow_patterns=kinds))
    check_disk(str(out), sum(path.stat().st_size for path in shards(base)))
    half = out.with_name(f"{out.name}.tmp")  # gets its name when it is whole
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    found = merge_shards(base, adapter, half, rounded)
    write_companions(model, half, revision)
    shutil.rmtree(out, ignore_errors=True)
    half.rename(out)
    return found


def fitting_types(config: Any) -> dict[str, list[str]]:
    """Say which of GGUF's types fit a model's columns: blocks may not run over a row's end.

    Args:
        config: a `FalconConfig`.

    Returns:
        For each kind of linear the families of types that fit. Types of 32 are Q4_0, Q4_1, Q5_0,
        Q5_1, Q8_0 and IQ4_NL; types of 256 are the K-quants and the other IQ ones.

    Source:
        QK_K = 256 and QK4_0 = 32 in ggml: https://github.com/ggml-org/llama.cpp

    Example:
        >>> from transformers import FalconConfig
        >>> fits = fitting_types(FalconConfig())    # 4,544 = 142 · 32; 18,176 = 71 · 256
        >>> fits["dense"], fits["dense_4h_to_h"]
        (['blocks of 32'], ['blocks of 32', 'blocks of 256'])
    """
    wide = config.ffn_hidden_size or 4 * config.hidden_size
    columns = {name: wide if name == "dense_4h_to_h" else config.hidden_size for name in LINEARS}
    return {
        name: [f"blocks of {block}" for block in (32, 256) if n % block == 0]
        for name, n in columns.items()
    }


def main() -> None:
    """Merge what the constants name, and say what was written."""
    override(globals(), sys.argv[1:])
    profile = detect_profile(PROFILE, model=BASE)
    hub, embedded = (profile.adapter, None) if profile.on_gpu else (None, profile.adapter)
    size = load_config(profile.model, REVISION).hidden_size
    adapter, where = find_adapter(ADAPTER, "artifacts", None, hub, embedded, size, profile.model)
    found = merge(profile.model, adapter, Path(OUT), REVISION, ROUNDED)
    print(f"adapter from {where}, into {Path(profile.model).name}")
    print(f"{found['merged']} of {found['weights']} weights changed, {found['bytes']:,} bytes")
    print(f"{OUT} holds safetensors, config, tokenizer with chat template, Modelfile.")
    print("How far the answers drift: python tools/measure_leaving.py")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(str(error))
