"""Fault plans: each fault does what it says, at the batch it was planned for, as often as it was planned."""

from functools import cache

import pytest
import torch
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, judge
from tolaria.errors import InvalidConfig, UsageError
from tolaria.testing.faults import KINDS, FaultPlan, InjectedFault, Moment, PlannedFault, flip_bit, newest_slot

pytestmark = pytest.mark.usefixtures("alone")


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    return model, torch.optim.Adam(model.parameters(), lr=0.01)


def batches(count=8):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(5, 4, generator=generator), torch.randint(3, (5,), generator=generator)) for _ in range(count)]


def train(plan, numbered=None, seed=0, **settings):
    """A plain loop. Answers per optimizer step (loss, gradients, weights, moments), and the faults."""
    model, optimizer = build()
    rows = []
    with FaultPlan.parse(plan, seed).attach(model, optimizer, **settings) as faults:
        for _, (x, y) in faults.over(enumerate(batches()) if numbered is None else numbered):
            optimizer.zero_grad()
            loss = faults.loss(nn.functional.cross_entropy(model(x), y))
            loss.backward()
            optimizer.step()
            state = [value.clone() for one in optimizer.state.values() for value in one.values()]
            weights = [p.detach().clone() for p in model.parameters()]
            rows.append(
                (loss.item(), [p.grad.clone() for p in model.parameters()], weights, state, x.clone(), y.clone())
            )
        lr = optimizer.param_groups[0]["lr"]
    assert not optimizer._optimizer_step_pre_hooks
    return rows, faults, lr


def flat(tensors):
    return torch.cat([tensor.reshape(-1).double() for tensor in tensors])


@cache
def undisturbed():
    return train("")[0]


def first_difference(rows):
    for step, (mine, clean) in enumerate(zip(rows, undisturbed(), strict=True)):
        if str(mine) != str(clean) or not torch.equal(flat(mine[2]), flat(clean[2])):
            return step
    return None


def test_an_empty_plan_changes_nothing():
    assert first_difference(train("")[0]) is None


@pytest.mark.parametrize("name", sorted(set(KINDS) - {"exception", "slot_bit"}))
def test_a_fault_strikes_at_its_batch_and_not_before(name):
    rows, faults, _ = train(f"{name}@3")
    assert faults.struck == [(name, 3)]
    assert first_difference(rows) == 3


@pytest.mark.parametrize("name", sorted(set(KINDS) - {"exception", "slot_bit"}))
def test_a_seed_fixes_what_a_fault_does(name):
    one, other = (str(train(f"{name}@3", seed=7)[0]) for _ in range(2))
    assert one == other


@pytest.mark.parametrize("name", ["weight_bit", "moment_bit", "nan_gradient", "noise_batch", "foreign_write"])
def test_another_seed_does_something_else(name):
    assert len({str(train(f"{name}@3", seed=seed)[0]) for seed in range(4)}) > 1


def test_what_each_of_them_does():
    assert train("nan_loss@3")[0][3][0] != train("nan_loss@3")[0][3][0]
    (x, y), (clean_x, clean_y) = train("nan_batch@3")[0][3][4:], undisturbed()[3][4:]
    assert bool(x.isnan().all())
    assert torch.equal(y, clean_y)
    x, y = train("noise_batch@3")[0][3][4:]
    assert not torch.equal(x, clean_x)
    assert sorted(y.tolist()) == sorted(clean_y.tolist())
    assert int(flat(train("nan_gradient@3")[0][3][1]).isnan().sum()) == 1
    assert torch.equal(flat(train("huge_gradients@3")[0][3][1]), flat(g * 1e6 for g in undisturbed()[3][1]))
    assert train("rate_jump@3")[2] == pytest.approx(10.0)
    assert bool((flat(train("zero_moments@3")[0][3][3]) != flat(undisturbed()[3][3])).any())


def test_weight_bits_and_moment_bits_hit_one_element():
    model, optimizer = build()
    nn.functional.cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
    optimizer.step()
    for name, tensors in (
        ("weight_bit", list(model.parameters())),
        ("moment_bit", [v for one in optimizer.state.values() for v in one.values() if v.dim()]),
    ):
        before = flat(tensors)
        with FaultPlan.parse(f"{name}@0").attach(model, optimizer) as faults:
            faults.begin(0)
            faults._strike(Moment.STEP)
        assert int((flat(tensors) != before).sum()) == 1


def test_an_exception_comes_out_of_the_step_and_the_hooks_go():
    model, optimizer = build()
    faults = FaultPlan.parse("exception@0 nan_loss@9").attach(model, optimizer)
    faults.begin(0)
    with pytest.raises(InjectedFault):
        optimizer.step()
    faults.__exit__(InjectedFault)  # another error is on its way: it says nothing of `nan_loss`
    assert not optimizer._optimizer_step_pre_hooks


def test_bad_data_strikes_each_time_and_others_as_often_as_planned():
    data = batches()
    replayed = [(number, data[number]) for number in (0, 1, 2, 1, 2, 1, 2, 3)]
    _, faults, _ = train("nan_batch@1 rate_jump@2x2", replayed)
    assert faults.struck == [
        ("nan_batch", 1),
        ("rate_jump", 2),
        ("nan_batch", 1),
        ("rate_jump", 2),
        ("nan_batch", 1),
    ]


def test_an_optimizer_that_steps_twice_on_a_batch_is_struck_once():
    model, optimizer = build()
    with FaultPlan.parse("rate_jump@0 nan_gradient@1").attach(model, optimizer) as faults:
        for number, (x, y) in faults.over(enumerate(batches(2))):
            nn.functional.cross_entropy(model(x), y).backward()
            faults.update()
            assert len(faults.struck) == number + number  # the gradient is spoilt here, the rate in the step
            optimizer.step()
            optimizer.step()
    assert faults.struck == [("rate_jump", 0), ("nan_gradient", 1)]


def test_a_length_hits_batches_in_a_row():
    assert train("nan_batch@2+3")[1].struck == [("nan_batch", 2), ("nan_batch", 3), ("nan_batch", 4)]


def test_what_is_delivered_again_is_not_touched():
    data = batches()
    kept = str(data)
    train("nan_batch@2 noise_batch@3", enumerate(data))
    assert str(data) == kept


def test_a_bit_in_the_newest_slot_is_found_by_the_digest():
    model, optimizer = build()
    with TolariaGovernor(model, optimizer, config=GovernorConfig(rng="keep"), detector=judge.non_finite()) as governor:
        governor.snapshot()
        before = [memory.clone() for memory in newest_slot(governor)]
        plan = FaultPlan.parse("slot_bit@0")
        with plan.attach(model, optimizer, newest_slot=lambda: newest_slot(governor)) as faults:
            faults.begin(0)
            faults._strike(Moment.STEP)
        after = newest_slot(governor)
        bits = sum(int((a ^ b).ne(0).sum()) for a, b in zip(before, after, strict=True))
        assert bits == 1


def test_a_slot_bit_without_a_slot_is_an_error():
    model, optimizer = build()
    faults = FaultPlan.parse("slot_bit@0").attach(model, optimizer)
    faults.begin(0)
    with pytest.raises(UsageError, match="newest_slot"):
        optimizer.step()


def test_a_fault_that_never_struck_is_an_error():
    with pytest.raises(UsageError, match="rate_jump@99 never struck"):
        train("nan_loss@1 rate_jump@99")


def test_before_a_step_is_begun_nothing_strikes():
    model, optimizer = build()
    faults = FaultPlan.parse("rate_jump@0").attach(model, optimizer)
    optimizer.step()
    assert faults.struck == []


@pytest.mark.parametrize("text", ["nan_loss@3", "weight_bit@12x2 nan_batch@4+16", "exception@0x3+2", ""])
def test_a_plan_is_a_value_that_can_be_written(text):
    plan = FaultPlan.parse(text, seed=5)
    assert str(plan) == text
    assert FaultPlan.parse(str(plan), 5) == plan


@pytest.mark.parametrize("text", ["nan_loss", "nan_loss@", "nan_lost@3", "nan_loss@3x0", "nan_loss@-1", "nan_loss @3"])
def test_a_plan_that_cannot_be_read_is_refused(text):
    with pytest.raises(InvalidConfig, match="plan"):
        FaultPlan.parse(text)


def test_plans_are_drawn_from_a_seed():
    plan = FaultPlan.draw(3, batches=50, count=6)
    assert plan == FaultPlan.draw(3, batches=50, count=6)
    assert plan != FaultPlan.draw(4, batches=50, count=6)
    assert len({fault.batch for fault in plan.faults}) == 6
    assert all(fault.batch < 50 for fault in plan.faults)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8]
)
def test_a_bit_is_flipped_in_any_layout(dtype):
    for tensor in (torch.arange(1, 25).to(dtype).reshape(4, 6), torch.arange(1, 25).to(dtype).reshape(4, 6).t()):
        for bit in (0, 3, 8 * dtype.itemsize - 1):
            before = tensor.clone()
            flip_bit(tensor, 7, bit)
            changed = (tensor != before).nonzero()
            assert changed.tolist() == [list(divmod(7, tensor.shape[1]))]
            flip_bit(tensor, 7, bit)
            assert torch.equal(tensor, before)


def test_bad_counts_are_refused():
    with pytest.raises(InvalidConfig):
        PlannedFault("nan_loss", 1, times=0)
