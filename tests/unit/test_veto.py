"""A step that the device refuses: by a flag where torch's fused optimizers take one, on zero gradients elsewhere."""

import copy

import pytest
import torch
from torch import nn

from tolaria import observe, veto
from tolaria.optim import SGD, AdamW

FUSED = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, weight_decay=0.1, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1, fused=True),
    "ours": lambda p: AdamW(p, lr=0.1),
    "our momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.1, foreach=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1, fused=True),
}
ONE, ZERO = torch.tensor(1.0), torch.tensor(0.0)


def bits(value):
    """A tree of tensors as bytes."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), bytes(value.detach().contiguous().reshape(-1).view(torch.uint8).tolist())
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    return [bits(item) for item in value] if isinstance(value, (list, tuple)) else value


def state(parameters, optimizer):
    return bits([list(parameters), optimizer.state_dict()])


def grad(parameters, value=None):
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) if value is None else torch.full_like(parameter, value)


@pytest.fixture(params=FUSED)
def pair(request):
    parameters = [nn.Parameter(torch.randn(7, 3)) for _ in range(3)]
    optimizer = FUSED[request.param](parameters)
    for _ in range(2):
        grad(parameters)
        optimizer.step()
    return parameters, optimizer


@pytest.mark.parametrize("protected", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nothing_is_left_of_a_refused_step(value, protected, pair):
    parameters, optimizer = pair
    before = state(parameters, optimizer)
    grad(parameters, value)
    with veto.predicated(optimizer, ONE if protected else ZERO):
        optimizer.step()
    assert (state(parameters, optimizer) == before) == protected


def test_a_step_that_is_not_refused_is_the_step(pair):
    parameters, optimizer = pair
    twins = [nn.Parameter(p.detach().clone()) for p in parameters]
    twin = type(optimizer)(twins, **{k: v for k, v in optimizer.defaults.items() if k != "decoupled_weight_decay"})
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    grad(parameters)
    for ours, theirs in zip(parameters, twins, strict=True):
        theirs.grad = ours.grad.clone()
    twin.step()
    with veto.predicated(optimizer, ZERO):
        optimizer.step()
    assert state(parameters, optimizer) == state(twins, twin)


@pytest.mark.parametrize("theirs", [0.0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("ours", [0.0, 1.0, None])
def test_their_flag_and_ours_are_one_flag_of_0_or_1(ours, theirs, pair):
    """`GradScaler` adds up what several devices have found, and the kernels of torch test for 1."""
    parameters, optimizer = pair
    given = optimizer.found_inf = torch.tensor(theirs)
    before = state(parameters, optimizer)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(float(optimizer.found_inf)))
    grad(parameters)
    with veto.predicated(optimizer, None if ours is None else torch.tensor(ours)):
        optimizer.step()
    refused = bool(theirs or ours)
    assert (state(parameters, optimizer) == before) == refused
    assert seen == [float(refused)]
    assert optimizer.found_inf is given  # put back, the very object
    assert float(given) == theirs


def test_without_merging_two_flags_would_be_none(pair):
    """Red twin: what torch makes of 2."""
    parameters, optimizer = pair
    optimizer.found_inf = torch.tensor(2.0)
    grad(parameters, float("nan"))
    optimizer.step()
    assert not any(p.isfinite().all() for p in parameters)


@pytest.mark.parametrize("theirs", [None, 0, "missing"])
@pytest.mark.parametrize("raises", [False, True])
def test_the_optimizer_is_left_as_it_was(raises, theirs, pair):
    parameters, optimizer = pair
    if theirs != "missing":
        optimizer.found_inf = theirs
    before = dict(vars(optimizer))

    def fail(*_):
        raise RuntimeError("in the middle of a step")

    grad(parameters)
    if raises:
        with pytest.raises(RuntimeError, match="in the middle"), veto.predicated(optimizer, ONE):
            optimizer.step(fail)
    else:
        with veto.predicated(optimizer, ONE):
            optimizer.step()
    assert vars(optimizer) == before
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


class Own(torch.optim.AdamW):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize(
    ("make", "means"),
    [
        *((make, veto.Means.PREDICATE) for make in FUSED.values()),
        (lambda p: torch.optim.AdamW(p), veto.Means.BLANK),
        (lambda p: torch.optim.AdamW(p, foreach=True), veto.Means.BLANK),
        (lambda p: torch.optim.AdamW([{"params": p, "fused": False}], fused=True), veto.Means.BLANK),
        (lambda p: Own(p, fused=True), veto.Means.BLANK),  # nobody knows what it does besides
        (lambda p: torch.optim.RMSprop(p), veto.Means.BLANK),
    ],
)
def test_the_means_for_an_optimizer(make, means):
    optimizer, choice = make([nn.Parameter(torch.zeros(2))]), veto.Choice()
    assert choice.of(optimizer, torch.device("cpu")) is means
    # the host would have to wait for a decision that falls on another kind of device
    assert choice.of(optimizer, torch.device("cuda", 0)) is veto.Means.NONE
    assert choice.are_exact([optimizer]) == (means is veto.Means.PREDICATE)


def test_optimizers_on_different_kinds_of_devices_cannot_be_refused_together():
    make = FUSED["adamw"]
    here, there = make([nn.Parameter(torch.zeros(2))]), torch.optim.AdamW([nn.Parameter(torch.zeros(2, device="meta"))])
    there.param_groups[0]["fused"] = there._step_supports_amp_scaling = True
    choice = veto.Choice()
    assert choice.are_exact([here])
    assert choice.are_exact([there])
    assert not choice.are_exact([here, there])


def test_a_group_that_is_added_is_looked_at():
    optimizer, choice = FUSED["adamw"]([nn.Parameter(torch.zeros(2))]), veto.Choice()
    assert choice.is_exact(optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "fused": False})
    assert not choice.is_exact(optimizer)


def test_a_scheduler_that_wraps_a_step_changes_nothing():
    optimizer = FUSED["adamw"]([nn.Parameter(torch.zeros(2))])
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert veto.can_be_predicated(optimizer)


# ------------------------------------------------------------ zero gradients

KINDS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]


@pytest.mark.parametrize("flag", [ZERO, ONE])
def test_gradients_are_blank_or_untouched_to_the_bit(flag):
    parameters = []
    for dtype in KINDS:
        parameter = nn.Parameter(torch.zeros(5, 3, dtype=dtype))
        parameter.grad = torch.randn(3, 5, dtype=dtype).t()
        parameter.grad[0, 1] = float("nan")
        parameter.grad[1, 1] = -0.0
        parameter.grad[2, 1] = float("-inf")
        parameters.append(parameter)
    parameters.append(nn.Parameter(torch.zeros(2)))  # without a gradient
    parameters[0].grad.view(torch.int32)[4, 0] = 0x7FABCDEF  # a NaN that carries something
    optimizer = torch.optim.SGD(parameters)
    before = [p.grad.clone() for p in parameters[:-1]]
    places = [p.grad.data_ptr() for p in parameters[:-1]]
    veto.blank(optimizer, flag)
    expected = [torch.zeros_like(grad) for grad in before] if flag else before
    assert bits([p.grad for p in parameters[:-1]]) == bits(expected)
    assert [p.grad.data_ptr() for p in parameters[:-1]] == places
    assert parameters[-1].grad is None


def test_gradients_that_share_their_elements():
    parameter = nn.Parameter(torch.zeros(4, 3))
    parameter.grad = torch.tensor(float("nan")).expand(4, 3)
    veto.blank(torch.optim.SGD([parameter]), ONE)
    assert bits(parameter.grad) == bits(torch.zeros(4, 3))


def test_sparse_gradients():
    parameter = nn.Parameter(torch.zeros(4, 3))
    parameter.grad = torch.sparse_coo_tensor([[0, 2]], torch.full((2, 3), float("inf")), (4, 3), check_invariants=True)
    veto.blank(torch.optim.SparseAdam([parameter]), ONE)
    assert bits(parameter.grad.to_dense()) == bits(torch.zeros(4, 3))


# ------------------------------------------------------------ the decision


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("values", "bad"), [([1.0, 0.0], 0.0), ([float("nan"), 1.0], 1.0), ([float("inf"), 1.0], 1.0), ([1e30, 1.0], None)]
)
def test_what_is_found_in_norms(values, bad, dtype):
    norms = [torch.tensor(values, dtype=dtype), torch.ones(3)]
    assert veto.found(observe.total_norm(norms)).dtype is torch.float32
    assert float(veto.found(observe.total_norm(norms))) == (0.0 if bad is None else bad)
    assert veto.found(observe.total_norm(norms)).shape == ()


def test_flags_are_brought_together():
    assert float(veto.any_of([ZERO, ONE])) == float(veto.any_of([ONE])) == 1.0
    assert float(veto.any_of([ZERO, ZERO])) == 0.0


# ------------------------------------------------------------ the first step of SGD


@pytest.mark.parametrize(("make", "some"), [(FUSED["momentum"], True), (FUSED["sgd"], False), (FUSED["adamw"], False)])
def test_momenta_that_a_refused_first_step_leaves_unwritten(make, some):
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    optimizer = make(parameters)
    assert veto.unwritten_momenta(optimizer) == []  # without gradients nothing happens
    for parameter in parameters[1:]:
        parameter.grad = torch.ones(2)
    found = veto.unwritten_momenta(optimizer)
    assert [id(p) for p in found] == ([id(p) for p in parameters[1:]] if some else [])
    with veto.predicated(optimizer, ONE):
        optimizer.step()
    veto.forget_momenta(optimizer, found)
    assert not some or not optimizer.state
    optimizer.step()
    assert veto.unwritten_momenta(optimizer) == []


def test_sgd_that_is_not_fused_leaves_nothing_unwritten():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    assert veto.unwritten_momenta(torch.optim.SGD([parameter], momentum=0.9)) == []


def test_a_gradient_that_comes_later_has_a_first_step_of_its_own():
    """A layer that is unfrozen: the momenta of the others have long been written."""
    first, later = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = FUSED["our momentum"]([first, later])
    first.grad = torch.ones(2)
    optimizer.step()
    later.grad = torch.ones(2)
    found = veto.unwritten_momenta(optimizer)
    assert [id(parameter) for parameter in found] == [id(later)]
    with veto.predicated(optimizer, ONE):
        optimizer.step()
    veto.forget_momenta(optimizer, found)
    assert later not in optimizer.state
    optimizer.step()
    assert bits(optimizer.state[later]["momentum_buffer"]) == bits(torch.ones(2))
