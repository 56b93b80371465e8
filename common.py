"""Tasks (environment wrappers), dataset files and runs, shared by every script. Nothing here computes a gradient.

A dataset is a directory of flat arrays, padded to the longest episode, and one JSON file:

    observations.npy      [episodes, steps + 1, ...]   float32   o_0 ... o_T; rows behind an episode's end are zero
                                                       (uint8 for images, [64, 64, 3])
    actions.npy           [episodes, steps, actions]   float32   a_t leads from o_t to o_(t+1)
    lengths.npy           [episodes]                   int32     T, the number of actions of each episode
    successes.npy         [episodes, steps + 1]        bool      for statistics, metrics and the choice of examples only
    success_examples.npy  [examples, ...]              as above  observations that solve the task, in random order
    metadata.json         where the data comes from: task, seed, success rates, simulator versions, checksums
"""

import atexit
import contextlib
import ctypes.util
import difflib
import errno
import hashlib
import importlib
import importlib.metadata
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import psutil
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

with contextlib.suppress(ImportError):  # loaded after Mesa, PyTorch's compiler would take Mesa's LLVM, and crash
    import triton._C.libtriton  # noqa: F401


class UserError(SystemExit):
    """A mistake that the user can mend. Uncaught, Python prints its one sentence to stderr and exits with status 1."""


# --------------------------------------------------------------------------------------------------------- rendering


class View(NamedTuple):
    """Where a free camera stands, in MuJoCo's terms."""

    lookat: tuple[float, float, float]  # metres; the point in the middle of the picture
    distance: float  # metres
    azimuth: float  # degrees
    elevation: float  # degrees


def gl_name() -> str:
    """Return what MuJoCo is to render with: MUJOCO_GL, or else, on Linux, EGL or OSMesa, which need no display."""
    found = ctypes.util.find_library("EGL") and ctypes.util.find_library("GL")
    default = ("egl" if found else "osmesa") if sys.platform == "linux" else ""
    return os.environ.get("MUJOCO_GL", "").lower() or default


class Camera:
    """Takes pictures of a task without moving it. Raises UserError if nothing can be rendered here."""

    def __init__(self, env: gym.Env, view: View, size: int = 64, show_goal: bool = False):
        import mujoco

        self.shape = (size, size, 3)
        model, self._data = env.unwrapped.inner.model, env.unwrapped.inner.data
        model.vis.quality.offsamples = 0  # antialiasing is cheaper by hand: see picture()
        self._hidden = mujoco.mjNGROUP - 1  # MuJoCo does not draw the last group of geoms
        for geom in range(model.ngeom):
            body = model.body(model.geom_bodyid[geom]).name
            # Not to be drawn: the long axes of the point that drags the gripper, and two links inside the robot's base,
            # which are nowhere to be seen and half of all triangles.
            if body in ("robot0:mocap", "robot0:estop_link", "robot0:laser_link"):
                model.geom_group[geom] = self._hidden
        self._option = mujoco.MjvOption()
        self._option.sitegroup[:] = show_goal  # the ball at the goal is a site
        if show_goal and isinstance(env.unwrapped, FetchTask):  # which only the environment's own rendering puts there
            site, goal = model.site("target0").id, env.unwrapped.inner._sample_goal()
            model.site_pos[site] += goal - self._data.site_xpos[site]
            self._data.site_xpos[site] = goal  # until the next step computes it
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FREE
        self._camera.lookat[:] = view.lookat
        self._camera.distance, self._camera.azimuth, self._camera.elevation = view[1:]
        azimuth, elevation, half = np.radians([view.azimuth, view.elevation, model.vis.global_.fovy / 2])
        forward = np.cos(elevation) * np.array([np.cos(azimuth), np.sin(azimuth), np.tan(elevation)])
        right = np.array([np.sin(azimuth), -np.cos(azimuth), 0.0])
        sides = np.stack([right, -right, np.cross(right, forward), -np.cross(right, forward)])
        self._position = np.array(view.lookat) - view.distance * forward
        self._normals = np.sin(half) * forward + np.cos(half) * sides  # of the pyramid that is seen, pointing inwards
        name = gl_name()
        os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa draws so few pixels faster without threads; read only once
        try:
            if name in ("egl", "osmesa"):  # MuJoCo chose when it was imported, and by itself it takes a window
                mujoco.gl_context.GLContext = importlib.import_module(f"mujoco.{name}").GLContext
            self._renderer = mujoco.Renderer(model, 2 * size, 2 * size)
        except Exception as error:  # a different one for each thing that can be missing
            raise UserError(
                f"error: pictures cannot be rendered here with {name} ({first_line(error)}); on Debian or Ubuntu, "
                "apt install libegl1 libgl1 (or libosmesa6, and set MUJOCO_GL=osmesa)."
            ) from None
        camera = weakref.ref(self)  # one that is open at exit is closed while EGL still works: later it complains
        atexit.register(lambda: camera() and camera().close())

    def picture(self) -> np.ndarray:
        """Return the present state as [size, size, 3] uint8, each pixel the mean of four.

        Without that a block moves by whole pixels of 8 mm.
        """
        model, rotation = self._renderer.model, self._data.geom_xmat.reshape(-1, 3, 3)
        # What is wholly outside of the pyramid is left out, by its bounding box: often most of the robot.
        middle = self._data.geom_xpos + (rotation @ model.geom_aabb[:, :3, None])[..., 0] - self._position
        reach = (np.abs(self._normals @ rotation) @ model.geom_aabb[:, 3:, None])[..., 0]
        groups = model.geom_group.copy()
        model.geom_group[(middle @ self._normals.T + reach < 0).any(1)] = self._hidden
        self._renderer.update_scene(self._data, self._camera, self._option)
        model.geom_group[:] = groups
        return np.array(Image.fromarray(self._renderer.render()).reduce(2))  # a copy: PyTorch asks for one to write to

    def close(self) -> None:
        context = self._renderer._gl_context
        if context:  # MuJoCo frees what it finds in the current one, with OSMesa in that of another camera
            context.make_current()
        self._renderer.close()

    def __del__(self) -> None:
        if hasattr(self, "_renderer"):
            self.close()


# ------------------------------------------------------------------------------------------------------------- tasks


class FetchTask(gym.Env):
    """A Fetch task of gymnasium-robotics with a fixed goal, a flat float32 observation and no reward.

    FetchReach, 10 numbers: gripper position, fingers (2), gripper velocity, finger velocities (2).
    FetchPush, 25 numbers: gripper position, block position, block relative to gripper, fingers (2),
    block rotation (3), block velocity relative to the gripper (3), block angular velocity (3), gripper velocity (3),
    finger velocities (2). Positions in metres, velocities in metres per step, actions [4] in [-1, 1]: 0.05 m per unit.
    `info["success"]` is True while the gripper (reach) or the block (push) is within 0.05 m of the goal.

    With a `view` the observation is a picture from there, [64, 64, 3] uint8, of an episode that is the same to the bit.
    Raises UserError if nothing can be rendered here.
    """

    metadata = {"render_modes": []}

    def __init__(self, fetch_id: str, goal: tuple[float, float, float], view: View | None = None):
        with contextlib.redirect_stderr(io.StringIO()):  # a notice about Adroit tasks, which are not used here
            import gymnasium_robotics  # registers its environments on import

        gym.register_envs(gymnasium_robotics)
        self.inner = gym.make(fetch_id).unwrapped
        self.inner._sample_goal = lambda: np.array(
            goal
        )  # the paper's tasks have one goal, and the policy never sees it
        # Of all joints the observation uses the two fingers only: looking up no others, by name and in Python, makes a
        # step about a quarter faster and changes no bit (tests/test_common.py).
        names = self.inner._model_names
        names._joint_names = tuple(name for name in names.joint_names if name.startswith("robot0:"))[-2:]
        self.action_space = self.inner.action_space
        shape = self.inner.observation_space["observation"].shape
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, shape, np.float32)
        self.camera = None
        if view is not None:
            self.camera = Camera(self, view)
            self.observation_space = gym.spaces.Box(0, 255, self.camera.shape, np.uint8)

    def _observation(self, inner_observation: dict[str, np.ndarray]) -> np.ndarray:
        self.state = inner_observation["observation"].astype(np.float32)
        return self.state if self.camera is None else self.camera.picture()

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        observation, _ = self.inner.reset(seed=seed)
        success = self.inner._is_success(observation["achieved_goal"], observation["desired_goal"])
        return self._observation(observation), {"success": bool(success)}

    def step(self, action: np.ndarray):
        observation, _, _, _, info = self.inner.step(action)
        return self._observation(observation), 0.0, False, False, {"success": bool(info["is_success"])}

    def close(self) -> None:
        if self.camera is not None:
            self.camera.close()
        self.inner.close()


class SawyerTask(gym.Env):
    """A Meta-World task with fixed furniture, a compact float32 observation and no reward.

    Observation, 6 numbers: tool centre, then handle (window) or drawer position, in metres; actions [4] in [-1, 1].
    Each episode starts with the joint of the window or drawer drawn uniformly over `joint_range` (metres). Stock
    Meta-World ignores `reset(seed=...)` and shows the object where it was one episode ago; this class does neither.
    `info["success"]` is Meta-World's own, for the current step only.
    """

    metadata = {"render_modes": []}

    def __init__(self, name: str, furniture: tuple[float, float, float], joint: str, joint_range: tuple[float, float]):
        import metaworld
        import mujoco

        self.inner = metaworld.ALL_V3_ENVIRONMENTS[name]()
        # metaworld 3.1.1 renamed the drawer's own success radius, 0.04 m, and so lost its effect; here it has one.
        self.inner.TARGET_RADIUS = getattr(self.inner, "_TARGET_RADIUS", self.inner.TARGET_RADIUS)
        self.inner._set_task_called = True
        self.inner._freeze_rand_vec = True
        self.inner._last_rand_vec = np.array(furniture)
        self.inner.reset()
        self._mujoco, self._joint, self._joint_range = mujoco, joint, joint_range
        # Meta-World settles the hand with 100 simulator steps at every reset. Its result is kept here, warm start
        # included, so that a start depends on the seed alone and not on the episode before it.
        self._start = np.empty(mujoco.mj_stateSize(self.inner.model, mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_getState(self.inner.model, self.inner.data, self._start, mujoco.mjtState.mjSTATE_INTEGRATION)
        self.action_space = self.inner.action_space
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (6,), np.float32)

    def _observation(self) -> np.ndarray:
        self.state = np.concatenate([self.inner.tcp_center, self.inner._get_pos_objects()]).astype(np.float32)
        return self.state

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        inner, mj = self.inner, self._mujoco
        mj.mj_setState(inner.model, inner.data, self._start, mj.mjtState.mjSTATE_INTEGRATION)
        inner.data.joint(self._joint).qpos = self.np_random.uniform(*self._joint_range)
        mj.mj_forward(inner.model, inner.data)  # without it the observation holds the last episode's object
        inner.curr_path_length = 0
        _, info = inner.evaluate_state(inner._get_obs(), np.zeros(4, np.float32))
        return self._observation(), {"success": bool(info["success"])}

    def step(self, action: np.ndarray):
        _, _, _, _, info = self.inner.step(action)
        return self._observation(), 0.0, False, False, {"success": bool(info["success"])}

    def close(self) -> None:
        self.inner.close()


@dataclass(frozen=True)
class Task:
    """What a script must know of a task beyond its environment."""

    entry_point: Callable[..., gym.Env]
    kwargs: dict[str, Any]
    max_episode_steps: int
    simulator: tuple[str, ...]  # the packages whose versions decide the physics
    achieved_goal: slice  # where an observation holds the position that the goal speaks of
    desired_goal: tuple[float, float, float]  # metres; a position that can be reached, for goal-conditioned agents
    state_task: str | None = None  # for a task of pictures: the same task with state observations


_REACH_GOAL, _PUSH_GOAL = (1.3, 0.3, 0.9), (1.4, 0.9, 0.42469975)
_FETCH, _METAWORLD = ("mujoco", "gymnasium-robotics"), ("mujoco", "metaworld")
TASKS = {
    "FetchReach": Task(
        FetchTask, dict(fetch_id="FetchReach-v4", goal=_REACH_GOAL), 50, _FETCH, slice(0, 3), _REACH_GOAL
    ),
    "FetchPush": Task(FetchTask, dict(fetch_id="FetchPush-v4", goal=_PUSH_GOAL), 50, _FETCH, slice(3, 6), _PUSH_GOAL),
    # Meta-World measures success against points that the objects cannot reach, (0.2, 0.8, 0.16) and (0, 0.74, 0.09):
    # the desired goals here are where the handle and the drawer come to rest when the task is solved.
    "SawyerWindowOpen": Task(
        SawyerTask,
        dict(name="window-open-v3", furniture=(0.0, 0.8, 0.16), joint="window_slide", joint_range=(0.0, 0.2)),
        150,
        _METAWORLD,
        slice(3, 6),
        (0.16, 0.705, 0.16),
    ),
    "SawyerDrawerClose": Task(
        SawyerTask,
        dict(name="drawer-close-v3", furniture=(0.0, 0.9, 0.0), joint="goal_slidey", joint_range=(-0.15, 0.0)),
        150,
        _METAWORLD,
        slice(3, 6),
        (0.0, 0.73, 0.14),
    ),
}
VIEWS = {  # the first two are the paper's
    "FetchReachImage": View((1.2, 0.8, 0.5), 1.4, 120.0, -30.0),
    "FetchPushImage": View((1.25, 0.8, 0.4), 0.65, 90.0, -40.0),
    # From above, so that the arm hides the block when it touches it, more often than from the released code's view.
    "FetchPushImageOccluded": View((1.35, 0.8, 0.42), 1.2, 60.0, -85.0),
}
for _env_id, _view in VIEWS.items():
    _state_task = _env_id.split("Image")[0]
    _task = TASKS[_state_task]
    TASKS[_env_id] = replace(_task, kwargs={**_task.kwargs, "view": _view}, state_task=_state_task)
OUTSIDE_VIEWS = {  # for people
    "FetchReach": View((1.3, 0.55, 0.65), 1.5, 130.0, -20.0),
    "FetchPush": View((1.33, 0.82, 0.43), 0.8, 205.0, -35.0),
    "SawyerWindowOpen": View((0.05, 0.65, 0.2), 1.2, 130.0, -25.0),
    "SawyerDrawerClose": View((0.0, 0.65, 0.15), 1.2, 140.0, -30.0),
}
QUALITIES = ("medium", "hard")

for _env_id, _task in TASKS.items():
    gym.register(
        id=f"laeo/{_env_id}-v0",  # a namespace: gymnasium-robotics owns the bare names
        entry_point=_task.entry_point,
        kwargs=_task.kwargs,
        max_episode_steps=_task.max_episode_steps,
        disable_env_checker=True,  # the checks run in the tests, not at every step
    )


def find_task(env_id: str) -> Task:
    """Return the task of that name. Raises UserError, with the nearest names, if there is none."""
    if env_id not in TASKS:
        near = difflib.get_close_matches(env_id, TASKS, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"error: there is no task '{env_id}'; {hint}The tasks are {', '.join(TASKS)}.")
    return TASKS[env_id]


def make_env(env_id: str) -> gym.Env:
    """Return a new environment of the task; it truncates at the task's step limit and never terminates."""
    find_task(env_id)
    try:
        import mujoco  # noqa: F401
    except RuntimeError:
        name = os.environ.get("MUJOCO_GL")
        raise UserError(
            f"error: MUJOCO_GL is {name}, which MuJoCo does not know; egl and osmesa need no display."
        ) from None
    return gym.make(f"laeo/{env_id}-v0")


def capture_video(
    path: Path, env_id: str, seed: int, mode: Callable[[torch.Tensor], torch.Tensor], device: torch.device
) -> None:
    """Play four evaluation episodes, each in an environment of its own, and write every second step as a GIF.

    `mode` returns the action [actions] of an observation. Of a task of images the GIF shows what the policy sees on
    the right. Raises UserError if nothing can be rendered here.
    """
    frames = []
    for episode in range(4):
        env, size, truncated, after = make_env(env_id), 240, False, 0
        outside = Camera(env, OUTSIDE_VIEWS[TASKS[env_id].state_task or env_id], size, show_goal=True)
        observation, _ = env.reset(seed=episode_seed("evaluation", seed, episode))
        while not truncated and after < 10:  # the end of an episode that is solved shows nothing new
            picture = outside.picture()
            if TASKS[env_id].state_task:
                seen = Image.fromarray(observation).resize((size, size), Image.Resampling.NEAREST)
                picture = np.concatenate([picture, seen], axis=1)
            frames.append(Image.fromarray(picture).quantize(64))
            for _ in range(2):
                with torch.inference_mode():
                    action = mode(torch.from_numpy(observation).to(device)).cpu().numpy()
                observation, _, _, truncated, info = env.step(action)
                after += info["success"]
                if truncated:
                    break
        outside.close()
        env.close()
    with write_file(path) as temporary:
        frames[0].save(temporary, "GIF", save_all=True, append_images=frames[1:], duration=80, loop=0)


STREAMS = ("training", "evaluation", "dataset", "calibration")


def episode_seed(stream: str, seed: int, episode: int) -> int:
    """Return the 64-bit seed of one episode, for `seed` < 2**32. Streams share none: evaluation has its own starts."""
    entropy = [STREAMS.index(stream), seed, episode]  # each below 2**32: a larger one would run into its neighbour
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def wilson_interval(successes: int, episodes: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a success rate."""
    z, rate = 1.96, successes / episodes
    centre = (rate + z**2 / (2 * episodes)) / (1 + z**2 / episodes)
    half = z * np.sqrt(rate * (1 - rate) / episodes + z**2 / (4 * episodes**2)) / (1 + z**2 / episodes)
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def success_statistics(flags: dict[str, Any]) -> dict[str, Any]:
    """Return NAME_rate and NAME_interval (95 %) for every NAME of `flags`, each a list of one bool per episode."""
    statistics: dict[str, Any] = {}
    for name, values in flags.items():
        successes = int(np.sum(values))
        statistics |= {
            f"{name}_rate": successes / len(values),
            f"{name}_interval": wilson_interval(successes, len(values)),
        }
    return statistics


def versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each package."""
    return {package: importlib.metadata.version(package) for package in packages}


# ----------------------------------------------------------------------------------------------------- writing files


def first_line(error: Exception) -> str:
    """Return the kind of an error and the first sentence of its message."""
    message = str(error).split("\n")[0].split(". ")[0]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or an unwritable place into one sentence that names it."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free some space or choose another place" if full else "choose a place that can be written"
        raise UserError(f"error: cannot write {path}: {error.strerror or error}; {advice}.") from None


@contextlib.contextmanager
def write_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory beside `path` that takes its place when the block ends, and vanishes when it fails."""
    path = path.resolve()
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    with explain_os_errors(path):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            if path.exists():
                path.rename(old)
            temporary.rename(path)
        finally:
            if old.exists() and not path.exists():
                old.rename(path)
            for leftover in (temporary, old):
                shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def write_file(path: Path) -> Iterator[Path]:
    """Yield the name of a file beside `path` that takes its place when the block ends, and vanishes when it fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explain_os_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def check_space(path: Path, size: int) -> None:
    """Raise UserError if the disk that `path` is or will be on has less than `size` bytes left."""
    there = next(parent for parent in path.resolve().parents if parent.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise UserError(
            f"error: {path} takes {size / 1e9:.1f} GB and {there} has {free / 1e9:.1f} GB left; free some space, "
            "choose another --output or fewer --num-episodes."
        )


def create_array(path: Path, shape: tuple[int, ...], dtype: Any) -> np.memmap:
    """Create a zeroed `.npy` file, opened for writing through memory. Raises OSError if the disk cannot hold it."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with open(path, "r+b") as file:  # a hole in the file would become a crash (SIGBUS) when the disk fills up
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return array


def save_weights(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values, whole or not at all, for `load_weights`."""
    buffer = io.BytesIO()  # torch.save reports a full disk as a RuntimeError
    torch.save(content, buffer)
    with write_file(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with write_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def load_weights(path: Path) -> dict[str, Any]:
    """Read a file of tensors and plain values; it cannot run code. Raises UserError if it is missing or damaged."""
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch.load raises half a dozen types for a damaged file
        raise UserError(f"error: {path} is damaged or missing ({first_line(error)}).") from None
    if not isinstance(content, dict):
        raise UserError(f"error: {path} was not written by this project.")
    return content


class Log:
    """Metrics of a run, as one JSON object per line in `metrics.jsonl` and as TensorBoard scalars.

    A run that is resumed at `first_step` keeps the first `size` bytes of the file. Raises UserError if the directory
    holds another run.
    """

    def __init__(self, run_dir: Path, args: Any, first_step: int = 0, size: int = 0):
        self.path = run_dir / "metrics.jsonl"
        with explain_os_errors(run_dir):
            if first_step == 0 and self.path.exists():
                raise UserError(
                    f"error: {run_dir} holds a run already; choose another --run-dir, or --resume that one."
                )
            run_dir.mkdir(parents=True, exist_ok=True)
            # A run that goes on from a checkpoint writes again what came after it.
            with open(self.path, "ab") as file:
                file.truncate(min(size, file.tell()))
            self.writer = SummaryWriter(str(run_dir), purge_step=first_step + 1 if first_step else None)
        table = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
        self.writer.add_text("flags", f"|flag|value|\n|-|-|\n{table}")

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Add the metrics of one step. Raises UserError if one of them is not finite."""
        for name, value in metrics.items():
            if not np.isfinite(value):
                raise UserError(f"error: {name} is {value} at step {step}; try a smaller --learning-rate.")
        with explain_os_errors(self.path), open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)


@contextlib.contextmanager
def catch_interrupt() -> Iterator[list[int]]:
    """Yield a list that receives Ctrl-C and SIGTERM, so that a loop can finish its step. A second one acts at once."""
    received: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(kind) for kind in kinds]

    def receive(kind: int, _: Any) -> None:
        received.append(kind)
        print("\nfinishing this step; once more to stop at once", file=sys.stderr)
        for kind, handler in zip(kinds, before):
            signal.signal(kind, handler)

    try:
        for kind in kinds:
            signal.signal(kind, receive)
        yield received
    finally:
        for kind, handler in zip(kinds, before):
            signal.signal(kind, handler)


def plain(args: Any) -> dict[str, Any]:
    """Return a script's flags with paths as strings, for files that hold plain values only."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def check_range(least: float, most: float, args: Any, *names: str) -> None:
    """Raise UserError for the first of these flags that is not within [least, most]."""
    for name in names:
        value = getattr(args, name)
        if not least <= value <= most or value == float("inf"):
            bounds = f"from {least} to {most}" if most < float("inf") else f"{least} or more"
            raise UserError(f"error: --{name.replace('_', '-')} is {value}; it must be {bounds}.")


def all_finite(state: Any) -> bool:
    """Say whether all numbers in the tensors of nested dictionaries and lists are finite."""
    if isinstance(state, torch.Tensor):
        return bool(torch.isfinite(state).all())
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return all(all_finite(value) for value in values)


def find_device(name: str) -> torch.device:
    """Return the device of that name; auto is the GPU if there is one. Raises UserError if it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("error: --device is cuda, and PyTorch finds no GPU here; leave it out to train on the CPU.")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.set_float32_matmul_precision("high")  # products in TF32, as convolutions are anyway
    return torch.device("cuda")


@contextlib.contextmanager
def exit_quietly() -> Iterator[None]:
    """Turn a Ctrl-C that nothing else has caught into one sentence and a failure, without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        raise UserError("error: interrupted.") from None


# ---------------------------------------------------------------------------------------------------------- datasets


class Dataset(NamedTuple):
    """All that a method receives: no reward and no success flag is within its reach."""

    observations: np.ndarray  # [episodes, steps + 1, ...] float32, or uint8 for images, a read-only memory map
    actions: np.ndarray  # [episodes, steps, actions] float32, a read-only memory map
    lengths: np.ndarray  # [episodes] int32, the number of actions before the episode's end
    success_examples: np.ndarray  # [num_success, ...], of the observations' type


def sha256(path: Path) -> str:
    """Return the checksum of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_quality(quality: str) -> None:
    """Raise UserError if there is no such quality."""
    if quality not in QUALITIES:
        raise UserError(f"error: there is no quality '{quality}'; choose one of {', '.join(QUALITIES)}.")


def find_dataset(env_id: str, quality: str, dataset: Path | None = None) -> Path:
    """Return the dataset's directory. The standard one is made by collect_data.py if it is not there yet.

    Raises UserError if the task or the quality is unknown, if an explicitly named directory does not exist, or if
    collect_data.py fails.
    """
    find_task(env_id)
    check_quality(quality)
    path = dataset or Path("datasets") / f"{env_id}-{quality}"
    if dataset is not None and not path.exists():
        raise UserError(f"error: there is no dataset {path}; leave --dataset out to use (and make) the standard one.")
    if not path.exists():
        command = ["collect_data.py", "--env-id", env_id, "--quality", quality]
        print(f"There is no dataset {path} yet; making it with: python {' '.join(command)}", flush=True)
        process = subprocess.Popen([sys.executable, str(Path(__file__).with_name(command[0])), *command[1:]])
        try:
            status = process.wait()
        except KeyboardInterrupt:  # which reaches the other process too; it needs a moment to leave nothing behind
            status = process.wait()
        if status != 0:
            raise UserError(f"error: the dataset {path} was not made; the message above says why.")
    return path


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the dataset's metadata. Raises UserError if it is missing or unreadable."""
    try:
        metadata = json.loads((path / "metadata.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        reason = first_line(error)
        raise UserError(f"error: {path} is not a dataset: its metadata.json cannot be read ({reason}).") from None
    if not isinstance(metadata, dict) or not all(
        isinstance(metadata.get(name), dict) for name in ("versions", "sha256")
    ):
        raise UserError(f"error: {path} is not a dataset: its metadata.json lacks versions or checksums.")
    return metadata


def _load_array(path: Path, dtype: str, checksum: str | None) -> np.ndarray:
    try:
        if path.stat().st_size > 5e9:  # which takes many seconds
            print(f"checking {path} ({path.stat().st_size / 1e9:.0f} GB) against its checksum")
        if sha256(path) != checksum:
            raise ValueError("it does not match its checksum in metadata.json")
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy.load raises half a dozen types for a damaged file
        reason = first_line(error)
        raise UserError(f"error: {path} is damaged or missing ({reason}); make or copy the dataset again.") from None
    if array.dtype != np.dtype(dtype):
        raise UserError(f"error: {path} has dtype {array.dtype}; it must be {np.dtype(dtype)}.")
    if array.ndim == 0 or len(array) == 0:
        raise UserError(f"error: {path} is empty; a dataset has at least one episode and one success example.")
    for start in range(0, len(array), 1024):
        if array.dtype.kind == "f" and not np.isfinite(array[start : start + 1024]).all():
            raise UserError(f"error: {path} holds a value that is not finite in rows {start} to {start + 1023}.")
    return array


def load_dataset(
    path: Path, env_id: str, num_success: int, rng: np.random.Generator, allow_version_mismatch: bool = False
) -> Dataset:
    """Open a dataset, check it, and draw `num_success` of its success examples, or none, without replacement.

    Raises UserError if the dataset is of another task or was made with another version of the simulator (unless
    `allow_version_mismatch`), if an array is damaged, not finite or of the wrong shape, or if examples are too few.
    """
    metadata, task = read_metadata(path), find_task(env_id)
    if metadata.get("env_id") != env_id:
        raise UserError(f"error: {path} is a dataset of {metadata.get('env_id')}, not of {env_id}.")
    made_with = {name: metadata["versions"].get(name) for name in task.simulator}
    if made_with != versions(*task.simulator) and not allow_version_mismatch:
        raise UserError(
            f"error: {path} was made with {made_with} and here is {versions(*task.simulator)}, which moves otherwise; "
            f"make it again with: python collect_data.py --env-id {env_id} --quality {metadata.get('quality')} "
            f"--output {path} --overwrite (or use it as it is: --allow-version-mismatch)."
        )
    env = make_env(env_id)
    observation_shape, action_shape = env.observation_space.shape, env.action_space.shape
    dtypes = {"observations": env.observation_space.dtype, "actions": "f4", "lengths": "i4"}
    dtypes["success_examples"] = dtypes["observations"]
    env.close()
    checksums = metadata["sha256"]
    arrays = {name: _load_array(path / f"{name}.npy", dtype, checksums.get(name)) for name, dtype in dtypes.items()}
    observations, actions, lengths, examples = (arrays[name] for name in dtypes)
    episodes, steps = actions.shape[:2] if actions.ndim > 1 else (len(lengths), lengths.max())
    for name, array, shape in (
        ("actions", actions, (episodes, steps, *action_shape)),
        ("observations", observations, (episodes, steps + 1, *observation_shape)),
        ("lengths", lengths, (episodes,)),
        ("success_examples", examples, (len(examples), *observation_shape)),
    ):
        if array.shape != shape:
            raise UserError(f"error: {path / name}.npy has shape {array.shape}; {env_id} needs {shape}.")
    if episodes < 2:
        raise UserError(f"error: {path} holds one episode; at least one to train on and one to hold out are needed.")
    if lengths.min() < 1 or lengths.max() > steps:
        raise UserError(f"error: {path}/lengths.npy must hold numbers from 1 to {steps}.")
    if not 0 <= num_success <= len(examples):
        raise UserError(f"error: --num-success is {num_success}; {path} has success examples for 1 to {len(examples)}.")
    chosen = rng.permutation(len(examples))[:num_success]  # so that fewer examples are a part of more examples
    return Dataset(observations, actions, np.array(lengths), np.array(examples[chosen]))


# ----------------------------------------------------------------------------------------------------------- batches


CONTROL_GROUP = Path("/sys/fs/cgroup")  # a container's own, seen from inside it


def free_memory(device: torch.device) -> int:
    """Return how many bytes are free on the GPU, or available to this process, also within a container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device.index)[0]
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no such file, or no number in it: no limit
        limit, used = (int((CONTROL_GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines())["file"]
        free = min(free, limit - used + int(cached))  # the files it has read make room when others need it
    return free


class MappedStates:
    """Observations that stay in their file, from which `[rows]` copies some to the device. In place of a tensor."""

    def __init__(self, data: Dataset, episodes: np.ndarray, device: torch.device):
        lengths, width = data.lengths[episodes], data.observations.shape[1]
        self.array, self.device = data.observations.reshape(-1, *data.observations.shape[2:]), device
        self.rows = np.concatenate([e * width + np.arange(n + 1) for e, n in zip(episodes, lengths)])
        self.ndim = self.array.ndim

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        states = torch.from_numpy(self.array[self.rows[rows.cpu().numpy()]])
        # From pinned memory the copy does not keep this thread waiting.
        return states.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else states


def place_states(data: Dataset, episodes: np.ndarray, device: torch.device) -> torch.Tensor | MappedStates:
    """Return the observations of some episodes, end to end, [rows, ...]: as a tensor on the device if they fit there.

    They do if they take no more than three quarters of its free memory. The choice is printed for images, and for other
    observations if they do not.
    """
    lengths, (shape, dtype) = data.lengths[episodes], (data.observations.shape[2:], data.observations.dtype)
    size, free = int((lengths + 1).sum()) * int(np.prod(shape)) * dtype.itemsize, free_memory(device)
    fits = size <= 0.75 * free
    if dtype == np.uint8 or not fits:
        place = f"in the memory of the {device.type}" if fits else f"left in their file: too much for the {device.type}"
        print(f"{len(episodes)} episodes ({size / 1e9:.2f} GB; {free / 1e9:.2f} GB are free) are {place}")
    if not fits:
        return MappedStates(data, episodes, device)
    states = torch.empty(
        (int((lengths + 1).sum()), *shape), dtype=torch.from_numpy(np.empty(0, dtype)).dtype, device=device
    )
    ends = np.cumsum(lengths + 1)
    for episode, length, end in zip(episodes, lengths, ends):
        states[end - length - 1 : end] = torch.from_numpy(np.array(data.observations[episode, : length + 1]))
    return states


class Transitions:
    """All transitions of some episodes, flat and on the training device.

    states    o_0 o_1 ... o_T | o_0 o_1 ... o_T | ...     one row per state, episodes end to end
    actions   a_0 a_1 ...     | a_0 a_1 ...     | ...     one row per transition
    start     0   1  ... T-1  | T+1 ...                   the row of each transition's first state (o_T starts none)
    remaining T  T-1 ... 1    | T   ...                   how many steps of its episode follow it
    """

    def __init__(self, data: Dataset, episodes: np.ndarray, device: torch.device):
        lengths = data.lengths[episodes]
        first = np.concatenate([[0], np.cumsum(lengths + 1)[:-1]])
        actions = np.concatenate([data.actions[e, :n] for e, n in zip(episodes, lengths)])
        start = np.concatenate([f + np.arange(n) for f, n in zip(first, lengths)])
        remaining = np.concatenate([np.arange(n, 0, -1) for n in lengths])
        self.states = place_states(data, episodes, device)
        self.actions, self.start, self.remaining = (torch.from_numpy(x).to(device) for x in (actions, start, remaining))

    def gather(self, rows: torch.Tensor, shift: int, generator: torch.Generator) -> torch.Tensor:
        """Return the states in these rows [B], images shifted at random by up to `shift` pixels."""
        return random_shift(self.states[rows], shift, generator)

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean of the states and their standard deviation, of images one for all pixels.

        From 2,000 states if they are images or in their file, otherwise from all.
        """
        states = self.states
        if states.ndim > 2 or isinstance(states, MappedStates):
            # At random: evenly spaced ones can be all of the same step of their episodes.
            states = states[torch.from_numpy(np.random.default_rng(0).integers(len(states), size=2_000))].float()
        mean = states.mean(0)
        if states.ndim == 2:
            return mean.cpu(), states.std(0).cpu().clamp(min=1e-3)  # some numbers never move
        return mean.cpu(), (states - mean).square().mean().sqrt().cpu().expand(mean.shape)


def random_shift(images: torch.Tensor, pixels: int, generator: torch.Generator) -> torch.Tensor:
    """Move each image [B, H, W, 3] by up to so many pixels each way; what comes into view repeats the edge."""
    if not pixels:
        return images
    size, height, width, channels = images.shape
    device = images.device
    offsets = torch.randint(-pixels, pixels + 1, (2, size, 1), generator=generator, device=device)
    rows, columns = ((torch.arange(n, device=device) + o).clamp(0, n - 1) for n, o in zip((height, width), offsets))
    moved = images[torch.arange(size, device=device)[:, None], rows].flatten(2)  # whole rows: much faster than pixels
    columns = (channels * columns[:, :, None] + torch.arange(channels, device=device)).flatten(1)
    return moved.gather(2, columns[:, None].expand(-1, height, -1)).view_as(images)


class Batches:
    """Endless iterator of what `sample()` draws with `generator`; from a file, a thread draws some of it ahead.

    `sample()` returns a tuple of tensors. On a GPU the thread has a stream of its own: in the training's it would have
    to wait for all that is queued there before it knew which rows to read.
    Its state is that of the generator behind the last batch that was handed out, so that a resumed run gets the next.
    """

    AHEAD = 4  # batches

    def __init__(self, sample: Callable[[], Any], generator: torch.Generator, states: torch.Tensor | MappedStates):
        self._sample, self._generator, self._state = sample, generator, generator.get_state()
        self._thread = ThreadPoolExecutor(1) if isinstance(states, MappedStates) else None
        self._ahead: deque[Future] = deque()
        self._stream = None
        if self._thread and generator.device.type == "cuda":
            self._stream = torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())  # which has made what `sample()` reads

    def _draw(self) -> tuple[Any, torch.Tensor, torch.cuda.Event | None]:
        with torch.cuda.stream(self._stream):  # without one this does nothing
            batch = self._sample()
            return batch, self._generator.get_state(), self._stream and self._stream.record_event()

    def __next__(self) -> Any:
        if self._thread is None:
            return self._sample()
        while len(self._ahead) <= self.AHEAD:
            self._ahead.append(self._thread.submit(self._draw))
        batch, self._state, ready = self._ahead.popleft().result()
        if ready:
            torch.cuda.current_stream().wait_event(ready)
            for tensor in batch:  # their memory must not be used again before the training has read them
                tensor.record_stream(torch.cuda.current_stream())
        return batch

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"generator": self._generator.get_state() if self._thread is None else self._state}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._state = state["generator"]
        self._generator.set_state(self._state)


# -------------------------------------------------------------------------------------------------------------- runs


@dataclass
class RunArgs:
    """The flags of every training script that are about data, evaluation and files; a script adds its method's own."""

    env_id: str = "FetchReach"
    """the task: FetchReach, FetchPush, FetchReachImage, FetchPushImage, FetchPushImageOccluded, SawyerWindowOpen or
    SawyerDrawerClose"""
    quality: str = "medium"
    """which standard dataset: medium (45 to 50 % of the episodes succeed) or hard (8 to 12 %)"""
    dataset: Path | None = None
    """a dataset directory to use instead of datasets/ENV_ID-QUALITY"""
    allow_version_mismatch: bool = False
    """use a dataset although another version of the simulator made it"""
    channels: int = 16
    """for images: channels of the first convolution; the second and the third have twice as many"""
    random_shift: int = 0
    """for images: shift those of a batch at random, by up to this many pixels each way (augmentation); 0: not at all"""
    capture_video: bool = False
    """play four more episodes at the end, in environments of their own, and write them as video.gif"""
    seed: int = 0
    """the random seed of networks, batches, held-out episodes, the choice of success examples and evaluation starts"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train; auto: on the GPU if there is one"""
    holdout_fraction: float = 0.05
    """share of the episodes, at least one, that is never trained on, for the heldout metrics"""
    log_interval: int = 500
    """gradient steps between two lines of metrics"""
    eval_interval: int = 10_000
    """gradient steps between two evaluations, which leave the training as it is; 0: evaluate only at the end"""
    eval_episodes: int = 100
    """episodes of each evaluation, with the same starts each time"""
    run_dir: Path | None = None
    """where results go; runs/ENV_ID__METHOD__SEED__TIME if not given"""
    resume: Path | None = None
    """a run directory to go on with, exactly as if it had never stopped; all other flags are then read from it"""


class Run:
    """Everything around a training that is not the method: flags, data, clocks, metrics, checkpoints, the result.

    A script calls `load_data` and `start`, in its loop `log`, `log_evaluation`, `clock` and `end_step`, then `finish`.
    `args` are the flags, those of the run that is resumed if there is one; `first_step` is where the loop begins;
    `device` is where to train; `progress` is the bar of the loop.
    """

    def __init__(self, method: str, args: Any):
        """Read the flags. Raises UserError for one out of its range and for a checkpoint that cannot be resumed."""
        self.method, self.checkpoint = method, None
        self.seconds = {"data": 0.0, "training": 0.0, "evaluation": 0.0}
        self.clock("data")
        if args.resume is not None:
            given = {name for name, value in vars(type(args)()).items() if value != getattr(args, name)} - {"resume"}
            if given:
                names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(given))
                raise UserError(f"error: --resume takes all other flags from {args.resume}; leave out {names}.")
            self.checkpoint = load_weights(args.resume / "checkpoint.pt")
            made_by, flags = self.checkpoint.get("method"), self.checkpoint.get("args", {})
            if made_by not in (None, method):
                raise UserError(f"error: {args.resume} is a run of {made_by}.py, not of {method}.py; resume it there.")
            header = {"step", "seconds", "dataset", "log_size"}
            if set(flags) != set(vars(args)) or not header <= set(self.checkpoint):
                raise self._other_version(args.resume)
            args = type(args)(
                **{**flags, "run_dir": args.resume, "dataset": flags["dataset"] and Path(flags["dataset"])}
            )
            self.seconds = self.checkpoint["seconds"]
            if args.device == "cuda" and not torch.cuda.is_available():
                raise UserError(
                    f"error: {args.run_dir} was trained on a GPU, whose random numbers no CPU draws, and PyTorch finds "
                    "none here; resume it where there is one."
                )
        self.first_step = self.checkpoint["step"] if self.checkpoint else 0
        check_range(1, np.inf, args, "gradient_steps", "hidden_dim", "channels", "log_interval", "eval_episodes")
        check_range(0, np.inf, args, "eval_interval")
        check_range(0, 32, args, "random_shift")
        check_range(0, 1, args, "learning_rate")
        check_range(2, np.inf, args, "batch_size")
        check_range(0, 0.9, args, "holdout_fraction")
        check_range(0, 2**32 - 1, args, "seed")
        self.device = find_device(args.device)
        self.args = replace(args, device=self.device.type)  # a run that is resumed goes on where it was

    @staticmethod
    def _other_version(run_dir: Path) -> UserError:
        return UserError(f"error: {run_dir}/checkpoint.pt was written by another version of this script; start anew.")

    def load_data(self, num_success: int) -> tuple[Dataset, np.ndarray, np.ndarray]:
        """Return the dataset, the episodes to train on and the held-out ones; the seed decides both choices.

        Raises UserError if the dataset cannot be used, or is no longer the one that the resumed run began with.
        """
        args = self.args
        self.dataset = find_dataset(args.env_id, args.quality, args.dataset)
        self.checksums = read_metadata(self.dataset)["sha256"]
        if self.checkpoint and self.checkpoint["dataset"] != self.checksums:
            raise UserError(
                f"error: {self.dataset} is no longer the dataset that {args.run_dir} began with; start anew."
            )
        rng = np.random.default_rng([args.seed, STREAMS.index("training")])
        data = load_dataset(self.dataset, args.env_id, num_success, rng, args.allow_version_mismatch)
        if args.random_shift and data.observations.ndim == 3:
            raise UserError(f"error: --random-shift is for images, and {args.env_id} has none; leave it out.")
        episodes = rng.permutation(len(data.lengths))
        num_heldout = min(max(1, round(args.holdout_fraction * len(episodes))), len(episodes) - 1)
        return data, episodes[num_heldout:], episodes[:num_heldout]

    def load_labelled(self, data: Dataset, episodes: np.ndarray, limit: int = 1_000) -> dict[str, np.ndarray]:
        """Return states of some episodes by label, [at most `limit`, ...] each, for metrics that no training sees.

        `success` and `failure`: what the dataset's flags say of them, if it has any, without the success examples;
        `start`: the first state of each episode.
        """
        path, states = self.dataset / "successes.npy", {"start": data.observations[episodes[:limit], 0]}
        if "successes" not in self.checksums:
            empty = states["start"][:0]
            return {**states, "success": empty, "failure": empty}
        flags = _load_array(path, "?", self.checksums["successes"])
        if flags.shape != data.observations.shape[:2]:
            raise UserError(f"error: {path} has shape {flags.shape}; it must be {data.observations.shape[:2]}.")
        rng = np.random.default_rng(0)
        inside = np.arange(flags.shape[1]) <= data.lengths[episodes, None]
        for label, wanted in (("success", flags[episodes]), ("failure", ~flags[episodes])):
            rows, columns = np.nonzero(wanted & inside)
            chosen = rng.permutation(len(rows))[:limit]
            found = data.observations[episodes[rows[chosen]], columns[chosen]]
            examples = {example.tobytes() for example in data.success_examples}
            states[label] = found[[state.tobytes() not in examples for state in found]]
        return states

    def seeds(self, number: int) -> list[int]:
        """Return seeds of separate random streams. They have 32 bits: PyTorch's CPU generator reads no more."""
        entropy = [STREAMS.index("training"), self.args.seed]
        return np.random.SeedSequence(entropy).generate_state(number).tolist()

    def start(self, parts: dict[str, Any]) -> None:
        """Open the run's directory. `parts`, by name: all networks, optimisers and generators that a checkpoint holds.

        A resumed run sets them to the state in which they were saved. Raises UserError if the directory is in use.
        """
        self.parts = parts
        if self.args.capture_video:  # better now than after the training
            env = make_env(self.args.env_id)
            Camera(env, OUTSIDE_VIEWS["FetchPush"]).close()
            env.close()
        if self.checkpoint:
            try:
                for name, part in parts.items():
                    load = part.set_state if isinstance(part, torch.Generator) else part.load_state_dict
                    load(self.checkpoint[name])
            except (
                KeyError,
                RuntimeError,
                TypeError,
                ValueError,
            ):  # a part, a tensor or a shape is not what it is here
                raise self._other_version(self.args.run_dir) from None
        name = f"{self.args.env_id}__{self.method}__{self.args.seed}__{int(time.time())}"
        self.directory = self.args.run_dir or Path("runs") / name
        log_size = self.checkpoint["log_size"] if self.checkpoint else 0
        self._log = Log(self.directory, self.args, self.first_step, log_size)
        bar = {"initial": self.first_step, "total": self.args.gradient_steps, "unit": "step", "mininterval": 1}
        self.progress = tqdm(desc=f"{self.method} on {self.args.env_id}", **bar)

    def clock(self, name: str) -> None:
        """Count the seconds from now on as `data`, `training` or `evaluation`."""
        now = time.perf_counter()
        if hasattr(self, "_clock"):
            self.seconds[self._clock[0]] += now - self._clock[1]
        self._clock = (name, now)

    def log(self, step: int, prefix: str, metrics: dict[str, float]) -> None:
        """Write metrics as PREFIX/NAME."""
        self._log.write(step, {f"{prefix}/{name}": value for name, value in metrics.items()})

    def log_evaluation(self, step: int, episodes: dict[str, list]) -> dict[str, list]:
        """Write the means of an evaluation's episodes; return these. From now on the clock counts training again."""
        means = {
            "success_rate": "success",
            "final_success_rate": "final_success",
            "discounted_return": "discounted_return",
        }
        means = {name: float(np.mean(episodes[key])) for name, key in means.items()}
        self.log(step, "eval", means)
        self.progress.set_postfix(means)
        self.clock("training")
        return episodes

    def end_step(self, step: int, interrupted: Any) -> None:
        """Write a checkpoint after every 5,000th and the last step, and when interrupted; then raise UserError.

        Raises UserError, and writes nothing, if a network or an optimiser has diverged.
        """
        self.progress.update()
        if not interrupted and step % 5_000 and step != self.args.gradient_steps:
            return
        self.clock("training")
        content = {"method": self.method, "args": plain(self.args), "step": step, "seconds": self.seconds}
        content |= {"dataset": self.checksums, "log_size": self._log.path.stat().st_size}
        for name, part in self.parts.items():
            content[name] = part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
            if not all_finite(content[name]):
                self._log.writer.close()
                raise UserError(f"error: the {name} is not finite at step {step}; try a smaller --learning-rate.")
        save_weights(self.directory / "checkpoint.pt", content)
        if interrupted:
            self._log.writer.close()
            command = f"python {self.method}.py --resume {self.directory}"
            raise UserError(f"interrupted at step {step}; go on with: {command}")

    def finish(self, episodes: dict[str, list], mode: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        """Write and return the result, print its success rate, and write a video if it is wanted.

        `episodes`: the lists `seed`, `success`, `final_success`, `initial_success` and `discounted_return`, one entry
        per episode. `mode`: what the policy does, for the video.
        """
        self.clock("training")
        self.progress.close()
        self._log.writer.close()
        flags = {name: episodes[name] for name in ("success", "final_success", "initial_success")}
        result = {
            **success_statistics(flags),
            "method": self.method,
            "gradient_steps": self.args.gradient_steps,
            "seconds": self.seconds,
            "args": plain(self.args),
            "dataset": self.checksums,
            "versions": versions("torch", "numpy", "gymnasium", *find_task(self.args.env_id).simulator),
            "episodes": episodes,
        }
        if self.device.type == "cuda":
            result |= {"gpu": torch.cuda.get_device_name(), "peak_gpu_bytes": torch.cuda.max_memory_allocated()}
        write_json(self.directory / "result.json", result)
        low, high = result["success_interval"]
        print(
            f"{self.directory}: success rate {result['success_rate']:.2f} [{low:.2f}, {high:.2f}] over "
            f"{len(episodes['seed'])} episodes, {result['final_success_rate']:.2f} at the last step; "
            f"{result['initial_success_rate']:.2f} started solved"
        )
        if self.args.capture_video:
            capture_video(self.directory / "video.gif", self.args.env_id, self.args.seed, mode, self.device)
        return result
