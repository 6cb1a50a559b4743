"""Serve notebook 05's own page with a model that only repeats what it was told.

    python tools/mock_chat.py PORT=7999

For browser and load tests, where the model does not matter: page, queue, screens, line and
tokenizer are the real ones. The stand-in writes one token at a time. It takes orders from the
last turn: "slowly" makes a token take 0.1 s, "break" raises an error, "a dose" says what the
screen after the model must hold back. It reports when it begins and ends, and no word of a chat.
"""

import runpy
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers.falcon import load_tokenizer
from helpers.prompts import ASSISTANT, HUMAN

TINY = str(ROOT / "assets/tiny_falcon")


class EchoModel:
    """Stands where the adapter's model stands; its answer names every turn of the prompt.

    `at_once` is how many answers were being written together, at most: 1 if the line holds.
    """

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.tokenizer = load_tokenizer(TINY)
        self.running = self.at_once = 0

    def eval(self) -> "EchoModel":
        """Nothing to switch."""
        return self

    def generate(
        self, input_ids: torch.Tensor, streamer: Any, stopping_criteria: Any, **others: Any
    ) -> torch.Tensor:
        """Write "I heard: ..." for each turn, with the library's streamer and stop signs.

        Raises:
            RuntimeError: if the last turn says "break".
        """
        prompt = self.tokenizer.decode(input_ids[0])
        turns = [turn.split(ASSISTANT)[0].strip() for turn in prompt.split(HUMAN)[1:]]
        self.running += 1
        self.at_once = max(self.at_once, self.running)
        print(f"begins {time.time():.3f} {self.at_once}", flush=True)
        try:
            return self._write(turns, input_ids, streamer, stopping_criteria)
        finally:
            self.running -= 1
            print(f"ends {time.time():.3f} {self.at_once}", flush=True)

    def _write(
        self, turns: list[str], ids: torch.Tensor, streamer: Any, criteria: Any
    ) -> torch.Tensor:
        if "break" in turns[-1]:
            raise RuntimeError("the stand-in was told to break")
        answer = " ".join(f"I heard: {turn}." for turn in turns)
        if "a dose" in turns[-1]:
            answer += " Take 500 mg of it before bed. Sleep well."
        if "slowly" in turns[-1]:
            answer += "".join(f" Step {n}." for n in range(100))
        streamer.put(ids)
        for token in self.tokenizer(" " + answer).input_ids:
            time.sleep(0.1 if "slowly" in turns[-1] else 0.001)
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
            streamer.put(ids[0, -1:])
            if criteria(ids, None).all():
                break
        else:
            ids = torch.cat([ids, torch.tensor([[self.tokenizer.eos_token_id]])], dim=1)
        streamer.end()
        return ids


def main(arguments: list[str]) -> None:
    """Run the twin of notebook 05 with the stand-in in the model's place."""
    model, twin = EchoModel(), ROOT / "notebooks/py/05_gradio_chat.py"
    sys.argv = [str(twin), "SERVE=True", "PROFILE=cpu", *arguments]
    with (
        patch("helpers.falcon.load_falcon", lambda *args, **others: model),
        patch("helpers.falcon.use_fused_attention", lambda base: 0),
        patch("tools.any_model.lay_adapter", lambda base, adapter: model),
    ):
        runpy.run_path(str(twin), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
