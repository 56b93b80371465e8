"""What holds common.py: the tasks in their real simulators, files whole or absent, and datasets that are checked."""

import ast
import errno
import functools
import hashlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import common

ROOT = Path(common.__file__).parent
OBSERVATION_SHAPES = {"FetchReach": (10,), "FetchPush": (25,), "SawyerWindowOpen": (6,), "SawyerDrawerClose": (6,)}
EPISODE_STEPS = {"FetchReach": 50, "FetchPush": 50, "SawyerWindowOpen": 150, "SawyerDrawerClose": 150}
for _image_task in ("FetchReachImage", "FetchPushImage", "FetchPushImageOccluded"):
    OBSERVATION_SHAPES[_image_task], EPISODE_STEPS[_image_task] = (64, 64, 3), 50
every_task = pytest.mark.parametrize("env_id", common.TASKS)


@functools.cache
def shared_env(env_id: str) -> gym.Env:
    """An environment that many tests play in, in any order: a reset must forget them all."""
    return common.make_env(env_id)


def play(env: gym.Env, seed: int, steps: int) -> tuple[np.ndarray, list[bool]]:
    """Play random actions that depend on the seed alone; return all observations and success flags."""
    observation, info = env.reset(seed=seed)
    observations, successes = [observation], [info["success"]]
    for action in np.random.default_rng(seed).uniform(-1, 1, (steps, 4)).astype(np.float32):
        observation, _, _, _, info = env.step(action)
        observations.append(observation)
        successes.append(info["success"])
    return np.stack(observations), successes


def refusal(function, *args, **kwargs) -> str:
    """Return the message of the UserError that the call must raise: one line that says it is an error."""
    with pytest.raises(common.UserError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert message.startswith("error: ") and len(message.splitlines()) == 1, message
    return message


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
    env = common.make_env(env_id)
    check_env(env.unwrapped)
    env.close()


@every_task
def test_a_seed_fixes_the_episode_to_the_bit(env_id):
    env, steps = shared_env(env_id), EPISODE_STEPS[env_id]
    observations, successes = play(env, 7, 20)
    assert not np.array_equal(observations[0], observations[-1])
    for other_seed in (8, 9):
        play(env, other_seed, steps)
    fresh = common.make_env(env_id)
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
    env, shape, dtype = (
        shared_env(env_id),
        OBSERVATION_SHAPES[env_id],
        np.float32 if "Image" not in env_id else np.uint8,
    )
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


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("FetchPsh", "FetchPush"), ("fetchreach", "FetchReach"), ("SawyerDrawerClosed", "SawyerDrawerClose")],
)
def test_an_unknown_task_is_refused_with_the_nearest_name(wrong, near):
    for function in (common.find_task, common.make_env):
        message = refusal(function, wrong)
        assert wrong in message and re.search(f"did you mean {near}\\b", message)
        assert all(env_id in message for env_id in common.TASKS)


def test_an_unknown_task_without_a_near_name():
    message = refusal(common.find_task, "Pong")
    assert "did you mean" not in message and "FetchReach" in message


# ---------------------------------------------------------------------------------------- seeds, statistics and flags


def test_episode_seeds_never_collide():
    streams, seeds, episodes = common.STREAMS, range(15), range(200)
    sample = {common.episode_seed(*key) for key in ((a, b, c) for a in streams for b in seeds for c in episodes)}
    assert len(sample) == len(streams) * len(seeds) * len(episodes)
    assert {"training", "evaluation", "dataset"} <= set(streams)
    assert all(0 <= seed < 2**64 for seed in sample) and max(sample) > 2**63


def test_episode_seeds_are_the_same_in_every_run():
    assert common.episode_seed("evaluation", 3, 5) == common.episode_seed("evaluation", 3, 5)
    words = np.random.SeedSequence([common.STREAMS.index("evaluation"), 3, 5]).generate_state(2)
    assert common.episode_seed("evaluation", 3, 5) == int(words[0]) + (int(words[1]) << 32)


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
def test_wilson_interval(successes, episodes, interval):
    low, high = common.wilson_interval(successes, episodes)
    assert (low, high) == pytest.approx(interval, abs=1e-4)
    assert 0.0 <= low <= successes / episodes <= high <= 1.0


def test_success_statistics():
    flags = {"success": [True, False, True, True], "final_success": [False, False, False, False]}
    assert common.success_statistics(flags) == {
        "success_rate": 0.75,
        "success_interval": common.wilson_interval(3, 4),
        "final_success_rate": 0.0,
        "final_success_interval": common.wilson_interval(0, 4),
    }


def test_check_range_accepts_both_bounds_and_names_the_flag():
    args = SimpleNamespace(batch_size=1, holdout_fraction=0.9, rate=float("nan"))
    common.check_range(1, np.inf, args, "batch_size")
    common.check_range(0, 0.9, args, "holdout_fraction")
    message = refusal(common.check_range, 2, np.inf, args, "batch_size")
    assert message == "error: --batch-size is 1; it must be 2 or more."
    message = refusal(common.check_range, 0, 1, args, "batch_size", "rate")
    assert message == "error: --rate is nan; it must be from 0 to 1."


def test_find_device_refuses_a_gpu_that_is_not_there(monkeypatch):
    assert common.find_device("cpu").type == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert common.find_device("auto").type == "cpu"
    assert "--device is cuda, and PyTorch finds no GPU" in refusal(common.find_device, "cuda")


def test_ctrl_c_that_nothing_catches_ends_without_a_traceback():
    def interrupted():
        with common.exit_quietly():
            raise KeyboardInterrupt

    assert refusal(interrupted) == "error: interrupted."


def test_plain_turns_paths_into_strings_only():
    args = SimpleNamespace(run_dir=Path("runs/a"), seed=3, dataset=None)
    assert common.plain(args) == {"run_dir": "runs/a", "seed": 3, "dataset": None}


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_catch_interrupt_receives_the_first_signal_and_leaves_the_second_alone(kind):
    seen = []
    before = signal.signal(kind, lambda number, _: seen.append(number))
    try:
        own = signal.getsignal(kind)
        with common.catch_interrupt() as received:
            assert received == []
            os.kill(os.getpid(), kind)
            assert (received, seen) == ([kind], [])
            os.kill(os.getpid(), kind)
            assert (received, seen) == ([kind], [kind])
        assert signal.getsignal(kind) is own
    finally:
        signal.signal(kind, before)


def test_catch_interrupt_lets_a_second_control_c_through():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert before[0] is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt), common.catch_interrupt() as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_catch_interrupt_restores_the_handlers_after_an_error():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), common.catch_interrupt():
        assert signal.getsignal(signal.SIGINT) is not before[0]
        raise RuntimeError
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# ----------------------------------------------------------------------------------------------------- writing files


def fill(writer, path: Path, content: str, error: BaseException | None = None) -> None:
    """Write a file, or a directory with one file that is called like its content, and then raise the error."""
    with writer(path) as temporary:
        assert temporary != path and temporary.parent == path.parent
        (temporary / content if writer is common.write_directory else temporary).write_text(content)
        if error is not None:
            raise error


def read(path: Path) -> dict[str, str]:
    """All files under a path with their contents."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {file.name: file.read_text() for file in files}


both_writers = pytest.mark.parametrize("writer", [common.write_directory, common.write_file])


@both_writers
def test_a_written_path_takes_the_place_of_the_old_one_whole(writer, tmp_path):
    target = tmp_path / "target"
    for content in ("old", "new"):
        fill(writer, target, content)
        assert read(target) == {content if writer is common.write_directory else "target": content}
        assert list(tmp_path.iterdir()) == [target]


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
    if isinstance(error, OSError):
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


@both_writers
def test_an_unwritable_place_is_one_sentence(writer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    target = tmp_path / "file" / "folder" / "target"
    message = refusal(fill, writer, target, "new")
    assert str(target) in message and "Not a directory" in message and "choose a place that can be written" in message
    assert read(tmp_path) == {"file": "in the way"}


def test_write_json_is_whole_or_absent(tmp_path):
    path = tmp_path / "new" / "result.json"
    common.write_json(path, {"success_rate": 0.5})
    assert json.loads(path.read_text()) == {"success_rate": 0.5}
    with pytest.raises(TypeError):
        common.write_json(path, {"a": 1, "b": object()})
    assert json.loads(path.read_text()) == {"success_rate": 0.5}
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_ends_the_program_with_one_line(tmp_path):
    """The limit on the size of a file stands for a full disk: the same call of the system fails."""
    program = """
import resource, sys
from pathlib import Path
import numpy as np
import common
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
with common.write_directory(Path(sys.argv[1])) as directory:
    common.create_array(directory / "small.npy", (100,), np.float32)
    print("the small one fits")
    common.create_array(directory / "large.npy", (1 << 20,), np.float32)
    print("the large one fits")
"""
    target = tmp_path / "dataset"
    result = subprocess.run([sys.executable, "-c", program, str(target)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == "the small one fits\n"
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith(f"error: cannot write {target}: File too large; free some space")
    assert list(tmp_path.iterdir()) == []


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


def test_load_weights_returns_what_was_saved(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"env_id": "FetchReach", "weight": torch.arange(3.0), "rates": [0.5, 1]}, path)
    content = common.load_weights(path)
    assert content["env_id"] == "FetchReach" and content["rates"] == [0.5, 1]
    assert torch.equal(content["weight"], torch.tensor([0.0, 1.0, 2.0]))


@pytest.mark.parametrize("nested", [False, True])
def test_load_weights_runs_no_code(nested, tmp_path):
    path, touched = tmp_path / "weights.pt", tmp_path / "touched"
    torch.save({"weight": Trap(touched)} if nested else Trap(touched), path)
    assert str(path) in refusal(common.load_weights, path)
    assert not touched.exists()
    torch.load(path, weights_only=False)
    assert touched.exists()  # the trap is a real one


@pytest.mark.parametrize(
    "content",
    [None, b"", b"not weights", b"PK\x03\x04 cut off", pickle.dumps(3, protocol=2)],
    ids=lambda content: repr(content),
)
def test_load_weights_refuses_missing_and_damaged_files(content, tmp_path):
    path = tmp_path / "weights.pt"
    if content is not None:
        path.write_bytes(content)
    assert str(path) in refusal(common.load_weights, path)


def test_load_weights_refuses_truncated_weights_and_other_contents(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-1000])
    assert str(path) in refusal(common.load_weights, path)
    torch.save([torch.zeros(3)], path)
    assert "was not written by this project" in refusal(common.load_weights, path)


def logged_steps(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_log_that_goes_on_drops_what_it_writes_again(tmp_path):
    """A checkpoint after the metrics of step 20; the run went on to step 30 before it stopped."""
    args = SimpleNamespace(env_id="FetchReach", seed=3)
    log = common.Log(tmp_path / "run", args)
    for step in (0, 20, 30):
        log.write(step, {"loss": float(step), "rate": 0.5})
        if step == 20:
            size = log.path.stat().st_size
    log.writer.close()
    assert logged_steps(tmp_path / "run") == [0, 20, 30]
    log = common.Log(tmp_path / "run", args, 20, size)
    assert logged_steps(tmp_path / "run") == [0, 20]
    log.write(30, {"loss": -1.0})
    log.writer.close()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 0, "loss": 0.0, "rate": 0.5},
        {"step": 20, "loss": 20.0, "rate": 0.5},
        {"step": 30, "loss": -1.0},
    ]
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 0.0), (20, 20.0), (30, -1.0)]


def test_a_log_refuses_the_directory_of_another_run(tmp_path):
    log = common.Log(tmp_path, SimpleNamespace(seed=0))
    log.write(5, {"loss": 1.0})
    log.writer.close()
    assert "holds a run already" in refusal(common.Log, tmp_path, SimpleNamespace(seed=0))
    assert logged_steps(tmp_path) == [5]


def test_a_log_refuses_what_is_not_finite(tmp_path):
    log = common.Log(tmp_path, SimpleNamespace(seed=0))
    for value in (float("nan"), float("inf")):
        assert f"loss is {value} at step 7" in refusal(log.write, 7, {"loss": value})
    assert logged_steps(tmp_path) == []


def test_a_log_in_an_unwritable_place_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert str(tmp_path / "file") in refusal(common.Log, tmp_path / "file" / "run", SimpleNamespace(seed=0), 0)


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
    return dict(
        observations=observations, actions=actions, lengths=lengths, success_examples=examples, successes=successes
    )


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


def load(path: Path, num_success: int = 3, env_id: str = "FetchReach", seed: int = 0, **kwargs) -> common.Dataset:
    return common.load_dataset(path, env_id, num_success, np.random.default_rng(seed), **kwargs)


def test_load_dataset_returns_exactly_the_arrays(tmp_path):
    """Episodes of different lengths included."""
    data, arrays = load(write_dataset(tmp_path / "data")), valid_arrays()
    for name in ("observations", "actions", "lengths"):
        loaded = getattr(data, name)
        assert loaded.dtype == arrays[name].dtype and loaded.shape == arrays[name].shape
        assert loaded.tobytes() == arrays[name].tobytes()
    assert data.lengths.tolist() == [4, 3, 1]
    for array in (data.observations, data.actions):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0.0


def test_no_reward_and_no_success_flag_reaches_a_method(tmp_path):
    assert common.Dataset._fields == ("observations", "actions", "lengths", "success_examples")
    whole, without, garbage = (
        load(write_dataset(tmp_path / name, **changes))
        for name, changes in (("whole", {}), ("without", {"successes": None}), ("garbage", {"successes": b"garbage"}))
    )
    for other in (without, garbage):
        assert all(np.array_equal(a, b) for a, b in zip(whole, other))


def test_success_examples_are_distinct_rows_chosen_by_the_generator(tmp_path):
    path = write_dataset(tmp_path / "data")
    pool = [row.tobytes() for row in valid_arrays()["success_examples"]]
    everything = [row.tobytes() for row in load(path, 8).success_examples]
    assert sorted(everything) == sorted(pool) and everything != pool
    for num_success in (1, 5, 8):
        examples = load(path, num_success).success_examples
        assert examples.shape == (num_success, 10) and examples.dtype == np.float32
        assert [row.tobytes() for row in examples] == everything[:num_success]
    other = [row.tobytes() for row in load(path, 8, seed=1).success_examples]
    assert sorted(other) == sorted(pool) and other != everything


@pytest.mark.parametrize("num_success", [-1, 9])
def test_num_success_must_be_there(num_success, tmp_path):
    message = refusal(load, write_dataset(tmp_path / "data"), num_success)
    assert f"--num-success is {num_success}" in message and "1 to 8" in message


def test_a_method_that_looks_at_no_example_gets_none(tmp_path):
    assert load(write_dataset(tmp_path / "data"), 0).success_examples.shape == (0, 10)


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
    "missing examples": ("success_examples", None, "No such file"),
    "missing lengths": ("lengths", None, "No such file"),
    "empty file": ("lengths", b"", "damaged"),
    "no array": ("actions", b"this is text", "damaged"),
    "truncated data": ("observations", stored(valid_arrays()["observations"])[:-4], "damaged"),
    "truncated header": ("actions", stored(valid_arrays()["actions"])[:50], "damaged"),
    "damaged header": ("lengths", raw_file("{'descr': '<i4', 'shape': (3,"), "lengths"),
    "impossible shape": (
        "lengths",
        raw_file("{'descr': '<i4', 'fortran_order': False, 'shape': (99999999999999999999,), }"),
        "lengths",
    ),
    "long header": ("lengths", b"\x93NUMPY\x02\x00" + (20_000).to_bytes(4, "little") + b" " * 20_000, "lengths"),
    "zip archive": ("lengths", b"PK\x03\x04 and no archive", "lengths"),
    "NaN observation": ("observations", with_value("observations", (2, 1, 9), np.nan), "not finite"),
    "NaN action": ("actions", with_value("actions", (0, 0, 0), np.nan), "not finite"),
    "infinite action": ("actions", with_value("actions", (1, 2, 3), -np.inf), "not finite"),
    "infinite example": ("success_examples", with_value("success_examples", (7, 0), np.inf), "not finite"),
    "observations one step short": ("observations", valid_arrays()["observations"][:, :-1], "shape"),
    "observations of another size": ("observations", np.zeros((3, 5, 25), np.float32), "shape"),
    "observations of too few episodes": ("observations", valid_arrays()["observations"][:2], "shape"),
    "observations without axes": ("observations", np.float32(0), "observations"),
    "actions of another size": ("actions", np.zeros((3, 4, 3), np.float32), "shape"),
    "actions with one axis": ("actions", np.zeros(12, np.float32), "actions"),
    "lengths of too few episodes": ("lengths", np.ones(2, np.int32), "shape"),
    "lengths with two axes": ("lengths", np.ones((3, 1), np.int32), "shape"),
    "examples of another size": ("success_examples", np.zeros((8, 9), np.float32), "shape"),
    "examples without axes": ("success_examples", np.float32(0), "success_examples"),
    "float64 observations": ("observations", valid_arrays()["observations"].astype(np.float64), "float64"),
    "int8 actions": ("actions", np.zeros((3, 4, 4), np.int8), "int8"),
    "int64 lengths": ("lengths", np.array([4, 3, 1]), "int64"),
    "bool examples": ("success_examples", np.zeros((8, 10), np.bool_), "bool"),
    "big-endian actions": ("actions", valid_arrays()["actions"].astype(">f4"), "dtype"),
    "length 0": ("lengths", np.array([4, 0, 1], np.int32), "1 to 4"),
    "negative length": ("lengths", np.array([4, -1, 1], np.int32), "1 to 4"),
    "length too large": ("lengths", np.array([4, 5, 1], np.int32), "1 to 4"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_a_bad_array_is_refused_by_name(case, tmp_path):
    name, array, problem = BAD_ARRAYS[case]
    message = refusal(load, write_dataset(tmp_path / "data", **{name: array}))
    assert f"{name}.npy" in message and problem in message


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
    assert "observations.npy" in message and "not finite" in message and "1024" in message


@pytest.mark.parametrize("name", ["observations", "actions", "lengths", "success_examples"])
def test_one_wrong_bit_is_found_by_the_checksum(name, tmp_path):
    path = write_dataset(tmp_path / "data")
    content = bytearray((path / f"{name}.npy").read_bytes())
    content[-4] ^= 1
    (path / f"{name}.npy").write_bytes(content)
    message = refusal(load, path)
    assert f"{name}.npy" in message and "checksum" in message


def test_an_array_of_objects_is_refused_and_runs_no_code(tmp_path):
    touched = tmp_path / "touched"
    path = write_dataset(tmp_path / "data", observations=np.array([Trap(touched)], dtype=object))
    assert "observations.npy" in refusal(load, path)
    (path / "observations.npy").write_bytes(pickle.dumps(Trap(touched)))
    assert "observations.npy" in refusal(load, path)
    assert not touched.exists()
    np.load(path / "observations.npy", allow_pickle=True)
    assert touched.exists()  # the trap is a real one


def test_a_dataset_without_episodes_is_refused(tmp_path):
    arrays = {name: valid_arrays()[name][:0] for name in ("observations", "actions", "lengths", "successes")}
    assert str(tmp_path / "data") in refusal(load, write_dataset(tmp_path / "data", **arrays))


def test_a_dataset_of_another_task_is_refused(tmp_path):
    message = refusal(load, write_dataset(tmp_path / "data"), env_id="FetchPush")
    assert "FetchReach" in message and "not of FetchPush" in message


def test_a_dataset_for_an_unknown_task_is_refused(tmp_path):
    assert "did you mean FetchPush" in refusal(load, write_dataset(tmp_path / "data"), env_id="FetchPsh")


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"\xff\xfe\x00", b"null", b"[]", b'"text"', b"{}"], ids=lambda content: repr(content)
)
def test_missing_or_invalid_metadata_is_refused(content, tmp_path):
    path = write_dataset(tmp_path / "data")
    (path / "metadata.json").unlink()
    if content is not None:
        (path / "metadata.json").write_bytes(content)
    assert str(path) in refusal(load, path)


@pytest.mark.parametrize("name", ["env_id", "versions", "sha256"])
def test_metadata_without_a_value_is_refused(name, tmp_path):
    assert str(tmp_path / "data") in refusal(load, write_dataset(tmp_path / "data", metadata={name: None}))


@pytest.mark.parametrize("package", ["mujoco", "gymnasium-robotics"])
def test_a_dataset_of_another_simulator_is_refused_unless_allowed(package, tmp_path):
    versions = common.versions("mujoco", "gymnasium-robotics") | {package: "0.0.1"}
    path = write_dataset(tmp_path / "data", metadata={"versions": versions})
    message = refusal(load, path)
    assert "0.0.1" in message and common.versions(package)[package] in message
    assert "python collect_data.py --env-id FetchReach --quality medium" in message
    assert f"--output {path} --overwrite" in message and "--allow-version-mismatch" in message
    assert load(path, allow_version_mismatch=True).lengths.tolist() == [4, 3, 1]


def test_versions_of_what_does_not_move_the_robot_may_differ(tmp_path):
    versions = common.versions("mujoco", "gymnasium-robotics") | {"metaworld": "0.0.1", "gymnasium": "0.0.1"}
    assert load(write_dataset(tmp_path / "data", metadata={"versions": versions})).lengths.tolist() == [4, 3, 1]


def test_find_dataset_refuses_unknown_names_and_missing_directories(tmp_path):
    assert "did you mean FetchPush" in refusal(common.find_dataset, "FetchPsh", "medium")
    message = refusal(common.find_dataset, "FetchPush", "good")
    assert "'good'" in message and all(quality in message for quality in common.QUALITIES)
    missing = tmp_path / "nowhere"
    assert str(missing) in refusal(common.find_dataset, "FetchPush", "medium", missing)


def test_find_dataset_returns_the_named_or_the_standard_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    standard, own = Path("datasets/FetchReach-hard"), tmp_path / "own"
    standard.mkdir(parents=True)
    own.mkdir()
    assert common.find_dataset("FetchReach", "hard") == standard
    assert common.find_dataset("FetchReach", "hard", own) == own


def test_sha256_of_a_file_longer_than_one_block(tmp_path):
    content = os.urandom((1 << 20) + 17)
    (tmp_path / "file").write_bytes(content)
    assert common.sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


# --------------------------------------------------------------------------------------------------------- the house


def test_common_computes_no_gradient():
    names = set()
    for node in ast.walk(ast.parse((ROOT / "common.py").read_text())):
        for field in ("id", "attr", "name", "asname", "module", "arg"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                names |= set(re.split(r"[._]", value.lower()))
    assert {"torch", "load", "wilson"} <= names  # names are found at all
    assert not names & {"nn", "optim", "backward", "autograd", "loss"}
