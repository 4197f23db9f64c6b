"""The kernel for vital signs on a device, beside the same numbers added in float64 by torch."""

import math

import pytest
import torch

from tolaria import GovernorConfig, Health, TolariaGovernor, Verdict, judge, launch, observe
from tolaria.cuda import ContextDevice, TorchStreams, find_driver
from tolaria.measure import Measure

pytestmark = pytest.mark.cuda

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]
SIZES = [1, 2, 3, 7, 8, 31, 33, 255, 256, 257, 4096, 16385, 100_003]


def expected(tensors):
    wide = [torch.view_as_real(t).double() if t.is_complex() else t.double() for t in tensors]
    return math.sqrt(sum(float((t * t).sum()) for t in wide))


def read(measured):
    assert not measured.single
    return measured.totals[0].tolist()


def test_the_kernel_is_there():
    assert launch.launcher_of(torch.device("cuda:0")) is not None


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_any_size_and_alignment(dtype):
    found = Measure()
    for shift in (0, 1, 3):
        flat = [torch.randn(shift + size, device="cuda").to(dtype) for size in SIZES]
        tensors = [each[shift:] for each in flat]
        norm, bad = read(found.take(tensors))
        assert norm == pytest.approx(expected(tensors), rel=1e-12)
        assert bad == 0
        tensors[-1][-1] = math.nan
        tensors[4][0] = math.inf
        measured = found.take(tensors, flagged=True)
        assert read(measured)[1] == 2
        assert measured.flags[0].item() == 1.0


def test_many_tensors_and_a_large_one_give_the_same_bits_each_time():
    tensors = [torch.randn(1 + 37 * number % 5000, device="cuda").to(DTYPES[number % 5]) for number in range(700)]
    tensors.append(torch.randn(40_000_000, device="cuda"))
    found = Measure()
    measured = [found.take(tensors, flagged=True) for _ in range(5)]
    norm, bad = read(measured[0])
    assert norm == pytest.approx(expected(tensors), rel=1e-12)
    assert bad == 0
    assert all(torch.equal(each.totals[0], measured[0].totals[0]) for each in measured)
    assert [each.flags[0].item() for each in measured] == [0.0] * 5
    # as torch has it, to the precision of its 32-bit norms
    assert norm == pytest.approx(observe.total_norm(observe.norms(tensors)).item(), rel=1e-5)


def test_numbers_arrive_in_the_row_with_their_ticket():
    driver, reason = find_driver()
    assert driver is not None, reason
    clock = ContextDevice("cuda:0", driver, TorchStreams())
    readings = observe.Readings({"cuda:0": clock})
    assert readings._senders
    for number in range(200):
        loss = torch.full((), 1.5 + number, device="cuda")
        half = torch.tensor([0.25], dtype=torch.bfloat16, device="cuda")
        list_ = torch.arange(300, device="cuda", dtype=torch.float64)
        reading = readings.send({"a": loss, "b": half, "c": 7.0}, {"d": [list_, loss.reshape(1).half()]})
        assert reading._transfers[0].ticket is not None
        if number % 3:
            torch.cuda.synchronize()
            assert reading.has_arrived()
        reading.wait()
        assert reading.numbers == {"a": 1.5 + number, "b": 0.25, "c": 7.0}
        assert reading.lists == {"d": [*map(float, range(300)), float(torch.tensor(1.5 + number).half())]}
    clock.close()


@pytest.mark.parametrize("clip", [None, 1e9])
def test_what_a_governor_sees_is_what_torch_says(clip):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(9, 9) for _ in range(120))).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    seen, wanted = [], []

    def update(state, signs):
        seen.append(signs)
        return state, Verdict(Health.HEALTHY, signs.step)

    with TolariaGovernor(
        model, optimizer, config=GovernorConfig(cadence=3), detector=judge.Detector(lambda: 0, update)
    ) as governor:
        for number in range(8):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            wanted.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
            governor.step(loss=torch.full((), float(number), device="cuda"), clip=clip)
        governor.state_dict()
    assert [signs.loss for signs in seen] == list(map(float, range(8)))
    assert [signs.grad_norm for signs in seen] == pytest.approx(wanted, rel=1e-6)
    assert {(signs.nonfinite_gradients, signs.nonfinite_weights) for signs in seen} == {(0, 0)}


def test_a_poisoned_weight_is_counted_in_its_step():
    model = torch.nn.Sequential(*(torch.nn.Linear(9, 9) for _ in range(20))).cuda()
    seen = []

    def update(state, signs):
        seen.append(signs.nonfinite_weights)
        return state, Verdict(Health.HEALTHY, signs.step)

    with TolariaGovernor(model, detector=judge.Detector(lambda: 0, update)) as governor:
        for number in range(6):
            if number == 3:
                with torch.no_grad():
                    model[4].weight[2, 2] = math.inf
                    model[9].bias[0] = math.nan
            governor.observe(loss=1.0, grad_norm=1.0)
        governor.check_vital_signs(1.0, grad_norm=1.0)
    assert seen == [0, 0, 0, 2, 2, 2, 2]


def test_rows_outlive_the_governor():
    """What is still to be written when nobody waits for it any more goes where nobody else is."""
    from tolaria.testing.gates import Gate

    value = torch.full((), 3.0, device="cuda")
    launcher = launch.launcher_of(torch.device("cuda:0"))
    torch.cuda.synchronize()
    with Gate(limit_s=10.0) as gate:
        gate.close(torch.cuda.current_stream())
        rows = observe._page_locked(4, 1024)
        place = rows[0].data_ptr()
        assert launch.Sender(launcher).send([value], rows[0]) is not None
        del rows
        others = [torch.zeros(4, 1024, dtype=torch.float64).pin_memory() for _ in range(8)]
        assert all(other.data_ptr() != place for other in others)
    torch.cuda.synchronize()
    assert all(not other.any() for other in others)
