"""Attaching changes nothing that a program can see of its model and optimizer; copies are ungoverned."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, UsageError

Govern = Callable[..., TolariaGovernor]


class Policy(nn.Module):
    """A model with an entry point besides `forward`, as in stable-baselines3."""

    scale: float = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 4)

    def forward(self, obs: torch.Tensor, deterministic: bool = False, *, scale: float | None = None) -> torch.Tensor:
        """Act."""
        return self.body(obs) * (self.scale if scale is None else scale) * (0.5 if deterministic else 1.0)

    def evaluate_actions(self, obs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.body(obs).sum(), {"values": self.body(obs)}


def sections_opened(governor: TolariaGovernor, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by one kind whenever somebody opens a section of that governor."""
    opened: list[str] = []
    driver = governor._keeper.driver
    original = driver.open_section

    def note(kind: Any, *args: Any) -> int:
        opened.append(kind.value)
        return original(kind, *args)

    monkeypatch.setattr(driver, "open_section", note)
    return opened


@pytest.fixture
def x() -> torch.Tensor:
    return torch.linspace(-1, 1, 24).reshape(4, 6)


# ------------------------------------------------------------ copies


def test_the_original_is_governed(govern: Govern, kit: Any, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The positive control of every test below that says "ungoverned"."""
    run = kit.Run()
    opened = sections_opened(govern(run.model, run.optimizer), monkeypatch)
    run.model(x)
    run.optimizer.step()
    assert opened == ["forward", "write"]


def copy_with_deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def copy_with_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(copy.copy(model))


def copy_with_pickle(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def copy_with_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copied: nn.Module = torch.load(file, weights_only=False)
    return copied


def copy_with_averaged_model(model: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(model)


COPIES = [copy_with_deepcopy, copy_with_copy, copy_with_pickle, copy_with_torch, copy_with_averaged_model]


@pytest.mark.parametrize("make", COPIES)
def test_a_copy_is_ungoverned_and_trains_on_its_own(
    make: Callable[[nn.Module], nn.Module], govern: Govern, kit: Any, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    copied = make(run.model)
    opened = sections_opened(governor, monkeypatch)
    before = run.state(with_rng=False)
    assert copied.training
    copied.eval()
    run.model.eval()
    torch.testing.assert_close(copied(x), run.model(x), rtol=0, atol=0)
    run.model.train()
    copied.train()
    opened.clear()

    optimizer = torch.optim.SGD(copied.parameters(), lr=0.1)
    first = copied(x).square().sum()
    first.backward()
    optimizer.step()

    assert opened == []
    assert run.state(with_rng=False) == before
    copied.eval()
    assert float(copied(x).square().sum().detach()) != float(first.detach())
    del copied.training  # still a module like any other: nothing of ours is needed to take it apart


@pytest.mark.parametrize("make", COPIES)
def test_a_copy_from_before_stays_as_it_was(
    make: Callable[[nn.Module], nn.Module], govern: Govern, kit: Any, x: torch.Tensor
) -> None:
    run = kit.Run()
    early = make(run.model)
    govern(run.model, run.optimizer)
    early.eval()
    run.model.eval()
    torch.testing.assert_close(early(x), run.model(x), rtol=0, atol=0)


@pytest.mark.parametrize("make", COPIES)
def test_a_copy_survives_the_close_of_the_governor(
    make: Callable[[nn.Module], nn.Module], govern: Govern, kit: Any, x: torch.Tensor
) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    copied = make(run.model).eval()
    governor.close()
    torch.testing.assert_close(copied(x), run.model.eval()(x), rtol=0, atol=0)


def test_a_copy_can_be_governed_too(govern: Govern, kit: Any, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    run = kit.Run()
    first = govern(run.model, run.optimizer)
    copied = copy.deepcopy(run.model)
    second = govern(copied)
    of_first, of_second = sections_opened(first, monkeypatch), sections_opened(second, monkeypatch)
    copied(x)
    assert (of_first, of_second) == ([], ["forward"])
    run.model(x)
    assert (of_first, of_second) == (["forward"], ["forward"])
    second.close()
    copied(x)
    assert (of_first, of_second) == (["forward"], ["forward"])


@pytest.mark.slow
def test_a_pickled_model_loads_in_a_process_without_tolaria(
    govern: Govern, kit: Any, x: torch.Tensor, tmp_path: Path, run_script: Callable[..., str]
) -> None:
    run = kit.Run()
    run.model.eval()
    expected = run.model(x)
    govern(run.model, run.optimizer)
    torch.save(run.model, tmp_path / "whole.pt")
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(run.model))
    torch.save((x, expected), tmp_path / "expected.pt")
    printed = run_script(
        """
        import pathlib, pickle, sys, torch
        here = pathlib.Path(sys.argv[1])
        x, expected = torch.load(here / "expected.pt")
        for model in (torch.load(here / "whole.pt", weights_only=False),
                      pickle.loads((here / "model.pickle").read_bytes())):
            assert torch.equal(model(x), expected)
            model.train()(x).sum().backward()
            assert model[0].weight.grad is not None
        print([name for name in sys.modules if name.startswith("tolaria")])
        """,
        str(tmp_path),
    )
    assert printed.strip() == "[]"


# ------------------------------------------------------------ what is visible


def test_state_dict_type_and_signature_stay(govern: Govern) -> None:
    model = Policy()
    optimizer = torch.optim.Adam(model.parameters())

    def seen() -> Any:
        return (
            type(model),
            list(model.state_dict()),
            repr(model),
            inspect.signature(model.forward),
            inspect.signature(model.evaluate_actions),
            model.forward.__name__,
            model.forward.__doc__,
            inspect.ismethod(model.forward) and model.forward.__self__ is model,
            type(optimizer),
            inspect.signature(optimizer.step),
            inspect.ismethod(optimizer.step) and optimizer.step.__self__ is optimizer,
            [name for name, _ in model.named_modules()],
            len(model._forward_hooks) + len(model._forward_pre_hooks) + len(model._backward_hooks),
            len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks),
            list(optimizer.state_dict()),
        )

    before = seen()
    govern(model, optimizer, sections=("evaluate_actions",))
    assert seen() == before
    assert list(inspect.signature(model.forward).parameters) == ["obs", "deterministic", "scale"]


def test_arguments_and_results_pass_through(govern: Govern, x: torch.Tensor) -> None:
    model = Policy()
    expected = model(x, True, scale=3.0)
    govern(model)
    torch.testing.assert_close(model(x, True, scale=3.0), expected, rtol=0, atol=0)
    torch.testing.assert_close(model(obs=x, deterministic=True, scale=3.0), expected, rtol=0, atol=0)
    with pytest.raises(TypeError, match="unexpected"):
        model(x, nonsense=1)


def test_named_methods_become_sections(govern: Govern, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Policy()
    governor = govern(model, sections=("evaluate_actions",))
    opened = sections_opened(governor, monkeypatch)
    loss, extra = model.evaluate_actions(x)
    assert opened == ["forward"]
    loss.backward()
    assert set(extra) == {"values"}


def test_a_method_that_does_not_exist_is_refused_and_nothing_is_attached(govern: Govern) -> None:
    model = Policy()
    before = dict(vars(model))
    with pytest.raises(UsageError, match="evaluate_action"):
        govern(model, sections=("evaluate_action",))
    assert vars(model) == before
    govern(model, sections=("evaluate_actions",))


def test_hooks_of_the_user_still_run_in_order(govern: Govern, kit: Any, x: torch.Tensor) -> None:
    run = kit.Run()
    calls: list[str] = []
    run.model.register_forward_pre_hook(lambda *_: calls.append("pre"))
    run.model.register_forward_hook(lambda *_: calls.append("post"))
    run.model.register_full_backward_hook(lambda *_: calls.append("backward"))
    run.optimizer.register_step_pre_hook(lambda *_: calls.append("step pre"))
    run.optimizer.register_step_post_hook(lambda *_: calls.append("step post"))
    govern(run.model, run.optimizer)
    run.model(x.clone().requires_grad_()).sum().backward()
    run.optimizer.step()
    assert calls == ["pre", "post", "backward", "step pre", "step post"]


def test_nested_modules(govern: Govern, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = nn.Sequential(nn.Linear(6, 4), nn.Tanh())
    outer = nn.ModuleDict({"inner": inner, "head": nn.Linear(4, 2)})
    governor = govern(inner)
    opened = sections_opened(governor, monkeypatch)
    outer["head"](outer["inner"](x)).sum().backward()
    assert opened == ["forward"]
    assert list(outer.state_dict()) == ["inner.0.weight", "inner.0.bias", "head.weight", "head.bias"]


def test_functional_call_and_function_transforms(govern: Govern, x: torch.Tensor) -> None:
    model = Policy()
    others = {name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()}

    def results() -> list[torch.Tensor]:
        def loss(params: dict[str, torch.Tensor], obs: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(model, params, (obs,)).square().sum()

        return [
            torch.func.functional_call(model, others, (x,)),
            *torch.func.grad(loss)(others, x).values(),
            torch.func.vmap(loss, in_dims=(None, 0))(others, x),
            *torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(others, x).values(),
            *torch.func.jacrev(loss)(others, x).values(),
        ]

    expected = results()
    govern(model)
    for found, wanted in zip(results(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_double_backward_and_autograd_grad(govern: Govern, kit: Any, x: torch.Tensor) -> None:
    def penalty(run: Any) -> Any:
        inputs = x.clone().requires_grad_()
        run.model.eval()
        (grad,) = torch.autograd.grad(run.model(inputs).sum(), inputs, create_graph=True)
        grad.square().sum().backward()
        return kit.freeze([grad, *[p.grad for p in run.model.parameters() if p.grad is not None]])

    expected = penalty(kit.Run())
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    assert penalty(run) == expected
    run.optimizer.step()
    assert governor.statistics().stale_vetoes == 0


def test_export_and_fx_see_the_model_itself(govern: Govern, x: torch.Tensor) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh())
    govern(model)
    exported = torch.export.export(model, (x,), strict=False)
    torch.testing.assert_close(exported.module()(x), model(x))
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x))


# ------------------------------------------------------------ optimizers and schedulers


@pytest.mark.parametrize("make", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copied_optimizer_is_ungoverned(
    make: Callable[[Any], Any], govern: Govern, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    run.step(governor, run.batches[0])
    copied = make(run.optimizer)
    assert kit.freeze(copied.state_dict()) == kit.freeze(run.optimizer.state_dict())
    opened = sections_opened(governor, monkeypatch)
    before = run.state()
    for parameter in copied.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    copied.step()
    assert opened == []
    assert run.state() == before


def test_a_model_and_its_optimizer_copied_together_belong_together(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler)
    run.step(governor, run.batches[0])
    twin = copy.deepcopy(run)
    before = run.state(with_rng=False)
    twin.plain_step(run.batches[1])
    assert run.state(with_rng=False) == before
    assert twin.state(with_rng=False) != before


SCHEDULES = {
    "StepLR": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
    "OneCycleLR": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20),
    "SequentialLR": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [torch.optim.lr_scheduler.ConstantLR(optimizer), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)],
        [3],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_schedulers_step_without_a_warning(name: str, when: str, govern: Govern, kit: Any) -> None:
    """PyTorch warns when `scheduler.step()` comes before `optimizer.step()`; it knows by a wrapper of its own."""

    def optimize(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1, momentum=0.9)

    plain = kit.Run(optimizer=optimize)
    plain.scheduler = SCHEDULES[name](plain.optimizer)
    for batch in plain.batches[:6]:
        plain.plain_step(batch)

    run = kit.Run(optimizer=optimize)
    if when == "before":
        run.scheduler = SCHEDULES[name](run.optimizer)
        governor = govern(run.model, run.optimizer, scheduler=run.scheduler)
        for batch in run.batches[:6]:
            run.step(governor, batch)
    else:
        governor = govern(run.model, run.optimizer)
        run.scheduler = SCHEDULES[name](run.optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for batch in run.batches[:6]:
                run.step(governor, batch)
                run.scheduler.step()
    assert run.state() == plain.state()


def test_a_scheduler_built_after_the_governor_leaves_steps_governed(
    govern: Govern, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    torch.optim.lr_scheduler.StepLR(run.optimizer, 2)
    opened = sections_opened(governor, monkeypatch)
    run.backward(run.batches[0])
    run.optimizer.step()
    assert opened == ["forward", "write"]


def test_numbers_of_a_governed_run_are_those_of_a_plain_one(govern: Govern, kit: Any) -> None:
    plain = kit.Run()
    losses = [plain.plain_step(batch) for batch in plain.batches]
    run = kit.Run()
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, config=GovernorConfig(cadence=3, probation=2))
    found = []
    for batch in governor.watch(run.batches):
        loss = run.backward(batch)
        found.append(float(loss.detach()))
        governor.step(loss=loss)
    assert found == losses
    assert run.state() == plain.state()
    assert governor.statistics().snapshots > 5
