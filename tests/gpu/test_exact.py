"""A train state on a GPU under either barrier: exact, in place, whole."""

import pytest
import torch
from torch import nn

from tolaria import GovernorConfig, SnapshotRejected, TolariaGovernor, judge

pytestmark = pytest.mark.cuda


@pytest.fixture(params=["context", "blocking"])
def barrier(request):
    return request.param


@pytest.fixture(autouse=True)
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Run:
    """A model with BatchNorm and Dropout on the GPU, its optimizer, and data."""

    def __init__(self, make_optimizer, *, scaler=False, dtype=None):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 4)
        ).cuda()
        self.optimizer = make_optimizer(self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 50)
        self.scaler = torch.amp.GradScaler("cuda", init_scale=256.0, growth_interval=4) if scaler else None
        self.dtype = dtype
        generator = torch.Generator().manual_seed(1)
        self.batches = [
            (torch.randn(32, 16, generator=generator).cuda(), torch.randint(0, 4, (32,), generator=generator).cuda())
            for _ in range(40)
        ]

    def govern(self, barrier, **settings):
        config = GovernorConfig(**{"cadence": 4, "probation": 4, "barrier": barrier, **settings})
        return TolariaGovernor(
            self.model,
            self.optimizer,
            scheduler=self.scheduler,
            scaler=self.scaler,
            config=config,
            detector=judge.non_finite(),
        )

    def loss(self, x, y):
        if self.dtype is None:
            return nn.functional.cross_entropy(self.model(x), y)
        with torch.autocast("cuda", dtype=self.dtype):
            return nn.functional.cross_entropy(self.model(x), y)

    def train(self, governor, batches):
        for x, y in governor.watch(batches):
            loss = self.loss(x, y)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            governor.step(loss=loss)


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "AdamW capturable": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2, device="cuda"), capturable=True),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}
PRECISIONS = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "fp16 scaler": {"dtype": torch.float16, "scaler": True},
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_poisoned_batch_leaves_no_trace(name, precision, barrier):
    """Trained with a NaN batch, and without it: the same state, bit for bit."""
    digests = []
    for poisoned in (True, False):
        run = Run(OPTIMIZERS[name], **PRECISIONS[precision])
        batches = list(run.batches)
        if poisoned:
            batches.insert(17, (torch.full_like(batches[0][0], float("nan")), batches[0][1]))
        with run.govern(barrier) as governor:
            run.train(governor, batches)
            digests.append(governor.digest())
            assert governor.rollbacks == (2 if poisoned else 0)
    assert digests[0] == digests[1]


def test_nothing_moves_and_nothing_differs_over_many_rollbacks(barrier):
    run = Run(OPTIMIZERS["AdamW"])
    with run.govern(barrier) as governor:
        run.train(governor, run.batches[:10])
        governor.snapshot()
        before = governor.digest()
        tensors = [*run.model.parameters(), *run.model.buffers()]
        moments = [v for s in run.optimizer.state.values() for v in s.values()]
        addresses = [t.data_ptr() for t in (*tensors, *moments)]
        for _ in range(20):
            run.train(governor, run.batches[10:12])
            report = governor.execute_rollback(verify="before").wait()
            assert report.verified
            assert report.barrier == barrier
            assert governor.digest() == before
        assert [t.data_ptr() for t in (*tensors, *moments)] == addresses


def test_the_quoted_interface():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).cuda()
    optimizer = torch.optim.Adam(model.parameters())
    governor = TolariaGovernor(model)
    governor.snapshot()
    before = [p.clone() for p in model.parameters()]
    model(torch.randn(4, 8, device="cuda")).sum().backward()
    optimizer.step()
    report = governor.execute_rollback(env_id=0, optimizer=optimizer)
    assert report.success
    assert report.optimizer == "reset"
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    governor.close()


def test_random_state_of_the_device_comes_back(barrier):
    run = Run(OPTIMIZERS["AdamW"])
    with run.govern(barrier) as governor:
        governor.snapshot()
        first = torch.rand(8, device="cuda")
        governor.execute_rollback()
        assert torch.equal(torch.rand(8, device="cuda"), first)


def test_a_flipped_bit_in_a_device_slot_is_noticed(barrier):
    run = Run(OPTIMIZERS["AdamW"])
    with run.govern(barrier) as governor:
        governor.snapshot().wait("sealed")
        before = governor.digest()
        arena = governor._keeper.vault.slots[0].arena
        for flat in arena.flat.values():
            flat[100] ^= 1
        with pytest.raises(SnapshotRejected):
            governor.execute_rollback(verify="before")
        assert governor.digest() == before


def test_a_model_on_two_kinds_of_device(barrier):
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4).cuda()})
    with TolariaGovernor(model, config=GovernorConfig(barrier=barrier)) as governor:
        assert governor.capabilities().barrier == barrier
        assert set(governor.capabilities().devices) == {"cuda:0", "cpu"}
        governor.snapshot()
        before = governor.digest()
        with governor.using(), torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        assert governor.digest() != before
        governor.execute_rollback()
        assert governor.digest() == before


def test_the_device_as_the_default_for_all_tensors(barrier):
    """As with `torch.set_default_device("cuda")` at the head of a script."""
    ends = []
    for default in (None, "cuda"):
        run = Run(OPTIMIZERS["AdamW fused"])
        bad = (torch.full_like(run.batches[0][0], float("nan")), run.batches[0][1])
        torch.set_default_device(default)
        try:
            with run.govern(barrier, host_slots=2) as governor:
                run.train(governor, [*run.batches[:9], bad, *run.batches[9:20]])
                governor.snapshot().wait("sealed")
                assert governor.execute_rollback().wait().verified
                ends.append((governor.digest(), governor.rollbacks))
        finally:
            torch.set_default_device(None)
    assert ends[0] == ends[1]
    assert ends[0][1] > 1


class Recurrent:
    """Two layers of an RNN with dropout between them, which cuDNN draws."""

    def __init__(self, kind, dropout):
        torch.manual_seed(0)
        self.model = nn.Sequential()
        self.model.rnn = kind(16, 32, 2, batch_first=True, dropout=dropout)
        self.model.head = nn.Linear(32, 4)
        self.model.cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(1)
        self.batches = [torch.randn(8, 6, 16, generator=generator).cuda() for _ in range(24)]
        torch.manual_seed(2)

    def loss(self, x):
        return self.model.head(self.model.rnn(x)[0]).square().mean()

    def train_plainly(self):
        for x in self.batches:
            self.loss(x).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self.weights()

    def train(self, barrier, transient=None):
        """`transient`: the step after which a weight is not finite, once."""
        config = GovernorConfig(cadence=3, probation=2, barrier=barrier)
        with TolariaGovernor(self.model, self.optimizer, config=config, detector=judge.non_finite()) as governor:
            for done, x in enumerate(governor.watch(self.batches), start=1):
                loss = self.loss(x)
                loss.backward()
                governor.step(loss=loss)
                if done == transient:
                    with torch.no_grad(), governor.using():
                        self.model.head.bias.fill_(float("nan"))
            assert governor.rollbacks == (transient is not None)
        return self.weights()

    def weights(self):
        torch.cuda.synchronize()
        return [parameter.detach().cpu().tolist() for parameter in self.model.parameters()]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_healthy_run_draws_what_it_would_without_a_governor(kind, barrier, caplog):
    """Whatever sets a generator of CUDA has cuDNN seed that dropout anew."""
    expected = Recurrent(kind, 0.5).train_plainly()
    assert Recurrent(kind, 0.5).train_plainly() == expected
    assert Recurrent(kind, 0.5).train(barrier) == expected
    assert "rnn: cuDNN draws the dropout between the layers" in caplog.text


def test_a_replay_of_dropout_that_cudnn_draws_is_a_run_like_any_other(barrier):
    weights = torch.tensor(Recurrent(nn.LSTM, 0.5).train(barrier, transient=10)[0])
    assert torch.isfinite(weights).all()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_replay_of_an_rnn_without_dropout_is_the_undisturbed_run(kind, barrier, caplog):
    expected = Recurrent(kind, 0.0).train_plainly()
    assert Recurrent(kind, 0.0).train(barrier, transient=10) == expected
    assert "cuDNN" not in caplog.text


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mixed", [False, True])
def test_gradients_of_any_type_are_clipped_as_torch_does(dtype, mixed, barrier):
    def build():
        draw = torch.Generator().manual_seed(5)
        dtypes = [dtype, torch.float32] if mixed else [dtype, dtype]
        return nn.ParameterList([torch.randn(37, generator=draw).to(each) for each in dtypes]).cuda()

    def loss_of(model):
        return torch.stack([parameter.abs().square().sum().double() for parameter in model]).sum()

    plain, model = build(), build()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    config = GovernorConfig(barrier=barrier)
    with TolariaGovernor(
        model, torch.optim.SGD(model.parameters(), lr=0.1), config=config, detector=judge.non_finite()
    ) as governor:
        for _ in range(4):
            loss_of(plain).backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            governor.step(loss=loss, clip=0.5)
    torch.cuda.synchronize()
    assert [parameter.tolist() for parameter in model] == [parameter.tolist() for parameter in plain]
