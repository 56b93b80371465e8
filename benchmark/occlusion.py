"""Measure how often the block cannot be seen while the gripper touches it:  python benchmark/occlusion.py

For each camera of FetchPush, 40 episodes of the policies that make the medium data. A block counts as hidden if less
than a tenth of its own pixels, those it would have if it were alone on the table, are to be seen.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import mujoco
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import collect_data
import common

EPISODES = 40


def drawn_geoms(camera: common.Camera) -> np.ndarray:
    """Return which geom each rendered pixel shows, by MuJoCo's segmentation; four make one in the picture."""
    renderer = camera._renderer
    renderer.enable_segmentation_rendering()
    renderer.update_scene(camera._data, camera._camera, camera._option)
    geoms = renderer.render()[..., 0]
    renderer.disable_segmentation_rendering()
    return geoms


def block_pixels(camera: common.Camera) -> int:
    """Count the rendered pixels that show the block."""
    return int((drawn_geoms(camera) == camera._renderer.model.geom("object0").id).sum())


def touched(env) -> bool:
    """Say whether the robot touches the block, by MuJoCo's contacts."""
    inner = env.unwrapped.inner
    pairs = inner.data.contact.geom[: inner.data.ncon]
    bodies = [{inner.model.body(inner.model.geom_bodyid[geom]).name for geom in pair} for pair in pairs]
    return any("object0" in pair and any(name.startswith("robot0:") for name in pair) for pair in bodies)


def shares(env, pictures: Iterator) -> tuple[list[float], list[float]]:
    """Return the visible share of the block for each of the states with and without contact, where it is in view."""
    camera, model, found = env.unwrapped.camera, env.unwrapped.inner.model, {True: [], False: []}
    robot = [g for g in range(model.ngeom) if model.body(model.geom_bodyid[g]).name.startswith("robot0:")]
    groups = model.geom_group[robot].copy()
    for _ in pictures:
        seen = block_pixels(camera)
        model.geom_group[robot] = mujoco.mjNGROUP - 1
        alone = block_pixels(camera)
        model.geom_group[robot] = groups
        if alone:
            found[touched(env)].append(seen / alone)
    return found[True], found[False]


def play(env, env_id: str, episodes: int) -> Iterator[None]:
    """Play episodes of the policies that make the medium data, chosen as these are, and yield at every state."""
    state_task = common.TASKS[env_id].state_task
    behavior = common.load_weights(Path(collect_data.__file__).parent / "behavior" / f"{state_task}.pt")
    checkpoints, rng = behavior["checkpoints"], np.random.default_rng(0)
    rates = [checkpoint["success_rate"] for checkpoint in checkpoints]
    weights = collect_data.mixture(rates, collect_data.SUCCESS_RATES["medium"])
    actors = [collect_data.load_actor(checkpoint) for checkpoint in checkpoints]
    goal = torch.tensor(common.TASKS[env_id].desired_goal)
    for episode in range(episodes):
        actor, generator = actors[rng.choice(len(actors), p=weights)], torch.Generator().manual_seed(episode)
        scale = torch.rand((), generator=generator)
        env.reset(seed=common.episode_seed("dataset", 0, episode))
        truncated = False
        while not truncated:
            yield
            with torch.inference_mode():
                noise = scale * torch.randn(4, generator=generator)
                action = actor.sample(torch.from_numpy(env.unwrapped.state), goal, noise).numpy()
            _, _, _, truncated, _ = env.step(action)


def main() -> None:
    views = {env_id: common.VIEWS[env_id] for env_id in ("FetchPushImage", "FetchPushImageOccluded")}
    views["the released code's occluded view"] = common.View((1.25, 0.8, 0.4), 0.7, 180.0, -80.0)
    print("| view | states with contact | block hidden | states without | block hidden | visible share, mean |")
    print("|---|---|---|---|---|---|")
    for name, view in views.items():
        env = common.make_env("FetchPushImage")
        env.unwrapped.camera.close()
        env.unwrapped.camera = common.Camera(env, view)
        contact, other = (np.array(x) for x in shares(env, play(env, "FetchPushImage", EPISODES)))
        env.close()
        hidden = f"{(contact < 0.1).mean():.2f} | {len(other):,} | {(other < 0.1).mean():.2f} | {other.mean():.2f}"
        print(f"| {name} | {len(contact):,} | {hidden} |", flush=True)


if __name__ == "__main__":
    main()
