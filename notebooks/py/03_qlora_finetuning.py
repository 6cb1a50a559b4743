# %% [markdown] tags=["generated"]
# # 03 · Fine-tuning
#
# [← 02 · Four bits per weight](02_nf4_quantization.ipynb) | [04 · Base against adapter →](04_base_vs_peft.ipynb)

# %% [markdown]
# After this page you know what LoRA adds to a frozen 4-bit layer, how many numbers are trained
# and where the memory goes; you will have trained an adapter with the article's settings, watched
# the loss on rows that it never saw, kept the best step, and saved the adapter. If the runtime
# dies on the way, run the page again: it goes on where it was.
#
# | Needs | A100 (40 GiB) | T4 (15 GiB) | CPU, tiny model |
# | --- | --- | --- | --- |
# | GPU memory, GiB | 13, predicted | 14, predicted | none |
# | Minutes | 17, predicted | 39, predicted | about 1 |
# | Steps | 320 | 150 | 60 |
#
# *The article* is A. Brahma's of 2023 (section 12). [One screen](../docs/recipe.md) has the recipe
# without the lessons. The setup cell finds the helpers and prints what we run on. In Colab it first
# installs the pins, and may restart the runtime once: then press *Run all* again.

# %% tags=["setup"]
import subprocess, sys
from pathlib import Path

url = "https://github.com/OWNER/falcon-qlora-notebooks"
here = Path(globals().get("__file__", "notebook")).resolve()
root = next((p for p in here.parents if (p / "requirements.txt").exists()), Path("falcon-qlora"))
if not root.exists():  # the notebook alone was opened, as in Colab: fetch the rest
    subprocess.check_call(["git", "clone", "--depth=1", url, root])
sys.path.insert(0, str(root := root.resolve()))
from tools.colab_setup import override, prepare

print(prepare(root))  # in Colab it installs the pins; everywhere it says what we run on

# %% [markdown]
# We see versions, GPU and number format. Everything we may want to change stands in the next cell
# and nowhere else. `None` takes the profile's own value.

# %% tags=["parameters"]
PROFILE = "auto"  # "a100", "t4" or "cpu"; auto looks at the GPU
MODEL, REVISION = None, None  # a Hub id or a folder; a commit or branch on the Hub
DATASET = None  # only used if notebook 01 left nothing in artifacts/dataset
MAX_STEPS, BATCH_SIZE, ACCUMULATION, MAX_LENGTH = None, None, None, None
EARLY_STOP = None  # stop when the held-out loss has not improved three times
FUSED_ATTENTION = True  # one key/value head for all query heads, in a fast kernel
PACKED, LEAN_LORA, COMPILE, FP8 = None, None, None, None  # section 4; None: what the GPU allows
RESUME, FORCE_RESUME = True, False  # go on from the last valid checkpoint; even if settings changed
SEED = 0
WANDB = "offline"  # "online" wants WANDB_API_KEY; "disabled"
OUTPUT = "artifacts/checkpoints"
DRIVE = None  # a second folder for checkpoints and adapter, such as /content/drive/MyDrive/falcon
HUB_REPO = None  # "you/name" pushes the adapter at the end
override(globals())

# %% [markdown]
# ## 1. Rows and model
# First the machine's profile, with those of its values replaced that we set above. Launched on
# several GPUs, this page runs once on each; they then share the rows of every step, so that a step
# keeps its size.

# %%
from dataclasses import replace
from helpers.profiles import detect_profile
from tools.many_gpus import (join_others, leave_if_follower, leave_if_sharded,
                             leave_if_stopped, loading, quant_storage, save_whole_adapters)

own = {"max_steps": MAX_STEPS, "batch_size": BATCH_SIZE, "accumulation": ACCUMULATION,
       "max_length": MAX_LENGTH, "early_stop": EARLY_STOP}
own = {name: value for name, value in own.items() if value is not None}
profile = join_others(replace(detect_profile(PROFILE, model=MODEL), **own), OUTPUT)
print(f"{profile.batch_size} x {profile.accumulation} rows a step in this process")

# %% [markdown]
# We see how many rows a process takes at a time, and how often in a step. Notebook 01 left three
# parts in `artifacts/dataset`; without them we make the same parts again from the same seed. The
# test part stays closed.

# %%
import torch
from datasets import Dataset, load_from_disk
from helpers.dialogues import load_dialogues, split_rows, to_prompt_completion

is_there = Path("artifacts/dataset").exists() and DATASET is None
where = "artifacts/dataset" if is_there else DATASET or profile.dataset
rows, dropped = (None, "counted on page 01") if is_there else load_dialogues(where)
parts = load_from_disk(where) if is_there else split_rows(rows, seed=SEED)
print(f"{len(parts['train'])} rows to train on, {len(parts['validation'])} to watch,",
      f"from {where if is_there else Path(where).name}; left out: {dropped or 'none'}")

# %% [markdown]
# We see seven to eight rows to train on for each row to watch. Now the model, in NF4 as on
# page 02. The loader proves that every linear layer is quantized; we ask once more, because
# today's libraries can leave Falcon in 16 bits without a word. Rows whose question leaves no room
# for an answer go, now that its tokens can be counted.

# %%
from bitsandbytes.nn import Linear4bit
from helpers.falcon import assert_quantized, load_falcon, load_tokenizer, use_fused_attention
from tools.any_model import drop_long

model = load_falcon(profile.model, loading(profile), revision=REVISION,
                    storage=quant_storage(profile))
tokenizer = load_tokenizer(profile.model, REVISION)
n_fused, n_4bit = use_fused_attention(model, FUSED_ATTENTION), assert_quantized(model)
parts, too_long = drop_long(parts, tokenizer, profile.max_length)
print(f"{n_4bit} layers in 4 bits, {n_fused} with fused attention; {profile.compute_dtype};",
      f"rows left out: {too_long or 'none'}")

# %% [markdown]
# We see four 4-bit layers for each of Falcon's decoder layers, as predicted on page 02. The weights
# are stored in 4 bits and multiplied in the dtype printed here: the *compute dtype*. The article
# calls it "full precision"; on a GPU it is a 16-bit format.
#
# ## 2. LoRA by hand
# A 4-bit weight cannot be trained: its gradient would be far smaller than the gap between two
# levels. LoRA leaves the weight $W$ alone and adds a product of two thin matrices to what it
# computes: $Wx + \frac{\alpha}{r} B A x$. $A$ starts at random, $B$ at zero. We make both for one
# layer.

# %%
layer, rank, alpha = next(m for m in model.modules() if isinstance(m, Linear4bit)), 32, 32
generator = torch.Generator().manual_seed(SEED)
x = torch.randn(1, layer.in_features, generator=generator).to(model.device, profile.compute_dtype)
lora_a = (torch.randn(rank, layer.in_features, generator=generator) / layer.in_features**0.5).to(x)
lora_b = torch.zeros(layer.out_features, rank).to(x)

# %% [markdown]
# We predict that the sum starts as exactly $Wx$, and that it moves away as soon as $B$ does.

# %%
with torch.no_grad():
    added = [alpha / rank * (x @ lora_a.T) @ b.T for b in (lora_b, lora_b + 0.01)]
    equal = [torch.equal(layer(x), layer(x) + more) for more in added]
print(f"equal at the start: {equal[0]}; after a step of B: {equal[1]}")
assert equal == [True, False]

# %% [markdown]
# We see True, then False: training starts from the base model itself, not from a damaged copy of
# it. The article's settings are rank 32 and α 32, so the factor α/r is 1, on all four linears; a
# model that names them otherwise gets adapters on all of its own. Each linear gets $r$ times
# (in + out) new numbers, which we add up before anything is built.

# %%
from peft import LoraConfig, PeftModel
from tools.any_model import lora_targets

lora = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM",
                  target_modules=lora_targets(model))
layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
n_predicted = sum(rank * (m.in_features + m.out_features) for m in layers)
print(f"{len(layers)} layers, {n_predicted:,} numbers to train:",
      f"{n_predicted * 4 / 1e6:.1f} MB in 32 bits")

# %% [markdown]
# We see as many layers as were in 4 bits above. That is one road to the count of numbers; the
# other comes when the trainer has built the adapters. Falcon-7B's shapes follow from its
# configuration, so we count its numbers too, and draw its first layer, W and BA, to scale.

# %%
from helpers.nf4 import linear_shapes
from tools.figures import draw_lora, draw_losses, draw_resumed, new_figure, show
from transformers import FalconConfig

shapes = linear_shapes(FalconConfig())
n_7b = sum(rank * (n_out + n_in) for n_out, n_in in shapes.values())
print(f"Falcon-7B: {n_7b:,} numbers, {n_7b * 4 / 1e6:.0f} MB or {n_7b * 4 / 2**20:.0f} MiB")
figure, axis = new_figure(size=(8, 3.4))
draw_lora(axis, *next(iter(shapes.values())), rank)
show(figure, alt="To scale: the frozen weight W is a large square. Beside it, the two trained "
     "matrices are thin lines: B as high as W and 32 wide, A as wide as W and 32 high.")

# %% [markdown]
# We see how little is trained: two thin lines beside a square. The article calls one adapter file
# "249M" in one cell and "261M" in another: these are the MiB and the MB printed here.
#
# ## 3. What makes it fast
# On a GPU three mends make a step several times as fast. Rows are packed: laid end to end with no
# padding, none seeing another; that takes bf16. LoRA's part joins the 4-bit product before
# it is rounded, and dropout keeps no mask. Each decoder block is compiled. What that saves in
# memory pays for keeping activations, so few blocks are computed twice, or none. A fourth, `FP8`, multiplies in
# eight bits; as it rounds more coarsely, it is off unless you ask. Each was measured by taking it
# away on an H100, rows of the article's lengths.

# %%
from tools.figures import draw_memory, draw_speed

figure, axis = new_figure(size=(8, 2.8))
draw_speed(axis, root / "results/h100/training.json")
show(figure, alt="Bars of useful tokens a second. That of the original's recipe is the shortest, "
     "ours the longest; those without one or two of the mends lie between them.")

# %% [markdown]
# We see the original's recipe on top, ours below it, and then what is left without a mend, or
# without two. [Why training is fast](../docs/speed.md) has the figures. Which of them can this
# machine take?

# %%
from tools.mends import choose_mends, fit_memory, most_tokens, undo_mends, use_mends

mends = choose_mends(profile, n_fused, PACKED, LEAN_LORA, COMPILE, FP8)
print(mends)

# %% [markdown]
# We see which mends this run has; a CPU has none, a T4 has two.
#
# ## 4. Where the memory goes, and the order of rows
# Before anything is trained, we add up what a step needs. A GPU gets the largest micro-batch of at
# most 16 rows whose plan fits with all layers' activations kept, or most; a small GPU
# computes every layer twice. A step keeps its rows.

# %%
from helpers.memory import GIB, memory_table, plan_memory

pairs = to_prompt_completion(parts["train"])
texts = [p + c + tokenizer.eos_token for p, c in zip(pairs["prompt"], pairs["completion"])]
lengths = [len(ids) for ids in tokenizer(texts).input_ids]
profile = fit_memory(profile, mends, model.config, lengths, rank, BATCH_SIZE is not None, seed=SEED)
tokens = most_tokens(profile, mends, lengths, profile.batch_size, SEED)
config = model.config if (is_falcon := model.config.model_type == "falcon") else FalconConfig()
plan = plan_memory(profile, config, 1, tokens, rank, lean=mends.lean, compiled=mends.compiled)
print(memory_table(plan), "" if is_falcon else "(it knows Falcon-7B alone)")
again = f"one of {profile.checkpoint_every}" if profile.gradient_checkpointing else "none"
print(f"{profile.batch_size} rows, at most {tokens:,} tokens; layers computed again: {again}")

# %% [markdown]
# We see the largest part first: it is what to make smaller if a run does not fit. Activations grow
# with the tokens of the largest micro-batch. The optimizer keeps two numbers for each number trained;
# *paged* means that these, and never the weights, may move to host memory when the GPU is full, so
# the plan leaves them out. Is it true? It was put against PyTorch's allocator on an H100.

# %%
figure, axis = new_figure(size=(8, 2.6))
n_points, worst = draw_memory(axis, root / "results/h100/memory.json")
show(figure, alt="Points of a plan over what was measured, by gibibytes measured. All lie close to "
     "the line at 1, most just below it.")
print(f"{n_points} points; the worst is off by {worst:.1%}")

# %% [markdown]
# We see every point near 1; [What the plan counts](../docs/memory.md) says more. All rows of all steps are laid out now, from the seed: shuffled anew
# for each pass and, inside each step, sorted by length, as page 01 showed, or dealt into packs of
# like size.

# %%
import os
from helpers.training import row_order

n_processes = int(os.environ.get("WORLD_SIZE", "1"))
rows_per_step = profile.batch_size * profile.accumulation * n_processes
order = row_order(lengths, rows_per_step, profile.max_steps, seed=SEED,
                  packed=profile.batch_size * mends.packed)
train_rows = Dataset.from_dict(pairs.select(order).to_dict())
print(f"{profile.max_steps} steps of {rows_per_step} rows; the first begins with {order[:4]}")

# %% [markdown]
# We see the numbers of the first four rows, out of order: each step begins with its longest row.
#
# ## 5. The recipe
# The article's values, in today's words. `max_seq_length` is now `max_length`, `group_by_length`
# a sampling strategy (ours is `sequential`: the order is laid out already), `warmup_ratio` a
# fraction in `warmup_steps`. New are an evaluation every few steps, and that the best step is
# kept and not the last.

# %%
from tools.handover import start_wandb
from trl import SFTConfig, SFTTrainer

args = SFTConfig(
    output_dir=OUTPUT,
    max_steps=profile.max_steps,
    per_device_train_batch_size=profile.batch_size,
    gradient_accumulation_steps=profile.accumulation,
    per_device_eval_batch_size=profile.batch_size,
    max_length=profile.max_length,
    learning_rate=profile.learning_rate,
    lr_scheduler_type="cosine",
    warmup_steps=0.03,
    max_grad_norm=0.3,
    optim=profile.optim,
    bf16=profile.compute_dtype is torch.bfloat16,
    fp16=profile.compute_dtype is torch.float16,
    activation_checkpointing=profile.gradient_checkpointing,
    activation_checkpointing_kwargs={"every_n_layers": profile.checkpoint_every},
    train_sampling_strategy="sequential",
    eval_strategy="steps", eval_steps=profile.eval_steps, eval_on_start=True,
    save_strategy="steps", save_steps=profile.eval_steps, save_total_limit=2,
    load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False,
    logging_steps=1, disable_tqdm=True, restore_callback_states_from_checkpoint=True,
    ddp_find_unused_parameters=False,  # several GPUs: every adapter is used in every step
    report_to=start_wandb(WANDB, "falcon-qlora", {"profile": profile.name}),
    run_name="falcon-qlora", use_cpu=not profile.on_gpu, seed=SEED,
)
print(f"{args.max_steps} steps, rate {args.learning_rate}, bf16 {args.bf16}, fp16 {args.fp16}")

# %% [markdown]
# We see at most one of the two flags on: bf16 on an A100, fp16 on a T4, none on a CPU.
#
# ## 6. The trainer
# `SFTTrainer` takes the quantized model and the LoRA settings and builds the adapters. Before it
# does, we note in `mark` what a checkpoint must match to belong to this run.

# %%
from helpers.checkpoints import fingerprint
from helpers.training import ProgressLines, adapters_to_fp32
from transformers import EarlyStoppingCallback, PrinterCallback, set_seed

set_seed(SEED)
mark = fingerprint(args, lora, train_rows, base=profile.model) | vars(mends)
progress = ProgressLines(rows=len(parts["train"]))
trainer = SFTTrainer(model=model, args=args, processing_class=tokenizer, peft_config=lora,
                     train_dataset=train_rows,
                     eval_dataset=to_prompt_completion(parts["validation"]),
                     callbacks=[progress] + [EarlyStoppingCallback(3)] * profile.early_stop)

# %% [markdown]
# The article has LoRA "in bf16", and the trainer has cast the adapters so, whatever the precision
# flags say: a T4 in fp16 dies of that at its first step, a CPU crawls, and on any machine a resumed
# run would differ, since adapters come back from a checkpoint in 32 bits. We cast them to 32 bits
# now. The library's own progress printer goes, the mends go in last. The second line, like those
# that begin with `leave_if`, is for many processes.

# %%
trainer.remove_callback(PrinterCallback)
save_whole_adapters(trainer)
n_trainable = adapters_to_fp32(trainer)
use_mends(trainer, mends)
print(f"{n_trainable:,} trainable, predicted {n_predicted:,}")
assert n_trainable == n_predicted

# %% [markdown]
# We see both roads of section 2 lead to one number. Before we train, one look at what the trainer
# made of the rows: the labels of its first row must be −100 on the prompt and carry on to the
# end-of-text token.

# %%
row = trainer.train_dataset[0]
n_masked, end = sum(label == -100 for label in row["labels"]), tokenizer.decode(row["labels"][-5:])
print(f"{len(row['labels'])} labels, {n_masked} masked; learned text ends in {end!r}")
assert row["input_ids"][:n_masked] == tokenizer(pairs["prompt"][order[0]]).input_ids
assert row["labels"][-1] == tokenizer.eos_token_id or len(row["labels"]) == args.max_length

# %% [markdown]
# We see that the masked part is the smaller one, a question before its answer; the mask is
# page 01's, made this time by the library itself.
#
# ## 7. Train, or go on
# A checkpoint counts only if its manifest does: sizes, checksums and the settings that it was
# made with. A damaged one is set aside and the one before it is taken; if a setting was changed,
# the page stops in a sentence rather than going on wrongly. If the GPU's memory runs out, a
# sentence names the constant to make smaller.

# %%
from helpers.checkpoints import CheckpointManifest, last_valid_checkpoint, train_and_survive

trainer.add_callback(CheckpointManifest(mark, mirror=DRIVE))
where_to_look = {"folder": args.output_dir, "mark": mark, "mirror": DRIVE, "force": FORCE_RESUME}
print(f"a checkpoint must match {len(mark)} settings")

# %% [markdown]
# We see how many settings that are. Now the training itself. It says first whether it goes on or
# starts, how many passes the steps make, and how long they will take. Each evaluation adds a line:
# the loss on rows trained on and on rows held out, when that last improved, and the time left.
# Stopping the cell saves a checkpoint; run it again to go on. We predict that the held-out loss
# falls.

# %%
resume = last_valid_checkpoint(**where_to_look) if RESUME else None
print("going on from", Path(resume).name) if resume else print("a fresh start")
finished = train_and_survive(trainer, resume, plan)
print("finished" if finished else "stopped; run this cell again to go on")
leave_if_stopped(finished)

# %% [markdown]
# We see the held-out loss fall steeply at first and then hardly at all, or turn upwards if the
# passes are many. Drawn over the steps, both losses show what the lines only hint at.

# %%
history = trainer.state.log_history
train_curve = [(h["step"], h["loss"]) for h in history if "loss" in h]
held_out = [(h["step"], h["eval_loss"]) for h in history if "eval_loss" in h]
best_step, best_loss = min(held_out, key=lambda point: point[1])
figure, axis = new_figure(size=(8, 3.2))
draw_losses(axis, train_curve, held_out)
show(figure, alt="Training and held-out loss by optimizer step. Both fall at first; then the "
     "training loss stays below the held-out loss. A star marks the step kept.")

# %% [markdown]
# We see the training loss end below the held-out loss: the model has begun to learn rows by heart.
# The star is the step that is kept. The article kept its last, after some 116 passes, and reports
# the loss there on the rows it had trained on, 0.031; nothing was held out, so nobody could see
# what those passes did to new questions. Ours we can put in figures.

# %%
first_loss = held_out[0][1]
print(f"held out: {first_loss:.3f} before training, {best_loss:.3f} at step {best_step}: "
      f"{1 - best_loss / first_loss:.0%} lower")
assert best_loss < first_loss, "training did not lower the held-out loss"

# %% [markdown]
# We see a lower loss on questions the model never saw: it has learned something about answering,
# not only these answers. What that is worth, page 04 asks.
#
# Section 3 said that the optimizer keeps two numbers for each one trained, *paged* on a GPU. Now
# there is one to ask.

# %%
name = type(trainer.optimizer.optimizer).__name__
states = [t for kept in trainer.optimizer.state.values() for t in kept.values() if t.ndim]
n_kept, paged = sum(t.numel() for t in states), [getattr(t, "is_paged", False) for t in states]
print(f"{name} keeps {n_kept:,} numbers, {n_kept / n_trainable:.0f} for each one trained;",
      f"{sum(paged)} of {len(states)} tensors paged, on {states[0].device}")

# %% [markdown]
# We see two for each one trained. Without a GPU nothing is paged; on a GPU all but small tensors
# are.
#
# And if the runtime had died on the way? `tools/measure_faults.py` breaks small runs of the tiny
# Falcon in every way that we could think of. Three of its curves: a run left alone, one killed
# inside a step, and what went on from its last checkpoint.

# %%
import json

figure, axis = new_figure(size=(8, 2.6))
draw_resumed(axis, root / "results/cpu/faults.json")
show(figure, alt="Loss by optimizer step of three runs. The crosses of the killed run and the "
     "dots of the resumed one lie on the line of the unbroken one, to its end.")

# %% [markdown]
# We see every dot on the line. Where crosses and dots share a step, it was done twice: that is what
# the kill cost. On a CPU the curves are equal to the last bit, and so are the adapters. We predict
# the same of a Falcon-7B (random weights) on an H100: in bf16 with all of section 4's mends, and in
# fp16, where the loss scale has to come back too.

# %%
h100 = json.loads((root / "results/h100/resume.json").read_text())
for kind in ("bf16", "fp16"):
    off, now = [h100[kind][what]["distance"] for what in ("loss", "adapter")], h100[kind]["resumed"]
    print(f"{kind}: losses off by {off[0]}, adapter by {off[1]}; loss scale {now['loss_scale']},",
          f"{now['paged_states']} of {h100[kind]['unbroken']['paged_states']} states paged")

# %% [markdown]
# We see 0.0 four times: losses and adapter equal to the last bit
# ([resume.json](../results/h100/resume.json)). bf16 needs no loss scale. Every state is paged:
# left alone it would come back unpaged, and the run would compile for other rows. Both are mended.
#
# ## 8. Save, and load back
# The adapter is all we keep: the base is the same for everyone. We save it as it was at the star,
# and predict a file of section 2's MB.

# %%
folder = "artifacts/adapter"
trainer.save_model(folder)
leave_if_follower(trainer)
files = {p.name: p.stat().st_size for p in Path(folder).iterdir()}
print(f"{files['adapter_model.safetensors'] / 1e6:.1f} MB in {folder}")

# %% [markdown]
# We see the MB that section 2 predicted: the file holds the numbers that were trained and nothing
# else. Beside it goes a card that says what it was made from. But does the file hold what was
# trained? We ask the trained adapters for the logits of one row, without mends and without the
# trainer's wrapper: on a GPU both round in another way.

# %%
from tools.handover import hand_over, write_model_card

write_model_card(folder, {"base": profile.model, "data": Path(where).name, "steps": best_step,
                          "held-out loss": round(best_loss, 4), "rows": len(parts["train"])})
leave_if_sharded(trainer, folder)
trained = trainer.accelerator.unwrap_model(trainer.model).eval()
vars(trained).pop("forward", None)
undo_mends(trained)
ids = torch.tensor([row["input_ids"]], device=profile.device)
with torch.no_grad():
    before = trained(input_ids=ids).logits

# %% [markdown]
# Now we take the adapters off, load the file onto the bare base, and predict equal logits, bit for
# bit.

# %%
base = trained.unload()
with torch.no_grad():
    after = PeftModel.from_pretrained(base, folder).eval()(input_ids=ids).logits
print(f"logits equal bit for bit: {torch.equal(before, after)}")
assert torch.equal(before, after)

# %% [markdown]
# We see True: what was saved is what was trained. If you set `DRIVE` or `HUB_REPO`, the next cell
# takes adapter and card there; by default it does nothing. It asks for no login: the Hub's token
# is read from `HF_TOKEN`.

# %%
print(*hand_over(folder, DRIVE, HUB_REPO), sep="\n")

# %% [markdown]
# We see one line for each place that was asked for. Pages 04 and 05 look in `artifacts/`, then in
# `DRIVE`, then on the Hub, and stop in a sentence if an adapter does not fit their model.
#
# ## 9. What it cost
# The plan of section 4 against what was used. On any machine we can compare bytes: those planned
# for the adapters, and those of the file; and time. The peak of the memory is known on a GPU alone,
# where the caching allocator tells it.

# %%
print(f"adapters: planned {4 * n_predicted:,} bytes, saved {files['adapter_model.safetensors']:,}")
if profile.on_gpu:
    peak = torch.cuda.max_memory_allocated() / GIB
    print(f"peak {peak:.2f} GiB allocated, planned {sum(plan.values()) / GIB:.2f} GiB")
print(f"{progress.step_seconds:.2f} s a step" if progress.times else "no step was left to take")

# %% [markdown]
# We see the bytes agree up to a header of a few kB, and what one step takes in seconds; times the
# number of steps, that is nearly all of this page's time.

# %% [markdown] tags=["results-table"]
# Twenty steps of this page on a Falcon-7B of random weights and the true shape, A100 profile, the
# article's rows:
#
# <!-- table
# column: H100, random weights = results/h100/falcon7b.json
# row: Rows a step = training.rows_per_step
# row: Seconds a step = training.step_seconds
# row: Useful tokens a second, compiling in the first step included = training.useful_tokens_per_s
# row: Peak GPU memory, GiB = training.peak_gib
# row: Planned activations at 16 x 1,024 tokens, GiB = training.planned_gib.activations
# -->
# | | H100, random weights |
# | --- | ---: |
# | Rows a step | 64 |
# | Seconds a step | 1.03 |
# | Useful tokens a second, compiling in the first step included | 8,343 |
# | Peak GPU memory, GiB | 13 |
# | Planned activations at 16 x 1,024 tokens, GiB | 8.04 |
#
# Measured on H100, random weights: NVIDIA H100 80GB HBM3, 2026-11-26, [falcon7b.json](../results/h100/falcon7b.json).
# <!-- end -->

# %% [markdown]
# No A100 and no T4 could be had for this project: their figures are predictions until someone
# runs this page there.
#
# > **Note.** The log of the run lies in `artifacts/wandb/`, offline. With an account,
# > `wandb sync artifacts/wandb/offline-run-*` sends it; `WANDB = "disabled"` writes none.
#
# > **Note.** Several GPUs run this page as a script:
# > `accelerate launch notebooks/py/03_qlora_finetuning.py`. [Many GPUs](../docs/many-gpus.md) has
# > more, and FSDP for a base that does not fit one card.

# %% [markdown] tags=["results-table"]
# Twenty steps on two cards; efficiency is their pace over twice that of one:
#
# <!-- table
# column: 2 x H100 = results/h100-x2/training.json
# row: Useful tokens a second = runs.ddp_2.useful_tokens_per_s
# row: Efficiency = runs.ddp_2.efficiency
# row: FSDP: efficiency = runs.fsdp_2.efficiency
# row: FSDP: peak of a card, GiB = runs.fsdp_2.peak_gib
# -->
# | | 2 x H100 |
# | --- | ---: |
# | Useful tokens a second | 25,538 |
# | Efficiency | 0.91 |
# | FSDP: efficiency | 0.291 |
# | FSDP: peak of a card, GiB | 7.32 |
#
# Measured on 2 x H100: 2 x NVIDIA H100 80GB HBM3, 2026-11-26, [training.json](../results/h100-x2/training.json).
# <!-- end -->

# %% [markdown]
# ## 10. What you have now
# An adapter of a few MB that turns a base model into one that answers, the
# step at which new questions stopped profiting, and a run that a dead runtime cannot undo.
#
# ## 11. Exercises
# 1. Set `MAX_STEPS` to four times the profile's and `EARLY_STOP = False`. Expect the held-out loss
#    to turn upwards, and the training loss to go towards zero.
# 2. Set `FUSED_ATTENTION = False`. Expect the same losses to within rounding, more slowly on a GPU;
#    there, set `PACKED`, `LEAN_LORA` or `COMPILE` to False and see what each is worth.
# 3. Kill the kernel half-way and run the page again. Expect "going on from checkpoint-…" and the
#    same losses after it.
#
# ## 12. Sources and next
# Hu et al. (2021), [LoRA](https://arxiv.org/abs/2106.09685), section 4. Dettmers et al. (2023),
# [QLoRA](https://arxiv.org/abs/2305.14314), section 3. The article's notebook:
# [iamarunbrahma/finetuned-qlora-falcon7b-medical](https://github.com/iamarunbrahma/finetuned-qlora-falcon7b-medical).
# Next: [04](04_base_vs_peft.ipynb) asks base and adapter the same questions.
