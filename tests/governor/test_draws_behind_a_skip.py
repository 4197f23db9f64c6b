"""Random state of batches behind one that was left out, when there is a rollback before they have come again."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tolaria.feed import Feed


def test_it_is_that_of_a_run_without_the_batch_left_out() -> None:
    """Three batches: the first two are due again, without the second; then all once more, before the third has come."""
    torch.manual_seed(0)
    feed = Feed(10, [], lambda: True)
    before = torch.get_rng_state()
    batches: Iterator[int] = feed.deliver([0, 1, 2], lambda _: None)

    def train() -> int:
        """One step on the next batch, which draws. Returns the batch."""
        batch = next(batches)
        feed.consume()
        torch.rand(())
        return batch

    assert [train(), train(), train()] == [0, 1, 2]
    for skip in (range(1, 2), range(0)):
        torch.set_rng_state(before)
        feed.rewind(0, skip, restores_random_state=True)
        assert train() == 0
    assert train() == 2
    reached = torch.get_rng_state()
    torch.set_rng_state(before)
    torch.rand(())  # of batch 0
    torch.rand(())  # of batch 2
    assert torch.equal(reached, torch.get_rng_state())
