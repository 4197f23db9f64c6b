"""A healthy governed loop waits for nothing: the host comes back from it while the device stands still."""

import pytest
import torch
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, judge
from tolaria.drill.gpt import SmallGPT
from tolaria.drill.text import NUM_SYMBOLS

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")]

STEPS = 20


class Loop:
    def __init__(self, precision="fp32"):
        torch.manual_seed(0)
        # small: a device that stands still takes about a thousand launches before the host has to wait for it
        self.model = nn.Linear(16, 4, bias=False).cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=precision != "foreach")
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 100)
        self.scaler = torch.amp.GradScaler("cuda", init_scale=256.0) if precision == "fp16" else None
        self.dtype = {"fp32": None, "foreach": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.batches = [torch.randn(8, 16, device="cuda") for _ in range(STEPS)]
        self.governor = TolariaGovernor(
            self.model,
            self.optimizer,
            scheduler=self.scheduler,
            scaler=self.scaler,
            config=GovernorConfig(cadence=10, probation=5, rng="keep"),
        )
        self.planted = None

    def run(self):
        for number, x in enumerate(self.governor.watch(self.batches)):
            with torch.autocast("cuda", dtype=self.dtype, enabled=self.dtype is not None):
                loss = self.model(x).mean()
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            self.governor.step(loss=loss, clip=None if self.scaler else 1.0)
            if number == STEPS - 1:
                return  # the end of the data waits for the last verdict, as it must
            if self.planted is not None:
                self.planted()


@pytest.fixture(params=["fp32", "bf16", "fp16", "foreach"])
def loop(request):
    loop = Loop(request.param)
    for _ in range(4):  # every kernel loaded, every slot allocated, every event made
        loop.run()
    torch.cuda.synchronize()
    yield loop
    loop.governor.close()


def test_the_host_returns_from_twenty_steps_while_the_device_is_held(loop):
    from tolaria.testing.gates import Gate

    with Gate(limit_s=10.0) as gate:
        gate.close(torch.cuda.current_stream())
        torch.cuda.set_sync_debug_mode("error")
        try:
            loop.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not gate.is_open
    assert not gate.was_forced
    loop.run()
    assert loop.governor.statistics().steps == 6 * STEPS
    assert loop.governor.statistics().panics == 0


def test_with_one_planted_wait_it_does_not(loop):
    from tolaria.testing.gates import Gate

    def wait():
        event = torch.cuda.Event()
        event.record()
        event.synchronize()

    loop.planted = wait
    with Gate(limit_s=2.0) as gate:
        gate.close(torch.cuda.current_stream())
        loop.run()
        assert gate.is_open
    assert gate.was_forced


class WholeRun:
    """The small GPT of the drill from its first step to its last, all snapshots and drains included."""

    def __init__(self, precision):
        torch.manual_seed(0)
        self.model = SmallGPT().cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 80)
        self.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24) if precision == "fp16" else None
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        text = torch.randint(0, NUM_SYMBOLS, (80, 8, 33)).cuda()
        self.batches = [(each[:, :-1], each[:, 1:].contiguous()) for each in text]
        self.losses = []

    def train(self, planted=lambda _: None):
        config = GovernorConfig(cadence=5, probation=5)
        with TolariaGovernor(
            self.model, self.optimizer, scheduler=self.scheduler, scaler=self.scaler, config=config
        ) as governor:
            for number, (x, y) in enumerate(governor.watch(self.batches)):
                with torch.autocast("cuda", dtype=self.dtype, enabled=self.dtype is not torch.float32):
                    loss = nn.functional.cross_entropy(self.model(x).flatten(0, 1), y.flatten())
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
                governor.step(loss=loss, clip=1.0)
                self.losses.append(loss.detach())
                if number == 40:
                    planted(loss)
            return governor.statistics(), governor.capabilities()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_torch_sees_no_wait_in_a_whole_run(precision):
    run = WholeRun(precision)
    torch.cuda.set_sync_debug_mode("error")
    try:
        statistics, capabilities = run.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert capabilities.barrier == "context"
    assert (statistics.steps, statistics.panics, statistics.vetoes) == (80, 0, 0)
    assert statistics.snapshots >= 10
    losses = torch.stack(run.losses).tolist()
    assert sum(losses[-10:]) < sum(losses[:10])  # it has learned
    if run.scaler is not None:
        assert run.scaler.get_scale() < 2.0**24  # overflows were skipped, and nobody waited for that


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_torch_sees_one_planted_wait(precision):
    run = WholeRun(precision)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
            run.train(planted=lambda loss: loss.item())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(run.losses) == 41


def test_a_panic_is_noticed_although_nothing_waits():
    loop = Loop()
    detector_sees = []
    loop.batches[7] = torch.full_like(loop.batches[0], float("nan"))
    loop.governor.close()
    loop.governor = TolariaGovernor(
        loop.model,
        loop.optimizer,
        config=GovernorConfig(cadence=2, probation=1, on_incident=detector_sees.append),
        detector=judge.non_finite(),
    )
    for x in loop.governor.watch(loop.batches):
        loss = loop.model(x).square().mean()
        loss.backward()
        loop.governor.step(loss=loss)
    assert [incident.action for incident in detector_sees] == ["replay", "skip"]
    assert all(bool(p.isfinite().all()) for p in loop.model.parameters())
    loop.governor.close()
