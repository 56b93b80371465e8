# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "numpy>=1.26", "scipy>=1.11", "gymnasium>=1.2,<2", "filelock>=3.12", "tyro>=0.9",
#     "tqdm>=4.66", "tensorboard>=2.21", "mujoco==3.3.0", "metaworld==3.1.1", "gymnasium-robotics==1.4.2", "pillow>=10"]
# ///
"""Contrastive RL: goal-conditioned control without rewards, online or from a dataset.

A critic f(s, a, g) = phi(s, a)^T psi(g) is trained to tell the goals that follow (s, a) from others; at its optimum e^f
is the discounted occupancy of g after (s, a), relative to how common g is. A goal-conditioned policy maximises f;
online, its episodes join the data. Policies that this script has trained, in behavior/, make the project's datasets.
Eysenbach, Zhang, Levine and Salakhutdinov 2022, "Contrastive Learning as Goal-Conditioned Reinforcement Learning".

    python contrastive_rl.py --env-id gymnasium_robotics:FetchReach-v4
    python contrastive_rl.py --env-id FetchPush --dataset datasets/FetchPush-medium --critic-loss cpc

Differences from the paper and the released code (docs/contrastive_rl.md has the reasons):
 1. On this project's tasks the data start with episodes of a scripted controller; `--seed-episodes 0`: the paper's way.
 2. Observations and goals are standardised.
 3. The goal is what the environment calls the achieved goal, not a whole state.
 4. Half of the training episodes command the environment's goal, half a goal where an earlier episode ended.
 5. There is one gradient step for two environment steps, and the critic is the smaller of two, whatever its loss is.
 6. The policy is trained on the futures of its batch as goals; the released code adds goals of other rows.
 7. The weight of the entropy is adapted; the released code has none on tasks of states.
 8. Where something other than a step limit ends an episode, C-learning has no next state; it stays there.
 9. Actions are cloned for the goals that they led to only; the released code clones them for other rows' goals too.
10. Offline, the learning rate falls, the policy's deviation is at least 0.1, and its densest action is played.
"""

import copy
import json
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Generator, Tensor, nn
from torch.distributions import Normal, TanhTransform
from torch.optim import Adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import common
from episodes import Player, evaluate, first_episodes, make_env, write_behavior

METHOD = Path(__file__).stem
TARGET_RATE, MAX_WEIGHT = 0.005, 20.0  # of C-learning: how fast the target network follows, and where its ratio is cut
Whole, Count, Share = Annotated[int, 0, 2**32 - 1], Annotated[int, 1, 2**32 - 1], Annotated[float, 0, 1]  # bounds
DEFAULTS = {"learning_rate": (3e-4, 1e-3), "bc_coef": (0.0, 0.2), "entropy_coefficient": (None, 0.0)}  # on-, offline


@dataclass
class Args:
    env_id: str = "FetchReach"  # a task with states, whose goal is fixed, or any GoalEnv of Gymnasium, also MODULE:ID
    dataset: Path | None = None  # learn offline from this dataset of a task, and play nothing but evaluations
    allow_version_mismatch: bool = False  # use a dataset although another version of the simulator made it
    critic_loss: Literal["nce", "cpc", "c_learning", "nce_c_learning"] = "nce"  # the critic's objective
    gcbc: bool = False  # goal-conditioned behavioural cloning instead: no critic, actions are cloned for their futures
    bc_coef: Annotated[float | None, 0, 1] = None  # weight of this cloning beside the critic; online 0, offline 0.2
    train_steps: Count = 80_000  # online: environment steps of the agent, with one gradient step for two of them
    gradient_steps: Count = 20_000  # offline: of critic and policy
    seed_episodes: Annotated[int | None, 0, 2**31] = None  # online: scripted ones at the start; 400, not a task 0
    warmup_steps: Whole = 2_000  # online: gradient steps on scripted episodes before the agent's first step
    random_steps: Count = 10_000  # online: random steps that replace scripted episodes if there are none
    num_envs: Annotated[int, 2, 1024] = 4  # online: environments that are stepped together
    batch_size: Annotated[int, 2, 2**31] = 256  # transitions in a batch; each is a negative for all others
    learning_rate: Annotated[float | None, 0, 1] = None  # Adam's; online 0.0003; offline 0.001, and it falls to zero
    discount: Annotated[float, 1e-6, 1 - 1e-6] = 0.99  # of the geometric distribution that goals are relabelled with
    hidden_dim: Count = 256  # width of the two hidden layers in every network
    repr_dim: Count = 64  # length of the representations phi and psi
    random_goals: Share = 0.0  # share of the policy's batch whose goal is another row's instead of its own future
    entropy_coefficient: Annotated[float | None, 0, 1e6] = None  # the entropy's weight; offline 0, online adapted
    target_entropy: Annotated[float, -1e6, 1e6] = 0.0  # the entropy that this is adapted to, in nats
    seed: Whole = 0  # of networks, batches, held-out episodes, the agent's play and evaluation starts
    num_threads: Count = 1  # how many threads PyTorch uses
    holdout_fraction: Annotated[float, 0, 0.9] = 0.05  # offline: share of the episodes that is never trained on
    log_interval: Count = 500  # gradient steps between two lines of metrics
    eval_interval: Whole = 10_000  # gradient steps between two evaluations; 0: only at the end
    eval_episodes: Count = 100  # of each evaluation, with the same starts and goals
    run_dir: Path | None = None  # where results go; runs/ENV_ID__METHOD__SEED__TIME if not given
    track: bool = False  # log to Weights & Biases too; with WANDB_MODE=offline only to files in the run directory
    wandb_project: str = "example-based-control"  # with --track: the project there
    wandb_entity: str | None = None  # with --track: the user or the team there
    behavior_dir: Path | None = None  # online, a task: write checkpoints for collect_data.py to BEHAVIOR_DIR/ENV_ID.pt
    calibration_episodes: Count = 200  # number of episodes that measure the success rate of each of these checkpoints


def mlp(sizes: list[int], generator: Generator) -> nn.Sequential:
    """Return a ReLU network with a linear last layer, Glorot-uniform weights and zero biases."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:]):
        layers += [nn.ReLU(), nn.utils.skip_init(nn.Linear, fan_in, fan_out)]  # nn.Linear draws from global state
        nn.init.xavier_uniform_(layers[-1].weight, generator=generator), nn.init.zeros_(layers[-1].bias)
    return nn.Sequential(*layers[1:])  # no activation before the first layer


class Actor(nn.Module):
    """Goal-conditioned policy pi(a | s, g), the tanh of a normal distribution; `dims` of observation, goal, action."""

    def __init__(self, dims: tuple[int, int, int], hidden_dim: int, generator: Generator, min_std: float = 1e-3):
        super().__init__()
        for name, dim in (("observation", dims[0]), ("goal", dims[1])):
            self.register_buffer(f"{name}_mean", torch.zeros(dim))
            self.register_buffer(f"{name}_std", torch.ones(dim))
        self.net, self.min_std = mlp([dims[0] + dims[1], hidden_dim, hidden_dim, 2 * dims[2]], generator), min_std

    def forward(self, observation: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, each [B, A], of the normal distribution before the tanh."""
        observation = (observation - self.observation_mean) / self.observation_std
        goal = (goal - self.goal_mean) / self.goal_std
        mean, std = self.net(torch.cat([observation, goal], -1)).chunk(2, -1)
        return mean, F.softplus(std) + self.min_std

    def sample(self, observation: Tensor, goal: Tensor, noise: Tensor) -> Tensor:
        """Turn standard normal noise [B, A] into actions of the same shape in (-1, 1)."""
        mean, std = self(observation, goal)
        return torch.tanh(mean + std * noise)


class Policy(nn.Module):
    """What is evaluated and exported: plays without noise, for the goal that is given or, without one, its own."""

    def __init__(self, actor: Actor, action_bounds: Tensor, goal: Tensor, density: bool):
        super().__init__()
        self.register_buffer("action_bounds", action_bounds)  # [2, A]
        self.register_buffer("own_goal", goal)  # [G]
        self.actor, self.density = actor, density

    def forward(self, observation: Tensor, goal: Tensor | None = None) -> Tensor:
        """Return actions [B, A], in their own bounds, for observations [B, D] and goals [B, G]."""
        mean, std = self.actor(observation, self.own_goal.expand(observation.shape[0], -1) if goal is None else goal)
        action, slope = torch.tanh(mean), 2 * std**2
        for _ in range(20 if self.density else 0):  # largest where its derivative is 0: atanh(a) = mean + 2 std^2 a
            action = torch.tanh(mean + slope * action)
        return torch.lerp(*self.action_bounds, (action + 1) / 2)


def tanh_normal_log_prob(mean: Tensor, std: Tensor, x: Tensor) -> Tensor:
    """Return the log density [B] of actions tanh(x), x ~ Normal(mean, std), all [B, A]; from x, which keeps digits."""
    log_prob = Normal(mean, std, validate_args=False).log_prob(x)
    return (log_prob - TanhTransform().log_abs_det_jacobian(x, torch.tanh(x))).sum(-1)


class Critic(nn.Module):
    """Two contrastive critics f_k(s, a, g) = phi_k(s, a)^T psi_k(g), k = 1, 2; `dims` of observation, goal, action."""

    def __init__(self, dims: tuple[int, int, int], hidden_dim: int, repr_dim: int, generator: Generator):
        super().__init__()
        for name, dim in (("observation", dims[0]), ("goal", dims[1])):
            self.register_buffer(f"{name}_mean", torch.zeros(dim))
            self.register_buffer(f"{name}_std", torch.ones(dim))
        hidden = [hidden_dim, hidden_dim, repr_dim]
        self.phi_nets = nn.ModuleList(mlp([dims[0] + dims[2], *hidden], generator) for _ in range(2))
        self.psi_nets = nn.ModuleList(mlp([dims[1], *hidden], generator) for _ in range(2))

    def phi(self, observation: Tensor, action: Tensor) -> Tensor:
        """Represent observations [B, D] and actions [B, A] as [2, B, repr_dim]."""
        x = torch.cat([(observation - self.observation_mean) / self.observation_std, action], -1)
        return torch.stack([net(x) for net in self.phi_nets])

    def psi(self, goal: Tensor) -> Tensor:
        """Represent goals [B, G] as [2, B, repr_dim]."""
        x = (goal - self.goal_mean) / self.goal_std
        return torch.stack([net(x) for net in self.psi_nets])


def nce_loss(phi: Tensor, psi: Tensor) -> Tensor:
    """Binary NCE of phi, psi [2, B, repr_dim]: goal i belongs to row i, the other B - 1 goals are negatives."""
    logits = phi @ psi.mT  # [2, B, B]; f = log p(g | s, a) / p(g) - log(B - 1) at the optimum
    labels = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device).expand_as(logits)
    return F.binary_cross_entropy_with_logits(logits, labels)


def cpc_loss(phi: Tensor, psi: Tensor) -> Tensor:
    """InfoNCE of phi, psi [2, B, repr_dim]: which of B goals belongs to row i? It leaves a function of (s, a) free."""
    logits = phi @ psi.mT  # [2, B, B]
    normaliser = logits.logsumexp(-1)  # the penalty on its square keeps that function near zero
    return (normaliser - logits.diagonal(dim1=1, dim2=2) + 0.01 * normaliser**2).mean()


def future_ratio(phi: Tensor, psi: Tensor) -> Tensor:
    """Return p(g | s', a') / p(g) [B], at most MAX_WEIGHT, by the target network's phi, psi [2, B, repr_dim]."""
    return (phi * psi).sum(-1).amin(0).clamp(max=float(np.log(MAX_WEIGHT))).exp()  # sigmoid(f) / (1 - sigmoid(f)) = e^f


def c_learning_loss(phi: Tensor, psi: Tensor, ratio: Tensor, discount: Tensor, with_futures: bool) -> Tensor:
    """C-learning: next states are futures with weight 1 - discount, other goals with weight discount * ratio.

    phi, psi [2, B, repr_dim], psi of the next states' goals; ratio [B], of the goal of the row after; discount [B], 0
    where the next state is where everything ends. `with_futures`: the NCE loss of sampled futures is added; psi has as
    many of these, in proportion, as its weights say.
    """
    positive, negative = (phi * psi).sum(-1), (phi * psi.roll(-1, 1)).sum(-1)  # [2, B]
    loss = (1 - discount + with_futures) * F.softplus(-positive)
    return (loss + discount * ratio * F.softplus(-negative) + (1 + with_futures) * F.softplus(negative)).mean()


def policy_loss(value: Tensor, log_prob: Tensor, alpha: Tensor, clone: Tensor, bc_coef: float) -> Tensor:
    """Maximise values [B] and the entropy, from log pi [B] of the policy's actions, and `clone` [B], of the data's."""
    return ((1 - bc_coef) * (alpha * log_prob - value) - bc_coef * clone).mean()


def entropy_loss(log_alpha: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """Raise the entropy coefficient while the entropy, -log_prob [B], is below its target, and lower it above."""
    return log_alpha.exp() * (-log_prob - target_entropy).mean()


class Data:
    """Episodes end to end, [rows, ...] float32, and their transitions, of which `size` are there."""

    def __init__(self, capacity: int, dims: tuple[int, int, int]):
        self.observations, self.goals = (np.zeros((2 * capacity, dim), np.float32) for dim in dims[:2])  # lazily
        whole, action = np.zeros((2, capacity), int), np.zeros((capacity, dims[2]), np.float32)
        self.transitions = common.Transitions(*whole, np.zeros(capacity, np.float32), action)
        self.size, self.ends = 0, []  # `ends`: the rows of the episodes' last states

    def add(self, observations: list, goals: list, actions: list, terminal: bool) -> None:
        """Add an episode: T + 1 observations [D] and achieved goals [G], and T actions [A] in [-1, 1]."""
        first, steps = self.ends[-1] + 1 if self.ends else 0, len(actions)
        self.ends.append(first + steps)
        self.observations[first : first + steps + 1], self.goals[first : first + steps + 1] = observations, goals
        row, t = slice(self.size, self.size + steps), np.arange(steps)
        values = first + t, steps - t, terminal * (t == steps - 1), actions
        for array, value in zip(self.transitions, values):
            array[row] = value
        self.size += steps


class Batch(NamedTuple):
    observation: Tensor  # [B, D]
    action: Tensor  # [B, A]
    next_observation: Tensor  # [B, D]
    next_goal: Tensor  # [B, G], achieved in the next state
    future: Tensor  # [B, G], achieved k >= 1 steps later
    terminal: Tensor  # [B], 1 where something other than a step limit ends the episode with this action
    noise: Tensor  # [B, A], standard normal, for the policy's own action
    next_noise: Tensor  # [B, A], for its action in the next state


def sample(data: Data, args: Args, step: int, stream: str = "batches") -> Batch:
    """Draw transitions, each with a goal k >= 1 steps later, P(k) ~ discount^k; data, seed and step alone decide."""
    rng = np.random.default_rng(common.seed_sequence(args.seed, stream, step))
    i, u = rng.integers(data.size, size=args.batch_size), rng.random(args.batch_size)
    row, remaining, terminal, action = (x[i] for x in data.transitions)
    k = 1 + (np.log1p(-u * (1 - args.discount**remaining)) / np.log(args.discount)).astype(int)  # the inverse CDF
    k = np.minimum(k, remaining)  # rounding must not cross the episode's end
    noise = rng.standard_normal((2, *action.shape), np.float32)
    states = data.observations[row], action, data.observations[row + 1], data.goals[row + 1], data.goals[row + k]
    return Batch(*(torch.from_numpy(x) for x in (*states, terminal, *noise)))


def load_data(args: Args, dims: tuple[int, int, int]) -> tuple[dict[str, Data], str]:
    """Return training and held-out episodes of a dataset, actions in [-1, 1], and its checksum. Raises UserError."""
    task = common.TASKS.get(args.env_id)
    if not task:
        raise common.UserError(f"--dataset is for the tasks {', '.join(common.TASKS)}; {args.env_id} is none of them.")
    path = common.find_dataset(args.env_id, "medium", args.dataset)
    dataset = common.load_dataset(path, args.env_id, allow_version_mismatch=args.allow_version_mismatch)
    rng, both = np.random.default_rng(common.seed_sequence(args.seed, "split")), []
    for chosen in common.split_dataset(dataset, args.holdout_fraction, 0, rng)[:2]:
        data = Data(0, dims)
        data.observations = dataset.observations.reshape(-1, dims[0])
        data.goals, data.transitions = data.observations[:, task.achieved_goal], common.transitions(dataset, chosen)
        data.size = len(data.transitions.row)
        both.append(data)
    return dict(zip(("train", "heldout"), both)), dataset.checksum


def critic_loss(batch: Batch, actor: Actor, critic: Critic, target: Critic, args: Args) -> Tensor:
    """Return the critic's loss on a batch, by --critic-loss; its gradient reaches the critic alone."""
    phi, with_futures = critic.phi(batch.observation, batch.action), args.critic_loss == "nce_c_learning"
    if args.critic_loss in ("nce", "cpc"):
        return {"nce": nce_loss, "cpc": cpc_loss}[args.critic_loss](phi, critic.psi(batch.future))
    share = (1 - args.discount) / (2 - args.discount) if with_futures else 1
    n = int(share * len(phi[0]))  # rows whose positive goal is the next state's
    goal = torch.cat([batch.next_goal[:n], batch.future[n:]])
    with torch.no_grad():
        other = goal.roll(-1, 0)
        action = actor.sample(batch.next_observation, other, batch.next_noise)
        ratio = future_ratio(target.phi(batch.next_observation, action), target.psi(other))
    return c_learning_loss(phi, critic.psi(goal), ratio, args.discount * (1 - batch.terminal), with_futures)


def update(
    batch: Batch, actor: Actor, critic: Critic, target: Critic, log_alpha: Tensor, optimizer: Adam, args: Args
) -> None:
    """Take one gradient step of critic, policy and entropy coefficient, from the same batch and the same parameters."""
    optimizer.zero_grad()
    own = torch.arange(len(batch.action)) >= round(args.random_goals * len(batch.action))  # else another row's goal
    goal = torch.where(own[:, None], batch.future, batch.future.roll(1, 0))
    mean, std = actor(batch.observation, goal)
    x = mean + std * batch.noise
    log_prob = tanh_normal_log_prob(mean, std, x)
    clone = own * tanh_normal_log_prob(mean, std, torch.atanh(batch.action.clamp(-0.999, 0.999)))
    if args.gcbc:
        loss = -clone.mean()
    else:
        with torch.no_grad():
            psi = critic.psi(goal)
        value = (critic.phi(batch.observation, torch.tanh(x)) * psi).sum(-1).amin(0)
        loss = policy_loss(value, log_prob, log_alpha.detach().exp(), clone, args.bc_coef)
        critic_loss(batch, actor, critic, target, args).backward(inputs=list(critic.parameters()))
    loss.backward(inputs=list(actor.parameters()))
    if args.entropy_coefficient is None and not args.gcbc:
        entropy_loss(log_alpha, log_prob.detach(), args.target_entropy).backward()
    optimizer.step()
    if "c_learning" in args.critic_loss:
        with torch.no_grad():
            torch._foreach_lerp_(list(target.parameters()), list(critic.parameters()), TARGET_RATE)


@torch.no_grad()
def measure(
    batch: Batch, actor: Actor, critic: Critic, target: Critic, log_alpha: Tensor, args: Args
) -> dict[str, float]:
    """Return metrics of one batch; docs/contrastive_rl.md explains each."""
    mean, std = actor(batch.observation, batch.future)
    x = torch.atanh(batch.action.clamp(-0.999, 0.999))
    metrics = {"bc_loss": -tanh_normal_log_prob(mean, std, x).mean(), "policy_std": std.mean()}
    if not args.gcbc:
        psi, size = critic.psi(batch.future), len(mean)
        logits = critic.phi(batch.observation, batch.action) @ psi.mT
        positives, x = logits.diagonal(dim1=1, dim2=2), mean + std * batch.noise
        value = (critic.phi(batch.observation, torch.tanh(x)) * psi).sum(-1).amin(0)
        metrics |= {
            "critic_loss": critic_loss(batch, actor, critic, target, args),
            "categorical_accuracy": (logits.argmax(-1) == torch.arange(size)).float().mean(),
            "logits_positive": positives.mean(),
            "logits_negative": (logits.sum() - positives.sum()) / (2 * size * (size - 1)),
            "value_data": positives.amin(0).mean(),
            "value_policy": value.mean(),
            "entropy": -tanh_normal_log_prob(mean, std, x).mean(),
            "entropy_coefficient": log_alpha.exp(),
        }
    return {name: value.item() for name, value in metrics.items()}


def load_actor(checkpoint: dict[str, Any]) -> Actor:
    """Return the policy of a saved checkpoint, in float32. Raises KeyError or RuntimeError for other parameters."""
    weights = {name: value.float() for name, value in checkpoint["actor"].items()}
    dims = len(weights["observation_mean"]), len(weights["goal_mean"]), len(weights["net.4.bias"]) // 2
    actor = Actor(dims, len(weights["net.0.bias"]), Generator())
    actor.load_state_dict(weights)
    return actor


def train(args: Args) -> dict[str, Any]:
    """Train, evaluate, write policy.pt2 and result.json, return the latter. Raises common.UserError for a mistake."""
    started, args = time.perf_counter(), replace(args)
    common.check_flags(args)
    offline, scripted = args.dataset is not None, args.env_id in common.TASKS
    for name, values in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, values[offline])
    if args.seed_episodes is None:
        args.seed_episodes = 400 * (scripted and not offline)
    cloning = args.gcbc or args.bc_coef > 0
    torch.set_num_threads(args.num_threads)
    env = make_env(args.env_id)
    if args.seed_episodes and not scripted:
        raise common.UserError(f"--seed-episodes is {args.seed_episodes}; no controller was written for {args.env_id}.")
    if args.behavior_dir and (offline or cloning or not scripted):
        raise common.UserError("--behavior-dir is for what is trained online on a task without cloning; leave it out.")
    spaces = env.observation_space["observation"], env.observation_space["desired_goal"], env.action_space
    dims = tuple(space.shape[0] for space in spaces)
    goal = np.array(common.TASKS[args.env_id].desired_goal if scripted else np.zeros(dims[1]), np.float32)
    bounds = torch.from_numpy(np.array([env.action_space.low, env.action_space.high], np.float32))
    longest = env.spec.max_episode_steps
    env.close()
    uses, checksum = load_data(args, dims) if offline else ({}, None)

    name = f"{args.env_id.replace('/', '-').replace(':', '-')}__{METHOD}__{args.seed}__{time.time_ns()}"
    args.run_dir = args.run_dir or Path("runs") / name
    path = args.run_dir / "metrics.jsonl"
    if path.exists():
        raise common.UserError(f"{args.run_dir} holds a run; choose another --run-dir.")
    for directory in filter(None, (args.run_dir, args.behavior_dir)):
        with common.explain_os_errors(directory):  # now rather than after the training
            directory.mkdir(parents=True, exist_ok=True)
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    rng = np.random.default_rng(common.seed_sequence(args.seed, "agent"))  # episode seeds of this stream start at 1
    player, warmup, total = None, 0, args.gradient_steps
    if not offline:
        first = max(args.seed_episodes * longest, args.random_steps) + longest
        uses["train"] = data = Data(first + args.train_steps + args.num_envs * longest, dims)
        player = Player(args, data, args.num_envs, rng, first_episodes(args, data, rng))
        warmup = args.warmup_steps if args.seed_episodes else 0
        total = warmup + -(-args.train_steps // 2)

    generator = Generator().manual_seed(int(common.seed_sequence(args.seed, "weights").generate_state(1)[0]))
    actor = Actor(dims, args.hidden_dim, generator, 0.1 if cloning else 1e-3)
    critic = Critic(dims, args.hidden_dim, args.repr_dim, generator)
    alpha = torch.tensor(1.0 if args.entropy_coefficient is None else args.entropy_coefficient)
    log_alpha = alpha.log().requires_grad_()
    learned = [*critic.parameters(), *actor.parameters(), log_alpha]
    optimizer = Adam(learned, args.learning_rate, eps=1e-7, fused=True)
    rows = np.random.default_rng(0).permutation(uses["train"].transitions.row[: uses["train"].size])[:100_000]
    for name in ("observation", "goal"):
        x = torch.from_numpy(getattr(uses["train"], f"{name}s")[rows])
        statistics = {f"{name}_mean": x.mean(0), f"{name}_std": x.std(0).clamp(min=1e-3)}  # some numbers never move
        for network in (actor, critic):
            network.load_state_dict(statistics, strict=False)
    target = copy.deepcopy(critic).requires_grad_(False)
    policy = Policy(actor, bounds, torch.from_numpy(goal), density=cloning)

    def act(observations: np.ndarray, goals: np.ndarray) -> np.ndarray:
        noise = torch.from_numpy(rng.standard_normal((len(goals), dims[2]), np.float32))
        with torch.inference_mode():
            return actor.sample(torch.from_numpy(observations), torch.from_numpy(goals), noise).numpy()

    def spend(kind: str) -> None:
        nonlocal started
        seconds[kind], started = seconds.get(kind, 0.0) + time.perf_counter() - started, time.perf_counter()

    def log(step: int, prefix: str, metrics: dict[str, float]) -> None:
        line = {f"{prefix}/{name}": value for name, value in metrics.items()}
        with common.explain_os_errors(path), open(path, "a") as file:
            for name, value in line.items():
                if not np.isfinite(value):
                    raise common.UserError(f"{name} is {value} at step {step}; try a smaller --learning-rate.")
                writer.add_scalar(name, value, step)
            file.write(json.dumps({"step": step, "env_steps": player.steps if player else 0} | line) + "\n")
        if args.track:
            tracker.log(line, step)

    networks, seconds, checkpoints, result = (actor, critic, target, log_alpha), {}, [], {}
    spend("data")
    # Learning is fast at first: checkpoints after 1/512, ..., 1/2 and all of the gradient steps, and an untrained one.
    save_at = {0} | {-(-total // 2**k) for k in range(10)} if args.behavior_dir else set()
    progress = tqdm(desc=f"{METHOD} on {args.env_id}", total=total, mininterval=2)
    tracker = import_module("tracking").start(args, plain) if args.track else nullcontext()
    with common.explain_os_errors(args.run_dir), SummaryWriter(args.run_dir) as writer, progress, tracker:
        for step in range(total + 1):
            if step in save_at:
                # float16 halves the file and the policy acts alike; means and standard deviations need float32's range.
                weights = {name: x.half() if "net" in name else x.clone() for name, x in actor.state_dict().items()}
                checkpoints.append({"env_steps": player.steps, "gradient_steps": step, "actor": weights})
            if step == total or (args.eval_interval and step % args.eval_interval == 0):
                spend("training")
                result = evaluate(policy, args.env_id, args.eval_episodes, args.seed)
                log(step, "eval", {name: x for name, x in sorted(result.items()) if isinstance(x, float)})
                spend("evaluation")
            if step == total:
                break
            while player and player.steps <= 2 * (step - warmup):  # one gradient step for two environment steps
                player.step(act)
            if offline:
                optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - step / total)
            update(sample(uses["train"], args, step), *networks, optimizer, args)
            progress.update()
            for name, use in uses.items() if (step + 1) % args.log_interval == 0 else ():
                log(step + 1, name, measure(sample(use, args, step + 1, "metrics"), *networks, args))

    if player:
        player.close()
    if args.behavior_dir:
        write_behavior(args, plain, checkpoints, seconds["training"])
    inputs = tuple(torch.zeros(2, dim) for dim in dims[: 1 if scripted else 2])  # a task's policy knows its goal
    shapes = tuple({0: torch.export.Dim("batch")} for _ in inputs)
    program = torch.export.export(policy.requires_grad_(False), inputs, dynamic_shapes=shapes)
    with common.write_file(args.run_dir / "policy.pt2") as file:
        torch.export.save(program, file)
    result |= {"method": METHOD, "args": plain, "dataset": checksum, "seconds": seconds, "gradient_steps": total}
    result |= {"versions": common.versions("torch", "numpy", "gymnasium", "mujoco", "gymnasium-robotics", "metaworld")}
    with common.write_file(args.run_dir / "result.json") as file:
        file.write(json.dumps(result, indent=2).encode())
    means = ", ".join(f"{name} {x:.3f}" for name, x in sorted(result.items()) if isinstance(x, float))
    print(f"{args.run_dir}: {means}{'' if 'success_rate' in result else ' (success was not measured)'}")
    return result


if __name__ == "__main__":
    with common.user_errors("interrupted; a run of this script cannot be resumed."):
        train(tyro.cli(Args))
