"""A plain PyTorch loop under guard: `python examples/plain_loop.py`.

One batch of this data set is poisoned. Ungoverned, the weights would be NaN from that step on; here the incident is one
line on stderr and training goes on, exactly as if the batch had never been in the data.
"""

import torch
from torch import nn

from tolaria import TolariaGovernor


def make_data(num_batches: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A noisy linear map to learn; batch 120 holds one infinity."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(16, 4, generator=generator)
    batches = []
    for index in range(num_batches):
        x = torch.randn(32, 16, generator=generator)
        if index == 120:
            x[3, 5] = float("inf")
        batches.append((x, x.nan_to_num(posinf=0.0) @ weights + 0.1 * torch.randn(32, 4, generator=generator)))
    return batches


def main() -> None:
    """Train for 300 batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=300)

    governor = TolariaGovernor(model, optimizer, scheduler=scheduler)
    for x, y in governor.watch(make_data(300)):
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        governor.step(loss=loss)

    done = governor.statistics()
    print(f"final loss {loss.item():.4f}, {done.rollbacks} rollbacks, {done.skipped_batches} batch skipped")


if __name__ == "__main__":
    main()
