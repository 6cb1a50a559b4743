# %% [markdown] tags=["generated"]
# # 02 · Four bits per weight
#
# [← 01 · Dialogues](01_data_loading.ipynb) | [03 · Fine-tuning →](03_qlora_finetuning.ipynb)

# %% [markdown]
# We store Falcon's weights in four bits each instead of sixteen. After this page you know where
# NF4's sixteen levels come from, how a block of 64 weights is rounded, and why a weight costs
# 4.127 bits and not 4. You can tell how many bytes a model will take before you download it,
# and you can catch a loader that says "4 bit" and loads sixteen.
#
# To *quantize* is to keep, instead of a number, the index of the nearest one in a short table. The
# table is the same for all weights; a *scale*, kept for each block of them, says how far it
# reaches.
#
# | Needs | A100 (40 GiB) | T4 (15 GiB) | CPU, tiny model |
# | --- | --- | --- | --- |
# | GPU memory, GiB | not measured yet, see section 5 | not measured yet, see section 5 | none |
# | Minutes | not measured yet | not measured yet | under 1 |
#
# The setup cell finds the helpers and prints what we run on. In Colab it first installs the pins,
# and may restart the runtime once: then press *Run all* again.

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
# Everything we may want to change stands in the next cell and nowhere else.

# %% tags=["parameters"]
PROFILE = "auto"  # "a100", "t4" or "cpu"; auto looks at the GPU
MODEL = None  # None: the profile's own; else a Hub id or a folder
REVISION = None  # a commit or branch on the Hub
SEED = 0
override(globals())

# %% [markdown]
# ## 1. Sixteen levels from quantiles
# Four bits tell sixteen values apart. NF4, the 4-bit *NormalFloat*, puts them where a normal
# distribution has its values: it walks through the distribution in steps of equal probability
# and takes the value at each step. Zero is put in by hand, so seven levels lie below it and
# eight above. The outermost probability, 0.9677083, lies midway between 29/30 and 31/32. We
# predict that this gives the table in use, bitsandbytes' own, to the last bit.

# %%
import bitsandbytes as bnb
import torch
from scipy.stats import norm

above = norm.ppf(torch.linspace(0.9677083, 0.5, 9)[:-1])  # 0.5 itself would be zero again
below = -norm.ppf(torch.linspace(0.9677083, 0.5, 8)[:-1])
levels = torch.tensor(sorted([*below, 0.0, *above]), dtype=torch.float32)
levels = levels / levels.max()
print(*(f"{level:.3f}" for level in levels))
print(f"narrowest gap {levels.diff().min():.3f}, widest {levels.diff().max():.3f}")
assert torch.equal(levels, bnb.functional.get_4bit_type("nf4", device="cpu"))

# %% [markdown]
# The assert passed: sixteen equal float32 values. We see gaps from 0.080, next to zero, to 0.304,
# at the lower end. The article calls the levels "evenly spaced". What is evenly spaced is the
# probability; evenly spaced levels would have one gap, 2/15 = 0.133, everywhere. `helpers/nf4.py`
# takes the same road in torch alone.
#
# Now a real weight, and two other tables to compare with: even spacing, and the 4-bit float FP4.
# We read the first of the widest matrices from the checkpoint, without the rest of the model, and
# keep at most 1,024 of its rows. The imports serve the whole page.

# %%
from einops import rearrange
from helpers import nf4
from helpers.falcon import load_config, load_falcon, nf4_config, quantize_falcon_linears
from helpers.profiles import TINY, detect_profile
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FalconConfig

profile = detect_profile(PROFILE, model=MODEL)
to_round = nf4.linear_shapes(load_config(profile.model, REVISION))
widest = max(to_round, key=lambda name: to_round[name][0] * to_round[name][1])
weight = nf4.read_weight(profile.model, f"{widest}.weight", REVISION, to_round[widest])[:1024]
print(widest, tuple(weight.shape), weight.dtype, f"standard deviation {weight.float().std():.4f}")
tables = {"NF4": nf4.NF4_LEVELS, "uniform": nf4.uniform_levels(), "FP4": nf4.fp4_levels()}

# %% [markdown]
# We see 16-bit values with a standard deviation far below 1; we come back to that. NF4 takes 64
# consecutive weights as a block and divides each block by its largest absolute value. If the
# weights are roughly normal, most of them must now lie in the inner half of the range, from -0.5 to
# 0.5; evenly spread ones would lie there one time in two.

# %%
blocks = rearrange(weight, "rows (n k) -> (rows n) k", k=64)[: 2**14].float()
scaled = blocks / blocks.abs().amax(dim=1, keepdim=True)
for name, values in {"weights": scaled, **tables}.items():
    print(f"{name:8} {(values.abs() < 0.5).float().mean():.0%} in the inner half")
assert (scaled.abs() < 0.5).float().mean() > 0.6

# %% [markdown]
# We see most weights in the inner half. NF4 spends 62 % of its levels there, even spacing 50 %; FP4
# has 60 %, but a float spends its levels by powers of two. The picture shows where each of them
# looks closely.

# %% active="ipynb"
# from tools.figures import COLOURS, new_figure, show
#
# figure, (top, rows) = new_figure(rows=2, size=(8, 4))
# top.hist(scaled.flatten().numpy(), bins=120, density=True)
# top.set(ylabel="density of weights", xlim=(-1.05, 1.05))
# rows.eventplot([t.numpy() for t in tables.values()], linelengths=0.7, colors=COLOURS[6])
# rows.set(xlabel="weight ÷ largest absolute value of its block (no unit)", xlim=(-1.05, 1.05))
# rows.set_yticks(range(3), tables)
# show(figure, alt="Histogram of scaled weights, highest at zero, above three rows of levels: "
#      "NF4's crowd around zero, the uniform ones do not, FP4's leave gaps.")

# %% [markdown]
# NF4's levels stand closest where the histogram is high and thin out with it; the spikes at the
# rim are the largest weight of each block. FP4 has three levels at zero, almost on top of each
# other, and then none until 0.17.
#
# What does that do to the error? We measure it block by block, as a share of the block's own size.

# %%
def block_errors(values, table):
    """Root mean square of what rounding changes, per cent of each block's own: (n_blocks,)."""
    codes, absmax = nf4.quantize_with(values, table, block_size=values.shape[1])
    change = nf4.dequantize_nf4(codes, absmax, table) - values
    return 100 * (change.square().mean(dim=1) / values.square().mean(dim=1)).sqrt()


# %% [markdown]
# We predict: NF4 is best on normal draws and on the real weight. Where values are spread evenly,
# even spacing must win, since nothing is best everywhere.

# %%
torch.manual_seed(SEED)
samples = {"normal draws": torch.randn(2**14, 64), "this weight": blocks}
samples["even draws"] = torch.rand(2**14, 64) * 2 - 1
best = {}
for sample, values in samples.items():
    errors = {name: block_errors(values, t).mean().item() for name, t in tables.items()}
    best[sample] = min(errors, key=errors.get)
    print(f"{sample:13}", *(f"{name} {error:5.2f} %  " for name, error in errors.items()))
assert list(best.values()) == ["NF4", "NF4", "uniform"]

# %% [markdown]
# We see NF4 lowest in the first two rows and "uniform" lowest in the third. On normal draws even
# spacing costs about a tenth more error than NF4, and FP4, the default of bitsandbytes, about
# a third more. One mean may hide much; the next picture shows every block of the real weight.

# %% active="ipynb"
# figure, axis = new_figure(size=(8, 3))
# for (name, t), style in zip(tables.items(), ("-", "--", ":"), strict=True):
#     errors = block_errors(blocks, t).numpy()
#     axis.hist(errors, 120, (0, 24), histtype="step", linestyle=style, linewidth=1.8, label=name)
# axis.set(xlabel="error of a block (% of its root mean square)", ylabel="blocks")
# axis.legend()
# show(figure, alt="Three histograms of the error per block: NF4's ends soonest, the "
#      "uniform one overlaps it with a longer tail, FP4's lies further right.")

# %% [markdown]
# The curves overlap: a single block may well be served better by even spacing. But NF4's curve
# ends soonest on the right, where the badly rounded blocks are.
#
# > **Try it.** Set `SEED = 1`. The draws change; does any winner?
#
# ## 2. One block by hand
# Four steps: find the largest absolute value, divide by it, take the nearest level, keep its
# index. Restoring is one product.

# %%
block, absmax = blocks[0], blocks[0].abs().max()
by_hand = (block[:, None] / absmax - levels).abs().argmin(dim=1)
for value, code in list(zip(block, by_hand, strict=True))[:4]:
    place, restored = value / absmax, levels[code] * absmax
    print(f"{value:+.5f} / {absmax:.5f} = {place:+.3f} -> {code:2} -> {restored:+.5f}")

# %% [markdown]
# We see four weights, each with the block's largest absolute value, its place in [-1, 1], the index
# that is stored, and the weight we get back. The last column follows the first, but coarsely. We
# predict that bitsandbytes finds the same indices. It packs two of them into a byte, the first in
# the upper four bits.

# %%
packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
codes = rearrange([packed >> 4, packed & 15], "two n 1 -> (n two)")
print(f"{weight.numel():,} {weight.dtype} weights in {packed.nbytes:,} bytes, plus scales")
assert torch.equal(codes[:64], by_hand.to(torch.uint8))
assert torch.equal(codes, nf4.quantize_nf4(weight)[0].flatten())

# %% [markdown]
# We see half as many bytes as weights, and the asserts say that not one index differs.
#
# The article also asks for weights of "zero mean and unit variance". NF4 uses neither: only the
# largest absolute value counts. So a block a thousand times larger must get the same indices. A
# shifted block must not, because nobody subtracts a mean.

# %%
same = torch.equal(nf4.quantize_nf4(block)[0], nf4.quantize_nf4(1024 * block)[0])
moved = (nf4.quantize_nf4(block)[0] != nf4.quantize_nf4(block + absmax)[0]).sum().item()
print(f"mean {block.mean():+.4f}, standard deviation {block.std():.4f}")
print(f"1,024 times larger: same indices {same}; shifted: {moved} of 64 differ")
assert same and moved > 32

# %% [markdown]
# We see True: multiplying changes nothing. Shifting moves most indices. The block's own mean and
# standard deviation, printed first, enter nowhere. Weights that happen to lie around zero suit NF4;
# no step of it puts them there.
#
# ## 3. Why 4.127 bits
# The scales cost something too. One 32-bit scale for 64 weights is half a bit a weight: 4.5 in
# all. *Double quantization* rounds the scales as well: their mean is subtracted, each becomes
# 8 bits, and 256 of them share one 32-bit number: 4 + 8/64 + 32/(64 · 256).

# %%
options = {"quant_type": "nf4", "compress_statistics": True}
twice, state2 = bnb.functional.quantize_4bit(weight, **options)
bits = 8 * (twice.nbytes + state2.absmax.nbytes + state2.state2.absmax.nbytes) / weight.numel()
print(f"{nf4.predicted_bits(False)} bits once, {nf4.predicted_bits():.4f} twice; held {bits:.4f}")
assert abs(bits - nf4.predicted_bits()) < 0.001

# %% [markdown]
# We see 4.1270 bits predicted and the same held: double quantization gives back 0.373 of the half
# bit. The price is one more rounding, of the scales; exercise 3 measures it.
#
# ## 4. Why the checkpoint comes in shards
# First the shapes, without a byte of memory: on the "meta" device a model has shapes and no
# values. `FalconConfig()` with nothing set is Falcon-7B, so that one always stands beside ours.

# %%
configs = {"this model": load_config(profile.model, REVISION), "Falcon-7B": FalconConfig()}
plain = {name: nf4.on_meta(config) for name, config in configs.items()}
for name, count in {k: falcon.num_parameters() for k, falcon in plain.items()}.items():
    print(f"{name:10} {count:>13,} weights, {count * 2 / 1e9:.2f} GB in 16 bits")
shapes, files = plain["this model"].state_dict(), nf4.weight_map(profile.model, REVISION)

# %% [markdown]
# Falcon-7B takes 13.84 GB (10⁹ bytes) in 16 bits. Free Colab has 12.7 GB of host memory: a
# loader that reads a checkpoint whole, as loaders of `.bin` files did, dies there before the
# GPU has seen anything. The index of a sharded checkpoint says which file holds which weight. We
# predict that no file is more than twice the average, so that one at a time is a small load.

# %%
where = {n: files.get(n) or files.get(n.partition(".")[2]) for n in shapes}  # GPT-2's lack a word
parts = {f: [t.nbytes for n, t in shapes.items() if where[n] == f] for f in where.values() if f}
biggest, whole = max(map(sum, parts.values())), sum(map(sum, parts.values()))
print(f"{len(parts)} files, {whole:,} bytes; the biggest {biggest:,}, {biggest / whole:.0%}")
assert biggest <= 2 * whole / len(parts)

# %% [markdown]
# We see the biggest file's share of the whole: so much a loader holds that reads one file at a time.
# Today's loaders map files into memory instead and could do without shards; downloads that resume
# and smaller machines still profit. What loading really takes was measured; section 5 reads it out.
#
# The article has shards "moved between CPU and GPU", as if they went back and forth. We predict
# one journey for each weight: file, host, GPU, where it is rounded and stays. Section 5 looks.
#
# ## 5. Predict the bytes, then load
# Only the linears of the decoder layers are rounded, in Falcon four in each. We count their weights
# from the configuration, for our model and for Falcon-7B, and multiply by 4.127 bits.

# %%
predicted = {}
for name, config in configs.items():
    count = nf4.count_linear_weights(config)
    predicted[name] = count * nf4.predicted_bits() / 8
    print(f"{name:10} {count:>13,} weights to round, {predicted[name] / 1e6:,.1f} MB")

# %% [markdown]
# Falcon-7B's 6,625,951,744 weights should take 3,418.1 MB (10⁶ bytes). This is the article's
# recipe, value by value, except that the profile chooses the compute dtype; the article's notebook
# has bfloat16 in one cell and float16 in another.

# %%
recipe = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=profile.compute_dtype,
)
assert recipe.to_dict() == nf4_config(profile).to_dict()

# %% [markdown]
# `load_falcon` uses exactly this, mends what section 6 shows, and has a progress bar for each
# shard. We load, add up what the layers hold, and compare; the roads should meet within 1 %.

# %%
model = load_falcon(profile.model, profile, revision=REVISION)
layer, parts = model.get_submodule(widest), nf4.stored_parts(model)
constants = parts.pop("constants")
ratio = sum(parts.values()) / predicted["this model"]
print(*(f"{kind}: {size:,} bytes" for kind, size in parts.items()), sep="\n")
print(f"{ratio:.4f} of the prediction; and {constants:,} bytes of constants")
assert abs(ratio - 1) < 0.01

# %% [markdown]
# We see the roads meet at 1.00; what is left is each layer's last, part-filled group of scales.
# The constants are the tables and means, about a kilobyte for each matrix, however large it is.
#
# Is it really all of them? We predict a `Linear4bit` for each linear of a decoder layer, in Falcon
# four, each packed into bytes, frozen, on one device.

# %%
linears = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
kinds = {(m.weight.dtype, m.weight.requires_grad, str(m.weight.device)) for m in linears}
print(f"{len(linears)} in {model.config.num_hidden_layers} layers; dtype, trained, device: {kinds}")
assert len(linears) == len(to_round)
assert kinds == {(torch.uint8, False, profile.device)}

# %% [markdown]
# We see as many as predicted, all `uint8`, none trainable, and one device: no weight waits on the
# host to be moved. Nor is this "quantization-aware training", as the article has it, where
# weights are trained while they are being rounded. Here they are rounded once, at loading, and no
# gradient ever moves them. QLoRA trains adapters beside them (notebook 03).
#
# The layer must also hold the very indices that we found by hand. Loading casts to the compute
# dtype before it rounds, so we do the same.

# %%
stored = layer.weight.data.cpu()[: weight.numel() // 2]
expected = nf4.quantize_nf4(weight.to(profile.compute_dtype))[0].flatten()
agree = (rearrange([stored >> 4, stored & 15], "two n 1 -> (n two)") == expected).float().mean()
print(f"{agree:.4%} of {weight.numel():,} indices agree")
assert agree > 0.9999

# %% [markdown]
# We see that the indices agree, on a CPU all of them. We allow one in ten thousand to differ, since
# a GPU may round the reciprocal of a scale otherwise in its last bit.
#
# How does a layer compute with four bits? It does not. It restores the weight in the *compute
# dtype* and multiplies there. We predict that a plain product with the restored weight gives the
# same, within rounding.

# %%
x = torch.randn(16, layer.in_features, dtype=profile.compute_dtype, device=profile.device)
restored = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
difference = (linear(x, restored.to(x.dtype), layer.bias) - layer(x)).norm() / layer(x).norm()
print(f"computes in {layer.compute_dtype}; relative difference {difference:.1e}")
assert layer.compute_dtype == profile.compute_dtype and difference < 0.01

# %% [markdown]
# We see the dtype that the layer computes in, and next to no difference. Storage has four bits,
# arithmetic has that dtype: bfloat16 on an A100, float16 on a T4, float32 on a CPU. The article
# calls it "full precision". On a GPU it is 16 bits, and what rounding lost does not come back.
#
# What was not rounded, and where are the bytes now? We predict that the linears shrink by nearly
# 16/4.127 = 3.88, and nothing else shrinks.

# %%
sizes = {f"{name}, 16 bits": nf4.model_bytes_by_part(falcon) for name, falcon in plain.items()}
sizes["this model, NF4"] = nf4.model_bytes_by_part(model)
sizes["Falcon-7B, NF4"] = sizes["Falcon-7B, 16 bits"] | {"linears": predicted["Falcon-7B"]}
for name, row in sorted(sizes.items(), reverse=True):
    print(f"{name:19}", *(f"{part} {size / 1e6:,.2f}" for part, size in row.items()), "MB")
assert sizes["this model, 16 bits"]["linears"] > 3.5 * sizes["this model, NF4"]["linears"]

# %% [markdown]
# We see only the linears shrink. The embedding, tied to the output head, and the norms stay in the
# compute dtype, so on a CPU, which computes in 32 bits, they take twice their 16-bit size. In
# Falcon-7B the embedding's 590.94 MB are a seventh of what is left.

# %% active="ipynb"
# figure, axes = new_figure(columns=2, size=(8, 2.8))
# for axis, name, unit in zip(axes, plain, (1e6, 1e9), strict=True):
#     rows, left = [f"{name}, NF4", f"{name}, 16 bits"], torch.zeros(2)
#     for part in ("linears", "embedding", "norms"):
#         width = torch.tensor([sizes[row][part] / unit for row in rows])
#         axis.barh(["NF4", "16 bits"], width, left=left, label=part)
#         left = left + width
#     axis.set(title=name, xlabel="MB (10⁶ bytes)" if unit == 1e6 else "GB (10⁹ bytes)")
# figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
# show(figure, alt="Bars of bytes by part in 16 bits and NF4: the linears shrink to about a "
#      "quarter, the embedding does not shrink, the norms are too small to see.")

# %% [markdown]
# The linears fall to about a quarter; the norms are too small to see. The left panel is measured
# here, Falcon-7B's NF4 bar on the right is predicted; the table holds what a GPU measured.

# %% [markdown] tags=["results-table"]
# This page on a Falcon-7B of random weights and the true shape, measured:
#
# <!-- table
# column: H100, random weights = results/h100/falcon7b.json
# row: `Linear4bit` layers = quantization.linear4bit
# row: Bytes predicted = quantization.predicted_bytes
# row: Bytes stored = quantization.stored_bytes
# row: Stored to predicted = quantization.ratio
# row: Peak GPU memory, GiB = quantization.peak_gpu_gib
# row: Peak host memory, mapped files included, GiB = quantization.peak_host_gib
# row: Seconds for the page = quantization.page_seconds
# -->
# | | H100, random weights |
# | --- | ---: |
# | `Linear4bit` layers | 128 |
# | Bytes predicted | 3,418,124,032 |
# | Bytes stored | 3,418,263,936 |
# | Stored to predicted | 1 |
# | Peak GPU memory, GiB | 3.95 |
# | Peak host memory, mapped files included, GiB | 13.9 |
# | Seconds for the page | 3 |
#
# Measured on H100, random weights: NVIDIA H100 80GB HBM3, 2026-11-26, [falcon7b.json](../results/h100/falcon7b.json).
# <!-- end -->
#
# We see the stored bytes meet the prediction here too, and a GPU peak not far above the sum of NF4
# weights and embedding. The host's peak looks like the whole checkpoint, since it counts the pages
# of mapped files, which a system short of memory takes back. What nobody can take back is memory of
# the process's own, `RssAnon`. `benchmarks/host_memory.py` looked at it while loading:
#
# <!-- table
# column: H100 = results/h100/host_memory.json
# row: Own memory at most, safetensors, GB = safetensors.anon_peak_gb
# row: Own memory at most, `.bin`, GB = bin.anon_peak_gb
# row: The same `.bin` shards read whole, not mapped, GB = bin_whole.anon_peak_gb
# row: Own memory before loading, GB = safetensors.anon_before_gb
# row: Seconds for eight shards, safetensors = safetensors.seconds
# row: Seconds for eight shards, `.bin` = bin.seconds
# -->
# | | H100 |
# | --- | ---: |
# | Own memory at most, safetensors, GB | 1.17 |
# | Own memory at most, `.bin`, GB | 1.17 |
# | The same `.bin` shards read whole, not mapped, GB | 15 |
# | Own memory before loading, GB | 0.509 |
# | Seconds for eight shards, safetensors | 5.5 |
# | Seconds for eight shards, `.bin` | 4.9 |
#
# Measured on H100: NVIDIA H100 80GB HBM3, 2026-11-26, [host_memory.json](../results/h100/host_memory.json).
# <!-- end -->
#
# We see how far both formats stay below the 12.7 GB of a free machine, and what the mapping saves. On a
# CPU the rounded weights themselves lie in that memory, on a GPU they do not. Nobody has run this page on an A100 or a T4.

# %% [markdown]
# ## 6. Four bits that never were
# The article's own cell, run with today's libraries, loads Falcon in 16 bits and does not say so.
# We always show it on the embedded tiny model, so that it costs nothing: once as the library
# does it, once with the mend.

# %%
from contextlib import nullcontext

settings, counts = {"quantization_config": recipe, "device_map": profile.device_map}, []
for mend in (nullcontext(), quantize_falcon_linears()):
    with mend:
        tiny = AutoModelForCausalLM.from_pretrained(TINY.model, **settings)
    counts.append(sum(isinstance(m, bnb.nn.Linear4bit) for m in tiny.modules()))
    print(f"is_loaded_in_4bit {tiny.is_loaded_in_4bit}, Linear4bit {counts[-1]}", end=", ")
    print(f"footprint {tiny.get_memory_footprint() / 1e6:.1f} MB")
assert counts == [0, 4 * tiny.config.num_hidden_layers]

# %% [markdown]
# We see `True` in both lines, but the first model holds 0 four-bit layers and takes more memory.
# The only other sign is a line in the log about "eetq", another library.
#
# > **Why?** Since version 5.5 transformers replaces a layer only if its type is exactly
# > `torch.nn.Linear`. Falcon's linears are `FalconLinear`, a subclass. `is_loaded_in_4bit` repeats
# > what was asked for. The mend puts `nn.Linear` in the subclass's place while the model is
# > built; `assert_quantized` then counts, every time.
#
# > **Warning.** The last figure is `get_memory_footprint()`. It shows the trap, but it leaves out
# > the scales; `stored_parts` counts them.
#
# ## 7. What you have now
# A model in 4-bit NF4, proven layer by layer, and a rule that tells its size before you download
# it: weights of the linears × 4.127 / 8 bytes, plus the compute dtype's bytes for everything else.
#
# ## 8. Exercises
# 1. Try blocks of 128: `block_errors(blocks.reshape(-1, 128), nf4.NF4_LEVELS).mean()`
#    and `nf4.predicted_bits(block_size=128)`. Expect about 0.06 bits less a
#    weight, and a larger error.
# 2. Make one weight an outlier: `block[0] = 50 * absmax`, then round by hand again with the new
#    `absmax`. Expect every other index to become 7, the level of zero.
# 3. Restore `packed, state` and `twice, state2` with `bnb.functional.dequantize_4bit` and compare
#    both with `weight`. Expect the second rounding to add less than a hundredth to the error.
#
# ## 9. Sources and next
# - Dettmers et al. (2023), [QLoRA](https://arxiv.org/abs/2305.14314), section 3: NF4 and double
#   quantization. Yoshida (2023), [NF4 Isn't Information Theoretically
#   Optimal](https://arxiv.org/abs/2306.06965): where 0.9677083 comes from.
# - bitsandbytes 0.50.2, `functional.py`: `create_normal_map`, `quantize_4bit`.
# - Brahma (2023), [the article](https://medium.com/@iamarunbrahma/fine-tuning-of-falcon-7b-large-language-model-using-qlora-on-mental-health-dataset-aa290eb6ec85).
#
# Next: [03](03_qlora_finetuning.ipynb) trains adapters on top of this frozen model.
