"""A classifier trained with Accelerate, with accumulation, on images with a broken one among them.

pip install 'tolaria[accelerate,demo]'
python examples/accelerate_classifier.py
"""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tolaria.accelerate import govern


def loaders(broken: int | None) -> tuple[Any, Any]:
    """Digits from scikit-learn, 64 pixels from 0 to 1; the last 300 are kept for evaluation. One is nothing but NaN."""
    digits = load_digits()
    pixels = torch.tensor(digits.data, dtype=torch.float32) / 16
    if broken is not None:
        pixels[broken] = math.nan
    labels = torch.tensor(digits.target)
    train, held_out = TensorDataset(pixels[:-300], labels[:-300]), TensorDataset(pixels[-300:], labels[-300:])
    return DataLoader(train, batch_size=32, shuffle=True), DataLoader(held_out, batch_size=300)


def train(guarded: bool, broken: int | None = 700) -> tuple[float, int]:
    """Four epochs. Answers the accuracy on held-out digits, and the number of rollbacks."""
    set_seed(1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=200)
    train_loader, eval_loader = loaders(broken)
    model, optimizer, train_loader, eval_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, eval_loader, scheduler
    )
    governor = govern(accelerator) if guarded else None

    for _ in range(4):
        model.train()
        for x, y in train_loader if governor is None else governor.watch(train_loader):
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if governor is not None:
                governor.follow(loss)

    model.eval()
    x, y = next(iter(eval_loader))
    accuracy = float((model(x).argmax(dim=1) == y).float().mean())
    rollbacks = 0
    if governor is not None:
        rollbacks = governor.rollbacks
        governor.close()
    return accuracy, rollbacks


def main() -> None:
    """Train twice and say what became of it."""
    print(f"without a governor: accuracy {train(guarded=False)[0]:.3f}")
    accuracy, rollbacks = train(guarded=True)
    print(f"with a governor:    accuracy {accuracy:.3f}, {rollbacks} rollbacks")


if __name__ == "__main__":
    main()
