"""PPO in a single file, under guard: `python examples/ppo_single_file.py`. Needs gymnasium.

Everything that PPO does is here; three places belong to tolaria. An update runs as a round, so that it is undone as a
whole when it panics. `Trajectories` marks what a broken environment has spoilt, so that no advantage is computed across
it. And what a round that was dropped has seen is not used again.

Faults come with the run: one gradient is NaN, an environment answers NaN, and the last optimizer step blows up.
"""

import argparse
from dataclasses import dataclass

import gymnasium
import torch
from torch import nn
from torch.distributions import Categorical

from tolaria import TolariaGovernor
from tolaria.rounds import Rounds
from tolaria.surge import round_detector
from tolaria.trajectories import Trajectories

ENVS, STEPS, EPOCHS = 8, 64, 8
GAMMA, LAMBDA, CLIP, LEARNING_RATE = 0.98, 0.9, 0.2, 2e-3


class Agent(nn.Module):
    """Policy and value of CartPole."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
        self.value = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, observed: torch.Tensor) -> tuple[Categorical, torch.Tensor]:
        """Distribution over actions, and value, shape [...]."""
        return Categorical(logits=self.policy(observed)), self.value(observed).squeeze(-1)


@dataclass
class Rollout:
    """Tensors of shape [STEPS, ENVS, ...]."""

    observed: torch.Tensor
    actions: torch.Tensor
    log_probs: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    valid: torch.Tensor


class Collector:
    """Eight environments, and their returns so far. `poison`: the step at which environment 5 answers NaN."""

    def __init__(self, poison: int) -> None:
        self.envs = [gymnasium.make("CartPole-v1") for _ in range(ENVS)]
        self.observed = torch.stack([torch.tensor(env.reset(seed=i)[0]) for i, env in enumerate(self.envs)])
        self.marks = Trajectories(STEPS, ENVS)
        self.scores, self.running, self.steps, self.poison = [0.0], [0.0] * ENVS, 0, poison

    def step(self, number: int, action: int, at: int) -> tuple[torch.Tensor, float, bool]:
        """One step of one environment, reset where its episode ends or its answer is no number."""
        env = self.envs[number]
        observed, reward, terminated, truncated, _ = env.step(action)
        after = torch.tensor(observed)
        if self.steps == self.poison and number == 5:
            after = after * float("nan")
        self.running[number] += float(reward)
        broken = not bool(after.isfinite().all())
        if broken:
            self.marks.invalidate(number, at, at)  # this environment and this step; the other seven stay as they are
        if broken or terminated or truncated:
            if not broken:
                self.scores.append(self.running[number])
            self.running[number] = 0.0
            after = torch.tensor(env.reset()[0])
        return after, float(reward), terminated or truncated

    @torch.no_grad()
    def collect(self, agent: Agent) -> Rollout:
        """One rollout, with its advantages."""
        self.marks.clear()
        columns: list[list[torch.Tensor]] = [[] for _ in range(7)]
        for at in range(STEPS):
            choice, value = agent(self.observed)
            action = choice.sample()
            answers = [self.step(number, int(action[number]), at) for number in range(ENVS)]
            ahead = torch.stack([answer[0] for answer in answers])
            reward = torch.tensor([answer[1] for answer in answers])
            done = torch.tensor([answer[2] for answer in answers])
            row = (self.observed, action, choice.log_prob(action), value, agent(ahead)[1], reward, done)
            for column, entry in zip(columns, row, strict=True):
                column.append(entry)
            self.observed, self.steps = ahead, self.steps + 1
        observed, actions, log_probs, values, next_values, rewards, dones = map(torch.stack, columns)
        advantages = self.marks.advantages(rewards, values, next_values, dones, gamma=GAMMA, lam=LAMBDA)
        return Rollout(observed, actions, log_probs, advantages, advantages + values, self.marks.valid.clone())


def update(agent: Agent, optimizer: torch.optim.Optimizer, rollout: Rollout) -> None:
    """The epochs of PPO over what is valid of a rollout."""
    keep = rollout.valid.flatten().nonzero().squeeze(1)
    observed, actions, old = rollout.observed.flatten(0, 1), rollout.actions.flatten(), rollout.log_probs.flatten()
    advantages, returns = rollout.advantages.flatten(), rollout.returns.flatten()
    for _ in range(EPOCHS):
        for chosen in keep[torch.randperm(len(keep))].chunk(2):
            choice, value = agent(observed[chosen])
            ratio = (choice.log_prob(actions[chosen]) - old[chosen]).exp()
            gain = (advantages[chosen] - advantages[chosen].mean()) / (advantages[chosen].std() + 1e-8)
            policy_loss = -torch.min(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain).mean()
            loss = policy_loss + 0.5 * (value - returns[chosen]).square().mean() - 0.001 * choice.entropy().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimizer.step()


def policy_change(agent: Agent, rollout: Rollout) -> dict[str, float]:
    """How far the policy is from the one that collected the rollout, in nats."""
    log_probs = agent(rollout.observed)[0].log_prob(rollout.actions)
    return {"policy_change": float((log_probs - rollout.log_probs).square().mean() / 2)}


def inject(agent: Agent, optimizer: torch.optim.Optimizer, updates: int) -> None:
    """A NaN in one gradient after a third of the run; a blow-up in its very last optimizer step."""
    each, count = EPOCHS * 2, iter(range(10**9))
    nan_at = updates // 3 * each + 5
    last = updates * each - 1 + 6  # of the update that is made again six steps are done by then

    def before(*_: object) -> None:
        step = next(count)
        if step == nan_at:
            agent.policy[0].weight.grad.fill_(float("nan"))
        if step == last:
            optimizer.register_step_post_hook(lambda *_: blow_up())

    def blow_up() -> None:
        if next(strikes) == 0:
            for parameter in agent.parameters():
                parameter.data.add_(10.0 * torch.randn(parameter.shape, generator=noise))

    strikes, noise = iter(range(10**9)), torch.Generator().manual_seed(1)
    optimizer.register_step_pre_hook(before)


def main() -> None:
    """Train, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unguarded", action="store_true", help="the same faults, and nobody who answers them")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    agent = Agent()
    optimizer = torch.optim.Adam(agent.parameters(), lr=LEARNING_RATE)
    collector = Collector(poison=arguments.updates // 2 * STEPS + 9)
    inject(agent, optimizer, arguments.updates)

    governor = TolariaGovernor(agent, optimizer, detector=round_detector())
    rounds = Rounds(governor)
    dropped = 0
    for number in range(arguments.updates):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - number / arguments.updates)
        rollout = collector.collect(agent)
        if arguments.unguarded:
            update(agent, optimizer, rollout)
            continue
        result = rounds.run(
            lambda rollout=rollout: update(agent, optimizer, rollout),
            signs=lambda rollout=rollout: policy_change(agent, rollout),
        )
        dropped += not result.learnt
    collector.scores.clear()
    collector.running = [0.0] * ENVS
    collector.observed = torch.stack([torch.tensor(env.reset()[0]) for env in collector.envs])
    while len(collector.scores) < 2 * ENVS:
        collector.collect(agent)
    mean = sum(collector.scores) / len(collector.scores)
    print(f"mean return {mean:.0f} afterwards, {governor.rollbacks} rollbacks, {dropped} updates dropped")


if __name__ == "__main__":
    main()
