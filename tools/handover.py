"""What leaves notebook 03: the adapter and its model card, and the log of the run."""

import filecmp
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from helpers.profiles import check_disk

CARD = Path(__file__).with_name("model_card.md")
TRAVELS = ("adapter_*", "README.md")
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


def hand_over(
    folder: str | Path, drive: str | Path | None = None, hub_repo: str | None = None
) -> list[str]:
    """Take an adapter and its card to a second folder, such as one on Drive, and to the Hub.

    A copy is read back and compared before it gets its name. On the Hub the repository is made
    private. What cannot be done is said and not raised: the adapter is safe where it was saved.

    Args:
        folder: of the saved adapter, with its card.
        drive: the constant DRIVE; the copy is `<drive>/adapter`, where 04 and 05 look for it.
        hub_repo: the constant HUB_REPO, "you/name"; the token is taken from HF_TOKEN or the
            Hub's own cache, and never asked for.

    Returns:
        One sentence for each place.

    Example:
        >>> hand_over("artifacts/adapter")
        ['copied nowhere else: DRIVE and HUB_REPO are None']
    """
    said = []
    for place, send in ((drive, _to_drive), (hub_repo, _to_hub)):
        try:
            said += [send(Path(folder), str(place))] if place else []
        except Exception as error:  # the Hub's client has many, some of them no OSError
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            said.append(f"not copied to {place} ({reason}); mend that and run this cell again")
    return said or ["copied nowhere else: DRIVE and HUB_REPO are None"]


def _to_drive(folder: Path, drive: str) -> str:
    target, staged = Path(drive) / "adapter", Path(drive) / "adapter.copying"
    if not target.parent.parent.is_dir():
        raise FileNotFoundError(f"{target.parent.parent} is not there: mount it")
    names = sorted(path.name for word in TRAVELS for path in folder.glob(word))
    check_disk(drive, sum((folder / name).stat().st_size for name in names))
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    for name in names:
        shutil.copyfile(folder / name, staged / name)
    filecmp.clear_cache()
    if other := [n for n in names if not filecmp.cmp(folder / n, staged / n, shallow=False)]:
        raise OSError(f"the copy of {', '.join(other)} is not the original")
    shutil.rmtree(target, ignore_errors=True)
    staged.rename(target)
    return f"copied to {target}"


def _to_hub(folder: Path, hub_repo: str) -> str:
    hub = HfApi()
    hub.create_repo(hub_repo, private=True, exist_ok=True)
    hub.upload_folder(repo_id=hub_repo, folder_path=folder, allow_patterns=list(TRAVELS))
    return f"uploaded to https://huggingface.co/{hub_repo}, private until you change it there"


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
