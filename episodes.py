"""Environments with goals, and scripted episodes: what contrastive_rl.py needs beside its method.

An environment with goals has the observations of Gymnasium's GoalEnv: a dictionary of `observation`, `achieved_goal`
and `desired_goal`. Tasks of this project have one desired goal; `gymnasium_robotics:FetchReach-v4` and any other
GoalEnv, also as MODULE:ID, draws one for each episode.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Generator, Tensor
from tqdm import tqdm

import common


class FixedGoal(gym.ObservationWrapper):
    """A task of this project as a GoalEnv: its desired goal is always the same."""

    def __init__(self, env_id: str):
        super().__init__(common.make_env(env_id))
        self.task = common.TASKS[env_id]
        goal = gym.spaces.Box(-np.inf, np.inf, (len(self.task.desired_goal),), np.float32)
        spaces = {"observation": self.env.observation_space, "achieved_goal": goal, "desired_goal": goal}
        self.observation_space = gym.spaces.Dict(spaces)

    def observation(self, observation: np.ndarray) -> dict[str, np.ndarray]:
        desired = np.array(self.task.desired_goal, np.float32)
        return {
            "observation": observation,
            "achieved_goal": observation[self.task.achieved_goal],
            "desired_goal": desired,
        }


def make_env(env_id: str) -> gym.Env:
    """Return a new environment with goals: one of TASKS that has states, or any GoalEnv, also as MODULE:ID.

    Raises UserError if there is none of that name, or if its spaces are not those that the method takes: observations,
    achieved and desired goals a Box of one axis, and so the actions, with finite bounds.
    """
    if env_id in common.TASKS and not common.TASKS[env_id].state_task:
        return FixedGoal(env_id)
    tasks = ", ".join(name for name, task in common.TASKS.items() if not task.state_task)
    try:
        env = gym.make(env_id)
    except (gym.error.Error, ImportError) as error:
        raise common.UserError(
            f"--env-id is {env_id} ({common.first_line(error)}); the agent can be trained on {tasks} and on any "
            "GoalEnv of Gymnasium, also as MODULE:ID, like gymnasium_robotics:FetchReach-v4."
        ) from None
    if env.spec.max_episode_steps is None:  # an environment that never ends would be played for ever
        env = gym.wrappers.TimeLimit(env, 10_000)
    spaces = getattr(env.observation_space, "spaces", {})
    spaces = [spaces.get(name) for name in ("observation", "achieved_goal", "desired_goal")] + [env.action_space]
    if not all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in spaces):
        raise common.UserError(
            f"{env_id} is no GoalEnv with vectors: its observations must be a Dict of observation, achieved_goal and "
            "desired_goal, each a Box of one axis, and its actions a Box of one axis."
        )
    if not np.isfinite([env.action_space.low, env.action_space.high]).all():
        raise common.UserError(f"the actions of {env_id} are {env.action_space}; their bounds must be finite.")
    return env


def is_success(info: dict[str, Any]) -> bool | None:
    """Return what an environment's `info` says of the present state, None if it says nothing."""
    flag = info.get("success", info.get("is_success"))
    return None if flag is None else bool(flag)


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


class Player:
    """Steps environments together; every episode that ends joins the data."""

    def __init__(self, args: Any, data: Any, num_envs: int, rng: np.random.Generator, first_episode: int):
        self.envs = [make_env(args.env_id) for _ in range(num_envs)]
        self.args, self.data, self.rng, self.episodes, self.steps = args, data, rng, first_episode, 0
        self.bounds = self.envs[0].action_space.low, self.envs[0].action_space.high
        self.playing = [self.reset(i) for i in range(num_envs)]

    def choose(self, i: int, goal: np.ndarray) -> np.ndarray:
        """Return what an episode of environment i commands: its own goal, or where a random earlier episode ended."""
        return self.data.goals[self.data.ends[self.rng.integers(len(self.data.ends))]] if i % 2 else goal

    def reset(self, i: int) -> dict[str, Any]:
        """Begin an episode of environment i."""
        first, _ = self.envs[i].reset(seed=common.episode_seed(self.args.seed, "agent", self.episodes))
        self.episodes += 1
        goal = np.asarray(self.choose(i, first["desired_goal"]), np.float32)
        return {"goal": goal, "observations": [first["observation"]], "goals": [first["achieved_goal"]], "actions": []}

    def step(self, act: Any) -> None:
        """Take one step in every environment; `act` turns observations [B, D] and goals [B, G] into actions [B, A]."""
        observations = np.array([episode["observations"][-1] for episode in self.playing], np.float32)
        actions = act(observations, np.array([episode["goal"] for episode in self.playing]))
        low, high = self.bounds
        scaled = np.clip(low + (high - low) * (actions + 1) / 2, low, high)  # rounding must not leave the bounds
        for i, (env, episode, action) in enumerate(zip(self.envs, self.playing, actions)):
            state, _, terminated, truncated, _ = env.step(scaled[i])
            episode["observations"].append(state["observation"])
            episode["goals"].append(state["achieved_goal"])
            episode["actions"].append(action)
            if terminated or truncated:
                self.data.add(*(episode[name] for name in ("observations", "goals", "actions")), terminated)
                self.playing[i] = self.reset(i)
        self.steps += len(self.envs)

    def close(self) -> None:
        for env in self.envs:
            env.close()


class ScriptedPlayer(Player):
    """Plays a noisy scripted controller in one environment or, without --seed-episodes, at random."""

    def choose(self, i: int, goal: np.ndarray) -> np.ndarray:
        if self.args.env_id == "FetchPush" and self.rng.random() < 0.5:  # more than one goal, so that others are known
            goal = np.concatenate([np.array([1.344, 0.749]) + self.rng.uniform(-0.15, 0.15, 2), goal[2:]])
        return goal

    def act(self, observations: np.ndarray, goals: np.ndarray) -> np.ndarray:
        if self.args.seed_episodes:  # with noise, so that the data show more than the shortest way
            action = scripted_action(self.args.env_id, observations[0], goals[0]) + self.rng.normal(0.0, 0.5, 4)
        else:
            action = self.rng.uniform(-1, 1, len(self.bounds[0]))
        return np.clip(action, -1, 1).astype(np.float32)[None]


def first_episodes(args: Any, data: Any, rng: np.random.Generator) -> int:
    """Fill the data with scripted episodes or, without these, random steps; return the number of the next episode."""
    player, n = ScriptedPlayer(args, data, 1, rng, 1), args.seed_episodes
    with tqdm(total=n or args.random_steps, desc="first episodes", unit="", leave=False, mininterval=1) as progress:
        while (len(data.ends) < n) if n else (player.steps < args.random_steps or not data.ends):
            player.step(player.act)
            progress.update((len(data.ends) if n else player.steps) - progress.n)
    player.close()
    return player.episodes


def roll_out(env: gym.Env, env_id: str, actor: Any, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Play one episode for the task's goal; return observations [T + 1, ...], actions [T, A] and successes [T + 1].

    The policy acts on the state also where the observations are images, so that these are of the very same episodes.
    Its noise is scaled by a number uniform in [0, 1], one for each episode (docs/contrastive_rl.md: Datasets). `seed`
    is common.episode_seed's; PyTorch's generator reads its lower 32 bits.
    """
    generator = Generator().manual_seed(seed)
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


@torch.inference_mode()
def evaluate(policy: Callable[[Tensor, Tensor], Tensor], env_id: str, episodes: int, seed: int) -> dict[str, Any]:
    """Play in an environment of its own, for its goals; return means, 95 % intervals, and `episodes`, a list of each.

    `return`: the sum of rewards. If the environment's `info` says whether the goal is reached: `success`, after any
    action; `final_success`, after the last; `initial_success`, before the first; `discounted_return`, the sum of 0.99^t
    over the actions t = 0, 1, ... after which it is. `episode`: a number, the same for equal episodes.
    """
    env, known, solved, lists = make_env(env_id), {}, [], {"seed": [], "episode": [], "return": []}
    for i in range(episodes):
        lists["seed"].append(common.episode_seed(seed, "evaluation", i))
        state, info = env.reset(seed=lists["seed"][-1])
        first, flags, total, done = state, [is_success(info)], 0.0, False
        while not done:
            x = (
                torch.from_numpy(np.asarray(state[name], np.float32)[None]) for name in ("observation", "desired_goal")
            )
            state, reward, terminated, truncated, info = env.step(policy(*x)[0].numpy())
            flags.append(is_success(info))
            total, done = total + float(reward), terminated or truncated
        key = *(np.asarray(x).tobytes() for x in (*first.values(), state["observation"])), len(flags)
        lists["episode"].append(known.setdefault(key, len(known)))
        lists["return"].append(total)
        solved.append(flags)
    env.close()
    lists |= common.success_lists(solved)
    return common.summarise(lists) | {"episodes": lists}


def load_behavior(path: Path, env_id: str) -> tuple[list, list[float]]:
    """Return the policies in a file that `train` wrote, and their success rates.

    Raises UserError if the file is missing, damaged, of another task than `env_id`, or holds other parameters.
    """
    from contrastive_rl import load_actor  # which imports this file

    env = common.make_env(env_id)
    sizes = env.observation_space.shape[0] + len(common.TASKS[env_id].desired_goal), 2 * env.action_space.shape[0]
    env.close()
    try:
        content = torch.load(common.intact(path), weights_only=True, map_location="cpu")  # which cannot run code
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


def write_behavior(args: Any, plain: dict[str, Any], checkpoints: list[dict[str, Any]], seconds: float) -> None:
    """Measure each checkpoint as it is rolled out for datasets; write them to BEHAVIOR_DIR/ENV_ID.pt."""
    from contrastive_rl import load_actor

    env, n, path = common.make_env(args.env_id), args.calibration_episodes, args.behavior_dir / f"{args.env_id}.pt"
    for c, checkpoint in enumerate(checkpoints):
        seeds = [common.episode_seed(args.seed, "calibration", c * n + i) for i in range(n)]
        successes = np.stack([roll_out(env, args.env_id, load_actor(checkpoint), seed)[2] for seed in seeds])
        checkpoint["success_rate"] = float(successes[:, 1:].any(1).mean())
        checkpoint["final_success_rate"] = float(successes[:, -1].mean())
        text = "{env_steps:6} environment steps, {gradient_steps:6} gradient steps: success rate {success_rate:.3f}"
        print((text + ", at the last step {final_success_rate:.3f}").format(**checkpoint))
    env.close()
    content = {"env_id": args.env_id, "checkpoints": checkpoints, "train_seconds": seconds}
    content["args"] = {name: value for name, value in plain.items() if not name.endswith("_dir")}
    content["versions"] = common.versions("torch", "gymnasium", *common.TASKS[args.env_id].simulator)
    with common.write_file(path) as file:
        torch.save(content, file)
    print(f"wrote {path}")
