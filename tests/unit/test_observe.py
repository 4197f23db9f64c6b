"""Losses, gradient norms and non-finite counts as host numbers."""

import math

import pytest
import torch

from tolaria import observe
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
