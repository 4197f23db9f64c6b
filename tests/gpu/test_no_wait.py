"""A healthy governed loop waits for nothing: the host comes back from it while the device stands still."""

import pytest
import torch
from torch import nn

from tolaria import GovernorConfig, Health, Recovery, TolariaGovernor, Verdict, judge
from tolaria.drill.gpt import SmallGPT
from tolaria.drill.text import NUM_SYMBOLS

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")]

STEPS = 20
ALL_SIGNS_STEPS = 8  # each makes about three times as many launches, and a held device takes a thousand
PRECISIONS = ["fp32", "bf16", "fp16"]


class Loop:
    def __init__(self, precision="fp32", all_signs=False):
        self.all_signs, self.steps = all_signs, ALL_SIGNS_STEPS if all_signs else STEPS
        torch.manual_seed(0)
        # small: a device that stands still takes about a thousand launches before the host has to wait for it
        self.model = nn.Linear(16, 4, bias=False).cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=precision != "foreach")
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 100)
        self.scaler = torch.amp.GradScaler("cuda", init_scale=256.0) if precision == "fp16" else None
        self.dtype = {"fp32": None, "foreach": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.batches = [torch.randn(8, 16, device="cuda") for _ in range(self.steps)]
        self.seen = []
        asked = {"by_group": True, "update_ratio_every": 1} if all_signs else {}
        self.governor = TolariaGovernor(
            self.model,
            self.optimizer,
            scheduler=self.scheduler,
            scaler=self.scaler,
            config=GovernorConfig(cadence=5, probation=5, rng="keep", **asked),
            detector=judge.any_of(judge.default_detector(), self._recorder()),
        )
        self.planted = None

    def _recorder(self):
        """Notes every sign, and finds everything healthy."""

        def update(state, signs):
            self.seen.append(signs)
            return state, Verdict(Health.HEALTHY, signs.step)

        return judge.Detector(lambda: 0, update)

    def signs(self, loss):
        """Of the kinds that a caller may have on the device."""
        if not self.all_signs:
            return {"loss": loss}
        return {
            "loss": {"policy": loss, "value": 0.5 * loss.detach()},
            "grad_norm": loss.detach().float() + 1.0,
            "approx_kl": loss.detach().half(),
            "entropy": torch.ones(3, device="cuda"),
            "explained_variance": 0.25,
        }

    def run(self):
        for number, x in enumerate(self.governor.watch(self.batches)):
            with torch.autocast("cuda", dtype=self.dtype, enabled=self.dtype is not None):
                loss = self.model(x).mean()
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            self.governor.step(**self.signs(loss), clip=None if self.scaler else 1.0)
            if number == self.steps - 1:
                return  # the end of the data waits for the last verdict, as it must
            if self.planted is not None:
                self.planted()


KINDS = [*((precision, every) for every in (False, True) for precision in PRECISIONS), ("foreach", False)]


@pytest.fixture(params=KINDS, ids=str)
def loop(request):
    loop = Loop(*request.param)
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
    assert loop.governor.statistics().steps == 6 * loop.steps
    assert loop.governor.statistics().panics == 0
    loop.governor.check_vital_signs(1.0)
    assert len(loop.seen) == 6 * loop.steps + 1
    if loop.all_signs:
        named = {"loss/policy", "loss/value", "approx_kl", "entropy", "explained_variance"}
        measured = {"grad_norm/0", "update_ratio", "update_ratio/0"}
        assert all(set(signs.extra) == named | measured for signs in loop.seen[:-1])
        assert all(0.0 < signs.extra["update_ratio"] < 0.1 for signs in loop.seen[:-1])
        assert all(signs.grad_norm == pytest.approx(signs.extra["loss/policy"] + 1.0) for signs in loop.seen[:-1])


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


@pytest.mark.parametrize("planted", [False, True])
def test_reset_moments_and_a_lower_rate_wait_for_nothing(planted):
    """A panic that has returned, answered by every policy, while `set_sync_debug_mode` looks on."""
    loop = Loop()
    loop.governor.close()
    incidents = []
    bad = torch.full_like(loop.batches[0], float("nan"))
    batches = [bad if number in (3, 12) else batch for number, batch in enumerate(loop.batches)]
    loop.governor = TolariaGovernor(
        loop.model,
        loop.optimizer,
        config=GovernorConfig(
            cadence=2,
            probation=1,
            on_incident=incidents.append,
            recovery=Recovery(moments="reset", skip_further=1),
        ),
        detector=judge.non_finite(),
    )
    with loop.governor as governor:
        for number, x in enumerate(governor.watch(batches)):
            loss = loop.model(x).square().mean()
            loss.backward()
            torch.cuda.set_sync_debug_mode("error")
            try:
                governor.step(loss=loss)
                if planted and number == 5:
                    with pytest.raises(RuntimeError, match="synchroniz"):
                        loss.item()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert [incident.action for incident in incidents] == ["replay", "skip"] * 2
    assert [incident.moments for incident in incidents] == ["keep", "reset"] * 2
    assert incidents[-1].lr_factor == 0.5
    assert governor.statistics().rollbacks_disturbed == 0
    assert all(bool(p.isfinite().all()) for p in loop.model.parameters())


def test_signs_of_a_model_on_two_kinds_of_device():
    """Weights on a GPU and in main memory: each travels from where it is, and together they are one norm."""
    torch.manual_seed(0)
    head, tail = nn.Linear(8, 8).cuda(), nn.Linear(8, 8)
    model = nn.ModuleList([head, tail])
    optimizer = torch.optim.SGD(
        [{"params": [*head.parameters(), tail.bias], "name": "both"}, {"params": [tail.weight]}], lr=0.1
    )
    seen = []

    def update(state, signs):
        seen.append(signs)
        return state, Verdict(Health.HEALTHY, signs.step)

    config = GovernorConfig(by_group=True, update_ratio_every=1)
    with TolariaGovernor(model, optimizer, config=config, detector=judge.Detector(lambda: 0, update)) as governor:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        before = [parameter.detach().cpu().clone() for parameter in model.parameters()]
        governor.step(loss=[torch.ones((), device="cuda"), torch.full((), 3.0)])
        governor.check_vital_signs(1.0)
    signs = seen[0]
    moved = [0.1 * 0.5 * torch.ones_like(weight) for weight in before]
    assert signs.loss == 2.0
    assert signs.grad_norm == pytest.approx(0.5 * (2 * 72) ** 0.5)
    assert signs.extra["grad_norm/both"] == pytest.approx(0.5 * 80**0.5)
    assert signs.extra["grad_norm/1"] == pytest.approx(0.5 * 64**0.5)
    size = torch.cat([weight.flatten() for weight in before]).norm()
    far = torch.cat([weight.flatten() for weight in moved]).norm()
    assert signs.extra["update_ratio"] == pytest.approx(float(far / size), rel=1e-4)
