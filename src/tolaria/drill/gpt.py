"""The GPT workload: a small transformer on real text, trained as large ones are.

AdamW, a learning rate that is warmed up and then follows a cosine, gradients clipped to a norm and accumulated over
micro-batches, dropout, an average of the weights.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import nn
from torch.nn import functional
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tolaria.drill.text import NUM_SYMBOLS, encode, frequency_loss, read_reference, split
from tolaria.drill.workloads import Batch, Training

_WIDTH, _HEADS, _LAYERS, _CONTEXT = 48, 4, 2, 32
_DROPOUT = 0.05


class Block(nn.Module):
    """Attention to the past and a feed-forward layer, each behind a normalisation and added to what comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attend = nn.LayerNorm(_WIDTH)
        self.queries_keys_values = nn.Linear(_WIDTH, 3 * _WIDTH)
        self.attended = nn.Linear(_WIDTH, _WIDTH)
        self.norm_think = nn.LayerNorm(_WIDTH)
        self.think = nn.Sequential(nn.Linear(_WIDTH, 4 * _WIDTH), nn.GELU(), nn.Linear(4 * _WIDTH, _WIDTH))
        self.dropout = nn.Dropout(_DROPOUT)
        self.register_buffer("future", torch.ones(_CONTEXT, _CONTEXT, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape [batch, length, width] in and out."""
        x = x + self.dropout(self._attend(self.norm_attend(x)))
        out: torch.Tensor = x + self.dropout(self.think(self.norm_think(x)))
        return out

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        # plain operators: fused attention has no deterministic backward on every device
        batch, length, _ = x.shape
        split_heads = self.queries_keys_values(x).view(batch, length, 3, _HEADS, -1).permute(2, 0, 3, 1, 4)
        queries, keys, values = split_heads.unbind()
        scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
        future = self.get_buffer("future")[:length, :length]
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        attended: torch.Tensor = self.attended((weights @ values).transpose(1, 2).reshape(batch, length, _WIDTH))
        return attended


class SmallGPT(nn.Module):
    """Symbols in, logits of the next symbol out. About 70,000 parameters; the head is not tied to the embedding.

    Args:
        layers: Blocks; two unless given.
    """

    def __init__(self, layers: int | None = None) -> None:
        super().__init__()
        self.symbols = nn.Embedding(NUM_SYMBOLS, _WIDTH)
        self.places = nn.Embedding(_CONTEXT, _WIDTH)
        self.dropout = nn.Dropout(_DROPOUT)
        self.blocks = nn.Sequential(*(Block() for _ in range(_LAYERS if layers is None else layers)))
        self.norm = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, NUM_SYMBOLS, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.5 / math.sqrt(_WIDTH))

    def forward(self, symbols: torch.Tensor) -> torch.Tensor:
        """Shape [batch, length], int64, to logits of shape [batch, length, symbols]."""
        places = self.places.weight[: symbols.shape[1]]
        logits: torch.Tensor = self.head(self.norm(self.blocks(self.dropout(self.symbols(symbols) + places))))
        return logits


class Gpt:
    """A GPT of two layers that learns the Python language reference, character by character.

    Args:
        seed: Of the order of the data and the weights.
        steps: Optimizer steps of one run.
        device: Where model and data live.

    Raises:
        CannotRun: There is no text.
    """

    name = "gpt"
    title = "small GPT on the Python language reference"
    parts = 2
    clip: float | None = 1.0

    _BATCH = 8
    _VALIDATION = 256
    _LR = 0.01
    _WARM_UP = 40
    _DEPTH: int | None = None  # blocks, where not as many as usual

    def __init__(self, seed: int, steps: int, device: torch.device) -> None:
        train, held_out = split(encode(read_reference()))
        self.chance_loss = frequency_loss(train, held_out)
        self._seed, self._steps, self._device = seed, steps, device
        generator = torch.Generator().manual_seed(seed)
        self._held_out = self._cut(held_out, self._VALIDATION, generator)
        self.batches = tuple(self._draw(train, index, part, generator) for index, part in self._order())

    def _order(self) -> list[tuple[int, int]]:
        return [(index, part) for index in range(self._steps) for part in range(self.parts)]

    def _draw(self, text: torch.Tensor, index: int, part: int, generator: torch.Generator) -> Batch:
        inputs, targets = self._cut(text, self._BATCH, generator)
        return Batch(index, inputs, targets, torch.ones_like(targets, dtype=torch.float32), part)

    def _cut(self, text: torch.Tensor, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """`count` stretches from random places in the blocks, and the same stretches one symbol later."""
        blocks, size = text.shape
        rows = torch.randint(blocks, (count, 1), generator=generator)
        starts = torch.randint(size - _CONTEXT, (count, 1), generator=generator)
        places = starts + torch.arange(_CONTEXT)
        return text[rows, places].to(self._device), text[rows, places + 1].to(self._device)

    def build(self) -> Training:
        """Fresh weights and optimizer, seeding torch's global generators. Equal for each call."""
        torch.manual_seed(self._seed)
        model = SmallGPT(self._DEPTH).to(self._device)
        decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = AdamW(groups, lr=self._LR)
        scheduler = LambdaLR(optimizer, functools.partial(_warm_up_and_cosine, self._WARM_UP, self._steps))
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98))
        return Training(model, optimizer, scheduler, ema)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Weighted cross entropy of the next symbol, shape [], with a graph."""
        losses = functional.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten(), reduction="none")
        assert batch.weights is not None
        return (losses * batch.weights.flatten()).mean()

    def validate(self, model: nn.Module) -> float:
        """Cross entropy over 256 stretches of the held-out text, in evaluation mode; leaves it in training mode."""
        model.eval()
        try:
            with torch.no_grad():
                inputs, targets = self._held_out
                return float(functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()))
        finally:
            model.train()

    def nan_batch(self, batch: Batch) -> Batch:
        """The same batch; the weight of one symbol in the loss is NaN."""
        assert batch.weights is not None
        weights = batch.weights.clone()
        weights[0, 0] = math.nan
        return batch._replace(weights=weights)

    def garbage_batch(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The same text, followed by random symbols."""
        targets = torch.randint(0, NUM_SYMBOLS, batch.targets.shape, generator=generator)
        return batch._replace(targets=targets.to(batch.targets.device))

    def exposed_weight(self, model: nn.Module) -> nn.Parameter:
        """The head: behind the last normalisation."""
        return model.get_parameter("head.weight")


def _warm_up_and_cosine(warm_up: int, steps: int, step: int) -> float:
    """Factor on the learning rate: linear from 1 / `warm_up` to 1, times a cosine from 1 to 0.05 over the whole run."""
    share = min(1.0, step / steps)
    return min(1.0, (step + 1) / warm_up) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share)))
