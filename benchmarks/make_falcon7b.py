"""Make a random Falcon-7B of the true shape: eight bf16 shards and the real tokenizer's files.

    python benchmarks/make_falcon7b.py --out falcon-7b-random --tokenizer FOLDER
    python benchmarks/make_falcon7b.py --out falcon-7b-random-bin --format bin

Speed and memory do not depend on what the weights are, so this stands in for the checkpoint where
the Hub cannot be reached. What it writes is noise: no answer of it means anything. It wants 14 GB
of disk and makes one shard after the other, so that 3 GB of memory are enough. `--layers 2` makes
a small one to rehearse with.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import FalconConfig, FalconForCausalLM

STEMS = {"safetensors": "model", "bin": "pytorch_model"}


def draw(shape: torch.Size, name: str, config: FalconConfig, device: str) -> torch.Tensor:
    """A weight as transformers initialises it, in bf16: norms 1, biases 0, the rest normal."""
    if len(shape) == 1:
        return torch.full(shape, float(name.endswith("weight")), dtype=torch.bfloat16)
    weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return weight.normal_(0, config.initializer_range).cpu()


def make(out: Path, config: FalconConfig, kind: str = "safetensors", shard: str = "2GB") -> int:
    """Write the checkpoint, one shard at a time.

    Args:
        out: the folder.
        config: the shape.
        kind: "safetensors" or "bin".
        shard: the largest a shard may get.

    Returns:
        How many shards were written.
    """
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        weights = FalconForCausalLM(config).bfloat16().state_dict()
    weights.pop("lm_head.weight")  # tied to the embedding
    split = split_torch_state_dict_into_shards(
        weights, filename_pattern=f"{STEMS[kind]}{{suffix}}.{kind}", max_shard_size=shard
    )
    out.mkdir(parents=True, exist_ok=True)
    for file, names in split.filename_to_tensors.items():
        part = {name: draw(weights[name].shape, name, config, device) for name in names}
        if kind == "bin":
            torch.save(part, out / file)
        else:
            save_file(part, out / file, metadata={"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (out / f"{STEMS[kind]}.{kind}.index.json").write_text(json.dumps(index, indent=2))
    config.architectures, config.dtype = ["FalconForCausalLM"], torch.bfloat16
    config.save_pretrained(out)
    return len(split.filename_to_tensors)


def main() -> None:
    """Make it, and say what was made."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", required=True)
    parser.add_argument("--tokenizer", help="folder with Falcon's tokenizer.json")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4544, help="a multiple of 64")
    parser.add_argument("--format", choices=STEMS, default="safetensors")
    args = parser.parse_args()
    began = time.time()
    config = FalconConfig(
        num_hidden_layers=args.layers,
        hidden_size=args.hidden,
        num_attention_heads=args.hidden // 64,
    )
    shards = make(Path(args.out), config, args.format)
    for file in Path(args.tokenizer).glob("*.json") if args.tokenizer else ():
        if not (Path(args.out) / file.name).exists():
            shutil.copy(file, args.out)
    print(f"{shards} shards in {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
