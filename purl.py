# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "numpy>=1.26", "scipy>=1.11", "gymnasium>=1.2,<2", "filelock>=3.12", "tyro>=0.9",
#     "tqdm>=4.66", "tensorboard>=2.21", "mujoco==3.3.0", "metaworld==3.1.1", "gymnasium-robotics==1.4.2", "pillow>=10"]
# ///
"""PURL: learn a reward from a few success examples, knowing that the data hold more of them, then a policy from it.

A classifier learns to tell success examples from the states of the trajectories, a share eta of which are successes
that nobody marked; its probability is the reward of arriving in a state. TD3+BC, offline reinforcement learning by
temporal differences, learns that reward's Q-function and a policy that maximises it, held close to the data.
Xu and Denil 2019, with Kiryo et al. 2017's non-negative risk; TD3+BC is Fujimoto and Gu 2021. ORIL has another loss.

    python purl.py --env-id FetchReach --gradient-steps 10000
    python purl.py --env-id FetchPushImage

Differences from the LAEO paper's baseline (Hatch et al. 2023) and its released code (docs/purl.md has the reasons):
 1. The risk on negatives is never below zero; the code's loss falls without bound as the examples' logits grow.
 2. Reward of the state arrived in, examples, policy, target networks, sizes: as oril.py's differences 1 to 6 say.
 3. alpha is 10, against a likelihood, and eta 0.3; the code has 0.5, against a squared error, and 0.5.
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from copy import deepcopy
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
DEFAULTS = {"gradient_steps": (20_000, 28_000), "batch_size": (256, 128), "random_shift": (0, 2)}  # states, images
README = {"FetchPush": "0.940 / 0.925", "FetchPushImage": "0.650 / 0.510", "FetchPushImageOccluded": "0.190 / 0.170"}


@dataclass
class Args:
    env_id: str = "FetchReach"  # one of the tasks in the README, or any Gymnasium id, also MODULE:ID
    quality: Literal["medium", "hard"] = "medium"  # of a task's standard dataset: 45 to 50 or 8 to 12 % succeed
    dataset: Path | None = None  # a dataset directory to use instead of datasets/ENV_ID-QUALITY
    verify: bool = False  # check the dataset's checksums, which reads all of it
    allow_version_mismatch: bool = False  # use a dataset although another version of the simulator made it
    num_success: Count = 200  # how many success examples the method sees
    gradient_steps: Annotated[int | None, 1, 2**32 - 1] = None  # of reward and critic; states 20,000, images 28,000
    batch_size: Annotated[int | None, 2, 2**32 - 1] = None  # transitions in a batch; states 256, images 128
    learning_rate: Share = 1e-3  # Adam's step size for critic and policy at the start; it falls linearly to zero
    reward_learning_rate: Share = 1e-4  # the same for the reward network
    reward: Literal["learned", "true"] = "learned"  # true: an oracle, TD3+BC on the success flags of all states
    discount: Annotated[float, 1e-6, 1 - 1e-6] = 0.99  # how much a reward one step later counts
    hidden_dim: Count = 256  # width of the two hidden layers in every network
    eta: Share = 0.3  # prior: the share of the data's states that is taken to be successes
    policy_frequency: Count = 2  # policy and target networks move in one of so many steps; TD3's delay is 2
    alpha: Annotated[float, 0, 1e6] = 10.0  # weight of the normalised Q-value against cloning in the policy's loss
    tau: Share = 0.005  # share of the way that target networks go at each of the policy's steps
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


def mlp(sizes: list[int], generator: Generator, layer_norm: bool = False) -> nn.Sequential:
    """Return a ReLU network with a linear last layer, Glorot-uniform weights and zero biases."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:]):
        hidden = [nn.LayerNorm(fan_in), nn.ReLU()] if layer_norm else [nn.ReLU()]
        layers += [*hidden, nn.utils.skip_init(nn.Linear, fan_in, fan_out)]  # nn.Linear draws from global state
        nn.init.xavier_uniform_(layers[-1].weight, generator=generator), nn.init.zeros_(layers[-1].bias)
    return nn.Sequential(*layers[len(hidden) :])  # no activation before the first layer


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
    """Twin Q-functions. Layer normalisation keeps their values from growing where no data are."""

    def __init__(self, encoder: Encoder, action_dim: int, hidden_dim: int, generator: Generator):
        super().__init__()
        self.encoder, sizes = encoder, [encoder.dim + action_dim, hidden_dim, hidden_dim, 1]
        self.action_scale = (encoder.dim / action_dim) ** 0.5 if isinstance(encoder.net, nn.Sequential) else 1.0
        self.nets = nn.ModuleList(mlp(sizes, generator, layer_norm=True) for _ in "12")

    def forward(self, features: Tensor, action: Tensor) -> Tensor:
        """Return Q_k(s, a), k = 1, 2, as [2, B], from the encoder's [B, dim] and actions [B, A]."""
        x = torch.cat([features, self.action_scale * action], -1)
        return torch.stack([net(x).squeeze(-1) for net in self.nets])


class Reward(nn.Module):
    """Classifier of success examples; the sigmoid of its logit is the learned reward."""

    def __init__(self, encoder: Encoder, hidden_dim: int, generator: Generator):
        super().__init__()
        self.encoder, self.net = encoder, mlp([encoder.dim, hidden_dim, hidden_dim, 1], generator)

    def forward(self, observation: Tensor, shift: Tensor | None = None) -> Tensor:
        """Return the logits [B] of observations [B, ...]."""
        return self.net(self.encoder(observation, shift)).squeeze(-1)


class Networks(nn.Module):
    """Everything that is learned, and the target networks that follow it."""

    def __init__(self, encoders: list[Encoder], action_bounds: Tensor, hidden_dim: int, generator: Generator):
        super().__init__()
        self.actor = Actor(encoders[0], action_bounds, hidden_dim, generator)
        self.critic = Critic(encoders[0], action_bounds.shape[1], hidden_dim, generator)
        self.reward = Reward(encoders[1], hidden_dim, generator)
        self.targets = deepcopy(nn.ModuleDict({"actor": self.actor, "critic": self.critic})).requires_grad_(False)


def reward_loss(examples: Tensor, data: Tensor, eta: float) -> Tensor:
    """Non-negative positive-unlabelled risk from the logits of success examples [num_success], and of the data [B]."""
    negative = F.softplus(data).mean() - eta * F.softplus(examples).mean()  # data without their share of successes
    return eta * F.softplus(-examples).mean() + negative.clamp(min=0)  # what it estimates is never negative


def critic_loss(q: Tensor, reward: Tensor, terminal: Tensor, next_q: Tensor, discount: float) -> Tensor:
    """Squared error of Q [2, B] to TD3's target, from rewards [B], true ends [B] (0 or 1) and target Q [2, B] after."""
    target = reward + discount * (1 - terminal) * next_q.amin(0)
    return ((q - target) ** 2).mean(-1).sum()


def policy_loss(q: Tensor, log_prob: Tensor, alpha: float) -> Tensor:
    """TD3+BC's Eq. 3, from Q_1 [B] of the policy's actions; it clones by log pi [B] of the data's actions."""
    return -alpha * q.mean() / q.abs().mean().detach() - log_prob.mean()


class Data(NamedTuple):
    observations: Tensor  # [episodes * (steps + 1), ...] the file, mapped into memory; on a GPU a copy if it fits there
    batches: common.Transitions  # what is trained on
    train: common.Transitions  # of it, as many episodes as are held out, for metrics that can be compared with these
    heldout: common.Transitions  # what is never trained on
    device: torch.device  # where batches go
    solved: np.ndarray | None = None  # [episodes * (steps + 1)] success flags of the states; for the oracle alone


def load_data(args: Args, device: torch.device) -> tuple:
    """Set flags that are not given; return dataset, transitions, mean and deviation, examples, states by label."""
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
    labelled = common.load_labelled(args.dataset, dataset, heldout).items()
    labelled = {label: torch.from_numpy(x).to(device) for label, x in labelled if len(x)}
    flags = common.load_array(args.dataset / "successes.npy", "|b1").ravel() if args.reward == "true" else None
    return dataset, Data(observations, *uses, device, flags), mean, std, torch.from_numpy(examples).to(device), labelled


class Batch(NamedTuple):
    observation: Tensor  # [B, ...]
    action: Tensor  # [B, A]
    next_observation: Tensor  # [B, ...]
    terminal: Tensor  # [B], 1 where the episode truly ends, else 0
    noise: Tensor  # [B, A], standard normal, for the actions of policy and target policy
    chosen: Tensor  # [N] which success examples are used, at most a batch of them
    shifts: list  # of observations, next observations and these success examples, [B, 2], [B, 2] and [N, 2], or None
    solved: Tensor | None = None  # [B], success flags of the next observations; for the oracle alone


def sample(data: Data, args: Args, step: int, use: str = "batches") -> Batch:
    """Draw transitions uniformly. The batch depends on the data, the seed and the step alone."""
    rng = np.random.default_rng(common.seed_sequence(args.seed, "batches" if use == "batches" else "metrics", step))
    i = rng.integers(len(getattr(data, use).row), size=args.batch_size)
    row, _, terminal, action = (x[i] for x in getattr(data, use))
    noise, sizes = rng.standard_normal(action.shape, np.float32), [len(i), len(i), min(len(i), args.num_success)]
    chosen = rng.permutation(args.num_success)[: len(i)] if args.num_success > len(i) else np.arange(args.num_success)
    shifts = [rng.integers(2 * args.random_shift + 1, size=(n, 2)) if args.random_shift else None for n in sizes]
    rows = [torch.from_numpy(x).to(data.observations.device) for x in (row, row + 1)]
    observation, following = (data.observations.index_select(0, x).to(data.device) for x in rows)
    arrays = action, terminal, noise, chosen, *shifts, data.solved if data.solved is None else data.solved[row + 1]
    action, *tensors = (x if x is None else torch.from_numpy(x).to(data.device) for x in arrays)
    return Batch(observation, action, following, *tensors[:3], tensors[3:6], tensors[6])


@torch.no_grad()
def next_q(batch: Batch, networks: Networks, shift: Tensor | None) -> Tensor:
    """Return the target critics' Q [2, B] of what follows, with TD3's clipped noise on the target policy's mode."""
    targets, noise = networks.targets, (0.2 * batch.noise).clamp(-0.5, 0.5)
    features = targets.critic.encoder(batch.next_observation, shift)
    return targets.critic(features, (targets.actor.mode(features) + noise).clamp(-1, 1))


def update(batch: Batch, examples: Tensor, networks: Networks, optimizer: Adam, args: Args, step: int) -> None:
    """Take one gradient step of reward and critic, and every `policy_frequency` steps one of policy and targets."""
    optimizer.zero_grad()
    logits = networks.reward(batch.next_observation, batch.shifts[1])
    loss = reward_loss(networks.reward(examples[batch.chosen], batch.shifts[2]), logits, args.eta)
    features = networks.critic.encoder(batch.observation, batch.shifts[0])
    reward = logits.detach().sigmoid() if batch.solved is None else batch.solved.float()
    q = networks.critic(features, batch.action)
    loss = loss + critic_loss(q, reward, batch.terminal, next_q(batch, networks, batch.shifts[1]), args.discount)
    if (step + 1) % args.policy_frequency == 0:  # the optimiser leaves networks without a gradient as they are
        mean, std = networks.actor.distribution(features)
        networks.critic.requires_grad_(False)  # the policy's loss changes nothing there
        q = networks.critic(features.detach(), torch.tanh(mean + std * batch.noise))[0]
        networks.critic.requires_grad_(True)
        loss = loss + policy_loss(q, networks.actor.log_prob(mean, std, batch.action), args.alpha)
    loss.backward()
    optimizer.step()
    if (step + 1) % args.policy_frequency == 0:
        for target, parameter in zip(networks.targets.parameters(), networks.parameters()):  # its first: actor, critic
            target.lerp_(parameter.detach(), args.tau)


@torch.no_grad()
def measure(batch: Batch, examples: Tensor, labelled: dict[str, Tensor], networks: Networks, args: Args) -> dict:
    """Return metrics of one batch, without the random shift, and of states by label; docs/purl.md explains each."""
    logits, logits_examples = networks.reward(batch.next_observation), networks.reward(examples)
    features = networks.critic.encoder(batch.observation)
    reward = logits.sigmoid() if batch.solved is None else batch.solved.float()
    q, (mean, std) = networks.critic(features, batch.action), networks.actor.distribution(features)
    metrics = {
        "reward_loss": reward_loss(logits_examples, logits, args.eta),
        "critic_loss": critic_loss(q, reward, batch.terminal, next_q(batch, networks, None), args.discount),
        "bc_loss": -networks.actor.log_prob(mean, std, batch.action).mean(),
        "reward_examples": logits_examples.sigmoid().mean(),
        "reward_data": logits.sigmoid().mean(),
        "q_data": q.amin(0).mean(),
        "q_policy": networks.critic(features, networks.actor.mode(features)).amin(0).mean(),
    }
    for label, x in labelled.items():
        features, metrics[f"reward_{label}"] = networks.critic.encoder(x), networks.reward(x).sigmoid().mean()
        metrics[f"q_{label}"] = networks.critic(features, networks.actor.mode(features)).amin(0).mean()
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
    dataset, data, mean, std, examples, labelled = load_data(args, device)
    generator = Generator().manual_seed(int(common.seed_sequence(args.seed, "weights").generate_state(1)[0]))
    bounds, encoders = torch.from_numpy(dataset.action_bounds), [Encoder(mean, std, args, generator) for _ in "ar"]
    networks = Networks(encoders, bounds, args.hidden_dim, generator).to(device)
    learned = nn.ModuleList([networks.actor, networks.critic]), networks.reward  # the shared encoder counts once
    optimizer = Adam([{"params": x.parameters()} for x in learned], args.learning_rate, eps=1e-7, fused=True)
    parts, first_step = {"networks": networks, "optimizer": optimizer}, checkpoint.get("step", 0)
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
        results = evaluate(networks.actor, args.env_id, args.eval_episodes, args.seed, device)
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
        if not all(torch.isfinite(x).all() for x in [*networks.parameters(), *moments]):
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
            for group, rate in zip(optimizer.param_groups, (args.learning_rate, args.reward_learning_rate)):
                group["lr"] = rate * (1 - step / args.gradient_steps)
            update(batch, examples, networks, optimizer, args, step)
            progress.update()
            for name in ("train", "heldout") if (step + 1) % args.log_interval == 0 else ():
                batch = sample(data, args, step + 1, name)
                log(step + 1, name, measure(batch, examples, labelled if name == "heldout" else {}, networks, args))
            if step + 1 == args.gradient_steps or time.monotonic() - saved > 60 * args.checkpoint_minutes:
                save(step + 1)
                saved = time.monotonic()
        result = evaluate_now(args.gradient_steps) if args.eval_episodes else {}

    inputs, batch = (torch.from_numpy(np.zeros_like(dataset.observations[:2, 0])),), torch.export.Dim("batch")
    export = torch.export.export, networks.actor.cpu().requires_grad_(False), inputs
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
