"""Keep the adapter that notebook 03 left in artifacts/ as the embedded one, in 16 bits.

python tools/embed_adapter.py
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent


def embed(source: Path, target: Path) -> int:
    """Copy an adapter in bfloat16, without the base's folder on this machine.

    Args:
        source: folder of a saved adapter.
        target: folder to write; its old files go.

    Returns:
        Bytes written.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    weights = load_file(source / "adapter_model.safetensors")
    halved = {name: value.to(torch.bfloat16).contiguous() for name, value in weights.items()}
    save_file(halved, target / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "tiny_falcon"
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    shutil.copy(source / "README.md", target)
    return sum(path.stat().st_size for path in target.iterdir())


if __name__ == "__main__":
    size = embed(ROOT / "artifacts/adapter", ROOT / "assets/tiny_adapter")
    print(f"{size:,} bytes in assets/tiny_adapter")
