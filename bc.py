"""BC, behavioural cloning: a policy as likely as possible to have chosen the actions of the trajectories.

It looks at no success example: the methods that do are to be better than it. It is LAEO with `--bc-coef 1`.

    python bc.py --env-id FetchReach --gradient-steps 3000
    python bc.py --env-id FetchPush

Differences from the LAEO paper's baseline (Hatch et al. 2023, Section 5) and its released code, with the reasons:
 1. Observations are standardised with the mean and the standard deviation of the training episodes (images: a mean of
    each pixel and one deviation; the code divides by 255): a part of raw ones hardly reaches the network.
 2. Networks (also convolutions) are narrower, batches smaller and training shorter than 1024 x 2, 1024 and 500,000
    steps, to fit two cores; the learning rate starts higher, 1e-3 instead of 3e-4, and falls linearly to zero. All are
    LAEO's, for comparison.
 3. Success is measured on 100 episodes with fixed seeds, played by the final policy's mode. The code reports a running
    mean over whatever episodes a parallel evaluator had finished.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Generator, Tensor, nn

import common


@dataclass
class Args(common.RunArgs):
    gradient_steps: int = 20_000
    """training steps"""
    batch_size: int = 256
    """transitions in a batch"""
    learning_rate: float = 1e-3
    """Adam's step size at the start; it falls linearly to zero"""
    hidden_dim: int = 256
    """width of the network's two hidden layers"""


# ---------------------------------------------------------------------------------------------------------- networks


def mlp(sizes: list[int], generator: Generator) -> nn.Sequential:
    """Return a ReLU network with a linear last layer, Glorot-uniform weights and zero biases."""
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:])):
        linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out)  # which would draw from the global generator
        nn.init.xavier_uniform_(linear.weight, generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()] if i < len(sizes) - 2 else [linear]
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """Standardises observations [B, D]; of images [B, 64, 64, 3] a convolutional network then makes features."""

    def __init__(self, mean: Tensor, std: Tensor, channels: int, generator: Generator):
        super().__init__()
        self.register_buffer("observation_mean", mean.clone())
        self.register_buffer("observation_std", std.clone())
        self.net, self.dim = nn.Identity(), mean.numel()  # dim: how many features
        if mean.ndim == 3:
            a, b, self.dim = channels, 2 * channels, 2 * channels * (mean.shape[0] // 8) * (mean.shape[1] // 8)
            sizes = (3, a, 8, 4, 2), (a, b, 4, 2, 1), (b, b, 3, 1, 1)  # channels, kernel, stride, padding
            convolutions = [nn.utils.skip_init(nn.Conv2d, *size) for size in sizes]
            for c in convolutions:
                nn.init.xavier_uniform_(c.weight, generator=generator), nn.init.zeros_(c.bias)
            self.net = nn.Sequential(*(layer for c in convolutions for layer in (c, nn.ReLU())), nn.Flatten(-3))

    def forward(self, observation: Tensor) -> Tensor:
        """Return features [B, dim] of observations, float32 or, for images, uint8."""
        x = (observation - self.observation_mean) / self.observation_std
        return self.net(x.movedim(-1, -3) if self.observation_mean.ndim == 3 else x)


class Actor(nn.Module):
    """Tanh-normal policy pi(a | s)."""

    LIMIT = 0.999  # actions beyond count as saturated: their density is that of the whole tail

    def __init__(self, encoder: Encoder, action_dim: int, hidden_dim: int, generator: Generator):
        super().__init__()
        self.encoder = encoder
        self.net = mlp([encoder.dim, hidden_dim, hidden_dim, 2 * action_dim], generator)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation, each [B, actions], of the normal law under the tanh."""
        mean, std = self.net(self.encoder(observation)).chunk(2, -1)
        return mean, F.softplus(std) + 0.1

    def mode(self, observation: Tensor) -> Tensor:
        """Return the action [B, actions] that is played in evaluation."""
        return torch.tanh(self(observation)[0])

    def log_prob(self, mean: Tensor, std: Tensor, action: Tensor) -> Tensor:
        """Return log pi(a | s) [B] of actions [B, actions] in [-1, 1]."""
        edge = float(np.arctanh(self.LIMIT))
        x = torch.atanh(action.clamp(-self.LIMIT, self.LIMIT))
        inside = (
            -0.5 * ((x - mean) / std) ** 2 - std.log() - 0.5 * np.log(2 * np.pi) - torch.log1p(-(torch.tanh(x) ** 2))
        )
        upper = torch.special.log_ndtr((mean - edge) / std) - np.log(1 - self.LIMIT)
        lower = torch.special.log_ndtr((-edge - mean) / std) - np.log(1 - self.LIMIT)
        return torch.where(action >= self.LIMIT, upper, torch.where(action <= -self.LIMIT, lower, inside)).sum(-1)


# -------------------------------------------------------------------------------------------------------------- loss


def bc_loss(log_prob: Tensor) -> Tensor:
    """Minus the mean log-likelihood, in nats, from log-probabilities [B] of the data's actions."""
    return -log_prob.mean()


# ----------------------------------------------------------------------------------------------------------- batches


class Batch(NamedTuple):
    observation: Tensor  # [B, ...]
    action: Tensor  # [B, actions]


def sample(transitions: common.Transitions, args: Args, generator: Generator) -> Batch:
    """Draw transitions uniformly."""
    i = torch.randint(len(transitions.start), (args.batch_size,), generator=generator, device=transitions.start.device)
    return Batch(transitions.gather(transitions.start[i], args.random_shift, generator), transitions.actions[i])


# ---------------------------------------------------------------------------------------------------------- training


def update(batch: Batch, actor: Actor, optimizer: torch.optim.Optimizer) -> None:
    """Take one gradient step."""
    optimizer.zero_grad()
    bc_loss(actor.log_prob(*actor(batch.observation), batch.action)).backward()
    optimizer.step()


@torch.no_grad()
def measure(batch: Batch, actor: Actor) -> dict[str, float]:
    """Metrics of one batch; README.md explains each."""
    mean, std = actor(batch.observation)
    metrics = {
        "bc_loss": bc_loss(actor.log_prob(mean, std, batch.action)),
        "action_error": (torch.tanh(mean) - batch.action).abs().mean(),
        "policy_std": std.mean(),
    }
    return {name: value.item() for name, value in metrics.items()}


@torch.inference_mode()
def evaluate(actor: Actor, env_id: str, episodes: int, seed: int, device: torch.device) -> dict[str, list]:
    """Play episodes with the policy's mode in an environment of their own; return one entry per episode.

    `success`: solved after any action; `final_success`: after the last one; `initial_success`: before the first one;
    `discounted_return`: the sum of 0.99^t over the actions t = 0, 1, ... after which the task is solved.
    """
    results: dict[str, list] = {"seed": [common.episode_seed("evaluation", seed, i) for i in range(episodes)]}
    solved, env = [], common.make_env(env_id)
    for episode_seed in results["seed"]:
        observation, info = env.reset(seed=episode_seed)
        solved.append([info["success"]])
        truncated = False
        while not truncated:
            action = actor.mode(torch.from_numpy(observation).to(device)).cpu().numpy()
            observation, _, _, truncated, info = env.step(action)
            solved[-1].append(info["success"])
    env.close()
    results |= {"success": [any(s[1:]) for s in solved], "final_success": [s[-1] for s in solved]}
    results |= {"initial_success": [s[0] for s in solved]}
    results |= {"discounted_return": [float(np.dot(s[1:], 0.99 ** np.arange(len(s) - 1))) for s in solved]}
    return results


def train(args: Args) -> dict:
    """Train, evaluate, and return what is written to result.json. Raises common.UserError for a mistake in `args`."""
    run = common.Run(Path(__file__).stem, args)
    args, device = run.args, run.device
    data, training_episodes, heldout_episodes = run.load_data(0)
    transitions = common.Transitions(data, training_episodes, device)
    heldout = common.Transitions(data, heldout_episodes, device)
    mean, std = transitions.statistics()

    seeds = run.seeds(3)
    weights_generator = Generator().manual_seed(seeds[0])  # on the CPU: the same weights on every device
    generator = Generator(device).manual_seed(seeds[1])
    log_generator = Generator(device).manual_seed(seeds[2])  # of its own: logging must not change the training
    encoder = Encoder(mean, std, args.channels, weights_generator)
    actor = Actor(encoder, transitions.actions.shape[1], args.hidden_dim, weights_generator).to(device)
    optimizer = torch.optim.Adam(actor.parameters(), args.learning_rate, eps=1e-7, fused=True)
    parts = {"actor": actor, "optimizer": optimizer}
    batches = common.Batches(lambda: sample(transitions, args, generator), generator, transitions.states)
    run.start({**parts, "batches": batches, "log_generator": log_generator})

    def evaluate_now(step: int) -> dict[str, list]:
        run.clock("evaluation")
        return run.log_evaluation(step, evaluate(actor, args.env_id, args.eval_episodes, args.seed, device))

    run.clock("training")
    with common.catch_interrupt() as interrupted, run.progress:
        for step in range(run.first_step, args.gradient_steps):
            if args.eval_interval and step % args.eval_interval == 0:
                evaluate_now(step)
            for group in optimizer.param_groups:  # a policy that still moves much is good or bad by the hour
                group["lr"] = args.learning_rate * (1 - step / args.gradient_steps)
            update(next(batches), actor, optimizer)
            if (step + 1) % args.log_interval == 0:
                for name, source in (("train", transitions), ("heldout", heldout)):
                    batch = sample(source, args, log_generator)
                    run.log(step + 1, name, measure(batch, actor))
            run.end_step(step + 1, interrupted)
        return run.finish(evaluate_now(args.gradient_steps), actor.mode)


if __name__ == "__main__":
    with common.exit_quietly():
        train(tyro.cli(Args))
