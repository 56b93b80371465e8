"""Draw a trained policy at work as a GIF:  python benchmark/picture.py runs/FetchPush__laeo__0__... policy.gif

Needs one GL library on the machine (Debian, Ubuntu: libegl1 and libgl1, or libosmesa6); nothing else here does.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("MUJOCO_GL", "egl")  # mujoco reads it when it is imported
import mujoco
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import laeo

CAMERAS = {  # what to look at (metres), from how far, from which side (degrees), from how high (degrees)
    "FetchReach": ((1.3, 0.55, 0.65), 1.5, 130, -20),
    "FetchPush": ((1.33, 0.82, 0.43), 0.8, 205, -35),
    "SawyerWindowOpen": ((0.05, 0.65, 0.2), 1.2, 130, -25),
    "SawyerDrawerClose": ((0.0, 0.65, 0.15), 1.2, 140, -30),
}


def main(run_dir: Path, output: Path, episodes: int = 4, size: int = 240) -> None:
    """Play evaluation episodes of a finished run and write every second frame."""
    checkpoint = common.load_weights(run_dir / "checkpoint.pt")
    args, weights = checkpoint["args"], checkpoint["actor"]
    mean, std = weights["observation_mean"], weights["observation_std"]
    env = common.make_env(args["env_id"])
    actor = laeo.Actor(mean, std, env.action_space.shape[0], args["hidden_dim"], torch.Generator())
    actor.load_state_dict(weights)
    inner = env.unwrapped.inner
    lookat, camera = CAMERAS[args["env_id"]][0], mujoco.MjvCamera()
    camera.lookat[:] = lookat
    camera.distance, camera.azimuth, camera.elevation = CAMERAS[args["env_id"]][1:]
    renderer, frames = mujoco.Renderer(inner.model, size, size), []
    if args["env_id"].startswith("Fetch"):  # show the goal, which the environment does only in its own rendering
        inner.model.geom_rgba[1:5, 3] = 0  # and not the axes of the body that moves the gripper
        site = mujoco.mj_name2id(inner.model, mujoco.mjtObj.mjOBJ_SITE, "target0")
        inner.model.site_pos[site] += common.TASKS[args["env_id"]].desired_goal - inner.data.site_xpos[site]
    for episode in range(episodes):
        observation, _ = env.reset(seed=common.episode_seed("evaluation", args["seed"], episode))
        truncated, t, after = False, 0, 0
        while not truncated and after < 10:
            with torch.inference_mode():
                action = actor.mode(torch.from_numpy(observation)).numpy()
            observation, _, _, truncated, info = env.step(action)
            after += info["success"]
            if t % 2 == 0:
                renderer.update_scene(inner.data, camera)
                frames.append(Image.fromarray(renderer.render()).quantize(64))
            t += 1
    renderer.close()
    with common.write_file(output) as temporary:
        frames[0].save(temporary, "GIF", save_all=True, append_images=frames[1:], duration=80, loop=0)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
