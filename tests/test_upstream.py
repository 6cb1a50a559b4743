"""Each mend is still needed: without it the pinned library still does what the mend is for.

A test that fails here is good news, and says which mend may go. Those of traps 1 to 3 and of old
configurations stand beside the mends' own tests, in test_falcon.py and test_training.py.
"""

import importlib.metadata
import importlib.util
import inspect
import re
import runpy
from importlib.machinery import ModuleSpec
from pathlib import Path

import bitsandbytes
import peft.import_utils
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers.models.falcon import modeling_falcon

from helpers.falcon import load_falcon
from helpers.profiles import TINY
from tools.colab_setup import UNWANTED

ROOT = Path(__file__).resolve().parent.parent
UPSTREAM = ROOT / "docs/upstream"
REPORTS = sorted(path.stem for path in UPSTREAM.glob("*.py"))


def quoted(name: str) -> list[str]:
    """What a report says its script prints."""
    page = (UPSTREAM / f"{name}.md").read_text()
    return re.findall(r"```text\n(.*?)```", page, re.DOTALL)[0].splitlines()


def test_there_are_four_reports_and_each_is_in_the_table() -> None:
    assert REPORTS == [
        "addmm_rounds_twice", "bf16_adapters_fp16", "cpu_repacking", "falcon_16_bits",
    ]  # fmt: skip
    table = (UPSTREAM / "README.md").read_text()
    everywhere = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    for name in REPORTS:
        row = next(line for line in table.splitlines() if f"({name}.md)" in line)
        mend, test = re.findall(r"`(\w+)`", row)[0], re.findall(r"`(test_\w+)`", row)[-1]
        assert f"def {test}(" in everywhere, f"{name}: no test is called {test}"
        page = ROOT / re.findall(r"\(\.\./\.\./(helpers/\w+\.py)\)", row)[0]
        assert f"def {mend}(" in page.read_text(), f"{name}: {page.name} has no {mend}"


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_quotes_what_its_script_prints(
    name: str, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    runpy.run_path(str(UPSTREAM / f"{name}.py"))
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if not line.startswith("[INFO]")]  # what wandb says, set offline
    expected = quoted(name)
    if name == "addmm_rounds_twice" and torch.cuda.is_available():
        pytest.skip("the report quotes a run without a GPU")
    if name == "cpu_repacking" and not Linear4bit(64, 64).support_avx512bf16_for_cpu:
        expected[1] = "after it (repacked: False): cosine with the true gradient 1.00"
    assert said == expected, f"the library has changed: see docs/upstream/{name}.md"


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_names_the_pinned_versions(name: str) -> None:
    versions = (UPSTREAM / f"{name}.md").read_text().split("**Versions.**")[1].split("**")[0]
    pairs = re.findall(r"\b(transformers|trl|peft|bitsandbytes) (\d[\d.]*\d)", versions)
    assert pairs or name == "addmm_rounds_twice", "torch alone is not pinned"
    for package, version in pairs:
        assert importlib.metadata.version(package) == version, f"run docs/upstream/{name}.py again"


def test_trap_3_the_flag_that_our_mend_sets_is_still_read() -> None:
    """Seen in the source, so that it holds on CPUs that are not hit as well."""
    forward = inspect.getsource(Linear4bit.forward)
    assert "support_avx512bf16_for_cpu" in forward, "keep_cpu_layout does nothing any more"
    matmul = inspect.getsource(bitsandbytes.matmul_4bit)
    before_gradients = matmul.split("needs_grad =")[0]
    assert "packing_format_for_cpu" in before_gradients, (
        "bitsandbytes looks at gradients first now: the mend keep_cpu_layout may go"
    )


def test_trap_4_the_library_still_hands_sdpa_one_unexpanded_head_and_a_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    kernel = modeling_falcon.F.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        seen.append((q.shape[1], k.shape[1], kwargs.get("enable_gqa", False)))
        return kernel(q, k, v, *args, **kwargs)

    model = load_falcon(TINY.model, TINY, quantize=False)
    monkeypatch.setattr(modeling_falcon.F, "scaled_dot_product_attention", spy)
    with torch.no_grad():
        model(torch.arange(20, 30)[None])
    assert set(seen) == {(model.config.num_attention_heads, 1, False)}, (
        "transformers expands the key and value head now: the mend use_fused_attention may go"
    )


def test_trap_5_torch_still_counts_emulated_bfloat16_as_supported() -> None:
    asked = inspect.signature(torch.cuda.is_bf16_supported).parameters["including_emulation"]
    assert asked.default is True, (
        "torch leaves out emulation by itself now: profiles may ask it instead of the capability"
    )


def test_trap_7_peft_still_refuses_the_torchao_of_colab(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = (ROOT / "tests/data/colab_freeze.txt").read_text()
    old = re.search(r"^torchao==(.+)$", frozen, re.MULTILINE)
    assert old, "Colab brings no torchao any more: UNWANTED in tools/colab_setup.py may go"
    real_spec, real_version = importlib.util.find_spec, importlib.metadata.version
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: ModuleSpec(name, None) if name == "torchao" else real_spec(name, *rest),
    )
    monkeypatch.setattr(
        importlib.metadata,
        "version",
        lambda name: old[1] if name == "torchao" else real_version(name),
    )
    peft.import_utils.is_torchao_available.cache_clear()
    try:
        refused = peft.import_utils.is_torchao_available()
    except ImportError as error:
        refused = str(error)
    finally:
        peft.import_utils.is_torchao_available.cache_clear()
    assert "torchao" in str(refused), (
        f"peft takes torchao {old[1]} now: UNWANTED in tools/colab_setup.py may go"
    )
    assert "torchao" in UNWANTED


def test_trap_of_decoding_the_quantizer_still_says_that_it_cannot_be_compiled() -> None:
    quantizer = load_falcon(TINY.model, TINY).hf_quantizer
    assert quantizer.is_compileable is False, (
        "transformers compiles decoding with bitsandbytes itself now: in compile_decoding the "
        "change of the quantizer's class may go"
    )
