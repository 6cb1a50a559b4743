"""The memory plan: against recorded points, to the byte where bytes are known, and put to use."""

import copy
import doctest
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import FalconConfig
from transformers.models.falcon.modeling_falcon import FalconDecoderLayer
from trl import SFTConfig, SFTTrainer

from benchmarks import t4_limits
from benchmarks.memory import (
    BEST,
    FAST,
    GRID,
    LEAN,
    PEFT,
    joined,
    live_at_peak,
    rows,
    score,
    together,
)
from benchmarks.t4_limits import OURS
from helpers.checkpoints import CheckpointManifest, train_and_survive
from helpers.falcon import LINEARS, load_falcon, load_tokenizer
from helpers.memory import PAGED_FROM, out_of_memory, page_again, plan_memory
from helpers.profiles import A100, GIB, T4, TINY
from helpers.training import adapters_to_fp32
from tools import mends
from tools.mends import Mends, choose_mends, fit_memory, most_tokens

RECORDED = Path(__file__).resolve().parent.parent / "results/h100/memory.json"


def entry(action: str, addr: int, size: int) -> dict:
    frame = {"filename": "/x/peft/tuners/lora/bnb.py", "line": 7, "name": "forward"}
    return {"action": action, "addr": addr, "size": size, "frames": [frame]}


def test_the_record_tells_what_was_alive_at_the_peak() -> None:
    trace = [entry("alloc", 1, 100), entry("alloc", 2, 300), entry("alloc", 3, 300),
             entry("free_completed", 2, 300), entry("alloc", 4, 50)]  # fmt: skip
    found = live_at_peak(trace)
    assert found["bytes"] == 700 and found["at"] == 3
    assert [group[:2] for group in found["groups"]] == [[300, 2], [100, 1]]
    assert found["groups"][0][2] == "bnb.py:7 forward"


def test_what_was_made_before_the_record_counts_when_it_goes() -> None:
    trace = [entry("free_completed", 9, 80), entry("alloc", 1, 100)]
    assert live_at_peak(trace)["bytes"] == 20


def test_the_grid_is_large_enough_and_scores_no_calibration_point() -> None:
    scored = [(g[0], str(g[1]), *g[2:4], size) for g in GRID for size in g[4]]
    others = [(g[0], str(g[1]), *g[2:4], size) for g in GRID for size in g[5]]
    assert len(scored) >= 24 and len(set(scored)) == len(scored)
    assert not set(scored) & set(others)


@pytest.mark.skipif(not RECORDED.exists(), reason="results/h100/memory.json is not recorded yet")
def test_todays_plan_meets_every_recorded_point() -> None:
    figures = score(json.loads(RECORDED.read_text()))
    faults = [point["error"] for point in figures["points"] if "error" in point]
    assert figures["scored"] >= 24 and not faults
    assert figures["worst_error"] <= 0.05


def test_the_plan_meets_the_peaks_under_a_t4_s_limits() -> None:
    """Peaks of another benchmark, three runs: one layer of eight computed again, or one of four."""
    parts = json.loads((RECORDED.parent / "t4_limits.json").read_text())["parts"]
    found = {name: (p["again_of"], p) for name, p in parts.items() if "again_of" in p}
    assert sum(name.startswith("ours, 512") for name in found) >= 2
    assert sum(name.startswith("ours, 256") for name in found) >= 2
    for name, (every, part) in found.items():
        assert every == (8 if name.startswith("ours") else 4)
        assert part["most_tokens"] == 4096
        plan = plan_memory(T4, FalconConfig(), 1, 4096, 32, every > 0, True, True, every=every or 1)
        assert sum(plan.values()) / GIB == pytest.approx(part["peak_gib"], rel=0.05)


def test_a_later_run_of_some_groups_keeps_the_others() -> None:
    same = {"mends": {"lean": True}, "rank": 1, "checkpointing": 4, "batch": 2, "length": 64}
    kept, old, new = (
        {**same, "dtype": dtype, "peak": n * GIB} for dtype, n in (("a", 1), ("b", 2), ("b", 3))
    )
    both = joined({"points": [kept, old], "commit": "x"}, {"points": [new], "commit": "y"})
    assert both["points"] == [kept, new] and both["commit"] == "y"
    assert both["earlier_run"]["commit"] == "x" and both["earlier_run"]["points"] == 1
    replaced = {"b lean r1 again of 4 2 x 64": {"before_gib": 2, "after_gib": 3}}
    assert both["earlier_run"]["replaced"] == replaced


def test_two_runs_of_one_commit_make_one_and_an_older_group_gives_way() -> None:
    def points(*names: str) -> list[dict]:
        return [{"dtype": n, "mends": {}, "rank": 1, "checkpointing": 0} for n in names]

    told = dict.fromkeys(("command", "date", "commit", "machine"), "x")
    late = {"error": "out of time"}
    first = told | {"points": [*points("old", "b", "a"), late], "earlier_run": {"points": 2}}
    both = together(first, told | {"points": points("b", "c")})
    assert [point["dtype"] for point in both["points"]] == ["old", "a", "b", "c"]
    assert both["earlier_run"]["points"] == 1 and both["continued"]["points"] == 2
    with pytest.raises(ValueError, match="of different commits"):
        together(first, told | {"commit": "y"})


# --- what a plan says -------------------------------------------------------------------------


def test_the_plan_of_weights_and_adapters_is_the_tiny_models_to_the_byte() -> None:
    """The other road: what bitsandbytes and peft have stored."""
    model = load_falcon(TINY.model, TINY)
    plan = plan_memory(TINY, model.config, rank=4)
    states = [m.weight for m in model.modules() if isinstance(m, Linear4bit)]
    parts = [(w.data, w.quant_state.absmax, w.quant_state.state2.absmax) for w in states]
    stored = sum(t.nbytes for part in parts for t in part)
    blocks = sum(w.quant_state.absmax.numel() for w in states)
    rounded = sum(-(-w.quant_state.absmax.numel() // 256) * 4 for w in states) - blocks / 64
    assert plan["weights"] + rounded == stored, "scales of scales are rounded up, layer by layer"
    lora = LoraConfig(r=4, target_modules=list(LINEARS), task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    numbers = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert plan["adapters"] == plan["gradients"] == 4 * numbers
    assert plan["optimizer"] == 8 * numbers, "AdamW on a CPU pages nothing"


class Paging(torch.optim.AdamW):
    """Pages as bitsandbytes does on a GPU: large states, and only when they are first made."""

    is_paged = True

    def get_state_buffer(self, number: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        buffer = torch.zeros_like(number, dtype=dtype)
        buffer.is_paged = number.numel() >= PAGED_FROM
        return buffer


def test_a_resumed_optimizer_is_paged_again(tmp_path) -> None:
    """Through the callback that every run has; small states stay, no number changes."""
    numbers = [torch.nn.Parameter(torch.ones(n)) for n in (PAGED_FROM, 10)]
    optimizer = Paging(numbers)
    for number in numbers:
        number.grad = torch.rand_like(number)
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = copy.deepcopy(optimizer.state_dict())
    keeper = CheckpointManifest(mark={})
    args = SimpleNamespace(save_total_limit=1, output_dir=tmp_path)
    state = SimpleNamespace(is_world_process_zero=True, global_step=1)
    wrapped = SimpleNamespace(optimizer=optimizer)  # as accelerate does
    keeper.on_train_begin(args, state, None, torch.nn.Linear(1, 1), optimizer=wrapped)
    keeper.on_train_end(args, state, None)
    paged = [
        [
            getattr(optimizer.state[number][name], "is_paged", False)
            for name in ("exp_avg", "exp_avg_sq")
        ]
        for number in numbers
    ]
    assert paged == [[True, True], [False, False]]
    for number, kept in zip(numbers, before["state"].values(), strict=True):
        assert all(torch.equal(optimizer.state[number][name], kept[name]) for name in kept)
    assert page_again(optimizer) == 0, "moved twice"


@pytest.mark.parametrize(
    ("profile", "mends", "longest", "gib", "expected"),
    [
        (T4, FAST, 512, 14.75, (8, 8, 8)),
        (T4, FAST, 256, 14.75, (16, 4, 8)),
        (T4, LEAN, 512, 14.75, (16, 4, 1)),
        (T4, PEFT, 512, 14.75, (16, 4, 1)),
        (T4, FAST, 512, 15.5, (8, 8, 8)),
        (T4, FAST, 512, 8, (8, 8, 1)),
        (A100, BEST, 512, 39.4, (16, 4, 0)),
        (A100, BEST, 512, 79.2, (16, 4, 0)),
        (A100, BEST, 512, 15, (16, 4, 2)),
        (A100, BEST, 512, 13, (8, 8, 0)),
    ],
)
def test_micro_batch_and_checkpointing_come_from_the_plan(
    profile, mends, longest, gib, expected
) -> None:
    lengths = [longest, *range(48, longest)]
    fitted = fit_memory(profile, mends, FalconConfig(), lengths, memory=int(gib * GIB))
    every = fitted.checkpoint_every * fitted.gradient_checkpointing
    found = fitted.batch_size, fitted.accumulation, every
    assert found == expected and found[0] * found[1] == 64


@pytest.mark.parametrize("length", [512, 256])
def test_what_was_timed_under_a_t4_s_limits_is_what_a_t4_gets(length: int) -> None:
    lengths = [length, *range(48, length)]
    profile = fit_memory(T4, FAST, FalconConfig(), lengths, memory=int(14.75 * GIB))
    assert OURS[f"ours, {length} tokens"][2:4] == (profile.batch_size, profile.checkpoint_every)
    assert profile.gradient_checkpointing


def test_runs_under_a_t4_s_limits_join_and_come_apart_again() -> None:
    """No part is lost or takes another's name, the second turns of a run least of all."""
    examples = doctest.testmod(t4_limits)
    assert examples.attempted >= 4 and not examples.failed
    pace = {"useful_tokens_per_s": {"value": 6, "low": 5, "high": 7, "n": 2}}
    ours = pace | {"rows": 8, "again_of": 8}
    turns = {"seed, 512 tokens": pace, "ours, 512 tokens": ours}
    run = {"date": "May", "parts": turns | {f"{name}, again": x for name, x in turns.items()}}
    both = t4_limits.joined(run, run, run)
    assert len(both["parts"]) == 12 and both["ratio"]["512"]["by_run"] == [1.0] * 3
    pieces = t4_limits.apart(both)
    assert [piece["parts"] for piece in pieces] == [run["parts"]] * 3
    assert t4_limits.joined(*pieces)["parts"] == both["parts"]


def test_what_somebody_has_set_and_what_is_not_planned_stays() -> None:
    own = replace(A100, batch_size=2, accumulation=32)
    fitted = fit_memory(own, BEST, FalconConfig(), [300] * 9, fixed=True, memory=40 * GIB)
    assert fitted == replace(own, gradient_checkpointing=False)
    assert fit_memory(TINY, LEAN, FalconConfig(), [300] * 9) is TINY
    other = SimpleNamespace(model_type="llama")
    assert fit_memory(T4, LEAN, other, [300] * 9) is T4


def test_the_largest_micro_batch_is_that_of_the_run() -> None:
    lengths = [60] * 63 + [100]
    padded = most_tokens(T4, LEAN, lengths, 8)
    assert padded == 800
    assert most_tokens(A100, BEST, lengths, 8) == 7 * 60 + 100


# --- out of memory all the same ---------------------------------------------------------------


def tiny_trainer(folder: Path, batch: int) -> SFTTrainer:
    args = SFTConfig(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=batch, max_length=64,
        gradient_accumulation_steps=8 // batch, use_cpu=True, bf16=False, report_to="none",
        disable_tqdm=True, save_strategy="no", optim="adamw_torch", logging_steps=1,
    )  # fmt: skip
    lora = LoraConfig(r=4, target_modules=list(LINEARS), task_type="CAUSAL_LM", lora_dropout=0.1)
    trainer = SFTTrainer(
        model=load_falcon(TINY.model, TINY), args=args, train_dataset=rows(8, 16, 6000, 1),
        processing_class=load_tokenizer(TINY.model), peft_config=lora,
        callbacks=[CheckpointManifest(mark={}, say=SAID.append)],
    )  # fmt: skip
    adapters_to_fp32(trainer)
    return trainer


SAID: list[str] = []


def break_in_the_backward(monkeypatch) -> list:
    """Memory ends when the graph is whole; weak references to what the step holds then."""
    held: list = []

    def backward(self, loss: torch.Tensor, **kwargs) -> None:
        activations = loss * torch.ones(1000)
        held.extend([weakref.ref(activations), weakref.ref(loss)])
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.11 GiB.")

    monkeypatch.setattr(Accelerator, "backward", backward)
    return held


def test_out_of_memory_is_one_sentence_and_the_page_goes_on(tmp_path: Path, monkeypatch) -> None:
    """A micro-batch of 8 rows breaks in its forward; then BATCH_SIZE = 4, on one runtime."""
    SAID.clear()
    plan = {"weights": 1.0 * GIB, "activations": 7.0 * GIB}
    trainer, held = tiny_trainer(tmp_path, 8), break_in_the_backward(monkeypatch)
    assert train_and_survive(trainer, plan=plan) is False
    assert SAID == [
        "Out of GPU memory; the plan's largest part is activations, 7.0 of 8.0 GiB: "
        "set BATCH_SIZE = 4 and run the page again from that cell."
    ]
    assert held and not any(ref() is not None for ref in held), "the step is still held"
    assert trainer.optimizer is None and trainer.callback_handler.optimizer is None
    old = [weakref.ref(trainer), weakref.ref(trainer.model), weakref.ref(trainer.model.base_model)]
    old += [weakref.ref(p) for p in trainer.model.parameters()]
    monkeypatch.undo()

    trainer = tiny_trainer(tmp_path, 4)  # the cells again, with the smaller constant
    assert train_and_survive(trainer, plan=plan) is True
    assert trainer.state.global_step == 2
    assert not [ref for ref in old if ref() is not None], "the old trainer is still held"


def test_out_of_memory_ends_one_of_several_processes(tmp_path: Path, monkeypatch) -> None:
    SAID.clear()
    trainer = tiny_trainer(tmp_path, 8)
    break_in_the_backward(monkeypatch)
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    with pytest.raises(torch.OutOfMemoryError):  # caught, it would leave the others waiting
        train_and_survive(trainer)
    assert SAID == [out_of_memory(None, trainer.args)]


def test_where_compiling_fails_the_run_goes_on_uncompiled(monkeypatch, capsys) -> None:
    monkeypatch.setattr(mends, "compiling_fault", lambda device: "TritonMissing")
    assert choose_mends(T4, 32) == Mends(lean=True)
    assert "Compiling does not work here (TritonMissing)" in capsys.readouterr().out
    monkeypatch.setattr(mends, "compiling_fault", lambda device: "")
    assert choose_mends(T4, 32) == Mends(lean=True, compiled=True)
    assert capsys.readouterr().out == ""


# --- a resumed run compiles for the sizes that it began with ----------------------------------


def test_a_resumed_run_sees_its_first_sizes_first_and_ends_alike(tmp_path: Path) -> None:
    """Stand-ins for compiled blocks note sizes; all else must be as in the unbroken run."""
    ends: dict[str, tuple] = {}
    for name, resume in (("unbroken", None), ("resumed", str(tmp_path / "unbroken/checkpoint-1"))):
        trainer, sizes = tiny_trainer(tmp_path / name, 2), []
        trainer.args.save_strategy, trainer.args.save_steps = "steps", 1
        trainer.args.train_sampling_strategy = "sequential"
        trainer.train_dataset = Dataset.from_list(
            [{"input_ids": [20 + n] * (4 + n)} for n in range(16)]
        )
        for block in trainer.model.modules():
            if isinstance(block, FalconDecoderLayer):
                block._compiled_call_impl = noted(block, sizes)
        assert train_and_survive(trainer, resume)
        left_open = trainer.accelerator.gradient_state.active_dataloader
        weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        counts = [log["num_tokens"] for log in trainer.state.log_history if "num_tokens" in log]
        ends[name] = sizes[0], trainer.state.log_history[-2]["loss"], counts[-1], weights
    assert left_open is None, "the batch of the first sizes came from it"
    (*rest, all_tokens, weights), (*same, tokens, again) = ends.values()
    assert rest == same and rest[0][:2] == (2, 5)
    assert tokens == all_tokens - sum(range(4, 12)), "TRL counts what a run has seen itself"
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())


def noted(block: FalconDecoderLayer, sizes: list) -> Callable:
    """What a compiled block is called by, with a note of its input's size."""

    def call(hidden: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        sizes.append(tuple(hidden.shape))
        return block._call_impl(hidden, *args, **kwargs)

    return call
