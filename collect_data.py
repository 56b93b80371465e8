"""The data of LAEO's experiments: online contrastive RL, its checkpoints, and their roll-outs.

A goal-conditioned agent learns a contrastive critic f(s, a, g) = phi(s, a)^T psi(g), which says how likely the
behaviour is to reach goal g soon, and a policy that maximises it. Policies saved along the way, from untrained to
good, are rolled out towards the task's own goal and mixed so that a chosen share of the episodes succeeds.

Eysenbach et al. 2022, "Contrastive Learning as Goal-Conditioned Reinforcement Learning" (arXiv 2206.07568); Hatch et
al. 2023 (L4DC) made their data with it.

    python collect_data.py --env-id FetchPush                    # rolls out the policies in behavior/
    python collect_data.py --env-id FetchPush --train            # trains those policies first

Differences from the paper and the released code, each with its reason:
 1. The replay buffer starts with episodes of a noisy scripted controller (`--seed-episodes 0` turns it off). Random
    actions hardly ever touch the block of FetchPush; the paper's authors took a million steps, this takes minutes.
    These episodes never enter a dataset.
 2. Observations and goals are standardised with the mean and the standard deviation of the first episodes in the replay
    buffer. It is worth more than any other setting.
 3. The goal is the position of the object (or of the gripper), not a whole state, as in gymnasium's GoalEnv: a whole
    state of FetchPush names the gripper's place and velocities, which the task does not ask for.
 4. While training, half of the episodes command the task's goal and half a position that an earlier episode ended at.
    The released code commands the task's goal alone. Wider practice makes the value of more goals known.
 5. Datasets hold roll-outs of saved checkpoints, as the paper says; the released code stored what the evaluator
    played during training, with the policy's mode. Here each episode scales the policy's noise by a number of its
    own, uniform in [0, 1]: the mode alone shows too few actions (on FetchReach, which always starts alike, it is one
    and the same episode), and full noise alone hides that the mode gets stuck where noise happens to help.
 6. How often a checkpoint is rolled out depends on its measured success rate: weights proportional to
    exp(beta * rate), with beta such that the mixture succeeds at the wanted rate. The paper does not say how it
    got its 45 to 50 %.
 7. One gradient step for two environment steps instead of one for one, and twin critics: cheaper, and it works.
"""

import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

import common


@dataclass
class Args:
    env_id: str = "FetchReach"
    """the task: FetchReach, FetchPush, FetchReachImage, FetchPushImage, FetchPushImageOccluded, SawyerWindowOpen or
    SawyerDrawerClose"""
    quality: str = "medium"
    """medium: 45 to 50 % of the episodes succeed; hard: 8 to 12 %"""
    num_episodes: int = 4000
    """how many episodes the dataset holds (the paper: 3,966, 31,271 and 300,578)"""
    seed: int = 0
    """the random seed of the dataset and, with --train, of the agent"""
    output: Path | None = None
    """the dataset's directory; datasets/ENV_ID-QUALITY if not given"""
    overwrite: bool = False
    """replace the dataset if it is there already"""
    num_workers: int = 0
    """how many processes roll out episodes, 0: one for each core; the data do not depend on it"""
    behavior_dir: Path = Path(__file__).parent / "behavior"
    """where the policies' weights are read from and, with --train, written to"""
    train: bool = False
    """train the agent first, and replace the task's weights in --behavior-dir"""
    train_steps: int = 80_000
    """with --train: environment steps of the agent, seed episodes not counted"""
    seed_episodes: int = 400
    """with --train: scripted episodes in the replay buffer before the first step; 0 is the paper's way"""
    warmup_steps: int = 2_000
    """with --train: gradient steps on the scripted episodes before the first environment step"""
    num_envs: int = 4
    """with --train: environments that are stepped together"""
    batch_size: int = 256
    """with --train: transitions in a batch; each is a negative for all others"""
    learning_rate: float = 3e-4
    """with --train: Adam's step size for actor, critic and entropy coefficient"""
    discount: float = 0.99
    """with --train: of the geometric law that goals are relabelled by"""
    hidden_dim: int = 256
    """with --train: width of the two hidden layers in every network"""
    repr_dim: int = 64
    """with --train: length of the representations phi and psi"""
    random_goals: float = 0.0
    """with --train: share of the actor's batch whose goal is another row's instead of its own future"""
    entropy_coefficient: float | None = None
    """with --train: fixed weight of the policy's entropy; adapted to --target-entropy if not given"""
    target_entropy: float = 0.0
    """with --train: the entropy that the entropy coefficient is adapted to, in nats"""
    calibration_episodes: int = 200
    """with --train: episodes on which each checkpoint's success rate is measured"""


SUCCESS_RATES = {"medium": 0.475, "hard": 0.10}  # the middle of the paper's ranges, any step of the episode
MAX_SUCCESS_EXAMPLES = 1000
NUM_CHECKPOINTS = 10

# ---------------------------------------------------------------------------------------------------------- networks


def mlp(sizes: list[int], generator: torch.Generator) -> nn.Sequential:
    """Return a ReLU network with a linear last layer, Glorot-uniform weights and zero biases."""
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:])):
        linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out)  # which would draw from the global generator
        nn.init.xavier_uniform_(linear.weight, generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()] if i < len(sizes) - 2 else [linear]
    return nn.Sequential(*layers)


class Actor(nn.Module):
    """Goal-conditioned tanh-normal policy pi(a | s, g)."""

    def __init__(
        self, observation_dim: int, goal_dim: int, action_dim: int, hidden_dim: int, generator: torch.Generator
    ):
        super().__init__()
        for name, size in (("observation", observation_dim), ("goal", goal_dim)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
        self.net = mlp([observation_dim + goal_dim, hidden_dim, hidden_dim, 2 * action_dim], generator)

    def forward(self, observation: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation, each [B, actions], of the normal law under the tanh."""
        observation = (observation - self.observation_mean) / self.observation_std
        goal = (goal - self.goal_mean) / self.goal_std
        mean, std = self.net(torch.cat([observation, goal], -1)).chunk(2, -1)
        return mean, F.softplus(std) + 1e-3

    def sample(self, observation: Tensor, goal: Tensor, noise: Tensor) -> Tensor:
        """Turn standard normal noise [B, actions] into actions of that shape in (-1, 1)."""
        mean, std = self(observation, goal)
        return torch.tanh(mean + std * noise)


def tanh_normal_log_prob(x: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """Return log pi(a | s) [B] of the action tanh(x), x = mean + std * noise, from arguments [B, actions]."""
    log_prob = -0.5 * noise**2 - std.log() - 0.5 * np.log(2 * np.pi)
    return (log_prob - 2 * (np.log(2) - x - F.softplus(-2 * x))).sum(-1)  # log(1 - tanh(x)^2), without overflow


class Critic(nn.Module):
    """Twin contrastive critics f_k(s, a, g) = phi_k(s, a)^T psi_k(g), k = 1, 2."""

    def __init__(
        self, observation_dim: int, goal_dim: int, action_dim: int, hidden_dim: int, repr_dim: int, g: torch.Generator
    ):
        super().__init__()
        for name, size in (("observation", observation_dim), ("goal", goal_dim)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
        phi_sizes = [observation_dim + action_dim, hidden_dim, hidden_dim, repr_dim]
        self.phi_nets = nn.ModuleList(mlp(phi_sizes, g) for _ in range(2))
        self.psi_nets = nn.ModuleList(mlp([goal_dim, hidden_dim, hidden_dim, repr_dim], g) for _ in range(2))

    def phi(self, observation: Tensor, action: Tensor) -> Tensor:
        """Encode state-action pairs [B, D], [B, actions] as [2, B, repr_dim]."""
        x = torch.cat([(observation - self.observation_mean) / self.observation_std, action], -1)
        return torch.stack([net(x) for net in self.phi_nets])

    def psi(self, goal: Tensor) -> Tensor:
        """Encode goals [B, 3] as [2, B, repr_dim]."""
        x = (goal - self.goal_mean) / self.goal_std
        return torch.stack([net(x) for net in self.psi_nets])


# ------------------------------------------------------------------------------------------------------------ losses


def critic_loss(phi: Tensor, psi: Tensor) -> Tensor:
    """Noise-contrastive loss: which goal psi [2, B, repr_dim] was reached after which phi [2, B, repr_dim]?"""
    logits = phi @ psi.mT  # [2, B, B]
    labels = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device).expand_as(logits)
    return F.binary_cross_entropy_with_logits(logits, labels)


def actor_loss(phi: Tensor, psi: Tensor, log_prob: Tensor, alpha: Tensor) -> Tensor:
    """Maximise the smaller critic and the entropy. phi, psi: [2, B, repr_dim] of policy actions; log_prob: [B]."""
    value = (phi * psi).sum(-1).amin(0)
    return (alpha * log_prob - value).mean()


# ----------------------------------------------------------------------------------------------------------- batches


class ReplayBuffer:
    """All episodes so far, each of T steps: observations [N, T + 1, D], actions [N, T, A]."""

    def __init__(self, capacity: int, steps: int, observation_dim: int, action_dim: int, goal_slice: slice):
        self.observations = torch.zeros(capacity, steps + 1, observation_dim)
        self.actions = torch.zeros(capacity, steps, action_dim)
        self.goal_slice, self.size = goal_slice, 0

    def add(self, observations: np.ndarray, actions: np.ndarray) -> None:
        """Add n episodes: observations [n, T + 1, D], actions [n, T, A]."""
        stop = self.size + len(actions)
        self.observations[self.size : stop] = torch.from_numpy(observations)
        self.actions[self.size : stop] = torch.from_numpy(actions)
        self.size = stop

    def sample(self, batch_size: int, discount: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return observations [B, D], actions [B, A] and, k >= 1 steps later with P(k) ~ discount^k, goals [B, G]."""
        steps = self.actions.shape[1]
        episode = torch.randint(self.size, (batch_size,), generator=generator)
        t = torch.randint(steps, (batch_size,), generator=generator)
        u = torch.rand(batch_size, generator=generator, dtype=torch.float64)
        remaining = steps - t
        k = 1 + (torch.log1p(-u * (1 - discount**remaining)) / np.log(discount)).long()
        future = t + torch.minimum(k, remaining)
        goals = self.observations[episode, future][:, self.goal_slice]
        return self.observations[episode, t], self.actions[episode, t], goals


# -------------------------------------------------------------------------------------------------- scripted episodes


def scripted_action(env_id: str, observation: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Return the action [4] of a controller that brings the object to the goal [3] (Sawyer: to the task's own)."""
    action = np.zeros(4)
    if env_id == "FetchReach":
        action[:3] = (goal - observation[:3]) / 0.05
    elif env_id == "FetchPush":
        gripper, block = observation[:3], observation[3:6]
        to_goal = goal[:2] - block[:2]
        distance = np.linalg.norm(to_goal)
        direction = to_goal / max(distance, 1e-6)
        offset = gripper[:2] - block[:2]
        along = offset @ direction
        aside = np.linalg.norm(offset - along * direction)
        if distance < 0.015:  # there: let go
            action[2] = 1.0
        elif along < -0.02 and aside < 0.02:  # behind the block: go down, then push
            action[:2] = (direction * min(distance, 0.05) - (offset - along * direction)) / 0.05
            if gripper[2] > 0.435:
                action[:3] = 0.0, 0.0, (0.42 - gripper[2]) / 0.05
        else:  # go behind the block, above it
            action[:2] = (block[:2] - direction * 0.07 - gripper[:2]) / 0.05
            action[2] = (0.48 - gripper[2]) / 0.05
            if gripper[2] < 0.46 and np.linalg.norm(offset) < 0.09:
                action[:2] = 0.0
    else:
        from metaworld.policies import ENV_POLICY_MAP

        full = np.zeros(39)
        full[:3] = observation[:3] + (0.0, 0.0, 0.045)  # the policy reads the hand's body, 4.5 cm above the tool centre
        full[4:7] = observation[3:6]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Constant(s) may be too high": actions are clipped below
            action[:] = ENV_POLICY_MAP[common.TASKS[env_id].kwargs["name"]]().get_action(full)
    return np.clip(action, -1.0, 1.0)


def seed_replay(args: Args, replay: ReplayBuffer, episodes: int, rng: np.random.Generator) -> float:
    """Fill the replay buffer with noisy scripted (or, without seed episodes, random) play; return its success rate."""
    task, env, solved = common.TASKS[args.env_id], common.make_env(args.env_id), 0
    for episode in tqdm(range(episodes), desc="first episodes", unit="episode", leave=False):
        observation, _ = env.reset(seed=common.episode_seed("training", args.seed, episode))
        goal = np.array(task.desired_goal)
        if args.env_id == "FetchPush" and rng.random() < 0.5:  # other directions, so that more than one goal is known
            goal[:2] = np.array([1.344, 0.749]) + rng.uniform(-0.15, 0.15, 2)
        observations, actions, success = [observation], [], False
        for _ in range(task.max_episode_steps):
            action = rng.uniform(-1, 1, 4)
            if args.seed_episodes > 0:  # noisy, so that more is seen than the shortest way
                action = scripted_action(args.env_id, observation, goal) + rng.normal(0.0, 0.5, 4)
            action = np.clip(action, -1, 1).astype(np.float32)
            observation, _, _, _, info = env.step(action)
            observations.append(observation)
            actions.append(action)
            success |= info["success"]
        replay.add(np.stack(observations)[None], np.stack(actions)[None])
        solved += success
    env.close()
    return solved / episodes


# ---------------------------------------------------------------------------------------------------------- training


def update(
    batch: tuple[Tensor, Tensor, Tensor],
    actor: Actor,
    critic: Critic,
    log_alpha: Tensor,
    optimizer: torch.optim.Optimizer,
    args: Args,
    generator: torch.Generator,
) -> None:
    """Take one gradient step of critic, actor and entropy coefficient, from the same batch and the same parameters."""
    observation, action, goal = batch
    optimizer.zero_grad()
    psi = critic.psi(goal)
    loss = critic_loss(critic.phi(observation, action), psi)
    loss.backward(inputs=list(critic.parameters()))

    other = (torch.arange(len(goal)) < round(args.random_goals * len(goal)))[:, None]  # rows with another row's goal
    goal, psi = torch.where(other, goal.roll(1, 0), goal), torch.where(other, psi.roll(1, 1), psi)
    noise = torch.randn(action.shape, generator=generator)
    mean, std = actor(observation, goal)
    x = mean + std * noise
    log_prob = tanh_normal_log_prob(x, std, noise)
    phi = critic.phi(observation, torch.tanh(x))
    loss = actor_loss(phi, psi.detach(), log_prob, log_alpha.detach().exp())
    loss.backward(inputs=list(actor.parameters()))

    if args.entropy_coefficient is None:
        loss = log_alpha.exp() * (-log_prob.detach() - args.target_entropy).mean()
        loss.backward()
    optimizer.step()


def train_agent(args: Args) -> dict:
    """Train the agent; return its checkpoints, without success rates. Same seed and machine: the same bits."""
    task, start_time, steps = common.TASKS[args.env_id], time.time(), common.TASKS[args.env_id].max_episode_steps
    generator = torch.Generator().manual_seed(args.seed)
    rng = np.random.default_rng([args.seed, common.STREAMS.index("training")])
    num_envs, first_episodes = args.num_envs, args.seed_episodes or 10_000 // steps  # the paper: 10,000 random steps
    rounds = -(-args.train_steps // (steps * num_envs))
    envs = gym.vector.AsyncVectorEnv(
        [lambda: common.make_env(args.env_id)] * num_envs,
        autoreset_mode=gym.vector.AutoresetMode.DISABLED,  # all episodes end together, and get seeds of their own
    )
    sizes = envs.single_observation_space.shape[0], len(task.desired_goal), envs.single_action_space.shape[0]
    replay = ReplayBuffer(first_episodes + rounds * num_envs, steps, sizes[0], sizes[2], task.achieved_goal)
    seed_rate = seed_replay(args, replay, first_episodes, rng)

    actor = Actor(*sizes, args.hidden_dim, generator)
    critic = Critic(*sizes, args.hidden_dim, args.repr_dim, generator)
    alpha = torch.tensor(1.0 if args.entropy_coefficient is None else args.entropy_coefficient)
    log_alpha = alpha.log().requires_grad_()
    optimizer = torch.optim.Adam([*critic.parameters(), *actor.parameters(), log_alpha], args.learning_rate, eps=1e-7)
    states = replay.observations[: replay.size].flatten(0, 1)
    mean, std = states.mean(0), states.std(0).clamp(min=1e-3)  # do not blow up a coordinate that hardly moves
    for network in (actor, critic):
        network.observation_mean.copy_(mean)
        network.observation_std.copy_(std)
        network.goal_mean.copy_(mean[task.achieved_goal])
        network.goal_std.copy_(std[task.achieved_goal])

    # A round plays one episode in every environment and takes one gradient step for every two environment steps; the
    # round before the first one only takes the warm-up's.
    warmup, per_round = args.warmup_steps if args.seed_episodes else 0, steps * (num_envs // 2)
    total = warmup + rounds * per_round
    # Learning is fast at first: checkpoints after 1/512, ..., 1/2 and all of the gradient steps, and an untrained one.
    save_at = {0} | {-(-total // 2**k) for k in range(NUM_CHECKPOINTS)}
    checkpoints: list[dict] = []
    done = 0  # gradient steps
    progress = tqdm(total=total, desc=f"training on {args.env_id}", unit="gradient step", mininterval=2)

    def learn(gradient_steps: int, env_steps: int) -> None:
        nonlocal done
        for _ in range(gradient_steps):
            if done in save_at:
                # Weights in float16 are half as large and act alike; means and standard deviations keep their range.
                weights = {k: v.half() if "net" in k else v.clone() for k, v in actor.state_dict().items()}
                checkpoints.append({"env_steps": env_steps, "gradient_steps": done, "actor": weights})
            if done < total:
                batch = replay.sample(args.batch_size, args.discount, generator)
                update(batch, actor, critic, log_alpha, optimizer, args, generator)
                progress.update()
                done += 1

    learn(warmup, 0)
    recent: list[bool] = []
    for i in range(rounds):
        episodes = range(first_episodes + i * num_envs, first_episodes + (i + 1) * num_envs)
        observation, _ = envs.reset(seed=[common.episode_seed("training", args.seed, episode) for episode in episodes])
        ends = replay.observations[torch.from_numpy(rng.integers(replay.size, size=num_envs)), -1]
        goal = ends[:, task.achieved_goal].clone()
        goal[: num_envs // 2] = torch.tensor(task.desired_goal)
        observations, actions, success = [observation], [], np.zeros(num_envs, bool)
        for t in range(steps):
            noise = torch.randn(num_envs, sizes[2], generator=generator)
            with torch.no_grad():
                action = actor.sample(torch.from_numpy(observation), goal, noise).numpy()
            observation, _, _, _, info = envs.step(action)
            observations.append(observation)
            actions.append(action)
            success |= info["success"].astype(bool)
            learn(num_envs // 2, (i * steps + t + 1) * num_envs)
        replay.add(np.stack(observations, 1), np.stack(actions, 1))
        recent = (recent + list(success[: num_envs // 2]))[-20:]
        progress.set_postfix(success=f"{np.mean(recent):.2f}", alpha=f"{log_alpha.exp().item():.3f}")
    learn(1, rounds * steps * num_envs)  # the last checkpoint
    envs.close()
    progress.close()
    return {
        "env_id": args.env_id,
        "checkpoints": checkpoints,
        "args": {k: v for k, v in common.plain(args).items() if k not in ("output", "behavior_dir")},
        "versions": common.versions("torch", "gymnasium", *task.simulator),
        "seed_episodes_success_rate": seed_rate,
        "train_seconds": time.time() - start_time,
    }


# --------------------------------------------------------------------------------------------------------- roll-outs


def load_actor(checkpoint: dict) -> Actor:
    """Rebuild a policy from its saved weights (float16 or float32) in float32."""
    weights = {k: v.float() for k, v in checkpoint["actor"].items()}
    observation_dim, goal_dim = len(weights["observation_mean"]), len(weights["goal_mean"])
    action_dim, hidden_dim = len(weights["net.4.bias"]) // 2, len(weights["net.0.bias"])
    actor = Actor(observation_dim, goal_dim, action_dim, hidden_dim, torch.Generator())
    actor.load_state_dict(weights)
    return actor


def mixture(success_rates: list[float], target: float) -> np.ndarray:
    """Return weights proportional to exp(beta * success rate) with which the mixture's success rate is the target.

    Of all mixtures with that rate this one has the largest entropy. Raises UserError if no checkpoint is good (or bad)
    enough.
    """
    rates = np.array(success_rates)
    if not rates.min() < target < rates.max():
        raise common.UserError(
            f"error: no mixture of checkpoints that succeed in {rates.min():.3f} to {rates.max():.3f} of the episodes "
            f"succeeds in {target:.3f}; train the agent longer or with another seed: --train --train-steps N --seed N."
        )
    low, high = -1e4, 1e4
    for _ in range(200):
        beta = (low + high) / 2
        weights = np.exp(beta * (rates - (rates.max() if beta > 0 else rates.min())))
        weights /= weights.sum()
        low, high = (beta, high) if weights @ rates < target else (low, beta)
    return weights


def roll_out(env: gym.Env, env_id: str, actor: Actor, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Play one episode for the task's goal; return observations [T + 1, ...], actions [T, A] and successes [T + 1].

    The policy acts on the state also where the observations are pictures, so that these are of the very same episodes.
    """
    generator = torch.Generator().manual_seed(seed)
    noise_scale = torch.rand((), generator=generator)
    goal = torch.tensor(common.TASKS[env_id].desired_goal)
    observation, info = env.reset(seed=seed)
    observations, actions, successes, truncated = [observation], [], [info["success"]], False
    while not truncated:
        noise = noise_scale * torch.randn(env.action_space.shape[0], generator=generator)
        with torch.inference_mode():
            action = actor.sample(torch.from_numpy(env.unwrapped.state), goal, noise).numpy()
        observation, _, _, truncated, info = env.step(action)
        observations.append(observation)
        actions.append(action)
        successes.append(info["success"])
    return np.stack(observations), np.stack(actions), np.array(successes)


_worker: dict = {}  # what each process of the pool keeps: its environment, its policies and the arrays it writes to


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_worker(env_id: str, checkpoints: list[dict], directory: Path | None) -> None:
    torch.set_num_threads(1)
    names = ("observations", "actions", "successes") if directory is not None else ()
    arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r+") for name in names}
    actors = [load_actor(checkpoint) for checkpoint in checkpoints]
    _worker.update(env_id=env_id, env=common.make_env(env_id), actors=actors, arrays=arrays)


def run_episode(job: tuple[int, int, int]) -> tuple[int, bool, bool, bool]:
    """Play (and store) one episode; return its checkpoint and success at the start, at any and at the last step."""
    episode, checkpoint, seed = job
    data = roll_out(_worker["env"], _worker["env_id"], _worker["actors"][checkpoint], seed)
    for name, values in zip(_worker["arrays"], data):
        _worker["arrays"][name][episode] = values
    successes = data[2]
    return checkpoint, bool(successes[0]), bool(successes[1:].any()), bool(successes[-1])


def run_episodes(
    args: Args, checkpoints: list[dict], jobs: Iterable, total: int, label: str, directory: Path | None = None
) -> np.ndarray:
    """Play all jobs (episode, checkpoint, seed) in parallel; return [total, 4], the columns of `run_episode`."""
    results = np.zeros((total, 4), int)
    initial = (args.env_id, checkpoints, directory)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the workers: Ctrl-C is this process's, which ends them
    try:
        # Spawned, not forked: a fork copies the locks of PyTorch's threads, and not the threads.
        pool = multiprocessing.get_context("spawn").Pool(args.num_workers or num_cores(), start_worker, initial)
    finally:
        signal.signal(signal.SIGINT, handler)
    with pool:
        played = pool.imap(run_episode, jobs, chunksize=4)
        for i, result in enumerate(tqdm(played, total=total, desc=label, unit="episode", mininterval=1)):
            results[i] = result
    return results


def calibrate(args: Args, checkpoints: list[dict]) -> None:
    """Measure the success rate of every checkpoint and store it with the checkpoint."""
    n = args.calibration_episodes
    pairs = [(c, i) for c in range(len(checkpoints)) for i in range(n)]
    jobs = [(0, c, common.episode_seed("calibration", args.seed, c * n + i)) for c, i in pairs]
    results = run_episodes(args, checkpoints, jobs, len(jobs), "measuring the checkpoints")
    for c, checkpoint in enumerate(checkpoints):
        _, _, success, final_success = results[results[:, 0] == c].mean(0).tolist()
        checkpoint |= {"success_rate": success, "final_success_rate": final_success}
        print(
            f"checkpoint {c:2d}: {checkpoint['env_steps']:6d} environment steps, {checkpoint['gradient_steps']:6d} "
            f"gradient steps, success {success:.3f}, at the last step {final_success:.3f}"
        )


def choose_examples(observations: np.ndarray, successes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw at most MAX_SUCCESS_EXAMPLES of the observations that solve the task, without replacement.

    The state before the first action does not count, as in the paper's data.
    """
    counts = successes[:, 1:].sum(1)
    ends = counts.cumsum()
    ranks = rng.choice(ends[-1], min(MAX_SUCCESS_EXAMPLES, ends[-1]), replace=False)
    episodes = np.searchsorted(ends, ranks, side="right")
    within = ranks - (ends - counts)[episodes]
    steps = [np.flatnonzero(successes[episode, 1:])[k] + 1 for episode, k in zip(episodes, within)]
    return np.stack([observations[episode, step] for episode, step in zip(episodes, steps)])


def write_dataset(args: Args, behavior_path: Path, output: Path) -> dict:
    """Roll out the mixture, write the dataset whole or not at all, return its metadata. Same arguments, same bytes."""
    behavior, env_id = common.load_weights(behavior_path), common.TASKS[args.env_id].state_task or args.env_id
    if behavior.get("env_id") != env_id:
        raise common.UserError(f"error: {behavior_path} holds no policies of {env_id}; make them with --train.")
    checkpoints, n = behavior["checkpoints"], args.num_episodes
    weights = mixture([checkpoint["success_rate"] for checkpoint in checkpoints], SUCCESS_RATES[args.quality])
    env, steps = common.make_env(args.env_id), common.TASKS[args.env_id].max_episode_steps
    shapes = {
        "observations": ((n, steps + 1, *env.observation_space.shape), env.observation_space.dtype),
        "actions": ((n, steps, *env.action_space.shape), np.float32),
        "successes": ((n, steps + 1), np.bool_),
        "lengths": ((n,), np.int32),
    }
    env.close()
    most_examples = (min(MAX_SUCCESS_EXAMPLES, n * steps), *env.observation_space.shape), env.observation_space.dtype
    sizes = [int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in [*shapes.values(), most_examples]]
    common.check_space(output, sum(sizes))
    rng = np.random.default_rng([args.seed, common.STREAMS.index("dataset"), common.QUALITIES.index(args.quality)])
    jobs = ((i, rng.choice(len(weights), p=weights), common.episode_seed("dataset", args.seed, i)) for i in range(n))
    with common.write_directory(output) as directory:
        arrays = {name: common.create_array(directory / f"{name}.npy", *shape) for name, shape in shapes.items()}
        arrays["lengths"][:] = steps
        results = run_episodes(args, checkpoints, jobs, n, f"rolling out {args.env_id}", directory)
        if not arrays["successes"][:, 1:].any():
            raise common.UserError(f"error: none of the {n} episodes succeeds; collect more with --num-episodes.")
        examples = choose_examples(arrays["observations"], arrays["successes"], rng)
        path = directory / "success_examples.npy"
        arrays["success_examples"] = common.create_array(path, examples.shape, examples.dtype)
        arrays["success_examples"][:] = examples
        for array in arrays.values():
            array.flush()
        names = ("initial_success", "success", "final_success")
        metadata = {
            "env_id": args.env_id,
            "quality": args.quality,
            "seed": args.seed,
            "num_episodes": n,
            **common.success_statistics({name: results[:, i + 1] for i, name in enumerate(names)}),
            "num_success_examples": len(examples),
            "versions": common.versions("mujoco", "gymnasium", "gymnasium-robotics", "metaworld"),
            "behavior": {
                "file": behavior_path.name,
                "sha256": common.sha256(behavior_path),
                "success_rates": [checkpoint["success_rate"] for checkpoint in checkpoints],
                "weights": weights.tolist(),
                "episodes": np.bincount(results[:, 0], minlength=len(checkpoints)).tolist(),
            },
            "sha256": {name: common.sha256(directory / f"{name}.npy") for name in arrays},
        }
        common.write_json(directory / "metadata.json", metadata)
    return metadata


def collect(args: Args) -> dict:
    """Make the dataset that the arguments describe; return its metadata. Raises UserError for a mistake in them."""
    common.find_task(args.env_id)
    common.check_quality(args.quality)
    common.check_range(1, np.inf, args, "num_episodes", "train_steps", "calibration_episodes", "hidden_dim", "repr_dim")
    common.check_range(0, np.inf, args, "num_workers", "seed_episodes", "warmup_steps")
    common.check_range(0, 1, args, "learning_rate", "random_goals")
    common.check_range(2, np.inf, args, "batch_size", "num_envs")
    common.check_range(1e-6, 1 - 1e-6, args, "discount")
    common.check_range(0, 2**32 - 1, args, "seed")
    if args.entropy_coefficient is not None:
        common.check_range(0, np.inf, args, "entropy_coefficient")
    output = args.output or Path("datasets") / f"{args.env_id}-{args.quality}"
    if output.exists() and not args.overwrite:
        raise common.UserError(f"error: {output} exists; add --overwrite to replace it, or choose another --output.")
    if output.exists() and not (output / "metadata.json").exists():
        raise common.UserError(f"error: {output} is not a dataset, so it is not replaced; choose another --output.")
    state_task = common.TASKS[args.env_id].state_task
    if args.train and state_task:
        raise common.UserError(
            f"error: --train: {args.env_id} has no policies of its own, its data are made by those of {state_task}; "
            f"train these first: python collect_data.py --env-id {state_task} --train"
        )
    behavior_path = args.behavior_dir / f"{state_task or args.env_id}.pt"
    for directory in (output.parent, args.behavior_dir) if args.train else ():  # better now than after the training
        with common.explain_os_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
    try:
        if args.train:
            behavior = train_agent(args)
            calibrate(args, behavior["checkpoints"])
            common.save_weights(behavior_path, behavior)
            print(f"trained in {behavior['train_seconds']:.0f} s; wrote {behavior_path}")
        metadata = write_dataset(args, behavior_path, output)
    except KeyboardInterrupt:
        raise common.UserError(f"interrupted: nothing was written to {output}.") from None
    low, high = metadata["success_interval"]
    print(
        f"{output}: {args.num_episodes} episodes; {metadata['success_rate']:.3f} [{low:.3f}, {high:.3f}] succeed, "
        f"{metadata['final_success_rate']:.3f} at the last step; {metadata['initial_success_rate']:.3f} start solved"
    )
    return metadata


if __name__ == "__main__":
    with common.exit_quietly():
        collect(tyro.cli(Args))
