"""Set-ups that users have on a GPU, each beside the same loop without a governor, bit for bit.

A healthy governed run is the plain one. So is one whose weights were spoilt once. A run with a bad batch is the plain
one whose data never held it.
"""

import contextlib
import copy
import io
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tolaria import GovernorConfig, Recovery, TolariaGovernor, judge

pytestmark = pytest.mark.cuda

BATCHES, BAD, SPOILT = 18, 11, 8  # the bad batch, counted from 0; the step after which a weight is not finite


class Setup:
    """A small model with dropout, fused AdamW. Every set-up changes one thing."""

    clip = None
    autocast = None
    by_scaler = False  # a GradScaler skips a bad batch by itself

    def settings(self):
        """Of the governor."""
        return {}

    def model(self):
        return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 8)).cuda()

    def optimizers(self, model):
        return [torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)]

    def scheduler(self, optimizer):
        return None

    def scaler(self):
        return None

    def batches(self):
        draw = torch.Generator().manual_seed(3)
        return [torch.randn(16, 32, generator=draw).cuda() for _ in range(BATCHES)]

    def wrapped(self, model):
        """What the loop calls."""
        return model

    def governed(self, model, wrapped):
        """What the governor is built of."""
        return model

    def around(self):
        """In which each step is made."""
        return contextlib.nullcontext()

    def loss(self, model, x):
        return model(x).float().square().mean()


class Loop:
    """One run of a set-up."""

    def __init__(self, setup):
        torch.manual_seed(0)
        self.setup = setup
        self.model = setup.model()
        self.optimizers = setup.optimizers(self.model)
        self.scheduler, self.scaler = setup.scheduler(self.optimizers[0]), setup.scaler()
        self.wrapped = setup.wrapped(self.model)
        torch.manual_seed(1)

    def backward(self, x):
        cast = torch.autocast("cuda", self.setup.autocast) if self.setup.autocast else contextlib.nullcontext()
        with cast:
            loss = self.setup.loss(self.wrapped, x)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss

    def train(self, skipped=()):
        for number, x in enumerate(self.setup.batches()):
            if number in skipped:
                continue
            with self.setup.around():
                self.backward(x)
                if self.setup.clip is not None:
                    for each in self.optimizers if self.scaler is not None else ():
                        self.scaler.unscale_(each)
                    torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.setup.clip)
                for each in self.optimizers:
                    each.step() if self.scaler is None else self.scaler.step(each)
                if self.scaler is not None:
                    self.scaler.update()
                if self.scheduler is not None:
                    self.scheduler.step()
                for each in self.optimizers:
                    each.zero_grad()
        return self.state()

    def train_governed(self, *, bad=None, spoilt=None):
        settings = {"cadence": 3, "probation": 2, "recovery": Recovery(cool_lr=1.0), **self.setup.settings()}
        incidents = []
        governor = TolariaGovernor(
            self.setup.governed(self.model, self.wrapped),
            self.optimizers,
            scheduler=self.scheduler,
            scaler=self.scaler,
            config=GovernorConfig(on_incident=incidents.append, **settings),
            detector=judge.non_finite(),
        )
        steps = 0
        with governor:
            for number, x in governor.watch(list(enumerate(self.setup.batches()))):
                with self.setup.around():
                    loss = self.backward(torch.full_like(x, float("nan")) if number == bad else x)
                    governor.step(loss=loss, clip=self.setup.clip)
                    steps += 1
                    if steps == spoilt:
                        self._spoil(governor)
        expected = ["replay", "skip"] if bad is not None else ["replay"] if spoilt is not None else []
        assert [incident.action for incident in incidents] == expected
        return self.state()

    def _spoil(self, governor):
        weight = next(iter(self.model.parameters()))
        local = weight.to_local() if hasattr(weight, "to_local") else weight
        with governor.using(), torch.no_grad():
            local[(0,) * local.dim()] = float("nan")

    def state(self):
        """Weights, buffers, optimizers and schedule, as bytes."""
        torch.cuda.synchronize()
        kept = [*self.model.parameters(), *self.model.buffers()]
        kept += [each.state_dict()["state"] for each in self.optimizers]
        kept += [each.state_dict()["param_groups"] for each in self.optimizers]
        kept += [] if self.scheduler is None else [self.scheduler.state_dict()]
        return [*_flat(kept)]


def _flat(value):
    if isinstance(value, torch.Tensor):
        whole = value.detach()
        whole = whole.to_local() if hasattr(whole, "to_local") else whole
        yield str(whole.dtype), tuple(whole.shape), whole.contiguous().cpu().reshape(-1).view(torch.uint8).tolist()
    elif isinstance(value, dict):
        for key in value:
            yield key
            yield from _flat(value[key])
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _flat(part)
    elif not callable(value):
        yield repr(value)


def check(make):
    """What the module says, for one set-up."""
    plain = Loop(make()).train()
    assert Loop(make()).train() == plain, "the set-up itself does not repeat"
    assert Loop(make()).train_governed() == plain
    assert Loop(make()).train_governed(spoilt=SPOILT) == plain
    if not make.by_scaler:
        assert Loop(make()).train_governed(bad=BAD) == Loop(make()).train(skipped=(BAD,))


# ------------------------------------------------------------ streams and threads


class SideStream(Setup):
    def around(self):
        if "stream" not in vars(self):
            self.stream = torch.cuda.Stream(priority=-1)
            self.stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.stream)


class StreamsInTurn(Setup):
    streams = None

    def around(self):
        if self.streams is None:
            self.streams = [torch.cuda.Stream() for _ in range(3)]
        before, now = self.streams[0], self.streams[1]
        self.streams = [*self.streams[1:], before]
        now.wait_stream(before)
        now.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(now)


class ForwardInAThread(Setup):
    def loss(self, model, x):
        found, stream = [], torch.cuda.current_stream()

        def work():
            with torch.cuda.stream(stream), torch.enable_grad():
                found.append(super(ForwardInAThread, self).loss(model, x))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return found[0]


class FunctionWithAStream(Setup):
    def loss(self, model, x):
        side = torch.cuda.Stream()

        class Doubled(torch.autograd.Function):
            @staticmethod
            def forward(ctx, y):
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    doubled = y * 2
                torch.cuda.current_stream().wait_stream(side)
                y.record_stream(side)
                doubled.record_stream(torch.cuda.current_stream())
                return doubled

            @staticmethod
            def backward(ctx, gradient):
                return gradient * 2

        return Doubled.apply(model(x)).square().mean()


class OwnMemoryPool(Setup):
    def around(self):
        if "pool" not in vars(self):
            self.pool = torch.cuda.MemPool()
        return torch.cuda.use_mem_pool(self.pool)


class PageLockedBatches(Setup):
    def batches(self):
        return [x.cpu().pin_memory() for x in super().batches()]

    def loss(self, model, x):
        return super().loss(model, x.to("cuda", non_blocking=True))


# ------------------------------------------------------------ settings of the governor


class Blocking(Setup):
    def settings(self):
        return {"barrier": "blocking"}


class KnownStreams(Setup):
    def settings(self):
        return {"barrier": "streams"}


class InMainMemory(Setup):
    def settings(self):
        return {"tier": "host"}


class EveryStep(Setup):
    def settings(self):
        return {"cadence": 1, "probation": 0}


class RunTwice(Setup):
    def settings(self):
        return {"reexecute_every": 3}


# ------------------------------------------------------------ models


class Convolution(Setup):
    def model(self):
        layers = nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)
        return nn.Sequential(*layers).cuda().to(memory_format=torch.channels_last)

    def loss(self, model, x):
        return super().loss(model, x.view(16, 2, 4, 4).to(memory_format=torch.channels_last))


class Transformer(Setup):
    autocast, clip = torch.bfloat16, 1.0

    def model(self):
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).cuda()

    def loss(self, model, x):
        return super().loss(model, x.view(4, 4, 32))


class ManyLayers(Setup):
    def model(self):
        return nn.ModuleList([nn.Linear(8, 8) for _ in range(200)]).cuda()

    def loss(self, model, x):
        y = x[:, :8]
        for layer in model:
            y = y + 0.01 * layer(y)
        return y.square().mean()


class Parametrized(Setup):
    def model(self):
        first, last = parametrizations.weight_norm(nn.Linear(32, 64)), parametrizations.spectral_norm(nn.Linear(64, 8))
        return nn.Sequential(first, nn.GELU(), last).cuda()


class Embedded(Setup):
    sparse = True

    def model(self):
        table = nn.Embedding(50, 16, sparse=True) if self.sparse else nn.Embedding(50, 16, max_norm=1.0)
        return nn.ModuleDict({"table": table, "head": nn.Linear(16, 4)}).cuda()

    def optimizers(self, model):
        table, head = model["table"].parameters(), model["head"].parameters()
        if self.sparse:
            return [torch.optim.SparseAdam(list(table), lr=1e-2), torch.optim.AdamW(head, lr=1e-2)]
        return super().optimizers(model)

    def loss(self, model, x):
        rows = (x[:, 0].nan_to_num() * 7).long().abs() % 50
        return (model["head"](model["table"](rows)) * x[:, :4].sum()).square().mean()


class EmbeddedWithinANorm(Embedded):
    sparse = False


class PartlyInMainMemory(Setup):
    def model(self):
        model = nn.ModuleDict({"a": nn.Linear(32, 64).cuda(), "b": nn.Linear(64, 8)})
        for parameter in model["b"].parameters():
            parameter.data = parameter.data.pin_memory()
        return model

    def optimizers(self, model):
        return [torch.optim.AdamW(model[name].parameters(), lr=1e-2) for name in ("a", "b")]

    def loss(self, model, x):
        return model["b"](model["a"](x).relu().cpu()).square().mean()


class OddBuffers(Setup):
    def model(self):
        model = super().model()
        for name, buffer in {
            "small": torch.arange(-100, 100, dtype=torch.int8),
            "flags": torch.tensor([True, False, True]),
            "eighth": torch.randn(17).to(torch.float8_e4m3fn),
            "nothing": torch.empty(0),
        }.items():
            model.register_buffer(name, buffer.cuda())
        return model

    def loss(self, model, x):
        model.small.add_(1)
        model.flags.logical_not_()
        return super().loss(model, x)


class UnalignedView(Setup):
    def model(self):
        model = super().model()
        model[0].weight = nn.Parameter(torch.randn(64 * 32 + 1, device="cuda")[1:].view(32, 64).t())
        return model


class WideNumbers(Setup):
    def model(self):
        return super().model().double()

    def batches(self):
        return [x.double() for x in super().batches()]

    def optimizers(self, model):
        return [torch.optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.5)]


class NarrowNumbers(Setup):
    clip = 0.5

    def model(self):
        return super().model().bfloat16()

    def batches(self):
        return [x.bfloat16() for x in super().batches()]


class ComplexNumbers(Setup):
    clip = 0.5

    def model(self):
        model = nn.Linear(32, 8)
        model.phase = nn.Parameter(torch.ones(8, dtype=torch.complex64))
        return model.cuda()

    def optimizers(self, model):
        return [torch.optim.Adam(model.parameters(), lr=1e-2)]

    def loss(self, model, x):
        return (model(x) * model.phase).abs().square().mean()


# ------------------------------------------------------------ optimizers


class TensorRate(Setup):
    def optimizers(self, model):
        rate = torch.tensor(1e-2, device="cuda")
        return [torch.optim.AdamW(model.parameters(), lr=rate, capturable=True, foreach=True)]

    def scheduler(self, optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=BATCHES + 5)


class WarmRestarts(Setup):
    def scheduler(self, optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 7)


class OneByOne(Setup):
    def optimizers(self, model):
        return [torch.optim.Adam(model.parameters(), lr=1e-2, amsgrad=True, foreach=False, fused=False)]


class Factored(Setup):
    def optimizers(self, model):
        return [torch.optim.Adafactor(model.parameters(), lr=1e-2)]


class Orthogonal(Setup):
    def model(self):
        return nn.Sequential(nn.Linear(32, 64, bias=False), nn.GELU(), nn.Linear(64, 8, bias=False)).cuda()

    def optimizers(self, model):
        return [torch.optim.Muon(model.parameters(), lr=1e-2)]


class TwoBehindAScaler(Setup):
    autocast, by_scaler = torch.float16, True

    def model(self):
        return nn.ModuleList([super().model(), nn.Linear(32, 8).cuda()])

    def optimizers(self, model):
        second = torch.optim.SGD(model[1].parameters(), lr=1e-2, momentum=0.9)
        return [torch.optim.AdamW(model[0].parameters(), lr=1e-2, fused=True), second]

    def scaler(self):
        return torch.amp.GradScaler("cuda", init_scale=2.0**17, growth_interval=4)  # overflows at first

    def loss(self, model, x):
        return 30 * (model[0](x).float() + model[1](x).float()).square().mean()


# ------------------------------------------------------------ what is around the model


class Compiled(Setup):
    def wrapped(self, model):
        return torch.compile(model, fullgraph=True)

    def governed(self, model, wrapped):
        return wrapped


class GraphedCallables(Setup):
    def model(self):
        return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)).cuda()

    def wrapped(self, model):
        return torch.cuda.make_graphed_callables(model, (self.batches()[0],))


class Recomputed(Setup):
    def loss(self, model, x):
        return checkpoint(model, x, use_reentrant=False).square().mean()


class SavedInMainMemory(Setup):
    def loss(self, model, x):
        with torch.autograd.graph.save_on_cpu(pin_memory=True):
            return super().loss(model, x)


class Accumulated(Setup):
    def batches(self):
        return [torch.cat([x, x.flip(0)]) for x in super().batches()]

    def loss(self, model, x):
        first, last = x.chunk(2)
        (super().loss(model, first) / 2).backward()
        return super().loss(model, last) / 2


class CopiedAndSaved(Setup):
    steps = 0

    def loss(self, model, x):
        self.steps += 1
        if self.steps % 4 == 0:
            with torch.inference_mode():
                copy.deepcopy(model).eval()(x)
            torch.save(model.state_dict(), io.BytesIO())
        return super().loss(model, x)


class Parallel(Setup):
    def wrapped(self, model):
        distributed = nn.parallel.DistributedDataParallel
        return distributed(model, device_ids=[0], gradient_as_bucket_view=True, static_graph=True)


class ParallelGoverned(Parallel):
    def governed(self, model, wrapped):
        return wrapped


class Sharded(Setup):
    def optimizers(self, model):
        from torch.distributed.fsdp import fully_shard

        for layer in (model[0], model[3], model):
            fully_shard(layer)
        return [torch.optim.AdamW(model.parameters(), lr=1e-2)]


class NormalizedOverRanks(Setup):
    def model(self):
        layers = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Linear(64, 8))
        return nn.SyncBatchNorm.convert_sync_batchnorm(layers).cuda()


ALONE = [
    *(SideStream, StreamsInTurn, ForwardInAThread, FunctionWithAStream, OwnMemoryPool, PageLockedBatches),
    *(Blocking, KnownStreams, InMainMemory, EveryStep, RunTwice),
    *(Convolution, Transformer, ManyLayers, Parametrized, Embedded, EmbeddedWithinANorm, PartlyInMainMemory),
    *(OddBuffers, UnalignedView, WideNumbers, NarrowNumbers, ComplexNumbers),
    *(TensorRate, WarmRestarts, OneByOne, Factored, Orthogonal, TwoBehindAScaler),
    *(Compiled, GraphedCallables, Recomputed, SavedInMainMemory, Accumulated, CopiedAndSaved),
]
OF_A_GROUP = [Parallel, ParallelGoverned, Sharded, NormalizedOverRanks]


@pytest.fixture(autouse=True)
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def one_rank():
    """A process group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda:0"))
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", ALONE)
def test_a_governed_run_is_the_plain_one(make):
    check(make)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", OF_A_GROUP)
def test_a_governed_run_of_a_group_is_the_plain_one(make, one_rank):
    check(make)


@pytest.mark.filterwarnings("ignore")
def test_a_profiled_run_is_the_plain_one():
    with torch.profiler.profile():
        check(Setup)


def test_red_a_run_that_differs_is_seen():
    """One more draw in the governed run."""

    class Restless(Setup):
        runs = 0

        def batches(self):
            Restless.runs += 1
            if Restless.runs == 3:
                torch.rand((), device="cuda")
            return super().batches()

    with pytest.raises(AssertionError):
        check(Restless)


if __name__ == "__main__":  # see `test_processes`
    torch.use_deterministic_algorithms(True, warn_only=True)
    for each in (Setup, InMainMemory, EveryStep):
        check(each)
