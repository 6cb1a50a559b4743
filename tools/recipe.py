"""The recipe of page 03, taken from the page itself, for tools that train many times.

The values of `LoraConfig` and `SFTConfig` stand in the cells of notebook 03 and nowhere else. Here
those cells are read and evaluated with another profile, folder or seed: a change on the page
changes every run that is made from it.
"""

import ast
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from trl import SFTTrainer

from helpers.dialogues import to_prompt_completion
from helpers.falcon import load_falcon, load_tokenizer, use_fused_attention
from helpers.profiles import Profile
from helpers.training import adapters_to_fp32, row_order

ROOT = Path(__file__).resolve().parent.parent


class Page(dict):
    """The names that a notebook's twin defines, each computed when it is asked for.

    A name is looked up among those given, then among the page's own top-level assignments and
    imports. Cells that are not needed for it are not run.

    Example:
        >>> Page("03_qlora_finetuning", SEED=7)["rank"], Page("03_qlora_finetuning", rank=4)["rank"]
        (32, 4)
    """

    def __init__(self, slug: str, **given: Any) -> None:
        super().__init__(given)
        self.slug = slug
        tree = ast.parse((ROOT / f"notebooks/py/{slug}.py").read_text())
        self.assigned: dict[str, ast.expr] = {}
        self.imported: dict[str, tuple[str, str]] = {}
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.module:
                self.imported |= {a.asname or a.name: (node.module, a.name) for a in node.names}
            elif isinstance(node, ast.Import):
                self.imported |= {a.name: (a.name, "") for a in node.names}
            elif isinstance(node, ast.Assign):
                self._keep(node.targets[0], node.value)

    def _keep(self, target: ast.expr, value: ast.expr) -> None:
        """Note the first value of a name; a, b = 1, 2 gives two of them."""
        if isinstance(target, ast.Name):
            self.assigned.setdefault(target.id, value)
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, part in zip(target.elts, value.elts, strict=True):
                self._keep(one, part)

    def __missing__(self, name: str) -> Any:
        if name in self.imported:
            module, attribute = self.imported[name]
            found = import_module(module)
            self[name] = getattr(found, attribute) if attribute else found
        elif name in self.assigned:
            self[name] = self._value(self.assigned[name])
        else:
            raise KeyError(name)
        return self[name]

    def _value(self, expression: ast.expr) -> Any:
        code = ast.fix_missing_locations(ast.Expression(expression))
        return eval(compile(code, self.slug, "eval"), {}, self)

    def call(self, name: str, **changed: Any) -> Any:
        """The value of a name that is assigned from a call, some of whose keywords are changed.

        Args:
            name: for instance `args`, assigned as `args = SFTConfig(...)`.
            changed: keywords put in place of the page's, or added.

        Returns:
            What the changed call gives.

        Raises:
            ValueError: if the page assigns no call to that name.

        Example:
            >>> Page("03_qlora_finetuning", is_falcon=True).call("lora", r=16).lora_alpha
            32
        """
        call = self.assigned.get(name)
        if not isinstance(call, ast.Call):
            raise ValueError(f"page {self.slug} no longer sets {name} = ...(...): check its cells")
        kept = [k for k in call.keywords if k.arg not in changed]
        new = [ast.keyword(key, ast.Name(f"changed {key}", ast.Load())) for key in changed]
        self |= {f"changed {key}": value for key, value in changed.items()}
        return self._value(ast.Call(call.func, call.args, kept + new))


class StopAt(TrainerCallback):
    """Ends a run after a step, with the rate that a longer schedule has there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        """Stop if this was the step."""
        control.should_training_stop |= state.global_step >= self.step


class Watch(TrainerCallback):
    """Calls a function with (step, model) before training and after chosen steps."""

    def __init__(self, steps: Sequence[int], look: Callable[[int, Any], None]) -> None:
        self.steps, self.look = set(steps), look

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Look at step 0."""
        self.look(0, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Look if this step is one of those chosen."""
        if state.global_step in self.steps:
            self.look(state.global_step, model)


@dataclass
class Trained:
    """A model with its adapter in eval mode, and how it came about."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    steps: int  # the step kept
    held_out: list[tuple[int, float]]  # (step, loss) on the validation rows
    trainable: int
    seconds: float


def train(
    rows: Dataset,
    profile: Profile,
    validation: Dataset | None = None,
    seed: int = 0,
    lora: Mapping[str, Any] | None = None,
    args: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trained:
    """Train an adapter as page 03 does.

    With validation rows the best step is kept, and the run ends early where the profile says so;
    without them the last step is kept.

    Args:
        rows: with `question` and `answer`, to train on.
        profile: machine, batch, steps, rate.
        validation: rows to choose the step by; None if it was chosen before.
        seed: of the order of rows, the adapter's start, the dropout.
        lora: keywords of `LoraConfig` that differ from the page's.
        args: keywords of `SFTConfig` that differ from the page's.
        callbacks: more of them.

    Returns:
        `Trained`, its model on the profile's device.
    """
    model, tokenizer = load_falcon(profile.model, profile), load_tokenizer(profile.model)
    use_fused_attention(model)
    pairs, watched = to_prompt_completion(rows), validation is not None
    texts = [
        p + c + tokenizer.eos_token
        for p, c in zip(*(pairs[k] for k in ("prompt", "completion")), strict=True)
    ]
    lengths = [len(ids) for ids in tokenizer(texts).input_ids]
    order = row_order(lengths, profile.batch_size * profile.accumulation, profile.max_steps, seed)
    when = "steps" if watched else "no"
    with tempfile.TemporaryDirectory() as folder:
        page = Page("03_qlora_finetuning", profile=profile, model=model, SEED=seed, OUTPUT=folder)
        own = {"report_to": "none", "eval_strategy": when, "save_strategy": when}
        own |= {"eval_on_start": watched, "load_best_model_at_end": watched}
        set_seed(seed)
        trainer = SFTTrainer(
            model=model, args=page.call("args", **own | dict(args or {})),
            processing_class=tokenizer, peft_config=page.call("lora", **lora or {}),
            train_dataset=Dataset.from_dict(pairs.select(order).to_dict()),
            eval_dataset=to_prompt_completion(validation) if watched else None,
            callbacks=[*callbacks] + [EarlyStoppingCallback(3)] * (watched and profile.early_stop),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        if profile.compute_dtype is not torch.bfloat16:
            adapters_to_fp32(trainer)
        seconds = trainer.train().metrics["train_runtime"]
    log = trainer.state.log_history
    held_out = [(x["step"], x["eval_loss"]) for x in log if "eval_loss" in x]
    kept = min(held_out, key=lambda x: x[1])[0] if watched else trainer.state.global_step
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    return Trained(trained, tokenizer, kept, held_out, trainable, float(np.round(seconds, 1)))


def with_steps(profile: Profile, steps: int, rows_per_step: int | None = None) -> Profile:
    """A profile with another number of steps and, by accumulation, of rows a step.

    Example:
        >>> from helpers.profiles import TINY
        >>> p = with_steps(TINY, 320, 56)
        >>> p.max_steps, p.batch_size * p.accumulation
        (320, 56)
    """
    wanted = rows_per_step or profile.batch_size * profile.accumulation
    accumulation = max(1, round(wanted / profile.batch_size))
    return replace(profile, max_steps=steps, accumulation=accumulation)
