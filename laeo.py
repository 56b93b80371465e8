"""LAEO, Learning to Achieve Examples Offline: from reward-free trajectories and a few success examples to a policy.

A contrastive critic f(s, a, g) = phi(s, a)^T psi(g) learns to tell states that followed (s, a) from those that did
not; at its optimum e^f is the discounted occupancy of g after (s, a), relative to how common g is. Averaged over
success examples, e^f is the Q-function of the policy that made the data, up to a constant factor. The policy maximises
it, held close to the data by a behavioural-cloning term.

Hatch et al. 2023, "Contrastive Example-Based Control" (L4DC); equation numbers in this file are that paper's.

    python laeo.py --env-id FetchReach --gradient-steps 3000
    python laeo.py --env-id FetchPush --num-success 10

Differences from the paper and from the released code, each with its reason:
 1. Observations, and success examples with them, are standardised with the mean and the standard deviation of the
    training episodes. Neither the paper nor the code does; nothing else is worth as much on FetchPush.
 2. The expectation over the success examples is exact: psi is evaluated on all of them at every step. The code draws
    one example for each state, which is noisier and, in a batch, dearer.
 3. The policy's objective and its weight are flags. The paper maximises E[e^f] with bc_coef 0.05; the code E[f] with
    0.5. The default, the logarithm of E[e^f] with 0.2, comes from sweeps of one seed on earlier data, where E[f] made
    policies that pass through the goal; the comparison with the present data is still to be run (README.md). From
    images it is 0.5: a policy that sees less clearly has to stay closer to what it has seen.
 4. In-batch negatives stand one positive against B - 1 negatives, as in the code, where Eq. 5 weighs both alike. The
    optimum of the logits is then f - log(B - 1); log(B - 1) is added back, so that f is the f of Eq. 6.
 5. Future states come at least one step after the state and at most at the episode's end, as in the code; the sums of
    Eq. 4 begin at the state itself and never end.
 6. Critic and policy are trained side by side, as in the code; Algorithm 1 fits the critic first.
 7. Networks are narrower, batches smaller and training shorter than the paper's 1024 x 2, batch 1024 and 500,000 steps,
    to fit two cores. The learning rate starts higher, 1e-3 instead of 3e-4, and falls linearly to zero: at a constant
    one, the success of one run fell from 0.90 to 0.80 between 5,000 and 10,000 steps.
 8. No target network: the code keeps one and never reads it.
 9. Success examples are drawn with the run's seed; the code's choice depended on which thread came first.
10. Success is measured on 100 episodes with fixed seeds, played by the final policy. The code reports a running mean
    over whatever episodes a parallel evaluator had finished.
11. Images are standardised as well, with a mean of each pixel and one standard deviation, where the code divides by
    255: what never moves drops out. The convolutions are the code's, half as wide; the critic has one encoder, for
    states, futures and examples and for both twins, and the policy one of its own, as in the code.
12. Beside the features of an image, actions are scaled until they weigh as much as all of these in the critic's first
    layer. There are thousands of features, and without the scale the critic is slow to tell one action from another,
    which its loss does not show.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Generator, Tensor, nn

import common


@dataclass
class Args(common.RunArgs):
    num_success: int = 200
    """how many success examples the method sees"""
    gradient_steps: int = 20_000
    """training steps of critic and policy"""
    batch_size: int = 256
    """transitions in a batch; each one's future state is a negative for all others"""
    learning_rate: float = 1e-3
    """Adam's step size for both networks at the start; it falls linearly to zero"""
    discount: float = 0.99
    """of the geometric law that future states are drawn from; smaller looks less far ahead"""
    hidden_dim: int = 256
    """width of the two hidden layers in every network"""
    repr_dim: int = 64
    """length of the representations phi and psi"""
    policy_objective: Literal["f", "exp_f", "log_exp_f"] = "log_exp_f"
    """what the policy maximises: the mean over the success examples of f or of e^f (the paper), or the latter's log"""
    bc_coef: float | None = None
    """lambda, the weight of behavioural cloning; its complement weighs the value; if not given 0.2, for images 0.5"""


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


class Critic(nn.Module):
    """Twin contrastive critics f_k(s, a, g) = phi_k(s, a)^T psi_k(g), k = 1, 2."""

    def __init__(self, encoder: Encoder, action_dim: int, hidden_dim: int, repr_dim: int, generator: Generator):
        super().__init__()
        self.encoder, sizes = encoder, [hidden_dim, hidden_dim, repr_dim]
        self.action_scale = (encoder.dim / action_dim) ** 0.5 if isinstance(encoder.net, nn.Sequential) else 1.0
        self.phi_nets = nn.ModuleList(mlp([encoder.dim + action_dim, *sizes], generator) for _ in "12")
        self.psi_nets = nn.ModuleList(mlp([encoder.dim, *sizes], generator) for _ in "12")

    def phi(self, features: Tensor, action: Tensor) -> Tensor:
        """Represent state-action pairs, the encoder's [B, dim] and [B, actions], as [2, B, repr_dim]."""
        x = torch.cat([features, self.action_scale * action], -1)
        return torch.stack([net(x) for net in self.phi_nets])

    def psi(self, features: Tensor) -> Tensor:
        """Represent future states or success examples, the encoder's [B, dim], as [2, B, repr_dim]."""
        return torch.stack([net(features) for net in self.psi_nets])


# ------------------------------------------------------------------------------------------------------------ losses


def critic_loss(phi: Tensor, psi: Tensor) -> Tensor:
    """Eq. 5 with in-batch negatives: which future psi [2, B, repr_dim] belongs to which phi [2, B, repr_dim]?"""
    logits = phi @ psi.mT  # [2, B, B]; row i: state-action i against every future state of the batch
    labels = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device).expand_as(logits)
    return F.binary_cross_entropy_with_logits(logits, labels)


def policy_value(phi: Tensor, psi_examples: Tensor, batch_size: int, objective: str) -> Tensor:
    """Value [B] of state-actions phi [2, B, repr_dim] under all success examples [2, num_success, repr_dim].

    `batch_size` is the one of the critic's loss: log(batch_size - 1) turns its logits into the f of Eq. 6.
    """
    f = (phi @ psi_examples.mT).amin(0) + np.log(batch_size - 1)  # [B, num_success]; the less hopeful of the twins
    if objective == "f":
        return f.mean(-1)
    if objective == "exp_f":
        return f.exp().mean(-1)  # Eq. 7: Q(s, a), up to c / (1 - discount)
    return f.logsumexp(-1) - np.log(f.shape[-1])


def policy_loss(value: Tensor, log_prob: Tensor, bc_coef: float) -> Tensor:
    """Eq. 8, from values [B] of the policy's own actions and log-probabilities [B] of the data's actions."""
    return -(1 - bc_coef) * value.mean() - bc_coef * log_prob.mean()


# ----------------------------------------------------------------------------------------------------------- batches


class Batch(NamedTuple):
    observation: Tensor  # [B, ...]
    action: Tensor  # [B, actions]
    future: Tensor  # [B, ...], drawn from the discounted future of (observation, action)
    noise: Tensor  # [B, actions], standard normal, for the policy's own action


def sample(transitions: common.Transitions, args: Args, generator: Generator) -> Batch:
    """Draw transitions uniformly, and for each a state k >= 1 steps later with P(k) proportional to discount^k."""
    size, discount, device = args.batch_size, args.discount, transitions.start.device
    i = torch.randint(len(transitions.start), (size,), generator=generator, device=device)
    u = torch.rand(size, generator=generator, device=device, dtype=torch.float64)
    noise = torch.randn(size, transitions.actions.shape[1], generator=generator, device=device)
    start, remaining = transitions.start[i], transitions.remaining[i]
    k = 1 + (torch.log1p(-u * (1 - discount**remaining)) / np.log(discount)).long()  # inverse distribution function
    k = torch.minimum(k, remaining)  # rounding must not cross the episode's end
    observation, future = (transitions.gather(rows, args.random_shift, generator) for rows in (start, start + k))
    return Batch(observation, transitions.actions[i], future, noise)


# ---------------------------------------------------------------------------------------------------------- training


def update(
    batch: Batch, examples: Tensor, actor: Actor, critic: Critic, optimizer: torch.optim.Optimizer, args: Args
) -> None:
    """Take one gradient step of both networks, from the same batch and the same parameters."""
    optimizer.zero_grad()
    features = critic.encoder(batch.observation)
    loss = critic_loss(critic.phi(features, batch.action), critic.psi(critic.encoder(batch.future)))
    loss.backward(inputs=list(critic.parameters()))

    mean, std = actor(batch.observation)
    action = torch.tanh(mean + std * batch.noise)
    with torch.no_grad():
        psi_examples = critic.psi(critic.encoder(examples))
    value = policy_value(critic.phi(features.detach(), action), psi_examples, len(action), args.policy_objective)
    loss = policy_loss(value, actor.log_prob(mean, std, batch.action), args.bc_coef)
    loss.backward(inputs=list(actor.parameters()))  # the value's gradient passes through the critic without a trace
    optimizer.step()


@torch.no_grad()
def measure(batch: Batch, examples: Tensor, actor: Actor, critic: Critic, args: Args) -> dict[str, float]:
    """Metrics of one batch; README.md explains each."""
    features, psi_examples = critic.encoder(batch.observation), critic.psi(critic.encoder(examples))
    phi, psi = critic.phi(features, batch.action), critic.psi(critic.encoder(batch.future))
    logits = phi @ psi.mT
    positives, size = logits.diagonal(dim1=1, dim2=2), len(batch.action)
    rows = torch.arange(size, device=logits.device)
    mean, std = actor(batch.observation)
    bc_loss = -actor.log_prob(mean, std, batch.action).mean()
    value_data = policy_value(phi, psi_examples, args.batch_size, args.policy_objective).mean()
    phi_policy = critic.phi(features, torch.tanh(mean))
    value_policy = policy_value(phi_policy, psi_examples, args.batch_size, args.policy_objective).mean()
    metrics = {
        "critic_loss": critic_loss(phi, psi),
        "categorical_accuracy": (logits.argmax(-1) == rows).float().mean(),
        "logits_positive": positives.mean(),
        "logits_negative": (logits.sum() - positives.sum()) / (2 * size * (size - 1)),
        "bc_loss": bc_loss,
        "value_data": value_data,
        "value_policy": value_policy,
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
    common.check_range(1, np.inf, args, "num_success", "repr_dim")
    common.check_range(1e-6, 1 - 1e-6, args, "discount")
    if args.bc_coef is None:
        args.bc_coef = 0.5 if common.find_task(args.env_id).state_task else 0.2
    common.check_range(0, 1, args, "bc_coef")
    data, training_episodes, heldout_episodes = run.load_data(args.num_success)
    transitions = common.Transitions(data, training_episodes, device)
    heldout = common.Transitions(data, heldout_episodes, device)
    examples = torch.from_numpy(data.success_examples).to(device)
    mean, std = transitions.statistics()

    seeds = run.seeds(3)
    weights_generator = Generator().manual_seed(seeds[0])  # on the CPU: the same weights on every device
    generator = Generator(device).manual_seed(seeds[1])
    log_generator = Generator(device).manual_seed(seeds[2])  # of its own: logging must not change the training
    sizes = transitions.actions.shape[1], args.hidden_dim
    encoders = [Encoder(mean, std, args.channels, weights_generator) for _ in range(2)]
    actor = Actor(encoders[0], *sizes, weights_generator).to(device)
    critic = Critic(encoders[1], *sizes, args.repr_dim, weights_generator).to(device)
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], args.learning_rate, eps=1e-7, fused=True)
    parts = {"actor": actor, "critic": critic, "optimizer": optimizer}
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
            update(next(batches), examples, actor, critic, optimizer, args)
            if (step + 1) % args.log_interval == 0:
                for name, source in (("train", transitions), ("heldout", heldout)):
                    batch = sample(source, args, log_generator)
                    run.log(step + 1, name, measure(batch, examples, actor, critic, args))
            run.end_step(step + 1, interrupted)
        return run.finish(evaluate_now(args.gradient_steps), actor.mode)


if __name__ == "__main__":
    with common.exit_quietly():
        train(tyro.cli(Args))
