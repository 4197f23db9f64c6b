"""`TolariaHook` for TorchRL's `Trainer`: one batch of experience, with all its optimizer steps, is one round."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tolaria.config import GovernorConfig
from tolaria.errors import InvalidConfig, UnsupportedState, UsageError
from tolaria.frameworks import require
from tolaria.governor import TolariaGovernor
from tolaria.judge import Detector
from tolaria.rounds import Rounds
from tolaria.surge import round_detector

require(("torchrl",), ("0.14",), "torchrl")


class TolariaHook:
    """Guards a `torchrl.trainers.Trainer`: ``TolariaHook().register(trainer)``, before ``trainer.train()``.

    Finds the loss module (actor, critic and target networks), the optimizers, the schedulers of `LRSchedulerHook`, the
    scaler of a stepper, the counts of optimizer steps and the sampler of the replay buffer by itself when the training
    begins. Each rollback is one warning of the logger
    ``tolaria``, and a number in the trainer's own log and progress bar.

    Args:
        config: Settings of the governor. Cadence and probation have no say: whole rounds are judged.
        detector: Judges the sign ``drift``; `tolaria.surge.round_detector()` unless given.
        snapshot_every: Batches between two snapshots; with 1 every fault can be mended without loss.

    Attributes:
        governor: The `TolariaGovernor` of this training, closed when that ends; None before the first.
        dropped: Batches that were not learnt from.

    Raises:
        InvalidConfig: ``rng="fork"``, which would make the second attempt at a round another one than the first.
    """

    def __init__(
        self,
        config: GovernorConfig | None = None,
        detector: Detector[Any] | None = None,
        *,
        snapshot_every: int = 1,
    ) -> None:
        self._config, self._detector, self._every = config or GovernorConfig(), detector, snapshot_every
        if self._config.rng == "fork":
            raise InvalidConfig(
                "building TolariaHook",
                "rng='fork', which would make the second attempt at a round another one than the first",
                "Leave it out, or use rng='keep'.",
            )
        self.governor: TolariaGovernor | None = None
        self.dropped = 0
        self._trainer: Any = None

    @property
    def rollbacks(self) -> int:
        """Rollbacks so far."""
        return 0 if self.governor is None else self.governor.rollbacks

    def register(self, trainer: Any, name: str = "tolaria") -> None:
        """Attach to a trainer: once, and after whatever else changes its loss module or its optimizers.

        Args:
            trainer: A `torchrl.trainers.Trainer` whose optimizer steps are made in this process.
            name: Kept for the likeness to other hooks; not used.

        Raises:
            UsageError: The hook is attached already.
            UnsupportedState: The trainer steps elsewhere, or has no optimizer that can be found.
        """
        doing = "attaching to TorchRL"
        if self._trainer is not None:
            raise UsageError(doing, "this hook has a trainer already", "Build one hook for each.")
        if getattr(trainer, "learner_backend", None) == "ray":
            raise UnsupportedState(
                doing, "its optimizer steps are made by other processes (learner_backend='ray')", "Train in this one."
            )
        if not list(optimizers(trainer)):
            raise UnsupportedState(
                doing,
                "no optimizer was found: neither the trainer's own nor one of an optimizer hook or stepper",
                "Register the optimizer first, or run your own loop under tolaria.rounds.Rounds.",
            )
        self._trainer = trainer
        trainer.register_op("setup", self._begin)
        trainer.register_op("shutdown", self.close)
        trainer.register_op("post_steps_log", self._log)

    def close(self) -> None:
        """Let go of the trainer and free all snapshots. `train` does it unless an error ends it. Idempotent."""
        if self._trainer is not None:
            vars(self._trainer).pop("optim_steps", None)
        if self.governor is not None:
            self.governor.close()

    # ------------------------------------------------------------ hooks of TorchRL

    def _begin(self) -> None:
        trainer, stepper = self._trainer, getattr(self._trainer, "optimization_stepper", None)
        self.close()  # an earlier training may have been ended by an error
        self.governor = governor = TolariaGovernor(
            weights(trainer.loss_module),
            list(optimizers(trainer)),
            scaler=getattr(stepper, "scaler", None),
            config=self._config,
            detector=self._detector or round_detector(),
        )
        governor.register("torchrl.optim_count", (lambda: trainer._optim_count, functools.partial(_count, trainer)))
        if stepper is not None:
            counts = functools.partial(_counts, stepper), functools.partial(_set_counts, stepper)
            governor.register("torchrl.stepper", counts)
        for number, schedule in enumerate(schedules(trainer)):
            governor.register(f"torchrl.schedule{number}", schedule)
        for number, sampler in enumerate(samplers(trainer)):
            governor.register(f"torchrl.sampler{number}", sampler)
        rounds, plain = Rounds(governor, snapshot_every=self._every), trainer.optim_steps

        def optim_steps(batch: Any) -> None:
            self._round(rounds, plain, batch)

        trainer.optim_steps = optim_steps

    def _round(self, rounds: Rounds, plain: Callable[[Any], object], batch: Any) -> None:
        history = self._trainer._log_dict
        logged = {key: len(values) for key, values in history.items()}

        def forget() -> None:
            for key, values in history.items():
                del values[logged.get(key, 0) :]  # of an attempt that was undone

        def learn() -> None:
            forget()
            plain(_copied(batch))

        if not rounds.run(learn).learnt:
            self.dropped += 1
            forget()

    def _log(self, batch: Any) -> dict[str, Any]:
        return {"tolaria/rollbacks": self.rollbacks, "tolaria/dropped": self.dropped, "log_pbar": True}


def weights(loss_module: Any) -> nn.Module:
    """A module of the same parameters and buffers, target networks included, by their names in a TorchRL loss module.

    That class keeps them in tensor dictionaries, and its own `named_parameters` is not the one of `torch.nn.Module`.
    """
    holder = nn.Module()
    for name, parameter in loss_module.named_parameters():
        holder.register_parameter(_flat(name), parameter)
    for name, buffer in loss_module.named_buffers():
        holder.register_buffer(_flat(name), buffer)
    return holder


def _flat(name: str) -> str:
    return name.replace(".", "/")


def _count(trainer: Any, count: int) -> None:
    trainer._optim_count = count


def _counts(stepper: Any) -> dict[str, int]:
    """Micro-batches and steps that a stepper has counted."""
    return {name: value for name, value in vars(stepper).items() if name.startswith("_") and type(value) is int}


def _set_counts(stepper: Any, counts: dict[str, int]) -> None:
    vars(stepper).update(counts)


def _copied(batch: Any) -> Any:
    """What a second attempt begins with: hooks write advantages and the like into the batch that they are handed."""
    return batch.clone() if hasattr(batch, "clone") else batch


def _operations(trainer: Any) -> Iterator[Any]:
    """Objects whose methods are registered as hooks."""
    for name, registered in vars(trainer).items():
        if name.endswith("_ops") and isinstance(registered, list):
            for operation, *_ in registered:
                plain = inspect.unwrap(operation)  # hooks are registered with a wrapper around them
                yield getattr(plain, "__self__", plain)


def optimizers(trainer: Any) -> Iterator[Optimizer]:
    """Every optimizer once: the trainer's own, and those of its stepper and of optimizer hooks."""
    seen: set[int] = set()
    owners = (trainer, getattr(trainer, "optimization_stepper", None), *_operations(trainer))
    for value in itertools.chain.from_iterable(vars(owner).values() for owner in owners if hasattr(owner, "__dict__")):
        if isinstance(value, Optimizer) and id(value) not in seen:
            seen.add(id(value))
            yield value


def schedules(trainer: Any) -> Iterator[Any]:
    """Hooks that step a schedule of the learning rate, each once."""
    seen: set[int] = set()
    for owner in _operations(trainer):
        if isinstance(getattr(owner, "scheduler", None), LRScheduler) and id(owner) not in seen:
            seen.add(id(owner))
            yield owner


def samplers(trainer: Any) -> Iterator[Any]:
    """Samplers of the replay buffers that hooks draw from: which transitions they have handed out in this pass."""
    seen: set[int] = set()
    for owner in (trainer, *_operations(trainer)):
        sampler = getattr(getattr(owner, "replay_buffer", None), "_sampler", None)
        if sampler is not None and id(sampler) not in seen:
            seen.add(id(sampler))
            yield sampler
