"""The autoencoder of Lightning's introduction, on images with a broken one among them: with a governor and without.

pip install 'tolaria[lightning,demo]'
python examples/lightning_autoencoder.py
"""

from __future__ import annotations

import logging
import math
import warnings
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tolaria.lightning import TolariaCallback


class LitAutoEncoder(L.LightningModule):
    """Two numbers for an image of 64 pixels, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))
        self.decoder = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 64))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Mean squared error of the reconstruction."""
        (x,) = batch
        loss = nn.functional.mse_loss(self.decoder(self.encoder(x)), x)
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As in the introduction."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def images(broken: int | None = 700) -> TensorDataset:
    """1797 digits from scikit-learn, 64 pixels from 0 to 1. One is nothing but NaN."""
    pixels = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    if broken is not None:
        pixels[broken] = math.nan
    return TensorDataset(pixels)


def train(callbacks: list[Any], broken: int | None = 700) -> float:
    """Two epochs. Answers the mean loss of the last one."""
    L.seed_everything(1, verbose=False)
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(LitAutoEncoder(), DataLoader(images(broken), batch_size=32, shuffle=True))
    return float(trainer.callback_metrics["train_loss_epoch"])


def main() -> None:
    """Train twice and say what became of it."""
    warnings.filterwarnings("ignore", ".*(num_workers|LeafSpec).*")
    for name in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    callback = TolariaCallback()
    print(f"without a governor: loss {train([]):.4f}")
    print(f"with a governor:    loss {train([callback]):.4f}, {callback.rollbacks} rollbacks")


if __name__ == "__main__":
    main()
