"""The adapter merged into 16 bits: equal to base and adapter, by shards, readable elsewhere."""

import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, FalconConfig

from helpers.dialogues import load_dialogues
from helpers.falcon import LINEARS, load_config, load_falcon
from helpers.profiles import TINY
from helpers.prompts import HUMAN, format_prompt
from tools import merge as tool
from tools.measure_leaving import drift, log_probabilities, nf4_codes, swallowed

ROWS = [dict(row) for row in load_dialogues(TINY.dataset)[0].select(range(3))]


def merged(folder: Path, rounded: bool) -> Path:
    tool.merge(TINY.model, TINY.adapter, folder / "merged", rounded=rounded)
    return folder / "merged"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Merged into the weights as they were published."""
    return merged(tmp_path_factory.mktemp("published"), rounded=False)


def all_weights(folder: Path) -> dict[str, torch.Tensor]:
    parts = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: value for part in parts for name, value in part.items()}


def test_the_merged_weights_are_those_that_peft_merges(published: Path) -> None:
    """The second road: peft's own merge, of the whole model at once, rounded to 16 bits at last."""
    base = load_falcon(TINY.model, TINY, quantize=False)
    theirs = PeftModel.from_pretrained(base, TINY.adapter).merge_and_unload().state_dict()
    ours = all_weights(published)
    assert ours.keys() == theirs.keys() - {"lm_head.weight"}, "the tied head is not stored twice"
    for name, value in ours.items():
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value, theirs[name].bfloat16(), rtol=2**-7, atol=1e-6)


def test_its_logits_are_those_of_base_and_adapter_in_16_bits(published: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(published)
    beside = PeftModel.from_pretrained(load_falcon(TINY.model, TINY, quantize=False), TINY.adapter)
    with beside.disable_adapter():
        off = log_probabilities(beside, tokenizer, ROWS)
    reference = log_probabilities(beside.eval(), tokenizer, ROWS)
    one = log_probabilities(
        AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32).eval(), tokenizer, ROWS
    )
    near, far = drift(reference, one), drift(reference, off)
    assert near["kl"]["value"] < 1e-3 and near["same_choice"]["value"] > 0.95
    assert far["kl"]["value"] > 100 * near["kl"]["value"], "the adapter does nothing here"


def test_merged_as_trained_it_is_the_4_bit_base_with_the_adapter(tmp_path: Path) -> None:
    folder = merged(tmp_path, rounded=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    beside = PeftModel.from_pretrained(load_falcon(TINY.model, TINY), TINY.adapter).eval()
    one = load_falcon(str(folder), TINY, quantize=False)
    found = [log_probabilities(model, tokenizer, ROWS) for model in (beside, one)]
    assert drift(*found)["kl"]["value"] < 1e-3


def test_merging_in_4_bits_swallows_what_a_16_bit_merge_keeps() -> None:
    found = swallowed(Path(TINY.model), TINY.adapter)
    assert found["in_4_bits"] < 0.25 and found["codes_changed"] < 0.02
    assert found["quantized_again"] == pytest.approx(1, abs=0.1)


def test_a_rounded_weight_stays_where_it_is() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    once = tool.round_to_nf4(weight)
    assert torch.equal(nf4_codes(once), nf4_codes(weight))


def test_shards_are_as_many_as_the_base_has_and_the_index_names_them_all(published: Path) -> None:
    index = json.loads((published / "model.safetensors.index.json").read_text())
    base = json.loads((Path(TINY.model) / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == base["weight_map"]
    stored = all_weights(published)
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in stored.values())


def test_bin_shards_are_read_as_well(tmp_path: Path, published: Path) -> None:
    base = tmp_path / "bin"
    base.mkdir()
    for path in Path(TINY.model).glob("*.json"):
        if "index" not in path.name:
            shutil.copy(path, base)
    torch.save(all_weights(Path(TINY.model)), base / "pytorch_model.bin")
    tool.merge(str(base), TINY.adapter, tmp_path / "out", rounded=False)
    ours, theirs = all_weights(tmp_path / "out"), all_weights(published)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_chat_template_writes_the_prompt_that_was_trained(published: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(published)
    history = [("What helps?", "Sleep.")]
    turns = [{"role": "user", "content": " What helps? "}]
    turns += [{"role": "assistant", "content": "Sleep."}, {"role": "user", "content": "And now?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == format_prompt("And now?", history)
    whole = tokenizer.apply_chat_template(turns[:2], tokenize=False)
    assert whole == f"{format_prompt('What helps?')} Sleep.{tokenizer.eos_token}"


def test_other_engines_find_what_they_look_for(published: Path) -> None:
    config = json.loads((published / "config.json").read_text())
    assert config["architectures"] == ["FalconForCausalLM"] and config["dtype"] == "bfloat16"
    assert config["num_kv_heads"] == 1 and "quantization_config" not in config
    ends = json.loads((published / "generation_config.json").read_text())
    assert ends["eos_token_id"] == 11
    modelfile = (published / "Modelfile").read_text()
    assert f'PARAMETER stop "{HUMAN}"' in modelfile and "ADAPTER" not in modelfile
    assert modelfile.count('"""') == 2 and "<ASSISTANT>:" in modelfile


def test_transformers_still_writes_the_number_that_stops_the_converter(tmp_path: Path) -> None:
    FalconConfig().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["multi_query"] and written.get("num_kv_heads") == 71, (
        "transformers writes one key/value head now: num_kv_heads = 1 in tools/merge.py may go"
    )


def test_which_blocks_fit_falcon_7b() -> None:
    fits = tool.fitting_types(FalconConfig())
    assert fits == {
        name: ["blocks of 32"] + ["blocks of 256"] * (name == "dense_4h_to_h") for name in LINEARS
    }
    assert tool.fitting_types(load_config(TINY.model))["dense"] == ["blocks of 32"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "has DoRA: merge it with peft"),
        ({"modules_to_save": ["lm_head"], "bias": "all"}, "has whole modules .*, biases"),
        ({"rank_pattern": {"dense": 4}}, "has a rank for each layer"),
    ],
)
def test_an_adapter_that_is_more_than_two_matrices_is_refused(
    tmp_path: Path, change: dict, words: str
) -> None:
    shutil.copytree(TINY.adapter, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=words):
        tool.merge(TINY.model, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists(), "half a model must not look like a whole one"


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    shutil.copytree(TINY.adapter, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    weights = load_file(file)
    longer = {name.replace(".h.6.", ".h.60."): value for name, value in weights.items()}
    save_file(longer, file)
    with pytest.raises(ValueError, match=r"the base has no transformer\.h\.60\..* with BASE="):
        tool.merge(TINY.model, tmp_path / "adapter", tmp_path / "out")
    narrow = {name: v[..., :16].contiguous() for name, v in weights.items()}
    save_file(narrow, file)
    with pytest.raises(ValueError, match=r"the weight is .* with BASE="):
        tool.merge(TINY.model, tmp_path / "adapter", tmp_path / "out")


def test_no_more_than_one_shard_is_held(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """When a shard is opened, every weight of the shards before it has been let go."""
    written: list[weakref.ref] = []
    held: list[int] = []
    write, read = tool.save_file, tool.read_shard

    def spy_write(tensors: dict[str, torch.Tensor], path: Path, **more) -> None:
        written.extend(weakref.ref(tensor) for tensor in tensors.values())
        write(tensors, path, **more)

    def spy_read(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
        held.append(sum(ref() is not None for ref in written))
        return read(path)

    monkeypatch.setattr(tool, "save_file", spy_write)
    monkeypatch.setattr(tool, "read_shard", spy_read)
    tool.merge(TINY.model, TINY.adapter, tmp_path / "out", rounded=False)
    index = json.loads((Path(TINY.model) / "model.safetensors.index.json").read_text())
    assert held == [0] * 8 and len(written) == len(index["weight_map"])
