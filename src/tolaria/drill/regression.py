"""The regression workload: small real data, and targets whose noise has no variance."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tolaria.drill.workloads import Batch, CannotRun, Training


class Standardised(nn.Module):
    """Subtracts the mean of each feature and divides by its spread; both are buffers, as in many a served model."""

    def __init__(self, inputs: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", inputs.mean(0))
        self.register_buffer("spread", inputs.std(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape [batch, features] in and out."""
        out: torch.Tensor = (x - self.get_buffer("mean")) / self.get_buffer("spread")
        return out


class Regression:
    """A perceptron on scikit-learn's 442 diabetes patients, whose targets are blurred by Student-t noise.

    Two degrees of freedom: the noise has no variance, so the squared loss of a batch has no mean, and single steps
    have losses a hundred times the usual one. SGD with Nesterov momentum, gradients clipped, BatchNorm, dropout.

    Args:
        seed: Of the split, the noise, the order of the data and the weights.
        steps: Optimizer steps of one run.
        device: Where model and data live.

    Raises:
        CannotRun: scikit-learn is not installed.
    """

    name = "regression"
    title = "perceptron on the scikit-learn diabetes data, heavy-tailed targets"
    parts = 1
    clip: float | None = 1.0

    _BATCH = 32
    _VALIDATION = 88
    _LR = 0.02
    _NOISE = 0.3

    def __init__(self, seed: int, steps: int, device: torch.device) -> None:
        inputs, targets = _load_diabetes()
        self._seed, self._steps, self._device = seed, steps, device
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(inputs), generator=generator)
        held_out, train = order[: self._VALIDATION], order[self._VALIDATION :]
        self._known = inputs[train].to(device)
        self._held_out = inputs[held_out].to(device), targets[held_out].to(device)
        self.chance_loss = float(
            functional.smooth_l1_loss(targets[train].median().expand(self._VALIDATION, 1), targets[held_out])
        )
        batches: list[Batch] = []
        while len(batches) < steps:
            for chosen in train[torch.randperm(len(train), generator=generator)].split(self._BATCH):
                if len(chosen) == self._BATCH and len(batches) < steps:
                    noise = self._NOISE * _student_t(targets[chosen].shape, generator)
                    blurred = targets[chosen] + noise
                    batches.append(Batch(len(batches), inputs[chosen].to(device), blurred.to(device)))
        self.batches = tuple(batches)

    def build(self) -> Training:
        """Fresh weights and optimizer, seeding torch's global generators. Equal for each call."""
        torch.manual_seed(self._seed)
        model = nn.Sequential(
            Standardised(self._known),
            nn.Linear(self._known.shape[1], 32),
            nn.BatchNorm1d(32),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(32, 32),
            nn.GELU(),
            nn.Linear(32, 1),
        ).to(self._device)
        optimizer = SGD(model.parameters(), lr=self._LR, momentum=0.9, nesterov=True, weight_decay=1e-4)
        scheduler = MultiStepLR(optimizer, [self._steps // 2, self._steps * 4 // 5], gamma=0.3)
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98))
        return Training(model, optimizer, scheduler, ema)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Squared error, shape [], with a graph."""
        return functional.mse_loss(model(batch.inputs), batch.targets)

    def validate(self, model: nn.Module) -> float:
        """Huber loss over the 88 held-out patients, targets without noise; leaves the model in training mode."""
        model.eval()
        try:
            with torch.no_grad():
                inputs, targets = self._held_out
                return float(functional.smooth_l1_loss(model(inputs), targets))
        finally:
            model.train()

    def nan_batch(self, batch: Batch) -> Batch:
        """The same batch with one feature that is NaN."""
        inputs = batch.inputs.clone()
        inputs[0, 0] = torch.nan
        return batch._replace(inputs=inputs)

    def garbage_batch(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The same patients under the targets of others, ten times too large."""
        order = torch.randperm(len(batch.targets), generator=generator).to(batch.targets.device)
        return batch._replace(targets=10 * batch.targets[order])

    def exposed_weight(self, model: nn.Module) -> nn.Parameter:
        """The last layer."""
        return model.get_parameter("7.weight")


def _student_t(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Student's t with two degrees of freedom: normal over root of a chi-squared half, which is -ln U."""
    uniform = 1 - torch.rand(shape, generator=generator)
    return torch.randn(shape, generator=generator) / (-uniform.log()).sqrt().clamp_min(1e-4)


def _load_diabetes() -> tuple[torch.Tensor, torch.Tensor]:
    """Features, shape [442, 10], float32, and the standardised target, shape [442, 1], float32."""
    try:
        from sklearn.datasets import load_diabetes  # an extra, and slow to import
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "sklearn":
            raise
        raise CannotRun(
            "the diabetes data comes with scikit-learn, which is not installed: pip install 'tolaria[demo]'"
        ) from error
    features, progress = load_diabetes(return_X_y=True)
    targets = torch.tensor(progress, dtype=torch.float32).view(-1, 1)
    return torch.tensor(features, dtype=torch.float32), (targets - targets.mean()) / targets.std()
