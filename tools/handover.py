"""What leaves notebook 03: the model card beside the adapter, and the log of the run."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

CARD = Path(__file__).with_name("model_card.md")
CARD_NEEDS = ("data", "base", "steps", "held-out loss")
RETRIES = {
    f"x_{service}_retry_{bound}": value
    for service in ("graphql", "file_stream", "file_transfer")
    for bound, value in (("max", 3), ("wait_min_seconds", 1), ("wait_max_seconds", 4))
}


def write_model_card(folder: str | Path, facts: dict[str, Any]) -> Path:
    """Write the README.md that travels with an adapter: what it is, and what it must not be.

    Args:
        folder: of the saved adapter; peft's own card there is replaced.
        facts: "data", "base", "steps" and "held-out loss", and whatever else belongs there.

    Returns:
        The card's path.

    Raises:
        ValueError: if one of the four is missing.

    Example:
        >>> write_model_card(".", {"data": "sample", "base": "tiny"})
        Traceback (most recent call last):
        ValueError: the model card lacks steps, held-out loss: add them to `facts`
    """
    if missing := [name for name in CARD_NEEDS if facts.get(name) is None]:
        raise ValueError(f"the model card lacks {', '.join(missing)}: add them to `facts`")
    base, path = str(facts["base"]), Path(folder) / "README.md"
    on_disk = Path(base).exists() or Path(base).is_absolute()
    front = "" if on_disk else f"base_model: {base}\n"
    rows = facts | {"base": Path(base).name if on_disk else base}
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    path.write_text(CARD.read_text().format(front=front, table=table))
    return path


def start_wandb(
    mode: str, project: str, config: dict[str, Any], folder: str | Path = "artifacts"
) -> str:
    """Begin a Weights & Biases run that can neither ask for a login nor hold training up.

    Without WANDB_API_KEY nothing goes online. If the network is dead or the key is wrong, the run
    is logged into a local folder instead, which `wandb sync <folder>` uploads later. Retries
    are bounded, since wandb's own go on for minutes, also when the process wants to end.

    Args:
        mode: "online", "offline" or "disabled".
        project: name of the project there.
        config: what to note about the run.
        folder: where the folder `wandb/` is made.

    Returns:
        For `SFTConfig(report_to=...)`: "wandb", or "none".

    Raises:
        ValueError: if the mode is none of the three.

    Example:
        >>> start_wandb("disabled", "falcon", {})
        'none'
    """
    if mode not in ("online", "offline", "disabled"):
        raise ValueError(f"WANDB {mode!r} is unknown: use 'online', 'offline' or 'disabled'")
    if mode == "disabled" or os.environ.get("RANK", "0") != "0":
        return "none"
    import wandb  # only where it is used: it is not needed to train

    os.environ.setdefault("WANDB_SILENT", "true")
    settings = wandb.Settings(
        init_timeout=20, x_graphql_timeout_seconds=10, silent=True, console="off", **RETRIES
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    key = os.environ.get("WANDB_API_KEY")
    for attempt in dict.fromkeys((mode if key else "offline", "offline")):
        with suppress(wandb.Error, OSError):
            wandb.init(
                mode=attempt, project=project, config=config, dir=str(folder),
                settings=settings, reinit="finish_previous",
            )  # fmt: skip
            return "wandb"
    return "none"
