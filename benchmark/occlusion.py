"""Measure how often the block cannot be seen while the gripper touches it:  python benchmark/occlusion.py

For each camera of FetchPush, the first 40 episodes of the medium data. A block counts as hidden if less than a tenth of
its own pixels, those it would have if it were alone on the table, are to be seen. States in which the block would be
out of the picture anyway do not count.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import collect_data
import common
import robot_tasks
from episodes import load_behavior, roll_out

EPISODES = 40


def block_pixels(camera: robot_tasks.Camera) -> int:
    """Count the rendered pixels that show the block, by MuJoCo's segmentation; four make one of the picture."""
    renderer = camera._renderer
    renderer.enable_segmentation_rendering()
    renderer.update_scene(camera._data, camera._camera, camera._option)
    geoms = renderer.render()[..., 0]
    renderer.disable_segmentation_rendering()
    return int((geoms == renderer.model.geom("object0").id).sum())


def touched(inner: gym.Env) -> bool:
    """Say whether the robot touches the block, by MuJoCo's contacts."""
    pairs = inner.data.contact.geom[: inner.data.ncon]
    bodies = [{inner.model.body(inner.model.geom_bodyid[geom]).name for geom in pair} for pair in pairs]
    return any("object0" in pair and any(name.startswith("robot0:") for name in pair) for pair in bodies)


class Watched(gym.Wrapper):
    """Calls a function in every state."""

    def __init__(self, env: gym.Env, look: Callable[[], None]):
        super().__init__(env)
        self.look = look

    def reset(self, **kwargs):
        result = super().reset(**kwargs)
        self.look()
        return result

    def step(self, action):
        result = super().step(action)
        self.look()
        return result


def shares(view: robot_tasks.View, episodes: int) -> dict[bool, np.ndarray]:
    """Return the visible share of the block in each state where it is in view, by whether the robot touches it."""
    env, found = common.make_env("FetchPush"), {True: [], False: []}
    inner = env.unwrapped.inner
    camera, model = robot_tasks.Camera(inner, view), inner.model
    robot = [g for g in range(model.ngeom) if model.body(model.geom_bodyid[g]).name.startswith("robot0:")]
    groups, hidden = model.geom_group[robot].copy(), len(camera._option.geomgroup) - 1  # which is not drawn

    def look() -> None:
        seen = block_pixels(camera)
        model.geom_group[robot] = hidden
        alone = block_pixels(camera)
        model.geom_group[robot] = groups
        if alone:
            found[touched(inner)].append(seen / alone)

    actors, rates = load_behavior(collect_data.Args().behavior_dir / "FetchPush.pt", "FetchPush")
    weights = collect_data.mixture(rates, collect_data.SUCCESS_RATES["medium"])
    rng = np.random.default_rng(common.seed_sequence(0, "mixture"))
    for episode, checkpoint in enumerate(rng.choice(len(weights), episodes, p=weights)):
        seed = common.episode_seed(0, "dataset", episode)
        roll_out(Watched(env, look), "FetchPush", actors[checkpoint], seed)
    camera.close()
    env.close()
    return {touch: np.array(values) for touch, values in found.items()}


def main(episodes: int = EPISODES) -> None:
    views = {env_id: robot_tasks.VIEWS[env_id] for env_id in ("FetchPushImage", "FetchPushImageOccluded")}
    views["the released code's occluded view"] = robot_tasks.View((1.25, 0.8, 0.4), 0.7, 180.0, -80.0)
    print("| view | states with contact | block hidden | states without | block hidden | visible share, mean |")
    print("|---|---|---|---|---|---|")
    for name, view in views.items():
        found = shares(view, episodes)
        cells = [f"{len(found[touch]):,} | {(found[touch] < 0.1).mean():.2f}" for touch in (True, False)]
        print(f"| {name} | {cells[0]} | {cells[1]} | {found[False].mean():.2f} |", flush=True)


if __name__ == "__main__":
    with common.user_errors():
        main()
