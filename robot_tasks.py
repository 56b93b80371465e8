"""The tasks of the paper: names, simulators, and the camera of those with images. common.make_env makes them."""

import atexit
import contextlib
import ctypes.util
import functools
import importlib
import importlib.metadata
import io
import os
import re
import subprocess
import sys
import weakref
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest.mock import patch

import gymnasium as gym
import numpy as np


@dataclass(frozen=True)
class Task:
    """What a script must know of a task beyond its environment."""

    entry_point: str
    kwargs: dict[str, Any]
    max_episode_steps: int
    num_episodes: int  # of the standard datasets
    simulator: tuple[str, ...]  # the packages whose versions decide the physics
    achieved_goal: slice  # where a state holds the position that the goal speaks of
    desired_goal: tuple[float, float, float]  # metres; a position that can be reached, for goal-conditioned agents
    state_task: str | None = None  # for a task of images: the same task with state observations

    def mismatch(self, made_with: dict[str, str]) -> str:
        """Return how the versions that a dataset was made with differ from those here; nothing if they do not."""
        here = {package: importlib.metadata.version(package) for package in self.simulator}
        made_with = {package: made_with.get(package, here[package]) for package in here}
        return "" if made_with == here else f"was made with {made_with} and here is {here}, which moves differently"


_FETCH, _SAWYER = ("mujoco", "gymnasium-robotics"), ("mujoco", "metaworld")
_REACH, _PUSH, _POSITION = (1.3, 0.3, 0.9), (1.4, 0.9, 0.42469975), slice(3, 6)
_WINDOW = dict(name="window-open-v3", furniture=(0.0, 0.8, 0.16), joint="window_slide", joint_range=(0.0, 0.2))
_DRAWER = dict(name="drawer-close-v3", furniture=(0.0, 0.9, 0.0), joint="goal_slidey", joint_range=(-0.15, 0.0))
TASKS = {
    "FetchReach": Task("FetchTask", dict(name="FetchReach-v4", goal=_REACH), 50, 4000, _FETCH, slice(0, 3), _REACH),
    "FetchPush": Task("FetchTask", dict(name="FetchPush-v4", goal=_PUSH), 50, 4000, _FETCH, _POSITION, _PUSH),
    # Meta-World measures success against points that the objects cannot reach, (0.2, 0.8, 0.16) and (0, 0.74, 0.09):
    # the desired goals here are where the handle and the drawer come to rest when the task is solved.
    "SawyerWindowOpen": Task("SawyerTask", _WINDOW, 150, 2000, _SAWYER, _POSITION, (0.16, 0.705, 0.16)),
    "SawyerDrawerClose": Task("SawyerTask", _DRAWER, 150, 2000, _SAWYER, _POSITION, (0.0, 0.73, 0.14)),
}
for _id in ("FetchReachImage", "FetchPushImage", "FetchPushImageOccluded"):
    _task = TASKS[_id.split("Image")[0]]
    TASKS[_id] = replace(_task, kwargs={**_task.kwargs, "view": _id}, state_task=_id.split("Image")[0])
for _id, _task in TASKS.items():  # in a namespace: gymnasium-robotics owns the bare names; tests run the env checker
    _options = dict(max_episode_steps=_task.max_episode_steps, disable_env_checker=True, kwargs=_task.kwargs)
    gym.register(f"laeo/{_id}-v0", f"{__name__}:{_task.entry_point}", **_options)


class View(NamedTuple):
    """Where a free camera stands, in MuJoCo's terms."""

    lookat: tuple[float, float, float]  # metres; the point in the middle of the picture
    distance: float  # metres
    azimuth: float  # degrees
    elevation: float  # degrees


VIEWS = {
    "FetchReachImage": View((1.2, 0.8, 0.5), 1.4, 120, -30),  # this one and the next are the paper's
    "FetchPushImage": View((1.25, 0.8, 0.4), 0.65, 90, -40),
    # From above, so that the arm hides the block when it touches it, more often than from the released code's view.
    "FetchPushImageOccluded": View((1.35, 0.8, 0.42), 1.2, 60, -85),
    "FetchReach-v4": View((1.3, 0.55, 0.65), 1.5, 130, -20),  # this one and the next ones are for people
    "FetchPush-v4": View((1.33, 0.82, 0.43), 0.8, 205, -35),
    "window-open-v3": View((0.05, 0.65, 0.2), 1.2, 130, -25),
    "drawer-close-v3": View((0.0, 0.65, 0.15), 1.2, 140, -30),
}
GL_LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}
GL_PACKAGES = {"egl": "libegl1 libgl1", "osmesa": "libosmesa6"}  # of Debian and Ubuntu


def import_mujoco() -> Any:
    """Return MuJoCo. When imported it loads what MUJOCO_GL names, or fails, and a task of states needs none of that."""
    with patch.dict(os.environ, MUJOCO_GL="disabled"):
        import mujoco
    return mujoco


@functools.cache
def gl_name() -> str:
    """Return what renders here: what MUJOCO_GL names, or else, on Linux, EGL or OSMesa, which need no display.

    It is tried in a process of its own (0.3 s): MuJoCo and PyOpenGL are bound to the first one that a process loads.
    Raises UserError if nothing can be rendered here.
    """
    names, reasons = ["egl", "osmesa"] if sys.platform == "linux" else [""], []
    if os.environ.get("MUJOCO_GL"):
        names = [os.environ["MUJOCO_GL"].lower().strip()]
    for name in names:
        code = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 8, 8).close()"
        environment = os.environ | {"MUJOCO_GL": name}
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        if result.returncode == 0:
            return name
        errors = re.findall(r"^[\w.]+(?:Error|Exception)\b.*?(?=\.?$|\. )", result.stderr, re.MULTILINE)
        reasons.append(f"{name}: {errors[0] if errors else f'exit status {result.returncode}'}")
    settings = [x for x in ("MUJOCO_GL", "MUJOCO_EGL_DEVICE_ID", "PYOPENGL_PLATFORM") if os.environ.get(x)]
    hint = f"change or unset {' and '.join(f'{name}={os.environ[name]}' for name in settings)}"
    if not settings or (names[0] in GL_LIBRARIES and not ctypes.util.find_library(GL_LIBRARIES[names[0]])):
        install = " (or ".join(GL_PACKAGES.get(name, name) for name in names) + ")" * (len(names) - 1)
        hint = f"on Debian or Ubuntu, apt install {install}" + f", or {hint}" * bool(settings)
    from common import UserError  # which imports this file

    raise UserError(f"pictures cannot be rendered here ({'; '.join(reasons)}); {hint}.")


def _close(renderer: Any) -> None:
    renderer._gl_context.make_current()  # MuJoCo frees what it finds in the current one: that of another camera
    renderer.close()


class Camera:
    """Takes pictures of a simulator without moving it. Raises UserError if nothing can be rendered here.

    `name` says what draws, for a dataset's metadata: another driver need not draw the same bytes.
    """

    def __init__(self, inner: gym.Env, view: View, size: int = 64, show_goal: bool = False):
        mujoco, model, self.name = import_mujoco(), inner.model, gl_name()
        self.shape, self._data = (size, size, 3), inner.data
        model.vis.quality.offsamples = 0  # antialiasing is cheaper by hand: see picture()
        for geom in range(model.ngeom):
            # Not to be drawn: the long axes of the point that drags the gripper, and two links inside the robot's base,
            # which cannot be seen and are half of all triangles. MuJoCo does not draw the last group of geoms.
            if model.body(model.geom_bodyid[geom]).name in ("robot0:mocap", "robot0:estop_link", "robot0:laser_link"):
                model.geom_group[geom] = mujoco.mjNGROUP - 1
        self._option = mujoco.MjvOption()
        self._option.sitegroup[:] = show_goal  # the ball at the goal is a site
        if show_goal and hasattr(inner, "_sample_goal"):  # Fetch, which moves the ball there in its own rendering only
            site, goal = model.site("target0").id, inner._sample_goal()
            model.site_pos[site] += goal - inner.data.site_xpos[site]
            inner.data.site_xpos[site] = goal  # until the next step computes it
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FREE
        self._camera.lookat[:] = view.lookat
        self._camera.distance, self._camera.azimuth, self._camera.elevation = view[1:]
        with contextlib.suppress(ImportError):  # loaded after Mesa, PyTorch's compiler takes Mesa's LLVM and crashes
            import triton  # noqa: F401
        # Mesa draws so few pixels faster without threads. PYOPENGL_PLATFORM, which MuJoCo sets, is unset again.
        with patch.dict(os.environ, {"LP_NUM_THREADS": "0"} | os.environ | {"MUJOCO_GL": self.name}):
            importlib.reload(mujoco.gl_context)  # chooses by MUJOCO_GL
            self._renderer = mujoco.Renderer(model, 2 * size, 2 * size)
        self.close = weakref.finalize(self, _close, self._renderer)  # called too when the camera is dropped, and
        atexit.register(self.close)  # before EGL ends: later it complains
        from OpenGL import GL  # after MuJoCo has chosen PyOpenGL's platform

        self.name += f": {GL.glGetString(GL.GL_RENDERER).decode()}"

    def picture(self) -> np.ndarray:
        """Return the present state as [size, size, 3] uint8, each pixel the mean of four.

        Without that a block moves by whole pixels of 8 mm.
        """
        self._renderer.update_scene(self._data, self._camera, self._option)
        from PIL import Image

        return np.array(Image.fromarray(self._renderer.render()).reduce(2))  # a copy: PyTorch asks for one to write to


class RobotTask(gym.Env):
    """What Fetch and Sawyer tasks share: `inner`, the simulator's own environment, no reward, and pictures.

    `state` is the present state, float32, also where the observation is an image: with a `view` it is a picture from
    there, [64, 64, 3] uint8, of an episode that is the same to the bit. `info["success"]` says whether the present
    state solves the task. `render` returns a picture [240, 240, 3] from `outside`, beside what the policy sees.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}

    def __init__(self, inner: gym.Env, size: int, outside: str, view: str | None, render_mode: str | None):
        self.inner, self.render_mode, self.action_space = inner, render_mode, inner.action_space
        self.camera, self._outside = Camera(inner, VIEWS[view]) if view else None, VIEWS[outside]
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        if self.camera:
            self.observation_space = gym.spaces.Box(0, 255, self.camera.shape, np.uint8)

    def _observe(self, state: np.ndarray, success: Any) -> tuple[np.ndarray, dict[str, bool]]:
        self.state = state.astype(np.float32)
        return self.camera.picture() if self.camera else self.state, {"success": bool(success)}

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        return self._observe(*self._start(seed))

    def step(self, action: np.ndarray):
        observation, info = self._observe(*self._play(action))
        return observation, 0.0, False, False, info

    def render(self) -> np.ndarray:
        if isinstance(self._outside, View):
            self._outside = Camera(self.inner, self._outside, 240, show_goal=True)
        picture = self._outside.picture()
        if self.camera:
            rows, columns = (np.arange(240) * n // 240 for n in self.camera.shape[:2])
            picture = np.concatenate([picture, self.camera.picture()[rows][:, columns]], axis=1)
        return picture

    def close(self) -> None:
        for camera in (self.camera, self._outside):
            if isinstance(camera, Camera):
                camera.close()
        self.inner.close()


class FetchTask(RobotTask):
    """A Fetch task of gymnasium-robotics with a fixed goal, solved within 0.05 m of it.

    FetchReach, 10 numbers: gripper position, fingers (2), gripper velocity, finger velocities (2).
    FetchPush, 25 numbers: gripper position, block position, block relative to gripper, fingers (2),
    block rotation (3), block velocity relative to the gripper (3), block angular velocity (3), gripper velocity (3),
    finger velocities (2). Positions in metres, velocities in metres per step, actions [4] in [-1, 1]: 0.05 m per unit.
    """

    def __init__(self, name: str, goal: tuple, view: str | None = None, render_mode: str | None = None):
        import_mujoco()
        with contextlib.redirect_stderr(io.StringIO()):  # a notice about Adroit tasks, which are not used here
            import gymnasium_robotics  # registers its environments on import

        gym.register_envs(gymnasium_robotics)
        inner = gym.make(name).unwrapped
        inner._sample_goal = lambda: np.array(goal)  # the paper's tasks have one goal, and no policy sees it
        # Of all joints the observation uses the two fingers only: looking up no others, by name and in Python, makes a
        # step about a quarter faster and changes no bit (tests/test_common.py).
        names = inner._model_names
        names._joint_names = tuple(name for name in names.joint_names if name.startswith("robot0:"))[-2:]
        super().__init__(inner, *inner.observation_space["observation"].shape, name, view, render_mode)

    def _start(self, seed: int | None) -> tuple[np.ndarray, Any]:
        observation, _ = self.inner.reset(seed=seed)
        success = self.inner._is_success(observation["achieved_goal"], observation["desired_goal"])
        return observation["observation"], success

    def _play(self, action: np.ndarray) -> tuple[np.ndarray, Any]:
        observation, _, _, _, info = self.inner.step(action)
        return observation["observation"], info["is_success"]


class SawyerTask(RobotTask):
    """A Meta-World task with fixed furniture, solved as Meta-World says, judged on each state alone.

    Observation, 6 numbers: tool centre, then handle (window) or drawer position, in metres; actions [4] in [-1, 1].
    Each episode starts with the joint of the window or drawer drawn uniformly over `joint_range` (metres). Stock
    Meta-World ignores `reset(seed=...)` and shows the object where it was one episode ago; this class does neither.
    """

    def __init__(self, name: str, furniture: tuple, joint: str, joint_range: tuple, render_mode: str | None = None):
        mujoco = self._mujoco = import_mujoco()
        import metaworld

        inner, self._joint, self._joint_range = metaworld.ALL_V3_ENVIRONMENTS[name](), joint, joint_range
        # metaworld 3.1.1 renamed the drawer's own success radius, 0.04 m, and so lost its effect; here it has one.
        inner.TARGET_RADIUS = getattr(inner, "_TARGET_RADIUS", inner.TARGET_RADIUS)
        inner._set_task_called = inner._freeze_rand_vec = True
        inner._last_rand_vec = np.array(furniture)
        inner.reset()
        # Meta-World settles the hand with 100 simulator steps at every reset. Its result is kept here, warm start
        # included, so that a start depends on the seed alone and not on the episode before it.
        self._kept = np.empty(mujoco.mj_stateSize(inner.model, mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_getState(inner.model, inner.data, self._kept, mujoco.mjtState.mjSTATE_INTEGRATION)
        super().__init__(inner, 6, name, None, render_mode)

    def _start(self, seed: int | None) -> tuple[np.ndarray, Any]:
        inner, mujoco = self.inner, self._mujoco
        mujoco.mj_setState(inner.model, inner.data, self._kept, mujoco.mjtState.mjSTATE_INTEGRATION)
        inner.data.joint(self._joint).qpos = self.np_random.uniform(*self._joint_range)
        mujoco.mj_forward(inner.model, inner.data)  # without it the observation holds the last episode's object
        inner.curr_path_length = 0
        _, info = inner.evaluate_state(inner._get_obs(), np.zeros(4, np.float32))
        return np.concatenate([inner.tcp_center, inner._get_pos_objects()]), info["success"]

    def _play(self, action: np.ndarray) -> tuple[np.ndarray, Any]:
        _, _, _, _, info = self.inner.step(action)
        return np.concatenate([self.inner.tcp_center, self.inner._get_pos_objects()]), info["success"]
