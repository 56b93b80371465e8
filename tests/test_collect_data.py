"""The datasets that are rolled out from the policies in behavior/, and what is left when this is interrupted."""

import contextlib
import dataclasses
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import collect_data
import common

SCRIPT = Path(collect_data.__file__)
STATE_TASKS = [env_id for env_id, task in common.TASKS.items() if task.state_task is None]


# ---------------------------------------------------------------------------------------------------------- the mixture


def test_mixture_has_the_wanted_rate_and_prefers_better_policies_for_more():
    rates = [0.05, 0.1, 0.4, 0.9, 0.95]
    for target in (0.1, 0.475, 0.48, 0.9):
        weights = collect_data.mixture(rates, target)
        assert weights.sum() == pytest.approx(1) and (weights >= 0).all()
        assert weights @ rates == pytest.approx(target, abs=1e-6)
        order = np.diff(weights)
        assert (order >= 0).all() if target > np.mean(rates) else (order <= 0).all()
        ratios = np.diff(np.log(weights)) / np.diff(rates)  # weights proportional to exp(beta * rate)
        np.testing.assert_allclose(ratios, ratios[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(collect_data.mixture(rates, np.mean(rates)), 0.2, atol=1e-6)


def test_mixture_that_cannot_be_had_is_refused():
    with pytest.raises(common.UserError, match="no mixture of checkpoints .*0.200 to 0.900.* succeeds in 0.100"):
        collect_data.mixture([0.2, 0.9], 0.1)


def test_examples_are_drawn_from_all_solved_states_alike():
    rng = np.random.default_rng(0)
    successes = rng.random((30, 11)) < 0.3
    successes[4] = False
    observations = np.arange(30 * 11, dtype=np.float32).reshape(30, 11, 1)
    examples = collect_data.choose_examples(observations, successes, np.random.default_rng(1))
    solved = observations[:, 1:][successes[:, 1:]]
    assert sorted(examples.ravel()) == sorted(solved.ravel())  # fewer than the most: each of them once
    many = np.tile(successes, (40, 1))
    examples = collect_data.choose_examples(np.tile(observations, (40, 1, 1)), many, np.random.default_rng(1))
    assert examples.shape == (collect_data.MAX_SUCCESS_EXAMPLES, 1)
    assert set(examples.ravel()) <= set(solved.ravel())
    counts = np.unique(examples, return_counts=True)[1]
    assert len(counts) == len(solved) and counts.max() < 5 * examples.size / len(solved)


def test_success_statistics_are_rates_with_wilson_intervals():
    successes = np.zeros((40, 6), bool)
    successes[:2, 0] = successes[5:15, 3] = successes[:10, -1] = True
    statistics = collect_data.success_statistics(successes)
    z = 1.959963984540054  # the 97.5 % quantile of the normal distribution
    for name, k in (("initial_success", 2), ("success", 15), ("final_success", 10)):
        rate, n = k / 40, 40
        center = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z * np.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
        assert statistics[f"{name}_rate"] == rate
        assert statistics[f"{name}_interval"] == pytest.approx([center - half, center + half], rel=1e-9)


# ----------------------------------------------------------------------------------------------------------- datasets


def read_files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_same_command_gives_the_same_bytes_with_any_number_of_workers_and_in_a_thread(reach_dataset, tmp_path):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = 2 if cores == 1 else 1  # the fixture has one for each core
    args = collect_data.Args(num_episodes=40, output=tmp_path / "data", num_workers=workers)
    thread = threading.Thread(target=collect_data.collect, args=(args,))
    thread.start()
    thread.join()
    assert read_files(tmp_path / "data") == read_files(reach_dataset)


def test_other_seed_and_other_quality_give_other_episodes(reach_dataset, tmp_path):
    common_args = collect_data.Args(num_episodes=12, num_workers=1)
    observations = [np.load(reach_dataset / "observations.npy")[:12]]
    for i, change in enumerate(({"seed": 1}, {"quality": "hard"})):
        collect_data.collect(dataclasses.replace(common_args, output=tmp_path / str(i), **change))
        observations.append(np.load(tmp_path / str(i) / "observations.npy"))
    assert not np.array_equal(observations[0], observations[1])
    assert not np.array_equal(observations[0], observations[2])
    rates = [common.read_metadata(path)["behavior"]["weights"] for path in (reach_dataset, tmp_path / "1")]
    assert rates[0][0] < rates[1][0]  # the untrained policy is played more often in the hard data


def test_metadata_says_what_the_arrays_hold(reach_dataset):
    metadata = common.read_metadata(reach_dataset)
    arrays = {path.stem: np.load(path) for path in reach_dataset.glob("*.npy")}
    assert (
        set(arrays)
        == {"observations", "actions", "lengths", "successes", "success_examples"}
        == set(metadata["sha256"])
    )
    assert {path.name for path in reach_dataset.iterdir()} == {f"{name}.npy" for name in arrays} | {"metadata.json"}
    assert arrays["observations"].shape == (40, 51, 10) and arrays["actions"].shape == (40, 50, 4)
    assert (arrays["lengths"] == 50).all()
    successes = arrays["successes"]
    assert metadata["success_rate"] == successes[:, 1:].any(1).mean()
    assert metadata["final_success_rate"] == successes[:, -1].mean()
    assert metadata["initial_success_rate"] == successes[:, 0].mean() == 0
    assert metadata["success_interval"][0] < metadata["success_rate"] < metadata["success_interval"][1]
    assert 0.15 < metadata["success_rate"] < 0.8  # 0.475 within four standard errors
    assert sum(metadata["behavior"]["episodes"]) == 40
    assert metadata["behavior"]["file"] == "FetchReach.pt"
    assert metadata["action_bounds"] == [[-1.0] * 4, [1.0] * 4]
    assert metadata["versions"]["mujoco"] == "3.3.0"
    assert "renderer" not in metadata  # nothing of it was rendered
    # FetchReach succeeds where the gripper, the first three numbers, is within 5 cm of the goal.
    distance = np.linalg.norm(arrays["observations"][..., :3] - (1.3, 0.3, 0.9), axis=-1)
    assert np.array_equal(distance < 0.05, successes)
    examples = arrays["success_examples"]
    assert (np.linalg.norm(examples[:, :3] - (1.3, 0.3, 0.9), axis=-1) < 0.05).all()
    assert len(examples) == metadata["num_success_examples"] == min(1000, successes[:, 1:].sum())


def test_dataset_can_be_loaded_and_verified(reach_dataset):
    data = common.load_dataset(reach_dataset, "FetchReach", verify=True)
    assert len(data.lengths) == 40 and not data.terminals.any()


def test_stored_actions_lead_from_one_stored_observation_to_the_next(reach_dataset):
    """Replaying an episode's actions in a new environment from its seed gives its observations, to the bit."""
    observations, actions = (np.load(reach_dataset / f"{name}.npy") for name in ("observations", "actions"))
    env = common.make_env("FetchReach")
    for episode in (0, 7):
        observation, _ = env.reset(seed=common.episode_seed(0, "dataset", episode))
        assert np.array_equal(observation, observations[episode, 0])
        for t, action in enumerate(actions[episode]):
            observation, *_ = env.step(action)
            assert np.array_equal(observation, observations[episode, t + 1])


def test_images_show_the_episodes_of_the_state_task_and_their_renderer_is_named(reach_dataset, tmp_path):
    state = {path.stem: np.load(path) for path in reach_dataset.glob("*.npy")}
    n = int(state["successes"][:, 1:].any(1).argmax()) + 1  # as many as it takes for one to succeed
    args = collect_data.Args(env_id="FetchReachImage", num_episodes=n, output=tmp_path / "data", num_workers=1)
    metadata = collect_data.collect(args)
    for name in ("actions", "successes"):
        assert np.array_equal(np.load(tmp_path / "data" / f"{name}.npy"), state[name][:n])
    images = np.load(tmp_path / "data" / "observations.npy")
    assert images.shape == (n, 51, 64, 64, 3) and images.dtype == np.uint8 and images.std() > 10
    env = common.make_env("FetchReachImage")
    assert metadata["renderer"] == env.unwrapped.camera.name and metadata["behavior"]["file"] == "FetchReach.pt"
    env.close()


@pytest.mark.parametrize("env_id", STATE_TASKS)
@pytest.mark.parametrize("num_episodes", [None, 7])
def test_default_number_of_episodes_is_that_of_the_task(tmp_path, monkeypatch, env_id, num_episodes):
    played = []

    def play_in_workers(setup, seed, checkpoints, num_workers):
        played.append(len(checkpoints))
        raise common.UserError("enough")

    monkeypatch.setattr(collect_data, "play_in_workers", play_in_workers)
    with pytest.raises(common.UserError, match="enough"):
        collect_data.collect(collect_data.Args(env_id=env_id, num_episodes=num_episodes, output=tmp_path / "data"))
    standard = {"FetchReach": 4000, "FetchPush": 4000, "SawyerWindowOpen": 2000, "SawyerDrawerClose": 2000}
    assert played == [num_episodes or standard[env_id]]
    assert list(tmp_path.iterdir()) == []


def test_existing_dataset_is_kept_unless_told_otherwise(reach_dataset, tmp_path):
    target = tmp_path / "data"
    shutil.copytree(reach_dataset, target)
    with pytest.raises(common.UserError, match="data exists; add --overwrite"):
        collect_data.collect(collect_data.Args(num_episodes=12, output=target))
    assert read_files(target) == read_files(reach_dataset)
    collect_data.collect(collect_data.Args(num_episodes=12, output=target, overwrite=True, num_workers=1))
    assert common.read_metadata(target)["num_episodes"] == 12
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_directory_that_is_no_dataset_is_never_replaced(tmp_path):
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(common.UserError, match="is not a dataset, so it is not replaced"):
        collect_data.collect(collect_data.Args(num_episodes=12, output=tmp_path, overwrite=True))
    assert (tmp_path / "precious").read_text() == "mine"


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"env_id": "FetchPsh"}, "--env-id is FetchPsh; there are policies for FetchReach, FetchPush, "),
        ({"quality": "easy"}, "--quality is easy; choose one of medium, hard"),
        ({"num_episodes": 0}, "--num-episodes is 0; it must be from 1 to"),
        ({"num_workers": -1}, "--num-workers is -1; it must be from 0 to"),
        ({"seed": -1}, "--seed is -1; it must be from 0 to 4294967295"),
        ({"behavior_dir": Path("nowhere")}, "nowhere/FetchReach.pt is damaged or missing"),
        ({"success_reward": 1.0}, "--success-examples and --success-reward need --from-minari"),
    ],
)
def test_mistakes_get_one_sentence(tmp_path, flags, message):
    with pytest.raises(common.UserError, match=message) as caught:
        collect_data.collect(collect_data.Args(**{"output": tmp_path / "data", **flags}))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_policies_of_another_task_are_refused(tmp_path):
    (tmp_path / "FetchPush.pt").write_bytes((SCRIPT.parent / "behavior" / "FetchReach.pt").read_bytes())
    with pytest.raises(common.UserError, match="holds no policies of FetchPush"):
        collect_data.collect(collect_data.Args(env_id="FetchPush", behavior_dir=tmp_path, output=tmp_path / "data"))


def test_script_refuses_policies_with_other_parameters_in_one_sentence(tmp_path):
    content = torch.load(SCRIPT.parent / "behavior" / "FetchReach.pt", weights_only=True)
    for checkpoint in content["checkpoints"]:
        checkpoint["actor"] = {f"module.{name}": value for name, value in checkpoint["actor"].items()}
    torch.save(content, tmp_path / "FetchReach.pt")
    command = [sys.executable, str(SCRIPT), "--behavior-dir", str(tmp_path), "--output", str(tmp_path / "data")]
    process = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120)
    assert process.returncode == 1
    assert process.stderr.startswith(f"error: {tmp_path / 'FetchReach.pt'} is damaged or missing, or holds no policies")
    assert process.stderr.count("\n") == 1


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=11_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    args = collect_data.Args(output=tmp_path / "new" / "data")
    # 4,000 x (51 x 10 + 50 x 4) floats, 4,000 x 51 flags, 4,000 lengths and 1,000 examples
    size = 4 * 4000 * (51 * 10 + 50 * 4) + 4000 * 51 + 4 * 4000 + 1000 * 10 * 4
    sizes = f"takes {size / 1e6:.1f}MB, {(size - 11_000_000) / 1e3:.0f}kB more than {tmp_path} has left"
    with pytest.raises(common.UserError, match=sizes) as caught:
        collect_data.collect(args)
    assert "0.0" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_nothing_behind(tmp_path):
    """A limit on the size of files stands for a full disk: the data of 4,000 episodes do not fit."""
    command = [sys.executable, str(SCRIPT), "--env-id", "FetchReach", "--output", str(tmp_path / "data")]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))  # noqa: E731
    process = subprocess.run(command, stderr=subprocess.PIPE, text=True, preexec_fn=limit, timeout=120)
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith(f"error: cannot write {tmp_path / 'data'}: ")
    assert "Traceback" not in process.stderr
    assert list(tmp_path.iterdir()) == []


def test_unwritable_output_gets_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(common.UserError, match="cannot write .*file/data"):
        collect_data.collect(collect_data.Args(num_episodes=4, output=tmp_path / "file" / "data"))


def test_error_in_a_worker_is_raised_as_what_it_is(tmp_path):
    setup = ("FetchReach", tmp_path / "FetchReach.pt", tmp_path)
    with pytest.raises(common.UserError, match="FetchReach.pt is damaged or missing"):
        collect_data.play_in_workers(setup, 0, np.zeros(100, int), 1)
    assert not workers_of(psutil.Process())


# ---------------------------------------------------------------------------------------------- killed and interrupted


def workers_of(process):
    workers = []
    for child in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # a helper that has ended meanwhile
            workers += [child] if any("spawn_main" in word for word in child.cmdline()) else []
    return workers


def wait_for(condition, seconds=120):
    deadline = time.time() + seconds
    while not (result := condition()):
        assert time.time() < deadline, "waited in vain"
        time.sleep(0.05)
    return result


def first_episode_is_played(tmp_path):
    with contextlib.suppress(FileNotFoundError, ValueError):
        (file,) = tmp_path.glob(".data.*.tmp/actions.npy")
        return np.load(file, mmap_mode="r")[0].any()


@contextlib.contextmanager
def collection(tmp_path, num_workers=1, at_work=True):
    """Collect 4,000 episodes; yield the process and its workers once these exist, or have played an episode."""
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path / "data"), "--num-workers", str(num_workers)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    workers = []
    try:
        workers += wait_for(lambda: len(found := workers_of(process)) == num_workers and found)
        if at_work:
            wait_for(lambda: first_episode_is_played(tmp_path))
        assert process.poll() is None
        yield process, workers
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def assert_one_sentence_and_nothing_left(tmp_path, process, workers, sentence):
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert error.splitlines()[-1] == sentence
    assert "Traceback" not in error and error.count("error: ") == 1
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["at work", "while the workers start"])
def test_ctrl_c_leaves_nothing_behind(tmp_path, moment):
    with collection(tmp_path, at_work=moment == "at work") as (process, workers):
        os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches every process of the terminal
        sentence = f"error: interrupted: nothing was written to {tmp_path / 'data'}."
        assert_one_sentence_and_nothing_left(tmp_path, process, workers, sentence)


def test_sigterm_leaves_nothing_behind(tmp_path):
    with collection(tmp_path) as (process, workers):
        process.terminate()
        sentence = f"error: interrupted: nothing was written to {tmp_path / 'data'}."
        assert_one_sentence_and_nothing_left(tmp_path, process, workers, sentence)


def test_killed_worker_ends_the_collection_at_once(tmp_path):
    with collection(tmp_path, num_workers=2) as (process, workers):
        workers[0].kill()
        sentence = "error: a worker process has ended: it was killed, perhaps for lack of memory"
        start = time.time()
        error = process.communicate(timeout=120)[1]
        assert time.time() - start < 30  # it was for ever
        assert process.returncode == 1 and error.splitlines()[-1].startswith(sentence)
        assert "Traceback" not in error and error.count("error: ") == 1
        assert psutil.wait_procs(workers, timeout=30)[1] == []
        assert list(tmp_path.iterdir()) == []


def test_workers_of_a_killed_collection_end_and_the_next_one_removes_what_is_left(tmp_path):
    with collection(tmp_path, num_workers=2) as (process, workers):
        process.kill()
        process.wait()
        assert psutil.wait_procs(workers, timeout=30)[1] == []
        (leftover,) = (path for path in tmp_path.iterdir() if path.is_dir())  # the other one is the file of its lock
        assert leftover.name.startswith(".data.") and sum(file.stat().st_size for file in leftover.iterdir()) > 1e6
    collect_data.collect(collect_data.Args(num_episodes=4, output=tmp_path / "data", num_workers=1))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_sigterm_acts_as_before_when_a_collection_is_over(tmp_path):
    for handler in (signal.SIG_DFL, lambda *_: None):
        before = signal.signal(signal.SIGTERM, handler)
        try:
            with pytest.raises(KeyboardInterrupt, match="nothing was written to place"):
                with collect_data.explain_interrupts("place"):
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(1)
            assert signal.getsignal(signal.SIGTERM) is handler
        finally:
            signal.signal(signal.SIGTERM, before)


def test_program_without_a_main_guard_gets_one_error(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import pathlib\nimport collect_data\nprint('started', flush=True)\n"
        "collect_data.collect(collect_data.Args(output=pathlib.Path('data'), num_workers=2))\n"
    )
    process = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parent)},
    )  # fmt: skip
    assert process.returncode == 1
    assert process.stderr.count("Traceback") == 1  # of the program's own
    assert process.stderr.splitlines()[-1].startswith("common.UserError: a worker process has ended")
    assert process.stderr.splitlines()[-1].endswith("outside of `if __name__ == '__main__':`, which is needed.")
    assert process.stdout.count("started") <= 3  # itself and two workers, none of them twice
    assert [path.name for path in tmp_path.iterdir()] == ["program.py"]
