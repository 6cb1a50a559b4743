"""Every import and keyword on our pages still exists in the pinned libraries."""

from pathlib import Path

import pytest

from tools.drift import drift

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("notebooks/py", "helpers", "tools", "benchmarks", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))

# A recipe of 2023 in one call each: five of its keywords are gone from today's libraries.
RECIPE_OF_2023 = """
from transformers import GenerationConfig, TrainingArguments
from trl import SFTTrainer

arguments = TrainingArguments(
    output_dir="out",
    optim="paged_adamw_32bit",
    max_grad_norm=0.3,
    warmup_ratio=0.03,
    group_by_length=True,
)
trainer = SFTTrainer(
    model=None,
    train_dataset=None,
    peft_config=None,
    dataset_text_field="text",
    max_seq_length=1024,
    tokenizer=None,
    args=arguments,
)
GenerationConfig(temperature=0.4, attention_mask=None)
"""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_has_drifted(path: Path) -> None:
    assert drift(path.read_text()) == []


def test_the_notebooks_are_among_the_files() -> None:
    assert sum(path.parent.name == "py" for path in FILES) == 5


def test_an_old_recipe_is_caught() -> None:
    assert drift(RECIPE_OF_2023) == [
        "line 5: TrainingArguments no longer takes ['warmup_ratio', 'group_by_length']",
        "line 12: SFTTrainer no longer takes ['dataset_text_field', 'max_seq_length', 'tokenizer']",
        "line 21: GenerationConfig no longer takes ['attention_mask']",
    ]


def test_a_lost_name_is_caught() -> None:
    source = "import torch\nfrom trl import SFTTrainerX\ntorch.no_such_function(a=1)\n"
    assert drift(source) == [
        "line 2: trl has no SFTTrainerX",
        "line 3: torch has no no_such_function",
    ]
