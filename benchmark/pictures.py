"""Draw a success example of every task for the README:  python benchmark/pictures.py

The examples come from the datasets in datasets/: images as they are, states by playing the episode again that a state
is from and taking a picture when it comes by. Needs a GL library (README.md).
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parent.parent))
import common

SIZE = 192


def of_state(env_id: str, path: Path) -> np.ndarray:
    """Return a picture [SIZE, SIZE, 3] of a success example of a state task."""
    example = np.load(path / "success_examples.npy", mmap_mode="r")[0]
    observations = np.load(path / "observations.npy", mmap_mode="r")
    episode = int(np.nonzero((observations == example).all(-1).any(-1))[0][0])
    env = common.make_env(env_id)
    camera = common.Camera(env, common.OUTSIDE_VIEWS[env_id], SIZE, show_goal=True)
    observation, _ = env.reset(seed=common.episode_seed("dataset", common.read_metadata(path)["seed"], episode))
    for action in np.load(path / "actions.npy", mmap_mode="r")[episode]:
        if np.array_equal(observation, example):
            break
        observation, _, _, _, _ = env.step(action)
    picture = camera.picture()
    camera.close()
    env.close()
    return picture


def main() -> None:
    width = len(common.TASKS) * (SIZE + 8) - 8
    sheet = Image.new("RGB", (width, SIZE + 18), "white")
    for i, (env_id, task) in enumerate(common.TASKS.items()):
        path = Path("datasets") / f"{env_id}-medium"
        if not path.exists():
            sys.exit(f"error: there is no {path}; make it with: python benchmark/run.py data")
        if task.state_task:
            picture = Image.fromarray(np.load(path / "success_examples.npy", mmap_mode="r")[0])
            picture = picture.resize((SIZE, SIZE), Image.Resampling.NEAREST)
        else:
            picture = Image.fromarray(of_state(env_id, path))
        sheet.paste(picture, (i * (SIZE + 8), 18))
        ImageDraw.Draw(sheet).text((i * (SIZE + 8) + 2, 3), env_id, "black")
    with common.write_file(Path(__file__).parent / "figures" / "success_examples.png") as temporary:
        sheet.save(temporary, "PNG", optimize=True)


if __name__ == "__main__":
    main()
