"""Losses, gradient norms and non-finite counts as host numbers."""

import math
from collections import deque

import pytest
import torch

from tolaria import observe
from tolaria.config import MOST_OUTSTANDING
from tolaria.measure import Look


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (None, None),
        (1.5, 1.5),
        (torch.tensor(2.5), 2.5),
        (torch.tensor([1.0, 3.0]), 2.0),
        ([torch.tensor(1.0), 2.0, torch.tensor(6.0)], 3.0),
        ([], None),
        ((None, 4.0), 4.0),
        (torch.tensor(3, dtype=torch.int64), 3.0),
    ],
)
def test_read_loss(loss, expected):
    assert observe.read_loss(loss) == expected


def test_read_loss_keeps_nan_and_infinity():
    assert math.isnan(observe.read_loss(torch.tensor([1.0, float("nan")])))
    assert observe.read_loss(float("inf")) == float("inf")


def test_gradient_norm_of_no_gradients():
    assert observe.gradient_norm([]) == (None, 0)


def test_gradient_norm_is_that_of_torch():
    grads = [torch.randn(3, 4), torch.randn(5)]
    assert observe.gradient_norm(grads) == (float(torch.nn.utils.get_total_norm(grads)), 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_gradients_are_counted(bad):
    grads = [torch.ones(3), torch.tensor([1.0, bad]), torch.tensor([bad])]
    norm, count = observe.gradient_norm(grads)
    assert not math.isfinite(norm)
    assert count == 2


def test_a_norm_that_overflows_is_computed_again():
    norm, count = observe.gradient_norm([torch.full((2,), 3e38), torch.zeros(3)])
    assert count == 0
    assert norm == pytest.approx(math.sqrt(2) * 3e38)


@pytest.mark.parametrize("grads", [[], [torch.zeros(0)], [torch.tensor([3.0, 4.0])], [torch.tensor([float("nan")])]])
def test_numbers_beside_the_norm_change_nothing_about_it(grads):
    norm, bad, beside = observe.norm_beside(grads, [torch.tensor(1.0), torch.tensor([0.0])[0].half()])
    assert repr((norm, bad)) == repr(observe.gradient_norm(grads))
    assert beside == [1.0, 0.0]


@pytest.mark.parametrize("gaps", [1, 2])
def test_norms_that_lie_side_by_side_are_taken_as_they_lie(gaps, monkeypatch):
    """As CUDA leaves them; and those with something in between are gathered."""
    plain = torch._foreach_norm

    def beside(tensors, *args, **kwargs):
        found = torch.full((gaps * len(tensors),), 77.0)
        found[::gaps] = torch.stack(plain(tensors, *args, **kwargs))
        return list(found[::gaps])

    grads = [torch.randn(3, 4), torch.randn(5), torch.randn(1)]
    (expected,) = observe.norms(grads)
    monkeypatch.setattr(torch, "_foreach_norm", beside)
    (found,) = observe.norms(grads)
    assert torch.equal(found, expected)


def test_what_is_not_alike_is_told_apart():
    alike = [torch.ones(4), torch.full((9,), 2.0)]
    others = [torch.ones(4, dtype=torch.float64), torch.zeros(0), torch.arange(3), torch.ones(1, dtype=torch.complex64)]
    assert [part.tolist() for part in observe.norms(alike)] == [[2.0, 6.0]]
    assert sorted(part.tolist() for part in observe.norms([*alike, *others])) == [[2.0], [2.0, 6.0, 1.0]]
    assert sorted(part.tolist() for part in observe.norms([*alike, others[0]])) == [[2.0], [2.0, 6.0]]
    assert [part.tolist() for part in observe.norms(torch.nn.Parameter(grad) for grad in alike)] == [[2.0, 6.0]]
    assert observe.norms([]) == observe.norms([torch.zeros(0)]) == observe.norms([torch.arange(3)]) == []


def test_sparse_gradients_count_with_their_values():
    with torch.sparse.check_sparse_tensor_invariants(True):  # older versions warn unless told
        grad = torch.sparse_coo_tensor([[0, 2]], [3.0, 4.0], (4,))
        assert observe.gradient_norm([grad]) == (5.0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64])
def test_num_nonfinite(dtype):
    good = torch.ones(4, dtype=dtype)
    bad = good.clone()
    bad[2] = float("nan")
    assert observe.num_nonfinite([good, torch.arange(3), torch.empty(0)]) == 0
    assert observe.num_nonfinite([good, bad, bad]) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_weights_beyond_measure_count_like_those_that_are_not_finite(dtype):
    """As where norms are read late. A finite weight whose square float32 does not hold is no weight any more."""
    good, nan, huge = torch.ones(4, dtype=dtype), torch.ones(4, dtype=dtype), torch.ones(2, 2, dtype=dtype)
    nan[2] = float("nan")
    huge[1, 1] = {torch.float64: 1e200, torch.float16: float("inf")}.get(dtype, 1e25)
    assert observe.num_overflowing([good, huge, nan, huge]) == 3
    assert observe.num_overflowing([good, torch.arange(3), torch.empty(0), huge]) == 1
    assert observe.num_overflowing([good, torch.full((4,), 1e18, dtype=torch.float32)]) == 0
    assert observe.num_overflowing([]) == observe.num_overflowing(iter([torch.arange(3)])) == 0


@pytest.mark.parametrize("late", [False, True])
def test_weights_are_judged_alike_whether_read_late_or_not(late):
    weights, numbers, lists = [torch.ones(3), torch.tensor([1.0, 3e37]), torch.full((5,), 1e18)], {}, {}
    Look().at_weights(weights, late, numbers, lists)
    found = lists["weights"][0].isfinite().logical_not().sum() if late else numbers["nonfinite_weights"]
    assert int(found) == 1


def test_finite_values_whose_sum_overflows_are_no_alarm():
    assert observe.num_nonfinite([torch.full((8,), 6e4, dtype=torch.float16), torch.full((4,), 3e38)]) == 0


@pytest.mark.parametrize(("dtype", "high"), [(torch.float16, 6e4), (torch.bfloat16, 2.0**127), (torch.float32, 3e38)])
def test_the_mean_of_finite_losses_is_finite(dtype, high):
    losses = [torch.tensor(high, dtype=dtype), torch.tensor([high], dtype=dtype)]
    expected = float(losses[0])
    assert float(observe.mean_loss(losses)) == expected
    assert float(observe.mean_loss({"policy": losses, "value": losses[0]})) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mean_of_many_small_losses_is_the_one_that_is_read_at_once(dtype):
    losses = [torch.tensor(value, dtype=dtype) for value in (256.0, *[0.0625] * 16, 1.0)]
    assert float(observe.mean_loss(losses)) == observe.read_loss(losses) == 258.0 / 18
    assert float(observe.mean_loss([losses[0], 1.5, torch.tensor(3)])) == observe.read_loss([losses[0], 1.5, 3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_loss_stays_what_it_is(dtype):
    loss = torch.tensor(2.5, dtype=dtype)
    for given in (loss, [loss], {"loss": loss}, [None, loss]):
        taken = observe.mean_loss(given)
        assert taken.dtype == dtype
        assert taken.data_ptr() == loss.data_ptr()


class Row:
    """Page-locked memory that nothing arrives in."""

    def __init__(self, width):
        self.width = width

    def numel(self):
        return self.width

    def tolist(self):
        return [0.0] * self.width

    def __getitem__(self, where):
        return Row(where.stop)

    def copy_(self, source, non_blocking):
        assert source.numel() == self.width


class Elsewhere(torch.Tensor):
    """In main memory, and says that it is on a device."""

    @classmethod
    def on(cls, name):
        made = torch.Tensor._make_subclass(cls, torch.zeros(()))
        made.home = torch.device(name)
        return made

    @property
    def device(self):
        return self.home


class Device:
    """Events are numbers, and have passed up to `reached`."""

    def __init__(self):
        self.marked = self.reached = 0

    def mark(self):
        self.marked += 1
        return self.marked

    def has_passed(self, event):
        return event <= self.reached

    def host_wait(self, event):
        self.reached = max(self.reached, event)


@pytest.mark.parametrize("num_devices", [1, 2, 3, 8])
def test_no_row_is_page_locked_after_the_first_steps(num_devices, monkeypatch):
    """With as many steps on their way as there may be, and a rollback that forgets them all."""
    taken = []

    def page_locked(count, width):
        taken.append(count)
        return [Row(width) for _ in range(count)]

    monkeypatch.setattr(observe, "_page_locked", page_locked)
    devices = {f"xpu:{index}": Device() for index in range(num_devices)}
    readings = observe.Readings(devices)
    assert len(taken) == 1
    signs = {name: Elsewhere.on(name) for name in devices}
    on_their_way = deque()
    for step in range(1, 8 * MOST_OUTSTANDING):
        on_their_way.append(readings.send(signs))
        if len(on_their_way) > MOST_OUTSTANDING:
            if step % 40 == 0:
                while on_their_way:
                    on_their_way.popleft().forget()
            else:
                on_their_way.popleft().wait()
    assert len(taken) == 1
