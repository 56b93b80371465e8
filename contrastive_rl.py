"""Online contrastive RL: the agent whose policies collect the datasets of this project.

A critic f(s, a, g) = phi(s, a)^T psi(g) is trained to tell the goals that follow (s, a) in the same episode from those
of other episodes, so that it estimates how likely the agent is to reach g from there. A goal-conditioned policy
maximizes f and its own entropy, and its episodes join the replay buffer. Checkpoints from untrained to good are saved
with their success rates; `collect_data.py` mixes them.

Eysenbach, Zhang, Levine and Salakhutdinov 2022, "Contrastive Learning as Goal-Conditioned Reinforcement Learning"
(NeurIPS, arXiv 2206.07568).

    python contrastive_rl.py --env-id FetchPush
    python collect_data.py --env-id FetchPush

Differences from the paper and the released code (reasons: docs/contrastive_rl.md):
 1. The replay buffer starts with episodes of a noisy scripted controller; `--seed-episodes 0` is the paper's way.
 2. Observations and goals are standardized.
 3. The goal is the position of the object or the gripper, not a whole state.
 4. Half of the training episodes command the task's goal, half a position where an earlier episode ended.
 5. There is one gradient step for two environment steps, and the critic is the smaller of two.
 6. The policy is trained on the futures of its batch as goals; the released code adds goals of other rows.
 7. The weight of the entropy is adapted; the released code has none on tasks of states.
"""

import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.distributions import Normal, TanhTransform
from tqdm import tqdm

import common


@dataclass
class Args:
    env_id: str = "FetchReach"
    """the task: FetchReach, FetchPush, SawyerWindowOpen or SawyerDrawerClose"""
    seed: int = 0
    """random seed"""
    behavior_dir: Path = Path(__file__).parent / "behavior"
    """the checkpoints are written to BEHAVIOR_DIR/ENV_ID.pt, and replace those that are there"""
    train_steps: int = 80_000
    """environment steps of the agent, seed episodes not counted"""
    seed_episodes: int = 400
    """scripted episodes in the replay buffer before the first step; 0: random actions, no warm-up, as in the paper"""
    warmup_steps: int = 2_000
    """gradient steps on the scripted episodes before the first environment step"""
    num_envs: int = 4
    """number of environments that are stepped together"""
    batch_size: int = 256
    """transitions in a batch; each is a negative for all others"""
    learning_rate: float = 3e-4
    """Adam's learning rate for policy, critic and entropy coefficient"""
    discount: float = 0.99
    """parameter of the geometric distribution that goals are relabeled with"""
    hidden_dim: int = 256
    """width of the two hidden layers in every network"""
    repr_dim: int = 64
    """dimension of the representations phi and psi"""
    random_goals: float = 0.0
    """share of the policy's batch whose goal is another row's instead of its own future"""
    entropy_coefficient: float | None = None
    """fixed weight of the policy's entropy; adapted to --target-entropy if not given"""
    target_entropy: float = 0.0
    """the entropy that the entropy coefficient is adapted to, in nats"""
    calibration_episodes: int = 200
    """number of episodes that measure each checkpoint's success rate"""


# ---------------------------------------------------------------------------------------------------------- networks


def mlp(sizes: list[int], generator: torch.Generator) -> nn.Sequential:
    """Return a ReLU network with a linear last layer, Glorot-uniform weights and zero biases."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes, sizes[1:]):
        linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out)  # nn.Linear itself draws from the global generator
        nn.init.xavier_uniform_(linear.weight, generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Goal-conditioned policy pi(a | s, g), the tanh of a normal distribution; `dims` of observation, goal, action."""

    def __init__(self, dims: tuple[int, int, int], hidden_dim: int, generator: torch.Generator):
        super().__init__()
        for name, dim in (("observation", dims[0]), ("goal", dims[1])):
            self.register_buffer(f"{name}_mean", torch.zeros(dim))
            self.register_buffer(f"{name}_std", torch.ones(dim))
        self.net = mlp([dims[0] + dims[1], hidden_dim, hidden_dim, 2 * dims[2]], generator)

    def forward(self, observation: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, each [B, actions], of the normal distribution before the tanh."""
        observation = (observation - self.observation_mean) / self.observation_std
        goal = (goal - self.goal_mean) / self.goal_std
        mean, std = self.net(torch.cat([observation, goal], -1)).chunk(2, -1)
        return mean, F.softplus(std) + 1e-3

    def sample(self, observation: Tensor, goal: Tensor, noise: Tensor) -> Tensor:
        """Turn standard normal noise [B, actions] into actions of the same shape in (-1, 1)."""
        mean, std = self(observation, goal)
        return torch.tanh(mean + std * noise)


def tanh_normal_log_prob(mean: Tensor, std: Tensor, x: Tensor) -> Tensor:
    """Return the log density [B] of the action tanh(x), where x ~ Normal(mean, std); all arguments are [B, actions].

    It is computed from x, not from the action: near -1 and 1 the inverse of tanh loses all digits.
    """
    log_prob = Normal(mean, std, validate_args=False).log_prob(x)
    return (log_prob - TanhTransform().log_abs_det_jacobian(x, torch.tanh(x))).sum(-1)


class Critic(nn.Module):
    """Two contrastive critics f_k(s, a, g) = phi_k(s, a)^T psi_k(g), k = 1, 2; `dims` of observation, goal, action."""

    def __init__(self, dims: tuple[int, int, int], hidden_dim: int, repr_dim: int, generator: torch.Generator):
        super().__init__()
        for name, dim in (("observation", dims[0]), ("goal", dims[1])):
            self.register_buffer(f"{name}_mean", torch.zeros(dim))
            self.register_buffer(f"{name}_std", torch.ones(dim))
        hidden = [hidden_dim, hidden_dim, repr_dim]
        self.phi_nets = nn.ModuleList(mlp([dims[0] + dims[2], *hidden], generator) for _ in range(2))
        self.psi_nets = nn.ModuleList(mlp([dims[1], *hidden], generator) for _ in range(2))

    def phi(self, observation: Tensor, action: Tensor) -> Tensor:
        """Encode observations [B, D] and actions [B, actions] as [2, B, repr_dim]."""
        x = torch.cat([(observation - self.observation_mean) / self.observation_std, action], -1)
        return torch.stack([net(x) for net in self.phi_nets])

    def psi(self, goal: Tensor) -> Tensor:
        """Encode goals [B, G] as [2, B, repr_dim]."""
        x = (goal - self.goal_mean) / self.goal_std
        return torch.stack([net(x) for net in self.psi_nets])


# ------------------------------------------------------------------------------------------------------------ losses


def critic_loss(phi: Tensor, psi: Tensor) -> Tensor:
    """Binary NCE loss of phi, psi [2, B, repr_dim]: goal i belongs to row i, the other B - 1 goals are negatives."""
    logits = phi @ psi.mT  # [2, B, B]
    labels = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device).expand_as(logits)
    return F.binary_cross_entropy_with_logits(logits, labels)


def actor_loss(phi: Tensor, psi: Tensor, log_prob: Tensor, alpha: Tensor) -> Tensor:
    """Maximize the smaller critic and the entropy. phi [2, B, repr_dim] of the policy's actions, psi, log_prob [B]."""
    value = (phi * psi).sum(-1).amin(0)
    return (alpha * log_prob - value).mean()


def entropy_loss(log_alpha: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """Raise the entropy coefficient while the entropy, -log_prob [B], is below its target, and lower it above."""
    return log_alpha.exp() * (-log_prob - target_entropy).mean()


# -------------------------------------------------------------------------------------------------------------- data


class ReplayBuffer:
    """All episodes so far, each of T steps: observations [N, T + 1, D] and actions [N, T, A], float32."""

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
        """Return observations [B, D], actions [B, A] and goals [B, G] from k >= 1 steps later, P(k) ~ discount^k."""
        steps = self.actions.shape[1]
        episode = torch.randint(self.size, (batch_size,), generator=generator)
        t = torch.randint(steps, (batch_size,), generator=generator)
        u = torch.rand(batch_size, generator=generator, dtype=torch.float64)
        remaining = steps - t  # the geometric distribution is truncated to the episode, by inversion
        k = 1 + (torch.log1p(-u * (1 - discount**remaining)) / np.log(discount)).long()
        future = t + torch.minimum(k, remaining)
        goals = self.observations[episode, future][:, self.goal_slice]
        return self.observations[episode, t], self.actions[episode, t], goals


def scripted_action(env_id: str, observation: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Return the action [4] of a controller that moves the object to the goal [3] (Sawyer: to the task's own)."""
    action = np.zeros(4)
    if env_id == "FetchReach":
        action[:3] = (goal - observation[:3]) / 0.05  # 0.05 m per unit of action
    elif env_id == "FetchPush":
        gripper, block = observation[:3], observation[3:6]
        to_goal, offset = goal[:2] - block[:2], gripper[:2] - block[:2]
        distance = np.linalg.norm(to_goal)
        direction = to_goal / max(distance, 1e-6)
        along = offset @ direction
        aside = np.linalg.norm(offset - along * direction)
        if distance < 0.015:  # at the goal: move the gripper up
            action[2] = 1.0
        elif along < -0.02 and aside < 0.02:  # behind the block: move down, then push
            action[:2] = (direction * min(distance, 0.05) - (offset - along * direction)) / 0.05
            if gripper[2] > 0.435:
                action[:3] = 0.0, 0.0, (0.42 - gripper[2]) / 0.05
        else:  # move behind the block, above it
            action[:2] = (block[:2] - direction * 0.07 - gripper[:2]) / 0.05
            action[2] = (0.48 - gripper[2]) / 0.05
            if gripper[2] < 0.46 and np.linalg.norm(offset) < 0.09:
                action[:2] = 0.0
    else:
        from metaworld.policies import ENV_POLICY_MAP

        full = np.zeros(39)
        full[:3] = observation[:3] + (0.0, 0.0, 0.045)  # the policy reads the hand's body, 4.5 cm above the tool center
        full[4:7] = observation[3:6]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Constant(s) may be too high": actions are clipped below
            action[:] = ENV_POLICY_MAP[common.TASKS[env_id].kwargs["name"]]().get_action(full)
    return np.clip(action, -1.0, 1.0)


def seed_replay(args: Args, replay: ReplayBuffer, episodes: int, rng: np.random.Generator) -> float:
    """Fill the replay buffer with noisy scripted (or, without seed episodes, random) play; return its success rate."""
    task, env, solved = common.TASKS[args.env_id], common.make_env(args.env_id), 0
    for episode in tqdm(range(episodes), desc="first episodes", unit="episode", leave=False):
        observation, _ = env.reset(seed=common.episode_seed(args.seed, "agent", 1 + episode))
        goal = np.array(task.desired_goal)
        if args.env_id == "FetchPush" and rng.random() < 0.5:  # other directions, so that more than one goal is known
            goal[:2] = np.array([1.344, 0.749]) + rng.uniform(-0.15, 0.15, 2)
        observations, actions, success = [observation], [], False
        for _ in range(task.max_episode_steps):
            action = rng.uniform(-1, 1, 4)
            if args.seed_episodes > 0:  # with noise, so that the data show more than the shortest way
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


# ------------------------------------------------------------------------------------------------------------ update


def update(
    batch: tuple[Tensor, Tensor, Tensor],
    actor: Actor,
    critic: Critic,
    log_alpha: Tensor,
    optimizer: torch.optim.Optimizer,
    args: Args,
    generator: torch.Generator,
) -> None:
    """Take one gradient step of critic, policy and entropy coefficient, from the same batch and the same parameters."""
    observation, action, goal = batch
    optimizer.zero_grad()
    psi = critic.psi(goal)
    critic_loss(critic.phi(observation, action), psi).backward(inputs=list(critic.parameters()))

    other = (torch.arange(len(goal)) < round(args.random_goals * len(goal)))[:, None]  # rows with another row's goal
    goal, psi = torch.where(other, goal.roll(1, 0), goal), torch.where(other, psi.roll(1, 1), psi)
    noise = torch.randn(action.shape, generator=generator)
    mean, std = actor(observation, goal)
    x = mean + std * noise
    log_prob = tanh_normal_log_prob(mean, std, x)
    phi = critic.phi(observation, torch.tanh(x))
    actor_loss(phi, psi.detach(), log_prob, log_alpha.detach().exp()).backward(inputs=list(actor.parameters()))

    if args.entropy_coefficient is None:
        entropy_loss(log_alpha, log_prob.detach(), args.target_entropy).backward()
    optimizer.step()


# -------------------------------------------------------------------------------------------------------- evaluation


def load_actor(checkpoint: dict) -> Actor:
    """Return the policy of a saved checkpoint, in float32. Raises KeyError or RuntimeError for other parameters."""
    weights = {name: value.float() for name, value in checkpoint["actor"].items()}
    dims = len(weights["observation_mean"]), len(weights["goal_mean"]), len(weights["net.4.bias"]) // 2
    actor = Actor(dims, len(weights["net.0.bias"]), torch.Generator())
    actor.load_state_dict(weights)
    return actor


def load_behavior(path: Path, env_id: str) -> tuple[list[Actor], list[float]]:
    """Return the policies in a file that `train` wrote, and their success rates.

    Raises UserError if the file is missing, damaged, of another task than `env_id`, or holds other parameters.
    """
    env = common.make_env(env_id)
    sizes = env.observation_space.shape[0] + len(common.TASKS[env_id].desired_goal), 2 * env.action_space.shape[0]
    env.close()
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")  # which cannot run code
        if content["env_id"] != env_id:
            raise ValueError(f"they are of {content['env_id']}")
        actors = [load_actor(checkpoint) for checkpoint in content["checkpoints"]]
        rates = [float(checkpoint["success_rate"]) for checkpoint in content["checkpoints"]]
        if not actors or any((actor.net[0].in_features, actor.net[-1].out_features) != sizes for actor in actors):
            raise ValueError(f"each must have {sizes[0]} inputs and {sizes[1]} outputs")
    except Exception as error:  # torch.load raises half a dozen types for a damaged file
        raise common.UserError(
            f"{path} is damaged or missing, or holds no policies of {env_id} ({common.first_line(error)}); make it "
            f"with: python contrastive_rl.py --env-id {env_id} --behavior-dir {path.parent}"
        ) from None
    return actors, rates


def roll_out(env: gym.Env, env_id: str, actor: Actor, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Play one episode for the task's goal; return observations [T + 1, ...], actions [T, A] and successes [T + 1].

    The policy acts on the state also where the observations are images, so that these are of the very same episodes.
    Its noise is scaled by a number uniform in [0, 1], one for each episode (docs/contrastive_rl.md: Datasets). `seed`
    is common.episode_seed's; PyTorch's generator reads its lower 32 bits.
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


def evaluate(env: gym.Env, env_id: str, actor: Actor, seeds: list[int]) -> dict[str, float]:
    """Return the share of episodes that succeed at any step after the first action, and at the last step."""
    successes = np.stack([roll_out(env, env_id, actor, seed)[2] for seed in seeds])
    return {"success_rate": float(successes[:, 1:].any(1).mean()), "final_success_rate": float(successes[:, -1].mean())}


# ---------------------------------------------------------------------------------------------------------- training


def train_agent(args: Args) -> dict:
    """Train the agent; return its checkpoints, without success rates. Same seed and machine: the same bits."""
    task, start_time, num_envs = common.TASKS[args.env_id], time.time(), args.num_envs
    steps, first_episodes = task.max_episode_steps, args.seed_episodes or 10_000 // task.max_episode_steps
    rounds = -(-args.train_steps // (steps * num_envs))
    rng = np.random.default_rng(common.seed_sequence(args.seed, "agent"))  # episode seeds of this stream start at 1
    # 32 bits are all that PyTorch's CPU generator reads of a seed.
    generator = torch.Generator().manual_seed(int(common.seed_sequence(args.seed, "weights").generate_state(1)[0]))
    envs = [common.make_env(args.env_id) for _ in range(num_envs)]
    dims = envs[0].observation_space.shape[0], len(task.desired_goal), envs[0].action_space.shape[0]
    replay = ReplayBuffer(first_episodes + rounds * num_envs, steps, dims[0], dims[2], task.achieved_goal)
    seed_rate = seed_replay(args, replay, first_episodes, rng)

    actor = Actor(dims, args.hidden_dim, generator)
    critic = Critic(dims, args.hidden_dim, args.repr_dim, generator)
    alpha = torch.tensor(1.0 if args.entropy_coefficient is None else args.entropy_coefficient)
    log_alpha = alpha.log().requires_grad_()
    optimizer = torch.optim.Adam([*critic.parameters(), *actor.parameters(), log_alpha], args.learning_rate, eps=1e-7)
    states = replay.observations[: replay.size].flatten(0, 1)
    mean, std = states.mean(0), states.std(0).clamp(min=1e-3)  # a coordinate that hardly moves is not amplified
    statistics = {"observation_mean": mean, "observation_std": std}
    statistics |= {"goal_mean": mean[task.achieved_goal], "goal_std": std[task.achieved_goal]}
    for network in (actor, critic):
        network.load_state_dict(statistics, strict=False)

    # A round plays one episode in every environment, with one gradient step for every two environment steps.
    warmup = args.warmup_steps if args.seed_episodes else 0
    total = warmup + rounds * steps * (num_envs // 2)
    # Learning is fast at first: checkpoints after 1/512, ..., 1/2 and all of the gradient steps, and an untrained one.
    save_at = {0} | {-(-total // 2**k) for k in range(10)}
    done, checkpoints = 0, []
    progress = tqdm(total=total, desc=f"training on {args.env_id}", unit="gradient step", mininterval=2)

    def learn(gradient_steps: int, env_steps: int) -> None:
        nonlocal done
        for _ in range(gradient_steps):
            if done in save_at:
                # float16 halves the file and the policy acts alike; means and standard deviations need float32's range.
                weights = {name: x.half() if "net" in name else x.clone() for name, x in actor.state_dict().items()}
                checkpoints.append({"env_steps": env_steps, "gradient_steps": done, "actor": weights})
            if done < total:
                batch = replay.sample(args.batch_size, args.discount, generator)
                update(batch, actor, critic, log_alpha, optimizer, args, generator)
                done += 1
                progress.update()

    learn(warmup, 0)
    recent: list[bool] = []
    for i in range(rounds):
        seeds = [common.episode_seed(args.seed, "agent", 1 + replay.size + e) for e in range(num_envs)]
        observation = np.stack([env.reset(seed=seed)[0] for env, seed in zip(envs, seeds)])
        goal = replay.observations[rng.integers(replay.size, size=num_envs), -1, task.achieved_goal]  # a copy
        goal[: num_envs // 2] = torch.tensor(task.desired_goal)
        observations, actions, success = [observation], [], np.zeros(num_envs, bool)
        for t in range(steps):
            noise = torch.randn(num_envs, dims[2], generator=generator)
            with torch.no_grad():
                action = actor.sample(torch.from_numpy(observation), goal, noise).numpy()
            results = [env.step(a) for env, a in zip(envs, action)]
            observation = np.stack([result[0] for result in results])
            observations.append(observation)
            actions.append(action)
            success |= [result[4]["success"] for result in results]
            learn(num_envs // 2, (i * steps + t + 1) * num_envs)
        replay.add(np.stack(observations, 1), np.stack(actions, 1))
        recent = (recent + list(success[: num_envs // 2]))[-20:]
        progress.set_postfix(success=f"{np.mean(recent):.2f}", alpha=f"{log_alpha.exp().item():.3f}")
    learn(1, rounds * steps * num_envs)  # which saves the last checkpoint
    progress.close()
    for env in envs:
        env.close()
    return {
        "env_id": args.env_id,
        "checkpoints": checkpoints,
        "args": {name: value for name, value in vars(args).items() if name != "behavior_dir"},
        "versions": common.versions("torch", "gymnasium", *task.simulator),
        "seed_episodes_success_rate": seed_rate,
        "train_seconds": time.time() - start_time,
    }


def train(args: Args) -> dict:
    """Train the agent, measure its checkpoints, write them to BEHAVIOR_DIR/ENV_ID.pt and return what was written.

    Raises UserError for a mistake in the flags and for a place that cannot be written.
    """
    tasks = [name for name, task in common.TASKS.items() if not task.state_task]
    if args.env_id not in tasks:
        raise common.UserError(f"--env-id is {args.env_id}; the agent can be trained on {', '.join(tasks)}.")
    ranges = {"train_steps calibration_episodes hidden_dim repr_dim": (1, 2**31), "seed": (0, 2**32 - 1)}
    ranges |= {"seed_episodes warmup_steps": (0, 2**31), "batch_size num_envs": (2, 2**31)}
    ranges |= {"discount": (1e-6, 1 - 1e-6), "learning_rate random_goals": (0, 1)}
    ranges |= {"target_entropy": (-1e6, 1e6), "entropy_coefficient": (0, 1e6)}
    for names, (least, most) in ranges.items():
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not least <= value <= most:
                raise common.UserError(f"--{name.replace('_', '-')} is {value}; it must be from {least} to {most}.")
    path, n = args.behavior_dir / f"{args.env_id}.pt", args.calibration_episodes
    with common.explain_os_errors(args.behavior_dir):  # now rather than after the training
        args.behavior_dir.mkdir(parents=True, exist_ok=True)
    behavior = train_agent(args)
    env = common.make_env(args.env_id)
    for c, checkpoint in enumerate(behavior["checkpoints"]):
        seeds = [common.episode_seed(args.seed, "calibration", c * n + i) for i in range(n)]
        checkpoint |= evaluate(env, args.env_id, load_actor(checkpoint), seeds)
        text = "{env_steps:6} environment steps, {gradient_steps:6} gradient steps: success rate {success_rate:.3f}"
        print((text + ", at the last step {final_success_rate:.3f}").format(**checkpoint))
    env.close()
    with common.write_file(path) as file:
        torch.save(behavior, file)
    print(f"trained in {behavior['train_seconds'] / 60:.1f} minutes; wrote {path}")
    return behavior


if __name__ == "__main__":
    try:
        train(tyro.cli(Args))
    except (common.UserError, KeyboardInterrupt) as error:
        sys.exit(f"error: {str(error) or 'interrupted; nothing was written.'}")
