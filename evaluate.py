# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "numpy>=1.26", "scipy>=1.11", "gymnasium>=1.2,<2", "filelock>=3.12", "tyro>=0.9",
#     "tqdm>=4.66", "tensorboard>=2.21", "mujoco==3.3.0", "metaworld==3.1.1", "gymnasium-robotics==1.4.2", "pillow>=10",
#     "imageio[ffmpeg]>=2.34"]
# ///
"""Play, measure and film a trained policy, from its policy.pt2 and result.json alone (docs/training.md).

    python evaluate.py runs/push --episodes 100 --seed 1 --video push.mp4

policy.pt2 needs no file of this project: three lines load it, on a CPU or a GPU, for any batch size.

    policy = torch.export.load("policy.pt2").module()             # .to("cuda") for a GPU
    observations = torch.zeros(7, 25)                             # [B, ...], as the dataset has them
    actions = policy(observations)                                # [B, A], in the environment's own bounds
"""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import tyro

import common


@dataclass
class Args:
    run_dir: tyro.conf.Positional[Path]  # a run's directory, with policy.pt2 and result.json
    episodes: int = 100  # how many episodes are played
    seed: int = 1  # of their starts; a run's own evaluation has its --seed
    env_id: str | None = None  # another environment than the one that the run was made for
    video: Path | None = None  # film the first four episodes; an MP4 where imageio's ffmpeg plugin is there, else a GIF


def load_policy(run_dir: Path) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
    """Return the policy, from one observation to one action, and what result.json holds. Raises common.UserError."""
    logging.getLogger("torch.export").setLevel(logging.ERROR)  # its warnings hold tracebacks
    try:
        result = json.loads((run_dir / "result.json").read_text())
        result["args"]["env_id"]  # which a run's own file holds
        with patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"):  # else code in pickles would run
            program = torch.export.load(common.intact(run_dir / "policy.pt2"))
    except Exception as error:  # torch.export.load raises half a dozen types for a damaged file
        raise common.UserError(f"{run_dir} is not a finished run ({common.first_line(error)}).") from None
    policy, example = program.module(), program.example_inputs[0][0][0].numpy()

    @torch.inference_mode()
    def act(observation: np.ndarray) -> np.ndarray:
        if np.shape(observation) != example.shape:
            raise common.UserError(f"observations are of shape {np.shape(observation)}; it must be {example.shape}.")
        return policy(torch.from_numpy(np.asarray(observation, example.dtype)[None]))[0].numpy()

    return act, result


def play(
    act: Callable[[np.ndarray], np.ndarray], env_id: str, episodes: int, seed: int, filmed: int = 0, **goal: Any
) -> tuple[dict[str, list], list[np.ndarray]]:
    """Play episodes; return lists with one entry per episode, as in a run's result.json, and the pictures of the first.

    The starts are those of a run's evaluation with this seed. Of each filmed episode every second state is a picture,
    until ten states are solved. `goal`: of a Fetch task, another one than its own (cvl.py --reward-goal).
    """
    lists: dict[str, list] = {"seed": [], "episode": [], "return": []}
    try:
        env = common.make_env(env_id, **goal, **({"render_mode": "rgb_array"} if filmed else {}))
        if filmed and "rgb_array" not in env.metadata.get("render_modes", ()):
            raise TypeError("its metadata names no render mode rgb_array")
    except TypeError as error:  # of an environment that takes no render_mode, too
        raise common.UserError(f"{env_id} cannot be filmed ({common.first_line(error)}); leave out --video.") from None
    known, solved, pictures = {}, [], []
    for i in range(episodes):
        lists["seed"].append(common.episode_seed(seed, "evaluation", i))
        observation, info = env.reset(seed=lists["seed"][-1])
        first, infos, total, done, after = np.array(observation), [info], 0.0, False, 0
        while not done:
            if i < filmed and len(infos) % 2 and after < 10:
                pictures.append(env.render())
            observation, reward, terminated, truncated, info = env.step(act(observation))
            infos.append(info)
            total, done = total + float(reward), terminated or truncated
            after += bool(info.get("success", info.get("is_success")))
        key = first.tobytes(), np.asarray(observation).tobytes(), len(infos)
        lists["episode"].append(known.setdefault(key, len(known)))
        lists["return"].append(total)
        solved.append([info.get("success", info.get("is_success")) for info in infos])
    env.close()
    lists |= common.success_lists(solved)
    return lists, pictures


def write_video(path: Path, pictures: list[np.ndarray], fps: int = 12) -> Path:
    """Write pictures [H, W, 3] uint8 as a video; return its path, which ends in .gif where no MP4 can be written."""
    import imageio.v3 as imageio

    try:
        import imageio_ffmpeg  # noqa: F401
    except ImportError:
        path = path.with_suffix(".gif")
    options = {"fps": fps} if path.suffix == ".mp4" else {"duration": 1000 / fps, "loop": 0}
    with common.write_file(path) as file:
        imageio.imwrite(file, pictures, extension=path.suffix, **options)
    return path


def evaluate(args: Args) -> dict[str, Any]:
    """Play, print and return the success rates (any step, last step) with their intervals, and the mean return."""
    act, result = load_policy(args.run_dir)
    for name, value, least in (("episodes", args.episodes, 1), ("seed", args.seed, 0)):
        if not least <= value < 2**32:
            raise common.UserError(f"--{name} is {value}; it must be from {least} to {2**32 - 1}.")
    if args.video and args.video.suffix not in (".mp4", ".gif"):
        raise common.UserError(f"--video is {args.video}; it must end in .mp4 or .gif.")
    filmed = 4 if args.video else 0
    goal = {"goal": result["args"]["reward_goal"]} if result["args"].get("reward_goal") and not args.env_id else {}
    lists, pictures = play(act, args.env_id or result["args"]["env_id"], args.episodes, args.seed, filmed, **goal)
    summary = common.summarise(lists)
    if "success_rate" in summary:
        for name, text in (("success", "at any step"), ("final_success", "at the last step")):
            low, high = summary[f"{name}_interval"]
            print(f"success {text}: {summary[f'{name}_rate']:.3f} [{low:.3f}, {high:.3f}] of {args.episodes} episodes")
    else:
        print("success was not measured: the environment's info has neither success nor is_success")
    print(f"mean return: {summary['return']:.3f}")
    if args.video:
        print(f"wrote {write_video(args.video, pictures)}")
    return summary | {"episodes": lists}


if __name__ == "__main__":
    with common.user_errors("interrupted; nothing was written."):
        evaluate(tyro.cli(Args))
