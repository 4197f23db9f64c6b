"""Which past do gradients belong to? Pure transitions that follow backward passes across rollbacks.

A forward notes the epoch it ran in; when a backward reaches its graph, the pass is *running* with that epoch; when the
pass is over, its gradients are *accumulated*. A rollback drops accumulated gradients, so it forgets them; it cannot
stop a running pass, so it remembers those, and the optimizer step that would apply their gradients is refused.
"""

from __future__ import annotations

from tolaria.operations import HostState
from tolaria.values import replace


def begin_backward(state: HostState, token: int, epoch: int) -> tuple[HostState, bool]:
    """A backward pass (autograd graph task `token`) has reached a graph built in `epoch`. True if it is new."""
    if any(known == token for known, _ in state.running):
        running = tuple((known, min(epoch, old) if known == token else old) for known, old in state.running)
        return replace(state, running=running), False
    return replace(state, running=(*state.running, (token, epoch))), True


def end_backward(state: HostState, token: int, epoch: int) -> tuple[HostState, None]:
    """That pass is over: its gradients are accumulated.

    `epoch` is the one it began with: an optimizer step of another thread may have forgotten the pass meanwhile.
    """
    epochs = [epoch, *(noted for known, noted in state.running if known == token)]
    oldest = min([*epochs, *([] if state.grad_epoch is None else [state.grad_epoch])], default=None)
    running = tuple(pair for pair in state.running if pair[0] != token)
    return replace(state, running=running, grad_epoch=oldest), None


def are_gradients_stale(state: HostState, token: int) -> bool:
    """Whether an optimizer step now would apply gradients that began before the last rollback.

    Args:
        state: The host state.
        token: The backward pass from inside which the optimizer steps, or -1 outside of one.
    """
    epochs = [epoch for known, epoch in state.running if known == token]
    if state.grad_epoch is not None:
        epochs.append(state.grad_epoch)
    return any(epoch < state.epoch for epoch in epochs)


def forget_gradients(state: HostState, token: int) -> tuple[HostState, None]:
    """The optimizer has stepped, or gradients were dropped.

    Passes that failed half-way are forgotten as well; the pass `token`, from inside which this is called, is not.
    """
    running = tuple(pair for pair in state.running if pair[0] == token)
    return replace(state, grad_epoch=None, running=running), None


def mark_torn(state: HostState) -> HostState:
    """A write section raised: what it had written so far stays until a rollback."""
    return replace(state, torn=True)
