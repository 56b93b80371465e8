"""Draw a success example of every task for the README:  python benchmark/pictures.py

Plays the episode again in which the first success example of a state dataset (in datasets/) occurs, until it does: as
the policy sees it in the tasks of images, which have the same episodes, and from outside in the others.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parent.parent))
import common

SIZE = 192


def success_picture(env_id: str) -> Image.Image:
    """Return a picture of a success example of the task. Raises UserError if there is no dataset to take it from."""
    state_task = common.TASKS[env_id].state_task or env_id
    path = common.find_dataset(state_task, "medium", Path("datasets") / f"{state_task}-medium")
    example = np.load(path / "success_examples.npy", mmap_mode="r")[0]
    observations = np.load(path / "observations.npy", mmap_mode="r")
    episode = int(np.nonzero((observations == example).all(-1).any(-1))[0][0])
    env = common.make_env(env_id)
    observation, _ = env.reset(seed=common.episode_seed("dataset", common.read_metadata(path)["seed"], episode))
    for action in np.load(path / "actions.npy", mmap_mode="r")[episode]:
        if np.array_equal(env.unwrapped.state, example):
            break
        observation, _, _, _, _ = env.step(action)
    if state_task == env_id:
        camera = common.Camera(env, common.OUTSIDE_VIEWS[env_id], SIZE, show_goal=True)
        observation = camera.picture()
        camera.close()
    env.close()
    return Image.fromarray(observation).resize((SIZE, SIZE), Image.Resampling.NEAREST)


def main() -> None:
    step = SIZE + 8
    sheet = Image.new("RGB", (len(common.TASKS) * step - 8, SIZE + 18), "white")
    for i, env_id in enumerate(common.TASKS):
        sheet.paste(success_picture(env_id), (i * step, 18))
        ImageDraw.Draw(sheet).text((i * step + 2, 3), env_id, "black")
    with common.write_file(Path(__file__).parent / "figures" / "success_examples.png") as temporary:
        sheet.save(temporary, "PNG", optimize=True)


if __name__ == "__main__":
    main()
