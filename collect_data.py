# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "numpy>=1.26", "scipy>=1.11", "gymnasium>=1.2,<2", "filelock>=3.12", "tyro>=0.9",
#     "tqdm>=4.66", "tensorboard>=2.21", "mujoco==3.3.0", "metaworld==3.1.1", "gymnasium-robotics==1.4.2", "pillow>=10"]
# ///
"""The datasets of LAEO's experiments: roll-outs of the policies in behavior/, and conversion from and to Minari.

Checkpoints of an online agent (contrastive_rl.py), from untrained to good, are rolled out towards the task's goal. How
often each is chosen depends on its success rate, so that a given share of the episodes succeeds. Observations of solved
states, drawn at random, are the success examples. docs/data.md describes all of this.

    python collect_data.py --env-id FetchPush
    python collect_data.py --env-id FetchPush --quality hard
    python collect_data.py --from-minari D4RL/pen/human-v2 --success-reward 10
"""

import functools
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

import common
import minari_io
from episodes import load_behavior, roll_out


@dataclass
class Args:
    env_id: str = "FetchReach"
    """the task: FetchReach, FetchPush, FetchReachImage, FetchPushImage, FetchPushImageOccluded, SawyerWindowOpen or
    SawyerDrawerClose"""
    quality: Literal["medium", "hard"] = "medium"
    """medium: 45 to 50 % of the episodes succeed; hard: 8 to 12 %"""
    num_episodes: Annotated[int | None, 1, 2**32 - 1] = None
    """how many episodes the dataset holds; 4,000 (Sawyer: 2,000) if not given (the paper: 3,966, 31,271 and 300,578)"""
    seed: Annotated[int, 0, 2**32 - 1] = 0
    """random seed"""
    output: Path | None = None
    """the dataset's directory; datasets/ENV_ID-QUALITY if not given, with --from-minari datasets/NAME"""
    overwrite: bool = False
    """replace the dataset if it exists"""
    num_workers: Annotated[int, 0, 1024] = 0
    """number of processes that roll out episodes, 0: one for each core; the data do not depend on it"""
    behavior_dir: Path = Path(__file__).parent / "behavior"
    """directory of the policies' weights, which contrastive_rl.py writes"""
    from_minari: str | None = None
    """make the dataset from this Minari dataset instead (pip install -r requirements-optional.txt)"""
    success_examples: Path | None = None
    """with --from-minari: a .npy file of observations that solve the task"""
    success_reward: float | None = None
    """with --from-minari: observations reached with this reward or more are the success examples; without this flag
    and --success-examples, the last observations of the episodes that end in success"""
    to_minari: str | None = None
    """write the dataset that is at --output to Minari, under this name"""


SUCCESS_RATES = {"medium": 0.475, "hard": 0.10}  # the middle of the paper's ranges, any step of the episode
MAX_SUCCESS_EXAMPLES = 1000


def mixture(success_rates: list[float], target: float) -> np.ndarray:
    """Return weights proportional to exp(beta * success rate) with which the mixture's success rate is the target.

    Of all mixtures with that rate this one has the largest entropy. Raises UserError if no checkpoint is good (or bad)
    enough.
    """
    from scipy.optimize import brentq
    from scipy.special import softmax

    rates = np.array(success_rates)
    if not rates.min() < target < rates.max():
        raise common.UserError(
            f"no mixture of checkpoints that succeed in {rates.min():.3f} to {rates.max():.3f} of the episodes "
            f"succeeds in {target:.3f}; train the agent longer: contrastive_rl.py --behavior-dir DIR --train-steps N."
        )
    beta = brentq(lambda beta: softmax(beta * rates) @ rates - target, -1e4, 1e4)
    return softmax(beta * rates)


# ----------------------------------------------------------------------------------------------------------- workers


@functools.cache
def open_worker(env_id: str, behavior_path: Path, directory: Path) -> tuple:
    """Return what a worker keeps from one job to the next: environment, policies and the arrays of the dataset.

    Part of a job and not of `start_worker`, so that its errors are raised in the collecting process.
    """
    torch.set_num_threads(1)
    actors, _ = load_behavior(behavior_path, common.TASKS[env_id].state_task or env_id)
    names = ("observations", "actions", "successes")
    return common.make_env(env_id), actors, [np.load(directory / f"{name}.npy", mmap_mode="r+") for name in names]


def play(setup: tuple, seed: int, first_episode: int, checkpoints: np.ndarray) -> int:
    """Play and store consecutive episodes, one for each entry of `checkpoints`; return their number."""
    env, actors, arrays = open_worker(*setup)
    for episode, checkpoint in enumerate(checkpoints, first_episode):
        data = roll_out(env, setup[0], actors[checkpoint], common.episode_seed(seed, "dataset", episode))
        for array, values in zip(arrays, data):
            array[episode] = values
    return len(checkpoints)


def start_worker(parent: Connection) -> None:
    """Let this process end when the other end of the pipe is closed, as it is if the collecting process is killed."""
    threading.Thread(target=lambda: (parent.poll(None), os._exit(1)), daemon=True).start()


def play_in_workers(setup: tuple, seed: int, checkpoints: np.ndarray, num_workers: int) -> None:
    """Play all episodes in parallel. Raises UserError if a worker is killed; leaves no process, whatever happens."""
    total, done = len(checkpoints), 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_workers = min(num_workers or cores, total)
    size = max(1, min(32, total // (4 * num_workers)))  # episodes in a job
    starts = range(0, total, size)
    # Spawned, not forked: a fork copies the locks of PyTorch's threads, and not the threads.
    context = multiprocessing.get_context("spawn")
    workers_end, own_end = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(num_workers, context, start_worker, (workers_end,))
    progress = tqdm(total=total, desc=f"rolling out {setup[0]}", unit="episode", mininterval=1)

    def launch() -> Iterator[int]:
        if hasattr(signal, "pthread_sigmask"):  # not on Windows; workers inherit it: Ctrl-C is for this process alone
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        same = ([value] * len(starts) for value in (setup, seed))
        return executor.map(play, *same, starts, [checkpoints[i : i + size] for i in starts])

    try:
        # In a thread, where no KeyboardInterrupt is raised: a worker that never got its arguments prints a traceback.
        for number in ThreadPoolExecutor(1).submit(launch).result():
            done += number
            progress.update(number)
        executor.shutdown()
    except BrokenProcessPool:
        cause = "" if done else ", or a program calls collect outside of `if __name__ == '__main__':`, which is needed"
        raise common.UserError(
            f"a worker process has ended: it was killed, perhaps for lack of memory{cause}."
        ) from None
    finally:
        progress.close()
        own_end.close()  # ends the workers that are left
        executor.shutdown(cancel_futures=True)


@contextmanager
def explain_interrupts(place: object) -> Iterator[None]:
    """Let SIGTERM act like Ctrl-C, and KeyboardInterrupt say that nothing was written to `place`."""
    main = threading.current_thread() is threading.main_thread()  # the only one that can handle signals
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted: nothing was written to {place}.") from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


# ----------------------------------------------------------------------------------------------------------- dataset


def choose_examples(observations: np.ndarray, successes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw at most MAX_SUCCESS_EXAMPLES of the observations that solve the task, uniformly without replacement.

    The state before the first action does not count, as in the paper's data.
    """
    counts = successes[:, 1:].sum(1)
    ends = counts.cumsum()
    ranks = rng.choice(ends[-1], min(MAX_SUCCESS_EXAMPLES, ends[-1]), replace=False)
    episodes = np.searchsorted(ends, ranks, side="right")
    within = ranks - (ends - counts)[episodes]
    steps = [np.flatnonzero(successes[episode, 1:])[k] + 1 for episode, k in zip(episodes, within)]
    return np.stack([observations[episode, step] for episode, step in zip(episodes, steps)])


def success_statistics(successes: np.ndarray) -> dict:
    """Return the rates, with 95 % Wilson intervals, of starts that are solved and of success at any step and the last.

    `successes` [episodes, T + 1] bool; "any step" is any after the first action.
    """
    kinds = {"initial_success": successes[:, 0], "success": successes[:, 1:].any(1), "final_success": successes[:, -1]}
    lists = {"episode": list(range(len(successes)))} | {name: flags.tolist() for name, flags in kinds.items()}
    return common.summarise(lists)


def check_space(output: Path, size: int) -> None:
    """Raise UserError if the disk of `output` has less than `size` bytes left."""
    there = next(parent for parent in output.resolve().parents if parent.exists())
    missing = size - shutil.disk_usage(there).free
    if missing > 0:
        size, missing = (tqdm.format_sizeof(number, "B") for number in (size, missing))
        raise common.UserError(
            f"{output} takes {size}, {missing} more than {there} has left; free some space, choose another --output or "
            "fewer --num-episodes."
        )


def write_dataset(args: Args, behavior_path: Path, output: Path) -> dict:
    """Roll out the mixture, write the dataset whole or not at all, return its metadata. Same arguments, same bytes."""
    task = common.TASKS[args.env_id]
    n, steps = args.num_episodes or task.num_episodes, task.max_episode_steps
    _, rates = load_behavior(behavior_path, task.state_task or args.env_id)
    weights = mixture(rates, SUCCESS_RATES[args.quality])
    env = common.make_env(args.env_id)
    shape, dtype, actions = env.observation_space.shape, env.observation_space.dtype, env.action_space
    renderer = {"renderer": env.unwrapped.camera.name} if env.unwrapped.camera else {}
    env.close()
    shapes = {"observations": ((n, steps + 1, *shape), dtype), "actions": ((n, steps, *actions.shape), np.float32)}
    shapes |= {"successes": ((n, steps + 1), np.bool_), "lengths": ((n,), np.int32)}
    sizes = [np.dtype(kind).itemsize * int(np.prod(size)) for size, kind in shapes.values()]
    check_space(output, sum(sizes) + min(MAX_SUCCESS_EXAMPLES, n * steps) * sizes[0] // (n * (steps + 1)))
    rng = np.random.default_rng(common.seed_sequence(args.seed, "mixture", list(SUCCESS_RATES).index(args.quality)))
    checkpoints = rng.choice(len(weights), n, p=weights)
    with common.write_directory(output) as directory:
        arrays = {}
        for name, (size, kind) in shapes.items():
            arrays[name] = common.create_array(directory / f"{name}.npy", size, kind)
        arrays["lengths"][:] = steps
        setup = (args.env_id, behavior_path.resolve(), directory)
        play_in_workers(setup, args.seed, checkpoints, args.num_workers)
        if not arrays["successes"][:, 1:].any():
            raise common.UserError(f"none of the {n} episodes succeeds; collect more with --num-episodes.")
        examples = choose_examples(arrays["observations"], arrays["successes"], rng)
        np.save(directory / "success_examples.npy", examples)
        for array in arrays.values():
            array.flush()
        metadata = {"env_id": args.env_id, "quality": args.quality, "seed": args.seed, "num_episodes": n}
        metadata |= success_statistics(arrays["successes"])
        metadata["num_success_examples"] = len(examples)
        metadata["behavior"] = {
            "file": behavior_path.name,
            "sha256": common.sha256(behavior_path),
            "success_rates": rates,
            "weights": weights.tolist(),
            "episodes": np.bincount(checkpoints, minlength=len(weights)).tolist(),
        }
        metadata |= {"action_bounds": [actions.low.tolist(), actions.high.tolist()], **renderer}
        common.write_metadata(directory, metadata)
    low, high = metadata["success_interval"]
    print(
        f"{output}: {n} episodes; {metadata['success_rate']:.3f} [{low:.3f}, {high:.3f}] succeed, "
        f"{metadata['final_success_rate']:.3f} at the last step; {metadata['initial_success_rate']:.3f} start solved"
    )
    return metadata


def collect(args: Args) -> dict:
    """Make (or, with `to_minari`, convert) the dataset that the arguments describe; return its metadata.

    Raises UserError for a mistake in the arguments, and KeyboardInterrupt, with a message, for Ctrl-C and SIGTERM.
    """
    if multiprocessing.current_process().name != "MainProcess" and multiprocessing.parent_process() is None:
        # A worker that got here while it imports a main program which lacks the guard `if __name__ == "__main__":`.
        os._exit(1)
    if args.env_id not in common.TASKS:
        raise common.UserError(f"--env-id is {args.env_id}; there are policies for {', '.join(common.TASKS)}.")
    if args.quality not in SUCCESS_RATES:
        raise common.UserError(f"--quality is {args.quality}; choose one of {', '.join(SUCCESS_RATES)}.")
    common.check_flags(args)
    if not args.from_minari and not (args.success_examples is args.success_reward is None):
        raise common.UserError("--success-examples and --success-reward need --from-minari.")
    name = args.from_minari.replace("/", "-") if args.from_minari else f"{args.env_id}-{args.quality}"
    output = args.output or Path("datasets") / name
    if args.to_minari:
        with explain_interrupts(args.to_minari):
            return minari_io.write(args, output)
    if output.exists() and not args.overwrite:
        raise common.UserError(f"{output} exists; add --overwrite to replace it, or choose another --output.")
    if output.exists() and not (output / "metadata.json").exists():
        raise common.UserError(f"{output} is not a dataset, so it is not replaced; choose another --output.")
    with explain_interrupts(output):
        if args.from_minari:
            return minari_io.read(args, output)
        behavior_file = f"{common.TASKS[args.env_id].state_task or args.env_id}.pt"
        return write_dataset(args, args.behavior_dir / behavior_file, output)


if __name__ == "__main__":
    with common.user_errors():
        collect(tyro.cli(Args))
