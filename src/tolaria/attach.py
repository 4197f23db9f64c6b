"""ATTACH: makes forwards and optimizer steps of the governed objects sections, and leaves no other trace on them.

Methods are replaced on the *instance* by a bound method of the same name. That choice is what keeps copies clean:
`copy.deepcopy` re-binds a bound method to the copy, which this code then recognises as not governed; pickle stores it
as "attribute `forward` of that object", which resolves to the class's own method wherever it is loaded. Module hooks or
a global registry would be copied along, or would slow every module of the process.

Under `torch.compile` the original is traced and nothing of the section: pass the compiled module to the governor, or
wrap the call in `using()`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import types
import weakref
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils import _pytree

from tolaria import capture, gradients
from tolaria.driver import Driver
from tolaria.errors import StaleGradients, UnsupportedState, UsageError
from tolaria.operations import SectionKind, Streams
from tolaria.report import logger
from tolaria.state import rng
from tolaria.state.train_state import TrainState

_REPLICATE = "_replicate_for_data_parallel"  # what nn.DataParallel asks each module for, at each forward


def current_backward() -> int:
    """Number of the autograd graph task that runs on this thread; -1 outside of a backward pass."""
    return torch._C._current_graph_task_id()


class Sections:
    """Opens sections around what the governed objects do, and keeps the epoch of every gradient.

    Args:
        driver: Runs the section protocol.
        state: Whose gradients are dropped by a veto.
        timeout_s: How long a section waits for a submission that holds the gate.
        strict: Raise on stale gradients instead of dropping them.
        at_boundary: Called before the calling thread opens its outermost section and after it has closed it, outside
            of a backward pass; with True when that section was a write, so that an optimizer has just stepped.
        on_stale: Called after stale gradients were dropped.

    Attributes:
        around_step: Entered around every optimizer step; for loops whose steps are made by somebody else.
    """

    def __init__(
        self,
        driver: Driver,
        state: TrainState,
        timeout_s: float,
        strict: bool,
        at_boundary: Callable[[bool], None],
        on_stale: Callable[[], None],
    ) -> None:
        self._driver, self._state = driver, state
        self._timeout_s, self._strict = timeout_s, strict
        self._at_boundary, self._on_stale = at_boundary, on_stale
        self._detach: list[Callable[[], None]] = []
        self._captured_steps: set[int] = set()  # threads that have stepped an optimizer inside their capture
        self.around_step: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
        self._num_foreign = 0
        self.is_open = True

    # ------------------------------------------------------------ sections

    @contextmanager
    def section(self, kind: SectionKind, named: Streams = ()) -> Generator[int]:
        """A section of the calling thread; yields its epoch. A write that raises marks the train state as torn.

        Args:
            kind: What it may write.
            named: With the `streams` barrier: streams that it launches on, besides the caller's current ones.
        """
        depth = self._driver.depth()
        outermost = depth == 0 and current_backward() == -1
        if outermost:
            self._at_boundary(False)
        opened = False
        try:
            epoch = self._driver.open_section(kind, current_backward() != -1, self._timeout_s, named)
            opened = True
            self._num_foreign += kind is SectionKind.FOREIGN
            yield epoch
        except BaseException:
            if opened and kind.writes:
                self._driver.change(lambda s: (gradients.mark_torn(s), None))
            raise
        finally:
            self._driver.close_section(depth)
        if outermost:
            self._at_boundary(kind.writes)

    @contextmanager
    def whole_step(self) -> Generator[None]:
        """A write section around a whole governed step. The optimizer's own section inside says whether it is torn."""
        depth = self._driver.depth()
        try:
            self._driver.open_section(SectionKind.WRITE, current_backward() != -1, self._timeout_s)
            yield
        finally:
            self._driver.close_section(depth)

    def run_forward(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward launch: readers see one epoch, and gradients that flow back through the result carry it."""
        with self.section(SectionKind.FORWARD) as epoch:
            result = call(*args, **kwargs)
            if torch.is_grad_enabled():
                self._follow(result, epoch)
            return result

    def refuse_replica(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`nn.DataParallel` around the governed module: its replicas would run the original's `forward`, unseen."""
        raise UnsupportedState(
            "replicating the governed module",
            "nn.DataParallel was put around it, or around a module that holds it; expected the governor outside",
            "Build the governor of the nn.DataParallel itself: TolariaGovernor(nn.DataParallel(model), ...).",
        )

    def run_step(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An optimizer step: refused when its gradients began before a rollback."""
        token = current_backward()
        capturing = self._is_capturing()
        if capturing:
            self._captured_steps.add(threading.get_ident())
        with self.section(SectionKind.WRITE):
            stale = self._drop_stale(token)
            if not stale:
                # what is put around a captured step would be part of every replay
                with contextlib.nullcontext() if capturing else self.around_step():
                    result = call(*args, **kwargs)
                self._driver.change(lambda s: gradients.forget_gradients(s, token))
                return result
        self._on_stale()
        if self._strict:
            raise StaleGradients(
                "stepping the optimizer",
                "their backward began before the last rollback, expected one that began after it",
                "They were dropped. Run forward and backward again; register other writers with using().",
            )
        return None

    def are_stale(self) -> bool:
        """Whether an optimizer step of this thread would be refused now."""
        return gradients.are_gradients_stale(self._driver.state, current_backward())

    def _drop_stale(self, token: int) -> bool:
        if not self.are_stale():
            return False
        self._state.drop_gradients()
        self._driver.change(lambda s: gradients.forget_gradients(s, token))
        return True

    def _follow(self, result: Any, epoch: int) -> None:
        # weak: a graph that somebody keeps must not keep the governor and its slots
        sections = weakref.ref(self)

        def reached(_: torch.Tensor) -> None:
            token = current_backward()
            live = sections()
            if live is not None and live._driver.change(lambda s: gradients.begin_backward(s, token, epoch)):
                # runs when this backward is complete, after every gradient was accumulated
                torch.autograd.Variable._execution_engine.queue_callback(lambda: ended(token))

        def ended(token: int) -> None:
            live = sections()
            if live is not None:
                live._driver.change(lambda s: gradients.end_backward(s, token, epoch))

        for tensor in _pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad and tensor.grad_fn is not None:
                tensor.register_hook(reached)

    def count_foreign(self) -> int:
        """Sections so far in which anything may have been written: `using()`, replays. Open ones are counted."""
        return self._num_foreign

    # ------------------------------------------------------------ graph captures

    def begin_capture(self, token: int, thread: int) -> None:
        """A graph capture of that thread begins. Waits for a snapshot or rollback that is being submitted."""
        if self.is_open:
            self._driver.begin_capture(token, thread, current_backward() != -1, self._timeout_s)

    def end_capture(self, token: int, *, succeeded: bool) -> None:
        """It is over. What a replay may write from now on must keep its address."""
        thread = threading.get_ident()
        try:
            if succeeded and self.is_open:
                self._state.note_capture(with_optimizers=thread in self._captured_steps)
        finally:
            self._captured_steps.discard(thread)
            self._driver.end_capture(token)

    def replaying(self) -> AbstractContextManager[Any]:
        """A replay may write anything."""
        return self._replay() if self.is_open else contextlib.nullcontext()

    @contextmanager
    def _replay(self) -> Generator[None]:
        with self.section(SectionKind.WRITE):
            self._num_foreign += 1
            yield

    def require_no_capture(self, doing: str) -> None:
        """Raise `UnsupportedState` while this thread captures a graph."""
        if self._is_capturing():
            raise UnsupportedState(
                doing,
                "this thread is capturing a CUDA graph, and a governed step decides on the host what comes next",
                "Capture forward, backward or the optimizer's own step, and call step or observe after each replay; or "
                "the whole of it, veto included, with tolaria.in_graph.CapturedStep.",
            )

    def _is_capturing(self) -> bool:
        thread = threading.get_ident()
        return any(capturing == thread for _, capturing in self._driver.state.captures)

    # ------------------------------------------------------------ attaching

    def attach_graphs(self) -> None:
        """Follow the graph captures and replays of the process."""
        capture.listen(self)

    def attach_module(self, module: nn.Module, names: tuple[str, ...]) -> None:
        """Make `forward` and the other named methods of `module` forward sections.

        Raises:
            UsageError: It has no method of one of the names. Nothing was attached.
        """
        for name in names:
            if not callable(getattr(module, name, None)):
                raise UsageError(
                    "attaching the governor",
                    f"{type(module).__qualname__} has no method {name!r}, which sections= names",
                    "Correct the name.",
                )
        for name in ("forward", *names):
            self._replace(module, name, self.run_forward)
        self._replace(module, _REPLICATE, self.refuse_replica)
        if hidden := rng.hidden_draws(module):
            logger.warning(
                "%s: cuDNN draws the dropout between the layers, from a state that nobody can read; after a rollback "
                "that begins anew, so a replay is not bit for bit (docs/guarantees.md, Random state)",
                ", ".join(hidden),
            )

    def attach_optimizer(self, optimizer: Optimizer) -> None:
        """Make `optimizer.step` a write section. Schedulers may wrap it before or after."""
        self._replace(optimizer, "step", self.run_step)

    def detach(self) -> None:
        """Put every method back. One that somebody else has wrapped since stays, and passes calls straight through."""
        self.is_open = False
        capture.ignore(self)
        while self._detach:
            self._detach.pop()()

    def _replace(self, owner: Any, name: str, run: Callable[..., Any]) -> None:
        previous = vars(owner).get(name)
        bound = previous if previous is not None else getattr(owner, name)
        # a method of the class is looked up when it is called: a lazy module changes its class with its first batch
        of_class = name if previous is None and isinstance(bound, types.MethodType) else None
        method = _governed(weakref.ref(owner), weakref.ref(self), bound, run.__name__, of_class)
        method.__name__ = name  # what pickle stores
        vars(owner)[name] = types.MethodType(method, owner)
        owner_ref = weakref.ref(owner)

        def detach() -> None:
            live = owner_ref()
            if live is None or getattr(vars(live).get(name), "__func__", None) is not method:
                return
            if previous is None:
                del live.__dict__[name]
            else:
                live.__dict__[name] = previous

        self._detach.append(detach)


def _governed(
    owner: weakref.ref[Any], sections: weakref.ref[Sections], bound: Callable[..., Any], run: str, of_class: str | None
) -> Callable[..., Any]:
    """A function that runs `bound` inside a section when called on `owner`, and plainly when called on a copy."""
    # not the bound method itself: it would keep the owner alive, and a copy must call its own
    plain = bound.__func__ if isinstance(bound, types.MethodType) else None

    @functools.wraps(plain if plain is not None else bound)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if of_class is not None:
                return getattr(type(self), of_class)(self, *args, **kwargs)
            return plain(self, *args, **kwargs) if plain is not None else bound(*args, **kwargs)

        if torch.compiler.is_compiling():
            return call(*args, **kwargs)
        live = sections()
        if live is None or not live.is_open or owner() is not self:
            return call(*args, **kwargs)
        return getattr(live, run)(call, args, kwargs)

    return method
