"""The digits workload: small and quick, and its batches are whole steps."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tolaria.drill.workloads import Batch, CannotRun, Training


class Digits:
    """A CNN with BatchNorm and Dropout on scikit-learn's 1,797 handwritten digits, shifted by up to one pixel.

    Args:
        seed: Of the split, the order of the data, the shifts and the weights.
        steps: Optimizer steps of one run.
        device: Where model and data live.

    Raises:
        CannotRun: scikit-learn is not installed.
    """

    name = "digits"
    title = "CNN on the scikit-learn digits"
    chance_loss = math.log(10)
    parts = 1
    clip: float | None = None

    _BATCH = 64
    _VALIDATION = 360
    _LR = 3e-3

    def __init__(self, seed: int, steps: int, device: torch.device) -> None:
        images, labels = _load_digits()
        self._seed, self._steps, self._device = seed, steps, device
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images), generator=generator)
        held_out, train = order[: self._VALIDATION], order[self._VALIDATION :]
        self._held_out = images[held_out].to(device), labels[held_out].to(device)
        self.batches = tuple(self._draw(images, labels, train, generator))

    def _draw(
        self, images: torch.Tensor, labels: torch.Tensor, train: torch.Tensor, generator: torch.Generator
    ) -> list[Batch]:
        batches: list[Batch] = []
        while len(batches) < self._steps:
            epoch = train[torch.randperm(len(train), generator=generator)].split(self._BATCH)
            for chosen in epoch[: self._steps - len(batches)]:
                if len(chosen) == self._BATCH:
                    inputs = _shifted(images[chosen], generator).to(self._device)
                    batches.append(Batch(len(batches), inputs, labels[chosen].to(self._device)))
        return batches

    def build(self) -> Training:
        """Fresh weights and optimizer, seeding torch's global generators. Equal for each call."""
        torch.manual_seed(self._seed)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, padding=1, stride=2, bias=False),  # max pooling has no deterministic backward on CUDA
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 64),
            nn.ReLU(),
            nn.Dropout(0.25),
            nn.Linear(64, 10),
        ).to(self._device)
        optimizer = AdamW(model.parameters(), lr=self._LR)
        scheduler = CosineAnnealingLR(optimizer, self._steps, eta_min=0.05 * self._LR)
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98))
        return Training(model, optimizer, scheduler, ema)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Cross entropy, shape [], with a graph."""
        return functional.cross_entropy(model(batch.inputs), batch.targets)

    def validate(self, model: nn.Module) -> float:
        """Cross entropy over the 360 held-out digits, in evaluation mode; leaves the model in training mode."""
        model.eval()
        try:
            with torch.no_grad():
                inputs, targets = self._held_out
                return float(functional.cross_entropy(model(inputs), targets))
        finally:
            model.train()

    def nan_batch(self, batch: Batch) -> Batch:
        """The same batch with one pixel that is NaN."""
        inputs = batch.inputs.clone()
        inputs[0, 0, 0, 0] = math.nan
        return batch._replace(inputs=inputs)

    def garbage_batch(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The same images under random labels."""
        labels = torch.randint(0, 10, batch.targets.shape, generator=generator)
        return batch._replace(targets=labels.to(batch.targets.device))

    def exposed_weight(self, model: nn.Module) -> nn.Parameter:
        """The matrix of the first fully connected layer."""
        return model.get_parameter("7.weight")


def _load_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All images, shape [1797, 1, 8, 8], float32 in [0, 1], and their labels, shape [1797], int64."""
    try:
        from sklearn.datasets import load_digits  # an extra, and slow to import
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "sklearn":
            raise
        raise CannotRun(
            "the digits come with scikit-learn, which is not installed: pip install 'tolaria[demo]'"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return images, torch.tensor(labels, dtype=torch.int64)


def _shifted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image moved by -1, 0 or 1 pixels in both directions, filled with black."""
    count, _, height, width = images.shape
    down, right = torch.randint(0, 3, (2, count, 1, 1), generator=generator)
    rows = down + torch.arange(height).view(1, -1, 1)
    columns = right + torch.arange(width).view(1, 1, -1)
    padded = functional.pad(images, (1, 1, 1, 1))
    return padded[torch.arange(count).view(-1, 1, 1), 0, rows, columns].unsqueeze(1)
