"""What of Lightning's loops has no public name: the fetcher, the progress counters, the logged values.

All private access of the adapter is in this file, so that a new version of Lightning is checked here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torchmetrics import Metric

from tolaria.errors import UnsupportedState
from tolaria.follow import FollowingGovernor

LOGGED = "tolaria/rollbacks"
"""Under which name we log. In no snapshot: it never goes back, and executions of the same steps may differ in it."""

_METRIC_FIELDS = ("_update_count", "_computed", "_forward_cache", "has_reset")
_CONNECTOR_FIELDS = ("_progress_bar_metrics", "_logged_metrics", "_callback_metrics")


class GovernedFetcher:
    """Stands in for the fetcher of the fit loop: its batches come through `watch`, so that some may come again.

    Args:
        fetcher: Lightning's own. Iterators that it holds already are taken over.
        governor: Whose batches they are.
        progress: Corrected when a rollback takes place while a batch is asked for.
    """

    def __init__(self, fetcher: Any, governor: FollowingGovernor, progress: Progress) -> None:
        if hasattr(fetcher, "iterator_wrapper"):
            raise UnsupportedState(
                "attaching to Lightning",
                "training_step takes `dataloader_iter`, so the batches are fetched inside of it",
                "Take `batch` instead.",
            )
        self.__dict__["_fetcher"] = fetcher
        self.__dict__["_governor"], self.__dict__["_progress"] = governor, progress
        self._start()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_fetcher"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_fetcher"], name, value)  # the loop writes `fetched` and the profiler's functions

    @property
    def done(self) -> bool:
        """Whether the batch handed out last was the last one of the epoch."""
        return self._fetcher.done and not self._governor.num_again

    def _start(self) -> None:
        self.__dict__["_deliveries"] = self._governor.watch(self._fetch())
        self.__dict__["_is_fresh"] = True

    def _fetch(self) -> Iterator[Any]:
        while True:
            try:
                batch = next(self._fetcher)
            except StopIteration:
                return
            self.__dict__["_has_fetched"] = True
            yield batch

    def __iter__(self) -> GovernedFetcher:
        self._deliveries.close()
        iter(self._fetcher)  # draws the seed of the epoch's shuffle
        self._start()
        return self

    def __next__(self) -> Any:
        governor = self._governor
        if self._is_fresh:
            # schedulers and hooks of the former epoch, validation and shuffle lie behind: nothing can undo them
            self.__dict__["_is_fresh"] = False
            self._progress.fence(governor)
        before, waiting, self.__dict__["_has_fetched"] = governor.rewinds, governor.num_again, False
        batch = next(self._deliveries)
        if governor.rewinds != before:
            # this one is the first that comes again, unless nothing was left to do so
            self._progress.take_back(governor.num_again + (not self._has_fetched) - waiting)
        return batch

    def teardown(self) -> None:
        """Let go of the iterator."""
        self._deliveries.close()
        self._fetcher.teardown()


class Progress:
    """The counters of the fit loop, and the values that it has logged so far in this epoch.

    Args:
        trainer: Lightning's.
        module: Whose metrics (torchmetrics) roll back as well.
    """

    def __init__(self, trainer: Any, module: nn.Module) -> None:
        self._trainer, self._module = trainer, module
        self._shortened = 0
        self._unclipped: Any = None  # what `gradient_clip_val` was, while it is set aside
        self.schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]

    @property
    def _loop(self) -> Any:
        return self._trainer.fit_loop.epoch_loop

    @property
    def learns_nothing(self) -> bool:
        """Whether this pass only gathers statistics (`StochasticWeightAveraging`): each batch is a step by itself."""
        return bool(self._loop.automatic_optimization._skip_backward)

    @property
    def _window(self) -> int:
        return 1 if self.learns_nothing else self._trainer.accumulate_grad_batches

    def must_be_judged(self) -> bool:
        """Whether the step just made is the last one of its epoch, or a validation or a checkpoint follows it."""
        loop, trainer = self._loop, self._trainer
        if loop.batch_progress.is_last_batch or loop._is_training_done or trainer.should_stop:
            return True
        every = [getattr(callback, "_every_n_train_steps", 0) for callback in trainer.checkpoint_callbacks]
        saves = any(number and trainer.global_step % number == 0 for number in every)
        return saves or loop._should_check_val_fx(trainer.fit_loop._data_fetcher)

    def govern_data(self, governor: FollowingGovernor) -> None:
        """Put `GovernedFetcher` in the place of the fetcher, if it is not there. Lightning may make a new one."""
        loop = self._trainer.fit_loop
        if not isinstance(loop._data_fetcher, GovernedFetcher):
            loop._data_fetcher = GovernedFetcher(loop._data_fetcher, governor, self)

    def release(self) -> None:
        """Give Lightning its own fetcher, methods and settings back."""
        self.clip_again()
        self.begin_epoch()
        vars(self._loop).pop("update_lr_schedulers", None)
        loop = self._trainer.fit_loop
        if isinstance(loop._data_fetcher, GovernedFetcher):
            loop._data_fetcher._deliveries.close()
            loop._data_fetcher = loop._data_fetcher._fetcher

    # ------------------------------------------------------------ what a snapshot holds

    def read(self) -> dict[str, Any]:
        """Plain values and tensors; the governor makes its own copy."""
        loop, connector = self._loop, self._trainer._logger_connector
        return {
            "optimizers": loop.automatic_optimization.optim_progress.state_dict(),
            "manual": loop.manual_optimization.optim_step_progress.state_dict(),
            "schedulers": loop.scheduler_progress.state_dict(),
            "logger_step": loop._batches_that_stepped,
            "results": {key: _read_metric(metric) for key, metric in loop._results.items() if not _is_ours(key)},
            "metrics": {name: _read_metric(metric) for name, metric in self._metrics()},
            "connector": {name: _split(getattr(connector, name))[1] for name in _CONNECTOR_FIELDS},
            "exchanged": [scheduler.state_dict() for scheduler in self._exchanged()],
            "stopping": [callback.state_dict() for callback in self._trainer.early_stopping_callbacks],
        }

    def write(self, saved: dict[str, Any]) -> None:
        """The inverse of `read`. What was logged under a new name since then is forgotten."""
        loop, connector = self._loop, self._trainer._logger_connector
        loop.automatic_optimization.optim_progress.load_state_dict(saved["optimizers"])
        loop.manual_optimization.optim_step_progress.load_state_dict(saved["manual"])
        loop.scheduler_progress.load_state_dict(saved["schedulers"])
        loop._batches_that_stepped = saved["logger_step"]
        for key in [key for key in loop._results if key not in saved["results"] and not _is_ours(key)]:
            del loop._results[key]
        for key, metric in loop._results.items():
            _write_metric(metric, saved["results"].get(key, {}))
        for name, metric in self._metrics():
            _write_metric(metric, saved["metrics"].get(name, {}))
        for name, values in saved["connector"].items():
            setattr(connector, name, values | _split(getattr(connector, name))[0])
        for scheduler, kept in zip(self._exchanged(), saved["exchanged"], strict=False):
            scheduler.load_state_dict(kept)
        # a replay that passes a validation once more would else count it as one more without an improvement
        for callback, kept in zip(self._trainer.early_stopping_callbacks, saved["stopping"], strict=False):
            callback.load_state_dict(kept)

    def _exchanged(self) -> list[Any]:
        """Schedulers that have come since the fit began: `StochasticWeightAveraging` puts in its own."""
        known = set(map(id, self.schedulers))
        now = (config.scheduler for config in self._trainer.lr_scheduler_configs)
        return [scheduler for scheduler in now if id(scheduler) not in known]

    def _metrics(self) -> Iterator[tuple[str, Any]]:
        return ((name, module) for name, module in self._module.named_modules() if isinstance(module, Metric))

    # ------------------------------------------------------------ after a rollback

    def take_back(self, counted: int) -> None:
        """Correct the counters of batches after a rollback, so that the epoch ends with the last batch to come.

        Args:
            counted: Batches that come again and are counted already: not those that were still to come again when a
                replay was broken off by the rollback. Those that are dropped stay counted.
        """
        loop = self._loop
        progress = loop.batch_progress
        progress.is_last_batch = loop.trainer.fit_loop._data_fetcher.done
        if not counted:
            return
        left = progress.current.ready - counted
        # a replay begins with an accumulation window: only a dropped short window, at an epoch's end, disturbs that
        short = left % self._window
        for counter in (progress.total, progress.current):
            for name in ("ready", "started", "processed", "completed"):
                setattr(counter, name, getattr(counter, name) - counted - short)
        self._shorten_epoch(short)

    def after_batch(self, counted: int) -> None:
        """The rest of a rollback inside `on_train_batch_end`: Lightning will still end the undone batch."""
        loop = self._loop
        loop._batches_that_stepped -= not loop._should_accumulate()  # will be counted up once more
        if counted:
            loop._skip_next_val = True  # of an earlier batch, and it has run
        elif loop.batch_progress.is_last_batch:
            loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)  # undone, and no batch will repeat it
        self._pass_over_plateaus()

    def _pass_over_plateaus(self) -> None:
        """Lightning's next call steps schedules that follow a metric, for the batch that was undone: not that one."""
        loop = self._loop

        def update_lr_schedulers(interval: str, update_plateau_schedulers: bool) -> None:
            del loop.update_lr_schedulers

        loop.update_lr_schedulers = update_lr_schedulers

    # ------------------------------------------------------------ gradients that were taken away

    def leave_unclipped(self, optimizer: Optimizer) -> None:
        """Set clipping aside until `clip_again` where no gradient is left: by value, torch fails on none at all."""
        trainer = self._trainer
        gradients = (parameter.grad for group in optimizer.param_groups for parameter in group["params"])
        if trainer.gradient_clip_val and all(gradient is None for gradient in gradients):
            self._unclipped, trainer.gradient_clip_val = trainer.gradient_clip_val, None

    def clip_again(self) -> None:
        """The step is over."""
        if self._unclipped is not None:
            self._trainer.gradient_clip_val, self._unclipped = self._unclipped, None

    # ------------------------------------------------------------ epochs

    def fence(self, governor: FollowingGovernor) -> None:
        """`FollowingGovernor.fence`. Where it rolls back, what the end of the epoch has counted and logged stays."""
        if self._keeps(governor, governor.fence):
            self._loop.automatic_optimization.optim_progress.reset_on_run()  # as at the start of every epoch
            governor.fence()

    def finish(self, governor: FollowingGovernor) -> None:
        """`FollowingGovernor.finish`, likewise."""
        self._keeps(governor, governor.finish)

    def _keeps(self, governor: FollowingGovernor, call: Callable[[], object]) -> bool:
        """Whether there was a rollback, after which all but the number of steps was put back."""
        kept, before = self.read(), governor.rewinds
        call()
        if governor.rewinds == before:
            return False
        now = self.read()
        self.write(kept | {name: now[name] for name in ("optimizers", "manual", "logger_step")})
        return True

    def _shorten_epoch(self, by: int) -> None:
        """Let the validation at the end of the epoch come although `by` batches are missing."""
        trainer = self._trainer
        if by and trainer.val_check_batch == trainer.fit_loop.max_batches:
            trainer.val_check_batch -= by
            self._shortened += by

    def begin_epoch(self) -> None:
        """An epoch of full length begins."""
        if self._shortened:
            self._trainer.val_check_batch += self._shortened
            self._shortened = 0


def averages(callbacks: list[Any]) -> Iterator[tuple[str, AveragedModel, Any]]:
    """The averaged weights that callbacks keep, each with a name and the callback that owns it."""
    for index, callback in enumerate(callbacks):
        for name, value in vars(callback).items():
            if isinstance(value, AveragedModel):
                yield f"{type(callback).__name__}[{index}].{name}", value, callback


def _is_ours(name: str) -> bool:
    return name.endswith(LOGGED)


def _split(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What we have logged, and the rest."""
    ours = {name: value for name, value in values.items() if _is_ours(name)}
    return ours, {name: value for name, value in values.items() if name not in ours}


def _read_metric(metric: Any) -> dict[str, Any]:
    fields = vars(metric)
    return {name: fields[name] for name in (*metric._defaults, *_METRIC_FIELDS) if name in fields}


def _write_metric(metric: Any, saved: dict[str, Any]) -> None:
    for name, value in saved.items():
        setattr(metric, name, value)
