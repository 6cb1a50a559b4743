"""What machine is this, and what fits on it."""

import os
import platform
import shutil
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
FALCON_7B = "ybelkada/falcon-7b-sharded-bf16"
FALCON_7B_REVISION = None  # a commit of that repository, once one is pinned by a real run
ADAPTER_7B = "heliosbrahma/falcon-7b-sharded-bf16-finetuned-mental-health-conversational"
DATASET = "heliosbrahma/mental_health_chatbot_dataset"


@dataclass(frozen=True)
class Profile:
    """Everything that differs between a laptop, a T4 and an A100, and nothing else.

    `batch_size * accumulation` rows make one optimizer step; lengths are in tokens.
    """

    name: str
    model: str
    dataset: str
    adapter: str
    compute_dtype: torch.dtype
    batch_size: int
    accumulation: int
    max_length: int
    max_steps: int
    eval_steps: int
    learning_rate: float
    early_stop: bool
    gradient_checkpointing: bool
    checkpoint_every: int
    optim: str
    device: str

    @property
    def on_gpu(self) -> bool:
        """True if the model lives on a GPU."""
        return self.device != "cpu"

    @property
    def device_map(self) -> dict[str, str]:
        """The whole model on this process's own device, as `from_pretrained` takes it."""
        return {"": self.device}


TINY = Profile(
    name="cpu",
    model=str(ROOT / "assets/tiny_falcon"),
    dataset=str(ROOT / "assets/sample_dialogues.jsonl"),
    adapter=str(ROOT / "assets/tiny_adapter"),
    compute_dtype=torch.float32,
    batch_size=8,
    accumulation=1,
    max_length=256,
    max_steps=50,
    eval_steps=10,
    learning_rate=7e-4,
    early_stop=True,
    gradient_checkpointing=False,
    checkpoint_every=1,
    optim="adamw_torch",
    device="cpu",
)
A100 = Profile(
    name="a100",
    model=FALCON_7B,
    dataset=DATASET,
    adapter=ADAPTER_7B,
    compute_dtype=torch.bfloat16,
    batch_size=16,
    accumulation=4,
    max_length=1024,
    max_steps=320,
    eval_steps=20,
    learning_rate=2e-4,
    early_stop=False,
    gradient_checkpointing=True,
    checkpoint_every=1,
    optim="paged_adamw_32bit",
    device="cuda:0",
)
T4 = replace(
    A100,
    name="t4",
    compute_dtype=torch.float16,
    batch_size=4,
    accumulation=16,
    max_length=512,
    max_steps=150,
    eval_steps=10,
    early_stop=True,
)
PROFILES = {"cpu": TINY, "t4": T4, "a100": A100}


def _check_gpu(local_rank: int) -> tuple[int, int]:
    """The compute capability of this process's GPU; ValueError if torch has no kernels for it."""
    major, minor = torch.cuda.get_device_capability(local_rank)
    built = [
        int(a.split("_")[1].rstrip("abcdef")) for a in torch.cuda.get_arch_list() if "sm_" in a
    ]
    if built and not any(a // 10 == major and a % 10 <= minor for a in built):
        name = torch.cuda.get_device_name(local_rank)
        raise ValueError(
            f"this torch has no kernels for the {name} (capability {major}.{minor}): "
            "choose another GPU type, or set PROFILE = 'cpu'"
        )
    return major, minor


def detect_profile(name: str = "auto", model: str | None = None) -> Profile:
    """Choose the settings for the machine found, or for the one named.

    bf16 is decided by compute capability 8.0: a T4 answers `is_bf16_supported()` with True,
    because torch emulates it, many times slower.

    Args:
        name: "auto" looks at the GPU; "cpu", "t4" or "a100" force a profile.
        model: Hub id or folder that replaces the profile's own model.

    Returns:
        A frozen `Profile`, on device `cuda:<LOCAL_RANK>` if it is a GPU profile.

    Raises:
        ValueError: if the name is unknown, no GPU is there for a GPU profile, torch has no
            kernels for it, or bf16 is asked of a GPU without it.

    Example:
        >>> p = detect_profile("cpu")
        >>> p.batch_size * p.accumulation, p.compute_dtype
        (8, torch.float32)
    """
    if name not in ("auto", *PROFILES):
        raise ValueError(f"PROFILE {name!r} is unknown: use 'auto', 'cpu', 't4' or 'a100'")
    has_gpu = torch.cuda.is_available()
    if name == "cpu" or (name == "auto" and not has_gpu):
        return replace(TINY, model=model or TINY.model)
    if not has_gpu:
        raise ValueError(f"PROFILE {name!r} needs a GPU and torch sees none: set PROFILE = 'cpu'")
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    capability = _check_gpu(rank)
    if name == "auto":
        name = "a100" if capability >= (8, 0) else "t4"
    if name == "a100" and capability < (8, 0):
        raise ValueError(
            f"this GPU has compute capability {capability[0]}.{capability[1]} and bf16 needs 8.0: "
            "set PROFILE = 't4', which computes in fp16"
        )
    return replace(PROFILES[name], device=f"cuda:{rank}", model=model or PROFILES[name].model)


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def report() -> str:
    """Versions, device and precision in a few lines, for the first output of each notebook.

    Example:
        >>> report().splitlines()[0].startswith("Python 3")
        True
    """
    names = ("torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "accelerate")
    lines = [f"Python {platform.python_version()}"]
    lines.append(", ".join(f"{name} {_installed(name)}" for name in names))
    if not torch.cuda.is_available():
        return "\n".join([*lines, f"no GPU; {os.cpu_count()} CPU cores; computes in float32"])
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    gpu, total = (
        torch.cuda.get_device_name(rank),
        torch.cuda.get_device_properties(rank).total_memory,
    )
    half = "bfloat16" if torch.cuda.get_device_capability(rank) >= (8, 0) else "float16"
    return "\n".join([*lines, f"{gpu}, {total / GIB:.1f} GiB; computes in {half}"])


def check_disk(folder: str, needed_bytes: int) -> None:
    """Refuse to start what would fill the disk.

    Args:
        folder: where the files will go; its nearest existing parent is looked at.
        needed_bytes: what will be written, in bytes.

    Raises:
        OSError: if less is free, with both figures in GB (10⁹ bytes).

    Example:
        >>> check_disk(".", 0)
    """
    path = Path(folder).resolve()
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    if free < needed_bytes:
        raise OSError(
            f"{folder} has {free / 1e9:.1f} GB free and the checkpoints need "
            f"{needed_bytes / 1e9:.1f} GB: "
            "free some space, or set OUTPUT to another disk"
        )
