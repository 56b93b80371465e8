"""What all training scripts promise: seeds, resuming, evaluation, the exported policy, one sentence for a mistake."""

import ast
import contextlib
import dataclasses
import difflib
import json
import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import typing
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

import bc
import common
import cvl
import laeo
import oril
import purl
import tailo

ROOT = Path(common.__file__).parent
SCRIPTS = {"laeo": laeo, "bc": bc, "oril": oril, "purl": purl, "tailo": tailo, "cvl": cvl}
OF_IMAGES = {name: script for name, script in SCRIPTS.items() if script is not cvl}
CASES = [(script, False) for script in SCRIPTS.values()] + [(script, True) for script in OF_IMAGES.values()]
CPU = torch.device("cpu")
METRICS = {
    "laeo": {
        "critic_loss", "categorical_accuracy", "logits_positive", "logits_negative", "bc_loss", "value_data",
        "value_policy", "policy_std",
    },
    "bc": {"bc_loss", "action_error", "policy_std"},
    "cvl": {
        "critic_loss", "categorical_accuracy", "bc_loss", "reward_futures", "value_data", "value_policy", "policy_std",
    },
    "oril": {"reward_loss", "critic_loss", "bc_loss", "reward_examples", "reward_data", "q_data", "q_policy"},
    "tailo": {"policy_loss", "bc_loss", "weight", "effective_share", "policy_std"},
}  # fmt: skip
METRICS["purl"] = METRICS["oril"]
LABELLED = {f"heldout/{name}_{label}" for name in ("reward", "q") for label in ("success", "failure", "start")}
EVALUATED = {"success_rate", "final_success_rate", "initial_success_rate", "discounted_return", "return"}


@pytest.fixture(params=SCRIPTS)
def script(request):
    return SCRIPTS[request.param]


def small_args(script, dataset, run_dir, **kwargs):
    defaults = {"env_id": "FetchReach", "gradient_steps": 40, "batch_size": 32, "hidden_dim": 32, "repr_dim": 8}
    defaults |= {"num_success": 10, "log_interval": 10, "eval_interval": 0, "eval_episodes": 0, "device": "cpu"}
    defaults |= {"classifier_steps": 20}
    if script is cvl and dataset and (Path(dataset) / "rewards.npy").exists():
        defaults["reward"] = "rewards"  # of data without success flags
    defaults = {name: value for name, value in defaults.items() if hasattr(script.Args, name)}
    return script.Args(dataset=dataset, run_dir=run_dir, **{**defaults, **kwargs})


FINISHED = {"eval_interval": 20, "eval_episodes": 2, "holdout_fraction": 0.5, "checkpoint_minutes": 0}


@pytest.fixture(scope="module")
def finished(reach_dataset, tmp_path_factory):
    """One finished run of each script: {name: directory}. Tests read it, or work on a copy."""
    runs = {}
    for name, script in SCRIPTS.items():
        runs[name] = tmp_path_factory.mktemp("finished") / name
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        script.train(small_args(script, reach_dataset, runs[name], **FINISHED))
    return runs


def load_checkpoint(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def final_weights(run_dir):
    checkpoint = load_checkpoint(run_dir)
    parts = [part for part in ("actor", "critic", "networks") if part in checkpoint]
    return {f"{part}.{name}": value for part in parts for name, value in checkpoint[part].items()}


def assert_same_bits(one, other):
    assert len(one) >= 8 and one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_same_checkpoints(one, other):
    """Networks, target networks and the optimiser's moments, to the bit."""
    assert_same_bits(final_weights(one), final_weights(other))
    one, other = (load_checkpoint(run_dir) for run_dir in (one, other))
    assert one["step"] == other["step"] and one.keys() == other.keys()
    one, other = one["optimizer"], other["optimizer"]
    assert one["param_groups"] == other["param_groups"] and one["state"].keys() == other["state"].keys()
    for i, moments in one["state"].items():
        assert set(moments) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, other["state"][i][name]) for name, value in moments.items())


def read_metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def refuse(script, args, message, after_start=False):
    """`train` must raise UserError with this message in one line; return it. Before the start, nothing is written."""
    existed = after_start or (args.run_dir is not None and args.run_dir.exists())
    with pytest.raises(common.UserError, match=message) as caught:
        script.train(args)
    assert "\n" not in str(caught.value) and not str(caught.value).startswith("error")
    assert args.run_dir is None or existed or not args.run_dir.exists()
    return str(caught.value)


def run_script(script, *flags):
    """Run a script as from the command line, in this process; return the message that it ends with, or None."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__file__, *map(str, flags)])
        try:
            runpy.run_path(script.__file__, run_name="__main__")
        except SystemExit as end:
            return end.code


def stop_after(script, steps, args):
    """Stop a run in the middle of the step that follows `steps` steps, of which each has a checkpoint."""
    original, calls = script.update, []

    def update(*arguments):
        if len(calls) == steps:
            raise KeyboardInterrupt
        calls.append(1)
        original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "update", update)
        with pytest.raises(KeyboardInterrupt):
            script.train(dataclasses.replace(args, checkpoint_minutes=0))
    assert not (args.run_dir / "result.json").exists()


def save_points(path, episodes=12, one_length=None, **changes):
    """Write a dataset of random numbers: observations of 3 numbers, 2 actions between -2 and 2, 20 examples."""
    rng = np.random.default_rng(0)
    lengths = np.full(episodes, one_length) if one_length else rng.integers(3, 7, episodes)
    arrays = {
        "observations": [rng.normal(size=(n + 1, 3)) for n in lengths],
        "actions": [rng.uniform(-2, 2, (n, 2)) for n in lengths],
        "success_examples": rng.normal(size=(20, 3)),
        "rewards": [rng.normal(size=n) for n in lengths],
    }
    common.save_dataset(path, **(arrays | changes))
    return path


def save_images(path):
    rng = np.random.default_rng(0)
    observations = [rng.integers(0, 256, (6, 16, 20, 3)) for _ in range(8)]
    actions = [rng.uniform(-2, 2, (5, 2)) for _ in range(8)]
    examples, rewards = rng.integers(0, 256, (12, 16, 20, 3)), rng.normal(size=(8, 5))
    common.save_dataset(path, observations, actions, examples, rewards=rewards)
    return path


class Scripted(gym.Env):
    """Episodes that are known beforehand: infos[0] at the reset and infos[t] after action t, with reward t."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Box(-2, 2, (2,), np.float32)

    def __init__(self, infos, ends="truncated", starts=(0,)):
        self.infos, self.ends, self.starts, self.episode = infos, ends, starts, -1

    def observe(self):
        return np.array([self.starts[self.episode % len(self.starts)], self.t, 0], np.float32)

    def reset(self, *, seed=None, options=None):
        self.episode, self.t = self.episode + 1, 0
        return self.observe(), dict(self.infos[0])

    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1
        end = self.t == len(self.infos) - 1
        flags = [end and self.ends == name for name in ("terminated", "truncated")]
        return self.observe(), float(self.t), *flags, dict(self.infos[self.t])


@pytest.fixture
def register():
    """A function that registers a Scripted environment for the time of the test and returns its id."""
    made = []

    def add(**kwargs):
        made.append(f"Scripted{len(made)}-v0")
        gym.register(made[-1], Scripted, kwargs=kwargs)
        return made[-1]

    yield add
    for env_id in made:
        gym.registry.pop(env_id)


# ------------------------------------------------------------------------------------------------------- determinism


def test_same_seed_gives_the_same_bits_whatever_is_evaluated_or_logged(script, reach_dataset, finished, tmp_path):
    run = {name: small_args(script, reach_dataset, tmp_path / name, holdout_fraction=0.5) for name in ("quiet", "seed")}
    script.train(dataclasses.replace(run["quiet"], log_interval=1000, checkpoint_minutes=5.0))
    often = dataclasses.replace(run["quiet"], eval_interval=10, eval_episodes=1, log_interval=1)
    script.train(dataclasses.replace(often, run_dir=tmp_path / "often"))
    script.train(dataclasses.replace(run["seed"], seed=1))
    for name in ("quiet", "often"):
        assert_same_checkpoints(finished[script.__name__], tmp_path / name)
    one, other = final_weights(finished[script.__name__]), final_weights(tmp_path / "seed")
    name = next(name for name in one if name.endswith("actor.net.0.weight"))
    assert not torch.equal(one[name], other[name])


def test_global_random_state_changes_nothing(script, reach_dataset, finished, tmp_path):
    """Every draw comes from a generator of the run's own seed, and none of the training's from a global one."""
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()  # noqa: NPY002
    script.train(small_args(script, reach_dataset, tmp_path / "run", **FINISHED))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (str(np.random.get_state()), random.getstate()) == before[1:]  # noqa: NPY002
    assert_same_checkpoints(tmp_path / "run", finished[script.__name__])


def tensors(batch):
    """Return all tensors of a batch, also those in its lists."""
    values = [x for field in batch for x in (field if isinstance(field, list) else [field])]
    return [x for x in values if x is not None]


def equal(one, other):
    return len(tensors(one)) == len(tensors(other)) and all(map(torch.equal, tensors(one), tensors(other)))


@pytest.mark.parametrize("script, images", CASES)
def test_a_batch_depends_on_the_data_the_seed_and_the_step_alone(script, images, tmp_path):
    dataset = (save_images if images else save_points)(tmp_path / "data")
    args = small_args(script, dataset, None, batch_size=8, **({"random_shift": 2} if images else {}))  # of ten examples
    data = script.load_data(args, CPU)[1]
    once = [script.sample(data, args, step) for step in range(6)]
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    with ThreadPoolExecutor(2) as threads:  # in another order, in other threads, with other flags
        other = dataclasses.replace(args, gradient_steps=7, learning_rate=0.5, log_interval=1, run_dir=tmp_path)
        again = list(threads.map(lambda step: script.sample(data, other, step), reversed(range(6))))[::-1]
    assert all(map(equal, once, again))
    shifts = {"bc": 1, "tailo": 1, "laeo": 2}.get(script.__name__, 3)
    assert len(tensors(once[0])) == {"bc": 2, "tailo": 3, "laeo": 6, "cvl": 5}.get(script.__name__, 6) + images * shifts
    for one, other in combinations(once, 2):
        assert not any(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other)) if a.unique().numel() > 1)
    seed = script.sample(data, dataclasses.replace(args, seed=1), 3)
    same_data = data._replace(train=data.batches, heldout=data.batches)
    for other in (seed, *(script.sample(same_data, args, 3, use) for use in ("train", "heldout"))):
        assert not any(torch.equal(a, b) for a, b in zip(tensors(once[3]), tensors(other)) if a.unique().numel() > 1)


def test_weights_batches_metrics_and_evaluation_draw_from_different_streams(script, reach_dataset, tmp_path):
    used, original = [], common.seed_sequence

    def seed_sequence(seed, stream, index=0):
        used.append((seed, stream, index))
        return original(seed, stream, index)

    args = small_args(script, reach_dataset, tmp_path / "run", gradient_steps=10, log_interval=5, seed=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "seed_sequence", seed_sequence)
        script.train(dataclasses.replace(args, eval_episodes=2, eval_interval=5))
    assert {seed for seed, _, _ in used} == {7}
    expected = [("weights", 0), ("split", 0), *(("batches", step) for step in range(11))]  # one batch is drawn ahead
    before = 1000 if script is laeo else 0  # steps of the classifier, which has batches of the same stream
    expected += [("batches", step) for step in range(before)]
    expected += [("metrics", step) for step in (5, 5, 10, 10)] + 3 * [("evaluation", i) for i in range(2)]
    assert Counter((stream, index) for _, stream, index in used) == Counter(expected)
    states = {original(*key).generate_state(4, np.uint64).tobytes() for key in set(used)}
    assert len(states) == len(set(used)) == 1 + 1 + max(11, before) + 2 + 2


# ------------------------------------------------------------------------------------- defaults for states and images


@pytest.mark.parametrize("images", [False, True], ids=["states", "images"])
@pytest.mark.parametrize("script", OF_IMAGES.values())
def test_flags_that_are_not_given_have_a_default_for_states_and_one_for_images(script, images, tmp_path):
    """And those that are given stay, also a zero."""
    dataset = (save_images if images else save_points)(tmp_path / "data")
    flags = {"gradient_steps": 7, "batch_size": 5, "random_shift": 0}
    flags |= {laeo: {"policy_objective": "f"}, tailo: {"classifier_steps": 4}}.get(script, {})
    assert set(script.DEFAULTS) == set(flags)
    for given in ({}, *({name: value} for name, value in flags.items()), flags):
        own = {} if script is bc else {"num_success": 3}
        args = script.Args(env_id="own", dataset=dataset, eval_episodes=0, **given, **own)
        assert all(getattr(args, name) in (None, "auto") for name in flags.keys() - given.keys())
        expected = vars(args) | {name: script.DEFAULTS[name][images] for name in flags} | given
        data = script.load_data(args, CPU)[1]
        assert vars(args) == expected and all(type(getattr(args, name)) is type(flags[name]) for name in flags)
        assert len(script.sample(data, args, 0).action) == args.batch_size
    assert script.DEFAULTS["random_shift"][0] == 0  # else states would be refused


@pytest.mark.parametrize("script", OF_IMAGES.values())
def test_help_names_the_defaults_for_states_and_for_images(script):
    source = Path(script.__file__).read_text()
    for name, (states, pictures) in script.DEFAULTS.items():
        ((_, text),) = [line.split("  # ") for line in source.splitlines() if line.startswith(f"    {name}: ")]
        shown = {"random_shift": f"for images, {pictures}:", "policy_objective": f"{states}; for images {pictures}"}
        assert (shown[name] if name in shown else f"states {states:,}, images {pictures:,}") in text, name


@pytest.mark.parametrize("images", [False, True], ids=["states", "images"])
@pytest.mark.parametrize("script", OF_IMAGES.values())
def test_a_run_keeps_the_defaults_that_it_began_with(script, images, tmp_path, monkeypatch):
    """In its result, and when it is resumed, even by a version with others; the caller's flags stay as they were."""
    dataset = (save_images if images else save_points)(tmp_path / "data")
    defaults = {"gradient_steps": (4, 3), "batch_size": (6, 5), "random_shift": (0, 1)}
    others = {"gradient_steps": (9, 9), "batch_size": (9, 9), "random_shift": (0, 3)}
    if script is laeo:
        defaults["policy_objective"], others["policy_objective"] = ("f", "exp_f"), ("exp_f", "f")
        monkeypatch.setattr(laeo, "FEW", 1)  # below which there is a third default
    if script is tailo:
        defaults["classifier_steps"], others["classifier_steps"] = (3, 2), (9, 9)
    monkeypatch.setattr(script, "DEFAULTS", defaults)
    flags = {"hidden_dim": 8, "channels": 2, "eval_episodes": 0, "log_interval": 1, "device": "cpu"}
    flags |= {} if script is bc else {"num_success": 3}
    args = script.Args(env_id="own", dataset=dataset, run_dir=tmp_path / "whole", **flags)
    before = dict(vars(args))
    expected = {name: values[images] for name, values in defaults.items()}
    results = [script.train(args)]
    assert vars(args) == before
    stop_after(script, 2, dataclasses.replace(args, run_dir=tmp_path / "run"))
    monkeypatch.setattr(script, "DEFAULTS", others)
    results.append(script.train(script.Args(resume=tmp_path / "run")))
    for result, run in zip(results, ("whole", "run")):
        assert {name: result["args"][name] for name in expected} == expected
        assert {name: load_checkpoint(tmp_path / run)["args"][name] for name in expected} == expected
    assert_same_checkpoints(tmp_path / "whole", tmp_path / "run")


# ----------------------------------------------------------------------------------------------- what is to be expected


@pytest.mark.parametrize("env_id", ["FetchPush", "points"])
def test_progress_begins_with_the_success_of_the_readme(script, env_id, tmp_path, monkeypatch, capsys):
    """Where there is one, before the steps that are done and how long the others take."""
    monkeypatch.setattr(script, "fit_log_ratio", lambda encoder, data, *_: data.log_ratio, raising=False)
    args = small_args(script, save_points(tmp_path / "data"), tmp_path / "run", env_id=env_id, gradient_steps=3)
    script.train(args)
    known = f" (README, default flags: {script.README[env_id]})" if env_id in script.README else ""
    title = f"{script.__name__} on {env_id}{known}: "
    lines = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if line.startswith(script.__name__)]
    assert lines and all(line.startswith(title) for line in lines)
    assert re.search(r"0/3 \[\d\d:\d\d<", lines[0]) and re.search(r"3/3 \[\d\d:\d\d<\d\d:\d\d", lines[-1])


def test_success_that_is_named_is_that_of_the_readmes_table():
    """The method's row of the task, at any step and at the last one."""
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (\w+) \| (\w+) \| \**([\d.]+) \[[^|]*\| \**([\d.]+) \[", text, re.M)
    table = {(task, method.lower()): f"{once} / {last}" for task, method, once, last in rows}
    assert len(table) == len(rows) >= 16
    for name, script in SCRIPTS.items():
        assert "FetchPush" in script.README or script in (tailo, cvl)  # whose tables are on their pages
        assert script.README == {task: table[task, name] for task in script.README}


# -------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("steps", [17, 20])
def test_stopped_and_resumed_run_gives_the_same_bits(script, steps, reach_dataset, finished, tmp_path):
    """After an odd number of steps, as what happens in every second step must not shift, and after an evaluation."""
    stop_after(script, steps, small_args(script, reach_dataset, tmp_path / "run", **FINISHED))
    assert load_checkpoint(tmp_path / "run")["step"] == steps
    update, calls = script.update, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "update", lambda *args: (calls.append(1), update(*args)))
        result = script.train(script.Args(resume=tmp_path / "run"))
    assert len(calls) == 40 - steps
    whole = finished[script.__name__]
    assert_same_checkpoints(whole, tmp_path / "run")
    assert (whole / "metrics.jsonl").read_text() == (tmp_path / "run" / "metrics.jsonl").read_text()
    assert result["args"]["gradient_steps"] == 40
    before = json.loads((whole / "result.json").read_text())
    for name in before.keys() - {"args", "seconds"}:
        assert result[name] == before[name], name
    assert_tensorboard_shows_the_metrics(tmp_path / "run")


@pytest.mark.parametrize("script", OF_IMAGES.values())
def test_images_that_are_shifted_resume_to_the_same_bits(script, tmp_path):
    """In their file, as on every CPU, and with the thread that draws ahead."""
    dataset = save_images(tmp_path / "data")
    args = small_args(script, dataset, tmp_path / "whole", channels=4, random_shift=2, gradient_steps=12)
    script.train(args)
    stop_after(script, 7, dataclasses.replace(args, run_dir=tmp_path / "run"))
    script.train(script.Args(resume=tmp_path / "run"))
    assert_same_checkpoints(tmp_path / "whole", tmp_path / "run")
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == (tmp_path / "run" / "metrics.jsonl").read_text()


def scalars(run_dir):
    """Return {(tag, step): values} of what TensorBoard shows of a run."""
    events, found = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload(), {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            found.setdefault((tag, event.step), []).append(event.value)
    return found


def assert_tensorboard_shows_the_metrics(run_dir):
    rows = [(row.pop("step"), row) for row in read_metrics(run_dir)]
    expected = {(name, step): value for step, row in rows for name, value in row.items()}
    shown = scalars(run_dir)
    assert shown.keys() == expected.keys()
    for key, values in shown.items():  # an evaluation after the last checkpoint is made again, with the same results
        assert len(values) <= 1 + key[0].startswith("eval/")
        assert values == pytest.approx([expected[key]] * len(values), rel=1e-6), key


@pytest.mark.parametrize(
    "script",
    [name if name in ("laeo", "oril") else pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS],
    indirect=True,
)
def test_killed_and_resumed_run_gives_the_same_bits(script, reach_dataset, tmp_path, monkeypatch):
    """kill -9 in a process of its own; the run's dataset has a relative path, and it is resumed from elsewhere."""
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(reach_dataset, first / "data")
    second.mkdir()
    flags = {"gradient_steps": 120, "batch_size": 32, "hidden_dim": 32, "log_interval": 7, "eval_interval": 40}
    flags |= {"eval_episodes": 1, "checkpoint_minutes": 0, "dataset": "data", "run_dir": "run", "device": "cpu"}
    flags |= {"classifier_steps": 20} if script is tailo else {}
    command = [sys.executable, script.__file__]
    command += [text for name, value in flags.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=first, stdout=log, stderr=log)
        metrics, deadline = first / "run" / "metrics.jsonl", time.monotonic() + 600
        while not (metrics.exists() and '"step": 28,' in metrics.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not (first / "run" / "result.json").exists()
    step = load_checkpoint(first / "run")["step"]
    assert 27 <= step < 120
    with open(metrics, "a") as file:  # as if it had gone on for a while, and been killed while it wrote a line
        file.write('{"step": 900, "train/policy_std": 1.0}\n{"step": 907, "tra')

    monkeypatch.chdir(second)
    assert run_script(script, "--resume", "../first/run") is None
    assert sorted(second.iterdir()) == []
    flags |= {"dataset": reach_dataset, "run_dir": tmp_path / "whole"}
    script.train(script.Args(**flags))
    assert_same_checkpoints(tmp_path / "whole", first / "run")
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == metrics.read_text()
    assert_tensorboard_shows_the_metrics(tmp_path / "whole")
    assert_tensorboard_shows_the_metrics(first / "run")


def test_tensorboard_has_all_that_a_checkpoint_has(script, tmp_path, monkeypatch):
    """However slow its thread is: a resumed run does not write again what came before the checkpoint."""
    write, write_file, found = RecordWriter.write, common.write_file, []

    def look_and_write(path):
        if path.name == "checkpoint.pt":
            assert_tensorboard_shows_the_metrics(path.parent)
            found.append(len(scalars(path.parent)))
        return write_file(path)

    monkeypatch.setattr(RecordWriter, "write", lambda *args: (time.sleep(0.005), write(*args)))
    monkeypatch.setattr(common, "write_file", look_and_write)
    args = small_args(script, save_points(tmp_path / "data"), tmp_path / "run", env_id="points", gradient_steps=4)
    script.train(dataclasses.replace(args, log_interval=2, checkpoint_minutes=0))
    assert len(found) == 4 and 0 == found[0] < found[1] == found[2] < found[3]


def test_standard_dataset_is_found_from_another_directory(script, reach_dataset, tmp_path, monkeypatch):
    """Case 11: it is not made again there."""
    shutil.copytree(reach_dataset, tmp_path / "first" / "datasets" / "FetchReach-medium")
    (tmp_path / "second").mkdir()
    monkeypatch.chdir(tmp_path / "first")
    stop_after(script, 3, small_args(script, None, tmp_path / "run", gradient_steps=4))
    monkeypatch.chdir(tmp_path / "second")
    result = script.train(script.Args(resume=tmp_path / "run"))
    assert result["args"]["dataset"] == str(tmp_path / "first" / "datasets" / "FetchReach-medium")
    assert list((tmp_path / "second").iterdir()) == []


def test_resume_takes_a_copy_of_the_dataset_and_no_other(script, reach_dataset, tmp_path):
    shutil.copytree(reach_dataset, tmp_path / "data")
    args = small_args(script, tmp_path / "data", tmp_path / "run", gradient_steps=4)
    script.train(dataclasses.replace(args, run_dir=tmp_path / "whole"))
    stop_after(script, 3, args)
    (tmp_path / "data").rename(tmp_path / "moved")
    refuse(script, script.Args(resume=tmp_path / "run"), r"there is no dataset .*data; .*--dataset")
    changed = shutil.copytree(tmp_path / "moved", tmp_path / "changed")
    actions = np.load(changed / "actions.npy")
    actions[3, 2] = -actions[3, 2]
    np.save(changed / "actions.npy", actions)
    message = r"run cannot be resumed \(ValueError: its dataset was another one\)"
    refuse(script, script.Args(resume=tmp_path / "run", dataset=changed), message)
    script.train(script.Args(resume=tmp_path / "run", dataset=tmp_path / "moved"))
    assert_same_checkpoints(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("name", ["observations", "success_examples"])
def test_resume_refuses_data_with_other_observations_or_examples(script, name, reach_dataset, tmp_path):
    stop_after(script, 2, small_args(script, reach_dataset, tmp_path / "run", gradient_steps=3))
    changed = shutil.copytree(reach_dataset, tmp_path / "changed")
    np.save(changed / f"{name}.npy", np.load(changed / f"{name}.npy") + np.float32(0.01))
    refuse(script, script.Args(resume=tmp_path / "run", dataset=changed), "its dataset was another one")


@pytest.mark.parametrize(
    "flags", [["--gradient-steps", "40000"], ["--seed", "0"], ["--seed=0"], ["--no-verify"], ["--batch_size", "256"]]
)
def test_no_other_flag_is_taken_beside_resume(script, flags, finished, tmp_path):
    """Case 12, and flags with their default value, which only the command line tells from no flag."""
    run = shutil.copytree(finished[script.__name__], tmp_path / "run")
    before = {path: path.read_bytes() for path in run.iterdir()}
    message = run_script(script, "--resume", run, *flags)
    name = flags[0].split("=")[0].lstrip("-").replace("-", "_").removeprefix("no_")
    assert name in message.replace("-", "_") and "learning rate" in message
    assert message.startswith("error: --resume ") and "\n" not in message
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_no_other_flag_is_taken_beside_resume_in_a_program(script, finished, tmp_path):
    for flags, name in (
        ({"seed": 1}, "seed"),
        ({"gradient_steps": 50}, "gradient.steps"),
        ({"verify": True}, "verify"),
    ):
        message = refuse(script, script.Args(resume=finished[script.__name__], **flags), f"^--resume .*{name}")
        assert "learning rate" in message


def test_resumed_finished_run_gives_its_result_again(script, finished, tmp_path):
    run = shutil.copytree(finished[script.__name__], tmp_path / "run")
    (run / "result.json").unlink()
    (run / "policy.pt2").unlink()
    result, before = script.train(script.Args(resume=run)), finished[script.__name__]
    first = json.loads((before / "result.json").read_text())
    assert {name: result[name] for name in first.keys() - {"args", "seconds"}} == {
        name: first[name] for name in first.keys() - {"args", "seconds"}
    }
    assert (run / "metrics.jsonl").read_text() == (before / "metrics.jsonl").read_text()
    assert (run / "policy.pt2").exists() and (run / "result.json").exists()


def test_clocks_go_on_after_a_resume(script, reach_dataset, tmp_path):
    """From a checkpoint in the middle, whose clocks are set to times that no test takes."""
    stop_after(script, 3, small_args(script, reach_dataset, tmp_path / "run", gradient_steps=6, eval_episodes=1))
    path = tmp_path / "run" / "checkpoint.pt"
    checkpoint = load_checkpoint(tmp_path / "run")
    assert min(checkpoint["seconds"][name] for name in ("data", "training")) > 0
    before = {"data": 1e4, "training": 2e4, "evaluation": 3e4}
    torch.save({**checkpoint, "seconds": dict(before)}, path)
    seconds = script.train(script.Args(resume=tmp_path / "run"))["seconds"]
    assert seconds.keys() == before.keys()
    assert all(0 < seconds[name] - before[name] < 1000 for name in before)


def edited(run_dir, path, **changes):
    """Copy a run with changes to its checkpoint's entries; None drops an entry. Return the copy's directory."""
    shutil.copytree(run_dir, path)
    content = {key: value for key, value in {**load_checkpoint(run_dir), **changes}.items() if value is not None}
    torch.save(content, path / "checkpoint.pt")
    return path


def test_run_is_not_resumed_by_another_method(finished):
    for script in SCRIPTS.values():
        for name in SCRIPTS.keys() - {script.__name__}:
            message = rf"{name} cannot be resumed \(.*it is a run of {name}.py"
            refuse(script, script.Args(resume=finished[name]), message)


def damaged_checkpoints(script, run_dir):
    """Return {case: entries that differ from a real checkpoint's}."""
    checkpoint = load_checkpoint(run_dir)
    part = "networks" if "networks" in checkpoint else "actor"
    networks, name = checkpoint[part], "actor.net.0.weight" if part == "networks" else "net.0.weight"
    state, groups = checkpoint["optimizer"]["state"], checkpoint["optimizer"]["param_groups"]
    cases = {
        "a flag that is gone": {"args": {**checkpoint["args"], "a_flag_that_is_gone": 1}},
        "no flags": {"args": None},
        "no method": {"method": None},
        "a network with other names": {part: {"other" if k == name else k: x for k, x in networks.items()}},
        "a network with another shape": {part: {**networks, name: networks[name][:, :-1]}},
        "no network": {part: None},
        "no optimizer": {"optimizer": None},
        "an optimizer of nothing": {"optimizer": {}},
        "fewer parameters in the optimizer": {
            "optimizer": {"state": state, "param_groups": [{**group, "params": [0]} for group in groups]}
        },
        "no step": {"step": None},
        "no length of metrics.jsonl": {"log_size": None},
        "no clocks": {"seconds": None},
        "one clock": {"seconds": {"data": 1.0}},
        "a step that is text": {"step": "three"},
        "a length that is text": {"log_size": "long"},
        "a step behind the end": {"step": 5},
        "no dataset": {"dataset": None},
    }
    return cases


NUMBERS = {"no length of metrics.jsonl", "a length that is text", "no clocks", "one clock"}


@pytest.mark.parametrize("numbers", [False, True], ids=["parts", "numbers"])
def test_checkpoint_of_another_version_gets_one_sentence(script, numbers, tmp_path):
    args = small_args(script, save_points(tmp_path / "data"), tmp_path / "run", env_id="points", gradient_steps=4)
    script.train(args)
    failures, cases = [], damaged_checkpoints(script, args.run_dir)
    assert cases.keys() > NUMBERS
    for case in [case for case in cases if (case in NUMBERS) == numbers]:
        copy = edited(args.run_dir, tmp_path / case.replace(" ", "-"), **cases[case])
        before = {path: path.read_bytes() for path in copy.iterdir()}
        try:
            refuse(script, script.Args(resume=copy), f"{copy.name} cannot be resumed")
            assert {path: path.read_bytes() for path in copy.iterdir()} == before
        except (AssertionError, pytest.fail.Exception, LookupError, TypeError) as failure:
            failures.append((case, failure))
    assert failures == []


class Trap:
    """A value that creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_damaged_checkpoint_gets_one_sentence_and_runs_no_code(script, finished, tmp_path):
    run = shutil.copytree(finished[script.__name__], tmp_path / "run")
    path, touched = run / "checkpoint.pt", tmp_path / "touched"
    content = path.read_bytes()
    for damage in (b"", b"not a checkpoint", b"PK\x03\x04 cut off", content[:-1000], content[:100]):
        path.write_bytes(damage)
        refuse(script, script.Args(resume=run), r"run cannot be resumed \(.*\); if it was stopped before its first")
    for other in (
        [torch.zeros(3)],
        None,
        {"args": None},
        {**load_checkpoint(finished["bc"]), "args": 3},
    ):
        torch.save(other, path)
        refuse(script, script.Args(resume=run), "run cannot be resumed")
    for trap in ({**load_checkpoint(finished[script.__name__]), "trap": Trap(touched)}, Trap(touched)):
        torch.save(trap, path)
        refuse(script, script.Args(resume=run), "run cannot be resumed")
    assert not touched.exists()
    torch.load(path, weights_only=False)
    assert touched.exists()  # the trap is a real one


def test_checkpoint_with_one_wrong_bit_is_refused(script, finished, tmp_path):
    """PyTorch reads it without a word: a weight is another one."""
    run = shutil.copytree(finished[script.__name__], tmp_path / "run")
    content = bytearray((run / "checkpoint.pt").read_bytes())
    weight = max(final_weights(run).values(), key=torch.numel).numpy().tobytes()
    content[content.index(weight)] ^= 1
    (run / "checkpoint.pt").write_bytes(content)
    assert load_checkpoint(run)["step"] > 0
    refuse(script, script.Args(resume=run), r"run cannot be resumed \(ValueError: the checksum of .* in it is wrong\)")


def test_run_that_was_killed_before_its_first_checkpoint_says_so(script, reach_dataset, tmp_path):
    args = small_args(script, reach_dataset, tmp_path / "run", eval_interval=10, eval_episodes=1)
    stop_after(script, 0, args)
    assert read_metrics(args.run_dir) and not (args.run_dir / "checkpoint.pt").exists()
    message = r"run cannot be resumed \(.*\); if it was stopped before its first checkpoint, start anew\.$"
    refuse(script, script.Args(resume=args.run_dir), message)
    refuse(script, script.Args(resume=tmp_path / "nowhere"), "nowhere cannot be resumed")
    assert not (tmp_path / "nowhere").exists()


# ------------------------------------------------------------------------------------ threads, processes, directories


def test_train_works_in_a_thread(script, reach_dataset, finished, tmp_path):
    """Case 15."""
    results = []
    args = small_args(script, reach_dataset, tmp_path / "run", **{**FINISHED, "eval_episodes": 0})
    thread = threading.Thread(target=lambda: results.append(script.train(args)))
    thread.start()
    thread.join()
    assert results[0]["method"] == script.__name__
    assert_same_checkpoints(finished[script.__name__], tmp_path / "run")


def test_train_works_in_a_pool_where_a_mistake_is_an_ordinary_exception(reach_dataset, finished, tmp_path):
    """Case 14: it comes back at once, and the same worker goes on."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for name, script in SCRIPTS.items():
            args = small_args(script, reach_dataset, tmp_path / name, learning_rate=2.0)
            with pytest.raises(common.UserError, match="--learning-rate is 2.0; it must be from 0 to 1"):
                pool.apply_async(script.train, (args,)).get(timeout=600)
        args = small_args(bc, reach_dataset, tmp_path / "run", **FINISHED)
        assert pool.apply_async(bc.train, (args,)).get(timeout=600)["method"] == "bc"
    assert_same_checkpoints(finished["bc"], tmp_path / "run")


def test_nine_runs_that_start_together_have_nine_directories(script, tmp_path, monkeypatch):
    """Case 16. Only the export is left out, which PyTorch does not promise for threads."""
    save_points(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.export, "save", lambda program, file: file.write(b"policy"))
    together = threading.Barrier(9)

    def run(_):
        together.wait(timeout=60)
        flags = {"policy_objective": "log_exp_f"} if script is laeo else {}  # without its thousand steps of p*/p
        args = small_args(script, tmp_path / "data", None, env_id="own/Points:v0", gradient_steps=1, **flags)
        return script.train(args)

    with ThreadPoolExecutor(9) as threads:
        results = list(threads.map(run, range(9)))
    directories = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert len(directories) == 9 and all(
        name.startswith(f"own-Points-v0__{script.__name__}__0__") for name in directories
    )
    assert {Path(result["args"]["run_dir"]).name for result in results} == set(directories)
    for name in directories:
        assert {"checkpoint.pt", "metrics.jsonl", "policy.pt2", "result.json"} < set(
            os.listdir(tmp_path / "runs" / name)
        )


def test_run_directory_is_not_used_twice(script, reach_dataset, finished, tmp_path):
    run = shutil.copytree(finished[script.__name__], tmp_path / "run")
    before = {path: path.read_bytes() for path in run.iterdir()}
    args = small_args(script, reach_dataset, run, gradient_steps=2)
    refuse(script, args, "run holds a run; choose another --run-dir, or --resume")
    assert {path: path.read_bytes() for path in run.iterdir()} == before


# -------------------------------------------------------------------------------------------- evaluation and results


class Still(torch.nn.Module):
    """A policy that never moves."""

    def forward(self, observation):
        assert observation.dtype == torch.float32 and observation.shape[0] == 1
        return torch.zeros(1, 2)


def test_of_two_runs_that_start_together_in_one_directory_one_is_refused(script, tmp_path, monkeypatch):
    """The other one has made metrics.jsonl after this one has looked for it."""
    args = small_args(script, save_points(tmp_path / "data"), tmp_path / "run", env_id="points")
    args.run_dir.mkdir()
    (args.run_dir / "metrics.jsonl").write_text("theirs")
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: path.name != "metrics.jsonl" and exists(path))
    refuse(script, args, "cannot write .*run: File exists")
    assert {path.name: path.read_text() for path in args.run_dir.iterdir()} == {"metrics.jsonl": "theirs"}


def test_evaluation_is_the_same_every_time_and_its_starts_are_its_own():
    policy = torch.nn.Linear(6, 4)
    with torch.no_grad():
        policy.weight.copy_(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
        policy.bias.zero_()
    results = bc.evaluate(policy, "SawyerWindowOpen", 12, 0, CPU)
    assert results == bc.evaluate(policy, "SawyerWindowOpen", 12, 0, CPU)
    one = results["episodes"]
    env, starts = common.make_env("SawyerWindowOpen"), []
    for episode, seed in enumerate(one["seed"]):
        assert seed == common.episode_seed(0, "evaluation", episode)
        observation, info = env.reset(seed=seed)
        starts.append(observation[3])
        assert info["success"] == one["initial_success"][episode]
    assert len(set(starts)) == 12 and one["episode"] == list(range(12))
    other = {common.episode_seed(0, stream, i) for stream in common.STREAMS for i in range(1000)}
    assert len(other) == 1000 * len(common.STREAMS)
    others = other - {common.episode_seed(0, "evaluation", i) for i in range(1000)}
    assert not others & set(one["seed"])
    assert not set(one["seed"]) & {common.episode_seed(1, "evaluation", i) for i in range(1000)}


@pytest.mark.parametrize("ends", ["terminated", "truncated"])
@pytest.mark.parametrize("key", ["success", "is_success"])
def test_evaluation_counts_success_as_documented(script, key, ends, register):
    """Solved at known times: before the first action, and after actions 1 and 3 of 4, which is not the last."""
    env_id = register(infos=[{key: t in (0, 1, 3)} for t in range(5)], ends=ends)
    results = script.evaluate(Still(), env_id, 2, 0, CPU)
    episodes = results["episodes"]
    assert episodes["success"] == [True, True] and episodes["final_success"] == [False, False]
    assert episodes["initial_success"] == [True, True]
    assert episodes["discounted_return"] == pytest.approx([1 + 0.99**2] * 2)
    assert episodes["return"] == [1 + 2 + 3 + 4] * 2
    rates = {name: results[name] for name in EVALUATED}
    expected = {"success_rate": 1, "final_success_rate": 0, "initial_success_rate": 1, "return": 10}
    assert rates == pytest.approx(expected | {"discounted_return": 1 + 0.99**2})


def test_evaluation_does_not_count_the_start_and_needs_no_flag_there(script, register):
    """A start that is solved is no success of the policy; an info without the flag means not solved."""
    env_id = register(infos=[{"success": True}, {"success": False}, {}])
    episodes = script.evaluate(Still(), env_id, 1, 0, CPU)["episodes"]
    assert episodes["success"] == episodes["final_success"] == [False] and episodes["initial_success"] == [True]
    env_id = register(infos=[{}, {"success": np.False_}, {"success": np.float32(1)}])
    episodes = script.evaluate(Still(), env_id, 1, 0, CPU)["episodes"]
    assert episodes["success"] == episodes["final_success"] == [True] and episodes["discounted_return"] == [0.99]


def test_equal_episodes_count_once_in_the_intervals(script, register):
    env_id = register(infos=[{"success": False}, {"success": True}], starts=[5, 5, 6])
    results = script.evaluate(Still(), env_id, 7, 0, CPU)
    assert results["episodes"]["episode"] == [0, 0, 1, 0, 0, 1, 0] and results["success_rate"] == 1
    interval = binomtest(2, 2).proportion_ci(method="wilson")
    assert results["success_interval"] == pytest.approx([interval.low, interval.high])
    interval = binomtest(0, 2).proportion_ci(method="wilson")
    assert results["initial_success_interval"] == pytest.approx([interval.low, interval.high])


def test_environment_that_says_nothing_of_success_gives_returns(script, register, tmp_path, capsys):
    env_id = register(infos=[{"other": True}] * 4, ends="terminated")
    args = small_args(script, save_points(tmp_path / "data"), tmp_path / "run", env_id=env_id, eval_episodes=3)
    result = script.train(dataclasses.replace(args, gradient_steps=2, log_interval=1))
    assert result["return"] == 6 and result["episodes"]["return"] == [6.0] * 3
    assert not any("success" in name for name in result) and "discounted_return" not in result
    assert "success was not measured" in capsys.readouterr().out
    names = {name for row in read_metrics(tmp_path / "run") for name in row if name.startswith("eval/")}
    assert names == {"eval/return"}


def test_no_evaluation_needs_no_environment(script, tmp_path, monkeypatch, capsys):
    def make_env(*args, **kwargs):
        raise AssertionError("an environment was made")

    monkeypatch.setattr(common, "make_env", make_env)
    args = small_args(script, save_points(tmp_path / "data"), tmp_path / "run", env_id="a-robot", eval_interval=5)
    result = script.train(args)
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == json.loads(json.dumps(result))
    assert not any("success" in name or "return" in name for name in result) and "episodes" not in result
    assert (tmp_path / "run" / "policy.pt2").stat().st_size > 1000
    names = {name for row in read_metrics(tmp_path / "run") for name in row} - {"step"}
    expected = {f"{part}/{kind}" for part in ("train", "heldout") for kind in METRICS[script.__name__]}
    assert names == expected | ({"heldout/reward_start", "heldout/q_start"} if script in (oril, purl) else set())
    assert "success was not measured" in capsys.readouterr().out


def test_result_and_metrics_hold_what_the_readme_promises(script, finished, reach_dataset):
    run = finished[script.__name__]
    result = json.loads((run / "result.json").read_text())
    intervals = {name.replace("rate", "interval") for name in EVALUATED if name.endswith("rate")}
    content = EVALUATED | intervals | {"episodes", "method", "args", "dataset", "seconds", "versions"}
    assert set(result) - {"gpu", "peak_gpu_bytes"} == content
    for name in ("success", "final_success", "initial_success"):
        assert result[f"{name}_rate"] == np.mean(result["episodes"][name])
        interval = binomtest(result["episodes"][name][0], 1).proportion_ci(method="wilson")  # one episode, played twice
        assert result[f"{name}_interval"] == pytest.approx([interval.low, interval.high])
    assert result["episodes"]["episode"] == [0, 0]
    for name in ("return", "discounted_return"):
        assert result[name] == np.mean(result["episodes"][name])
    assert len(set(result["episodes"]["seed"])) == 2
    assert all(len(values) == 2 for values in result["episodes"].values())
    assert set(result["seconds"]) == {"data", "training", "evaluation"} and min(result["seconds"].values()) > 0
    assert result["versions"]["mujoco"] == "3.3.0" and result["method"] == script.__name__
    assert result["args"]["dataset"] == str(reach_dataset) and result["args"]["gradient_steps"] == 40
    assert set(result["args"]) == {field.name for field in dataclasses.fields(script.Args)}
    lines = read_metrics(run)
    steps = {prefix: [row["step"] for row in lines if any(name.startswith(prefix) for name in row)] for prefix in "the"}
    assert steps == {"t": [10, 20, 30, 40], "h": [10, 20, 30, 40], "e": [0, 20, 40]}
    names = {name for line in lines for name in line} - {"step"}
    expected = {f"{part}/{kind}" for part in ("train", "heldout") for kind in METRICS[script.__name__]}
    expected |= {f"eval/{name}" for name in EVALUATED}
    assert names == expected | (LABELLED if script in (oril, purl) else set())
    last = [line for line in lines if "eval/return" in line][-1]
    assert all(last[f"eval/{name}"] == result[name] for name in EVALUATED)
    assert any("tfevents" in path.name for path in run.iterdir())
    assert_tensorboard_shows_the_metrics(run)


LOAD_POLICY = """
import importlib.util, sys
import numpy as np, torch
ours = "common", "laeo", "bc", "oril", "purl", "tailo", "cvl", "robot_tasks"
assert not any(importlib.util.find_spec(name) for name in ours)
for path, observations, output in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3]):
    policy = torch.export.load(path).module()
    x = torch.from_numpy(np.load(observations))
    np.save(output, np.concatenate([policy(x[:n]).detach().numpy() for n in (1, 2, 7, 300)]))
    empty = policy.to("meta")(x[:7].to("meta"))
    assert empty.device.type == "meta" and empty.shape == (7, *np.load(output).shape[1:])
"""


def network_actor(script, run_dir):
    """Return the policy network with a checkpoint's weights."""
    checkpoint, generator = load_checkpoint(run_dir), torch.Generator()
    prefix, weights = ("actor.", checkpoint["networks"]) if "networks" in checkpoint else ("", checkpoint["actor"])
    weights = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
    args = script.Args(**checkpoint["args"])
    statistics = weights["encoder.observation_mean"], weights["encoder.observation_std"]
    encoder = script.Encoder(*statistics, *(() if script is cvl else (args, generator)))
    actor = script.Actor(encoder, weights["action_bounds"], args.hidden_dim, generator)
    actor.load_state_dict(weights)
    return actor


def test_exported_policy_needs_none_of_our_files(finished, tmp_path):
    """In a process that cannot import them, for batches of any size: the actions of the network, in their bounds."""
    images, command, expected = save_images(tmp_path / "images"), [], {}
    points = save_points(tmp_path / "points")
    rng = np.random.default_rng(3)
    runs = {name: (SCRIPTS[name], run, rng.normal(size=(300, 10)).astype(np.float32)) for name, run in finished.items()}
    for name, script in OF_IMAGES.items():
        args = small_args(script, images, tmp_path / f"{name}-images", channels=4, random_shift=2, gradient_steps=2)
        pictures = rng.integers(0, 256, (300, 16, 20, 3), np.uint8)
        runs[f"{name}-images"] = script, args.run_dir, pictures
        script.train(args)
    args = small_args(laeo, points, tmp_path / "points-run", gradient_steps=2)
    laeo.train(args)
    runs["points"] = laeo, args.run_dir, 100 * rng.normal(size=(300, 3)).astype(np.float32)
    for name, (script, run, observations) in runs.items():
        np.save(tmp_path / f"{name}-o.npy", observations)
        command += [run / "policy.pt2", tmp_path / f"{name}-o.npy", tmp_path / f"{name}-a.npy"]
        with torch.no_grad():
            actions = network_actor(script, run)(torch.from_numpy(observations)).numpy()
        expected[name] = np.concatenate([actions[:n] for n in (1, 2, 7, 300)])
    python = [sys.executable, "-I", "-c", LOAD_POLICY]  # no PYTHONPATH, and not the working directory
    process = subprocess.run([*python, *command], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    for name, actions in expected.items():
        loaded = np.load(tmp_path / f"{name}-a.npy")
        assert loaded.dtype == np.float32 and loaded.std() > 0
        np.testing.assert_allclose(loaded, actions, atol=1e-5)
        assert abs(loaded).max() <= (1 if name in finished else 2)
    bounds = np.array([common.load_dataset(points, None).action_bounds])[0]
    far = np.load(tmp_path / "points-a.npy")
    assert abs(far).max() > 1.5 and (far >= bounds[0] - 1e-5).all() and (far <= bounds[1] + 1e-5).all()


def test_actions_of_the_exported_policy_are_plain_numbers(script, finished):
    """The documented three lines, and what everyone does next."""
    policy = torch.export.load(finished[script.__name__] / "policy.pt2").module()
    actions = policy(torch.zeros(7, 10))
    assert actions.numpy().shape == (7, 4)


# ------------------------------------------------------------------------------------ what a method may and may not see


def load(script, dataset, **kwargs):
    """Return a script's data, {name: value}."""
    args = small_args(script, dataset, None, **kwargs)
    values = script.load_data(dataclasses.replace(args, dataset=Path(dataset)), CPU)
    return dict(zip(("dataset", "data", "mean", "std", "examples", "labelled"), values))


def episodes_of(transitions, steps=50):
    return set((transitions.row // (steps + 1)).tolist())


def test_all_methods_hold_out_the_same_episodes_and_standardise_alike(reach_dataset, finished):
    loaded = {name: load(script, reach_dataset, holdout_fraction=0.25) for name, script in SCRIPTS.items()}
    for other in loaded.values():
        data, first = other["data"], loaded["laeo"]["data"]
        trained, heldout = episodes_of(data.batches), episodes_of(data.heldout)
        assert not trained & heldout and len(heldout) == 10 and trained | heldout == set(range(40))
        assert len(data.batches.row) == 30 * 50 and len(data.heldout.row) == 10 * 50
        assert (trained, heldout) == (episodes_of(first.batches), episodes_of(first.heldout))
        assert episodes_of(data.train) < trained and len(episodes_of(data.train)) == len(heldout)
        assert episodes_of(data.train) == episodes_of(first.train)
        assert torch.equal(other["mean"], loaded["laeo"]["mean"]) and torch.equal(other["std"], loaded["laeo"]["std"])
        assert "examples" not in other or torch.equal(other["examples"], loaded["laeo"]["examples"])
    buffers = [x for name in SCRIPTS for key, x in final_weights(finished[name]).items() if key.endswith("_mean")]
    assert len(buffers) == 2 + 1 + 5 + 5 + 1 + 2 and all(torch.equal(buffers[0], other) for other in buffers)


def test_standardisation_is_that_of_the_episodes_trained_on(script, reach_dataset):
    loaded = load(script, reach_dataset, holdout_fraction=0.5)
    x = torch.from_numpy(loaded["dataset"].observations[sorted(episodes_of(loaded["data"].batches))]).flatten(0, 1)
    torch.testing.assert_close(loaded["mean"], x.mean(0))
    torch.testing.assert_close(loaded["std"], x.std(0).clamp(min=1e-3))


def heldout_episodes(dataset, holdout_fraction=0.5):
    rng = np.random.default_rng(common.seed_sequence(0, "split"))
    return common.split_dataset(common.load_dataset(dataset, "FetchReach"), holdout_fraction, 10, rng)[1]


def test_heldout_episodes_change_no_weight(script, reach_dataset, finished, tmp_path):
    """Every number of them is another one, but for states that are success examples, which decide who may be drawn."""
    changed = shutil.copytree(reach_dataset, tmp_path / "data")
    observations, actions = np.load(changed / "observations.npy"), np.load(changed / "actions.npy")
    heldout, pool = heldout_episodes(reach_dataset), {x.tobytes() for x in np.load(changed / "success_examples.npy")}
    assert len(heldout) == 20
    kept = 0
    for e in heldout:
        actions[e] *= -0.5
        for state in observations[e]:
            kept += state.tobytes() in pool
            state += 0 if state.tobytes() in pool else 3
    assert 0 < kept < 20 * 51 / 2
    np.save(changed / "observations.npy", observations)
    np.save(changed / "actions.npy", actions)
    script.train(small_args(script, changed, tmp_path / "run", **{**FINISHED, "eval_episodes": 0}))
    assert_same_bits(final_weights(tmp_path / "run"), final_weights(finished[script.__name__]))
    rows = [read_metrics(run) for run in (tmp_path / "run", finished[script.__name__])]
    for name in METRICS[script.__name__]:
        train, heldout = ([[row[f"{use}/{name}"] for row in lines if f"{use}/{name}" in row] for lines in rows]
                          for use in ("train", "heldout"))  # fmt: skip
        assert len(train[0]) == 4 and train[0] == train[1]
        assert heldout[0] != heldout[1] or name in ("reward_examples", "value_data", "reward_futures")


def test_metrics_are_drawn_from_the_episodes_they_are_named_for(script, reach_dataset, tmp_path, monkeypatch):
    uses, original = [], script.sample
    monkeypatch.setattr(script, "sample", lambda *args: (uses.append(args[2:]), original(*args))[1])
    script.train(small_args(script, reach_dataset, tmp_path / "run", gradient_steps=4, log_interval=2))
    batches, before = [use for use in uses if len(use) == 1], 1000 if script is laeo else 0  # steps of the classifier
    assert batches == [(step,) for step in (*range(before), *range(5))]
    assert [use for use in uses if len(use) == 2] == [(2, "train"), (2, "heldout"), (4, "train"), (4, "heldout")]


@pytest.mark.parametrize("script", [laeo, oril, purl, tailo])
def test_no_success_example_occurs_in_a_heldout_episode(script, reach_dataset, tmp_path):
    """Metrics of these would say something of what was trained on; where too few are left, the message says so."""
    loaded = load(script, reach_dataset, holdout_fraction=0.5)
    observations = loaded["dataset"].observations[heldout_episodes(reach_dataset)]
    seen = {state.tobytes() for state in observations.reshape(-1, 10)}
    pool = [example.tobytes() for example in loaded["dataset"].success_examples]
    usable = sum(example not in seen for example in pool)
    assert 10 < usable < len(pool) - 10
    args = small_args(script, reach_dataset, tmp_path / "run", holdout_fraction=0.5)
    refuse(
        script,
        dataclasses.replace(args, num_success=usable + 1),
        f"--num-success is {usable + 1}; of {len(pool)} success examples {usable} are not in held-out episodes; ask",
    )
    everything = load(script, reach_dataset, holdout_fraction=0.5, num_success=usable)["examples"].numpy()
    assert len({example.tobytes() for example in everything}) == usable
    assert not {example.tobytes() for example in everything} & seen
    assert {example.tobytes() for example in everything} <= set(pool)
    assert np.array_equal(everything[:10], loaded["examples"].numpy())  # fewer examples are a part of more


def test_cloning_needs_no_success_examples(tmp_path):
    """Case 20: of the other methods the message says what is missing."""
    dataset = save_points(tmp_path / "data", success_examples=[])
    result = bc.train(small_args(bc, dataset, tmp_path / "bc", env_id="points"))
    assert result["method"] == "bc" and (tmp_path / "bc" / "policy.pt2").exists()
    (dataset / "success_examples.npy").unlink()
    bc.train(small_args(bc, dataset, tmp_path / "without", env_id="points"))
    assert_same_checkpoints(tmp_path / "bc", tmp_path / "without")
    for script in (laeo, oril, purl, tailo):
        args = small_args(script, dataset, tmp_path / script.__name__, env_id="points")
        refuse(script, args, "--num-success is 10; of 0 success examples 0 are ")


def functions_that_name(path, text):
    """Return the top-level definitions of a file whose code, docstrings apart, has this text in a string or a name."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        for part in ast.walk(node):
            if isinstance(part, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(part):
                part.body = part.body[1:]
        if not isinstance(node, ast.Expr) and text in ast.unparse(node):
            found.add(getattr(node, "name", ast.unparse(node)))
    return found


def test_a_method_cannot_reach_rewards_or_success_flags():
    """The line that the project holds: only the choice of examples and the evaluation look at success.

    Beyond it stand cvl.py, which is for data with rewards, and two oracles: oril.py and purl.py with --reward true, and
    bc.py with --only-solved, in a function of its own that nothing calls without this flag.
    """
    fields = ("observations", "actions", "lengths", "success_examples", "terminals", "action_bounds", "checksum")
    assert common.Dataset._fields == fields
    verified = {"load_dataset"}  # which computes checksums of them, and returns neither
    assert functions_that_name(ROOT / "common.py", "successes") == {"load_labelled"} | verified
    assert functions_that_name(ROOT / "common.py", "rewards") == {"save_dataset"} | verified
    for script in SCRIPTS.values():
        beyond = {laeo: set(), tailo: set(), bc: {"solved_episodes"}, cvl: {"load_rewards"}}.get(script, {"load_data"})
        path = Path(script.__file__)
        assert functions_that_name(path, "successes") == beyond
        rewards = {"Data", "load_rewards", "load_data", "sample"} if script is cvl else set()
        assert functions_that_name(path, "rewards") == rewards
        assert functions_that_name(path, "load_labelled") == ({"load_data"} if script in (oril, purl) else set())
        assert functions_that_name(path, ".npy") == beyond and not functions_that_name(path, "np.load")
        assert functions_that_name(path, "load_array") == beyond
    for script in (oril, purl):
        train = next(n for n in ast.parse(Path(script.__file__).read_text()).body if getattr(n, "name", "") == "train")
        uses = [node for node in ast.walk(train) if isinstance(node, ast.Name) and node.id == "labelled"]
        calls = [
            node for node in ast.walk(train)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "measure"
        ]  # fmt: skip
        assert len(uses) == 2 and len(calls) == 1
        assert ast.unparse(calls[0].args[2]) == "labelled if name == 'heldout' else {}"  # made there, and used here
        load_data = next(n for n in ast.parse(Path(script.__file__).read_text()).body if n_name(n) == "load_data")
        assert ast.unparse(load_data.body[-1]).endswith(".to(device), labelled)")
        read = [x for x in ast.walk(load_data) if isinstance(x, ast.IfExp) and "successes" in ast.unparse(x)]
        assert [ast.unparse(x.test) for x in read] == ["args.reward == 'true'"]
        assert ast.unparse(load_data).count("successes") == 1 and script.Args().reward == "learned"
        named = [node for node in ast.walk(load_data) if isinstance(node, ast.Name) and node.id == "labelled"]
        assert len(named) == 4  # made, moved to the device by name, returned
    for script in (laeo, bc, tailo, cvl):
        assert "labelled" not in Path(script.__file__).read_text().replace("unlabelled", "")
    assert functions_that_name(Path(bc.__file__), "solved_episodes") == {"solved_episodes", "load_data"}
    load_data = next(n for n in ast.parse(Path(bc.__file__).read_text()).body if n_name(n) == "load_data")
    [only] = [
        node for node in ast.walk(load_data) if "solved_episodes(" in ast.unparse(node) and isinstance(node, ast.If)
    ]
    assert ast.unparse(only.test) == "args.only_solved" and not only.orelse and len(only.body) == 1
    assert ast.unparse(load_data).count("solved_episodes(") == 1 and bc.Args().only_solved is False


def n_name(node):
    return getattr(node, "name", "")


@pytest.mark.parametrize("script", [laeo, bc, oril, purl, tailo])
def test_success_flags_and_rewards_change_metrics_and_no_weight(script, reach_dataset, finished, tmp_path):
    """The held-out metrics read the dataset's flags: turned round, they turn the metrics round and nothing else."""
    turned = shutil.copytree(reach_dataset, tmp_path / "data")
    flags = np.load(turned / "successes.npy")
    np.save(turned / "successes.npy", ~flags)
    np.save(turned / "rewards.npy", np.random.default_rng(0).normal(size=flags[:, 1:].shape).astype(np.float32))
    if script in (laeo, bc, tailo):
        script.train(small_args(script, turned, tmp_path / "run", **FINISHED))
        assert_same_bits(final_weights(tmp_path / "run"), final_weights(finished[script.__name__]))
        assert (tmp_path / "run" / "metrics.jsonl").read_text() == (
            finished[script.__name__] / "metrics.jsonl"
        ).read_text()
        return
    lines = []
    for name, data in (("true", reach_dataset), ("turned", turned)):
        script.train(small_args(script, data, tmp_path / name, holdout_fraction=0.5, reward_learning_rate=1e-2))
        lines.append([row for row in read_metrics(tmp_path / name) if "heldout/reward_success" in row][-1])
    assert_same_bits(final_weights(tmp_path / "true"), final_weights(tmp_path / "turned"))
    true, turned = lines
    assert true["heldout/reward_success"] == pytest.approx(turned["heldout/reward_failure"], rel=1e-5)
    assert true["heldout/reward_success"] > true["heldout/reward_failure"] + 0.1
    assert true["heldout/q_start"] == turned["heldout/q_start"]


@pytest.mark.parametrize("script", [oril, purl])
def test_oracle_takes_the_success_flag_of_the_state_that_a_transition_arrives_in(script, reach_dataset, tmp_path):
    """And no learned reward: the examples have no effect on policy and critic. Its help, and its page, say oracle."""
    data = load(script, reach_dataset, reward="true")["data"]
    args = small_args(script, reach_dataset, None, reward="true", random_shift=0)
    batch, flags = script.sample(data, args, 3), np.load(reach_dataset / "successes.npy")
    goal = common.TASKS["FetchReach"].desired_goal
    distance = np.linalg.norm(batch.next_observation.numpy()[:, :3] - goal, axis=1)
    assert np.array_equal(batch.solved.numpy(), distance < 0.05) and 0 < batch.solved.float().mean() < 1
    assert script.sample(load(script, reach_dataset)["data"], args, 3).solved is None
    changed = shutil.copytree(reach_dataset, tmp_path / "data")
    np.save(changed / "success_examples.npy", np.load(changed / "success_examples.npy") + np.float32(0.5))
    turned = shutil.copytree(reach_dataset, tmp_path / "turned")
    np.save(turned / "successes.npy", ~flags)
    found = {}
    for name, dataset in (("own", reach_dataset), ("changed", changed), ("turned", turned)):
        script.train(small_args(script, dataset, tmp_path / name, reward="true"))
        parts = final_weights(tmp_path / name).items()
        found[name] = {key: x for key, x in parts if not key.startswith("networks.reward.")}
    assert_same_bits(found["own"], found["changed"])
    assert not torch.equal(*(found[x]["networks.critic.nets.0.0.weight"] for x in ("own", "turned")))
    (changed / "successes.npy").unlink()
    refuse(script, small_args(script, changed, tmp_path / "run", reward="true"), "successes.npy is damaged or missing")
    line = next(x for x in Path(script.__file__).read_text().splitlines() if x.strip().startswith("reward: "))
    assert "an oracle" in line and "oracle" in (ROOT / "docs" / "oril.md").read_text()


@pytest.mark.parametrize("script", [oril, purl])
def test_labelled_states_are_what_the_flags_say(script, reach_dataset):
    loaded, heldout = load(script, reach_dataset, holdout_fraction=0.5), heldout_episodes(reach_dataset)
    states = {label: x.numpy() for label, x in loaded["labelled"].items()}
    data, flags = loaded["dataset"], np.load(reach_dataset / "successes.npy")
    solved = data.observations[heldout][flags[heldout]]
    assert 0 < len(solved) == len(states["success"]) < 1000
    assert {state.tobytes() for state in states["success"]} == {state.tobytes() for state in solved}
    examples = {example.tobytes() for example in loaded["examples"].numpy()}
    assert len(examples) == 10 and not examples & {state.tobytes() for state in states["success"]}
    assert len(states["failure"]) == min(1000, (~flags[heldout]).sum())
    failures = {state.tobytes() for state in data.observations[heldout][~flags[heldout]]}
    assert {state.tobytes() for state in states["failure"]} <= failures
    goal = common.TASKS["FetchReach"].desired_goal
    distance = {name: np.linalg.norm(states[name][:, :3] - goal, axis=1) for name in ("success", "failure")}
    assert distance["success"].max() < 0.05 <= distance["failure"].min()
    assert np.array_equal(states["start"], data.observations[heldout, 0])


@pytest.mark.parametrize("script", [oril, purl])
def test_no_value_is_taken_from_behind_a_true_end(script, tmp_path):
    """Episodes of one step that end where they start: Q is the reward if they are terminal, else 1 / (1 - discount)."""
    rng = np.random.default_rng(0)
    kinds = {"terminal": [True] * 12, "endless": [False] * 12, "unnamed": None, "mixed": [True, False] * 6}
    observations = [np.repeat(rng.normal(size=(1, 3)), 2, 0) for _ in range(12)]
    metrics = {}
    for name, terminals in kinds.items():
        save_points(tmp_path / name, one_length=1, observations=observations, terminals=terminals)
        args = small_args(
            script, tmp_path / name, tmp_path / f"{name}-run", env_id="p", gradient_steps=300, discount=0.8
        )
        script.train(dataclasses.replace(args, learning_rate=0.01, tau=0.1, log_interval=300))
        metrics[name] = read_metrics(args.run_dir)[0]
    reward = metrics["terminal"]["train/reward_data"]
    assert 0.05 < reward < 1
    assert metrics["terminal"]["train/q_data"] == pytest.approx(reward, rel=0.15)
    assert metrics["endless"]["train/q_data"] == pytest.approx(5 * metrics["endless"]["train/reward_data"], rel=0.2)
    assert metrics["unnamed"] == metrics["endless"]
    assert metrics["terminal"]["train/q_data"] < metrics["mixed"]["train/q_data"] < metrics["endless"]["train/q_data"]


@pytest.mark.parametrize("script", [laeo, bc, tailo, cvl])
def test_true_ends_do_not_matter_to_methods_without_a_bootstrap(script, tmp_path):
    for name, terminals in (("terminal", [True] * 12), ("endless", None)):
        dataset = save_points(tmp_path / name, terminals=terminals)
        script.train(small_args(script, dataset, tmp_path / f"{name}-run", env_id="points"))
    assert_same_checkpoints(tmp_path / "terminal-run", tmp_path / "endless-run")


# ---------------------------------------------------------------------------------------------------- one sentence each


def bounded_flags():
    """Every flag that has bounds, with values just outside of them."""
    for name, script in SCRIPTS.items():
        for field in dataclasses.fields(script.Args):
            least, most = getattr(field.type, "__metadata__", (None, None))
            if least is None:
                continue
            kind = typing.get_args(field.type)[0]
            whole = int in (kind, *typing.get_args(kind))  # also of those that are None if not given
            beyond = [least - 1, most + 1] if whole else [np.nextafter(least, -9), np.nextafter(most, 9e9)]
            yield pytest.param(name, field.name, [*beyond, float("nan"), float("inf")], id=f"{name}-{field.name}")


@pytest.mark.parametrize("name, flag, values", list(bounded_flags()))
def test_every_number_has_a_range(name, flag, values, reach_dataset, tmp_path):
    script = SCRIPTS[name]
    for value in values:
        args = dataclasses.replace(small_args(script, reach_dataset, tmp_path / "run"), **{flag: value})
        refuse(script, args, rf"^--{flag.replace('_', '-')} is {value}; it must be from \S+ to \S+\.$")


def test_every_numeric_flag_has_bounds():
    for script in SCRIPTS.values():
        for field in dataclasses.fields(script.Args):
            default = getattr(script, "DEFAULTS", {}).get(field.name, [field.default])[0]
            if isinstance(default, (int, float)) and not isinstance(default, bool):
                assert hasattr(field.type, "__metadata__"), (script.__name__, field.name)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"gradient_steps": -5}, "--gradient-steps is -5; it must be from 1 to 4294967295"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"eval_episodes": -1}, "--eval-episodes is -1; it must be from 0 to"),
        ({"env_id": "FetchPsh", "eval_episodes": 2}, "did you mean FetchPush"),
        ({"env_id": "FetchPsh", "dataset": None}, "did you mean FetchPush"),
        ({"env_id": "FetchPush", "eval_episodes": 2}, "is a dataset of FetchReach, not of FetchPush"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan; it must be from 0 to 1"),
        ({"gradient_steps": float("inf")}, "--gradient-steps is inf; it must be from 1 to"),
        ({"resume": Path("nowhere")}, "^--resume .*batch.size"),
        ({"dataset": Path("nowhere")}, "there is no dataset nowhere; .*--dataset"),
        ({"quality": "easy", "dataset": None}, "easy"),
        ({"device": "cuda:0"}, "--device is cuda:0; it must be (one of )?auto, cpu(, | or )cuda"),
    ],
    ids=lambda value: str(value)[:40].replace(" ", "_") if isinstance(value, dict) else "",
)
def test_mistakes_get_one_sentence(script, reach_dataset, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    refuse(script, dataclasses.replace(small_args(script, reach_dataset, tmp_path / "run"), **flags), message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("laeo", {"batch_size": 1}, "--batch-size is 1"),
        ("laeo", {"bc_coef": 1.5}, "--bc-coef is 1.5; it must be from 0 to 1"),
        ("laeo", {"repr_dim": 0}, "--repr-dim is 0; it must be from 1 to"),
        ("laeo", {"discount": 1.0}, "--discount is 1.0"),
        ("laeo", {"num_success": 0}, "--num-success is 0; it must be from 1 to"),
        ("laeo", {"num_success": 10**6}, "--num-success is 1000000; .* success examples"),
        ("laeo", {"policy_objective": "exp"}, "--policy-objective is exp; it must be"),
        ("oril", {"batch_size": 1}, "--batch-size is 1"),
        ("oril", {"discount": 1.0}, "--discount is 1.0"),
        ("oril", {"num_success": 0}, "--num-success is 0"),
        ("oril", {"alpha": -1.0}, "--alpha is -1.0; it must be from 0 to"),
        ("oril", {"tau": 2.0}, "--tau is 2.0; it must be from 0 to 1"),
        ("oril", {"reward_learning_rate": 2.0}, "--reward-learning-rate is 2.0"),
        ("purl", {"eta": 1.5}, "--eta is 1.5; it must be from 0 to 1"),
        ("tailo", {"eta": 1.5}, "--eta is 1.5; it must be from 0 to 1"),
        ("tailo", {"safe_quantile": -0.1}, "--safe-quantile is -0.1; it must be from 0 to 1"),
        ("tailo", {"classifier_steps": 0}, "--classifier-steps is 0; it must be from 1 to"),
        ("tailo", {"discount": 1.0}, "--discount is 1.0"),
        ("tailo", {"num_success": 0}, "--num-success is 0"),
        ("oril", {"reward": "tru"}, "--reward is tru; it must be one of learned, true"),
        ("cvl", {"batch_size": 1}, "--batch-size is 1"),
        ("cvl", {"temperature": 0.05}, "--temperature is 0.05; it must be from 0.1 to 100"),
        ("cvl", {"estimator": "biased"}, "--estimator is biased; it must be one of marginal, rff, released"),
    ],
)
def test_mistakes_in_a_methods_own_flags_get_one_sentence(name, reach_dataset, tmp_path, flags, message):
    args = dataclasses.replace(small_args(SCRIPTS[name], reach_dataset, tmp_path / "run"), **flags)
    refuse(SCRIPTS[name], args, message)


def test_gpu_that_is_not_there_gets_one_sentence(script, reach_dataset, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = small_args(script, reach_dataset, tmp_path / "run", device="cuda")
    refuse(script, args, "--device is cuda, and PyTorch finds no GPU here")
    run = finished[script.__name__]
    copy = edited(run, tmp_path / "gpu", args={**load_checkpoint(run)["args"], "device": "cuda"})
    refuse(script, script.Args(resume=copy), "--device is cuda, and PyTorch finds no GPU here")


def test_mistake_on_the_command_line_ends_with_one_line_and_status_1(reach_dataset, tmp_path):
    command = [sys.executable, laeo.__file__, "--dataset", str(reach_dataset), "--learning-rate", "7"]
    process = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "run")], capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 1 and process.stdout == ""
    assert process.stderr == "error: --learning-rate is 7.0; it must be from 0 to 1.\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags", [["--quality", "easy"], ["--device", "tpu"], ["--gradient-steps", "1.5"], ["--sed", "1"]]
)
def test_flag_that_cannot_be_parsed_is_refused(script, flags, capsys):
    assert run_script(script, *flags) == 2
    assert flags[0] in capsys.readouterr().err


def test_actions_outside_of_their_bounds_are_refused_with_their_row(script, tmp_path):
    """Case 7, as own_range.py makes them, and one action of many."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (40, 50, 4)).astype(np.float32)
    observations = rng.normal(size=(40, 51, 10)).astype(np.float32)
    for name, row in (("all", (0, 0)), ("one", (31, 7))):
        changed = 2 * actions if name == "all" else actions.copy()
        changed[row][2] = -1.75
        common.save_dataset(tmp_path / name, observations, changed, observations[:20, -1])
        args = small_args(script, tmp_path / name, tmp_path / "run", eval_episodes=1)
        message = refuse(script, args, rf"{name}/actions.npy: the action at \[{row[0]}, {row[1]}\] is \[.*-1.75")
        assert "outside of the bounds [-1.0, -1.0, -1.0, -1.0] to [1.0, 1.0, 1.0, 1.0]" in message


@pytest.mark.parametrize("script", OF_IMAGES.values())
def test_random_shift_of_states_gets_one_sentence(script, reach_dataset, tmp_path):
    args = small_args(script, reach_dataset, tmp_path / "run", random_shift=2)
    refuse(script, args, "--random-shift is for images, and .* has none; leave it out")


@pytest.mark.parametrize("images", [False, True], ids=["states", "images"])
def test_observations_that_are_all_the_same_get_one_sentence(script, images, tmp_path):
    """Case 8."""
    shape, dtype = ((16, 16, 3), np.uint8) if images else ((3,), np.float32)
    rng = np.random.default_rng(0)
    examples = rng.integers(0, 200, (20, *shape)).astype(dtype)
    observations = [np.full((4, *shape), 77, dtype) for _ in range(6)]
    common.save_dataset(tmp_path / "data", observations, [rng.uniform(-1, 1, (3, 2)) for _ in range(6)], examples)
    args = small_args(script, tmp_path / "data", tmp_path / "run", env_id="any")
    refuse(script, args, "all observations of .*data are the same; there is nothing to learn from")


def test_episodes_that_return_to_one_start_are_data(script, tmp_path):
    """Only their middle moves."""
    rng = np.random.default_rng(0)
    observations = [np.concatenate([np.zeros((1, 3)), rng.normal(size=(3, 3)), np.zeros((1, 3))]) for _ in range(12)]
    dataset = save_points(tmp_path / "data", one_length=4, observations=observations)
    args = small_args(script, dataset, tmp_path / "run", env_id="points", gradient_steps=1)
    assert script.train(args)["method"] == script.__name__


def test_data_without_success_flags_have_no_metrics_of_them(reach_dataset, finished, tmp_path):
    shutil.copytree(reach_dataset, tmp_path / "data")
    (tmp_path / "data" / "successes.npy").unlink()
    oril.train(small_args(oril, tmp_path / "data", tmp_path / "without", **FINISHED))
    text = (tmp_path / "without" / "metrics.jsonl").read_text()
    assert "heldout/q_start" in text and "heldout/reward_success" not in text and "heldout/reward_failure" not in text
    assert_same_bits(final_weights(finished["oril"]), final_weights(tmp_path / "without"))


def test_damaged_success_flags_get_one_sentence(reach_dataset, tmp_path):
    shutil.copytree(reach_dataset, tmp_path / "data")
    (tmp_path / "data" / "successes.npy").write_bytes(b"damaged")
    refuse(oril, small_args(oril, tmp_path / "data", tmp_path / "run"), "successes.npy is damaged or missing")


@contextlib.contextmanager
def limit_file_size(size):
    """A limit on the size of files stands for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_while_writing_a_checkpoint_gets_one_sentence(script, reach_dataset, tmp_path):
    """Metrics fit, a checkpoint does not."""
    args = small_args(script, reach_dataset, tmp_path / "run", gradient_steps=5, hidden_dim=256)
    with limit_file_size(2**16):
        message = refuse(
            script, args, "cannot write .*run/checkpoint.pt: .*; free some space or choose another place", True
        )
    assert message.startswith(f"cannot write {tmp_path / 'run' / 'checkpoint.pt'}: ")
    assert not [path for path in (tmp_path / "run").iterdir() if "checkpoint" in path.name]


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 24 kB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", path], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize("script", [oril])
def test_full_disk_while_logging_ends_with_one_sentence_and_no_traceback(script, reach_dataset, tiny_disk):
    """Case 17: TensorBoard writes in a thread of its own."""
    flags = ["--dataset", reach_dataset, "--run-dir", tiny_disk / "run", "--log-interval", 1, "--gradient-steps", 500]
    flags += ["--eval-episodes", 0, "--hidden-dim", 16, "--batch-size", 16]
    command = [sys.executable, script.__file__, *map(str, flags)]
    process = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=600)
    assert process.returncode == 1
    assert "Traceback" not in process.stderr and "Exception in thread" not in process.stderr, process.stderr
    last = process.stderr.splitlines()[-1]
    assert last.startswith(f"error: cannot write {tiny_disk / 'run'}"), last
    assert "No space left on device" in last


def test_training_that_diverges_says_so(script, reach_dataset, tmp_path, monkeypatch):
    for value in (float("nan"), float("inf")):
        monkeypatch.setattr(script, "measure", lambda *_, value=value: {"some_loss": value})
        args = small_args(script, reach_dataset, tmp_path / f"run-{value}")
        with pytest.raises(
            common.UserError, match=f"train/some_loss is {value} at step 10; try a smaller --learning-r"
        ):
            script.train(args)
        assert read_metrics(args.run_dir) == []


def test_network_that_diverges_after_the_last_metrics_says_so(script, reach_dataset, tmp_path, monkeypatch):
    args = small_args(script, reach_dataset, tmp_path / "run", learning_rate=1.0, log_interval=1000)
    original, calls = script.update, []

    def update(*args):
        original(*args)
        calls.append(1)
        if len(calls) == 40:
            network = next(x for x in args if isinstance(x, torch.nn.Module))
            next(network.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(script, "update", update)
    with pytest.raises(common.UserError, match="networks are not finite at step 40; try a smaller --learning-rate"):
        script.train(args)
    assert not (tmp_path / "run" / "checkpoint.pt").exists() and not (tmp_path / "run" / "result.json").exists()


def test_at_least_one_episode_is_trained_on_and_one_held_out(script, reach_dataset, tmp_path):
    args = small_args(script, reach_dataset, tmp_path / "run", gradient_steps=1, log_interval=1, holdout_fraction=0.0)
    assert script.train(args)["args"]["gradient_steps"] == 1
    data = load(script, reach_dataset, holdout_fraction=0.0)["data"]
    assert [len(episodes_of(x)) for x in (data.batches, data.train, data.heldout)] == [39, 1, 1]


def test_at_least_one_of_two_episodes_is_trained_on(script, tmp_path):
    """Of two episodes a share of 0.9 would round to both."""
    dataset = save_points(tmp_path / "data", episodes=2, one_length=4)
    data = load(script, dataset, env_id="points", holdout_fraction=0.9)["data"]
    assert sorted([episodes_of(data.batches, 4), episodes_of(data.heldout, 4)], key=min) == [{0}, {1}]
    args = small_args(script, dataset, tmp_path / "run", env_id="p", gradient_steps=2, log_interval=1)
    script.train(dataclasses.replace(args, holdout_fraction=0.9))
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 1, 2, 2]


def test_unwritable_run_directory_gets_one_sentence(script, reach_dataset, tmp_path):
    (tmp_path / "file").write_text("")
    refuse(script, small_args(script, reach_dataset, tmp_path / "file" / "run"), "cannot write .*file/run")


# ----------------------------------------------------------------------------------------------------- shared blocks

# Blocks of the same name are the same in every script, character by character. What may differ: lines that begin so.
OWN_LINES = {
    "import": ["from copy import deepcopy"],
    "mlp": ["def mlp(", "hidden = ", "layers += ", "return nn.Sequential("],  # layer normalisation, for TD3's critic
    "load_data": [
        "def load_data(", '"""Set flags that are not given; ', "training, heldout, ", "return dataset, Data(",
        "labelled = ", "data = Data(", "return dataset, data, ", "if args.only_solved", "training = solved_episodes(",
        "flags = ",
    ],
    "train": [  # what builds, updates, measures and saves a method's networks
        "dataset, data, mean, std",
        "bounds, encoder", "actor = ", "critic = ", "kernel = ", "networks = ", "learned = ", "optimizer = ",
        "parts, first_step = ", "if args.policy_objective == ", 'raise common.UserError("--policy-objective weighted',
        "few = ", "args.policy_objective = ", "data = data._replace(", "if args.critic and not", "load_critic(",
        "goal = ", "encoders = ", 'spend("training")',  # TAILO's classifiers are trained in it
        "results = evaluate(",
        "if not all(torch.isfinite", "optimizer.param_groups[0]", "for group, rate in ",
        'group["lr"] = ', "update(", "batch = sample(data, args, step + 1, name)",
        "log(step + 1, name", "export = torch.export.export, ",
    ],
}  # fmt: skip
# Blocks that are each method's own, and the groups of scripts in which they are the same all the same.
GROUPS = {
    "DEFAULTS": [["laeo"], ["bc", "oril", "purl", "tailo"]],  # LAEO needs half of the steps on states
    "README": [["laeo"], ["bc"], ["oril"], ["purl"], ["tailo"], ["cvl"]],
    "mlp": [["laeo", "bc", "tailo", "cvl"], ["oril", "purl"]],
    "Encoder": [["laeo", "bc", "oril", "purl", "tailo"], ["cvl"]],  # without images
    "Critic": [["laeo"], ["cvl"], ["oril", "purl"]],  # contrastive, and Q-functions
    "critic_loss": [["laeo"], ["cvl"], ["oril", "purl"]],
    "policy_value": [["laeo"], ["cvl"]],  # by examples, and by rewards
    "policy_loss": [["laeo", "cvl"], ["oril", "purl"], ["tailo"]],
    "reward_loss": [["oril"], ["purl"]],  # the difference between the two
    "Data": [["laeo"], ["bc"], ["oril", "purl"], ["tailo"], ["cvl"]],  # what is known of every state
    "Batch": [["laeo"], ["bc"], ["oril", "purl"], ["tailo"], ["cvl"]],  # what a method's losses need
    "sample": [["laeo"], ["bc"], ["oril", "purl"], ["tailo"], ["cvl"]],
    "update": [["laeo"], ["bc"], ["oril"], ["purl"], ["tailo"], ["cvl"]],  # purl hands eta to its loss
    "measure": [["laeo"], ["bc"], ["oril"], ["purl"], ["tailo"], ["cvl"]],
    "evaluate": [["laeo", "bc", "oril", "purl", "tailo"], ["cvl"]],  # CVL's may have another goal
    "load_data": [["laeo", "tailo"], ["bc"], ["oril", "purl"], ["cvl"]],
    "train": [["laeo"], ["bc"], ["oril", "purl"], ["tailo"], ["cvl"]],
}
ALONE = {("load_data", "cvl")}  # which has no images, and a test of its own
# Flags of the same name are the same in every script, with their help, but for the help of these.
OWN_HELP = {
    "gradient_steps", "batch_size", "learning_rate", "discount", "hidden_dim", "seed",
}  # fmt: skip
# A contrastive loss needs two rows, and so do TD methods' metrics; cloning needs one. CVL has none for images, and its
# reward is the data's; ORIL's is learned, or an oracle's. TAILO's discount is of a sum along an episode.
OWN_FLAGS = {"batch_size", "gradient_steps", "reward", "discount"}


def read_sources():
    return {name: Path(script.__file__).read_text() for name, script in SCRIPTS.items()}


def blocks(source):
    """Return {name: lines} of a script's functions, classes, flags, imports and other statements."""
    found, lines = {"import": []}, source.splitlines()
    for node in ast.parse(source).body[1:]:  # without the docstring
        text = lines[node.lineno - 1 - len(getattr(node, "decorator_list", [])) : node.end_lineno]
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found["import"] += text
        elif n_name(node) == "Args":
            found |= {f"flag {ast.unparse(f.target)}": lines[f.lineno - 1 : f.end_lineno] for f in node.body}
        else:
            found[n_name(node) or ast.unparse(getattr(node, "targets", [node])[0]).splitlines()[0]] = text
    return found


def explain(name, versions):
    """Return how to bring the versions {script: lines} of a block back together."""
    texts = Counter("\n".join(lines) for lines in versions.values())
    most = max(texts.values())
    source = next(s for s, lines in versions.items() if texts["\n".join(lines)] == most)  # of equals the first
    same = [f"{s}.py" for s, lines in versions.items() if lines == versions[source]]
    messages = []
    for other, lines in versions.items():
        if lines != versions[source]:
            diff = difflib.unified_diff(lines, versions[source], f"{other}.py", f"{source}.py", lineterm="", n=1)
            advice = f"`{name}` of {other}.py is not that of {', '.join(same)}: copy the lines with + from {source}.py"
            messages.append("\n".join([f"{advice} (or change all of them alike)", *diff]))
    return messages


def drift(sources):
    """Return a message for each block that has drifted apart."""
    found, messages = {script: blocks(source) for script, source in sources.items()}, []
    for name in dict.fromkeys(name for own in found.values() for name in own):
        versions = {script: own[name] for script, own in found.items() if name in own}
        if name.startswith("flag "):
            flag = name.split()[1]
            if flag in OWN_HELP:
                versions = {script: [line.split("  # ")[0] for line in lines] for script, lines in versions.items()}
            messages += [] if flag in OWN_FLAGS else explain(name, versions)
            continue
        for group in GROUPS.get(name, []):
            messages += explain(name, {script: versions[script] for script in group})
        if name in OWN_LINES:
            starts = tuple(OWN_LINES[name])
            versions = {script: lines for script, lines in versions.items() if (name, script) not in ALONE}
            messages += explain(
                name,
                {s: [x for x in lines if not x.strip().startswith(starts)] for s, lines in versions.items()},
            )
        elif name not in GROUPS:
            messages += explain(name, versions)
    return messages


def test_blocks_of_the_same_name_are_the_same_in_all_scripts():
    messages = drift(read_sources())
    assert not messages, "\n\n" + "\n\n".join(messages)


def test_cvl_loads_data_as_laeo_does_but_for_images_and_examples():
    own, other = (blocks(read_sources()[name])["load_data"] for name in ("cvl", "laeo"))
    added = [line.strip() for line in own[1:] if line not in other]
    starts = [
        '"""Return', "training, heldout, _ = ", "observations = torch", "if observations.ndim",
        "raise common.UserError(", "x = observations[torch.from_numpy(rows[:100_000])]", "return dataset, Data(",
    ]  # fmt: skip
    assert len(added) == len(starts) and all(map(str.startswith, added, starts))
    kept = [line for line in other if line in own]
    assert kept == [line for line in own if line in other] and len(kept) == 9


def test_the_lists_of_what_may_differ_are_no_longer_than_needed():
    found = {script: blocks(source) for script, source in read_sources().items()}
    everywhere = {name for name in found["laeo"] if all(name in own for own in found.values())}
    assert {"Encoder", "evaluate", "load_checkpoint", "train", "Data", "load_data", "mlp", "METHOD"} <= everywhere
    assert "if __name__ == '__main__':" in everywhere and len([x for x in everywhere if x.startswith("flag ")]) >= 19
    for name, groups in GROUPS.items():
        assert sorted(script for group in groups for script in group) == sorted(s for s in found if name in found[s])
        versions = ["\n".join(found[group[0]][name]) for group in groups]
        assert len(set(versions)) == len(groups), f"{name} is the same in two groups: join them"
    for name, starts in OWN_LINES.items():
        for start in starts:
            lines = [
                [line for line in own[name] if line.strip().startswith(start)] for own in found.values() if name in own
            ]
            assert any(lines) and any(other != lines[0] for other in lines), f"{start} of {name} is no difference"
    for flag in OWN_HELP | OWN_FLAGS:
        versions = {"".join(own[f"flag {flag}"]) for own in found.values() if f"flag {flag}" in own}
        assert len(versions) > 1, f"--{flag} is the same everywhere"


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("purl", "total + float(reward)", "total - float(reward)"),
        ("bc", "mean, std = x.mean(0), x.std(0).clamp(min=1e-3)", "mean, std = x.mean(0), x.std(0).clamp(min=1e-2)"),
        ("oril", "nn.init.zeros_(layers[-1].bias)", "nn.init.ones_(layers[-1].bias)"),
        ("laeo", "learning_rate: Share = 1e-3", "learning_rate: Share = 1e-4"),
        ("bc", "if step + 1 == args.gradient_steps or", "if step == 5 or"),
        ("purl", 'group["lr"] = rate * (1 - step', 'group["lr"] = rate * (2 - step'),
        ("bc", "F.softplus(std) + 0.1", "F.softplus(std) + 0.2"),
    ],
)
def test_a_block_that_drifts_is_found_and_the_message_says_what_to_copy(name, old, new):
    sources = read_sources()
    assert old in sources[name] and old != new
    changed = sources | {name: sources[name].replace(old, new)}
    message = "\n".join(drift(changed))
    line = next(line for line in changed[name].splitlines() if new in line).split("  # ")[0]
    assert f"-{line}" in message or f"+{line}" in message
    assert f"{name}.py" in message and "copy the lines with + from " in message


def test_diff_of_oril_and_purl_is_the_docstring_the_loss_its_flag_and_the_success():
    lines = [
        source.split('"""', 2)[2].splitlines() for name, source in read_sources().items() if name in ("oril", "purl")
    ]
    changed = [line for line in difflib.ndiff(*lines) if line[0] in "+-"]
    removed, added = ([line[2:].strip() for line in changed if line[0] == sign] for sign in "-+")
    assert (len(removed), len(added)) == (7, 9)
    assert all(sum(line.startswith("README = ") for line in lines) == 1 for lines in (removed, added))
    assert sum("eta" in line for line in added) >= 6 and not any("eta" in line.split() for line in removed)
    own = "reward_loss(", "eta", "README = "
    other = [line for line in removed + added if not any(text in line for text in own)]
    assert len(other) <= 8


def test_purl_without_eta_and_with_orils_loss_is_oril():
    """All of the file, statement by statement; docstrings of the modules and README apart."""

    class WithoutEta(ast.NodeTransformer):
        def visit_Call(self, node):
            self.generic_visit(node)
            node.args = [arg for arg in node.args if ast.unparse(arg) != "args.eta"]
            return node

    sources = read_sources()
    sources["purl"] = sources["purl"].replace("docs/purl.md", "docs/oril.md")
    bodies = {name: ast.parse(sources[name]).body[1:] for name in ("oril", "purl")}
    for body in bodies.values():
        del body[next(i for i, node in enumerate(body) if ast.unparse(node).startswith("README = "))]
    found = {name: {n_name(node): node for node in body} for name, body in bodies.items()}
    fields = found["purl"]["Args"].body
    del fields[next(i for i, field in enumerate(fields) if ast.unparse(field).startswith("eta: "))]
    found["purl"]["reward_loss"].__dict__.update(found["oril"]["reward_loss"].__dict__)
    purls = [ast.unparse(WithoutEta().visit(node)) for node in bodies["purl"]]
    assert purls == [ast.unparse(node) for node in bodies["oril"]]


@pytest.mark.parametrize(
    "name, least, most",
    [
        *((f"{name}.py", 300, 497 if name == "laeo" else 480) for name in SCRIPTS),
        ("common.py", 1, 470),
        ("collect_data.py", 1, 300),
        ("evaluate.py", 1, 150),
        ("contrastive_rl.py", 300, 480),
        ("episodes.py", 1, 300),
        ("README.md", 1, 250),
    ],
)
def test_files_are_short(name, least, most):
    assert least <= len((ROOT / name).read_text().splitlines()) <= most
