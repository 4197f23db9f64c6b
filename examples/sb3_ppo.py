"""Stable-Baselines3 under guard: `python examples/sb3_ppo.py`. Needs `pip install 'tolaria[sb3]'`.

The program is the one of the library's introduction, with a callback and two faults more: in the fourth update, and in
the very last optimizer step of the run, something writes noise over the policy. Unguarded, the second one is what
`model.save` would have saved.
"""

import gymnasium
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy

from tolaria.sb3 import TolariaCallback

ROUNDS, STEPS = 6, 40  # updates of the policy, and optimizer steps in each


def disturb(model: PPO) -> None:
    """Write noise over the weights after some optimizer steps, as a broken kernel would."""
    count = iter(range(1, 10**9))

    def write(*_: object) -> None:
        if next(count) in (4 * STEPS - 7, (ROUNDS + 1) * STEPS):  # one round is made again, so the run has one more
            for parameter in model.policy.parameters():
                parameter.data.add_(10.0 * torch.randn_like(parameter))

    model.policy.optimizer.register_step_post_hook(write)


def main() -> None:
    """Learn CartPole for 6 rollouts of 256 transitions."""
    torch.set_num_threads(1)  # the policy is small
    env = gymnasium.make("CartPole-v1")
    model = PPO("MlpPolicy", env, n_steps=256, batch_size=64, n_epochs=10, learning_rate=1e-3, seed=0, device="cpu")
    disturb(model)

    guard = TolariaCallback()
    model.learn(ROUNDS * 256, callback=guard)

    mean, _ = evaluate_policy(model, env, n_eval_episodes=5, warn=False)
    print(f"mean return {mean:.0f}, {guard.rollbacks} rollbacks, {guard.dropped} rollouts dropped")


if __name__ == "__main__":
    main()
