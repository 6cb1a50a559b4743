"""The traps of today's libraries, each with its mend taken away to see that it matters."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM, StaticCache
from transformers.models.falcon import modeling_falcon

from helpers import falcon, profiles
from helpers.falcon import (
    LINEARS,
    assert_quantized,
    load_config,
    load_falcon,
    load_tokenizer,
    nf4_config,
    quantize_falcon_linears,
    use_fused_attention,
)
from helpers.profiles import TINY, detect_profile

SHAPE = {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
OLD = {
    "vocab_size": 256,
    "hidden_size": 128,
    "n_layer": 2,
    "n_head": 4,
    "multi_query": True,
    "parallel_attn": True,
    "bias": False,
    "alibi": False,
    "auto_map": {"AutoConfig": "x.Y"},
    "architectures": ["RWForCausalLM"],
    "layer_norm_epsilon": 1e-5,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Falcon in safetensors shards."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    FalconForCausalLM(FalconConfig(**SHAPE)).save_pretrained(folder, max_shard_size="300KB")
    return folder


def as_bin(source: Path, target: Path) -> Path:
    """The same model as `.bin` shards with their index."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    weight_map = {}
    for number, shard in enumerate(sorted(source.glob("*.safetensors")), 1):
        name = f"pytorch_model-{number:05d}.bin"
        weights = load_file(shard)
        torch.save(weights, target / name)
        weight_map |= dict.fromkeys(weights, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (target / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return target


def test_trap_1_without_the_mend_falcon_stays_in_16_bits(small: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(
        small, dtype=torch.float32, quantization_config=nf4_config(TINY)
    )
    assert plain.is_loaded_in_4bit, "the library says that it is quantized ..."
    count = sum(isinstance(m, Linear4bit) for m in plain.modules())
    assert count == 0, (
        "... and it is: transformers has mended this: the mend quantize_falcon_linears may go"
    )
    with pytest.raises(AssertionError, match="no 4-bit layer at all"):
        assert_quantized(plain)


def test_trap_1_mended(small: Path) -> None:
    model = load_falcon(str(small), TINY)
    assert assert_quantized(model) == 8
    assert modeling_falcon.FalconLinear is not nn.Linear, "the mend must not outlive the loading"


def test_assert_quantized_finds_a_single_plain_layer(small: Path) -> None:
    model = load_falcon(str(small), TINY)
    model.transformer.h[1].self_attention.dense = nn.Linear(128, 128)
    with pytest.raises(AssertionError, match=r"h\.1\.self_attention\.dense"):
        assert_quantized(model)


def gradients(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    lora = LoraConfig(
        r=4, lora_alpha=4, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules=list(LINEARS)
    )
    peft = get_peft_model(model, lora).train()
    for name, weight in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.02)
    peft(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    found = {n: p.grad.clone() for n, p in peft.named_parameters() if p.grad is not None}
    peft.unload()
    return found


def evaluate_then_train(small: Path) -> tuple[dict, dict]:
    """Gradients of an NF4 model after an evaluation, and of its dequantized twin."""
    import bitsandbytes as bnb

    ids = torch.randint(12, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    model, twin = load_falcon(str(small), TINY), load_falcon(str(small), TINY, quantize=False)
    twins = dict(twin.named_modules())
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            full = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            twins[name].weight.data = full.float()
    with torch.no_grad():
        model(input_ids=ids)
    return gradients(model, ids), gradients(twin, ids)


def worst_cosine(ours: dict, true: dict) -> float:
    return min(
        torch.cosine_similarity(ours[n].flatten(), true[n].flatten(), dim=0).item() for n in true
    )


def test_trap_3_gradients_are_right_after_an_evaluation(small: Path) -> None:
    assert worst_cosine(*evaluate_then_train(small)) > 0.9999


def test_trap_3_every_layer_has_the_repacking_turned_off(small: Path) -> None:
    layers = [m for m in load_falcon(str(small), TINY).modules() if isinstance(m, Linear4bit)]
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_trap_3_without_the_mend(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(falcon, "keep_cpu_layout", lambda model: None)
    layers = [m for m in load_falcon(str(small), TINY).modules() if isinstance(m, Linear4bit)]
    hit = {layer.support_avx512bf16_for_cpu for layer in layers}
    assert hit == {has_avx512bf16()}, "bitsandbytes decides otherwise now: see keep_cpu_layout"
    if hit == {True}:  # test_upstream.py looks for the cause on every CPU
        assert worst_cosine(*evaluate_then_train(small)) < 0.99, (
            "bitsandbytes has mended this: the mend keep_cpu_layout may go"
        )


LEFT, RIGHT = [[0, 0, 0, 1, 1, 1, 1], [1] * 7], [[1, 1, 1, 1, 0, 0, 0], [1] * 7]


@pytest.mark.parametrize(
    "mask", [None, [[1] * 7] * 2, LEFT, RIGHT], ids=["none", "ones", "left", "right"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_trap_4_fused_attention_equals_the_library_forward_and_backward(
    small: Path, mask: list | None, dtype: torch.dtype
) -> None:
    ids = torch.randint(12, 250, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = None if mask is None else torch.tensor(mask)
    real = torch.ones_like(ids) if mask is None else mask
    found = []
    for fused in (False, True):
        model = load_falcon(str(small), replace(TINY, compute_dtype=dtype), quantize=False)
        assert use_fused_attention(model, fused) == 2 * fused
        logits = model(input_ids=ids, attention_mask=mask).logits.float() * real[..., None]
        logits.square().mean().backward()
        grads = [p.grad.float() for p in model.parameters()]
        found.append([logits, *grads])
    use_fused_attention(model, False)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype]
    for library, ours in zip(*found, strict=True):
        assert (library - ours).norm() <= tolerance * library.norm() + 1e-6


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["left", "none"])
def test_trap_4_fused_attention_decodes_the_same_tokens(small: Path, cache: str, side: str) -> None:
    model = load_falcon(str(small), TINY, quantize=False)
    ids = torch.randint(12, 250, (2, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor(LEFT if side == "left" else [[1] * 7] * 2)
    more = {"cache_implementation": "static"} if cache == "static" else {}
    made = []
    for fused in (False, True):
        use_fused_attention(model, fused)
        made.append(
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=20,
                do_sample=False,
                pad_token_id=9,
                eos_token_id=255,
                **more,
            )
        )
    use_fused_attention(model, False)
    assert torch.equal(*made)


def test_trap_4_a_mask_is_made_where_one_is_needed(small: Path) -> None:
    x = torch.zeros(2, 7, 128)
    config = load_config(str(small))
    config._attn_implementation = "sdpa"
    ask = {"config": config, "inputs_embeds": x, "past_key_values": None}
    assert falcon.causal_mask_or_none(**ask, attention_mask=torch.tensor(RIGHT)) is None
    assert falcon.causal_mask_or_none(**ask, attention_mask=None) is None
    assert falcon.causal_mask_or_none(**ask, attention_mask=torch.tensor(LEFT)) is not None
    ask["past_key_values"] = StaticCache(config=config, max_cache_len=16)
    assert falcon.causal_mask_or_none(**ask, attention_mask=torch.tensor(RIGHT)) is not None


def pretend_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built: list[str]
) -> None:
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "is_bf16_supported", lambda *a, **k: True)  # as a T4 answers
    monkeypatch.setattr(cuda, "get_device_capability", lambda *a: capability)
    monkeypatch.setattr(cuda, "get_device_name", lambda *a: "Some GPU")
    monkeypatch.setattr(cuda, "get_arch_list", lambda: built)


def test_trap_5_a_t4_is_given_fp16_although_it_claims_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (7, 5), ["sm_75", "sm_80", "sm_90"])
    profile = detect_profile("auto")
    assert (profile.name, profile.compute_dtype) == ("t4", torch.float16)
    with pytest.raises(ValueError, match=r"capability 7.5 and bf16 needs 8.0: set PROFILE = 't4'"):
        detect_profile("a100")


def test_newer_cards_get_the_a100_profile_and_their_own_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_gpu(monkeypatch, (9, 0), ["sm_75", "sm_80", "sm_90a"])
    monkeypatch.setenv("LOCAL_RANK", "3")
    profile = detect_profile("auto", model="some/model")
    assert (profile.name, profile.device_map, profile.model) == (
        "a100",
        {"": "cuda:3"},
        "some/model",
    )


def test_a_gpu_that_torch_has_no_kernels_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (6, 0), ["sm_75", "sm_80", "sm_90"])  # Kaggle's P100
    with pytest.raises(ValueError, match=r"no kernels for the Some GPU .* set PROFILE = 'cpu'"):
        detect_profile("auto")


def test_trap_7_an_old_torchao_does_not_stop_quantized_layers(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft raises on torchao 0.10 as soon as it wraps a plain layer; 4-bit layers do not ask it."""
    import peft.tuners.lora.torchao as lora_torchao

    def old() -> bool:
        raise ImportError("Found an incompatible version of torchao")

    monkeypatch.setattr(lora_torchao, "is_torchao_available", old)
    lora = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=list(LINEARS))
    get_peft_model(load_falcon(str(small), TINY), lora)
    with pytest.raises(ImportError, match="torchao"):
        get_peft_model(load_falcon(str(small), TINY, quantize=False), lora)


@pytest.mark.parametrize("files", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", ["falcon", "RefinedWebModel", "falcon with old keys"])
def test_every_checkpoint_of_any_age_loads(
    small: Path, tmp_path: Path, files: str, kind: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small, folder) if files == "safetensors" else as_bin(small, folder)
    if kind != "falcon":
        old = {**OLD, "model_type": "RefinedWebModel" if "Web" in kind else "falcon"}
        (folder / "config.json").write_text(json.dumps(old))
    config = load_config(str(folder))
    assert (config.model_type, config.num_hidden_layers, config.num_attention_heads) == (
        "falcon",
        2,
        4,
    )
    model, ids = load_falcon(str(folder), TINY), torch.arange(20, 40)[None]
    reference = load_falcon(str(small), TINY)
    assert assert_quantized(model) == 8
    assert torch.equal(model(ids).logits, reference(ids).logits)


def test_the_library_alone_refuses_or_misreads_an_old_config(tmp_path: Path) -> None:
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps({**OLD, "model_type": "falcon"}))
    assert AutoConfig.from_pretrained(tmp_path).num_hidden_layers != 2, (
        "transformers reads n_layer now: the mend OLD_KEYS may go"
    )
    (tmp_path / "config.json").write_text(json.dumps({**OLD, "model_type": "RefinedWebModel"}))
    with pytest.raises(ValueError):
        AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)


@pytest.mark.parametrize("files", ["safetensors", "bin"])
def test_a_missing_shard_is_named(small: Path, tmp_path: Path, files: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small, folder) if files == "safetensors" else as_bin(small, folder)
    gone = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))[1]
    gone.unlink()
    with pytest.raises(
        FileNotFoundError, match=f"lacks 1 of .*{gone.name}.*download the model again"
    ):
        load_falcon(str(folder), TINY)


@pytest.mark.parametrize("files", ["safetensors", "bin"])
def test_each_shard_has_its_bar_and_is_mapped_rather_than_read_whole(
    small: Path,
    tmp_path: Path,
    files: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = small if files == "safetensors" else as_bin(small, tmp_path / "model")
    mapped, load = [], torch.load
    monkeypatch.setattr(
        torch, "load", lambda *a, **k: mapped.append(k.get("mmap")) or load(*a, **k)
    )
    load_falcon(str(folder), TINY)
    shards = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
    assert len(shards) > 2 and mapped == [True] * len(shards) * (files == "bin")
    shown = re.findall(r"([\w.-]+): 100%.* (\d+)/\2", capsys.readouterr().err)
    assert list(dict.fromkeys(name for name, _ in shown)) == shards


@pytest.mark.parametrize("what", [load_config, load_tokenizer])
def test_without_network_one_sentence_says_what_to_set(
    what, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        OSError, match=r"could not fetch 'nobody/nothing' .* set MODEL to a local folder"
    ):
        what("nobody/nothing")


def test_the_tokenizer_has_falcons_special_tokens_at_falcons_places() -> None:
    tokenizer = load_tokenizer(TINY.model)
    names = tokenizer.convert_ids_to_tokens(range(12))
    assert names[0] == ">>TITLE<<" and names[9:] == [">>SUFFIX<<", ">>MIDDLE<<", "<|endoftext|>"]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (9, 11)


def test_the_tiny_falcon_is_a_falcon_in_eight_shards() -> None:
    config, folder = load_config(TINY.model), Path(TINY.model)
    assert config.multi_query and config.parallel_attn and not config.new_decoder_architecture
    assert len(list(folder.glob("*.safetensors"))) == 8
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 20e6


def test_the_quantizing_mend_is_undone_when_loading_fails() -> None:
    before = modeling_falcon.FalconLinear
    with pytest.raises(RuntimeError), quantize_falcon_linears():
        raise RuntimeError
    assert modeling_falcon.FalconLinear is before


@pytest.mark.parametrize("name", ["t5", "A100", ""])
def test_an_unknown_profile_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match="use 'auto', 'cpu', 't4' or 'a100'"):
        detect_profile(name)


def test_a_gpu_profile_without_a_gpu_is_refused() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(
            ValueError, match="needs a GPU and torch sees none: set PROFILE = 'cpu'"
        ):
            detect_profile("t4")


def test_too_little_disk_is_said_before_anything_is_written(tmp_path: Path) -> None:
    profiles.check_disk(str(tmp_path / "not/yet/there"), 1)
    with pytest.raises(OSError, match="GB free and the checkpoints need 1000000.0 GB"):
        profiles.check_disk(str(tmp_path), 10**15)
