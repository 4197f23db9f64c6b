"""Optimizers, and gradients that are not finite, for the tests of the veto."""

import torch

NAN = float("nan")
FUSED = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True, weight_decay=0.1, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, fused=True),
}
PLAIN = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.05),
}


def waits(machine):
    return sum(call.startswith(("cuEventSynchronize", "cuStreamSynchronize")) for call in machine.calls)


def freeze(value):
    if isinstance(value, torch.Tensor):
        return str(value.dtype), bytes(value.detach().contiguous().reshape(-1).view(torch.uint8).tolist())
    if isinstance(value, dict):
        return {key: freeze(item) for key, item in value.items()}
    return [freeze(item) for item in value] if isinstance(value, (list, tuple)) else repr(value)


def stepped(run):
    """What an optimizer step writes."""
    return freeze([list(run.model.parameters()), run.optimizer.state_dict()])


def is_finite(model):
    return all(bool(p.isfinite().all()) for p in model.parameters())


def poison(run, value=NAN):
    """One value in one gradient; the loss is finite."""
    run.model[4].weight.grad[1, 2] = value
