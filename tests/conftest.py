"""What several tests share. No test waits for a network, but for the one that asks pip."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.chat_client import MOCK, Server, serve

ROOT = Path(__file__).resolve().parent.parent

# Writes down what the server process opens for writing and whom it connects to.
WATCH = """
import os, sys
log = open(os.environ["WATCH_LOG"], "a", buffering=1)
def hook(event, args):
    if event in ("socket.connect", "socket.sendto"):
        print(event, args[1], file=log)
    elif event == "socket.getaddrinfo":
        print(event, args[0], file=log)
    elif event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        print(event, args[0], file=log)
sys.addaudithook(hook)
"""

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    GRADIO_ANALYTICS_ENABLED="False",
    WANDB_MODE="offline",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="agg",
)

TOY_PROFILES = """\
def report() -> str:
    return "a toy machine"
"""

TOY_FIRST = """\
# %% [markdown] tags=["generated"]
# to be written

# %% [markdown]
# The setup cell says what we run on.

# %% tags=["setup"]
pass

# %% [markdown]
# Everything that may change stands here.

# %% tags=["parameters"]
PROFILE = "auto"
SEED = 0
override(globals())

# %% [markdown]
# We count.

# %%
import sys

print("profile", PROFILE, "seed", SEED)
print("noise", file=sys.stderr)

# %% [markdown]
# A picture, for the page alone.

# %% active="ipynb"
# from tools.figures import new_figure, show
#
# figure, axes = new_figure(size=(3, 2))
# axes.plot([0, 1], [0, 1])
# show(figure, alt="A line that rises from zero to one.")

# %% [markdown]
# <!-- table
# column: CPU = results/cpu/series.json
# row: Seconds = notebooks.01_data_loading.seconds
# -->
# <!-- end -->
"""

TOY_SECOND = """\
# %% [markdown] tags=["generated"]
# to be written

# %% tags=["setup"]
pass

# %% tags=["parameters"]
PROFILE = "auto"
MAX_STEPS = 60
override(globals())

# %%
import json
from pathlib import Path

row = {"question": "Q?", "base": "on and on", "adapter": "A.", "model": f"toy, {MAX_STEPS} steps"}
Path("artifacts").mkdir(exist_ok=True)
Path("artifacts/comparison.json").write_text(json.dumps([row]));
"""


@pytest.fixture(scope="session")
def chat_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Notebook 05's page with a stand-in for the model; its home and temporary files in `home`."""
    home = tmp_path_factory.mktemp("chat")
    (home / "watch").mkdir()
    (home / "watch/sitecustomize.py").write_text(WATCH)
    places = dict.fromkeys(("HOME", "TMPDIR", "GRADIO_TEMP_DIR", "XDG_CACHE_HOME"), str(home))
    watch = {"PYTHONPATH": str(home / "watch"), "WATCH_LOG": str(home / "watched.txt")}
    with serve(MOCK, home / "printed.txt", **places, **watch) as server:
        yield server


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A repository of two small notebooks with the project's own tools."""
    root = tmp_path / "toy"
    shutil.copytree(ROOT / "tools", root / "tools", ignore=shutil.ignore_patterns("facts"))
    for name in ("pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, root / name)
    (root / "helpers").mkdir()
    (root / "helpers/profiles.py").write_text(TOY_PROFILES)
    (root / "notebooks/py").mkdir(parents=True)
    (root / "notebooks/py/01_data_loading.py").write_text(TOY_FIRST)
    (root / "notebooks/py/02_nf4_quantization.py").write_text(TOY_SECOND)
    (root / "README.md").write_text("# Toy\n\n<!-- series -->\n<!-- end -->\n")
    return root
