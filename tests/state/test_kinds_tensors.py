"""What tensors can be: tied, viewed, overlapping, expanded, empty, of every type, shared with strangers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tolaria
from tolaria import TolariaGovernor

Govern = Callable[..., TolariaGovernor]
Freeze = Callable[..., Any]
Raw = Callable[[torch.Tensor], bytes]


class Bag(nn.Module):
    """Parameters and buffers as the test gives them."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def forward(self) -> torch.Tensor:
        return torch.stack([p.abs().float().sum() for p in self.parameters()]).sum()


def _overwrite(*tensors: torch.Tensor) -> None:
    """Turn every bit of the storages under them."""
    for tensor in tensors:
        flat = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        flat.bitwise_not_()


def _rolls_back(governor: TolariaGovernor, raw: Raw, freeze: Freeze, *tensors: torch.Tensor) -> None:
    governor.snapshot()
    before = [raw(tensor) for tensor in tensors], freeze(governor.model)
    digest, addresses = governor.digest(), [tensor.data_ptr() for tensor in tensors]
    for _ in range(2):
        _overwrite(*{tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}.values())
        governor.execute_rollback()
        assert ([raw(tensor) for tensor in tensors], freeze(governor.model)) == before
        assert governor.digest() == digest
        assert [tensor.data_ptr() for tensor in tensors] == addresses


# ---------------------------------------------------------------- sharing


def test_tied_weights_are_copied_once(govern: Govern, raw: Raw, freeze: Freeze) -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    governor = govern(model, optimizer)
    _rolls_back(governor, raw, freeze, model[0].weight)
    assert governor.capabilities().state_bytes == 5 * 3 * 4
    assert model[1].weight is model[0].weight
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    governor.execute_rollback()
    assert not optimizer.state


def test_a_tie_that_was_cut_is_tied_again(govern: Govern, freeze: Freeze) -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    governor = govern(model)
    governor.snapshot()
    before = freeze(model)
    model[1].weight = nn.Parameter(torch.zeros(5, 3))
    governor.execute_rollback()
    assert model[1].weight is model[0].weight
    assert freeze(model) == before


def test_tied_buffers_stay_tied(govern: Govern, raw: Raw, freeze: Freeze) -> None:
    table = torch.arange(4.0)
    model = Bag(a=table, b=table)
    governor = govern(model)
    _rolls_back(governor, raw, freeze, table)
    model.b = table.clone()
    governor.execute_rollback()
    assert model.a is model.b


def test_views_of_a_flat_parameter(govern: Govern, raw: Raw, freeze: Freeze) -> None:
    flat = torch.arange(12.0)
    model = Bag(
        matrix=nn.Parameter(flat[:6].view(2, 3)), transposed=nn.Parameter(flat[6:10].view(2, 2).t()), rest=flat[10:]
    )
    governor = govern(model, torch.optim.SGD(model.parameters(), lr=0.1))
    _rolls_back(governor, raw, freeze, flat)
    assert governor.capabilities().state_bytes == 12 * 4
    model.matrix.data.fill_(5.0)
    assert flat[0] == 5.0  # still views of it


def test_overlapping_views(govern: Govern, raw: Raw, freeze: Freeze) -> None:
    flat = torch.arange(10, dtype=torch.float32)
    windows = flat.unfold(0, 4, 2)  # every element in up to two rows
    model = Bag(
        windows=windows, front=nn.Parameter(flat[:6]), back=flat[4:], twos=flat[::2], bits=flat.view(torch.int32)
    )
    _rolls_back(govern(model), raw, freeze, flat)


def test_expanded_tensors(govern: Govern, raw: Raw, freeze: Freeze) -> None:
    row = torch.arange(3.0)
    model = Bag(expanded=row.expand(4, 3), row=row, scalar=nn.Parameter(torch.ones(()).expand(2, 2)))
    _rolls_back(govern(model), raw, freeze, row, model.scalar)
    assert model.expanded.stride() == (0, 1)


def test_gaps_in_a_storage(govern: Govern, raw: Raw, freeze: Freeze) -> None:
    """NaN in bytes that belong to no tensor is nobody's damage, and the bytes come back all the same."""
    flat = torch.full((9,), float("nan"))
    flat[2:5] = 1.0
    model = Bag(middle=flat[2:5], weight=nn.Parameter(torch.ones(1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = govern(model, optimizer, cadence=1, probation=1)
    _rolls_back(governor, raw, freeze, flat)
    for _ in governor.watch(range(4)):
        model().backward()
        assert governor.step(loss=1.0).verdict.health is tolaria.Health.HEALTHY
    assert governor.statistics().snapshots > 2


def test_a_buffer_viewed_elsewhere_after_the_snapshot(govern: Govern, raw: Raw, freeze: Freeze) -> None:
    flat = torch.arange(8.0)
    model = Bag(a=flat[:4], b=flat[2:6])
    governor = govern(model)
    governor.snapshot()
    before, held = freeze(model), model.a
    for other in (torch.zeros(3), torch.zeros(2, 2, dtype=torch.float64), flat[1:3]):
        model.a.data = other
        governor.execute_rollback()
        assert freeze(model) == before
        assert model.a is held
        model.a[2] = 77.0
        assert model.b[0] == 77.0
        governor.execute_rollback()


def test_memory_shared_with_strangers(govern: Govern, raw: Raw, freeze: Freeze) -> None:
    """The unit is the storage: what lies in it beside governed tensors goes back too; addresses stay."""
    flat = torch.arange(10.0)
    model = Bag(weight=nn.Parameter(flat[:4]))
    stranger = flat[6:]
    governor = govern(model)
    _rolls_back(governor, raw, freeze, flat)
    stranger.fill_(-1.0)
    loss = (stranger * 2.0).requires_grad_().sum() * model.weight.sum()
    governor.execute_rollback()
    assert stranger.tolist() == [6.0, 7.0, 8.0, 9.0]
    assert stranger.data_ptr() == flat.data_ptr() + 24
    assert loss.requires_grad


def test_a_state_tensor_that_is_a_view_of_a_parameter(govern: Govern, raw: Raw, freeze: Freeze) -> None:
    weight = nn.Parameter(torch.arange(4.0))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state[weight]["head"] = weight.detach()[:2]
    governor = govern(Bag(weight=weight), optimizer)
    _rolls_back(governor, raw, freeze, weight)
    assert optimizer.state[weight]["head"].data_ptr() == weight.data_ptr()


def test_numpy_memory(govern: Govern, raw: Raw, freeze: Freeze) -> None:
    array = torch.arange(4.0).numpy()
    model = Bag(whole=torch.from_numpy(array), head=torch.from_numpy(array[:2]))  # two storages, one memory
    _rolls_back(govern(model), raw, freeze, model.whole)


def test_shared_memory(govern: Govern, raw: Raw, freeze: Freeze) -> None:
    model = Bag(weight=nn.Parameter(torch.arange(4.0)), table=torch.arange(3.0))
    model.share_memory()
    governor = govern(model)
    _rolls_back(governor, raw, freeze, model.weight, model.table)
    assert model.weight.is_shared()


def test_a_buffer_that_moved_into_shared_memory(govern: Govern, freeze: Freeze) -> None:
    model = Bag(table=torch.arange(3.0))
    governor = govern(model)
    governor.snapshot()
    before = freeze(model)
    model.table.share_memory_()
    model.table.zero_()
    governor.execute_rollback()
    assert freeze(model) == before


# ---------------------------------------------------------------- types and shapes

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_buffers_of_every_type(dtype: torch.dtype, govern: Govern, raw: Raw, freeze: Freeze) -> None:
    pattern = torch.arange(16, dtype=torch.uint8) if dtype is not torch.bool else torch.arange(16) % 2
    buffer = pattern.to(torch.uint8).view(dtype)
    model = Bag(buffer=buffer, scalar=buffer[0], empty=buffer[:0])
    _rolls_back(govern(model), raw, freeze, buffer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.complex64], ids=str)
def test_parameters_of_every_trainable_type(dtype: torch.dtype, govern: Govern, raw: Raw, freeze: Freeze) -> None:
    weight = nn.Parameter(torch.arange(1.0, 7.0).view(2, 3).to(dtype))
    model = Bag(weight=weight)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
        optimizer.zero_grad()

    governor = govern(model, optimizer)
    step()
    _rolls_back(governor, raw, freeze, weight)
    before = freeze(optimizer)
    step()
    reference = freeze(model, optimizer)
    governor.execute_rollback()
    assert freeze(optimizer) == before
    step()
    assert freeze(model, optimizer) == reference


def test_integer_and_bool_parameters(govern: Govern, raw: Raw, freeze: Freeze) -> None:
    codes = nn.Parameter(torch.arange(5, dtype=torch.int8), requires_grad=False)
    flags = nn.Parameter(torch.tensor([True, False]), requires_grad=False)
    _rolls_back(govern(Bag(codes=codes, flags=flags)), raw, freeze, codes)


def test_scalars_and_empty_tensors(govern: Govern, raw: Raw, freeze: Freeze) -> None:
    model = Bag(
        scalar=nn.Parameter(torch.tensor(3.0)),
        empty=nn.Parameter(torch.zeros(0)),
        flat=torch.zeros(0, 4),
        tall=torch.zeros(4, 0, dtype=torch.int64),
        number=torch.tensor(7),
    )
    governor = govern(model, torch.optim.Adam(model.parameters()))
    _rolls_back(governor, raw, freeze, model.scalar, model.number)
    held = model.flat
    model.flat.data = torch.ones(2, 4)
    model.tall = torch.ones(1, 1)
    governor.execute_rollback()
    assert model.flat is held
    assert (tuple(model.flat.shape), tuple(model.tall.shape)) == ((0, 4), (4, 0))


def test_an_empty_model(govern: Govern) -> None:
    model = nn.Sequential()
    governor = govern(model)
    digest = governor.digest()
    governor.snapshot()
    assert governor.execute_rollback().success
    assert governor.digest() == digest


def test_a_lazy_conjugate(govern: Govern, raw: Raw, freeze: Freeze) -> None:
    plain = torch.tensor([complex(1, 2), complex(3, 4)])
    model = Bag(conjugate=plain.conj(), negative=plain.conj().imag)
    assert model.conjugate.is_conj()
    assert model.negative.is_neg()
    _rolls_back(govern(model), raw, freeze, plain)
    assert model.conjugate.is_conj()


def test_memory_formats(govern: Govern, raw: Raw, freeze: Freeze) -> None:
    model = nn.Conv2d(3, 4, 3)
    model.to(memory_format=torch.channels_last)
    governor = govern(model)
    _rolls_back(governor, raw, freeze, model.weight)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


def test_nan_patterns_and_signed_zeros_keep_their_bits(govern: Govern, raw: Raw, freeze: Freeze) -> None:
    bits = torch.tensor([0x7FC00001, 0x7F800001, -0x80000000, 0x00000001], dtype=torch.int32)
    model = Bag(odd=bits.view(torch.float32))
    _rolls_back(govern(model), raw, freeze, model.odd)
