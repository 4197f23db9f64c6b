"""One of two ranks that train a sharded model: called by test_kinds_wrappers.py, or `two_ranks.py RANK FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from tolaria import GovernorConfig, TolariaGovernor, observe


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Linear(3, 4)
    for key, parameter in list(model._parameters.items()):
        model.register_parameter(key, nn.Parameter(distribute_tensor(parameter.data, mesh, [Shard(0)])))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)

    def train() -> None:
        for number in range(2):
            model(distribute_tensor(torch.ones(2, 3) + number, mesh, [Replicate()])).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def look() -> list[torch.Tensor]:
        moments = [values["exp_avg"] for values in optimizer.state.values()]
        return [tensor.full_tensor().detach().clone() for tensor in (*model.parameters(), *moments)]

    def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
        return all(map(torch.equal, one, other))

    with TolariaGovernor(model, optimizer, config=GovernorConfig(slots=3)) as governor:
        train()
        governor.snapshot()
        before, local = look(), model.weight.to_local()
        assert local.shape == (2, 3), "each rank holds a half"
        train()
        reference = look()
        assert not same(reference, before)
        for _ in range(2):
            governor.execute_rollback()
            assert same(look(), before)
            assert model.weight._local_tensor.data_ptr() == local.data_ptr()
            train()
            assert same(look(), reference)
    assert abs(_norm_of(model, mesh) - 10.0) < 1e-6, "of the whole, on every rank"
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    (folder / f"done-{rank}").touch()


def _norm_of(model: nn.Module, mesh: object) -> float:
    model.weight.grad = distribute_tensor(torch.full((4, 3), 5.0 / 3.0**0.5), mesh, [Shard(0)])
    model.bias.grad = distribute_tensor(torch.zeros(4), mesh, [Shard(0)])
    norm, bad = observe.gradient_norm(observe.gradients(model.parameters()))
    assert norm is not None
    assert not bad
    return norm


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
