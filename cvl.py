# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "numpy>=1.26", "scipy>=1.11", "gymnasium>=1.2,<2", "filelock>=3.12", "tyro>=0.9",
#     "tqdm>=4.66", "tensorboard>=2.21", "mujoco==3.3.0", "metaworld==3.1.1", "gymnasium-robotics==1.4.2", "pillow>=10"]
# ///
"""CVL, Contrastive Value Learning (Mazoure et al. 2022): a policy from rewards, without temporal differences.

Critic, policy and settings are laeo.py's. The critic sees no reward: f(s, a, g) = phi(s, a)^T psi(g) learns to tell
states that followed (s, a) from others. At its optimum e^f is the discounted occupancy of g after (s, a), relative to
how common g is, and Q(s, a) is the mean of e^f r(g) over the data's states, divided by 1 - discount. With a success
flag as reward this is LAEO with every solved state as an example. For another reward only the policy is trained anew.

    python cvl.py --env-id FetchPush --run-dir runs/cvl
    python cvl.py --env-id FetchPush --critic runs/cvl --reward-goal 1.35 0.85 0.425

Differences from the paper and from the released code (docs/cvl.md has the reasons):
 1. Q is over the other rows' futures, with e^f over its sum; in the code over the row's own (`--estimator released`).
 2. f is a logit plus log(B - 1), as in laeo.py; random features (`--estimator rff`) are of vectors of one length.
 3. The policy maximises log Q of rewards scaled to [0, 1], and clones actions by their Q-values; the code e^f r.
 4. A reward belongs to the state that its transition arrives in; in the code it is found in another one.
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
README = {}  # success at any / last step; it is in no table of README.md
CRITIC_FLAGS = "method finished dataset seed holdout_fraction discount hidden_dim repr_dim estimator temperature"


@dataclass
class Args:
    env_id: str = "FetchReach"  # one of the tasks in the README, or any Gymnasium id, also MODULE:ID
    quality: Literal["medium", "hard"] = "medium"  # of a task's standard dataset: 45 to 50 or 8 to 12 % succeed
    dataset: Path | None = None  # a dataset directory to use instead of datasets/ENV_ID-QUALITY
    verify: bool = False  # check the dataset's checksums, which reads all of it
    allow_version_mismatch: bool = False  # use a dataset although another version of the simulator made it
    reward: str = "success"  # the flags of successes.npy; `rewards`: rewards.npy; or the path of a file like these two
    reward_goal: tuple[float, float, float] | None = None  # instead, for Fetch: 1 within 0.05 m of this position, or 0
    estimator: Literal["marginal", "rff", "released"] = "marginal"  # of Q; rff: random features; released: biased
    critic: str = ""  # the directory of another run, whose critic is used as it is; only the policy is trained
    gradient_steps: Count = 10_000  # of critic and policy
    batch_size: Annotated[int, 2, 2**32 - 1] = 256  # transitions in a batch; each is a negative for all others
    learning_rate: Share = 1e-3  # Adam's step size for both networks at the start; it falls linearly to zero
    discount: Annotated[float, 1e-6, 1 - 1e-6] = 0.99  # of the geometric distribution that future states are drawn from
    hidden_dim: Count = 256  # width of the two hidden layers in every network
    repr_dim: Count = 64  # length of the representations phi and psi
    temperature: Annotated[float, 0.1, 100] = 0.5  # rff: f is at most 1 / temperature, and at least minus that
    random_features: Count = 2048  # rff: how many; the error of Q falls as one over their root
    bc_coef: Share = 0.5  # lambda, the weight of behavioural cloning
    seed: Whole = 0  # of networks, batches, held-out episodes and evaluation starts
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
    """Standardises observations [B, D]; mean and standard deviation are its buffers."""

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        self.register_buffer("observation_mean", mean.clone())
        self.register_buffer("observation_std", std.clone())
        self.dim = mean.numel()

    def forward(self, observation: Tensor) -> Tensor:
        """Return standardised observations [B, D]."""
        return (observation - self.observation_mean) / self.observation_std


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
    """Twin contrastive critics f_k(s, a, g) = phi_k(s, a)^T psi_k(g), k = 1, 2; phi and psi of one length for rff."""

    def __init__(self, encoder: Encoder, action_dim: int, args: Args, generator: Generator):
        super().__init__()
        self.encoder, sizes = encoder, [args.hidden_dim, args.hidden_dim, args.repr_dim]
        self.length = args.temperature**-0.5 if args.estimator == "rff" else None
        self.phi_nets = nn.ModuleList(mlp([encoder.dim + action_dim, *sizes], generator) for _ in "12")
        self.psi_nets = nn.ModuleList(mlp([encoder.dim, *sizes], generator) for _ in "12")

    def represent(self, nets: nn.ModuleList, x: Tensor) -> Tensor:
        x = torch.stack([net(x) for net in nets])
        return self.length * F.normalize(x, dim=-1) if self.length else x

    def phi(self, features: Tensor, action: Tensor) -> Tensor:
        """Represent state-action pairs, standardised states [B, D] and actions [B, A], as [2, B, repr_dim]."""
        return self.represent(self.phi_nets, torch.cat([features, action], -1))

    def psi(self, features: Tensor) -> Tensor:
        """Represent standardised future states [B, D] as [2, B, repr_dim]."""
        return self.represent(self.psi_nets, features)


class RandomFeatures(nn.Module):
    """F(x) with E[F(x)^T F(y)] = e^(x^T y), x and y of squared length 1 / temperature; xi, a mean of F(psi(g)) r(g)."""

    def __init__(self, args: Args, generator: Generator):
        super().__init__()
        self.register_buffer("weight", torch.randn(args.random_features, args.repr_dim, generator=generator))
        self.register_buffer("bias", 2 * np.pi * torch.rand(args.random_features, generator=generator))
        self.register_buffer("xi", torch.zeros(2, args.random_features))  # of each twin
        self.scale = (2 / args.random_features) ** 0.5 * float(np.exp(0.5 / args.temperature))

    def forward(self, x: Tensor) -> Tensor:
        """Return F [2, B, random_features] of representations [2, B, repr_dim]."""
        return self.scale * torch.cos(F.linear(x, self.weight, self.bias))


def critic_loss(phi: Tensor, psi: Tensor) -> Tensor:
    """Cross-entropy of in-batch negatives: which future psi [2, B, repr_dim] belongs to which phi [2, B, repr_dim]?"""
    logits = phi @ psi.mT - np.log(phi.shape[1] - 1)  # [2, B, B]; so that f = log p(g | s, a) / p(g) at the optimum
    return F.binary_cross_entropy_with_logits(logits, logits.new_ones(phi.shape[1]).diag().expand_as(logits))


def policy_value(phi: Tensor, psi: Tensor, reward: Tensor, kernel: RandomFeatures, estimator: str) -> Tensor:
    """(1 - discount) Q [B] of phi [2, B, repr_dim], by the batch's futures psi [2, B, repr_dim] and rewards [B]."""
    if estimator == "rff":
        return (kernel(phi) * kernel.xi[:, None]).sum(-1).amin(0)
    if estimator == "released":  # the mean of rows' own futures, which p(g | s, a) has chosen already: it counts twice
        return ((phi * psi).sum(-1).amin(0).clamp(max=80).exp() * reward).mean().expand(len(reward))  # inf * 0 is NaN
    own = torch.eye(phi.shape[1], dtype=torch.bool, device=phi.device)  # no sample of p(g), as the others' futures are
    return ((phi @ psi.mT).masked_fill(own, -torch.inf).softmax(-1) @ reward).amin(0)  # E[e^f r] / E[e^f], which is 1


def policy_loss(value: Tensor, log_prob: Tensor, advantage: Tensor, bc_coef: float) -> Tensor:
    """Eq. 8, from values [B] of the policy's actions, log pi [B] of the data's actions, and advantages [B] of these."""
    weight = advantage.exp().clamp(max=10)  # the data's Q-value in parts of the policy's
    return -(1 - bc_coef) * value.mean() - bc_coef * (weight / weight.mean() * log_prob).mean()


class Data(NamedTuple):
    observations: Tensor  # [episodes * (steps + 1), D] the file, mapped into memory; on a GPU a copy if it fits there
    batches: common.Transitions  # what is trained on
    train: common.Transitions  # of it, as many episodes as are held out, for metrics that can be compared with these
    heldout: common.Transitions  # what is never trained on
    device: torch.device  # where batches go
    rewards: np.ndarray  # [episodes * (steps + 1)] of every state; of those trained on the smallest is 0, the largest 1


def load_rewards(args: Args, dataset: common.Dataset, episodes: np.ndarray) -> np.ndarray:
    """Return the reward [episodes * (steps + 1)] of every state, scaled so that these episodes' are from 0 to 1."""
    files, task = {"success": "successes.npy", "rewards": "rewards.npy"}, common.TASKS.get(args.env_id)
    if args.reward_goal is None:
        path, steps = args.dataset / files.get(args.reward, Path(args.reward).resolve()), dataset.actions.shape[1]
        rewards = common.load_array(path, "|b1 <f4")  # flags of states, or numbers of transitions
        if rewards.shape != (size := (len(dataset.lengths), steps + (rewards.dtype == bool))):
            raise common.UserError(f"{path} has shape {rewards.shape}; {args.dataset} needs {size}.")
        rewards = rewards if rewards.dtype == bool else np.pad(rewards, ((0, 0), (1, 0)))  # of where it ends
        args.reward = args.reward if args.reward in files else str(path)  # which is absolute, for --resume
    else:
        positions = dataset.observations[..., task.achieved_goal] if task and "goal" in task.kwargs else np.zeros(1)
        if positions.shape[2:] != (3,) or args.reward != "success" or not np.isfinite(args.reward_goal).all():
            raise common.UserError("--reward-goal is for Fetch tasks of states: finite numbers, and no --reward.")
        rewards = np.linalg.norm(positions - args.reward_goal, axis=-1) < 0.05
    future = np.arange(1, rewards.shape[1]) <= dataset.lengths[episodes, None]
    low, high = (float(f(rewards[episodes, 1:][future])) for f in (np.min, np.max))
    if low == high:
        raise common.UserError(f"all rewards of the episodes to train on are {low:g}; there is nothing to maximise.")
    return ((rewards - low) / (high - low)).astype(np.float32).flatten()


def load_data(args: Args, device: torch.device) -> tuple[common.Dataset, Data, Tensor, Tensor]:
    """Return dataset, transitions, mean and deviation of observations."""
    environment = args.env_id if args.eval_episodes else None
    dataset = common.load_dataset(args.dataset, environment, args.verify, args.allow_version_mismatch)
    rng = np.random.default_rng(common.seed_sequence(args.seed, "split"))
    training, heldout, _ = common.split_dataset(dataset, args.holdout_fraction, 0, rng)
    observations = torch.from_numpy(dataset.observations).flatten(0, 1)
    if observations.ndim != 2:
        raise common.UserError(f"{METHOD}.py is for states, and {args.dataset} holds images; laeo.py takes both.")
    index, t = np.nonzero(np.arange(dataset.observations.shape[1]) <= dataset.lengths[training, None])
    rows = np.random.default_rng(0).permutation(training[index] * dataset.observations.shape[1] + t)
    x = observations[torch.from_numpy(rows[:100_000])].float()
    mean, std = x.mean(0), x.std(0).clamp(min=1e-3)  # some numbers never move
    if device.type == "cuda" and observations.nbytes < 0.75 * torch.cuda.mem_get_info()[0]:
        observations = observations.to(device)
    uses = [common.transitions(dataset, episodes) for episodes in (training, training[: len(heldout)], heldout)]
    return dataset, Data(observations, *uses, device, load_rewards(args, dataset, training)), mean, std


class Batch(NamedTuple):
    observation: Tensor  # [B, D]
    future: Tensor  # [B, D], drawn from the discounted future of (observation, action)
    action: Tensor  # [B, A]
    reward: Tensor  # [B] of the futures
    noise: Tensor  # [B, A], standard normal, for the policy's own action


def sample(data: Data, args: Args, step: int, use: str = "batches") -> Batch:
    """Draw transitions, each with a state k >= 1 steps later, P(k) ~ discount^k; data, seed and step alone decide."""
    rng = np.random.default_rng(common.seed_sequence(args.seed, "batches" if use == "batches" else "metrics", step))
    i, u = rng.integers(len(getattr(data, use).row), size=args.batch_size), rng.random(args.batch_size)
    row, remaining, _, action = (x[i] for x in getattr(data, use))
    k = 1 + (np.log1p(-u * (1 - args.discount**remaining)) / np.log(args.discount)).astype(int)  # the inverse CDF
    k = np.minimum(k, remaining)  # rounding must not cross the episode's end
    rows = [torch.from_numpy(x).to(data.observations.device) for x in (row, row + k)]
    observation, future = (data.observations.index_select(0, x).to(data.device) for x in rows)
    arrays = action, data.rewards[row + k], rng.standard_normal(action.shape, np.float32)
    return Batch(observation, future, *(torch.from_numpy(x).to(data.device) for x in arrays))


def update(batch: Batch, actor: Actor, critic: Critic, kernel: RandomFeatures, optimizer: Adam, args: Args) -> None:
    """Take one gradient step of both networks, from the same batch; with --critic of the policy alone."""
    optimizer.zero_grad()
    features, future = critic.encoder(torch.cat([batch.observation, batch.future])).chunk(2)
    phi, psi = critic.phi(features, batch.action), critic.psi(future)
    if args.estimator == "rff":
        kernel.xi.lerp_(batch.reward @ kernel(psi.detach()) / len(batch.reward), 0.01)
    mean, std = actor.distribution(features)
    action = torch.tanh(mean + std * batch.noise)
    states = psi.detach(), batch.reward, kernel, args.estimator
    critic.requires_grad_(False)  # the value's gradient passes through the critic and changes nothing there
    value = policy_value(critic.phi(features.detach(), action), *states).clamp(min=1e-3).log()
    critic.requires_grad_(not args.critic)
    advantage = policy_value(phi.detach(), *states).clamp(min=1e-3).log() - value.detach()
    loss = policy_loss(value, actor.log_prob(mean, std, batch.action), advantage, args.bc_coef)
    (loss if args.critic else critic_loss(phi, psi) + loss).backward()
    optimizer.step()


@torch.no_grad()
def measure(batch: Batch, actor: Actor, critic: Critic, kernel: RandomFeatures, args: Args) -> dict[str, float]:
    """Return metrics of one batch; docs/cvl.md explains each."""
    features, psi = critic.encoder(batch.observation), critic.psi(critic.encoder(batch.future))
    phi, states = critic.phi(features, batch.action), (psi, batch.reward, kernel, args.estimator)
    closest, (mean, std) = (phi @ psi.mT).argmax(-1), actor.distribution(features)
    metrics = {
        "critic_loss": critic_loss(phi, psi),
        "categorical_accuracy": (closest == torch.arange(len(std), device=std.device)).float().mean(),
        "bc_loss": -actor.log_prob(mean, std, batch.action).mean(),
        "reward_futures": batch.reward.mean(),
        "value_data": policy_value(phi, *states).mean(),
        "value_policy": policy_value(critic.phi(features, actor.mode(features)), *states).mean(),
        "policy_std": std.mean(),
    }
    return {name: value.item() for name, value in metrics.items()}


@torch.inference_mode()
def evaluate(policy: nn.Module, env_id: str, episodes: int, seed: int, device: torch.device, **goal: Any) -> dict:
    """Play episodes in an environment of their own; return what docs/training.md explains, and each one's outcome."""
    env, known, solved, lists = common.make_env(env_id, **goal), {}, [], {"seed": [], "episode": [], "return": []}
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


def load_critic(args: Args, critic: Critic, checksum: str) -> None:
    """Give the critic the weights of another run's. Raises common.UserError if that has other data or other flags."""
    try:
        run = torch.load(common.intact(Path(args.critic) / "checkpoint.pt"), weights_only=True, map_location="cpu")
        its = {**run["args"], **run, "finished": run["step"] == run["args"]["gradient_steps"]}
        here = {**vars(args), "method": METHOD, "dataset": checksum, "finished": True}
        if wrong := [f"its {x} is {its.get(x)}, not {here[x]}" for x in CRITIC_FLAGS.split() if its.get(x) != here[x]]:
            raise ValueError("; ".join(wrong))
        critic.load_state_dict(run["critic"])
    except Exception as error:  # of half a dozen types
        raise common.UserError(f"--critic {args.critic} cannot be used ({common.first_line(error)}).") from None


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
    dataset, data, mean, std = load_data(args, device)
    generator = Generator().manual_seed(int(common.seed_sequence(args.seed, "weights").generate_state(1)[0]))
    bounds, encoder = torch.from_numpy(dataset.action_bounds), Encoder(mean, std)
    actor = Actor(encoder, bounds, args.hidden_dim, generator).to(device)
    critic = Critic(encoder, bounds.shape[1], args, generator).to(device).requires_grad_(not args.critic)
    kernel = RandomFeatures(args, generator).to(device)
    if args.critic and not checkpoint:
        load_critic(args, critic, dataset.checksum)
    learned = nn.ModuleList([actor] if args.critic else [actor, critic]).parameters()
    optimizer = Adam(learned, args.learning_rate, eps=1e-7, fused=True)
    parts, first_step = dict(actor=actor, critic=critic, kernel=kernel, optimizer=optimizer), checkpoint.get("step", 0)
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
        goal = {"goal": args.reward_goal} if args.reward_goal else {}  # whose success is measured
        results = evaluate(actor, args.env_id, args.eval_episodes, args.seed, device, **goal)
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
            update(batch, actor, critic, kernel, optimizer, args)
            progress.update()
            for name in ("train", "heldout") if (step + 1) % args.log_interval == 0 else ():
                log(step + 1, name, measure(sample(data, args, step + 1, name), actor, critic, kernel, args))
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
