# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "numpy>=1.26", "scipy>=1.11", "gymnasium>=1.2,<2", "filelock>=3.12", "tyro>=0.9",
#     "tqdm>=4.66", "tensorboard>=2.21", "mujoco==3.3.0", "metaworld==3.1.1", "gymnasium-robotics==1.4.2", "pillow>=10"]
# ///
"""LAEO, Learning to Achieve Examples Offline: from reward-free trajectories and a few success examples to a policy.

A contrastive critic f(s, a, g) = phi(s, a)^T psi(g) learns to tell states that followed (s, a) from others; at its
optimum e^f is the discounted occupancy of g after (s, a), relative to how common g is. Its mean over success examples
is the Q-function of the policy that made the data, up to a factor. The policy maximises it, close to the data.
Equation numbers in this file are those of Hatch et al. 2023, "Contrastive Example-Based Control" (L4DC).

    python laeo.py --env-id FetchPush
    python laeo.py --env-id FetchPushImage --num-success 10

Differences from the paper and from the released code (docs/laeo.md has the reasons):
 1. Observations and success examples are standardised; images by a mean of each pixel and one deviation.
 2. The expectation over p* is over the data's states, by p*/p; for images over the examples or, if few, states near.
 3. The policy maximises log E[e^f], and clones (of states) by Q-values; in paper and code E[e^f], E[f], and all alike.
 4. log(B - 1) is added to the logits, so that f with in-batch negatives is the f of Eq. 6.
 5. Future states come at least one step after the state and at most at the episode's end, as in the code.
 6. Critic and policy are trained side by side, as in the code; narrower, on smaller batches, with a falling rate.
 7. Critic and policy share an image encoder; actions are scaled to weigh as much as all image features.
 8. The action of largest density is played; the code plays the median, tanh of the normal distribution's mean.
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Generator, Tensor, nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution
from torch.optim import Adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import common

METHOD = Path(__file__).stem
Whole, Count, Share = Annotated[int, 0, 2**32 - 1], Annotated[int, 1, 2**32 - 1], Annotated[float, 0, 1]  # bounds
Objective = Literal["auto", "weighted", "nearest", "f", "exp_f", "log_exp_f"]
DEFAULTS = {"gradient_steps": (10_000, 28_000), "batch_size": (256, 128), "random_shift": (0, 2)}  # states, images
DEFAULTS["policy_objective"] = ("weighted", "log_exp_f")
FEW, QUEUE = 10, 2048  # below so many examples of images the objective is `nearest`, with so many states of the data
README = {"FetchPush": "0.949 / 0.921", "FetchPushImage": "0.867 / 0.830", "FetchPushImageOccluded": "0.555 / 0.545"}


@dataclass
class Args:
    env_id: str = "FetchReach"  # one of the tasks in the README, or any Gymnasium id, also MODULE:ID
    quality: Literal["medium", "hard"] = "medium"  # of a task's standard dataset: 45 to 50 or 8 to 12 % succeed
    dataset: Path | None = None  # a dataset directory to use instead of datasets/ENV_ID-QUALITY
    verify: bool = False  # check the dataset's checksums, which reads all of it
    allow_version_mismatch: bool = False  # use a dataset although another version of the simulator made it
    num_success: Count = 200  # how many success examples the method sees
    gradient_steps: Annotated[int | None, 1, 2**32 - 1] = None  # of critic and policy; states 10,000, images 28,000
    batch_size: Annotated[int | None, 2, 2**32 - 1] = None  # each a negative for all; states 256, images 128
    learning_rate: Share = 1e-3  # Adam's step size for both networks at the start; it falls linearly to zero
    discount: Annotated[float, 1e-6, 1 - 1e-6] = 0.99  # of the geometric distribution that future states are drawn from
    hidden_dim: Count = 256  # width of the two hidden layers in every network
    repr_dim: Count = 64  # length of the representations phi and psi
    policy_objective: Objective = "auto"  # weighted; for images log_exp_f, or nearest if there are few examples
    nearest_share: Share = 0.2  # with `nearest`: how much of the data counts as success, that nearest to the examples
    classifier_noise: Annotated[float, 0, 1e6] = 1.0  # on states, as p*/p is learned, in deviations of the examples
    bc_coef: Share = 0.5  # lambda, the weight of behavioural cloning
    channels: Count = 16  # for images: of the first convolution; the second and the third have twice as many
    random_shift: Annotated[int | None, 0, 32] = None  # for images, 2: move them by up to so many pixels (augmentation)
    seed: Whole = 0  # of networks, batches, held-out episodes, success examples and evaluation starts
    num_threads: Count = 1  # of PyTorch on a CPU; more are faster alone, and far slower beside other busy processes
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to train; auto: on the GPU if there is one
    holdout_fraction: Annotated[float, 0, 0.9] = 0.05  # share of the episodes that is never trained on, at least one
    log_interval: Count = 500  # gradient steps between two lines of metrics
    eval_interval: Whole = 10_000  # gradient steps between two evaluations; 0: only at the end
    eval_episodes: Whole = 100  # of each evaluation, with the same starts; 0: use no environment
    checkpoint_minutes: Annotated[float, 0, 1e6] = 5.0  # of training between two checkpoints; the last step has one too
    run_dir: Path | None = None  # where results go; runs/ENV_ID__METHOD__SEED__TIME if not given
    track: bool = False  # log to Weights & Biases too; with WANDB_MODE=offline only to files in the run directory
    wandb_project: str = "example-based-control"  # with --track: the project there
    wandb_entity: str | None = None  # with --track: the user or the team there
    resume: Path | None = None  # a run directory to go on with, as if it had never stopped; it has the other flags


def mlp(sizes: list[int], generator: Generator) -> nn.Sequential:
    """Return a ReLU network with a linear last layer, Glorot-uniform weights and zero biases."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:]):
        layers += [nn.ReLU(), nn.utils.skip_init(nn.Linear, fan_in, fan_out)]  # nn.Linear draws from global state
        nn.init.xavier_uniform_(layers[-1].weight, generator=generator), nn.init.zeros_(layers[-1].bias)
    return nn.Sequential(*layers[1:])  # no activation before the first layer


class Encoder(nn.Module):
    """Standardises observations [B, D]; of images [B, H, W, C] a convolutional network then makes features."""

    def __init__(self, mean: Tensor, std: Tensor, args: Args, generator: Generator):
        super().__init__()
        self.register_buffer("observation_mean", mean.clone())
        self.register_buffer("observation_std", std.clone())
        self.net, self.dim, self.pad = nn.Identity(), mean.numel(), args.random_shift  # dim: how many features
        if mean.ndim == 3:
            (height, width, channels), a, b = mean.shape, args.channels, 2 * args.channels
            sizes = (channels, a, 8, 4, 2), (a, b, 4, 2, 1), (b, b, 3, 1, 1)  # channels, kernel, stride, padding
            convolutions = [nn.utils.skip_init(nn.Conv2d, *size) for size in sizes]
            for c in convolutions:
                nn.init.xavier_uniform_(c.weight, generator=generator), nn.init.zeros_(c.bias)
            layers, self.dim = [layer for c in convolutions for layer in (c, nn.ReLU())] + [nn.Flatten()], 8 * a
            dense = mlp([(height // 8) * (width // 8) * b, self.dim], generator)
            self.net = nn.Sequential(*layers, *dense, nn.LayerNorm(self.dim), nn.Tanh())

    def forward(self, observation: Tensor, shift: Tensor | None = None) -> Tensor:
        """Return features [B, dim] of observations; images are padded, then cut at row and column `shift` [B, 2]."""
        x = (observation - self.observation_mean).div_(self.observation_std)
        if shift is not None:  # what never moves is zero now, wherever it is moved
            i, *sizes = (torch.arange(size, device=x.device) for size in x.shape[:3])
            rows, columns = ((k + shift[:, [axis]] - self.pad).clamp(0, len(k) - 1) for axis, k in enumerate(sizes))
            pixels = (i[:, None, None] * len(sizes[0]) + rows[:, :, None]) * len(sizes[1]) + columns[:, None]
            x = x.flatten(0, 2).index_select(0, pixels.flatten()).view(x.shape)
        return self.net(x.movedim(-1, 1) if x.ndim == 4 else x)


class Actor(nn.Module):
    """Tanh-normal policy pi(a | s), in [-1, 1]; `forward`, which is exported, returns actions in their own bounds."""

    def __init__(self, encoder: Encoder, action_bounds: Tensor, hidden_dim: int, generator: Generator):
        super().__init__()
        self.register_buffer("action_bounds", action_bounds)  # [2, A]
        self.encoder, sizes = encoder, [encoder.dim, hidden_dim, hidden_dim, 2 * action_bounds.shape[1]]
        self.net = mlp(sizes, generator)

    def distribution(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, each [B, A], of the normal distribution under the tanh."""
        mean, std = self.net(features).chunk(2, -1)
        return mean, F.softplus(std) + 0.1

    def mode(self, features: Tensor) -> Tensor:
        """Return the actions [B, A], in [-1, 1], of largest density, from the encoder's features [B, dim]."""
        mean, std = self.distribution(features)
        action, slope = torch.tanh(mean), 2 * std**2  # it begins at the median, whose magnitude is smaller
        for _ in range(20):  # the density is largest where its derivative is 0: atanh(a) = mean + 2 std^2 a
            action = torch.tanh(mean + slope * action)
        return action

    def forward(self, observation: Tensor) -> Tensor:
        """Return the actions [B, A] that are played for observations [B, ...]: the mode, in their own bounds."""
        return torch.lerp(*self.action_bounds, (self.mode(self.encoder(observation)) + 1) / 2)

    def log_prob(self, mean: Tensor, std: Tensor, action: Tensor) -> Tensor:
        """Return log pi(a | s) [B] of actions [B, A], which count as 0.999 beyond: the density at 1 may be infinite."""
        policy = TransformedDistribution(Normal(mean, std, validate_args=False), TanhTransform(), validate_args=False)
        return policy.log_prob(action.clamp(-0.999, 0.999)).sum(-1)


class Critic(nn.Module):
    """Twin contrastive critics f_k(s, a, g) = phi_k(s, a)^T psi_k(g), k = 1, 2."""

    def __init__(self, encoder: Encoder, action_dim: int, hidden_dim: int, repr_dim: int, generator: Generator):
        super().__init__()
        self.encoder, sizes = encoder, [hidden_dim, hidden_dim, repr_dim]
        self.action_scale = (encoder.dim / action_dim) ** 0.5 if isinstance(encoder.net, nn.Sequential) else 1.0
        self.phi_nets = nn.ModuleList(mlp([encoder.dim + action_dim, *sizes], generator) for _ in "12")
        self.psi_nets = nn.ModuleList(mlp([encoder.dim, *sizes], generator) for _ in "12")
        self.register_buffer("queue", torch.zeros(2, QUEUE, repr_dim))  # psi of the futures of the last batches

    def phi(self, features: Tensor, action: Tensor) -> Tensor:
        """Represent state-action pairs, the encoder's [B, dim] and actions [B, A], as [2, B, repr_dim]."""
        x = torch.cat([features, self.action_scale * action], -1)
        return torch.stack([net(x) for net in self.phi_nets])

    def psi(self, features: Tensor) -> Tensor:
        """Represent future states or success examples, the encoder's [B, dim], as [2, B, repr_dim]."""
        return torch.stack([net(features) for net in self.psi_nets])


def critic_loss(phi: Tensor, psi: Tensor) -> Tensor:
    """Eq. 5 with in-batch negatives: which future psi [2, B, repr_dim] belongs to which phi [2, B, repr_dim]?"""
    logits = phi @ psi.mT  # [2, B, B]; row i: state-action i against every future state of the batch
    labels = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device).expand_as(logits)
    return F.binary_cross_entropy_with_logits(logits, labels)


def classifier_loss(examples: Tensor, data: Tensor) -> Tensor:
    """Cross-entropy from logits of success examples [num_success] and of states of the data [B]; 2 log 2 by chance."""
    return F.softplus(-examples).mean() + F.softplus(data).mean()  # alike in weight: a logit's optimum is log p*/p


def policy_value(phi: Tensor, psi: Tensor, log_ratio: Tensor, batch_size: int, objective: str) -> Tensor:
    """Value [B] of phi [2, B, repr_dim] by psi [2, N, repr_dim] of examples, `weighted` and `nearest`: of the data."""
    f = phi @ psi.mT  # [2, B, N]; log_ratio [N] is log p*(s) / p(s) of the states
    if objective in ("weighted", "nearest"):  # log of Eq. 4: the mean of Eq. 3's p*/p over the future, which e^f weighs
        return ((f + log_ratio.clamp(max=np.log(10))).logsumexp(-1) - f.logsumexp(-1)).amin(0)
    f = f.amin(0) + np.log(batch_size - 1)  # the smaller twin, which critic_loss's B makes the f of Eq. 6
    value = f.mean(-1) if objective == "f" else f.logsumexp(-1) - np.log(f.shape[-1])
    return value.exp() if objective == "exp_f" else value  # Eq. 7: Q(s, a), up to c / (1 - discount)


def value_states(psi: Tensor, log_ratio: Tensor, queue: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """Return psi and log_ratio for policy_value: of `nearest`, the queue [2, N, repr_dim], where p* is near psi."""
    if args.policy_objective == "nearest":
        distance = torch.cdist(*(x.transpose(0, 1).flatten(1) for x in (psi, queue))).amin(0)  # [N], to any example
        nearest = distance.topk(max(1, round(args.nearest_share * len(distance))), largest=False).indices
        psi, log_ratio = queue, torch.full_like(distance, -torch.inf).index_fill_(0, nearest, 0.0)
    return psi, log_ratio


def policy_loss(value: Tensor, log_prob: Tensor, advantage: Tensor, bc_coef: float) -> Tensor:
    """Eq. 8, from values [B] of the policy's actions, log pi [B] of the data's actions, and advantages [B] of these."""
    weight = advantage.exp().clamp(max=10)  # the data's Q-value in parts of the policy's
    return -(1 - bc_coef) * value.mean() - bc_coef * (weight / weight.mean() * log_prob).mean()


class Data(NamedTuple):
    observations: Tensor  # [episodes * (steps + 1), ...] the file, mapped into memory; on a GPU a copy if it fits there
    batches: common.Transitions  # what is trained on
    train: common.Transitions  # of it, as many episodes as are held out, for metrics that can be compared with these
    heldout: common.Transitions  # what is never trained on
    device: torch.device  # where batches go
    log_ratio: np.ndarray  # [episodes * (steps + 1)] log p*(s) / p(s) of every state; zeros until it is known


def load_data(args: Args, device: torch.device) -> tuple[common.Dataset, Data, Tensor, Tensor, Tensor]:
    """Set flags that are not given; return dataset, transitions, mean and deviation of observations, and examples."""
    environment = args.env_id if args.eval_episodes else None
    dataset = common.load_dataset(args.dataset, environment, args.verify, args.allow_version_mismatch)
    rng = np.random.default_rng(common.seed_sequence(args.seed, "split"))
    training, heldout, examples = common.split_dataset(dataset, args.holdout_fraction, args.num_success, rng)
    observations, image = torch.from_numpy(dataset.observations).flatten(0, 1), dataset.observations.ndim == 5
    if args.random_shift and not image:
        raise common.UserError(f"--random-shift is for images, and {args.dataset} has none; leave it out.")
    vars(args).update({name: x[image] for name, x in DEFAULTS.items() if getattr(args, name) in (None, "auto")})
    index, t = np.nonzero(np.arange(dataset.observations.shape[1]) <= dataset.lengths[training, None])
    rows = np.random.default_rng(0).permutation(training[index] * dataset.observations.shape[1] + t)
    x = observations[torch.from_numpy(rows[: 2_000 if image else 100_000])].float()
    mean, std = x.mean(0), x.std(0).clamp(min=1e-3)  # some numbers never move
    if image:
        std = (x - mean).square().mean().sqrt().expand(mean.shape)
    if device.type == "cuda" and observations.nbytes < 0.75 * torch.cuda.mem_get_info()[0]:
        observations = observations.to(device)
    uses = [common.transitions(dataset, episodes) for episodes in (training, training[: len(heldout)], heldout)]
    data = Data(observations, *uses, device, np.zeros(len(observations), np.float32))
    return dataset, data, mean, std, torch.from_numpy(examples).to(device)


class Batch(NamedTuple):
    observation: Tensor  # [B, ...]
    action: Tensor  # [B, A]
    future: Tensor  # [B, ...], drawn from the discounted future of (observation, action)
    log_ratio: Tensor  # [B] log p*(s) / p(s) of the futures
    noise: Tensor  # [B, A], standard normal, for the policy's own action
    chosen: Tensor  # [N] which success examples are used, at most a batch of them
    shifts: list  # of observations and futures, [2 B, 2], and of these success examples, [N, 2]; None without shift


def sample(data: Data, args: Args, step: int, use: str = "batches") -> Batch:
    """Draw transitions, each with a state k >= 1 steps later, P(k) ~ discount^k; data, seed and step alone decide."""
    rng = np.random.default_rng(common.seed_sequence(args.seed, "batches" if use == "batches" else "metrics", step))
    i, u = rng.integers(len(getattr(data, use).row), size=args.batch_size), rng.random(args.batch_size)
    row, remaining, _, action = (x[i] for x in getattr(data, use))
    k = 1 + (np.log1p(-u * (1 - args.discount**remaining)) / np.log(args.discount)).astype(int)  # the inverse CDF
    k = np.minimum(k, remaining)  # rounding must not cross the episode's end
    noise, sizes = rng.standard_normal(action.shape, np.float32), [2 * len(i), min(len(i), args.num_success)]
    chosen = rng.permutation(args.num_success)[: len(i)] if args.num_success > len(i) else np.arange(args.num_success)
    shifts = [rng.integers(2 * args.random_shift + 1, size=(n, 2)) if args.random_shift else None for n in sizes]
    rows = [torch.from_numpy(x).to(data.observations.device) for x in (row, row + k)]
    observation, future = (data.observations.index_select(0, x).to(data.device) for x in rows)
    arrays = action, data.log_ratio[row + k], noise, chosen, *shifts
    *tensors, shifts, examples_shift = (x if x is None else torch.from_numpy(x).to(data.device) for x in arrays)
    return Batch(observation, tensors[0], future, *tensors[1:], [shifts, examples_shift])


def fit_log_ratio(encoder: Encoder, data: Data, examples: Tensor, args: Args, generator: Generator) -> np.ndarray:
    """Learn log p*(s) / p(s), Eq. 3's reward, from examples and states of the data; return it for every state."""
    classifier = nn.Sequential(encoder, mlp([encoder.dim, 64, 64, 1], generator), nn.Flatten(0)).to(data.device)
    optimizer, std = Adam(classifier.parameters(), 1e-3), encoder.observation_std
    # a bandwidth for each number: the examples' deviation, which of few is uncertain; a single one gets the data's
    variance = examples.float().var(0, correction=0) + (std / len(examples)) ** 2
    noise = args.classifier_noise * torch.minimum(variance.sqrt(), std)
    for step in tqdm(range(1_000), "p*/p", mininterval=1):
        states = examples, sample(data, args, step).observation
        noised = [x + noise * torch.randn(x.shape, generator=generator).to(data.device) for x in states]
        optimizer.zero_grad()
        classifier_loss(*map(classifier, noised)).backward()
        optimizer.step()
    return torch.cat([classifier(x.to(data.device)).detach().cpu() for x in data.observations.split(1024)]).numpy()


def update(batch: Batch, examples: Tensor, actor: Actor, critic: Critic, optimizer: Adam, args: Args) -> None:
    """Take one gradient step of both networks, from the same batch and the same parameters."""
    optimizer.zero_grad()
    features, future = critic.encoder(torch.cat([batch.observation, batch.future]), batch.shifts[0]).chunk(2)
    phi, psi, weighted = critic.phi(features, batch.action), critic.psi(future), args.policy_objective == "weighted"
    mean, std = actor.distribution(features)
    action = torch.tanh(mean + std * batch.noise)
    with torch.no_grad():
        goals = psi if weighted else critic.psi(critic.encoder(examples[batch.chosen], batch.shifts[1]))
        states = *value_states(goals.detach(), batch.log_ratio, critic.queue, args), len(action), args.policy_objective
        if args.policy_objective == "nearest":  # only now, so that no state meets its own future
            critic.queue = torch.cat([critic.queue, psi], 1)[:, -QUEUE:].contiguous()
    critic.requires_grad_(False)  # the value's gradient passes through the critic and changes nothing there
    value = policy_value(critic.phi(features.detach(), action), *states)
    critic.requires_grad_(True)
    advantage = policy_value(phi.detach(), *states) - value.detach() if weighted else torch.zeros_like(value)
    loss = policy_loss(value, actor.log_prob(mean, std, batch.action), advantage, args.bc_coef)
    (critic_loss(phi, psi) + loss).backward()
    optimizer.step()


@torch.no_grad()
def measure(batch: Batch, examples: Tensor, actor: Actor, critic: Critic, args: Args) -> dict[str, float]:
    """Return metrics of one batch, without the random shift; docs/laeo.md explains each."""
    features, psi = critic.encoder(batch.observation), critic.psi(critic.encoder(batch.future))
    phi, size = critic.phi(features, batch.action), len(batch.action)
    logits, goals = phi @ psi.mT, psi if args.policy_objective == "weighted" else critic.psi(critic.encoder(examples))
    settings = *value_states(goals, batch.log_ratio, critic.queue, args), args.batch_size, args.policy_objective
    positives, (mean, std) = logits.diagonal(dim1=1, dim2=2), actor.distribution(features)
    metrics = {
        "critic_loss": critic_loss(phi, psi),
        "categorical_accuracy": (logits.argmax(-1) == torch.arange(size, device=logits.device)).float().mean(),
        "logits_positive": positives.mean(),
        "logits_negative": (logits.sum() - positives.sum()) / (2 * size * (size - 1)),
        "bc_loss": -actor.log_prob(mean, std, batch.action).mean(),
        "value_data": policy_value(phi, *settings).mean(),
        "value_policy": policy_value(critic.phi(features, actor.mode(features)), *settings).mean(),
        "policy_std": std.mean(),
    }
    return {name: value.item() for name, value in metrics.items()}


@torch.inference_mode()
def evaluate(policy: nn.Module, env_id: str, episodes: int, seed: int, device: torch.device) -> dict[str, Any]:
    """Play episodes in an environment of their own; return what docs/training.md explains, and each one's outcome."""
    env, known, solved, lists = common.make_env(env_id), {}, [], {"seed": [], "episode": [], "return": []}
    for i in range(episodes):
        lists["seed"].append(common.episode_seed(seed, "evaluation", i))
        observation, info = env.reset(seed=lists["seed"][-1])
        first, infos, total, done = np.array(observation), [info], 0.0, False
        while not done:
            x = torch.from_numpy(np.asarray(observation, np.float32)[None]).to(device)
            observation, reward, terminated, truncated, info = env.step(policy(x)[0].cpu().numpy())
            infos.append(info)
            total, done = total + float(reward), terminated or truncated
        key = first.tobytes(), np.asarray(observation).tobytes(), len(infos)
        lists["episode"].append(known.setdefault(key, len(known)))
        lists["return"].append(total)
        solved.append([info.get("success", info.get("is_success")) for info in infos])
    env.close()
    lists |= common.success_lists(solved)
    return common.summarise(lists) | {"episodes": lists}


def load_checkpoint(args: Args) -> tuple[dict[str, Any], Args]:
    """Return the checkpoint of the run to go on with, and its flags. Raises common.UserError if that cannot be done."""
    path, given = args.resume / "checkpoint.pt", {f.name for f in fields(Args) if getattr(args, f.name) != f.default}
    if __name__ == "__main__":  # a flag that was given counts even if its value is the default
        given |= {flag[2:].split("=")[0].replace("-", "_") for flag in sys.argv if flag.startswith("--")}
    if given := given - {"resume", "dataset"}:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(given))
        raise common.UserError(f"--resume keeps its run's flags: the learning rate falls over its steps; drop {names}.")
    try:
        checkpoint = torch.load(common.intact(path), weights_only=True, map_location="cpu")
        flags = {**checkpoint["args"], "run_dir": args.resume}
        if checkpoint["method"] != METHOD or not 0 < checkpoint["step"] <= flags["gradient_steps"]:
            raise ValueError(f"it is a run of {checkpoint['method']}.py at step {checkpoint['step']}")
        float(checkpoint["log_size"]), [float(checkpoint["seconds"][x]) for x in ("data", "training", "evaluation")]
        return checkpoint, Args(**{**flags, "dataset": args.dataset or Path(flags["dataset"])})
    except Exception as error:  # torch.load raises half a dozen types for a damaged file
        reason = f"{args.resume} cannot be resumed ({common.first_line(error)})"
        raise common.UserError(f"{reason}; if it was stopped before its first checkpoint, start anew.") from None


def train(args: Args) -> dict[str, Any]:
    """Train, evaluate, write policy.pt2 and result.json, return the latter. Raises common.UserError for a mistake."""
    started, (checkpoint, args) = time.perf_counter(), load_checkpoint(args) if args.resume else ({}, replace(args))
    common.check_flags(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise common.UserError("--device is cuda, and PyTorch finds no GPU here; leave it out to train on the CPU.")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.num_threads)
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")  # high: TF32, as convolutions
    args.dataset = common.find_dataset(args.env_id, args.quality, args.dataset)
    few = args.policy_objective == "auto" and args.num_success < FEW
    dataset, data, mean, std, examples = load_data(args, device)
    args.policy_objective = "nearest" if few and mean.ndim == 3 else args.policy_objective
    if args.policy_objective == "weighted" and mean.ndim == 3:
        raise common.UserError("--policy-objective weighted is for states, and these are images; leave it out.")
    generator = Generator().manual_seed(int(common.seed_sequence(args.seed, "weights").generate_state(1)[0]))
    bounds, encoder = torch.from_numpy(dataset.action_bounds), Encoder(mean, std, args, generator)
    actor = Actor(encoder, bounds, args.hidden_dim, generator).to(device)
    critic = Critic(encoder, bounds.shape[1], args.hidden_dim, args.repr_dim, generator).to(device)
    optimizer = Adam(nn.ModuleList([actor, critic]).parameters(), args.learning_rate, eps=1e-7, fused=True)
    parts, first_step = {"actor": actor, "critic": critic, "optimizer": optimizer}, checkpoint.get("step", 0)
    try:
        for name, part in parts.items() if checkpoint else ():
            part.load_state_dict(checkpoint[name])
        if checkpoint and checkpoint["dataset"] != dataset.checksum:
            raise ValueError("its dataset was another one")
    except Exception as error:  # of half a dozen types
        raise common.UserError(f"{args.run_dir} cannot be resumed ({common.first_line(error)}); start anew.") from None

    name = f"{args.env_id.replace('/', '-').replace(':', '-')}__{METHOD}__{args.seed}__{time.time_ns()}"
    args.run_dir = args.run_dir or Path("runs") / name
    path = args.run_dir / "metrics.jsonl"
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    with common.explain_os_errors(args.run_dir):
        args.run_dir.mkdir(parents=True, exist_ok=True)
        if path.exists() and not checkpoint:
            raise common.UserError(f"{args.run_dir} holds a run; choose another --run-dir, or --resume that one.")
        tracker = import_module("tracking").start(args, plain, checkpoint.get("track")) if args.track else nullcontext()
        with open(path, "ab" if checkpoint else "xb") as file:  # what came after the checkpoint is written again
            file.truncate(min(checkpoint.get("log_size", 0), file.tell()))
        writer = SummaryWriter(args.run_dir, purge_step=first_step + 1)
    if args.policy_objective == "weighted":  # on resuming the same is learned again
        data = data._replace(log_ratio=fit_log_ratio(encoder, data, examples, args, generator))
    seconds = checkpoint.get("seconds", {"data": 0.0, "training": 0.0, "evaluation": 0.0})
    title = f"{METHOD} on {args.env_id}" + (f" (README, default flags: {x})" if (x := README.get(args.env_id)) else "")
    progress = tqdm(desc=title, initial=first_step, total=args.gradient_steps, mininterval=1)

    def spend(kind: str) -> None:
        nonlocal started
        seconds[kind], started = seconds[kind] + time.perf_counter() - started, time.perf_counter()

    def log(step: int, prefix: str, metrics: dict[str, float]) -> None:
        line = {f"{prefix}/{name}": value for name, value in metrics.items()}
        with common.explain_os_errors(path), open(path, "a") as file:
            for name, value in line.items():
                if not np.isfinite(value):
                    raise common.UserError(f"{name} is {value} at step {step}; try a smaller --learning-rate.")
                writer.add_scalar(name, value, step)
            file.write(json.dumps({"step": step} | line) + "\n")
        if args.track:
            tracker.log(line, step)

    def evaluate_now(step: int) -> dict[str, Any]:
        spend("training")
        results = evaluate(actor, args.env_id, args.eval_episodes, args.seed, device)
        log(step, "eval", {name: x for name, x in sorted(results.items()) if isinstance(x, float)})
        spend("evaluation")
        return results

    def save(step: int) -> None:
        spend("training")
        writer.flush()  # a resumed run writes only what follows
        content = {name: part.state_dict() for name, part in parts.items()} | {"step": step, "method": METHOD}
        content |= {"args": plain, "dataset": dataset.checksum, "seconds": seconds, "log_size": path.stat().st_size}
        content["track"] = tracker.id if args.track else None  # of the run on Weights & Biases
        moments = [moment for state in optimizer.state.values() for moment in state.values()]
        if not all(torch.isfinite(x).all() for x in [*actor.parameters(), *critic.parameters(), *moments]):
            raise common.UserError(f"the networks are not finite at step {step}; try a smaller --learning-rate.")
        with common.write_file(args.run_dir / "checkpoint.pt") as file:
            torch.save(content, file)

    spend("data")
    saved = time.monotonic()
    with common.explain_os_errors(args.run_dir), writer, progress, tracker, ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(sample, data, args, first_step)  # the next batch is drawn while this one is trained on
        for step in range(first_step, args.gradient_steps):
            if args.eval_episodes and args.eval_interval and step % args.eval_interval == 0:
                evaluate_now(step)
            batch, ahead = ahead.result(), thread.submit(sample, data, args, step + 1)
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - step / args.gradient_steps)
            update(batch, examples, actor, critic, optimizer, args)
            progress.update()
            for name in ("train", "heldout") if (step + 1) % args.log_interval == 0 else ():
                log(step + 1, name, measure(sample(data, args, step + 1, name), examples, actor, critic, args))
            if step + 1 == args.gradient_steps or time.monotonic() - saved > 60 * args.checkpoint_minutes:
                save(step + 1)
                saved = time.monotonic()
        result = evaluate_now(args.gradient_steps) if args.eval_episodes else {}

    inputs, batch = (torch.from_numpy(np.zeros_like(dataset.observations[:2, 0])),), torch.export.Dim("batch")
    export = torch.export.export, actor.cpu().requires_grad_(False), inputs
    program = ThreadPoolExecutor(1).submit(*export, dynamic_shapes=({0: batch},)).result()  # no signal is handled there
    with common.write_file(args.run_dir / "policy.pt2") as file:
        torch.export.save(program, file)
    result |= {"method": METHOD, "args": plain, "dataset": dataset.checksum, "seconds": seconds}
    result |= {"versions": common.versions("torch", "numpy", "gymnasium", "mujoco", "gymnasium-robotics", "metaworld")}
    if device.type == "cuda":
        result |= {"gpu": torch.cuda.get_device_name(), "peak_gpu_bytes": torch.cuda.max_memory_allocated()}
    with common.write_file(args.run_dir / "result.json") as file:
        file.write(json.dumps(result, indent=2).encode())
    means = ", ".join(f"{name} {x:.3f}" for name, x in sorted(result.items()) if isinstance(x, float))
    print(f"{args.run_dir}: {means}{'' if 'success_rate' in result else ' (success was not measured)'}")
    return result


if __name__ == "__main__":
    with common.user_errors("interrupted; --resume RUN_DIR goes on from the last checkpoint."):
        train(tyro.cli(Args))
