"""PURL: learn a reward from a few success examples, knowing that the data hold more of them, then a policy from it.

A classifier learns to tell success examples from the states of the trajectories, a share eta of which are successes
that nobody marked; its probability is the reward of arriving in a state. TD3+BC, offline reinforcement learning by
temporal differences, learns that reward's Q-function and a policy that maximises it, held close to the data.

Xu and Denil 2019, "Positive-Unlabeled Reward Learning", with the non-negative risk of Kiryo et al. 2017; TD3+BC is
Fujimoto and Gu 2021, "A Minimalist Approach to Offline Reinforcement Learning". ORIL is the same with another loss.

    python purl.py --env-id FetchReach --gradient-steps 10000
    python purl.py --env-id FetchPush --num-success 10

Differences from the baseline of the LAEO paper (Hatch et al. 2023) and from its released code, each with its reason:
 1. The reward's loss has a floor; the code's falls without bound as the examples' logits grow (tests/test_oril.py).
 2. The critic learns from the learned reward, as the paper says. The code computes it and then takes the true one.
 3. The reward is that of the state in which a transition arrives, and the unlabelled states are such; in the code they
    are those from which it starts: an action is credited one step late, an episode's last state never.
 4. The classifier sees all success examples at every step; the code draws a batch of them with replacement.
 5. Target noise is drawn for each transition and dimension, alike for the twins, as in TD3; in the code for each twin.
 6. Both target networks follow in the policy's delayed steps, as in TD3; in the code the critics' follow at every step.
 7. Standardised observations, widths, batches, steps, and a learning rate that falls to zero are laeo.py's, for
    comparison; so are the encoder of images, the scale of actions beside it, initial weights and Adam's eps of 1e-7.
 8. Hidden layers end in ReLU, in the critic after a layer normalisation: one kind of layer is the simplest. The code
    normalises and takes a tanh after the first one, ELU after the others, in the actor too; each twin encodes images.
 9. alpha is 1 and eta 0.3, from a search (README.md); TD3+BC's own alpha is 2.5, the code has 0.5 and 0.5.
Episodes end by the step limit alone, not because something happened: targets bootstrap through their ends.
"""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Generator, Tensor, nn
from torch.optim import Adam

import common


@dataclass
class Args(common.RunArgs):
    num_success: int = 200
    """how many success examples the method sees"""
    gradient_steps: int = 20_000
    """training steps of reward and critic; the policy takes one in two"""
    batch_size: int = 256
    """transitions in a batch"""
    learning_rate: float = 1e-3
    """Adam's step size for critic and policy at the start; it falls linearly to zero"""
    reward_learning_rate: float = 1e-4
    """the same for the reward network"""
    eta: float = 0.3
    """prior: the share of the data's states that is taken to be successes"""
    discount: float = 0.99
    """how much a reward one step later counts"""
    hidden_dim: int = 256
    """width of the two hidden layers in every network"""
    alpha: float = 1.0
    """weight of the normalised Q-value against behavioural cloning in the policy's loss"""
    tau: float = 0.005
    """share of the way that target networks go at each of the policy's steps"""
    policy_noise: float = 0.2
    """standard deviation of the noise on the target policy's actions, which is clipped at noise_clip"""
    noise_clip: float = 0.5
    """largest noise on the target policy's actions"""


# ---------------------------------------------------------------------------------------------------------- networks


def mlp(sizes: list[int], generator: Generator, layer_norm: bool = False) -> nn.Sequential:
    """Return a ReLU network with a linear last layer, Glorot-uniform weights and zero biases."""
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:])):
        linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out)  # which would draw from the global generator
        nn.init.xavier_uniform_(linear.weight, generator=generator)
        nn.init.zeros_(linear.bias)
        hidden = [linear, nn.LayerNorm(fan_out), nn.ReLU()] if layer_norm else [linear, nn.ReLU()]
        layers += hidden if i < len(sizes) - 2 else [linear]
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
    """Deterministic policy."""

    def __init__(self, encoder: Encoder, action_dim: int, hidden_dim: int, generator: Generator):
        super().__init__()
        self.encoder = encoder
        self.net = mlp([encoder.dim, hidden_dim, hidden_dim, action_dim], generator)

    def mode(self, observation: Tensor) -> Tensor:
        """Return the action [B, actions] that is played in evaluation."""
        return torch.tanh(self.net(self.encoder(observation)))


class Critic(nn.Module):
    """Twin Q-functions. Layer normalisation keeps their values from growing where no data are."""

    def __init__(self, encoder: Encoder, action_dim: int, hidden_dim: int, generator: Generator):
        super().__init__()
        self.encoder, sizes = encoder, [encoder.dim + action_dim, hidden_dim, hidden_dim, 1]
        self.action_scale = (encoder.dim / action_dim) ** 0.5 if isinstance(encoder.net, nn.Sequential) else 1.0
        self.nets = nn.ModuleList(mlp(sizes, generator, layer_norm=True) for _ in "12")

    def forward(self, features: Tensor, action: Tensor) -> Tensor:
        """Return Q_k(s, a), k = 1, 2, as [2, B], from the encoder's [B, dim] and actions [B, actions]."""
        x = torch.cat([features, self.action_scale * action], -1)
        return torch.stack([net(x).squeeze(-1) for net in self.nets])


class Reward(nn.Module):
    """Classifier of success examples; the sigmoid of its logit is the learned reward."""

    def __init__(self, encoder: Encoder, hidden_dim: int, generator: Generator):
        super().__init__()
        self.encoder = encoder
        self.net = mlp([encoder.dim, hidden_dim, hidden_dim, 1], generator)

    def forward(self, observation: Tensor) -> Tensor:
        """Return the logits [B] of observations [B, D]."""
        return self.net(self.encoder(observation)).squeeze(-1)


# ------------------------------------------------------------------------------------------------------------ losses


def reward_loss(examples: Tensor, data: Tensor, eta: float) -> Tensor:
    """Non-negative positive-unlabelled risk from the logits of success examples [num_success], and of the data [B]."""
    positive = eta * F.softplus(-examples).mean()
    negative = F.softplus(data).mean() - eta * F.softplus(examples).mean()  # data without their share of successes
    return positive + negative.clamp(min=0)  # a mean loss is never negative: noise, or eta too large


def critic_target(reward: Tensor, next_q: Tensor, discount: float) -> Tensor:
    """TD3's target [B] from rewards [B] and the target critics' Q [2, B] of what follows, at episode ends as well."""
    return reward + discount * next_q.amin(0)


def critic_loss(q: Tensor, target: Tensor) -> Tensor:
    """Squared error of both twins, Q [2, B], to the same targets [B]."""
    return ((q - target) ** 2).mean(-1).sum()


def policy_loss(q: Tensor, action: Tensor, data_action: Tensor, alpha: float) -> Tensor:
    """TD3+BC's Eq. 3, from Q_1 [B] of the policy's actions [B, actions] and the data's actions [B, actions]."""
    return -alpha * q.mean() / q.abs().mean().detach() + F.mse_loss(action, data_action)


# ----------------------------------------------------------------------------------------------------------- batches


class Batch(NamedTuple):
    observation: Tensor  # [B, ...]
    action: Tensor  # [B, actions]
    next_observation: Tensor  # [B, ...]
    examples: Tensor  # [num_success, ...], of success: all of them, shifted if the rest is
    noise: Tensor  # [B, actions], standard normal, for the target policy


def sample(transitions: common.Transitions, examples: Tensor, args: Args, generator: Generator) -> Batch:
    """Draw transitions uniformly."""
    size, device = args.batch_size, transitions.start.device
    i = torch.randint(len(transitions.start), (size,), generator=generator, device=device)
    noise = torch.randn(size, transitions.actions.shape[1], generator=generator, device=device)
    start = transitions.start[i]
    observation, following = (transitions.gather(rows, args.random_shift, generator) for rows in (start, start + 1))
    examples = common.random_shift(examples, args.random_shift, generator)
    return Batch(observation, transitions.actions[i], following, examples, noise)


# ---------------------------------------------------------------------------------------------------------- training


class Networks(nn.Module):
    """Everything that is learned, and the target networks that follow it."""

    def __init__(self, encoders: list[Encoder], action_dim: int, hidden_dim: int, generator: Generator):
        super().__init__()
        self.actor = Actor(encoders[0], action_dim, hidden_dim, generator)
        self.critic = Critic(encoders[1], action_dim, hidden_dim, generator)
        self.reward = Reward(encoders[2], hidden_dim, generator)
        self.target_actor = deepcopy(self.actor).requires_grad_(False)
        self.target_critic = deepcopy(self.critic).requires_grad_(False)


def target_action(actor: Actor, observation: Tensor, noise: Tensor, args: Args) -> Tensor:
    """Return the target policy's actions [B, actions] with TD3's clipped noise, from standard normal noise."""
    return (actor.mode(observation) + (args.policy_noise * noise).clamp(-args.noise_clip, args.noise_clip)).clamp(-1, 1)


def next_q(batch: Batch, networks: Networks, args: Args) -> Tensor:
    """Return the target critics' Q [2, B] of what follows, if the target policy acts there."""
    action = target_action(networks.target_actor, batch.next_observation, batch.noise, args)
    return networks.target_critic(networks.target_critic.encoder(batch.next_observation), action)


def update(batch: Batch, networks: Networks, optimizer: Adam, args: Args, step: int) -> None:
    """Take one gradient step of reward and critic, and after every second one a step of policy and targets."""
    optimizer.zero_grad()
    logits = networks.reward(batch.next_observation)
    reward_loss(networks.reward(batch.examples), logits, args.eta).backward()

    with torch.no_grad():
        target = critic_target(logits.sigmoid(), next_q(batch, networks, args), args.discount)
    features = networks.critic.encoder(batch.observation)
    critic_loss(networks.critic(features, batch.action), target).backward()

    if step % 2 == 1:  # the optimiser leaves networks without a gradient as they are
        action = networks.actor.mode(batch.observation)
        q = networks.critic(features.detach(), action)[0]
        loss = policy_loss(q, action, batch.action, args.alpha)
        loss.backward(inputs=list(networks.actor.parameters()))
    optimizer.step()
    if step % 2 == 1:
        targets = [*networks.target_actor.parameters(), *networks.target_critic.parameters()]
        with torch.no_grad():
            for target, parameter in zip(targets, [*networks.actor.parameters(), *networks.critic.parameters()]):
                target.lerp_(parameter, args.tau)


@torch.no_grad()
def measure(batch: Batch, networks: Networks, args: Args) -> dict[str, float]:
    """Metrics of one batch; README.md explains each."""
    logits, logits_examples = networks.reward(batch.next_observation), networks.reward(batch.examples)
    features, action = networks.critic.encoder(batch.observation), networks.actor.mode(batch.observation)
    q = networks.critic(features, batch.action)
    metrics = {
        "reward_loss": reward_loss(logits_examples, logits, args.eta),
        "critic_loss": critic_loss(q, critic_target(logits.sigmoid(), next_q(batch, networks, args), args.discount)),
        "bc_error": F.mse_loss(action, batch.action),
        "reward_examples": logits_examples.sigmoid().mean(),
        "reward_data": logits.sigmoid().mean(),
        "q_data": q.amin(0).mean(),
        "q_policy": networks.critic(features, action).amin(0).mean(),
    }
    return {name: value.item() for name, value in metrics.items()}


@torch.no_grad()
def measure_labelled(states: dict[str, Tensor], networks: Networks) -> dict[str, float]:
    """Metrics of held-out states by the labels `success`, `failure` and `start`, which the training never sees."""
    metrics = {f"reward_{label}": networks.reward(states[label]).sigmoid().mean() for label in ("success", "failure")}
    features, action = networks.critic.encoder(states["start"]), networks.actor.mode(states["start"])
    metrics["q_start"] = networks.critic(features, action).amin(0).mean()
    return {name: value.item() for name, value in metrics.items() if torch.isfinite(value)}  # none of a label: no mean


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
    common.check_range(1, np.inf, args, "num_success")
    common.check_range(1e-6, 1 - 1e-6, args, "discount")
    common.check_range(0, 1, args, "reward_learning_rate", "tau", "eta")
    common.check_range(0, np.inf, args, "alpha", "policy_noise", "noise_clip")
    data, training_episodes, heldout_episodes = run.load_data(args.num_success)
    transitions = common.Transitions(data, training_episodes, device)
    heldout = common.Transitions(data, heldout_episodes, device)
    labelled = {name: torch.from_numpy(x).to(device) for name, x in run.load_labelled(data, heldout_episodes).items()}
    examples = torch.from_numpy(data.success_examples).to(device)
    mean, std = transitions.statistics()

    seeds = run.seeds(3)
    weights_generator = Generator().manual_seed(seeds[0])  # on the CPU: the same weights on every device
    generator = Generator(device).manual_seed(seeds[1])
    log_generator = Generator(device).manual_seed(seeds[2])  # of its own: logging must not change the training
    sizes = transitions.actions.shape[1], args.hidden_dim
    encoders = [Encoder(mean, std, args.channels, weights_generator) for _ in range(3)]
    networks = Networks(encoders, *sizes, weights_generator).to(device)
    fast = [*networks.actor.parameters(), *networks.critic.parameters()]
    groups = [{"params": fast}, {"params": networks.reward.parameters()}]
    optimizer = Adam(groups, eps=1e-7, fused=True)
    parts = {"networks": networks, "optimizer": optimizer}
    batches = common.Batches(lambda: sample(transitions, examples, args, generator), generator, transitions.states)
    run.start({**parts, "batches": batches, "log_generator": log_generator})

    def evaluate_now(step: int) -> dict[str, list]:
        run.clock("evaluation")
        return run.log_evaluation(step, evaluate(networks.actor, args.env_id, args.eval_episodes, args.seed, device))

    run.clock("training")
    with common.catch_interrupt() as interrupted, run.progress:
        for step in range(run.first_step, args.gradient_steps):
            if args.eval_interval and step % args.eval_interval == 0:
                evaluate_now(step)
            for group, rate in zip(optimizer.param_groups, (args.learning_rate, args.reward_learning_rate)):
                group["lr"] = rate * (1 - step / args.gradient_steps)
            update(next(batches), networks, optimizer, args, step)
            if (step + 1) % args.log_interval == 0:
                for name, source in (("train", transitions), ("heldout", heldout)):
                    batch = sample(source, examples, args, log_generator)
                    run.log(step + 1, name, measure(batch, networks, args))
                run.log(step + 1, "heldout", measure_labelled(labelled, networks))
            run.end_step(step + 1, interrupted)
        return run.finish(evaluate_now(args.gradient_steps), networks.actor.mode)


if __name__ == "__main__":
    with common.exit_quietly():
        train(tyro.cli(Args))
