"""Draw a success example of every task for the README:  python benchmark/pictures.py

Plays the episode again in which the first success example of a state dataset (in datasets/) occurs, until it does: as
the policy sees it in the tasks of images, which have the same episodes, and from outside in the others.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

SIZE = 192  # pixels of each picture


def success_picture(env_id: str, datasets: Path) -> Image.Image:
    """Return a picture [SIZE, SIZE] of a success example. Raises UserError if there is no dataset to take it from."""
    state_task = common.TASKS[env_id].state_task or env_id
    path = common.find_dataset(state_task, "medium", datasets / f"{state_task}-medium")
    example = np.load(path / "success_examples.npy", mmap_mode="r")[0]
    observations = np.load(path / "observations.npy", mmap_mode="r")
    episode = int(np.nonzero((observations == example).all(-1).any(-1))[0][0])
    env = common.make_env(env_id, render_mode="rgb_array")
    observation, _ = env.reset(seed=common.episode_seed(common.read_metadata(path)["seed"], "dataset", episode))
    for action in np.load(path / "actions.npy", mmap_mode="r")[episode]:
        if np.array_equal(env.unwrapped.state, example):
            break
        observation, _, _, _, _ = env.step(action)
    if not np.array_equal(env.unwrapped.state, example):
        raise common.UserError(f"the episodes of {path} cannot be played again here; make it again, with --overwrite.")
    picture = observation if state_task != env_id else env.render()
    env.close()
    filtering = Image.Resampling.NEAREST if len(picture) < SIZE else Image.Resampling.BOX
    return Image.fromarray(picture).resize((SIZE, SIZE), filtering)


def main() -> None:
    step = SIZE + 8
    sheet = Image.new("RGB", (len(common.TASKS) * step - 8, SIZE + 18), "white")
    for i, env_id in enumerate(common.TASKS):
        sheet.paste(success_picture(env_id, ROOT / "datasets"), (i * step, 18))
        ImageDraw.Draw(sheet).text((i * step + 2, 3), env_id, "black")
    with common.write_file(Path(__file__).parent / "figures" / "success_examples.png") as file:
        sheet.save(file, "PNG", optimize=True)


if __name__ == "__main__":
    with common.user_errors():
        main()
