"""Another causal language model, its tokenizer with or without a pad token: the same rules hold."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BioGptConfig,
    BioGptForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from trl import SFTConfig, SFTTrainer

from helpers import nf4
from helpers.checkpoints import find_adapter
from helpers.dialogues import to_prompt_completion
from helpers.evaluation import answer_losses
from helpers.falcon import (
    assert_quantized,
    load_config,
    load_falcon,
    load_tokenizer,
    use_fused_attention,
)
from helpers.generation import generate_texts, sampling
from helpers.profiles import TINY
from helpers.prompts import format_prompt
from helpers.training import adapters_to_fp32
from tools.any_model import drop_long, lay_adapter, lora_targets

WIDE = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE = WIDE | {"vocab_size": 300, "intermediate_size": 256, "num_key_value_heads": 2}
END, NEOX = "<|endoftext|>", {k: v for k, v in SHAPE.items() if "key_value" not in k}
PAIR = {"question": "What helps?", "answer": "Sleep."}
ROWS = Dataset.from_dict(
    {"question": ["Why?", "How now?", "What helps!"], "answer": ["So!", "Thus.", "Sleep helps!"]}
)


def byte_tokenizer(special: list[str], begin: str = "", **names: str) -> PreTrainedTokenizerFast:
    """Every byte a token, after the special ones; no download, no training."""
    alphabet = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    if begin:
        single = [(begin, made.token_to_id(begin))]
        made.post_processor = processors.TemplateProcessing(f"{begin} $A", special_tokens=single)
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def llama() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, head_dim=16, bos_token_id=1, eos_token_id=2))
    return model, byte_tokenizer(["<unk>", "<s>", "</s>"], begin="<s>", **names)


def neox() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX)), byte_tokenizer([END, "<|padding|>"], **names)


def gpt2() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END)
    config = GPT2Config(vocab_size=300, n_embd=128, n_layer=2, n_head=4, n_positions=256)
    made = byte_tokenizer([END], **names)
    made.add_tokens(["Ã" * 9])  # GPT-2's own vocabulary has such a one too
    return GPT2LMHeadModel(config), made


def qwen2() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True))
    return model, byte_tokenizer([END, "<|im_end|>"], eos_token=END, pad_token=END)


MODELS = {"llama": llama, "neox": neox, "gpt2": gpt2, "qwen2": qwen2}
PADS = {"llama": "<unk>", "neox": "<|padding|>", "gpt2": "Ã" * 9, "qwen2": "<|im_end|>"}
LINEARS_EACH = {"llama": 7, "neox": 4, "gpt2": 4, "qwen2": 7}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Each model saved in a few shards, with its tokenizer."""
    base, found = tmp_path_factory.mktemp("models"), {}
    torch.manual_seed(0)
    for name, make in MODELS.items():
        model, tokenizer = make()
        model.bfloat16().save_pretrained(base / name, max_shard_size="200KB")
        tokenizer.save_pretrained(base / name)
        found[name] = str(base / name)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_pad_token_is_never_the_end_and_needs_no_new_row(
    name: str, folders: dict[str, str]
) -> None:
    tokenizer = load_tokenizer(folders[name])
    assert tokenizer.pad_token == PADS[name] != tokenizer.eos_token
    assert tokenizer.pad_token_id < load_config(folders[name]).vocab_size
    text = ROWS["answer"][2]
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_a_tokenizer_without_an_end_is_refused_in_a_sentence(tmp_path: Path) -> None:
    byte_tokenizer(["<pad>"], pad_token="<pad>").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no end-of-text token, so answers never end: set MODEL"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_but_the_head_is_in_four_bits_as_page_02_predicts(
    name: str, folders: dict[str, str]
) -> None:
    model, config = load_falcon(folders[name], TINY), load_config(folders[name])
    held = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    shapes = nf4.linear_shapes(config)
    assert {n: (m.out_features, m.in_features) for n, m in held.items()} == shapes
    assert assert_quantized(model) == len(shapes) == 2 * LINEARS_EACH[name]
    parts = nf4.stored_parts(model)
    assert parts["codes"] * 2 == nf4.count_linear_weights(config)
    assert nf4.model_bytes_by_part(model)["linears"] == nf4.stored_bytes(model)
    widest, shape = max(shapes.items(), key=lambda item: item[1][0] * item[1][1])
    weight = nf4.read_weight(folders[name], f"{widest}.weight", shape=shape)
    codes = nf4.quantize_nf4(weight.to(TINY.compute_dtype))[0].flatten()
    assert torch.equal(held[widest].weight.data.flatten(), codes[::2] << 4 | codes[1::2])
    assert use_fused_attention(model) == 0
    use_fused_attention(model, on=False)


def test_a_head_of_another_name_stays_as_it_is_too(tmp_path: Path) -> None:
    config = BioGptConfig(**WIDE, vocab_size=300, intermediate_size=256)
    BioGptForCausalLM(config).save_pretrained(tmp_path)
    model = load_falcon(str(tmp_path), TINY)
    assert assert_quantized(model) == len(nf4.linear_shapes(config)) == 12
    assert type(model.output_projection) is torch.nn.Linear


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_on_answers_alone_is_loaded_back_and_answers(
    name: str, folders: dict[str, str], tmp_path: Path
) -> None:
    model, tokenizer = load_falcon(folders[name], TINY), load_tokenizer(folders[name])
    n = sum(8 * (out + into) for out, into in nf4.linear_shapes(model.config).values())
    before = answer_losses(model, tokenizer, ROWS)[0].mean()
    args = SFTConfig(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=3, use_cpu=True, bf16=False,
        learning_rate=1e-2, activation_checkpointing=False, report_to="none", disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    lora = LoraConfig(r=8, task_type="CAUSAL_LM", target_modules=lora_targets(model))
    assert isinstance(lora.target_modules, set) == (name == "neox"), (
        "NeoX names them as Falcon does"
    )
    pairs = to_prompt_completion(ROWS)
    trainer = SFTTrainer(
        model=model, args=args, peft_config=lora, train_dataset=pairs, processing_class=tokenizer
    )
    assert adapters_to_fp32(trainer) == n, "the head has an adapter, or a linear has none"
    row, prompt = trainer.train_dataset[0], tokenizer(pairs["prompt"][0]).input_ids
    learned = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert row["input_ids"] == prompt + learned
    assert learned[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in learned[:-1]
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert answer_losses(trainer.model, tokenizer, ROWS)[0].mean() < before
    size = model.config.hidden_size
    folder = find_adapter(None, str(tmp_path), None, None, None, size, folders[name])[0]
    again = lay_adapter(load_falcon(folders[name], TINY), folder)
    ids = torch.tensor([row["input_ids"]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, trainer.model.eval()(ids).logits)
    prompts = [format_prompt(q) for q in ROWS["question"]]
    said = generate_texts(again, tokenizer, prompts, sampling(tokenizer, max_new_tokens=4))
    assert all(1 <= one.n_tokens <= 4 for one in said)


def test_an_adapter_for_another_base_stops_in_a_sentence(
    folders: dict[str, str], tmp_path: Path
) -> None:
    """GPT-NeoX names its linears as Falcon does: peft loads the one onto the other, and warns."""
    torch.manual_seed(0)
    config = FalconConfig(vocab_size=300, **WIDE)
    FalconForCausalLM(config).save_pretrained(tmp_path / "falcon")
    lora = LoraConfig(r=2, target_modules=["query_key_value", "dense"], init_lora_weights=False)
    made = get_peft_model(load_falcon(str(tmp_path / "falcon"), TINY), lora)
    made.save_pretrained(str(tmp_path / "adapter"))
    lay_adapter(load_falcon(str(tmp_path / "falcon"), TINY), str(tmp_path / "adapter"))
    for name in ("neox", "llama"):
        with pytest.raises(ValueError, match=f"made for another model than {name}: run notebook"):
            lay_adapter(load_falcon(folders[name], TINY), str(tmp_path / "adapter"))


def test_rows_whose_question_leaves_no_room_are_dropped_and_counted() -> None:
    tokenizer = load_tokenizer(TINY.model)
    rows = Dataset.from_list([PAIR, {"question": "Why? " * 50, "answer": "So."}])
    limit = len(tokenizer(format_prompt(PAIR["question"])).input_ids) + 1
    kept, dropped = drop_long({"train": rows, "test": rows.select([0])}, tokenizer, limit)
    assert {name: list(part) for name, part in kept.items()} == {"train": [PAIR], "test": [PAIR]}
    assert dropped == {f"question of {limit} tokens or more": 1}
    with pytest.raises(ValueError, match="every question of the train part fills .* MAX_LENGTH"):
        drop_long({"train": rows}, tokenizer, limit - 1)
