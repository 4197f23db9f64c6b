"""PPO with TorchRL's trainer under guard: `python examples/torchrl_ppo.py`. Needs `pip install 'tolaria[torchrl]'`.

Put together as the library's tutorials do, with a hook and two faults more: in the third batch, and in the very last
optimizer step of the run, something writes noise over the networks.
"""

import warnings

import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TorchRL warns of itself while it is imported
    from tensordict import TensorDictBase
    from tensordict.nn import TensorDictModule
    from torchrl.collectors import Collector
    from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
    from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
    from torchrl.envs import GymEnv
    from torchrl.modules import ProbabilisticActor, ValueOperator
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.value import GAE
    from torchrl.trainers import ReplayBufferTrainer, Trainer

from tolaria.torchrl import TolariaHook

BATCH, PART, EPOCHS, BATCHES = 256, 64, 4, 6
STEPS = BATCH // PART * EPOCHS  # of the optimizer, in one batch


def disturb(optimizer: torch.optim.Optimizer) -> None:
    """Write noise over the weights after some optimizer steps, as a broken kernel would."""
    count = iter(range(1, 10**9))

    def write(*_: object) -> None:
        if next(count) in (3 * STEPS - 5, (BATCHES + 1) * STEPS):  # one batch is learnt from again: one round more
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.data.add_(10.0 * torch.randn_like(parameter))

    optimizer.register_step_post_hook(write)


def main() -> None:
    """Learn CartPole for 6 batches of 256 transitions."""
    torch.set_num_threads(1)  # the networks are small
    torch.manual_seed(0)
    env = GymEnv("CartPole-v1", device="cpu", categorical_action_encoding=True)
    env.set_seed(0)
    body = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
    actor = ProbabilisticActor(
        TensorDictModule(body, in_keys=["observation"], out_keys=["logits"]),
        spec=env.action_spec,
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    critic = ValueOperator(nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1)), in_keys=["observation"])
    loss, advantage = ClipPPOLoss(actor, critic), GAE(gamma=0.99, lmbda=0.95, value_network=critic)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    trainer = Trainer(
        collector=Collector(env, actor, frames_per_batch=BATCH, total_frames=BATCH * BATCHES),
        total_frames=BATCH * BATCHES,
        frame_skip=1,
        loss_module=loss,
        optimizer=optimizer,
        optim_steps_per_batch=BATCH // PART,
        num_epochs=EPOCHS,
        progress_bar=False,
        save_trainer_interval=10**9,
    )
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(BATCH), sampler=SamplerWithoutReplacement(), batch_size=PART
    )
    experience = ReplayBufferTrainer(buffer, batch_size=PART, flatten_tensordicts=True)

    def prepared(batch: TensorDictBase) -> TensorDictBase:
        with torch.no_grad():
            experience.extend(advantage(batch))
        return batch

    trainer.register_op("pre_epoch", prepared)
    trainer.register_op("process_optim_batch", experience.sample)
    disturb(optimizer)

    guard = TolariaHook()
    guard.register(trainer)
    trainer.train()

    finite = all(bool(parameter.isfinite().all()) for parameter in loss.parameters())
    largest = max(float(parameter.abs().max()) for parameter in loss.parameters())
    print(
        f"finite {finite}, largest weight {largest:.2f}, {guard.rollbacks} rollbacks, {guard.dropped} batches dropped"
    )


if __name__ == "__main__":
    main()
