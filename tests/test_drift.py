"""Every import and keyword on our pages still exists in the pinned libraries."""

from pathlib import Path

import pytest

from tools.drift import drift, our_files
from tools.drift_newest import drift_with, pinned

ROOT = Path(__file__).resolve().parent.parent
FILES = our_files()

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


def test_methods_of_what_a_file_makes_are_looked_up() -> None:
    source = (
        "import gradio as gr\nfrom trl import SFTTrainer\n"
        "trainer = SFTTrainer(model=None)\n"
        "trainer.train(resume=None)\n"
        "with gr.Blocks() as page:\n    box = gr.Textbox()\n"
        "page.launch(enable_queue=True)\n"
        "trainer.train(resume_from_checkpoint=None)\n"
        "def other(page):\n    pass\n"
    )
    assert drift(source) == ["line 4: train no longer takes ['resume']"], "page means two things"
    assert drift(source.replace("def other(page)", "def other(it)")) == [
        "line 4: train no longer takes ['resume']",
        "line 7: launch no longer takes ['enable_queue']",
    ]


def test_keys_that_are_spread_into_a_call_are_looked_up() -> None:
    source = (
        "from peft import LoraConfig\n"
        "common = {'r': 4, 'rank': 4}\n"
        "LoraConfig(**common)\n"
        "LoraConfig(**dict(lora_alpha=4, alpha=4))\n"
    )
    assert drift(source) == [
        "line 3: LoraConfig no longer takes ['rank']",
        "line 4: LoraConfig no longer takes ['alpha']",
    ]


def test_the_packages_of_a_folder_come_first(tmp_path: Path) -> None:
    """As `make drift` puts the newest ones there: here a library that lost a keyword."""
    newest, page = tmp_path / "newest", tmp_path / "page.py"
    (newest / "einops").mkdir(parents=True)
    (newest / "einops/__init__.py").write_text("def rearrange(tensor, shape):\n    pass\n")
    page.write_text("from einops import rearrange\nrearrange(1, pattern='a')\n")
    assert drift(page.read_text()) == []
    assert drift_with(newest, [page]).endswith("line 2: rearrange no longer takes ['pattern']")
    assert drift_with(tmp_path, [page]) == "1 files: every import and keyword is still there."


def test_every_pin_but_torch_may_move() -> None:
    assert {"transformers", "trl", "peft", "gradio", "wandb"} <= set(pinned())
    assert "torch" not in pinned()
