"""OBSERVE: reads the vital signs of one optimizer step from losses, gradients and weights.

On a CPU every number is there when its operator returns. On an accelerator this slice reads them at once, which waits
for the device (docs/guarantees.md, "not yet").
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

Loss = torch.Tensor | float | Sequence[torch.Tensor | float] | None


def read_loss(loss: Loss) -> float | None:
    """The loss as a float: the mean of several, of a tensor's elements, or the number itself; None stays None."""
    if loss is None:
        return None
    if isinstance(loss, torch.Tensor):
        return float(loss.detach().double().mean())
    if isinstance(loss, (list, tuple)):
        values = [value for value in map(read_loss, loss) if value is not None]
        return sum(values) / len(values) if values else None
    return float(loss)  # type: ignore[arg-type]


def read_sign(value: torch.Tensor | float) -> float:
    """One further sign as a float."""
    return float(value.detach().double().mean()) if isinstance(value, torch.Tensor) else float(value)


def gradients(parameters: Iterable[torch.nn.Parameter]) -> list[torch.Tensor]:
    """The gradients that exist, in order."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def gradient_norm(grads: Sequence[torch.Tensor]) -> tuple[float | None, int]:
    """L2 norm over all gradients and the number of gradient tensors with a non-finite value.

    The second number costs a pass of its own, taken only when the norm is not finite. A norm that overflows although
    every gradient is finite is computed again in float64, scaled by the largest element.
    """
    if not grads:
        return None, 0
    dense = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
    norm = float(torch.nn.utils.get_total_norm(dense))
    if math.isfinite(norm):
        return norm, 0
    bad = num_nonfinite(dense)
    if bad:
        return norm, bad
    largest = max(float(grad.abs().max()) for grad in dense if grad.numel())
    squares = sum(float((grad.double() / largest).square().sum()) for grad in dense)
    return largest * math.sqrt(squares), 0


def num_nonfinite(tensors: Iterable[torch.Tensor]) -> int:
    """How many of the tensors hold a NaN or an infinity.

    One norm over all of them; only when that is not finite (which may be an overflow) each is looked at by itself.
    """
    looked_at = [t.detach() for t in tensors if t.numel() and (t.is_floating_point() or t.is_complex())]
    looked_at = [t if t.element_size() > 1 else t.float() for t in looked_at]
    if not looked_at or math.isfinite(float(torch.nn.utils.get_total_norm(looked_at))):
        return 0
    return sum(not bool(torch.isfinite(t).all()) for t in looked_at)
