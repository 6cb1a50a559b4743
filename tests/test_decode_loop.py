"""Our own decoding loop inside `generate`: the library's tokens, ends, stream and stop."""

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, StopStringCriteria

from benchmarks import decoding as benchmark
from helpers import generation
from helpers.falcon import LINEARS, load_falcon, load_tokenizer, use_fused_attention
from helpers.generation import Chat, compile_decoding, generate_texts, reply, sampling, stream_reply
from helpers.joined import join_layers
from helpers.profiles import TINY
from helpers.prompts import HUMAN, format_prompt
from tools import decode_loop
from tools.decode_loop import DecodeLoop, OwnLoop

QUESTIONS = ("What is stress?", "How can I sleep better before a long and hard week?", "Why?")
PROMPTS = [format_prompt(question) for question in QUESTIONS]


@pytest.fixture(scope="module")
def loaded():
    """Two of the tiny Falcon's eight layers: what they say makes no sense, and comes fast."""
    model = load_falcon(TINY.model, TINY)
    del model.transformer.h[2:]
    model.config.num_hidden_layers = 2
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY.model)


@pytest.fixture
def model(loaded):
    """With fused attention and an adapter."""
    torch.manual_seed(0)
    lora = LoraConfig(
        r=4, target_modules=list(LINEARS), task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = get_peft_model(copy.deepcopy(loaded), lora).eval()
    use_fused_attention(model)
    yield model
    use_fused_attention(model, False)


def own(model, config: GenerationConfig, **settings) -> GenerationConfig:
    return compile_decoding(model.get_base_model(), config, own_loop=OwnLoop(**settings))


def draw_some(tokenizer, n: int = 20, draws: bool = True) -> GenerationConfig:
    return sampling(tokenizer, n, *((0.9, 0.8, 1.3) if draws else (0,)))


@pytest.mark.parametrize("draws", [False, True], ids=["greedy", "drawn"])
def test_texts_are_the_library_s_with_unlike_lengths_ends_and_stop_strings(
    model, tokenizer, draws: bool
) -> None:
    """Three prompts in batches of two and one; ends and stop strings taken from what is said."""
    config = draw_some(tokenizer, draws=draws)
    plain = generate_texts(model, tokenizer, PROMPTS, config, batch_size=2)
    assert generate_texts(model, tokenizer, PROMPTS, own(model, config), batch_size=2) == plain
    stop = plain[0].text[-3:]  # the others do not say it, or later
    stopped = generate_texts(model, tokenizer, PROMPTS, config, 0, 2, stop)
    assert len({answer.n_tokens for answer in stopped}) > 1, "nothing was stopped"
    assert generate_texts(model, tokenizer, PROMPTS, own(model, config), 0, 2, stop) == stopped
    config.eos_token_id = tokenizer(plain[0].text, add_special_tokens=False).input_ids[9]
    twice, fast = [], own(model, config)
    for seed in (0, 1):
        twice += [model.generate(**inputs(tokenizer, seed), generation_config=config)]
        fresh = inputs(tokenizer, seed)
        assert torch.equal(
            model.generate(**fresh, generation_config=fast, **generation._own(fast)), twice[-1]
        )
    assert (twice[0] == config.eos_token_id).any(), "no row has ended"
    assert len(fast.own_loop.loops) == 1


def inputs(tokenizer, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return generation._encode(tokenizer, PROMPTS, torch.device("cpu"), sampling(tokenizer))


def test_with_a_static_cache_prompts_fill_blocks_of_64_and_say_the_same(model, tokenizer) -> None:
    """On a GPU that keeps the number of lengths small; a pad must change no word."""
    config = draw_some(tokenizer, 12, draws=False)
    plain = generate_texts(model, tokenizer, PROMPTS, config, batch_size=2)
    config.cache_implementation = "static"
    batch = generation._encode(tokenizer, PROMPTS, torch.device("cpu"), config)
    mask = batch["attention_mask"]
    assert mask.shape[1] % generation.PAD_TO == 0 and mask[:, -1].all() and not mask[:, 0].any()
    for settings in (config, own(model, config)):
        assert generate_texts(model, tokenizer, PROMPTS, settings, batch_size=2) == plain


def test_an_end_is_held_open_and_a_longer_prompt_gets_more_room(model, tokenizer) -> None:
    config = draw_some(tokenizer, 20, draws=False)
    first = generate_texts(model, tokenizer, PROMPTS[:1], config)[0]
    config.eos_token_id = tokenizer(first.text, add_special_tokens=False).input_ids[3]
    assert generate_texts(model, tokenizer, PROMPTS[:1], config)[0].n_tokens < 20
    config.min_new_tokens = 20
    fast = own(model, config, room=32)
    for prompt in (PROMPTS[0], PROMPTS[0] * 6):
        batch = tokenizer(prompt, return_tensors="pt")
        batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
        expected = model.generate(**batch, generation_config=config)
        found = model.generate(**batch, generation_config=fast, **generation._own(fast))
        assert torch.equal(found, expected)
        assert found.shape[1] == batch["input_ids"].shape[1] + 20
    assert [key[1] for key in fast.own_loop.loops] == [32, 128]


def test_switching_and_joining_are_noticed(model, tokenizer) -> None:
    """A captured graph would go on with the weights that it knew."""
    config = draw_some(tokenizer, 12, draws=False)
    fast = own(model, config)

    def both() -> list[list]:
        return [generate_texts(model, tokenizer, PROMPTS[:1], c) for c in (config, fast)]

    on = both()
    with model.disable_adapter():
        off = both()
    assert on[0] == on[1] and off[0] == off[1] and on[0] != off[0]
    assert len(fast.own_loop.loops) == 2
    join_layers(model)
    assert both() == on and len(fast.own_loop.loops) == 3
    join_layers(model, on=False)
    for length in range(decode_loop.KEPT):
        fast.max_new_tokens = 256 * 2**length - 40
        fast.own_loop._loop(model.get_base_model(), [], config, 1, 256 * 2**length)
    assert len(fast.own_loop.loops) == decode_loop.KEPT


def test_a_stream_says_what_a_batch_of_one_says_and_the_chat_what_it_said(model, tokenizer) -> None:
    config = draw_some(tokenizer, 40)
    fast = own(model, config)
    said, streamed = [], []
    for settings in (config, fast):
        chat, outcome = Chat(model, tokenizer, settings), {}
        torch.manual_seed(3)
        streamer, written = generation._generate_in_thread(
            chat, PROMPTS[1], threading.Event(), outcome
        )
        streamed.append(("".join(generation._pieces(streamer)), outcome))
        written.result()
        torch.manual_seed(4)
        said.append(reply(chat, "How can I sleep better?", [("Hi", "Hello.")]))
    assert len(fast.own_loop.loops) == 1
    batch = generate_texts(model, tokenizer, PROMPTS[1:2], fast, seed=3, stop=HUMAN)[0]
    assert streamed[0] == streamed[1] == (batch.text, {"finished": batch.finished})
    assert said[0] == said[1] and len(said[0]) > 20


@pytest.mark.parametrize("leaving", [False, True], ids=["stop", "gone"])
def test_stop_ends_the_loop_within_half_a_second(model, tokenizer, leaving, monkeypatch) -> None:
    steps, whole = [], DecodeLoop.step

    def slow_step(loop: DecodeLoop) -> None:
        steps.append(time.sleep(0.01))
        whole(loop)

    monkeypatch.setattr(DecodeLoop, "step", slow_step)
    config = draw_some(tokenizer, 1500)
    config.min_new_tokens = 1500
    chat = Chat(model, tokenizer, own(model, config))
    if leaving:
        stream = stream_reply(chat, QUESTIONS[0])
        while len(steps) < 5:
            next(stream)
        began = time.monotonic()
        stream.close()
    else:
        stop = threading.Event()
        _, written = generation._generate_in_thread(chat, "Words and words", stop, {})
        while len(steps) < 5:
            time.sleep(0.01)
            assert not written.done(), "another loop has written"
        began = time.monotonic()
        stop.set()
        written.result()
    assert time.monotonic() - began < 0.5 and len(steps) < 100
    assert chat.line == [] and not chat.config.own_loop.lock.locked()


def test_all_answers_come_from_one_thread(model, tokenizer, monkeypatch) -> None:
    """cuDNN plans a length for one thread: a thread for each answer would plan each time."""
    seen, whole = [], DecodeLoop.start

    def start(loop: DecodeLoop, *batch) -> None:
        seen.append(threading.current_thread())  # its number may come again
        whole(loop, *batch)

    monkeypatch.setattr(DecodeLoop, "start", start)
    chat = Chat(model, tokenizer, own(model, draw_some(tokenizer, 4)))
    others = [threading.Thread(target=reply, args=(chat, "Hello")) for _ in range(2)]
    for each in others:
        each.start()
    reply(chat, "Hello")
    for each in others:
        each.join()
    assert len(seen) == 3 and len(set(seen)) == 1 and seen[0] is not threading.current_thread()


def test_an_error_in_the_loop_is_told_and_leaves_it_free(model, tokenizer, monkeypatch) -> None:
    chat = Chat(model, tokenizer, own(model, draw_some(tokenizer, 12)))
    with monkeypatch.context() as broken:
        broken.setattr(DecodeLoop, "step", lambda loop: 1 / 0)
        assert reply(chat, "Hello") == generation.FAILED
    assert reply(chat, "Hello") not in ("", generation.FAILED)


def test_the_stop_text_is_looked_up_in_the_vocabulary_once(model, tokenizer, monkeypatch) -> None:
    """It takes a third of a second with Falcon's 65,024 words."""
    looked, inner = [], StopStringCriteria.clean_tokenizer_vocab

    def look(tokenizer, **kwargs):
        looked.append(tokenizer)
        return inner(tokenizer, **kwargs)

    monkeypatch.setattr(StopStringCriteria, "clean_tokenizer_vocab", staticmethod(look))
    generation._stop_at.cache_clear()
    chat = Chat(model, tokenizer, draw_some(tokenizer, 4))
    for _ in range(2):
        assert reply(chat, "Hello") != generation.FAILED
    assert len(looked) == 1


def test_two_who_ask_at_once_take_turns(model, tokenizer) -> None:
    """A stopped answer may still be under way when the next one begins."""
    fast = own(model, draw_some(tokenizer, 12, draws=False), room=64)
    alone = [generate_texts(model, tokenizer, [p], fast)[0].text for p in PROMPTS]
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(generate_texts, model, tokenizer, [p], fast) for p in PROMPTS]
        assert [job.result()[0].text for job in jobs] == alone
    assert len(fast.own_loop.loops) == 1


class AskNothing(TorchDispatchMode):
    """Fails where a step would make the host wait for the GPU, which a graph cannot hold."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert not any(w in name for w in ("_local_scalar_dense", "nonzero", "is_all_true")), name
        return func(*args, **(kwargs or {}))


def test_a_step_asks_the_host_nothing(model, tokenizer) -> None:
    config = draw_some(tokenizer, 8)
    config.min_new_tokens = 4
    fast = own(model, config)
    generate_texts(model, tokenizer, PROMPTS[:1], fast)
    (loop,) = fast.own_loop.loops.values()
    assert loop.penalty == 1.3 and loop.held_open and len(loop.warpers) == 3
    with torch.inference_mode(), AskNothing():
        loop.step()


def test_what_it_cannot_do_the_library_does_and_one_sentence_says_so(
    model, tokenizer, monkeypatch
) -> None:
    config = draw_some(tokenizer, 10, draws=False)
    expected = generate_texts(model, tokenizer, PROMPTS, config)
    with monkeypatch.context() as broken:
        broken.setattr(DecodeLoop, "prepare", lambda *_: torch.empty(2).view(3))
        fast = own(model, config)
        with pytest.warns(UserWarning, match=r"no step could be captured \(RuntimeError.*: the"):
            assert generate_texts(model, tokenizer, PROMPTS, fast) == expected
    with pytest.warns(UserWarning, match="no step could be captured"):  # and it is not tried again
        assert generate_texts(model, tokenizer, PROMPTS, fast) == expected
    config.num_beams = 2
    expected = generate_texts(model, tokenizer, PROMPTS, config)
    with pytest.warns(UserWarning, match="beams, scores or more than tokens are asked for: the"):
        assert generate_texts(model, tokenizer, PROMPTS, own(model, config)) == expected
    config.num_beams, config.no_repeat_ngram_size = 1, 2
    expected = generate_texts(model, tokenizer, PROMPTS, config)
    with pytest.warns(UserWarning, match="NoRepeatNGramLogitsProcessor are asked for"):
        assert generate_texts(model, tokenizer, PROMPTS, own(model, config)) == expected
    use_fused_attention(model, False)
    with pytest.warns(UserWarning, match="this model has no fused attention: the library's loop"):
        generate_texts(model, tokenizer, PROMPTS, own(model, draw_some(tokenizer, 3)))


def test_settings_with_a_loop_are_copied_and_printed_like_others(model, tokenizer) -> None:
    fast = own(model, draw_some(tokenizer))
    assert copy.deepcopy(fast).own_loop is fast.own_loop and '"room": 256' in repr(fast)
    assert compile_decoding(model.get_base_model(), fast).own_loop is None


def test_a_later_run_fills_the_gaps_of_a_file_and_touches_nothing_else(tmp_path) -> None:
    first = {"command": "first", "seed": {"value": 19}, "not_measured": ["drawn", "chat"]}
    path = tmp_path / "decoding.json"
    for found in ({"chat": {"error": "late"}, "drawn": {"n": 5}}, {"chat": {"n": 7}}):
        benchmark.write(found, path, first, path, {"seed": 8.0})
        first = benchmark.json.loads(path.read_text())
        assert "error" not in first.get("chat", {}), "an error is no figure"
    assert (first["command"], first["seed"]) == ("first", {"value": 19})
    assert first["chat"] == {"n": 7} and first["drawn"] == {"n": 5} and "not_measured" not in first
    assert first["later_run"]["parts"] == ["chat"] and first["later_run"]["warmup_s"]
    before = first["later_run"]["before"]
    assert before["parts"] == ["drawn"] and before["errors"] == {"chat": "late"}
    assert not benchmark.measured({"chat": {"error": "late"}}, "chat")
