"""What several tests share. No test waits for a network, but for the one that asks pip.

With `-n 2`, as in `make test`, two processes share the tests; without it there is one.
"""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.chat_client import MOCK, Server, serve

try:
    from xdist.scheduler import LoadScopeScheduling
except ImportError:  # one process then
    LoadScopeScheduling = object

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

# What takes longest, in this order, so that two processes end together. A line is a group: its
# tests stay in one process, because they share what they wait for. Any other file is a group too.
SLOW = (
    "test_many_gpus.py",
    "test_faults.py::test_a_run_survives",
    "test_notebooks.py::test_in_order test_notebooks.py::test_nothing test_notebooks.py::test_what "
    "test_notebooks.py::test_a_finished",
    "test_faults.py",
    "test_crossval.py",
    "test_chat_browser.py test_chat_load.py",
    "test_joined.py",
    "test_notebooks.py::test_alone[04",
    "test_recipe.py",
    "test_notebooks.py::test_the_twin",
    "test_notebooks.py::test_alone[05",
    "test_notebooks.py::test_alone[03",
    "test_publish.py",
    "test_notebooks.py::test_alone[02",
)

# One of several processes has one core, and so have the processes that it starts.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

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


def group_of(nodeid: str) -> tuple[int, str]:
    """Where a test's group stands, and the group's name."""
    for place, line in enumerate(SLOW):
        if any(f"/{start}" in nodeid for start in line.split()):
            return place, line
    return len(SLOW), nodeid.split("::")[0]


class Groups(LoadScopeScheduling):
    """Gives groups to the processes, as each comes to its last tests."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)[1]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log) -> Groups:
    config.option.loadscopereorder = False  # we have put them in order
    return Groups(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: group_of(item.nodeid)[0])


@pytest.fixture(scope="session")
def started_chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Notebook 05's page with a stand-in for the model; its home and temporary files in `home`."""
    home = tmp_path_factory.mktemp("chat")
    (home / "watch").mkdir()
    (home / "watch/sitecustomize.py").write_text(WATCH)
    places = dict.fromkeys(("HOME", "TMPDIR", "GRADIO_TEMP_DIR", "XDG_CACHE_HOME"), str(home))
    watch = {"PYTHONPATH": str(home / "watch"), "WATCH_LOG": str(home / "watched.txt")}
    with serve(MOCK, home / "printed.txt", **places, **watch) as server:
        yield server
        os.kill(server.pid, signal.SIGCONT)  # what is halted does not end


@pytest.fixture(scope="module")
def chat_server(started_chat: Server) -> Iterator[Server]:
    """The chat page; halted after a module, since Gradio's queue takes a tenth of a core idle."""
    os.kill(started_chat.pid, signal.SIGCONT)
    yield started_chat
    os.kill(started_chat.pid, signal.SIGSTOP)


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
