"""Make a random Falcon-7B of the true shape: eight bf16 shards and the real tokenizer's files.

    python benchmarks/make_falcon7b.py --out falcon-7b-random --tokenizer FOLDER

Speed and memory do not depend on what the weights are, so this stands in for the checkpoint where
the Hub cannot be reached. What it writes is noise: no answer of it means anything. It wants
14 GB of disk, and a GPU or 28 GB of memory. `--layers 2` makes a small one to rehearse with.
"""

import argparse
import shutil
import time
from pathlib import Path

import torch
from transformers import FalconConfig, FalconForCausalLM


def main() -> None:
    """Build, save, and say what was made."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", required=True)
    parser.add_argument("--tokenizer", required=True, help="folder with Falcon's tokenizer.json")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4544, help="a multiple of 64")
    args = parser.parse_args()
    began = time.time()
    torch.manual_seed(0)
    config = FalconConfig(
        num_hidden_layers=args.layers,
        hidden_size=args.hidden,
        num_attention_heads=args.hidden // 64,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = FalconForCausalLM(config)
    model.save_pretrained(args.out, max_shard_size="2GB")
    for file in Path(args.tokenizer).glob("*.json"):
        shutil.copy(file, args.out)
    shards = sorted(path.name for path in Path(args.out).glob("*.safetensors"))
    print(
        f"{model.num_parameters():,} parameters in {len(shards)} shards, "
        f"{time.time() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
