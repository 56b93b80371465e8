"""What holds common.py and robot_tasks.py: the tasks in their real simulators, files whole or absent, and datasets."""

import ast
import errno
import functools
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import gl
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from scipy.stats import binomtest

import common

ROOT = Path(common.__file__).parent
OBSERVATION_SHAPES = {"FetchReach": (10,), "FetchPush": (25,), "SawyerWindowOpen": (6,), "SawyerDrawerClose": (6,)}
EPISODE_STEPS = {"FetchReach": 50, "FetchPush": 50, "SawyerWindowOpen": 150, "SawyerDrawerClose": 150}
for _image_task in ("FetchReachImage", "FetchPushImage", "FetchPushImageOccluded"):
    OBSERVATION_SHAPES[_image_task], EPISODE_STEPS[_image_task] = (64, 64, 3), 50
every_task = pytest.mark.parametrize("env_id", common.TASKS)


def make_task(env_id: str) -> gym.Env:
    """A new environment; the test is skipped if it is of images and nothing can be rendered here."""
    if "Image" in env_id:
        gl.require_gl()
    return common.make_env(env_id)


@functools.cache
def shared_env(env_id: str) -> gym.Env:
    """An environment that many tests play in, in any order: a reset must forget them all."""
    return make_task(env_id)


def play(env: gym.Env, seed: int, steps: int, render: bool = False) -> tuple[np.ndarray, list[bool]]:
    """Play random actions that depend on the seed alone; return all observations and success flags."""
    observation, info = env.reset(seed=seed)
    observations, successes = [observation], [info["success"]]
    for action in np.random.default_rng(seed).uniform(-1, 1, (steps, 4)).astype(np.float32):
        observation, _, _, _, info = env.step(action)
        observations.append(observation)
        successes.append(info["success"])
        if render:
            env.render()
    return np.stack(observations), successes


def refusal(function, *args, **kwargs) -> str:
    """Return the message of the UserError that the call must raise: one line that ends like a sentence."""
    with pytest.raises(common.UserError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert not message.startswith("error") and message.endswith(".") and len(message.splitlines()) == 1, message
    return message


def run_python(code: str, *args: object, **kwargs) -> subprocess.CompletedProcess:
    """Run code in a new process."""
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **kwargs)


class Trap:
    """A value that creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# ------------------------------------------------------------------------------------------------------------- tasks


def test_the_tasks_are_the_documented_ones():
    assert {env_id: task.max_episode_steps for env_id, task in common.TASKS.items()} == EPISODE_STEPS


@every_task
@pytest.mark.filterwarnings("ignore::UserWarning")  # the checker would like bounded observations
def test_gymnasium_check_env(env_id):
    env = make_task(env_id)
    check_env(env.unwrapped)
    env.close()


@every_task
def test_a_seed_fixes_the_episode_to_the_bit(env_id):
    env, steps = shared_env(env_id), EPISODE_STEPS[env_id]
    observations, successes = play(env, 7, 20)
    assert not np.array_equal(observations[0], observations[-1])
    for other_seed in (8, 9):
        play(env, other_seed, steps)
    fresh = make_task(env_id)
    for again in (env, fresh):
        repeated_observations, repeated_successes = play(again, 7, 20)
        assert repeated_observations.tobytes() == observations.tobytes()
        assert repeated_successes == successes
    fresh.close()


@every_task
def test_two_seeds_start_differently_except_fetch_reach(env_id):
    env = shared_env(env_id)
    starts = [env.reset(seed=seed)[0] for seed in range(5)]
    same = [np.array_equal(starts[0], start) for start in starts[1:]]
    assert same == [env_id.startswith("FetchReach")] * 4


@every_task
def test_an_episode_has_no_reward_and_ends_at_the_step_limit_only(env_id):
    env, shape = shared_env(env_id), OBSERVATION_SHAPES[env_id]
    dtype = np.uint8 if "Image" in env_id else np.float32
    assert env.observation_space.shape == shape and env.observation_space.dtype == dtype
    assert env.action_space == gym.spaces.Box(-1.0, 1.0, (4,), np.float32)
    observation, info = env.reset(seed=3)
    assert observation.shape == shape and observation.dtype == dtype and type(info["success"]) is bool
    ends = []
    for action in np.random.default_rng(3).uniform(-1, 1, (EPISODE_STEPS[env_id], 4)).astype(np.float32):
        observation, reward, terminated, truncated, info = env.step(action)
        assert observation.shape == shape and observation.dtype == dtype and type(info["success"]) is bool
        assert reward == 0.0 and terminated is False
        ends.append(truncated)
    assert ends == [False] * (EPISODE_STEPS[env_id] - 1) + [True]


@pytest.mark.parametrize("env_id", [env_id for env_id, task in common.TASKS.items() if task.state_task is None])
def test_the_desired_goal_solves_the_task(env_id):
    """An object at `desired_goal`, read at `achieved_goal`, is a success."""
    task, env = common.TASKS[env_id], shared_env(env_id)
    goal = np.array(task.desired_goal)
    if env_id == "FetchReach":
        observation, success = move_gripper(env, goal)
    elif env_id == "FetchPush":
        observation, success = place_block(env, goal)
    else:
        observation, success = place_joint(env, task.kwargs["joint_range"][1])
    np.testing.assert_allclose(observation[task.achieved_goal], goal, atol=0.005)
    assert success is True


@pytest.mark.parametrize("env_id", ["FetchReach", "FetchPush"])
def test_fetch_is_the_stock_environment_to_the_bit(env_id):
    """Looking up two joint names instead of all changes nothing."""
    stock, env = gym.make(f"{env_id}-v4"), common.make_env(env_id)
    for seed in (0, 1, 2):
        expected, actual = [stock.reset(seed=seed)[0]["observation"]], [env.reset(seed=seed)[0]]
        for action in np.random.default_rng(seed).uniform(-1, 1, (50, 4)).astype(np.float32):
            expected.append(stock.step(action)[0]["observation"])
            actual.append(env.step(action)[0])
        assert np.stack(actual).tobytes() == np.stack(expected).astype(np.float32).tobytes()
    stock.close()
    env.close()


@pytest.mark.parametrize(("env_id", "goal"), [("FetchReach", (1.3, 0.3, 0.9)), ("FetchPush", (1.4, 0.9, 0.42469975))])
def test_fetch_has_one_goal(env_id, goal):
    env = shared_env(env_id)
    for seed in range(3):
        env.reset(seed=seed)
        assert tuple(env.unwrapped.inner.goal) == goal == common.TASKS[env_id].desired_goal


def move_gripper(env: gym.Env, target: np.ndarray) -> tuple[np.ndarray, bool]:
    """Steer FetchReach's gripper to the target; return the last observation and success flag."""
    observation, info = env.reset(seed=0)
    assert info["success"] is False
    correction = np.zeros(3)  # the arm lags a few millimetres behind where it is told to be
    for step in range(50):
        error = target - observation[:3]
        correction += 0.3 * error * (step >= 20)
        action = np.clip((error + correction) / 0.05, -1, 1)
        observation, _, _, _, info = env.step(np.append(action, 0).astype(np.float32))
    return observation, info["success"]


def place_block(env: gym.Env, position: np.ndarray) -> tuple[np.ndarray, bool]:
    """Put FetchPush's block somewhere on the table; return the next observation and success flag."""
    env.reset(seed=0)
    inner = env.unwrapped.inner
    inner._utils.set_joint_qpos(inner.model, inner.data, "object0:joint", np.array([*position, 1.0, 0.0, 0.0, 0.0]))
    inner._mujoco.mj_forward(inner.model, inner.data)
    observation, _, _, _, info = env.step(np.zeros(4, np.float32))
    return observation, info["success"]


def place_joint(env: gym.Env, value: float) -> tuple[np.ndarray, bool]:
    """Put a Sawyer task's window or drawer somewhere; return the next observation and success flag."""
    import mujoco

    env.reset(seed=0)
    inner = env.unwrapped.inner
    inner.data.joint(joint_name(env)).qpos = value
    mujoco.mj_forward(inner.model, inner.data)
    observation, _, _, _, info = env.step(np.zeros(4, np.float32))
    return observation, info["success"]


def joint_name(env: gym.Env) -> str:
    return env.spec.kwargs["joint"]


@pytest.mark.parametrize("direction", [(1, 0, 0), (0, -1, 0), (0, 0, 1)])
@pytest.mark.parametrize(("distance", "solved"), [(0.048, True), (0.052, False)])
def test_fetch_reach_is_solved_within_5_cm(direction, distance, solved):
    goal = np.array([1.3, 0.3, 0.9])
    observation, success = move_gripper(shared_env("FetchReach"), goal + distance * np.array(direction))
    assert abs(np.linalg.norm(observation[:3] - goal) - distance) < 0.001
    assert success is solved


@pytest.mark.parametrize("direction", [(1, 0, 0), (0, -1, 0), (-1, 0, 0)])
@pytest.mark.parametrize(("distance", "solved"), [(0.048, True), (0.052, False)])
def test_fetch_push_is_solved_within_5_cm(direction, distance, solved):
    goal = np.array([1.4, 0.9, 0.42469975])
    observation, success = place_block(shared_env("FetchPush"), goal + distance * np.array(direction))
    assert abs(np.linalg.norm(observation[3:6] - goal) - distance) < 0.001
    assert success is solved


def window_is_open(observation: np.ndarray) -> bool:
    return bool(abs(observation[3] - 0.2) <= 0.05)


def drawer_is_closed(observation: np.ndarray) -> bool:
    return bool(np.linalg.norm(observation[3:6] - np.array([0.0, 0.74, 0.09])) <= 0.055)


SAWYER_PREDICATES = {"SawyerWindowOpen": window_is_open, "SawyerDrawerClose": drawer_is_closed}


@pytest.mark.parametrize("env_id", SAWYER_PREDICATES)
def test_sawyer_shows_the_object_where_it_is_and_starts_over_the_whole_range(env_id):
    env = shared_env(env_id)
    low, high = common.TASKS[env_id].kwargs["joint_range"]
    assert (low, high) == {"SawyerWindowOpen": (0.0, 0.2), "SawyerDrawerClose": (-0.15, 0.0)}[env_id]
    starts = []
    for seed in range(300):
        observation, _ = env.reset(seed=seed)
        joint = env.unwrapped.inner.data.joint(joint_name(env)).qpos[0]
        expected = (joint - 0.04, 0.705, 0.16) if env_id == "SawyerWindowOpen" else (0.0, 0.73 + joint, 0.14)
        np.testing.assert_allclose(observation[3:6], expected, atol=1e-3)
        starts.append(joint)
    counts, _ = np.histogram(starts, bins=10, range=(low, high))
    assert counts.sum() == 300 and counts.min() >= 10  # 30 are expected in each tenth of the range
    assert min(starts) < low + 0.02 * (high - low) and max(starts) > high - 0.02 * (high - low)


@pytest.mark.parametrize(
    ("env_id", "joint", "solved"),
    [
        ("SawyerWindowOpen", 0.188, False),
        ("SawyerWindowOpen", 0.192, True),
        ("SawyerDrawerClose", -0.015, False),
        ("SawyerDrawerClose", -0.011, True),
    ],
)
def test_sawyer_success_is_the_documented_predicate(env_id, joint, solved):
    observation, success = place_joint(shared_env(env_id), joint)
    assert SAWYER_PREDICATES[env_id](observation) is solved
    assert success is solved


def test_the_drawers_own_success_radius_is_in_force():
    assert shared_env("SawyerDrawerClose").unwrapped.inner.TARGET_RADIUS == 0.04


# FetchPush: half of the goal's disc of 0.05 m radius lies within the square of 0.3 m, less the disc of 0.1 m radius
# around the gripper, where the block starts.
@pytest.mark.parametrize(
    ("env_id", "seeds", "share"),
    [("SawyerWindowOpen", 1000, 0.05), ("SawyerDrawerClose", 1000, 0.086), ("FetchPush", 300, 0.0038 / 0.0586)],
)
def test_share_of_starts_that_are_solved(env_id, seeds, share):
    env, solved = shared_env(env_id), 0
    for seed in range(seeds):
        observation, info = env.reset(seed=seed)
        if env_id in SAWYER_PREDICATES:
            assert info["success"] is SAWYER_PREDICATES[env_id](observation)
        solved += info["success"]
    assert abs(solved / seeds - share) < 4 * np.sqrt(share * (1 - share) / seeds)


def test_fetch_reach_never_starts_solved():
    assert shared_env("FetchReach").reset(seed=0)[1]["success"] is False


# ------------------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("env_id", ["FetchPush", "FetchPushImage"])
def test_gymnasium_makes_and_renders_a_task(env_id):
    """A picture of the whole scene, beside what the policy sees if that is a picture. It moves nothing."""
    gl.require_gl()
    env = gym.make(f"laeo/{env_id}-v0", render_mode="rgb_array")
    assert env.spec.max_episode_steps == 50 and env.render_mode == "rgb_array"
    env.reset(seed=0)
    pictures = [env.render()]
    for _ in range(5):
        env.step(np.array([1, 0, -1, 0], np.float32))
        pictures.append(env.render())
    for picture in pictures:
        assert picture.shape == (240, 480 if env_id == "FetchPushImage" else 240, 3) and picture.dtype == np.uint8
        assert picture.std() > 20
    assert np.abs(pictures[0].astype(int) - pictures[-1]).max() > 50  # the arm has moved
    plain, rendered = play(make_task(env_id), 3, 10), play(env, 3, 10, render=True)
    assert plain[0].tobytes() == rendered[0].tobytes() and plain[1] == rendered[1]
    env.close()


def test_gymnasiums_record_video_films_a_task(tmp_path, monkeypatch):
    """Gymnasium writes the file with moviepy, which need not be here: what it is given is looked at instead."""
    gl.require_gl()
    films = {}

    class ImageSequenceClip:
        def __init__(self, frames, fps):
            self.frames, self.fps = frames, fps

        def write_videofile(self, path, logger=None):
            films[Path(path).name] = np.stack(self.frames), self.fps

    for name in ("moviepy", "moviepy.video", "moviepy.video.io", "moviepy.video.io.ImageSequenceClip"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["moviepy.video.io.ImageSequenceClip"].ImageSequenceClip = ImageSequenceClip
    env = gym.make("laeo/FetchPush-v0", render_mode="rgb_array")
    env = gym.wrappers.RecordVideo(env, str(tmp_path / "films"), name_prefix="push")
    env.reset(seed=0)
    truncated = False
    while not truncated:
        _, _, _, truncated, _ = env.step(np.array([1, 0, -1, 0], np.float32))
    env.close()
    assert list(films) == ["push-episode-0.mp4"]
    frames, fps = films["push-episode-0.mp4"]
    assert frames.shape == (51, 240, 240, 3) and fps == 25
    assert len({frame.tobytes() for frame in frames}) > 20


# --------------------------------------------------------------------------------------------- environments of others


class Toy(gym.Env):
    """Any spaces; an episode lasts until its step limit."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


def box(*shape: int, low: float = -1.0, high: float = 1.0, dtype: type = np.float32) -> gym.spaces.Box:
    return gym.spaces.Box(low, high, shape, dtype)


def images(*shape: int) -> gym.spaces.Box:
    return box(*shape, low=0, high=255, dtype=np.uint8)


def make_toy(observation_space, action_space, max_episode_steps: int | None = 5, env_id: str = "Toy-v0") -> gym.Env:
    """common.make_env of a new environment with these spaces."""
    kwargs = {"observation_space": observation_space, "action_space": action_space}
    gym.register(env_id, Toy, max_episode_steps=max_episode_steps, disable_env_checker=True, kwargs=kwargs)
    try:
        return common.make_env(env_id)
    finally:
        del gym.registry[env_id]


@pytest.mark.parametrize(
    ("observations", "actions"),
    [
        (box(3), box(1, low=-2, high=2)),
        (box(3, low=-np.inf, high=np.inf, dtype=np.float64), box(4, low=0, high=0.5, dtype=np.float64)),
        (images(8, 8, 1), box(2)),
        (images(20, 28, 1), box(2)),
        (images(84, 84, 4), box(2)),
        (images(64, 64, 12), box(2)),
        (box(64, 64, 3, low=0), box(2)),
    ],
    ids=str,
)
def test_make_env_takes_boxes_of_vectors_and_images(observations, actions):
    env = make_toy(observations, actions)
    assert env.observation_space == observations and env.action_space == actions
    assert env.reset(seed=0)[0].shape == observations.shape


@pytest.mark.parametrize(
    "observations",
    [images(64, 64, 13), images(3, 64, 64), images(12, 84, 84), images(64, 7, 3), images(7, 64, 3), images(64, 64)]
    + [box(), gym.spaces.Discrete(5), gym.spaces.MultiBinary(3), images(4, 64, 64, 3)],
    ids=str,
)
def test_make_env_refuses_other_observations(observations):
    """13 channels, channels before rows and columns, fewer than 8 rows or columns, and what is no array of numbers."""
    message = refusal(make_toy, observations, box(2))
    assert "the observations of Toy-v0 are" in message and "Box of one axis" in message
    assert "[height, width, channels], 8 x 8 or more, with 1 to 12 channels" in message


def test_dict_observations_are_refused_with_the_wrappers_that_make_an_array():
    spaces = {"observation": box(10), "achieved_goal": box(3), "desired_goal": box(3)}
    message = refusal(make_toy, gym.spaces.Dict(spaces), box(2))
    assert "FlattenObservation" in message and "FilterObservation" in message and "achieved_goal" in message
    gym.register("Flat-v0", lambda: gym.wrappers.FlattenObservation(Toy(gym.spaces.Dict(spaces), box(2))))
    assert common.make_env("Flat-v0").observation_space.shape == (16,)
    del gym.registry["Flat-v0"]


@pytest.mark.parametrize(
    "actions",
    [gym.spaces.Discrete(4), gym.spaces.MultiDiscrete([2, 3]), box(2, 2), box(), box(3, low=-np.inf)]
    + [box(3, high=np.inf), gym.spaces.Box(np.array([-1, -np.inf], np.float32), np.ones(2, np.float32))],
    ids=str,
)
def test_make_env_refuses_other_actions(actions):
    message = refusal(make_toy, box(3), actions)
    assert "the actions of Toy-v0 are" in message and "Box of one axis with finite bounds" in message


def test_an_environment_without_a_step_limit_gets_one():
    env = make_toy(box(3), box(2), max_episode_steps=None)
    env.reset(seed=0)
    ends = [any(env.step(np.zeros(2, np.float32))[2:4]) for _ in range(10_000)]
    assert ends == [False] * 9_999 + [True]
    env = make_toy(box(3), box(2), max_episode_steps=7)
    env.reset(seed=0)
    assert [env.step(np.zeros(2, np.float32))[3] for _ in range(7)] == [False] * 6 + [True]


def test_make_env_takes_gymnasium_ids_and_modules(tmp_path, monkeypatch):
    assert isinstance(common.make_env("Pendulum-v1").unwrapped, gym.envs.classic_control.PendulumEnv)
    assert common.make_env("laeo/FetchReach-v0").observation_space.shape == (10,)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "toy_module.py").write_text(
        "import gymnasium as gym\nfrom gymnasium.envs.classic_control import PendulumEnv\n"
        "gym.register('Other-v0', PendulumEnv, max_episode_steps=9)\n"
    )
    env = common.make_env("toy_module:Other-v0", render_mode="rgb_array")
    assert env.spec.max_episode_steps == 9 and env.render_mode == "rgb_array"
    del gym.registry["Other-v0"]


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("FetchPsh", "FetchPush"), ("fetchreach", "FetchReach"), ("SawyerDrawerClosed", "SawyerDrawerClose")],
)
def test_an_unknown_task_is_refused_with_the_nearest_name(wrong, near):
    message = refusal(common.make_env, wrong)
    assert f"'{wrong}'" in message and re.search(f"did you mean {near}\\b", message)
    assert all(env_id in message for env_id in common.TASKS)


@pytest.mark.parametrize("wrong", ["Pong", "no_such_module:Pong-v0", "CartPole-v99", "", "a name with spaces"])
def test_an_unknown_environment_without_a_near_name(wrong):
    message = refusal(common.make_env, wrong)
    assert f"'{wrong}'" in message and "FetchReach" in message and "MODULE:ID" in message
    assert not re.search(r"did you mean (Fetch|Sawyer)", message)
    if wrong.startswith("no_such_module"):
        assert "ModuleNotFoundError: No module named 'no_such_module'" in message


def test_no_simulator_is_imported_that_is_not_needed(tmp_path):
    """By common.py, nor by training on an environment and data of the user's own."""
    code = """
import sys
import common
import numpy as np
def simulators():
    return sorted({name.split(".")[0] for name in sys.modules} & {"mujoco", "gymnasium_robotics", "metaworld"})
print(simulators(), sorted({"torch", "tyro", "scipy", "tensorboard", "PIL"} & set(sys.modules)))
rng = np.random.default_rng(0)
observations, actions = rng.normal(size=(4, 11, 3)), rng.uniform(-2, 2, (4, 10, 1))
common.save_dataset(sys.argv[1] + "/data", observations, actions, [])
import bc
from pathlib import Path
args = bc.Args(env_id="Pendulum-v1", dataset=Path(sys.argv[1]) / "data", run_dir=Path(sys.argv[1]) / "run")
args.gradient_steps, args.eval_episodes, args.device = 2, 1, "cpu"
print(simulators(), bc.train(args)["return"] < 0, "PIL" in sys.modules)
common.make_env("FetchReach")
print(simulators())
"""
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    first, *_, trained, made = result.stdout.splitlines()
    assert first == "[] []" and trained == "[] True False" and made == "['gymnasium_robotics', 'mujoco']"


# ------------------------------------------------------------------------------------------ errors, seeds, statistics


def test_a_user_error_is_an_ordinary_exception():
    """One that a process pool hands on, and that `except Exception` catches."""
    assert issubclass(common.UserError, ValueError) and not issubclass(common.UserError, SystemExit)
    again = pickle.loads(pickle.dumps(common.UserError("a mistake.")))
    assert type(again) is common.UserError and str(again) == "a mistake."


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (common.UserError("it is wrong."), "error: it is wrong."),
        (
            OSError(errno.ENOSPC, "No space left on device", "x.npy"),
            "error: [Errno 28] No space left on device: 'x.npy'",
        ),
        (KeyboardInterrupt("interrupted: nothing was written."), "error: interrupted: nothing was written."),
        (KeyboardInterrupt(), "error: interrupted."),
    ],
    ids=repr,
)
def test_user_errors_ends_with_one_sentence(error, line):
    with pytest.raises(SystemExit) as caught, common.user_errors():
        raise error
    assert caught.value.code.startswith(line) and len(caught.value.code.splitlines()) == 1


def test_user_errors_leaves_other_errors_alone():
    for error in (ValueError("a fault of ours"), RuntimeError(), SystemExit(3), ModuleNotFoundError(name="other")):
        with pytest.raises(type(error)) as caught, common.user_errors():
            raise error
        assert caught.value is error
    with common.user_errors():
        pass


def test_user_errors_ends_a_script_with_status_1():
    result = run_python("import common\nwith common.user_errors():\n    common.make_env('FetchPsh')")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: there is no environment 'FetchPsh'") and result.stderr.count("\n") == 1


def test_sigterm_ends_a_script_with_one_sentence_and_status_1():
    code = "import os, signal, time, common\nwith common.user_errors():\n    os.kill(os.getpid(), signal.SIGTERM)\n"
    result = run_python(code + "    time.sleep(60)")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr == "error: interrupted.\n"


def test_first_line_is_the_kind_and_the_first_sentence():
    assert common.first_line(KeyError("a")) == "KeyError: 'a'"
    assert common.first_line(ValueError("one. Two.\nthree")) == "ValueError: one"
    assert common.first_line(RuntimeError("a\nb")) == "RuntimeError: a"
    assert common.first_line(EOFError()) == "EOFError: no message"


def test_versions_are_those_of_the_installed_packages():
    assert common.versions("numpy", "no-such-package", "gymnasium") == {
        "numpy": np.__version__,
        "gymnasium": gym.__version__,
    }


def test_episode_seeds_never_collide():
    streams, seeds, episodes = common.STREAMS, range(15), range(200)
    sample = {common.episode_seed(*key) for key in ((a, b, c) for a in seeds for b in streams for c in episodes)}
    assert len(sample) == len(streams) * len(seeds) * len(episodes)
    assert {"weights", "batches", "metrics", "split", "evaluation", "dataset"} <= set(streams)
    assert len(set(streams)) == len(streams)
    assert all(0 <= seed < 2**64 for seed in sample) and max(sample) > 2**63


def test_episode_seeds_are_the_same_in_every_run():
    """One order of entropy everywhere: (seed, stream, index)."""
    words = np.random.SeedSequence([3, common.STREAMS.index("evaluation"), 5]).generate_state(2)
    assert common.episode_seed(3, "evaluation", 5) == int(words[0]) + (int(words[1]) << 32)
    assert common.seed_sequence(3, "evaluation", 5).entropy == [3, common.STREAMS.index("evaluation"), 5]
    assert common.seed_sequence(3, "weights").entropy == [3, 0, 0]
    assert common.episode_seed(3, "evaluation", 5) != common.episode_seed(5, "evaluation", 3)
    # The start of a run's first evaluation with seed 0: another number would be another benchmark.
    assert common.episode_seed(0, "evaluation", 0) == 4989270442267675056


@pytest.mark.parametrize(
    ("successes", "episodes", "interval"),
    [
        (50, 100, (0.4038, 0.5962)),
        (0, 10, (0.0, 0.2775)),
        (10, 10, (0.7225, 1.0)),
        (1, 1, (0.2065, 1.0)),
        (3, 60, (0.0171, 0.1370)),
    ],
)
def test_the_interval_is_wilsons(successes, episodes, interval):
    flags = np.random.default_rng(0).permutation([True] * successes + [False] * (episodes - successes)).tolist()
    summary = common.summarise({"episode": list(range(episodes)), "success": flags})
    low, high = summary["success_interval"]
    assert (low, high) == pytest.approx(interval, abs=1e-4)
    assert summary == {
        "success_rate": successes / episodes,
        "success_interval": list(binomtest(successes, episodes).proportion_ci(method="wilson")),
    }
    assert 0.0 <= low <= successes / episodes <= high <= 1.0


def test_equal_episodes_count_once_in_the_interval_and_not_in_the_rate():
    """FetchReach's 100 episodes are one: no narrow interval comes of it."""
    once = common.summarise({"episode": [0] * 100, "success": [True] * 100})
    assert once["success_rate"] == 1.0 and once["success_interval"] == pytest.approx([0.2065, 1.0], abs=1e-4)
    summary = common.summarise({"episode": [2, 0, 2, 1, 2, 0], "success": [True, False, True, True, True, False]})
    assert summary["success_rate"] == 4 / 6
    assert summary["success_interval"] == list(binomtest(2, 3).proportion_ci(method="wilson"))


def test_summarise_takes_means_of_rates_and_returns_only():
    lists = {
        "seed": [11, 12, 13, 14],
        "episode": [0, 1, 2, 3],
        "return": [1.0, -2.0, 0.0, 3.0],
        "discounted_return": [0.5, 0.0, 0.0, 0.0],
        "success": [True, False, True, True],
        "final_success": [False, False, False, False],
    }
    assert common.summarise(lists) == {
        "return": 0.5,
        "discounted_return": 0.125,
        "success_rate": 0.75,
        "success_interval": list(binomtest(3, 4).proportion_ci(method="wilson")),
        "final_success_rate": 0.0,
        "final_success_interval": list(binomtest(0, 4).proportion_ci(method="wilson")),
    }
    json.dumps(common.summarise(lists))  # plain numbers


# ----------------------------------------------------------------------------------------------------- writing files


def fill(writer, path: Path, content: str, error: BaseException | None = None) -> None:
    """Write a file, or a directory with one file that is called like its content, and then raise the error."""
    with writer(path) as place:
        if writer is common.write_directory:
            assert place != path and place.parent == path.parent
            (place / content).write_text(content)
        else:
            place.write(content.encode())
        if error is not None:
            raise error


def read(path: Path) -> dict[str, str]:
    """All files under a path with their contents."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {file.name: file.read_text() for file in files}


both_writers = pytest.mark.parametrize("writer", [common.write_directory, common.write_file])


@both_writers
def test_a_written_path_takes_the_place_of_the_old_one_whole(writer, tmp_path):
    target = tmp_path / "new" / "target"
    for content in ("old", "new"):
        fill(writer, target, content)
        assert read(target) == {content if writer is common.write_directory else "target": content}
        assert list(target.parent.iterdir()) == [target]


def test_a_written_directory_can_be_read_by_others(tmp_path):
    fill(common.write_directory, tmp_path / "target", "new")
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o755


@both_writers
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    "error",
    [RuntimeError("a mistake"), KeyboardInterrupt(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SystemExit(3)],
    ids=["exception", "interrupt", "full disk", "exit"],
)
def test_a_failed_block_leaves_nothing_and_keeps_the_old(writer, existing, error, tmp_path):
    target = tmp_path / "target"
    if existing:
        fill(writer, target, "old")
    before = read(tmp_path)
    if isinstance(error, OSError) and writer is common.write_directory:  # a file's block writes to memory
        message = refusal(fill, writer, target, "new", error)
        assert str(target) in message and "No space left on device" in message and "free some space" in message
    else:
        with pytest.raises(type(error)) as caught:
            fill(writer, target, "new", error)
        assert caught.value is error
    assert read(tmp_path) == before
    assert list(tmp_path.iterdir()) == [target] * existing


def test_an_interrupt_while_the_old_directory_is_deleted_leaves_one_whole(tmp_path, monkeypatch):
    """Ctrl-C must not cost both the old dataset and the new one."""
    target = tmp_path / "target"
    old, new = {"a": "old", "b": "old", "c": "old"}, {"new": "new"}
    target.mkdir()
    for name, content in old.items():
        (target / name).write_text(content)
    unlink, calls = os.unlink, []

    def interrupted_unlink(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        unlink(*args, **kwargs)

    monkeypatch.setattr(os, "unlink", interrupted_unlink)
    with pytest.raises(KeyboardInterrupt):
        fill(common.write_directory, target, "new")
    monkeypatch.undo()
    assert read(target) in (old, new)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")], ids=repr)
def test_a_directory_that_cannot_be_renamed_leaves_the_old_one(error, tmp_path, monkeypatch):
    """Between the two renames neither the old dataset nor the new one is in its place."""
    target, rename = tmp_path / "target", Path.rename
    fill(common.write_directory, target, "old")

    def failing_rename(self, other):
        if Path(other) == target and "new" in read(self):
            raise error
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", failing_rename)
    with pytest.raises((KeyboardInterrupt, common.UserError)):
        fill(common.write_directory, target, "new")
    monkeypatch.undo()
    assert read(target) == {"old": "old"} and list(tmp_path.iterdir()) == [target]


@both_writers
def test_an_unwritable_place_is_one_sentence(writer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    target = tmp_path / "file" / "folder" / "target"
    message = refusal(fill, writer, target, "new")
    assert str(target) in message and "Not a directory" in message and "choose a place that can be written" in message
    assert read(tmp_path) == {"file": "in the way"}


WRITER = """
import sys
from pathlib import Path
import common
with common.write_directory(Path(sys.argv[1])) as directory:
    (directory / "theirs").write_text("theirs")
    print(directory, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def other_process(tmp_path):
    """A process that is writing the directory `target`, and the hidden directory beside it where it does."""
    command, pipe = [sys.executable, "-c", WRITER, str(tmp_path / "target")], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_what_a_killed_process_has_left_is_removed(other_process, tmp_path):
    process, leftover = other_process
    assert leftover.parent == tmp_path and leftover.name.startswith(".target.")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (leftover / "theirs").exists()
    fill(common.write_directory, tmp_path / "another", "new")
    assert (leftover / "theirs").exists()  # it belongs to another directory's name
    fill(common.write_directory, tmp_path / "target", "new")
    assert not leftover.exists() and read(tmp_path / "target") == {"new": "new"}
    assert {path.name for path in tmp_path.iterdir()} == {"another", "target"}


def test_what_a_living_process_is_writing_is_left_alone(other_process, tmp_path):
    process, theirs = other_process
    fill(common.write_directory, tmp_path / "target", "new")
    assert read(tmp_path / "target") == {"new": "new"} and (theirs / "theirs").read_text() == "theirs"
    process.communicate("\n")
    assert process.returncode == 0
    assert read(tmp_path / "target") == {"theirs": "theirs"} and list(tmp_path.iterdir()) == [tmp_path / "target"]


@pytest.mark.parametrize("name", ["target", "target [1]*"])
def test_the_leftovers_of_this_name_alone_are_removed(name, tmp_path):
    """The file of a lock says nothing, the lock itself does. A name may have dots, and another name may begin alike."""
    other = f".{name}.more.{'0' * 32}"
    for leftover in (f".{name}.{'0' * 32}", f".{name}.{'1' * 31}a", other):
        (tmp_path / f"{leftover}.tmp").mkdir()
        (tmp_path / f"{leftover}.tmp" / "observations.npy").write_text("half of it")
        (tmp_path / f"{leftover}.lock").touch()
    fill(common.write_directory, tmp_path / name, "new")
    assert {path.name for path in tmp_path.iterdir()} == {name, f"{other}.tmp", f"{other}.lock"}
    assert read(tmp_path / name) == {"new": "new"}


def test_what_was_set_aside_returns_if_the_process_is_killed_before_the_new_one_is_there(tmp_path):
    """Between the two renames neither the old dataset nor the new one is in its place."""
    code = """
import os, signal, sys
from pathlib import Path
import common
rename = Path.rename
Path.rename = lambda self, other: (rename(self, other), os.kill(os.getpid(), signal.SIGKILL))
with common.write_directory(Path(sys.argv[1])) as directory:
    (directory / "theirs").write_text("theirs")
"""
    target = tmp_path / "target"
    fill(common.write_directory, target, "old")
    assert run_python(code, target).returncode == -signal.SIGKILL
    assert not target.exists()
    with pytest.raises(RuntimeError):
        fill(common.write_directory, target, "new", RuntimeError("a mistake"))
    assert list(tmp_path.iterdir()) == [target] and read(target) == {"old": "old"}


def test_a_process_that_is_killed_while_it_removes_the_old_directory_leaves_nothing_for_ever(tmp_path):
    """What it had set aside is removed by the next one, like all else."""
    code = """
import os, shutil, signal, sys
from pathlib import Path
import common
shutil.rmtree = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
with common.write_directory(Path(sys.argv[1])) as directory:
    (directory / "theirs").write_text("theirs")
"""
    target = tmp_path / "target"
    fill(common.write_directory, target, "old")
    assert run_python(code, target).returncode == -signal.SIGKILL
    assert read(target) == {"theirs": "theirs"}
    fill(common.write_directory, target, "new")
    assert list(tmp_path.iterdir()) == [target] and read(target) == {"new": "new"}


def test_a_full_disk_ends_the_program_with_one_line(tmp_path):
    """The limit on the size of a file stands for a full disk: the same call of the system fails."""
    program = """
import resource, sys
from pathlib import Path
import numpy as np
import common
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
with common.user_errors(), common.write_directory(Path(sys.argv[1])) as directory:
    common.create_array(directory / "small.npy", (100,), np.float32)
    print("the small one fits")
    common.create_array(directory / "large.npy", (1 << 20,), np.float32)
    print("the large one fits")
"""
    target = tmp_path / "dataset"
    result = run_python(program, target)
    assert result.returncode == 1 and result.stdout == "the small one fits\n"
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith(f"error: cannot write {target}: File too large; free some space")
    assert list(tmp_path.iterdir()) == []


def test_a_file_on_a_full_disk_is_one_line_and_the_old_one_stays(tmp_path):
    program = """
import resource, sys
from pathlib import Path
import common
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
for size in (1 << 10, 1 << 21):
    with common.user_errors(), common.write_file(Path(sys.argv[1])) as file:
        file.write(bytes(size))
    print(size, "fit", flush=True)
"""
    target = tmp_path / "checkpoint.pt"
    result = run_python(program, target)
    assert result.returncode == 1 and result.stdout == "1024 fit\n"
    assert result.stderr.startswith(f"error: cannot write {target}: File too large; free some space")
    assert list(tmp_path.iterdir()) == [target] and target.read_bytes() == bytes(1024)


def test_create_array_allocates_every_block(tmp_path):
    path = tmp_path / "array.npy"
    array = common.create_array(path, (4096, 100), np.float32)
    status = path.stat()
    assert status.st_size > array.nbytes == 4096 * 100 * 4 and status.st_blocks * 512 >= status.st_size
    assert not array.any()
    array[-1] = 3.0
    array.flush()
    stored = np.load(path)
    assert stored.shape == (4096, 100) and stored.dtype == np.float32
    assert not stored[:-1].any() and (stored[-1] == 3.0).all()


def test_sha256_of_an_empty_file(tmp_path):
    """It cannot be mapped into memory, and --verify must find it."""
    (tmp_path / "empty").touch()
    assert common.sha256(tmp_path / "empty") == hashlib.sha256(b"").hexdigest()


def test_sha256_of_a_file_longer_than_one_block(tmp_path):
    content = os.urandom((1 << 20) + 17)
    (tmp_path / "file").write_bytes(content)
    assert common.sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


# ---------------------------------------------------------------------------------------------------------- datasets


def valid_arrays(episodes: int = 3) -> dict[str, np.ndarray]:
    """Arrays of a FetchReach dataset: four steps at most, then three and one."""
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(episodes, 5, 10)).astype(np.float32)
    actions = rng.uniform(-1, 1, (episodes, 4, 4)).astype(np.float32)
    lengths = np.resize(np.array([4, 3, 1], np.int32), episodes)
    for episode, length in enumerate(lengths):
        observations[episode, length + 1 :] = 0.0
        actions[episode, length:] = 0.0
    examples = rng.normal(size=(8, 10)).astype(np.float32)
    successes = np.zeros((episodes, 5), np.bool_)
    terminals = np.resize(np.array([False, True, False]), episodes)
    arrays = dict(observations=observations, actions=actions, lengths=lengths, success_examples=examples)
    return arrays | dict(terminals=terminals, successes=successes)


def write_dataset(path: Path, metadata: dict | None = None, **changes) -> Path:
    """Write a valid dataset but for the changes to its metadata and to its arrays (raw bytes, or None for no file).

    The checksums are those of the files as they are.
    """
    path.mkdir(parents=True)
    checksums = {}
    for name, array in (valid_arrays() | changes).items():
        file = path / f"{name}.npy"
        if isinstance(array, bytes):
            file.write_bytes(array)
        elif array is not None:
            np.save(file, array)
        if array is not None:
            checksums[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    content = {
        "env_id": "FetchReach",
        "quality": "medium",
        "versions": common.versions("mujoco", "gymnasium", "gymnasium-robotics", "metaworld"),
        "sha256": checksums,
    }
    (path / "metadata.json").write_text(json.dumps(content | (metadata or {})))
    return path


def load(path: Path, env_id: str | None = "FetchReach", **kwargs) -> common.Dataset:
    return common.load_dataset(path, env_id, **kwargs)


def test_load_dataset_returns_exactly_the_arrays(tmp_path):
    """Episodes of different lengths included."""
    data, arrays = load(write_dataset(tmp_path / "data")), valid_arrays()
    for name in ("observations", "actions", "lengths", "success_examples", "terminals"):
        loaded = getattr(data, name)
        assert loaded.dtype == arrays[name].dtype and loaded.shape == arrays[name].shape
        assert loaded.tobytes() == arrays[name].tobytes()
    assert data.lengths.tolist() == [4, 3, 1] and data.terminals.tolist() == [False, True, False]
    assert data.action_bounds.dtype == np.float32 and data.action_bounds.tolist() == [[-1.0] * 4, [1.0] * 4]


def test_what_is_done_to_a_loaded_array_stays_in_memory(tmp_path):
    path = write_dataset(tmp_path / "data")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    data = load(path)
    for array in (data.observations, data.actions):
        assert isinstance(array, np.memmap)
        array[:] = 7.0
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_no_reward_and_no_success_flag_reaches_a_method(tmp_path):
    assert common.Dataset._fields == (
        "observations",
        "actions",
        "lengths",
        "success_examples",
        "terminals",
        "action_bounds",
        "checksum",
    )
    whole, without, garbage = (
        load(write_dataset(tmp_path / name, **changes))
        for name, changes in (
            ("whole", {}),
            ("without", {"successes": None}),
            ("garbage", {"successes": b"garbage", "rewards": b"garbage"}),
        )
    )
    for other in (without, garbage):
        assert all(np.array_equal(a, b) for a, b in zip(whole, other))


def test_the_checksum_tells_datasets_apart(tmp_path):
    base = load(write_dataset(tmp_path / "base")).checksum
    assert re.fullmatch("[0-9a-f]{64}", base)
    assert load(write_dataset(tmp_path / "same", metadata={"versions": {}}), env_id=None).checksum == base
    actions, lengths = with_value("actions", (0, 0, 0), 0.5), np.array([4, 2, 1], np.int32)
    others = [
        load(write_dataset(tmp_path / "a", actions=actions)),
        load(write_dataset(tmp_path / "l", lengths=lengths)),
    ]
    assert len({base, *(other.checksum for other in others)}) == 3


def with_value(name: str, index: tuple, value: float, **kwargs) -> np.ndarray:
    array = valid_arrays(**kwargs)[name]
    array[index] = value
    return array


def stored(array: np.ndarray) -> bytes:
    """The bytes of the array's file."""
    header = str({"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape})
    return raw_file(header) + array.tobytes()


def raw_file(header: str) -> bytes:
    """The bytes of a `.npy` file up to its data."""
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + header.ljust(117).encode() + b"\n"


BAD_ARRAYS = {
    "missing observations": ("observations", None, "No such file"),
    "missing actions": ("actions", None, "No such file"),
    "missing lengths": ("lengths", None, "No such file"),
    "empty file": ("lengths", b"", "damaged"),
    "no array": ("actions", b"this is text", "damaged"),
    "truncated data": ("observations", stored(valid_arrays()["observations"])[:-4], "damaged"),
    "truncated header": ("actions", stored(valid_arrays()["actions"])[:50], "damaged"),
    "damaged header": ("lengths", raw_file("{'descr': '<i4', 'shape': (3,"), "damaged"),
    "impossible shape": (
        "lengths",
        raw_file("{'descr': '<i4', 'fortran_order': False, 'shape': (99999999999999999999,), }"),
        "damaged",
    ),
    "long header": ("lengths", b"\x93NUMPY\x02\x00" + (20_000).to_bytes(4, "little") + b" " * 20_000, "damaged"),
    "zip archive": ("lengths", b"PK\x03\x04 and no archive", "damaged"),
    "NaN observation": ("observations", with_value("observations", (2, 1, 9), np.nan), "not finite, at [2, 1, 9]"),
    "NaN in a padded row": ("observations", with_value("observations", (2, 4, 0), np.nan), "not finite, at [2, 4, 0]"),
    "NaN action": ("actions", with_value("actions", (0, 0, 0), np.nan), "not finite, at [0, 0, 0]"),
    "infinite action": ("actions", with_value("actions", (1, 2, 3), -np.inf), "not finite, at [1, 2, 3]"),
    "infinite example": ("success_examples", with_value("success_examples", (7, 0), np.inf), "not finite, at [7, 0]"),
    "observations one step short": ("observations", valid_arrays()["observations"][:, :-1], "needs (3, 5, 10)"),
    "observations of another size": ("observations", np.zeros((3, 5, 25), np.float32), "needs (3, 5, 10)"),
    "observations of too few episodes": ("observations", valid_arrays()["observations"][:2], "needs (3, 5, 10)"),
    "observations without axes": ("observations", np.float32(0), "observations"),
    "actions of another size": ("actions", np.zeros((3, 4, 3), np.float32), "needs (3, 4, 4)"),
    "actions with one axis": ("actions", np.zeros(12, np.float32), "actions"),
    "lengths of too few episodes": ("lengths", np.ones(2, np.int32), "shape"),
    "lengths with two axes": ("lengths", np.ones((3, 1), np.int32), "shape (3, 1)"),
    "terminals of too few episodes": ("terminals", np.zeros(2, bool), "needs (3,)"),
    "terminals of each step": ("terminals", np.zeros((3, 4), bool), "needs (3,)"),
    "examples of another size": ("success_examples", np.zeros((8, 9), np.float32), "needs (8, 10)"),
    "examples without axes": ("success_examples", np.float32(0), "success_examples"),
    "float64 observations": ("observations", valid_arrays()["observations"].astype(np.float64), "<f8"),
    "int8 actions": ("actions", np.zeros((3, 4, 4), np.int8), "|i1"),
    "int64 lengths": ("lengths", np.array([4, 3, 1]), "<i8"),
    "bool examples": ("success_examples", np.zeros((8, 10), np.bool_), "|b1"),
    "uint8 terminals": ("terminals", np.zeros(3, np.uint8), "|u1"),
    "big-endian actions": ("actions", valid_arrays()["actions"].astype(">f4"), ">f4"),
    "length 0": ("lengths", np.array([4, 0, 1], np.int32), "from 1 to 4"),
    "negative length": ("lengths", np.array([4, -1, 1], np.int32), "from 1 to 4"),
    "length too large": ("lengths", np.array([4, 5, 1], np.int32), "from 1 to 4"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_a_bad_array_is_refused_by_name(case, tmp_path):
    name, array, problem = BAD_ARRAYS[case]
    message = refusal(load, write_dataset(tmp_path / "data", **{name: array}))
    if case == "lengths of too few episodes":  # it is three against two, and the others are two of the three
        name = "observations"
    assert f"{name}.npy" in message and problem in message


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 10, 10), (3, 5, 2, 10, 10, 3), (3, 5, 4, 10, 10), (3, 5, 0)])
def test_observations_that_no_method_takes_are_refused_without_an_environment(shape, tmp_path):
    """They are vectors, or images of 8 x 8 or more with 1 to 12 channels in the last axis."""
    observations = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    path = write_dataset(tmp_path / "data", observations=observations, success_examples=None)
    assert f"observations.npy has shape {shape}" in refusal(load, path, env_id=None)


def test_a_file_made_by_hand_is_read_if_it_is_whole(tmp_path):
    """So that the damaged files above are refused for the damage alone."""
    actions = valid_arrays()["actions"]
    data = load(write_dataset(tmp_path / "data", actions=stored(actions)))
    assert data.actions.tobytes() == actions.tobytes()


def test_a_value_that_is_not_finite_is_found_in_any_row(tmp_path):
    changes = valid_arrays(episodes=1030) | {
        "observations": with_value("observations", (1029, 0, 0), np.nan, episodes=1030)
    }
    message = refusal(load, write_dataset(tmp_path / "data", **changes))
    assert "observations.npy" in message and "not finite, at [1029, 0, 0]" in message


def test_examples_and_terminals_are_optional(tmp_path):
    data = load(write_dataset(tmp_path / "data", success_examples=None, terminals=None))
    assert data.success_examples.shape == (0, 10) and data.success_examples.dtype == np.float32
    assert data.terminals.tolist() == [False] * 3


@pytest.mark.parametrize("name", ["rewards", "successes"])
def test_what_some_methods_read_is_verified_too(name, reach_dataset, tmp_path):
    """Rewards and success flags, if there are any; neither is needed."""
    path = shutil.copytree(reach_dataset, tmp_path / "data")
    metadata = json.loads((path / "metadata.json").read_text())
    np.save(path / "rewards.npy", np.zeros((40, 50), np.float32))
    metadata["sha256"]["rewards"] = common.sha256(path / "rewards.npy")
    (path / "metadata.json").write_text(json.dumps(metadata))
    load(path, verify=True)
    array = np.load(path / f"{name}.npy")
    array[3, 4] = 1 - array[3, 4]
    np.save(path / f"{name}.npy", array)
    assert f"has {metadata['sha256'][name]} for {name}," in refusal(load, path, verify=True)
    (path / f"{name}.npy").unlink()
    load(path, verify=True)


@pytest.mark.parametrize("name", ["observations", "actions", "lengths", "success_examples", "terminals"])
def test_one_wrong_bit_is_found_by_the_checksum(name, tmp_path):
    path = write_dataset(tmp_path / "data")
    right = hashlib.sha256((path / f"{name}.npy").read_bytes()).hexdigest()
    load(path, verify=True)
    content = bytearray((path / f"{name}.npy").read_bytes())
    content[-4 if name != "terminals" else -1] ^= 1
    (path / f"{name}.npy").write_bytes(content)
    message = refusal(load, path, verify=True)
    assert f"has {right} for {name}," in message and "copy it again" in message
    assert hashlib.sha256(content).hexdigest() in message
    if name != "lengths":  # where it is out of range
        load(path)  # without the flag files are not read for it


def test_a_checksum_that_is_missing_is_named(tmp_path):
    path = write_dataset(tmp_path / "data", metadata={"sha256": {}})
    load(path)
    assert "has no checksum for observations," in refusal(load, path, verify=True)
    checksums = {name: common.sha256(path / f"{name}.npy") for name in ("observations", "actions", "success_examples")}
    metadata = json.loads((path / "metadata.json").read_text()) | {"sha256": checksums}
    (path / "metadata.json").write_text(json.dumps(metadata))
    assert "has no checksum for lengths," in refusal(load, path, verify=True)


def test_an_array_of_objects_is_refused_and_runs_no_code(tmp_path):
    touched = tmp_path / "touched"
    path = write_dataset(tmp_path / "data", observations=np.array([Trap(touched)], dtype=object))
    assert "observations.npy" in refusal(load, path)
    (path / "observations.npy").write_bytes(pickle.dumps(Trap(touched)))
    assert "observations.npy" in refusal(load, path)
    assert not touched.exists()
    np.load(path / "observations.npy", allow_pickle=True)
    assert touched.exists()  # the trap is a real one


def test_a_dataset_that_is_replaced_while_it_is_loaded_is_refused(tmp_path, monkeypatch):
    """Else the arrays could be of two datasets."""
    original = common.load_array

    def load_and_replace(path: Path, types: str) -> np.ndarray:
        array = original(path, types)
        if path.name == "observations.npy":
            shutil.rmtree(tmp_path / "data")
            common.save_dataset(tmp_path / "data", *some_episodes())
        return array

    observations, actions, examples = some_episodes()
    common.save_dataset(tmp_path / "data", observations, actions, examples + 1)
    load(tmp_path / "data", None)
    monkeypatch.setattr(common, "load_array", load_and_replace)
    assert "was replaced while it was read" in refusal(load, tmp_path / "data", None)
    load(tmp_path / "data", None)  # the same dataset again is no other one


@pytest.mark.parametrize("episodes", [0, 1])
def test_a_dataset_needs_an_episode_to_train_on_and_one_to_hold_out(episodes, tmp_path):
    names = ("observations", "actions", "lengths", "successes", "terminals")
    arrays = {name: valid_arrays()[name][:episodes] for name in names}
    message = refusal(load, write_dataset(tmp_path / "data", **arrays))
    assert str(tmp_path / "data") in message and "two or more episodes" in message


def test_a_dataset_of_another_task_is_refused(tmp_path):
    message = refusal(load, write_dataset(tmp_path / "data"), env_id="FetchPush")
    assert "is a dataset of FetchReach, not of FetchPush" in message
    load(write_dataset(tmp_path / "other", metadata={"env_id": "FetchPush"}), env_id=None)
    load(write_dataset(tmp_path / "none", metadata={"env_id": None}))


def test_a_dataset_of_the_same_environment_in_another_module_is_taken(tmp_path):
    observations = np.random.default_rng(0).normal(size=(3, 5, 3))
    common.save_dataset(tmp_path / "data", observations, np.zeros((3, 4, 1)), observations[0])
    metadata = json.loads((tmp_path / "data" / "metadata.json").read_text()) | {"env_id": "my_module:Pendulum-v1"}
    (tmp_path / "data" / "metadata.json").write_text(json.dumps(metadata))
    assert load(tmp_path / "data", "Pendulum-v1").observations.shape == (3, 5, 3)
    assert "is a dataset of my_module:Pendulum-v1" in refusal(load, tmp_path / "data", "MountainCarContinuous-v0")


def test_a_dataset_for_an_unknown_task_is_refused(tmp_path):
    path = write_dataset(tmp_path / "data", metadata={"env_id": "FetchPsh"})
    assert "did you mean FetchPush" in refusal(load, path, env_id="FetchPsh")


def test_foreign_data_need_no_metadata(tmp_path):
    path = write_dataset(tmp_path / "data")
    expected = load(path)
    for content in (None, "{}", '{"robot": "mine", "env_id": "FetchReach"}'):
        (path / "metadata.json").unlink(missing_ok=True)
        if content:
            (path / "metadata.json").write_text(content)
        for data in (load(path), load(path, env_id=None)):
            assert all(np.array_equal(a, b) for a, b in zip(data[:5], expected[:5])) and data[6] == expected[6]
    assert common.read_metadata(tmp_path) == {"versions": {}, "sha256": {}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"null",
        b"[]",
        b"3",
        b'"text"',
        b"[" * 100_000,
        b'{"versions": 3}',
        b'{"sha256": []}',
    ],
    ids=lambda content: repr(content[:20]),
)
def test_invalid_metadata_is_refused(content, tmp_path):
    path = write_dataset(tmp_path / "data")
    (path / "metadata.json").write_bytes(content)
    assert f"{path / 'metadata.json'} cannot be read" in refusal(load, path)


@pytest.mark.parametrize("name", ["versions", "sha256"])
def test_metadata_with_an_empty_value_is_refused(name, tmp_path):
    assert str(tmp_path / "data") in refusal(load, write_dataset(tmp_path / "data", metadata={name: None}))


@pytest.mark.parametrize(
    "bounds", [[1], [[-1] * 4], [[-1] * 4, [1] * 3], [[-1] * 3, [1] * 3], "wide", [[-1] * 4, None]]
)
def test_action_bounds_in_the_metadata_that_do_not_fit_are_refused(bounds, tmp_path):
    path = write_dataset(tmp_path / "data", metadata={"action_bounds": bounds})
    assert str(path) in refusal(load, path, env_id=None)


@pytest.mark.parametrize("package", ["mujoco", "gymnasium-robotics"])
def test_a_dataset_of_another_simulator_is_refused_unless_allowed(package, tmp_path):
    versions = common.versions("mujoco", "gymnasium-robotics") | {package: "0.0.1"}
    path = write_dataset(tmp_path / "data", metadata={"versions": versions, "quality": "hard"})
    message = refusal(load, path)
    assert "0.0.1" in message and common.versions(package)[package] in message
    assert "python collect_data.py --env-id FetchReach --quality hard" in message
    assert f"--output {path} --overwrite" in message and "--allow-version-mismatch" in message
    assert load(path, allow_version_mismatch=True).lengths.tolist() == [4, 3, 1]
    assert load(path, env_id=None).lengths.tolist() == [4, 3, 1]


def test_versions_of_what_does_not_move_the_robot_may_differ(tmp_path):
    versions = common.versions("mujoco", "gymnasium-robotics") | {"metaworld": "0.0.1", "gymnasium": "0.0.1"}
    assert load(write_dataset(tmp_path / "data", metadata={"versions": versions})).lengths.tolist() == [4, 3, 1]


# ------------------------------------------------------------------------------------------------ actions and bounds


@pytest.mark.parametrize(
    ("index", "value"), [((1, 2, 3), 1.5), ((0, 0, 0), -1.001), ((2, 0, 1), 2.0), ((0, 3, 2), 1.001)]
)
def test_an_action_outside_of_the_bounds_is_named_by_its_row(index, value, tmp_path):
    """Silently accepted, actions of another scale would train a meaningless policy."""
    actions = with_value("actions", index, value)
    message = refusal(load, write_dataset(tmp_path / "data", actions=actions))
    assert f"the action at {list(index[:2])} is {actions[index[:2]].tolist()}, outside" in message
    assert f"{[-1.0] * 4} to {[1.0] * 4}" in message and "actions.npy" in message


def test_actions_that_reach_twice_the_bounds_are_refused(tmp_path):
    actions = np.random.default_rng(0).uniform(-2, 2, (40, 50, 4)).astype(np.float32)
    observations = np.concatenate([np.zeros((40, 1, 10)), actions.repeat(3, -1)[..., :10].cumsum(1)], 1)
    changes = {"observations": observations.astype(np.float32), "actions": actions, "successes": None}
    changes |= {"lengths": np.full(40, 50, np.int32), "terminals": None}
    message = refusal(load, write_dataset(tmp_path / "data", **changes))
    assert "the action at [0, 0]" in message and "the environment's own actions" in message


def test_padding_and_rounding_are_not_outside(tmp_path):
    actions = with_value("actions", (1, 3), 100.0)  # behind the end of an episode of three steps
    actions[0, 0] = [1 + 1e-6, -1 - 1e-6, 1, -1]
    assert load(write_dataset(tmp_path / "data", actions=actions)).actions[0, 0, 0] > 1


def test_bounds_without_an_environment_are_those_in_the_metadata(tmp_path):
    bounds = [[-2.0, -1.0, -1.0, 0.0], [2.0, 1.0, 1.0, 1.0]]
    inside = np.abs(valid_arrays()["actions"])
    path = write_dataset(tmp_path / "data", actions=inside, metadata={"action_bounds": bounds})
    assert load(path, env_id=None).action_bounds.tolist() == bounds
    assert load(path).action_bounds.tolist() == [[-1.0] * 4, [1.0] * 4]  # the environment's, if there is one
    inside[1, 1, 3] = -0.25
    message = refusal(
        load, write_dataset(tmp_path / "o", actions=inside, metadata={"action_bounds": bounds}), env_id=None
    )
    assert "the action at [1, 1] is" in message and "[2.0, 1.0, 1.0, 1.0]" in message


def test_bounds_without_environment_and_metadata_are_those_of_the_data(tmp_path):
    """Padding is not data. A number that never moves has equal bounds."""
    actions = np.random.default_rng(0).uniform(3, 5, (3, 4, 4)).astype(np.float32)
    actions[..., 2] = -7.0
    for episode, length in enumerate((4, 3, 1)):
        actions[episode, length:] = 0.0
    data = load(write_dataset(tmp_path / "data", actions=actions), env_id=None)
    real = np.concatenate([actions[0], actions[1, :3], actions[2, :1]])
    assert data.action_bounds.dtype == np.float32
    assert data.action_bounds.tolist() == [real.min(0).tolist(), real.max(0).tolist()]
    assert data.action_bounds[:, 2].tolist() == [-7.0, -7.0] and (data.action_bounds[0, :2] >= 3).all()


def test_bounds_of_an_environment_of_ones_own(tmp_path):
    """Pendulum's torque is in [-2, 2]."""
    observations, actions = np.random.default_rng(0).normal(size=(3, 5, 3)), np.zeros((3, 4, 1))
    actions[1, 2] = 1.75
    common.save_dataset(tmp_path / "data", observations, actions, observations[0])
    assert load(tmp_path / "data", "Pendulum-v1").action_bounds.tolist() == [[-2.0], [2.0]]
    actions[1, 2] = 2.25
    common.save_dataset(tmp_path / "outside", observations, actions, observations[0])
    message = refusal(load, tmp_path / "outside", "Pendulum-v1")
    assert "the action at [1, 2] is [2.25]" in message and "[-2.0] to [2.0]" in message
    common.save_dataset(tmp_path / "other", observations[..., :2], actions, observations[0, :, :2])
    message = refusal(load, tmp_path / "other", "Pendulum-v1")
    assert "observations.npy has shape (3, 5, 2); Pendulum-v1 needs (3, 5, 3)" in message


# ------------------------------------------------------------------------------------------------------- save_dataset

LENGTHS = (4, 3, 1)


def some_episodes(dtype=np.float32, shape: tuple = (10,), width: int = 4) -> tuple[list, list, np.ndarray]:
    """Observations, actions and examples of three episodes. All values are exact in every type."""
    rng = np.random.default_rng(0)
    observations = [rng.integers(0, 100, (n + 1, *shape)).astype(dtype) for n in LENGTHS]
    actions = [(rng.integers(-8, 9, (n, width)) / 8).astype(np.float32) for n in LENGTHS]
    return observations, actions, rng.integers(0, 100, (6, *shape)).astype(dtype)


def hidden(path: Path) -> list[Path]:
    return list(path.iterdir())


def test_what_is_saved_is_loaded_to_the_bit(tmp_path):
    rng = np.random.default_rng(0)
    observations = [rng.normal(size=(n + 1, 10)).astype(np.float32) for n in LENGTHS]
    actions = [rng.uniform(-1, 1, (n, 4)).astype(np.float32) for n in LENGTHS]
    rewards = [rng.normal(size=n).astype(np.float32) for n in LENGTHS]
    examples = rng.normal(size=(6, 10)).astype(np.float32)
    path = tmp_path / "deep" / "data"
    common.save_dataset(path, observations, actions, examples, [False, True, True], rewards)
    for data in (load(path, verify=True), load(str(path) and path, env_id=None, verify=True)):
        assert data.lengths.tolist() == list(LENGTHS) and data.terminals.tolist() == [False, True, True]
        assert data.success_examples.tobytes() == examples.tobytes()
        for e, n in enumerate(LENGTHS):
            assert data.observations[e, : n + 1].tobytes() == observations[e].tobytes()
            assert data.actions[e, :n].tobytes() == actions[e].tobytes()
            assert not data.observations[e, n + 1 :].any() and not data.actions[e, n:].any()
    stored_rewards = np.load(path / "rewards.npy")
    assert stored_rewards.shape == (3, 4) and stored_rewards.dtype == np.float32
    for e, n in enumerate(LENGTHS):
        assert stored_rewards[e, :n].tobytes() == rewards[e].tobytes() and not stored_rewards[e, n:].any()
    metadata = json.loads((path / "metadata.json").read_text())
    assert metadata["num_episodes"] == 3 and metadata["versions"]["numpy"] == np.__version__
    names = {"observations", "actions", "lengths", "success_examples", "terminals", "rewards"}
    assert metadata["sha256"] == {name: common.sha256(path / f"{name}.npy") for name in names}
    assert {file.name for file in path.iterdir()} == {f"{name}.npy" for name in names} | {"metadata.json"}
    assert hidden(path.parent) == [path]


def test_terminals_and_rewards_are_optional(tmp_path):
    common.save_dataset(tmp_path / "data", *some_episodes())
    assert not {"terminals.npy", "rewards.npy", "successes.npy"} & {file.name for file in (tmp_path / "data").iterdir()}
    assert load(tmp_path / "data").terminals.tolist() == [False] * 3


@pytest.mark.parametrize("dtype", [*np.typecodes["AllInteger"], "e", "f", "d", "g", ">f4", ">i2"])
def test_all_integer_and_float_types_become_float32(dtype, tmp_path):
    observations, actions, examples = some_episodes(dtype)
    actions = [(8 * a).astype("i1").astype(dtype) if np.dtype(dtype).kind == "i" else abs(a) for a in actions]
    common.save_dataset(tmp_path / "data", observations, actions, examples)
    data = load(tmp_path / "data", env_id=None)
    assert data.observations.dtype == data.actions.dtype == data.success_examples.dtype == np.float32
    for e, n in enumerate(LENGTHS):
        assert data.observations[e, : n + 1].tolist() == observations[e].tolist()
        assert data.actions[e, :n].tolist() == actions[e].tolist()
    assert data.success_examples.tolist() == examples.tolist()


def test_bool_numbers_and_nested_lists_are_taken(tmp_path):
    observations, actions, examples = some_episodes()
    common.save_dataset(tmp_path / "bool", [o > 50 for o in observations], actions, examples > 50)
    data = load(tmp_path / "bool", env_id=None)
    assert (
        data.observations.dtype == np.float32 and data.observations[1, :4].tolist() == (observations[1] > 50).tolist()
    )
    lists = ([array.tolist() for array in arrays] for arrays in (observations, actions))
    common.save_dataset(str(tmp_path / "lists"), *lists, examples.tolist())
    assert load(tmp_path / "lists", env_id=None).observations[2, 1].tolist() == observations[2][1].tolist()


def test_episodes_of_equal_length_may_be_one_array(tmp_path):
    rng = np.random.default_rng(0)
    observations, actions = rng.normal(size=(5, 4, 10)).astype(np.float32), rng.uniform(-1, 1, (5, 3, 4))
    common.save_dataset(
        tmp_path / "data", observations, actions, observations[:, -1], np.ones(5, bool), np.ones((5, 3))
    )
    data = load(tmp_path / "data")
    assert data.observations.tobytes() == observations.tobytes() and data.lengths.tolist() == [3] * 5


@pytest.mark.parametrize("dtype", np.typecodes["AllInteger"])
def test_integer_images_become_uint8(dtype, tmp_path):
    observations, actions, examples = some_episodes(dtype, (9, 8, 3))
    top = 127 if np.dtype(dtype) == np.int8 else 255
    observations[1][2, 3, 4, 1], observations[1][2, 3, 4, 2] = 0, top
    common.save_dataset(tmp_path / "data", observations, actions, examples)
    data = load(tmp_path / "data", env_id=None, verify=True)
    assert data.observations.dtype == data.success_examples.dtype == np.uint8
    for e, n in enumerate(LENGTHS):
        assert data.observations[e, : n + 1].tolist() == observations[e].tolist()
    assert (
        data.observations[1, 2, 3, 4, 1:].tolist() == [0, top] and data.success_examples.tolist() == examples.tolist()
    )


@pytest.mark.parametrize("value", [300, 256, -1, 2**40])
def test_integer_images_outside_of_0_to_255_are_refused(value, tmp_path):
    observations, actions, examples = some_episodes(np.int64, (9, 8, 3))
    observations[1][2, 3, 4, 0] = value
    message = refusal(common.save_dataset, tmp_path / "data", observations, actions, examples)
    assert "observations of episode 1: the value at [2, 3, 4, 0] is outside of 0 to 255" in message
    observations[1][2, 3, 4, 0] = 0
    examples[5, 8, 7, 2] = value
    message = refusal(common.save_dataset, tmp_path / "data", observations, actions, examples)
    assert "success_examples: the value at [5, 8, 7, 2] is outside of 0 to 255" in message
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_images_of_floats_stay_float32(dtype, tmp_path):
    observations, actions, examples = some_episodes(dtype, (9, 8, 3))
    observations, examples = [o / dtype(128) for o in observations], examples / dtype(128)
    common.save_dataset(tmp_path / "data", observations, actions, examples)
    data = load(tmp_path / "data", env_id=None)
    assert data.observations.dtype == data.success_examples.dtype == np.float32
    for e, n in enumerate(LENGTHS):
        assert data.observations[e, : n + 1].tolist() == observations[e].tolist()
    assert data.success_examples.tolist() == examples.tolist()


def test_one_episode_of_float_images_makes_all_float32(tmp_path):
    observations, actions, examples = some_episodes(np.uint8, (9, 8, 3))
    observations[2] = observations[2].astype(np.float64) + 0.5
    common.save_dataset(tmp_path / "data", observations, actions, examples)
    data = load(tmp_path / "data", env_id=None)
    assert data.observations.dtype == data.success_examples.dtype == np.float32
    assert data.observations[2, 0].tolist() == observations[2][0].tolist()


def test_success_examples_may_be_empty(tmp_path):
    for name, shape in (("states", (10,)), ("images", (9, 8, 3))):
        observations, actions, _ = some_episodes(np.uint8, shape)
        common.save_dataset(tmp_path / name, observations, actions, [])
        data = load(tmp_path / name, env_id=None)
        assert data.success_examples.shape == (0, *shape) and data.success_examples.dtype == data.observations.dtype


def broken(part: str, episode: int | None, change) -> dict:
    """The arguments of save_dataset, with one array replaced by what `change` makes of it."""
    observations, actions, examples = some_episodes(np.float64)
    parts = {"observations": observations, "actions": actions, "success_examples": examples}
    parts |= {"terminals": [False] * 3, "rewards": [np.zeros(n) for n in LENGTHS]}
    if episode is None:
        parts[part] = change(parts[part])
    else:
        parts[part][episode] = change(parts[part][episode])
    return parts


def put(index: tuple, value: float):
    def change(array):
        array = array.copy()
        array[index] = value
        return array

    return change


WRONG_EPISODES = {
    "NaN": (
        broken("observations", 1, put((2, 3), np.nan)),
        "observations of episode 1: the value at [2, 3] is not fin",
    ),
    "infinity": (broken("actions", 2, put((0, 1), -np.inf)), "actions of episode 2: the value at [0, 1] is not finite"),
    "NaN reward": (broken("rewards", 0, put((3,), np.nan)), "rewards of episode 0: the value at [3] is not finite"),
    "NaN example": (
        broken("success_examples", None, put((4, 9), np.nan)),
        "success_examples: the value at [4, 9] is not",
    ),
    "overflow": (
        broken("observations", 0, put((0, 0), 1e39)),
        "observations of episode 0: the value at [0, 0] is not fin",
    ),
    "one state short": (broken("observations", 1, lambda o: o[:-1]), "observations of episode 1: shape (3, 10)"),
    "one action short": (broken("actions", 1, lambda a: a[:-1]), "observations of episode 1: shape (4, 10)"),
    "another size": (broken("observations", 2, lambda o: o[:, :9]), "observations of episode 2: shape (2, 9)"),
    "another action size": (broken("actions", 2, lambda a: a[:, :3]), "actions of episode 2: shape (1, 3)"),
    "rewards of states": (broken("rewards", 1, lambda r: np.zeros(4)), "rewards of episode 1: shape (4,)"),
    "rewards with an axis": (broken("rewards", 1, lambda r: r[:, None]), "rewards of episode 1: shape (3, 1)"),
    "other examples": (broken("success_examples", None, lambda x: x[:, :9]), "success_examples: shape (6, 9)"),
    "one example": (broken("success_examples", None, lambda x: x[0]), "success_examples: shape (10,)"),
    "text": (
        broken("observations", 1, lambda o: o.astype(str)),
        "observations of episode 1: shape (4, 10) and dtype <U",
    ),
    "complex": (broken("actions", 0, lambda a: a + 1j), "actions of episode 0: shape (4, 4) and dtype complex"),
    "objects": (
        broken("actions", 0, lambda a: a.astype(object)),
        "actions of episode 0: shape (4, 4) and dtype object",
    ),
    "no episode": ({name: [] for name in ("observations", "actions", "success_examples")}, "two or more episodes"),
    "too few": (broken("observations", None, lambda o: o[:2]), "as many of everything else as of actions"),
    "too few flags": (broken("terminals", None, lambda t: t[:2]), "as many of everything else as of actions"),
    "too many rewards": (broken("rewards", None, lambda r: r * 2), "as many of everything else as of actions"),
    "ragged": (broken("observations", 1, lambda o: [[1.0, 2.0], [3.0], [4.0], [5.0]]), "observations of episode 1"),
    "ragged first": (broken("observations", 0, lambda o: [[1.0, 2.0], [3.0]]), "observations of episode 0"),
    "numbers for actions": (broken("actions", 1, lambda a: 3.0), "actions of episode 1"),
    "no action": (broken("actions", 1, lambda a: a[:0]), "actions of episode 1: shape (0, 4)"),
    "actions without an axis": (broken("actions", None, lambda a: [x[:, 0] for x in a]), "actions of episode 0"),
    "states without an axis": (
        broken("observations", None, lambda o: [x[:, 0] for x in o]) | {"success_examples": []},
        "observations",
    ),
    "one episode": ({name: x[:1] for name, x in broken("actions", None, list).items()}, "two or more episodes"),
    "no steps": (
        broken("observations", 1, lambda o: o[:1])
        | {"actions": [np.zeros((n, 4)) for n in (4, 0, 1)], "rewards": None},
        "actions of episode 1: shape (0, 4)",
    ),
    "flags of steps": (broken("terminals", None, lambda t: [[False] * n for n in LENGTHS]), "terminals"),
    "flags of equal steps": (broken("terminals", None, lambda t: [[False] * 4] * 3), "terminals"),
    "flags that are no flags": (broken("terminals", None, lambda t: ["True", "False", "False"]), "terminals"),
}


@pytest.mark.parametrize("case", WRONG_EPISODES)
def test_wrong_episodes_are_refused_by_number_and_leave_nothing(case, tmp_path):
    arguments, problem = WRONG_EPISODES[case]
    message = refusal(common.save_dataset, tmp_path / "data", **arguments)
    assert problem in message and hidden(tmp_path) == []


def test_what_is_too_small_or_too_precise_for_float32_is_rounded(tmp_path):
    observations, actions, examples = some_episodes(np.float64)
    observations[0][0, :2] = 1e-60, 1 / 3
    common.save_dataset(tmp_path / "data", observations, actions, examples)
    assert load(tmp_path / "data", None).observations[0, 0, :2].tolist() == [0.0, float(np.float32(1 / 3))]


def test_save_dataset_replaces_nothing(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").touch()
    message = refusal(common.save_dataset, tmp_path / "data", *some_episodes())
    assert f"{tmp_path / 'data'} exists" in message and "choose another path" in message
    assert hidden(tmp_path / "data") == [tmp_path / "data" / "mine"] and hidden(tmp_path) == [tmp_path / "data"]


def test_save_dataset_is_whole_or_absent_when_it_is_interrupted(tmp_path, monkeypatch):
    save, names = np.save, []

    def interrupted(path, array):
        names.append(Path(path).name)
        if len(names) == 2:
            raise KeyboardInterrupt
        save(path, array)

    monkeypatch.setattr(np, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        common.save_dataset(tmp_path / "data", *some_episodes())
    assert len(names) == 2 and hidden(tmp_path) == []


# --------------------------------------------------------------------------------- finding, splitting and transitions


def test_find_dataset_refuses_unknown_names_and_missing_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "did you mean FetchPush" in refusal(common.find_dataset, "FetchPsh", "medium")
    assert "datasets/Pendulum-v1-medium" in refusal(common.find_dataset, "Pendulum-v1", "medium")
    message = refusal(common.find_dataset, "FetchPush", "good")
    assert "is good" in message and "medium" in message and "hard" in message
    missing = tmp_path / "nowhere"
    for env_id in ("FetchPush", "Pendulum-v1"):
        message = refusal(common.find_dataset, env_id, "medium", missing)
        assert str(missing) in message and "--dataset" in message and "save_dataset" in message
    assert hidden(tmp_path) == []


def test_find_dataset_returns_the_named_or_the_standard_directory(tmp_path, monkeypatch):
    """As an absolute path: a run is resumed from another directory, too."""
    monkeypatch.chdir(tmp_path)
    standard, own = Path("datasets/FetchReach-hard"), tmp_path / "own"
    standard.mkdir(parents=True)
    own.mkdir()
    assert common.find_dataset("FetchReach", "hard") == tmp_path / standard
    for path in (own, Path("own")):
        found = common.find_dataset("FetchReach", "hard", path)
        assert found == own and found.is_absolute()


def numbered_dataset(lengths: list[int], examples: list[tuple[int, int]], steps: int | None = None) -> common.Dataset:
    """Observation (episode, step), action episode + step / 8 twice; examples: the observations with these indices."""
    steps = steps or max(lengths)
    observations = np.zeros((len(lengths), steps + 1, 2), np.float32)
    actions = np.full((len(lengths), steps, 2), 99, np.float32)
    for episode, length in enumerate(lengths):
        observations[episode, : length + 1] = [(episode, t) for t in range(length + 1)]
        actions[episode, :length] = (episode + np.arange(length) / 8)[:, None]
    terminals = np.arange(len(lengths)) % 2 == 0
    bounds = np.array([[-1, -1], [len(lengths), 2 * len(lengths)]], np.float32)
    pool = np.array(examples, np.float32).reshape(-1, 2)
    return common.Dataset(observations, actions, np.array(lengths, np.int32), pool, terminals, bounds, "")


def split(data: common.Dataset, fraction: float, num_success: int, seed: int = 0) -> tuple:
    return common.split_dataset(data, fraction, num_success, np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("episodes", "fraction", "expected"),
    [(20, 0.05, 1), (20, 0.25, 5), (20, 0.0, 1), (20, 0.9, 18), (2, 0.9, 1), (3, 1.0, 2), (200, 0.05, 10)],
)
def test_training_and_held_out_episodes_are_a_partition(episodes, fraction, expected):
    data = numbered_dataset([3] * episodes, [])
    training, heldout, examples = split(data, fraction, 0)
    assert len(heldout) == expected and sorted([*training, *heldout]) == list(range(episodes))
    assert examples.shape == (0, 2)
    again = split(data, fraction, 0)
    assert again[0].tolist() == training.tolist() and again[1].tolist() == heldout.tolist()
    if episodes == 20 and expected > 1:
        assert sorted(split(data, fraction, 0, seed=1)[1]) != sorted(heldout)


def test_success_examples_never_occur_in_held_out_episodes():
    data = numbered_dataset([5, 3, 4] * 10, [(e, 3) for e in range(30)])
    drawn = set()
    for seed in range(50):
        training, heldout, examples = split(data, 0.3, 21, seed)
        assert len(heldout) == 9 and len(examples) == 21
        assert sorted(e for e, _ in examples.tolist()) == sorted(training)  # all that there are, each once
        drawn |= {int(e) for e, _ in split(data, 0.3, 5, seed)[2]}
    assert drawn == set(range(30))


def test_an_example_that_is_in_two_episodes_counts_as_held_out():
    """By its value, whatever episode it was taken from; padding is no observation."""
    data = numbered_dataset([4] * 10 + [2] * 10, [(e, 2) for e in range(20)])
    data.observations[:, 1] = (100, 100)  # all episodes pass here
    shared = data._replace(success_examples=np.concatenate([data.success_examples, [[100, 100]]]).astype(np.float32))
    for seed in range(5):
        _, heldout, examples = split(shared, 0.25, 15, seed)
        assert [100, 100] not in examples.tolist() and not set(examples[:, 0].astype(int)) & set(heldout)
        assert "20 success examples" not in refusal(split, shared, 0.25, 16, seed)
    padding = data._replace(success_examples=np.zeros((1, 2), np.float32))
    data.observations[:, 0] = (50, 50)  # so that (0, 0) is padding only
    assert split(padding, 0.25, 1)[2].tolist() == [[0, 0]]


def test_fewer_success_examples_are_a_part_of_more():
    data = numbered_dataset([4] * 20, [(e, t) for e in range(20) for t in (2, 4)])
    everything = split(data, 0.1, 36)[2]
    assert everything.shape == (36, 2) and everything.dtype == np.float32
    assert len({tuple(row) for row in everything.tolist()}) == 36
    for num_success in (1, 5, 20):
        assert split(data, 0.1, num_success)[2].tolist() == everything[:num_success].tolist()
    other = split(data, 0.1, 36, seed=1)[2]
    assert other.tolist() != everything.tolist()
    order = [row for row in data.success_examples.tolist() if row in everything.tolist()]
    assert order != everything.tolist()  # not the file's order


def test_too_few_success_examples_are_a_sentence_with_the_numbers():
    data = numbered_dataset([4] * 20, [(e, 4) for e in range(20)])
    message = refusal(split, data, 0.25, 16)
    assert "--num-success is 16; of 20 success examples 15 are not in held-out episodes" in message
    assert "--holdout-fraction" in message and len(split(data, 0.25, 15)[2]) == 15
    empty = data._replace(success_examples=data.success_examples[:0])
    assert "of 0 success examples 0 are" in refusal(split, empty, 0.25, 1)
    assert split(empty, 0.25, 0)[2].shape == (0, 2)  # a method that looks at no example needs none


def slow_transitions(data: common.Dataset, episodes: list[int]) -> common.Transitions:
    rows: list[tuple] = []
    low, high = data.action_bounds.astype(float)
    for e in episodes:
        for t in range(data.lengths[e]):
            last = t == data.lengths[e] - 1
            action = [
                -1.0 if high[k] == low[k] else 2 * (data.actions[e, t, k] - low[k]) / (high[k] - low[k]) - 1
                for k in range(len(low))
            ]
            row = e * data.observations.shape[1] + t
            rows.append((row, data.lengths[e] - t, float(data.terminals[e] and last), np.clip(action, -1, 1)))
    return common.Transitions(*(np.array(column) for column in zip(*rows)))


@pytest.mark.parametrize("steps", [5, 8])
def test_transitions_are_those_of_a_slow_loop(steps):
    """Also where no episode fills the array."""
    data, episodes = numbered_dataset([5, 1, 3, 2, 4], [], steps), np.array([3, 0, 4, 1])
    found, expected = common.transitions(data, episodes), slow_transitions(data, episodes.tolist())
    for name in ("row", "remaining", "terminal"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist(), name
    np.testing.assert_allclose(found.action, expected.action, atol=1e-6)
    assert found.action.dtype == found.terminal.dtype == np.float32 and found.row.dtype == np.int64
    assert len(found.row) == 2 + 5 + 4 + 1 and found.terminal.sum() == 2  # of the four, episodes 0 and 4 are terminal
    flat = data.observations.reshape(-1, 2)
    episode, t = flat[found.row].T
    assert flat[found.row + 1].tolist() == [[e, s + 1] for e, s in zip(episode, t)]
    assert (t + found.remaining == data.lengths[episode.astype(int)]).all()
    ends = flat[found.row + found.remaining]
    assert ends.tolist() == [[e, data.lengths[int(e)]] for e in episode]


def test_actions_are_scaled_from_their_bounds_and_a_constant_one_is_minus_one():
    data = numbered_dataset([2, 2], [])
    data.actions[0, 0], data.actions[0, 1], data.actions[1, 0], data.actions[1, 1] = (-3, 7), (5, 7), (1, 7), (3, 7)
    data = data._replace(action_bounds=np.array([[-3, 7], [5, 7]], np.float32))
    action = common.transitions(data, np.array([0, 1])).action
    assert action.tolist() == [[-1.0, -1.0], [1.0, -1.0], [0.0, -1.0], [0.5, -1.0]]
    data.actions[0, :, 0] = -3.00001, 5.00001  # what rounding, or load_dataset's tolerance, lets through
    assert common.transitions(data, np.array([0])).action[:, 0].tolist() == [-1.0, 1.0]


# ------------------------------------------------------------------------------------------------- labels for metrics


def test_labelled_states_are_what_the_flags_say(tmp_path):
    data, episodes = numbered_dataset([5, 1, 3, 2, 4], []), np.array([0, 2, 4])
    successes = np.random.default_rng(0).random((5, 6)) < 0.5
    np.save(tmp_path / "successes.npy", successes)
    states = common.load_labelled(tmp_path, data, episodes)
    real = [(e, t) for e in episodes.tolist() for t in range(data.lengths[e] + 1)]
    expected = {
        "start": [(e, 0) for e in episodes.tolist()],
        "success": [index for index in real if successes[index]],
        "failure": [index for index in real if not successes[index]],
    }
    assert states.keys() == expected.keys() and all(expected.values())
    for label, rows in expected.items():
        assert states[label].dtype == np.float32
        assert sorted(map(tuple, states[label].tolist())) == sorted(rows), label


def test_without_flags_there_are_starts_only(tmp_path):
    states = common.load_labelled(tmp_path, numbered_dataset([5, 1, 3], []), np.array([2, 1]))
    assert states["start"].tolist() == [[2, 0], [1, 0]]
    assert states["success"].shape == states["failure"].shape == (0, 2)


def test_there_are_a_thousand_labelled_states_at_most_drawn_at_random(tmp_path):
    data, successes = numbered_dataset([3] * 1200, []), np.zeros((1200, 4), bool)
    successes[:, 2] = True
    np.save(tmp_path / "successes.npy", successes)
    states = common.load_labelled(tmp_path, data, np.arange(1200))
    assert [len(states[label]) for label in ("start", "success", "failure")] == [1000] * 3
    assert (states["success"][:, 1] == 2).all() and (states["failure"][:, 1] != 2).all()
    for label in ("success", "failure"):
        assert len({tuple(row) for row in states[label].tolist()}) == 1000
        assert 400 < np.median(states[label][:, 0]) < 800 and states[label][:, 0].max() > 1100
    again = common.load_labelled(tmp_path, data, np.arange(1200))
    assert all(np.array_equal(states[label], again[label]) for label in states)


@pytest.mark.parametrize("shape", [(3,), (3, 5), (2, 6), (3, 6, 1)])
def test_flags_of_another_shape_are_refused(shape, tmp_path):
    np.save(tmp_path / "successes.npy", np.zeros(shape, bool))
    message = refusal(common.load_labelled, tmp_path, numbered_dataset([5, 1, 3], []), np.array([0, 2]))
    assert "successes.npy" in message


def test_damaged_flags_are_refused(tmp_path):
    (tmp_path / "successes.npy").write_bytes(b"garbage")
    message = refusal(common.load_labelled, tmp_path, numbered_dataset([5, 1, 3], []), np.array([0, 2]))
    assert "successes.npy is damaged" in message


def test_a_collected_dataset_is_loaded_and_labelled(reach_dataset):
    data = load(reach_dataset, verify=True)
    assert data.observations.shape == (40, 51, 10) and data.lengths.tolist() == [50] * 40
    successes = np.load(reach_dataset / "successes.npy")
    states = common.load_labelled(reach_dataset, data, np.arange(40))
    distance = {label: np.linalg.norm(states[label][:, :3] - [1.3, 0.3, 0.9], axis=1) for label in states}
    assert (distance["success"] < 0.05 + 1e-6).all() and (distance["failure"] > 0.05 - 1e-6).all()
    assert len(states["success"]) == min(1000, successes.sum())


# ---------------------------------------------------------------------------------------------------------- the house


def test_common_is_tasks_and_files_only():
    """No flags, no logging, no checkpoints, no batches, no video: a reader needs none of it."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / "common.py").read_text())):
        for field in ("id", "attr", "name", "asname", "module", "arg"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                names |= set(re.split(r"[._]", value.lower()))
    assert {"gym", "load", "summarise", "dataset"} <= names  # names are found at all
    assert not names & {"torch", "nn", "optim", "backward", "autograd", "loss", "batch", "checkpoint"}
    assert not names & {"tyro", "tensorboard", "writer", "video", "imageio", "mean_std", "shift"}
