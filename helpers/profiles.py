"""What machine is this, and what fits on it."""

import os
import platform
import shutil
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from transformers import PreTrainedConfig

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
    max_steps=60,
    eval_steps=10,
    learning_rate=1e-3,
    early_stop=True,
    gradient_checkpointing=False,
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


# What one decoder layer keeps of a token until its backward pass, by (lean, compiled): how many
# vectors of the hidden size and of the feed-forward size in 16 bits, in 32 bits (which autocast
# makes), in 8 bits (dropout's masks), and of both key and value. Counted from the saved tensors;
# where it is compiled, from what the allocator's record shows alive at the peak. Lean and compiled:
# the LayerNorm's output, queries, attention's output, the layer's output; what comes before GELU;
# key, value and the turned key.
KEPT = {  # h16, ffn16, h32, ffn32, h8, ffn8, kv16, kv32
    (True, False): (7, 2, 0, 0, 3, 1, 1.5, 0),
    (True, True): (4, 1, 0, 0, 0, 0, 1.5, 0),
    (False, False): (7, 1, 1, 1, 3, 1, 0, 0),
    (False, True): (2, 2, 3, 0, 3, 0, 0, 1.5),
}
# What a layer needs for a moment above that, in hidden vectors of 16 bits a token: at its worst
# with kept activations, at its worst when it is computed again, and beside an unpacked weight.
MOMENT = {
    (True, False): (24, 45.6, 6),
    (True, True): (5, 11, 5),
    (False, False): (21, 47.6, 8),
    (False, True): (23, 29, 10),
}
VOCABULARY_CHUNK, TOKEN_CHUNK = 32768, 4096  # of TRL's loss, which never makes all logits at once
CUBLAS = 32 * 2**20  # what matrix products ask the allocator for, once
PAGED_FROM = 100_000  # numbers; bitsandbytes leaves the state of smaller tensors in the allocator


def plan_memory(
    profile: Profile,
    config: PreTrainedConfig,
    batch_size: int | None = None,
    length: int | None = None,
    rank: int = 32,
    checkpointing: bool | None = None,
    lean: bool = False,
    compiled: bool = False,
    packed: bool = False,
) -> dict[str, float]:
    """Predict the peak of a QLoRA step's memory by part, before anything is loaded.

    It counts what PyTorch's allocator gives out, and nothing else: not the CUDA context, not what
    the allocator holds in reserve, and not the paged optimizer's state, two numbers for each one
    trained, which lies in memory that CUDA moves between host and GPU. With activations kept,
    every layer's saved tensors wait for the backward pass; with checkpointing only its input does,
    and one layer at a time is computed again. In a compiled layer two tensors stay beside the
    input: the products with the 4-bit weights before attention and before GELU, which the compiler
    does not compute again (docs/memory.md).

    Args:
        profile: gives dtype, batch size, length and checkpointing where they are not given.
        config: a `FalconConfig` (multi-query).
        batch_size, length: rows and tokens of one micro-batch, padding included.
        rank: of the adapters, on all four linears of every layer.
        checkpointing: True computes activations again in the backward pass.
        lean, compiled: the mends of `helpers.speed`; without lean LoRA autocast is on. Compiled
            and checkpointed without lean LoRA was never measured.
        packed: counts the same; attention saves as much either way.

    Returns:
        Bytes by part: weights, embedding, adapters, gradients, optimizer, activations, logits,
        workspace (what a layer needs for a moment, as far as the logits' room does not hold it).
        Their sum is the peak.

    Source:
        Dettmers et al. (2023), QLoRA, section 3 for the 4.127 bits: https://arxiv.org/abs/2305.14314

    Example:
        >>> from transformers import FalconConfig
        >>> plan = plan_memory(A100, FalconConfig())    # Falcon-7B
        >>> round(plan["weights"] / GIB, 2), round(plan["adapters"] / 4)
        (3.18, 65273856)
    """
    h, ffn, kv = config.hidden_size, config.ffn_hidden_size, config.head_dim * 2
    shapes = ((h, h + kv), (h, h), (h, ffn), (ffn, h))
    layers, size = config.num_hidden_layers, profile.compute_dtype.itemsize
    tokens = (batch_size or profile.batch_size) * (length or profile.max_length)
    again = profile.gradient_checkpointing if checkpointing is None else checkpointing
    numbers = rank * sum(a + b for a, b in shapes)
    sides = [rank * side for shape in shapes for side in shape]
    unpaged = [n for n in sides if "paged" not in profile.optim or n < PAGED_FROM]
    h16, ffn16, h32, ffn32, h8, ffn8, kv16, kv32 = KEPT[lean, compiled]
    token = size * (h16 * h + ffn16 * ffn + kv16 * kv + 4 * rank) + h8 * h + ffn8 * ffn
    token += 4 * (h32 * h + ffn32 * ffn + kv32 * kv + config.num_attention_heads + 2)
    layer = tokens * token
    layer += 0 if compiled else numbers * size  # the adapters, cast to 16 bits, are kept as well
    hidden = tokens * h * size
    kept, redone, beside = (n * hidden for n in MOMENT[lean, compiled])
    stream = 1 if lean else 4 / size  # autocast's residuals have 32 bits
    weight = h * ffn * (size + 2 * 4 / 64)  # unpacked, and its scales in 32 bits, twice
    stays = hidden * stream + compiled * tokens * size * (h + kv + ffn)
    if again:
        moment = redone + weight if compiled else max(redone, layer + beside + weight)
    else:
        moment = max(kept, beside + weight)
    logits = min(tokens, TOKEN_CHUNK) * min(config.vocab_size, VOCABULARY_CHUNK) * size
    logits += hidden * (3 * stream + 4 / size)
    return {
        "weights": layers * sum(a * b for a, b in shapes) * (4 + 8 / 64 + 32 / (64 * 256)) / 8,
        "embedding": (config.vocab_size * h + (2 * layers + 2) * h) * size,
        "adapters": 4 * layers * numbers,
        "gradients": 4 * layers * numbers,
        "optimizer": 8 * layers * sum(unpaged),
        "activations": layers * (stays if again else layer),
        "logits": logits,
        "workspace": max(moment - logits, 0) + CUBLAS * profile.on_gpu,
    }


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
