"""TorchRL's own trainer under guard. Collected where torchrl is installed (`scripts/matrix torchrl`)."""

from __future__ import annotations

import copy
import hashlib
import re
import runpy
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tolaria import GovernorConfig, InvalidConfig, UnsupportedState, UsageError
from tolaria.torchrl import TolariaHook, optimizers, samplers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TorchRL warns of itself while it is imported
    from tensordict.nn import TensorDictModule
    from torchrl.collectors import Collector
    from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
    from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
    from torchrl.envs import GymEnv
    from torchrl.modules import ProbabilisticActor, ValueOperator
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.value import GAE
    from torchrl.trainers import LRSchedulerHook, ReplayBufferTrainer, Trainer
    from torchrl.trainers.trainers import MixedPrecisionOptimizationStepper

pytestmark = pytest.mark.filterwarnings("ignore")

BATCH, EPOCHS, PART, BATCHES = 64, 2, 16, 5
STEPS = BATCH // PART * EPOCHS  # of the optimizer, in one batch


def build(faults: dict[int, str] | None = None) -> Trainer:
    """A small PPO on CartPole, put together as TorchRL's tutorial does; `faults` strike at steps of the optimizer."""
    torch.manual_seed(7)
    env = GymEnv("CartPole-v1", device="cpu", categorical_action_encoding=True)
    env.set_seed(7)
    body = TensorDictModule(
        nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2)), in_keys=["observation"], out_keys=["logits"]
    )
    actor = ProbabilisticActor(
        body, spec=env.action_spec, in_keys=["logits"], distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )  # fmt: skip
    critic = ValueOperator(nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)), in_keys=["observation"])
    loss = ClipPPOLoss(actor, critic)
    advantage = GAE(gamma=0.99, lmbda=0.95, value_network=critic)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    collector = Collector(env, actor, frames_per_batch=BATCH, total_frames=BATCH * BATCHES)
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(BATCH), sampler=SamplerWithoutReplacement(), batch_size=PART
    )
    trainer = Trainer(
        collector=collector, total_frames=BATCH * BATCHES, frame_skip=1, loss_module=loss, optimizer=optimizer,
        optim_steps_per_batch=BATCH // PART, num_epochs=EPOCHS, progress_bar=False, save_trainer_interval=10**9,
        log_interval=1,
    )  # fmt: skip
    experience = ReplayBufferTrainer(buffer, batch_size=PART, flatten_tensordicts=True)

    def prepared(batch: Any) -> Any:
        with torch.no_grad():
            experience.extend(advantage(batch))
        return batch

    trainer.register_op("pre_epoch", prepared)
    trainer.register_op("process_optim_batch", experience.sample)
    strike(optimizer, faults or {})
    return trainer


def strike(optimizer: torch.optim.Optimizer, faults: dict[int, str]) -> None:
    """Damage at steps counted over the whole run, from 0; a step that is made again counts anew."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    made = iter(range(10**9))
    now = [-1]

    def before(*_: Any) -> None:
        now[0] = next(made)
        if faults.get(now[0]) == "nan_gradient":
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.fill_(float("nan"))

    def after(*_: Any) -> None:
        if faults.get(now[0]) == "blow_up":
            for parameter in parameters:
                parameter.data.mul_(-30.0).add_(3.0)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def digest(trainer: Trainer) -> str:
    """Weights, moments and the count of steps, read without the adapter."""
    named = {**dict(trainer.loss_module.named_parameters()), **dict(trainer.loss_module.named_buffers())}
    tensors = [tensor.detach() for _, tensor in sorted(named.items())]
    tensors += [value for entry in trainer.optimizer.state.values() for _, value in sorted(entry.items())]
    found = hashlib.sha256(str(trainer._optim_count).encode())
    for tensor in tensors:
        found.update(bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()))
    return found.hexdigest()


def learn(trainer: Trainer, hook: TolariaHook | None = None) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if hook is not None:
            hook.register(trainer)
        try:
            trainer.train()
        except (ValueError, RuntimeError) as error:
            return f"died: {type(error).__name__}"
    return digest(trainer)


@pytest.fixture(scope="module")
def clean() -> str:
    return learn(build())


def test_a_healthy_run_is_the_same_with_and_without(clean: str) -> None:
    hook = TolariaHook()
    assert learn(build(), hook) == clean
    assert (hook.rollbacks, hook.dropped) == (0, 0)


@pytest.mark.parametrize("kind", ["nan_gradient", "blow_up"])
@pytest.mark.parametrize("at", [STEPS - 1, 2 * STEPS + 3, BATCHES * STEPS - 1])
def test_a_fault_that_does_not_return_leaves_no_trace(kind: str, at: int, clean: str) -> None:
    hook = TolariaHook()
    assert learn(build({at: kind}), hook) == clean
    assert (hook.rollbacks, hook.dropped) == (1, 0)


def scheduled(interval: str, faults: dict[int, str] | None = None) -> Trainer:
    """With a schedule of the learning rate, and a stepper that counts its steps."""
    trainer = build(faults)
    optimizer, trainer.optimizer = trainer.optimizer, None
    trainer._optimizer_ops.clear()
    trainer.optimization_stepper = MixedPrecisionOptimizationStepper(optimizer)
    trainer.schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.7)
    LRSchedulerHook(trainer.schedule, interval=interval).register(trainer)
    return trainer


def course(trainer: Trainer, hook: TolariaHook | None = None) -> Any:
    """What is left at the end of weights, schedule and counts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if hook is not None:
            hook.register(trainer)
        trainer.train()
    named = sorted(trainer.loss_module.named_parameters())
    weights = [parameter.detach().reshape(-1).view(torch.uint8).tolist() for _, parameter in named]
    stepper = trainer.optimization_stepper
    return weights, trainer.schedule.state_dict(), stepper.optimizer_step_count


@pytest.mark.parametrize("interval", ["optim", "batch"])
@pytest.mark.parametrize("at", [2, 9])
def test_a_schedule_and_a_stepper_go_back_with_the_weights(interval: str, at: int) -> None:
    clean = course(scheduled(interval))
    hook = TolariaHook()
    assert course(scheduled(interval, {at: "blow_up"}), hook) == clean
    assert hook.rollbacks == 1
    assert course(scheduled(interval, {at: "blow_up"})) != clean


@pytest.mark.parametrize("kind", ["nan_gradient", "blow_up"])
def test_unguarded_it_does(kind: str, clean: str) -> None:
    assert learn(build({2 * STEPS + 3: kind})) != clean


def test_a_fault_that_returns_drops_the_batch() -> None:
    at = 2 * STEPS + 3
    hook, trainer = TolariaHook(), build({at: "nan_gradient", at + STEPS: "nan_gradient"})
    assert not learn(trainer, hook).startswith("died")
    assert (hook.rollbacks, hook.dropped) == (2, 1)
    assert trainer._optim_count == (BATCHES - 1) * STEPS
    assert all(bool(p.isfinite().all()) for p in trainer.loss_module.parameters())


def test_rollbacks_stand_in_the_trainers_own_log() -> None:
    hook, trainer = TolariaHook(), build({3: "nan_gradient"})
    learn(trainer, hook)
    assert trainer._log_dict["tolaria/rollbacks"] == [1] * BATCHES
    assert trainer._log_dict["tolaria/dropped"] == [0] * BATCHES


def test_an_attempt_that_was_undone_leaves_no_values_in_the_log() -> None:
    trainer = build({3: "nan_gradient"})
    trainer.register_op("post_optim_log", lambda _: {"count": trainer._optim_count})
    hook = TolariaHook()
    learn(trainer, hook)
    assert (hook.rollbacks, hook.dropped) == (1, 0)
    assert trainer._log_dict["count"] == list(range(1, BATCHES * STEPS + 1))


def test_afterwards_nothing_is_left_on_the_trainer() -> None:
    hook, trainer = TolariaHook(), build()
    learn(trainer, hook)
    assert "optim_steps" not in vars(trainer)
    assert copy.copy(trainer).optim_steps.__func__ is Trainer.optim_steps


def test_it_finds_the_optimizer_and_the_sampler() -> None:
    trainer = build()
    assert list(optimizers(trainer)) == [trainer.optimizer]
    assert [type(sampler) for sampler in samplers(trainer)] == [SamplerWithoutReplacement]


def test_what_cannot_be_governed_is_refused() -> None:
    hook = TolariaHook()
    with pytest.raises(UnsupportedState, match="ray"):
        hook.register(types.SimpleNamespace(learner_backend="ray"))
    with pytest.raises(UnsupportedState, match="no optimizer"):
        hook.register(types.SimpleNamespace())
    hook.register(build())
    with pytest.raises(UsageError, match="has a trainer already"):
        hook.register(build())
    with pytest.raises(InvalidConfig, match="fork"):
        TolariaHook(GovernorConfig(rng="fork"))


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[2] / "examples" / "torchrl_ppo.py"
    runpy.run_path(str(path), run_name="__main__")
    out = capsys.readouterr().out
    found = re.search(r"finite True, largest weight (\d+\.\d+), 2 rollbacks, 0 batches dropped", out)
    assert found is not None, out
    assert float(found[1]) < 5  # the noise is ten times a standard deviation
