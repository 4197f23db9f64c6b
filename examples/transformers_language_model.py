"""Causal language modelling with the Transformers `Trainer`, on text with a fault: with a governor and without.

The steps are those of the library's guide: tokenize, group into blocks, `Trainer`, perplexity. The text is the language
reference that comes with Python, the tokens are its characters, and the model is a small GPT-2 made anew, so that
nothing is downloaded. The fault strikes one step: its gradients are NaN.

    pip install 'tolaria[transformers]'
    python examples/transformers_language_model.py
"""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from tolaria.transformers import TolariaCallback

BLOCK = 48


class Fault(TrainerCallback):
    """Stands for a flipped bit: the gradients of one step are NaN. Only once, so that a replay is clean."""

    def __init__(self, step: int = 60) -> None:
        self.step, self.struck = step, False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After clipping, before the optimizer."""
        if state.global_step == self.step and not self.struck:
            self.struck = True
            for parameter in kwargs["model"].parameters():
                parameter.grad.mul_(math.nan)


def blocks(count: int = 640) -> tuple[list[Any], int]:
    """The text as blocks of characters, and the number of different characters."""
    text = "".join(topics[name] for name in sorted(topics))
    letters = {letter: number for number, letter in enumerate(sorted(set(text)))}
    numbers = torch.tensor([letters[letter] for letter in text[: count * BLOCK]]).view(count, BLOCK)
    return [{"input_ids": block, "labels": block} for block in numbers], len(letters)


def train(guarded: bool, fault: bool = True) -> tuple[float, TolariaCallback]:
    """One epoch. Answers the perplexity on held-out blocks, and the callback."""
    set_seed(1)
    data, num_letters = blocks()
    sizes = {"vocab_size": num_letters, "n_positions": BLOCK, "n_embd": 32, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))
    callback = TolariaCallback()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=folder,
                num_train_epochs=1,
                per_device_train_batch_size=8,
                learning_rate=1e-2,
                logging_steps=10,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=data[:600],
            eval_dataset=data[600:],
            callbacks=[Fault()] if fault else [],
        )
        if guarded:
            trainer.add_callback(callback.set_trainer(trainer))
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
    return math.exp(loss), callback


def main() -> None:
    """Train three times and say what became of it."""
    print(f"without the fault:  perplexity {train(guarded=False, fault=False)[0]:.3f}")
    print(f"without a governor: perplexity {train(guarded=False)[0]:.3f}")
    perplexity, callback = train(guarded=True)
    print(f"with a governor:    perplexity {perplexity:.3f}, {callback.rollbacks} rollbacks")


if __name__ == "__main__":
    main()
