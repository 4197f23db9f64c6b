"""What is trained while it is measured: a decoder-only transformer in named sizes, AdamW, made-up tokens.

Speed does not depend on what the tokens say, so they are drawn from a seed. The number of tensors is that of a model of
this kind and size, and so is what a step costs beside them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from tolaria import TolariaGovernor

_BYTES_PER_WEIGHT = 12  # float32: the weight and two moments

_RATE = 1e-6  # the loss stays where it is, whatever the batches are, so that no detector has anything to say


@dataclass(frozen=True, slots=True)
class Size:
    """One size of the workload.

    Attributes:
        name: As `--size` takes it.
        width: Of the residual stream.
        layers: Blocks.
        heads: Of each block.
        vocabulary: Tokens that there are; embedding and output share one matrix.
        batch: Sequences a step.
        context: Positions of a sequence.
    """

    name: str
    width: int
    layers: int
    heads: int
    vocabulary: int
    batch: int
    context: int

    @property
    def num_weights(self) -> int:
        """Trained numbers."""
        per_block = 12 * self.width * self.width + 13 * self.width
        return self.vocabulary * self.width + self.layers * per_block

    @property
    def state_bytes(self) -> int:
        """Of weights and both moments; a counter per tensor comes on top."""
        return _BYTES_PER_WEIGHT * self.num_weights


SIZES = {
    size.name: size
    for size in (
        Size("10mb", 128, 4, 4, 256, 8, 64),
        Size("400mb", 512, 10, 8, 4096, 4, 128),
        Size("355m", 1024, 24, 16, 50257, 16, 1024),
        Size("1.3b", 2048, 24, 16, 50257, 16, 1024),
    )
}
"""By name. The first two are named after the bytes of their state, the others after the number of their weights."""


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a norm and beside a residual. 12 parameters."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.attended = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape [batch, positions, width] to the same."""
        batch, positions, width = x.shape
        parts = self.queries_keys_values(self.before_attention(x)).view(batch, positions, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attended(mixed.transpose(1, 2).reshape(batch, positions, width))
        out: torch.Tensor = x + self.narrow(F.gelu(self.wide(self.before_mlp(x))))
        return out


class Transformer(nn.Module):
    """Predicts each token from those before it. 12 parameters a block, and one matrix."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.layers))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens of shape [batch, positions + 1], int64. Answers the mean cross-entropy, a scalar."""
        x = self.embedding(tokens[:, :-1])
        for block in self.blocks:
            x = block(x)
        scores = F.linear(F.layer_norm(x, x.shape[-1:]), self.embedding.weight)
        return F.cross_entropy(scores.flatten(0, 1).float(), tokens[:, 1:].flatten())


class Workload:
    """A model of one size with its optimizer and data, on one device.

    Args:
        size: See `SIZES`.
        device: Where everything is.
        fused: Which AdamW: the fused one, or torch's default for that device.

    Attributes:
        model: Float32; computes in bfloat16 on CUDA, by autocast.
        optimizer: AdamW. Its moments exist after the first step.
    """

    def __init__(self, size: Size, device: torch.device, *, fused: bool = True) -> None:
        self.size, self.device = size, device
        torch.manual_seed(0)
        with device:
            self.model = Transformer(size)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=_RATE, fused=fused or None)
        self._drawn = torch.Generator().manual_seed(1)

    def batches(self, num_steps: int, *, sequences: int | None = None) -> Iterator[torch.Tensor]:
        """That many batches of shape [sequences, context + 1], int64, on the device; four different ones in turn.

        Args:
            num_steps: How many.
            sequences: In each; those of the size unless given.
        """
        shape = (sequences or self.size.batch, self.size.context + 1)
        several = [torch.randint(self.size.vocabulary, shape, generator=self._drawn).to(self.device) for _ in range(4)]
        return (several[number % 4] for number in range(num_steps))

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Forward of one batch."""
        computing = torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else contextlib.nullcontext()
        with computing:
            loss: torch.Tensor = self.model(tokens)
        return loss

    def step(self, tokens: torch.Tensor, governor: TolariaGovernor | None = None) -> None:
        """Forward, backward and optimizer step of one batch; the last one by the governor where there is one."""
        loss = self.loss(tokens)
        loss.backward()
        if governor is None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        else:
            governor.step(loss=loss)

    def tensors(self) -> list[torch.Tensor]:
        """Of weights and optimizer state, all that a snapshot has to hold."""
        moments = [value for kept in self.optimizer.state.values() for value in kept.values()]
        return [*(p.detach() for p in self.model.parameters()), *(m for m in moments if isinstance(m, torch.Tensor))]

    def num_bytes(self) -> int:
        """Of `tensors`."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def backward(self) -> torch.Tensor:
        """Gradients of one batch are left in place. Answers its loss, a scalar without a graph."""
        loss = self.loss(next(self.batches(1)))
        loss.backward()
        return loss.detach()
