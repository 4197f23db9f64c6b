"""What the kernels are told: tables of addresses, places, bits; carried out on the CPU by an interpreter."""

import pytest
import torch
from torch import nn

from tolaria.errors import NoSnapshot
from tolaria.optim import SGD, AdamW, batch, launch, source
from tolaria.optim.past import Past

KINDS = {
    "adamw": (AdamW, {}, 2),
    "amsgrad": (AdamW, {"amsgrad": True}, 3),
    "maximize": (AdamW, {"maximize": True}, 2),
    "capturable": (AdamW, {"capturable": True}, 2),
    "rate": (AdamW, {"lr": torch.tensor(0.5)}, 2),
    "sgd": (SGD, {}, 0),
    "momentum": (SGD, {"momentum": 0.5}, 1),
    "maximized momentum": (SGD, {"momentum": 0.5, "maximize": True}, 1),
}
NAMES = {0: [], 1: ["momentum_buffer"], 2: ["exp_avg", "exp_avg_sq"], 3: ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def whole():
    """Parameters of whole numbers, of several chunks of eight elements, less than one, and none."""

    def make():
        return [nn.Parameter(torch.arange(float(n)).view(shape)) for n, shape in ((35, (7, 5)), (3, (3,)), (0, (0,)))]

    return make


def feed(number, parameters, value=None):
    for i, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, float(2 * number + i + 1) if value is None else value)


class Reference:
    """The interpreter's step over whole tensors, with no table in between."""

    def __init__(self, parameters, num_moments, interpreter, negative):
        self.parameters = [p.detach().clone() for p in parameters]
        self.moments = [[torch.zeros_like(p) for _ in range(num_moments)] for p in self.parameters]
        self.interpreter, self.negative = interpreter, negative

    def step(self, gradients):
        for i, (p, g) in enumerate(zip(self.parameters, gradients, strict=True)):
            self.moments[i] = self.interpreter.moments(self.moments[i], g, negative=self.negative)
            p -= (self.moments[i][-1] if self.moments[i] else g) * 0.5

    def expected(self):
        return [*self.parameters, *(moment for moments in self.moments for moment in moments)]


def held(optimizer, num_moments):
    own = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    moments = [
        optimizer.state[p][name] for p in own and optimizer.param_groups[0]["params"] for name in NAMES[num_moments]
    ]
    return [tensor.clone() for tensor in (*own, *moments)]


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def build(kind, parameters, **own):
    make, settings, num_moments = kind
    return make(parameters, **{"lr": 0.5, **settings}, **own), num_moments


def interpreter_of(interpreted, num_moments):
    return next(one for name, one in interpreted.items() if name.endswith(str(num_moments)))


@pytest.mark.parametrize("alternate", [True, False])
def test_every_element_is_stepped_once(kind, alternate, whole, interpreted, monkeypatch):
    monkeypatch.setattr(AdamW, "_check_capture", lambda _: None)  # torch has capturable on accelerators only
    mine = whole()
    ours, num_moments = build(kind, mine, alternate=alternate)
    feed(0, mine)
    ours.step()
    interpreter = interpreter_of(interpreted, num_moments)
    reference = Reference(whole(), num_moments, interpreter, bool(kind[1].get("maximize")))
    for number in range(5):
        if number:
            feed(number, mine)
            ours.step()
        reference.step([p.grad for p in mine])
        assert same(held(ours, num_moments), reference.expected())
        assert ours.kept().compiled
    assert interpreter.launches == 5
    assert all(float(s["step"]) == 5 for s in ours.state.values() if "step" in s)


@pytest.mark.parametrize("alternate", [True, False])
@pytest.mark.parametrize("history", [1, 3])
def test_back_as_far_as_the_history_goes(kind, history, alternate, whole, interpreted, frozen):
    mine = whole()
    ours, _ = build(kind, mine, alternate=alternate, history=history)
    states = []
    for number in range(5):
        states.append(frozen(ours))
        feed(number, mine)
        ours.step()
    last = frozen(ours)
    for _ in range(2):
        for back in range(1, history + 1):
            ours.undo()
            assert frozen(ours) == states[5 - back]
        with pytest.raises(NoSnapshot):
            ours.undo()
        for number in range(5 - history, 5):
            feed(number, mine)
            ours.step()
        assert frozen(ours) == last


def test_all_the_way_back_to_before_the_first_step(kind, whole, interpreted, frozen):
    mine = whole()
    ours, _ = build(kind, mine, history=3)
    states = []
    for number in range(3):
        states.append(frozen(ours))
        feed(number, mine)
        ours.step()
    for state in reversed(states):
        ours.undo()
        assert frozen(ours) == state
    assert not ours.state_dict()["state"]


def test_without_another_set_there_is_no_way_back(whole, interpreted, frozen, monkeypatch):
    monkeypatch.setattr(Past, "target", lambda self, batch, stays: batch.live)
    mine = whole()
    ours = AdamW(mine, lr=0.5)
    for number in range(2):
        before = frozen(ours)
        feed(number, mine)
        ours.step()
    ours.undo()
    assert frozen(ours) != before


def test_a_refused_step(kind, whole, interpreted, frozen):
    mine = whole()
    ours, _ = build(kind, mine)
    for number in range(4):
        feed(number, mine, value=float("nan") if number == 2 else None)
        ours.found_inf = torch.tensor(float(number == 2))
        before = frozen(ours)
        ours.step()
        assert (frozen(ours) == before) == (number == 2)
    ours.undo()
    assert frozen(ours) == before


def test_gradients_are_divided_and_handed_back(kind, whole, interpreted):
    mine, others = whole(), whole()
    ours, num_moments = build(kind, mine)
    theirs, _ = build(kind, others)
    for number in range(3):
        feed(number, mine)
        feed(number, others)
        for parameter in mine:
            parameter.grad.mul_(8)
        versions = [p.grad._version for p in mine]
        ours.grad_scale = torch.tensor(8.0)
        ours.step()
        theirs.step()
        assert same(held(ours, num_moments), held(theirs, num_moments))
        assert same([p.grad for p in mine], [p.grad for p in others])
        assert all(p.grad._version > version for p, version in zip(mine, versions, strict=True))


def test_a_graph_from_before_the_step_is_stale(whole, interpreted):
    mine = whole()
    ours = AdamW(mine, lr=0.5)
    feed(0, mine)
    for change in (ours.step, ours.undo):
        loss = mine[0].square().sum()
        change()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# ---------------------------------------------------------------- tables are laid again when something has moved


def test_tables_are_laid_once(kind, whole, interpreted, monkeypatch):
    mine = whole()
    ours, _ = build(kind, mine)
    for number in range(3):
        feed(number, mine)
        ours.step()
    monkeypatch.setattr(launch.Table, "__init__", None)
    for number in range(3):
        for parameter in mine:
            parameter.grad.fill_(number)
        ours.step()
        ours.undo()
        ours.step()


@pytest.mark.parametrize("protected", [True, False])
def test_memory_that_has_moved(protected, kind, whole, interpreted, monkeypatch):
    """A red twin: a table that is believed sends the step to where the parameters were."""
    if not protected:
        monkeypatch.setattr(launch.Table, "fits", lambda _: True)
    mine = whole()
    ours, num_moments = build(kind, mine)
    for number in range(2):
        feed(number, mine)
        ours.step()
    keep = [mine[0].detach()]  # what is not told apart from it is written where it was, and has to be there
    mine[0].data = mine[0].detach().clone()
    for name in NAMES[num_moments][:1]:
        moment = ours.state[mine[0]][name]
        keep.append(moment.detach())
        moment.data = moment.clone()
    reference = Reference(mine, num_moments, interpreter_of(interpreted, num_moments), bool(kind[1].get("maximize")))
    reference.moments = [[ours.state[p][name].clone() for name in NAMES[num_moments]] for p in mine]
    feed(2, mine)
    ours.step()
    reference.step([p.grad for p in mine])
    assert same(held(ours, num_moments), reference.expected()) == protected


def test_gradients_that_lie_elsewhere_each_time(kind, whole, interpreted):
    mine = whole()
    ours, num_moments = build(kind, mine)
    keep = []
    feed(0, mine)
    ours.step()
    reference = Reference(whole(), num_moments, interpreter_of(interpreted, num_moments), bool(kind[1].get("maximize")))
    reference.step([p.grad for p in mine])
    for number in (1, 2, 3):
        keep.append([p.grad for p in mine])  # so that the allocator cannot give the same memory again
        feed(number, mine)
        ours.step()
        reference.step([p.grad for p in mine])
        assert same(held(ours, num_moments), reference.expected())


def test_what_the_kernels_do_not_know_is_left_to_torch(interpreted):
    transposed = nn.Parameter(torch.randn(4, 3).t())
    cases = {
        "double": ([nn.Parameter(torch.randn(3, dtype=torch.float64))], {}),
        "not dense": ([nn.Parameter(torch.randn(6, 4)[:, :2])], {}),
        "not fused": ([nn.Parameter(torch.randn(3))], {"fused": False}),
        "foreach": ([nn.Parameter(torch.randn(3))], {"foreach": True}),
        "one of two": ([nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3, dtype=torch.float64))], {}),
    }
    for name, (parameters, settings) in cases.items():
        ours = AdamW(parameters, **settings)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        ours.step()
        assert not ours.kept().compiled, name
    # strides of any dense kind are known, those of the gradient must be the same
    ours = AdamW([transposed])
    for grad, compiled in ((torch.ones_like(transposed), True), (torch.ones(3, 4), False)):
        transposed.grad = grad
        ours.step()
        assert ours.kept().compiled == compiled
    assert not ours.kept().compiled


def test_several_groups_and_batches(whole, interpreted, frozen):
    mine = whole()
    ours = AdamW([{"params": mine[:1]}, {"params": mine[1:], "lr": 0.25}], lr=0.5, history=2)
    states = []
    for number in range(4):
        states.append(frozen(ours))
        feed(number, mine)
        if number == 2:
            mine[0].grad = None
        ours.step()
    assert interpreted["tolaria_adamw 2"].launches == 7  # a group without gradients is left alone
    ours.undo()
    assert frozen(ours) == states[3]
    ours.undo()
    assert frozen(ours) == states[2]


def test_memory_of_parameters_that_are_gone_is_let_go(whole, interpreted):
    mine = whole()
    ours = SGD(mine, momentum=0.5)
    feed(0, mine)
    ours.step()
    bytes_of_all = ours.kept().num_bytes
    del ours.param_groups[0]["params"][0]
    ours.step()
    assert ours.kept().num_bytes == bytes_of_all - 2 * 4 * mine[0].numel()


def test_the_source_has_a_kernel_for_each(kind):
    make, _, num_moments = kind
    for dtype in source.DTYPES:
        text = source.text(make._KERNEL, dtype, torch.float32, num_moments)
        assert f"\n{make._KERNEL}(" in text
        assert f"#define MOMENTS {num_moments}\n" in text
    assert source.FIXED_COLUMNS == 4
    assert batch.DTYPES is source.DTYPES


def test_without_a_compiler_torch_makes_the_step(whole, interpreted, monkeypatch, caplog):
    def fails(*_):
        raise OSError("no compiler here")

    monkeypatch.undo()  # the interpreter
    monkeypatch.setattr("tolaria.optim.batch.KERNEL_DEVICES", {"cpu"})
    monkeypatch.setattr(torch.cuda, "_compile_kernel", fails)
    source._compile.cache_clear()
    mine, others = whole(), whole()
    ours, theirs = AdamW(mine, lr=0.5), torch.optim.AdamW(others, lr=0.5)
    with caplog.at_level("INFO", "tolaria"):
        for number in range(3):
            feed(number, mine)
            feed(number, others)
            ours.step()
            theirs.step()
    source._compile.cache_clear()
    assert not ours.kept().compiled
    assert caplog.text.count("optimizer steps use plain torch operators: OSError: no compiler here") == 2
    assert all(torch.equal(p, q) for p, q in zip(mine, others, strict=True))


@pytest.mark.parametrize("history", [1, 2, 3])
@pytest.mark.parametrize("at", [2, 3, 4, 5])
def test_moments_that_stop_alternating(at, history, interpreted, parameters, feed, frozen):
    """The sets are used in another order from then on: what steps of before have left there is not taken back."""
    held, states = parameters(), []
    optimizer = AdamW(held, lr=1.0, fused=True, history=history)
    for number in range(at + 2):
        optimizer.param_groups[0]["capturable"] = number >= at
        states.append(frozen(optimizer))
        feed(number, held)
        optimizer.step()
    assert (optimizer.kept().compiled, optimizer.kept().steps) == (True, min(2, history))
    while optimizer.kept().steps:
        optimizer.undo()
        assert frozen(optimizer) == states.pop()
