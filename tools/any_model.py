"""Another MODEL, other rows: what the pages cannot take for granted then."""

from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.falcon import LINEARS
from helpers.prompts import format_prompt


def lora_targets(model: nn.Module) -> list[str] | str:
    """Which layers get adapters: Falcon's four, by name, or all linears of another model.

    Args:
        model: loaded in four bits, without adapters.

    Returns:
        What `LoraConfig` takes as `target_modules`; "all-linear" leaves out the head.

    Example:
        >>> lora_targets(nn.Linear(2, 2))
        'all-linear'
    """
    names = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    return list(LINEARS) if names == set(LINEARS) else "all-linear"


def drop_long(
    parts: dict[str, Dataset], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[dict[str, Dataset], dict[str, int]]:
    """Leave out rows whose question alone fills `max_length`: cut there, no answer is left.

    Args:
        parts: as from `split_rows`.
        tokenizer: of the model.
        max_length: tokens a row is cut at.

    Returns:
        parts: with the rows that have room for at least one token of the answer.
        dropped: how many were left out in all, by reason.

    Raises:
        ValueError: if a part has no row left.

    Example:
        >>> from types import SimpleNamespace as Some
        >>> rows = Dataset.from_dict({"question": ["Why?", "And then?"], "answer": ["So.", "No."]})
        >>> by_words = lambda texts: Some(input_ids=[text.split() for text in texts])
        >>> drop_long({"train": rows}, by_words, 4)[1]    # <HUMAN>: And then? <ASSISTANT>: is 4
        {'question of 4 tokens or more': 1}
    """
    kept = {}
    for name, rows in parts.items():
        prompts = tokenizer([format_prompt(q) for q in rows["question"]]).input_ids
        kept[name] = rows.select([i for i, ids in enumerate(prompts) if len(ids) < max_length])
        if not len(kept[name]):
            fault = f"every question of the {name} part fills {max_length} tokens"
            raise ValueError(f"{fault}: raise MAX_LENGTH, or shorten the questions")
    n_long = sum(len(rows) - len(kept[name]) for name, rows in parts.items())
    return kept, {f"question of {max_length} tokens or more": n_long} if n_long else {}


def lay_adapter(base: PreTrainedModel, folder: str) -> PeftModel:
    """Lay a saved adapter beside its base; every weight of it must find its place.

    peft alone only warns if it finds none, and then the bare base would answer.

    Args:
        base: the model that the adapter was trained on, or a copy.
        folder: as `find_adapter` gives it.

    Returns:
        Both as one model, in eval mode.

    Raises:
        ValueError: if the adapter was made for another model.

    Example:
        >>> from helpers.falcon import load_falcon
        >>> from helpers.profiles import TINY
        >>> lay_adapter(load_falcon(TINY.model, TINY), TINY.adapter).active_adapter
        'default'
    """
    try:
        model = PeftModel.from_pretrained(base, folder)
        held, saved = get_peft_model_state_dict(model), load_peft_weights(folder, device="cpu")
        fits = {n for n in held if "lora_" in n} == {n for n in saved if "lora_" in n}
    except (ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        fits = False
    if not fits:
        name = Path(base.config.name_or_path).name
        raise ValueError(
            f"the adapter in {folder} was made for another model than {name}: run notebook 03 "
            "with this MODEL, or set ADAPTER"
        )
    return model.eval()
