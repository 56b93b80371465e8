"""The benchmark: runs beside each other, no failure swallowed; intervals of known cases; tables; what it measures."""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from gl import require_gl
from scipy.stats import binom, binomtest

import common

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmark"))
import failures
import report
import run as benchmark


def launch(monkeypatch, tmp_path, commands, *flags):
    """Run `benchmark/run.py x` with these commands as experiment x; return its exit status."""
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmark, "experiments", lambda: {"x": commands})
    monkeypatch.setattr(sys, "argv", ["run.py", "x", *flags])
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    return stopped.value.code


# ---------------------------------------------------------------------------------------------------------------- runs


def test_a_failed_run_fails_the_benchmark_and_what_is_done_stays_done(monkeypatch, tmp_path, reach_dataset, capsys):
    flags = ["--gradient-steps", "2", "--eval-interval", "0", "--eval-episodes", "1", "--dataset", str(reach_dataset)]
    commands = {"bad": ["bc.py", "--env-id", "Nope"], "good": ["bc.py", *flags]}
    assert launch(monkeypatch, tmp_path, commands) == 1
    assert "failed: python bc.py --env-id Nope" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["good.json"]
    result = json.loads((tmp_path / "x" / "good.json").read_text())
    assert result["args"]["gradient_steps"] == 2 and len(result["episodes"]["success"]) == 1
    assert result["args"]["dataset"] == reach_dataset.name and result["args"]["run_dir"] == "good"  # no machine's paths

    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("it ran again what is done"))
    assert launch(monkeypatch, tmp_path, {"good": commands["good"]}) == 0


SCRIPT = """
import json, os, pathlib, sys, time
place = pathlib.Path(sys.argv[-1])
start = time.time()
time.sleep(1)
place.mkdir(parents=True, exist_ok=True)
times = {"start": start, "end": time.time(), "threads": os.environ["OMP_NUM_THREADS"]}
for name in ("result.json", "metadata.json"):
    (place / name).write_text(json.dumps(times))
"""


def test_two_jobs_run_beside_each_other_with_one_thread_each_but_nothing_beside_a_dataset(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    for name in ("method.py", "collect_data.py"):
        (tmp_path / name).write_text(SCRIPT)
    method, data = ["method.py"], ["collect_data.py"]
    commands = {"a": method, "b": method, "data": data, "c": method, "d": method, "e": method}
    assert launch(monkeypatch, tmp_path / "results", commands, "--jobs", "2") == 0
    times = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results" / "x").iterdir()}
    assert set(times) == set(commands) and {t["threads"] for t in times.values()} == {"1"}
    together = {
        frozenset((x, y))
        for x, first in times.items()
        for y, second in times.items()
        if x != y and first["start"] < second["end"] and second["start"] < first["end"]
    }
    assert frozenset("ab") in together and frozenset("cd") in together
    assert not any("data" in pair for pair in together)
    assert all(
        sum(t["start"] <= moment < t["end"] for t in times.values()) <= 2
        for moment in [t["start"] for t in times.values()]
    )
    before = (tmp_path / "results" / "x" / "a.json").read_text()
    assert launch(monkeypatch, tmp_path / "results", {"a": method}) == 0
    assert (tmp_path / "results" / "x" / "a.json").read_text() == before
    assert launch(monkeypatch, tmp_path / "results", {"a": method}, "--redo") == 0
    assert (tmp_path / "results" / "x" / "a.json").read_text() != before
    assert launch(monkeypatch, tmp_path, {}, "--jobs", "0") == "error: --jobs is 0; it must be 1 or more."


def test_a_terminal_has_a_bar_below_the_commands_and_anything_else_has_lines(tmp_path):
    (tmp_path / "method.py").write_text(SCRIPT + "print('noise')")
    (tmp_path / "bad.py").write_text("raise SystemExit('error: on purpose')")
    commands = {"a": ["method.py"], "bad": ["bad.py"], "b": ["method.py", "2"]}
    code = f"import run; run.ROOT = run.Path({str(tmp_path)!r}); run.RESULTS = run.ROOT / sys.argv.pop()\n"
    code = f"import sys; {code}run.experiments = lambda: {{'x': {commands!r}}}\nrun.main()"
    command, at = [sys.executable, "-c", code, "x", "--jobs", "2"], Path(benchmark.__file__).parent
    lines = ["python method.py", "python bad.py", "python method.py 2"]
    ours, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    with subprocess.Popen([*command, "results"], cwd=at, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while part := os.read(ours, 1000):
                shown += part
    os.close(ours)
    # What remains of each line on a terminal: a bar was overwritten with spaces before a command was written.
    left = [line.split("\r")[-1] for line in shown.decode().replace("\r\n", "\n").split("\n")]
    assert process.returncode == 1 and [line for line in left if line.startswith("python")] == lines
    bars = re.findall(r"(\d)/3 \[[0-9:]+<([0-9:?]+), [^,]+, (\d) running, (\d) failed\]", shown.decode())
    assert bars[0] == ("0", "?", "2", "0") and {bar[0] for bar in bars} >= {"0", "1", "3"}
    assert bars[-1] == ("3", "00:00", "0", "1") and "noise" not in shown.decode()
    assert left[-2].startswith("failed: python bad.py (its messages: ")

    plain = subprocess.run([*command, "others"], cwd=at, capture_output=True, text=True)
    assert plain.returncode == 1 and [x for x in plain.stdout.splitlines() if x.startswith("python")] == lines
    assert plain.stdout.endswith("3 of 3 runs ended, 0 running, 1 failed\n")
    assert plain.stderr.startswith("failed: python bad.py") and plain.stderr.count("\n") == 1
    log = Path(re.search(r"messages: (.*)\)", plain.stderr)[1])
    assert log.read_text() == "error: on purpose\n"


def test_ray_is_optional_and_does_not_run_the_search(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "on_ray", raising=False)
    with pytest.raises(common.UserError, match="^--ray needs Ray; install it with: pip install ray$"):
        launch(monkeypatch, tmp_path, {"a": ["method.py"]}, "--ray", "auto")
    message = launch(monkeypatch, tmp_path, {"a": ["search/laeo.py"]}, "--ray", "auto")
    assert message.startswith("error: the experiment search runs an earlier commit")


def test_every_method_has_every_task_and_seed_with_the_same_steps():
    """But for LAEO on FetchReach, which the README names."""
    state = benchmark.experiments()["state"]
    assert len(state) == 4 * (8 + 3 * 3)
    assert not {name.rsplit("-", 1)[1] for name in state} & {str(seed) for seed in benchmark.SEARCH_SEEDS}
    for name, command in state.items():
        method, task, seed = name.split("-")
        assert command[0] == f"{method}.py" and command[1:5] == ["--env-id", task, "--seed", seed]
        if name != f"laeo-FetchReach-{seed}":
            assert command[1:] == state[f"bc-{task}-{seed}"][1:]


def test_tailo_and_the_oracle_are_given_what_the_other_methods_are():
    """On three of the seeds, so that the table can show them beside each other; one example or ten for TAILO alone."""
    commands, expected = benchmark.experiments(), {}
    for seed in range(3):
        for task in benchmark.STATE_TASKS:
            given = commands["state"][f"bc-{task}-{seed}"][1:]
            expected[f"tailo-{task}-{seed}"] = ["tailo.py", *given]
            expected[f"oracle-{task}-{seed}"] = ["bc.py", "--only-solved", *given]
        for n in ("10", "1"):
            expected[f"tailo-{n}-{seed}"] = ["tailo.py", *commands["examples"][f"oril-{n}-{seed}"][1:]]
    assert commands["tailo"] == expected and len(expected) == 30
    named = {name for name, script, *flags in ((x, *y) for y_ in commands.values() for x, y in y_.items())
             if "--only-solved" in flags}  # fmt: skip
    assert named and all(name.startswith("oracle-") for name in named)  # an oracle is never called a method


def test_every_setting_of_tailos_search_differs_from_its_base_in_what_its_name_says():
    import importlib

    import tyro

    found = {}
    for name, (script, *flags) in benchmark.experiments()["tailo_search"].items():
        setting, seed = name.rsplit("-", 1)
        args = vars(tyro.cli(importlib.import_module(script.removesuffix(".py")).Args, args=flags))
        assert args.pop("seed") == int(seed) in benchmark.SEARCH_SEEDS and args["eval_episodes"] == 300
        assert found.setdefault(setting, args) == args
    assert list(found) == list(benchmark.TAILO_SEARCH) and found.pop("oracle")["only_solved"] is True
    base, names = found.pop("base"), {"discount": "discount", "scale": "reward_scale", "quantile": "safe_quantile"}
    names |= {"eta": "eta", "penalty": "penalty_coef"}
    changed = {name: {key: x for key, x in args.items() if x != base[key]} for name, args in found.items()}
    assert changed.pop("paper") == {"eta": 0.2, "safe_quantile": 0.8, "discount": 0.998}
    assert changed.pop("discount-0.9-scale-2.5") == {"discount": 0.9, "reward_scale": 2.5}
    assert len(changed) >= 10
    for name, differences in changed.items():
        flag, value = name.rsplit("-", 1)
        assert differences == {names[flag]: float(value)}


def test_commands_parse():
    import importlib

    import tyro

    for commands in benchmark.experiments().values():
        for script, *flags in commands.values():
            if script != "benchmark/run.py" and not script.startswith("search/"):
                tyro.cli(importlib.import_module(script.removesuffix(".py")).Args, args=flags)


def test_datasets_have_as_many_episodes_as_in_the_tables():
    """The number belongs to the task; no command has one of its own."""
    results = {path.stem: json.loads(path.read_text()) for path in (benchmark.RESULTS / "data").glob("*.json")}
    commands = benchmark.experiments()["data"]
    assert set(benchmark.STATE_TASKS) <= set(results) <= set(commands) == {*common.TASKS, *benchmark.DATA}
    for task in common.TASKS:
        command = commands[task]
        assert command == ["collect_data.py", "--env-id", task, "--overwrite"]
        assert common.TASKS[task].num_episodes == (2000 if task.startswith("Sawyer") else 4000)
        assert task not in results or results[task]["num_episodes"] == common.TASKS[task].num_episodes


def test_dataset_counts_as_done_only_if_it_is_there(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "FetchPush.json").write_text("{}")
    data = {"FetchPush": ["collect_data.py", "--env-id", "FetchPush"]}
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("it ran something"))
    with pytest.raises(pytest.fail.Exception):
        launch(monkeypatch, tmp_path, data)
    assert "python collect_data.py --env-id FetchPush" in capsys.readouterr().out
    method = {"laeo-FetchPush-0": ["laeo.py", "--env-id", "FetchPush"]}
    message = launch(monkeypatch, tmp_path, method)
    assert message == "error: there is no datasets/FetchPush-medium; make it with: python benchmark/run.py data"
    (tmp_path / "datasets" / "FetchPush-medium").mkdir(parents=True)
    assert launch(monkeypatch, tmp_path, data) == 0


def test_every_run_needs_the_dataset_that_it_names():
    commands = benchmark.experiments()
    needed = {name: benchmark.needed(command) for name, command in {**commands["hard"], **commands["sizes"]}.items()}
    assert needed["laeo-FetchReach-0"] == benchmark.ROOT / "datasets" / "FetchReach-hard"
    assert needed["oril-31271-2"] == benchmark.ROOT / "datasets" / "FetchPush-31271-medium"
    made = {benchmark.dataset(name) for name in commands["data"]}
    assert set(needed.values()) <= made
    for experiment in ("state", "examples", "settings", "search"):
        assert {benchmark.needed(command) for command in commands[experiment].values()} <= made
    assert not {benchmark.needed(command) for name in ("data", "random") for command in commands[name].values()} - {
        None
    }


def test_archived_results_have_the_evaluations_on_the_way(tmp_path):
    lines = [
        {"step": 0, "eval/success_rate": 0.25, "eval/final_success_rate": 0.125, "eval/return": 1.0},
        {"step": 500, "train/critic_loss": 0.5},
        {"step": 800, "eval/success_rate": 0.75, "eval/final_success_rate": 0.5, "eval/return": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "result.json").write_text(json.dumps({"args": {"run_dir": "/a/b"}}))
    benchmark.archive(tmp_path / "result.json", tmp_path / "archived.json")
    result = json.loads((tmp_path / "archived.json").read_text())
    assert result["args"] == {"run_dir": "b"}
    assert [tuple(point.values()) for point in result["curve"]] == [(0, 0.25, 0.125), (800, 0.75, 0.5)]


def test_search_patch_fits_its_commit_and_has_every_flag_of_the_search():
    if subprocess.run(["git", "cat-file", "-e", benchmark.SEARCH_COMMIT], cwd=benchmark.ROOT).returncode:
        pytest.skip("a clone without the history")
    directory = benchmark.search_directory()
    code = "import json, sys, tyro, bc, laeo, oril, purl\n"
    code += "for script, *flags in json.load(sys.stdin): tyro.cli(vars()[script[7:-3]].Args, args=flags)\n"
    commands = list(benchmark.experiments()["search"].values())
    given = {"input": json.dumps(commands), "text": True, "cwd": directory, "stderr": subprocess.PIPE}
    process = subprocess.run([sys.executable, "-c", code], **given)
    assert process.returncode == 0, process.stderr
    stated = set(re.findall(r"^\| `([a-z-]+)", (benchmark.ROOT / "docs" / "search.md").read_text(), re.M))
    flags = {word[2:] for command in commands for word in command if word.startswith("--")}
    from dataclasses import fields

    import bc
    import laeo
    import oril
    import purl

    own = {field.name.replace("_", "-") for script in (bc, laeo, oril, purl) for field in fields(script.Args)}
    assert flags - own == stated - own


def test_ctrl_c_waits_for_the_runs_and_says_one_sentence(tmp_path, reach_dataset):
    """The signal goes to the whole group of processes, as from a terminal."""
    flags = f"--gradient-steps 1000000 --log-interval 5 --eval-interval 0 --dataset {reach_dataset}".split()
    code = f"import run; run.RESULTS = run.Path({str(tmp_path)!r}); "
    code += f"run.experiments = lambda: {{'x': {{'long': ['bc.py', *{flags!r}]}}}}; run.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "x"], cwd=Path(benchmark.__file__).parent, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    deadline = time.monotonic() + 240
    metrics = lambda: [path.stat().st_size for path in tmp_path.glob("benchmark-*/long/metrics.jsonl")]  # noqa: E731
    while not any(metrics()) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    message = process.communicate(timeout=240)[1]
    assert process.returncode == 1
    assert message.splitlines()[-1] == "error: interrupted; what is done stays done." and "Traceback" not in message
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody of the group is left
    log = next(tmp_path.glob("benchmark-*/long.log")).read_text()
    assert "error: interrupted" in log and "Traceback" not in log  # the run ended by itself
    assert not (tmp_path / "x").exists()


def test_random_actions_have_the_starts_of_the_evaluations(tmp_path):
    benchmark.play_randomly("FetchReach", tmp_path / "run")
    benchmark.archive(tmp_path / "run" / "result.json", tmp_path / "archived.json")
    result = json.loads((tmp_path / "archived.json").read_text())
    assert result["episodes"]["seed"] == [common.episode_seed(0, "evaluation", i) for i in range(100)]
    assert len(report.outcomes(result, "success")) == 100  # they differ, although they start alike
    assert result["success_rate"] <= 0.05 and result["success_interval"][1] < 0.15


def test_best_policy_of_the_data_is_played_without_noise_on_starts_of_the_search(tmp_path):
    benchmark.play_behavior("FetchReach", tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["episodes"]["seed"] == [common.episode_seed(100, "evaluation", i) for i in range(300)]
    assert set(result["episodes"]["episode"]) == {0} and result["final_success_rate"] == 1  # one start and no noise


def test_results_hold_no_path_of_a_machine():
    paths = list(report.RESULTS.rglob("*.json"))
    assert len(paths) > 50
    for path in paths:
        assert not re.search(r'"/|"[A-Z]:\\\\', path.read_text()), path


def test_runs_for_another_goal_are_measured_there(reach_dataset, tmp_path, monkeypatch):
    """CVL's with the critic of a run for the task's own goal; BC's is a run of its own. Both have a row in a table."""
    import bc
    import cvl
    import evaluate

    goal, trained, played, play = (1.3, 0.6, 0.7), [], [], evaluate.play
    monkeypatch.setattr(benchmark, "GOAL", goal)
    monkeypatch.setattr(
        evaluate, "play", lambda act, env_id, n, seed, **at: played.append((n, at)) or play(act, env_id, 2, seed, **at)
    )
    for method, script in (("cvl", cvl), ("bc", bc)):

        def train(args, script=script, original=script.train):
            trained.append(args)
            few = {"dataset": reach_dataset, "gradient_steps": 3, "eval_episodes": min(args.eval_episodes, 2)}
            return original(dataclasses.replace(args, **few))

        monkeypatch.setattr(script, "train", train)
        for seed in (0, 1):
            target = tmp_path / "results" / "goals" / f"{method}-{seed}"
            benchmark.reach_goal(method, "FetchReach", seed, tmp_path / target.name)
            benchmark.archive(tmp_path / target.name / "result.json", target.with_suffix(".json"))
    first, second = trained[:2]
    assert first.reward_goal is None and first.eval_episodes == 0 and not first.critic
    assert second.reward_goal == goal and second.critic == str(first.run_dir) and second.eval_episodes == 100
    assert played == 2 * [(100, {"goal": goal})] and [args.seed for args in trained] == [0, 0, 1, 1, 0, 1]
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    rows = report.TABLES["goals"]().splitlines()[-2:]
    assert [row.split(" | ")[0] for row in rows] == ["| CVL, the policy trained again", "| BC"]
    assert all(row.split(" | ")[4] == "3" for row in rows)  # gradient steps


# ----------------------------------------------------------------------------------------------------------- intervals


def seed_outcomes(*rates, episodes=100):
    """Outcomes of seeds that succeed in exactly these shares of their episodes."""
    return [np.arange(episodes) < round(rate * episodes) for rate in rates]


def wilson(successes, episodes):
    interval = binomtest(successes, episodes).proportion_ci(method="wilson")
    return interval.low, interval.high


def test_equal_episodes_count_once():
    flags = {"success": [True] * 100, "final_success": [True, False] * 50}
    same, pairs = {"episode": [0] * 100}, {"episode": np.arange(100).tolist()}
    assert report.outcomes({"episodes": flags | same}, "success").tolist() == [1.0]
    assert report.outcomes({"episodes": flags | pairs}, "final_success").tolist() == [1.0, 0.0] * 50
    old = {env_id: {"episodes": flags, "args": {"env_id": env_id}} for env_id in ("FetchReach", "FetchPush")}
    assert len(report.outcomes(old["FetchReach"], "success")) == 1
    assert len(report.outcomes(old["FetchPush"], "success")) == 100
    assert len(report.outcomes({"episodes": flags}, "success")) == 100  # of random actions


def test_where_all_outcomes_agree_the_interval_is_wilsons_of_the_distinct_episodes():
    assert report.rate_interval([np.ones(1)] * 3) == pytest.approx((1, *wilson(3, 3)))  # FetchReach, three seeds
    assert report.rate_interval([np.zeros(1)] * 3) == pytest.approx((0, *wilson(0, 3)))
    assert report.rate_interval(seed_outcomes(1, 1, 1)) == pytest.approx((1, *wilson(300, 300)))
    rate, low, high = report.rate_interval([np.ones(1), np.ones(1), np.zeros(1)])
    assert (rate, low, high) == pytest.approx((2 / 3, 0, 1))  # 1 of 27 draws has the failed seed three times


def test_one_seed_and_equal_seeds_have_the_interval_of_their_episodes():
    """The bootstrap's distribution is then that of a binomial: of 100 episodes, and of 300."""
    for seeds in (1, 3):
        rate, low, high = report.rate_interval(seed_outcomes(*[0.8] * seeds))
        n = 100 * seeds
        assert rate == pytest.approx(0.8)
        assert (low, high) == pytest.approx(binom.ppf([0.025, 0.975], n, 0.8) / n, abs=0.005)


def test_intervals_widen_with_the_spread_of_seeds_and_are_the_same_every_time():
    spreads = [(0.8, 0.8, 0.8), (0.75, 0.8, 0.85), (0.7, 0.8, 0.9), (0.6, 0.8, 1.0)]
    results = [report.rate_interval(seed_outcomes(*rates)) for rates in spreads]
    assert [rate for rate, _, _ in results] == pytest.approx([0.8] * 4)
    widths = [high - low for _, low, high in results]
    assert widths == sorted(widths) and widths[3] > 2 * widths[0]
    assert results == [report.rate_interval(seed_outcomes(*rates)) for rates in spreads]
    # Of a seed with few episodes the rate weighs as much, and is known less well.
    few = [*seed_outcomes(0.8, 0.8), *seed_outcomes(0.8, episodes=5)]
    assert report.rate_interval(few)[0] == pytest.approx(0.8) and np.diff(report.rate_interval(few)[1:]) > widths[0]


def test_coverage_on_simulated_data(monkeypatch):
    """Ten seeds of 100 episodes, true rates Beta with mean 0.8 and deviation 0.1: pooled episodes would not do."""
    monkeypatch.setattr(report, "RESAMPLES", 1000)
    rng, trials, hits = np.random.default_rng(0), 200, {"rate": 0, "difference": 0, "pooled": 0}
    for _ in range(trials):
        first, second = (
            [rng.random(100) < rate for rate in rng.beta(0.8 * 15, 0.2 * 15, size=10)] for _ in range(2)
        )  # a variance of 0.8 * 0.2 / (15 + 1)
        _, low, high = report.rate_interval(first)
        hits["rate"] += low <= 0.8 <= high
        _, low, high = report.difference_interval(first, second)
        hits["difference"] += low <= 0 <= high
        low, high = wilson(int(np.sum(first)), 1000)
        hits["pooled"] += low <= 0.8 <= high
    coverage = {name: count / trials for name, count in hits.items()}
    assert 0.88 < coverage["rate"] < 0.98 and 0.88 < coverage["difference"] < 0.99 and coverage["pooled"] < 0.7


def test_differences():
    high, low = seed_outcomes(0.9, 0.92, 0.88), seed_outcomes(0.5, 0.55, 0.45)
    difference, lower, upper = report.difference_interval(high, low)
    assert difference == pytest.approx(0.4) and 0.3 < lower < 0.35 and 0.45 < upper < 0.5
    assert report.difference_interval(low, high) == pytest.approx((-difference, -upper, -lower), abs=0.01)
    widths = [np.diff(report.rate_interval(seeds)[1:])[0] for seeds in (high, low)]
    assert upper - lower == pytest.approx(np.hypot(*widths), rel=0.1)  # two independent resamplings
    assert report.difference_interval(high, high)[0] == 0
    # Newcombe 1998, table II: 10 of 10 against 0 of 10 is 1.0 [0.6075, 1.0].
    assert report.difference_interval([np.ones(10)], [np.zeros(10)]) == pytest.approx((1, 0.6075, 1), abs=1e-4)
    one_constant = report.difference_interval(seed_outcomes(1, 1, 1), low)
    assert one_constant[0] == pytest.approx(0.5) and 0.4 < one_constant[1] < 0.5 < one_constant[2] < 0.6


def test_paired_differences_are_narrower_where_the_same_starts_are_hard(monkeypatch):
    rng = np.random.default_rng(0)
    hard = [rng.random(300) < 0.3 for _ in range(2)]  # neither setting succeeds there
    first, second = ([~h & (rng.random(300) < rate) for h in hard] for rate in (0.99, 0.95))
    first, second = ([x.astype(float) for x in seeds] for seeds in (first, second))
    difference, low, high = report.paired_interval(first, second)
    assert difference == pytest.approx(np.mean(first) - np.mean(second))
    alone = report.difference_interval(first, second)
    assert low < difference < high and high - low < 0.6 * (alone[2] - alone[1])
    assert report.paired_interval(first, first) == (0, 0, 0)
    assert report.paired_interval(second, first) == pytest.approx((-difference, -high, -low), abs=0.005)
    shifted = report.paired_interval([np.ones(5), np.zeros(5)], [np.zeros(5), np.zeros(5)])
    assert shifted == (0.5, 0.0, 1.0)  # two seeds that differ


# -------------------------------------------------------------------------------------------------------------- tables


def rows(text):
    """The rows of a table, without its caption and heading."""
    return [line for line in text.splitlines() if line.startswith("|")][2:]


def test_rows_without_results_are_left_out(monkeypatch, tmp_path):
    full = {name: rows(table()) for name, table in report.TABLES.items()}
    (tmp_path / "state").mkdir()
    for seed in (0, 1, 2):
        for method in ("laeo", "bc"):
            path = Path("state") / f"{method}-FetchPush-{seed}.json"
            (tmp_path / path).write_text((report.RESULTS / path).read_text())
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    partial = {name: rows(table()) for name, table in report.TABLES.items()}
    assert partial.pop("behavior") == full["behavior"]  # of the policies, not of results
    assert [row.split(" | ")[0] for row in partial.pop("made")] == ["| state", "| differences"]
    found = [row.split(" | ")[:2] for row in partial.pop("state")]
    assert found == [["| FetchPush", "LAEO"], ["| FetchPush", "BC"]]
    assert [row.split(" | ")[:2] for row in partial.pop("differences")] == [["| FetchPush", "LAEO - BC"]]
    # FetchPush's standard runs are a case of these three too
    assert [row.split(" | ")[:2] for row in partial.pop("sizes")] == [["| 4,000", "LAEO"], ["| 4,000", "BC"]]
    assert [row.split(" | ")[:2] for row in partial.pop("examples")] == [["| 200", "LAEO"]]
    assert [row.split(" | ")[0] for row in partial.pop("settings")] == ["| default"]
    assert [row.split(" | ")[:2] for row in partial.pop("tailo")] == [["| FetchPush", "LAEO"], ["| FetchPush", "BC"]]
    assert partial == {name: [] for name in partial}


def test_tailos_table_has_it_beside_the_other_methods_and_names_the_oracle(monkeypatch, tmp_path):
    """From runs of three experiments, of which those of other cases and other settings do not count."""
    for experiment, name in (
        ("state", "laeo-FetchPush-0"), ("state", "bc-FetchPush-0"), ("examples", "oril-10-0"),
        ("examples", "purl-100-0"), ("tailo", "tailo-FetchPush-0"), ("tailo", "oracle-FetchPush-0"),
        ("tailo", "tailo-10-0"), ("tailo_search", "base-100"), ("tailo_search", "oracle-100"),
    ):  # fmt: skip
        (tmp_path / experiment).mkdir(exist_ok=True)
        run = json.loads((report.RESULTS / "state" / "bc-FetchPush-0.json").read_text())
        solved = 80 if name.startswith("tailo") else 60
        run["episodes"] |= {kind: [i < solved for i in range(100)] for kind in report.KINDS}
        (tmp_path / experiment / f"{name}.json").write_text(json.dumps(run))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    found = [row.strip("| ").split(" | ") for row in rows(report.TABLES["tailo"]())]
    oracle, few = "oracle: BC of solved episodes", "FetchPush, examples: 10"
    expected = [["FetchPush", name] for name in ("TAILO", "LAEO", "BC", oracle)] + [[few, "TAILO"], [few, "ORIL"]]
    assert [row[:2] for row in found] == expected
    for row in found:
        assert row[4] == ("0.80 / 0.80" if row[1] == "TAILO" else "0.60 / 0.60")
    searched = [row.strip("| ").split(" | ") for row in rows(report.TABLES["tailo_search"]())]
    flags = f"`{benchmark.TAILO_BASE}`", "`bc.py --only-solved`"
    assert [row[:3] for row in searched] == [["base", flags[0], "1"], ["oracle", flags[1], "1"]]


def test_every_table_says_how_its_intervals_are_made_and_has_both_measures():
    for name, table in report.TABLES.items():
        caption, heading = table().split("\n\n|")[0], next(x for x in table().splitlines() if x.startswith("|"))
        if name not in ("behavior", "threads", "image_step", "gpu_speed", "ratio", "camera", "made"):
            assert "bootstrap" in caption or "Wilson" in caption, name
        if name not in ("threads", "image_step", "gpu_speed", "ratio", "camera", "made"):
            assert re.search("any step.*last step|any / last", heading), name
        assert all(row.count("|") == heading.count("|") for row in rows(table())), name


def test_fetch_reach_counts_its_seeds_and_not_its_episodes():
    reach = [row for row in rows(report.TABLES["state"]()) if row.startswith("| FetchReach |")]
    low = wilson(3, 3)[0]
    same = [row for row in reach if "**1.000 " in row or "**0.000 " in row]  # others have outcomes that differ
    assert same and all(f"1.000 [{low:.3f}, 1.000]" in row or f"0.000 [0.000, {1 - low:.3f}]" in row for row in same)


def test_tables_are_written_into_the_readme_and_the_docs_or_into_none(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "TABLES", {"x": lambda: "of x", "y": lambda: "of y"})
    (tmp_path / "docs").mkdir()
    text = "before\n<!-- {} -->\nold\n<!-- end -->\nafter <!-- a comment -->\n"
    (tmp_path / "README.md").write_text(text.format("x"))
    (tmp_path / "docs" / "a.md").write_text(text.format("y") + text.format("z"))
    with pytest.raises(common.UserError, match=r"docs/a.md: there is no table 'z'; the tables are x, y"):
        report.write()
    assert "old" in (tmp_path / "README.md").read_text()
    (tmp_path / "docs" / "a.md").write_text(text.format("y"))
    report.write()
    for path, name in (("README.md", "x"), ("docs/a.md", "y")):
        expected = f"before\n<!-- {name} -->\nof {name}\n<!-- end -->\nafter <!-- a comment -->\n"
        assert (tmp_path / path).read_text() == expected == report.fill(expected)


def test_a_caption_stands_once_in_a_text(monkeypatch):
    """Above the first of the tables that have it; whatever else they are made of stays."""
    made = {"x": "caption\n\n| a |", "y": "caption\n\n| b |", "z": "another\n\n| c |", "plain": "caption"}
    monkeypatch.setattr(report, "TABLES", {name: lambda name=name: made[name] for name in made})
    text = "<!-- {} -->\n{}\n<!-- end -->\n"
    old = "".join(text.format(name, "old") for name in ("x", "y", "z", "x", "plain"))
    new = [("x", made["x"]), ("y", "| b |"), ("z", made["z"]), ("x", "| a |"), ("plain", "caption")]
    expected = "".join(text.format(*table) for table in new)
    assert report.fill(old) == expected == report.fill(expected)


def test_camera_table_is_made_from_its_file(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    ratios = {"FetchReachImage": {"steps": 1.25, "pictures": 2}, "FetchPushImageOccluded": None}
    content = {
        "what": "speed",
        "how": "medians on EGL",
        "ratios": {"x": ratios},
        "removed": {"how": "old", "y": ratios},
    }
    (tmp_path / "camera.json").write_text(json.dumps(content))
    caption, _, *lines = report.camera_table().splitlines()
    assert caption == "Speed: medians on EGL."
    assert lines[0] == "| measure | FetchReachImage | FetchPushImage | FetchPushImageOccluded |"
    assert lines[2:] == ["| x | 1.25 / 2.00 |  |  |", "| y (removed) | 1.25 / 2.00 |  |  |"]


# -------------------------------------------------------------------------------------------------------- measurements


def test_ratio_is_measured_on_the_states_of_the_data(monkeypatch, tmp_path):
    """Where examples are many and like the solved states, the mean is near 1 and nearly all of it in solved states."""
    import ratio

    observations = np.random.default_rng(0).uniform(-1, 1, (100, 21, 2)).astype(np.float32)
    successes, data = observations[..., 0] > 0.5, tmp_path / "data"
    arguments = list(observations), list(np.zeros((100, 20, 1))), observations[successes][:450]
    common.save_dataset(data, *arguments)
    np.save(data / "successes.npy", successes)
    monkeypatch.setattr(ratio, "NUM_SUCCESS", (400,))
    monkeypatch.setattr(ratio, "SEEDS", (3,))
    monkeypatch.setattr(ratio, "NOISES", (0.1, 4.0))
    monkeypatch.setattr(ratio.laeo, "Args", functools.partial(ratio.laeo.Args, eval_episodes=0))
    ratio.main(data, tmp_path / "ratio.json")
    (row,) = json.loads((tmp_path / "ratio.json").read_text())["rows"]
    assert row["num_success"] == 400 and row["seed"] == 3
    assert 0.7 < row["mean"][0] < 1.3 and row["in_solved"][0] > 0.9 and 0.25 < row["in_solved"][1] < 0.8
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (line,) = rows(report.ratio_table())
    assert line.startswith(f"| 400 | {row['mean'][0]:.2f} (") and line.count(" / ") == 2


def test_threads_are_measured_on_data_or_else_on_random_numbers(monkeypatch, tmp_path, capsys):
    import threads

    rng = np.random.default_rng(0)
    observations, actions = rng.normal(size=(4, 11, 25)), rng.uniform(-1, 1, (4, 10, 4))
    common.save_dataset(tmp_path / "FetchPush-medium", observations, actions, rng.normal(size=(200, 25)))
    monkeypatch.setattr(threads, "BATCH_SIZES", {"FetchPush": 4, "FetchPushImage": 2})
    monkeypatch.setattr(threads, "SETTINGS", [(1, ""), (2, "passive")])
    args = threads.Args(rounds=1, seconds=0.01, datasets=tmp_path, output=tmp_path / "threads.json")
    result = threads.main(args)
    assert json.loads(args.output.read_text()) == result and result["machine"]["cores"] >= 1
    assert "FetchPushImage is measured with random numbers" in capsys.readouterr().out
    assert [row["data"] for row in result["rows"]] == ["FetchPush-medium"] * 2 + ["random"] * 2
    assert all(len(row[side]) == 1 and row[side][0] > 0 for row in result["rows"] for side in ("alone", "beside"))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    table = rows(report.threads_table())
    assert len(table) == 4 and "| FetchPush, batch 4 | 2 | passive |" in table[1]
    assert "random numbers" in table[2] and "random numbers" not in table[1]

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with threads.start_worker("passive") as worker:
        assert [worker.submit(os.getenv, name).result() for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")] == [
            "passive",
            None,
        ]
    assert os.environ["OMP_NUM_THREADS"] == "1" and "OMP_WAIT_POLICY" not in os.environ


def test_busy_process_is_busy_and_ends():
    import threads

    with threads.busy_process():
        children = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True
        )
        assert "getppid" in children.stdout
    children = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    assert "getppid" not in children.stdout


def test_plots_are_drawn_of_what_there_is(monkeypatch, tmp_path, capsys):
    import plots

    monkeypatch.setattr(plots, "FIGURES", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    plots.main()
    assert not list(tmp_path.iterdir())  # no results, no figures
    run = {"args": {"env_id": "FetchPush"}, "episodes": {"success": [True, False], "final_success": [False, False]}}
    run["curve"] = [{"step": step, "success_rate": 0.1, "final_success_rate": 0.0} for step in (0, 100)]
    for name in ("state/laeo-FetchPush-0", "state/laeo-FetchPush-1", "examples/laeo-1-0", "examples/oril-1-0"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    plots.main()
    for kind in ("png", "svg"):  # of sizes there is one case alone
        assert {path.stem for path in tmp_path.glob(f"*.{kind}")} == {"tasks", "curves", "examples"}
    drawn = [(tmp_path / f"{name}.svg").read_bytes() for name in ("tasks", "curves")]
    plots.main()  # the same results give the same bytes
    assert drawn == [(tmp_path / f"{name}.svg").read_bytes() for name in ("tasks", "curves")]
    figure, axes = plots.plt.subplots(1, 2)
    assert plots.against("examples", dict(zip(plots.LABELS, axes)), "x")
    (laeo_line, oril_line), last = axes[0].lines, axes[1].lines[0]
    assert laeo_line.get_xydata().tolist() == [[1, 0.5], [200, 0.5]] and oril_line.get_xydata().tolist() == [[1, 0.5]]
    assert last.get_ydata().tolist() == [0, 0]
    plots.plt.close(figure)


def test_curves_are_the_mean_over_seeds_and_a_band_from_the_worst_to_the_best(monkeypatch, tmp_path):
    import plots

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "state").mkdir()
    for seed, rates in enumerate([(0.1, 0.3), (0.2, 0.9), (0.6, 0.6)]):
        points = [{"step": step, "success_rate": x, "final_success_rate": x / 2} for step, x in zip((0, 100), rates)]
        points += [{"step": 150, "success_rate": 1.0, "final_success_rate": 1.0}] * (seed == 0)  # which others lack
        (tmp_path / "state" / f"laeo-FetchPush-{seed}.json").write_text(json.dumps({"curve": points}))
    figure, axes = plots.plt.subplots(1, 2)
    assert plots.curves(dict(zip(plots.LABELS, axes)))
    for ax, part in zip(axes, (1, 0.5)):
        (line,), (band,) = ax.lines, ax.collections
        assert line.get_xydata() == pytest.approx(np.array([[0, 0.3 * part], [100, 0.6 * part]]))
        corners = {(x, round(y, 6)) for x, y in band.get_paths()[0].vertices}
        assert corners == {(0, 0.1 * part), (0, 0.6 * part), (100, 0.3 * part), (100, 0.9 * part)}
    plots.plt.close(figure)


def test_bars_have_the_rates_and_the_intervals_of_the_tables(monkeypatch, tmp_path):
    import plots

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    runs = {"state/laeo-FetchPush": (1, 0, 1, 1), "hard/bc-FetchPush": (0, 1, 0, 0), "tailo/tailo-FetchPush": (1,) * 4}
    for name, outcomes in runs.items():
        (tmp_path / name).parent.mkdir()
        episodes = {"success": outcomes, "final_success": [0, *outcomes[1:]]}
        (tmp_path / f"{name}-0.json").write_text(json.dumps({"episodes": episodes}))
    figure, axes = plots.plt.subplots(2, 1)
    assert plots.bars(dict(zip(plots.LABELS, axes)))
    assert [round(bar.get_height(), 6) for bar in axes[0].patches] == [0.75, 0.25, 1.0]  # LAEO, BC, TAILO
    assert [round(bar.get_x() + bar.get_width() / 2) for bar in axes[0].patches] == [0, 1, 0]  # medium, hard, medium
    ends = [tuple(segment[:, 1]) for lines in axes[0].collections for segment in lines.get_segments()]
    expected = [report.rate_interval([np.array(x, float)])[1:] for x in runs.values()]
    assert ends == [pytest.approx(x) for x in expected]
    plots.plt.close(figure)


def test_every_result_names_commit_date_and_machine():
    for path in sorted(benchmark.RESULTS.rglob("*.json")):
        if "history" not in path.parts:
            made = json.loads(path.read_text())["made"]
            assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", made["commit"]), path
            assert re.fullmatch(r"2\d{3}-\d\d-\d\d", made["date"]) and "cores, " in made["machine"], path


class ScriptedEnv:
    """Episodes in which the task is solved as written, before the first action and after each."""

    def __init__(self, episodes):
        self.episodes = episodes

    def reset(self, seed):
        self.script = list(self.episodes.pop(0))
        return np.full(10, 0.1), {"success": bool(self.script.pop(0))}

    def step(self, action):
        info = {"success": bool(self.script.pop(0))}
        return np.full(10, 0.1 + len(self.script)), 0.0, False, not self.script, info

    def close(self):
        pass


@pytest.mark.parametrize("objective", ["weighted", "log_exp_f", "nearest"])
def test_values_are_those_of_the_critic(objective, reach_dataset, tmp_path, monkeypatch, capsys):
    """Of a run on FetchReach; the value of the data's actions again, at one state, from the saved networks."""
    import values

    import laeo

    flags = {"policy_objective": objective, "gradient_steps": 30, "eval_episodes": 0, "holdout_fraction": 0.5}
    args = laeo.Args(dataset=reach_dataset, run_dir=tmp_path / "run", num_success=10, batch_size=32, **flags)
    laeo.train(args)
    args, dataset, data, examples, actor, critic = loaded = values.load(tmp_path / "run")
    found = values.measure(*loaded)
    assert {(row["low"], row["high"]) for row in found} <= set(
        zip(values.EDGES["FetchReach"], values.EDGES["FetchReach"][1:])
    )
    heldout = data.heldout.remaining >= 10
    assert sum(row["states"] for row in found) == heldout.sum() > 100
    assert all(1 <= row["effective"] <= (10 if objective == "log_exp_f" else 2048) for row in found)
    if objective == "nearest":  # shares of the future
        assert all(max(row["policy"], row["data"]) < 0 for row in found)
    assert all(row["best_random"] > -1 and row["states"] > 0 for row in found)
    farthest = max(found, key=lambda row: (row["low"], row["states"]))
    assert {row["rest"] for row in found} == {True, False} and farthest["low"] >= 0.05
    if objective == "log_exp_f":  # all held-out states, in float64
        few = [row for row in found if row["states"] <= values.STATES]
        position = data.observations.numpy()[:, common.TASKS["FetchReach"].achieved_goal]
        distance = np.linalg.norm(position - dataset.success_examples[:, :3].mean(0), axis=-1)
        moving = np.linalg.norm(np.diff(position, axis=0, append=position[-1:]), axis=-1) > 1e-3
        row, action = data.heldout.row[heldout], torch.from_numpy(data.heldout.action[heldout])
        observation = data.observations[torch.from_numpy(row)]
        with torch.no_grad():
            features, psi = critic.encoder(observation), critic.psi(critic.encoder(examples)).double().numpy()
            phis = [critic.phi(features, a).double().numpy() for a in (action, actor(observation))]  # bounds are +-1
        value, played = (np.log(np.exp((x @ psi.swapaxes(1, 2)).min(0) + np.log(31)).mean(-1)) for x in phis)
        for case in few:
            inside = (case["low"] <= distance[row]) & (distance[row] < case["high"]) & (moving[row] != case["rest"])
            assert case["data"] == pytest.approx(value[inside].mean(), abs=1e-3)
            assert case["policy"] == pytest.approx(played[inside].mean(), abs=1e-3)
        assert np.abs(value - played).mean() > 0.01
        assert few
    monkeypatch.setattr(common, "make_env", lambda env_id: ScriptedEnv([[0, 1, 1, 1], [1] * 7 + [0, 1, 0, 0]]))
    monkeypatch.setattr(actor, "mode", lambda observation: torch.zeros(len(observation), 4))
    for end, states in ((True, 2), (False, 5 + 1)):  # solved, before an action; the last five before a loss
        (row,) = values.measure_solved(*loaded, episodes=1) if end else values.measure_solved(*loaded, episodes=2)[1:]
        assert row["end"] == end and row["states"] == states and row["nothing"] == 0 and row["best_random"] > -1
    assert values.measure_solved(*loaded, episodes=2)[0]["states"] == 2
    monkeypatch.undo()
    monkeypatch.setattr(values.measure_solved.__wrapped__, "__defaults__", (2,))
    values.main(tmp_path / "run")
    assert len(capsys.readouterr().out.splitlines()) >= 3 + len(found)
    with pytest.raises(common.UserError, match="is no run directory"):
        values.main(tmp_path)


def test_failures_are_where_failed_episodes_started(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    with pytest.raises(common.UserError, match="no result in benchmark/results/state begins with x"):
        failures.main("x")
    (tmp_path / "state").mkdir()
    episodes = {"seed": [1, 2, 3], "success": [True, True, False], "final_success": [True, False, False]}
    result = {"args": {"env_id": "FetchPush"}, "episodes": episodes}
    (tmp_path / "state" / "laeo-FetchPush-0.json").write_text(json.dumps(result))
    failures.main("laeo")
    first, *starts = capsys.readouterr().out.splitlines()
    assert first == "laeo-FetchPush-0: of 3 episodes 1 never solved, 2 not at the last step"
    env = common.make_env("FetchPush")
    for seed, when in ((2, "before the end"), (3, "never")):
        block = env.reset(seed=seed)[0][3:6]
        assert f"    {block[0]:.3f} {block[1]:.3f} {block[2]:.3f} {when}" in starts
    env.close()
    assert len(starts) == 2


def test_failures_end_at_these_distances(monkeypatch, capsys):
    """A policy that does nothing leaves the block where it is."""
    given = lambda run_dir: (lambda observation: np.zeros(4), {"args": {"env_id": "FetchPush"}})  # noqa: E731
    monkeypatch.setattr(failures.evaluate, "load_policy", given)
    failures.ends(Path("runs/x"), 12)
    first, distances = capsys.readouterr().out.splitlines()
    env, expected = common.make_env("FetchPush"), []
    for i in range(12):
        _, info = env.reset(seed=common.episode_seed(100, "evaluation", i))
        block = env.unwrapped.inner._get_obs()["achieved_goal"]
        expected += [] if info["success"] else [f"{np.linalg.norm(block - env.unwrapped.inner.goal):.2f}"]
    env.close()
    message = f"runs/x: {len(expected)} of 12 episodes not solved at the last step, at these distances:"
    assert first == message and distances.split() == sorted(expected, key=float) and len(expected) > 8
    monkeypatch.setattr(failures.evaluate, "load_policy", lambda run_dir: (None, {"args": {"env_id": "Point-v0"}}))
    with pytest.raises(common.UserError, match="runs/x is a run on Point-v0; it must be on one of FetchReach, "):
        failures.ends(Path("runs/x"))


def test_pictures_are_of_success_examples(tmp_path, reach_dataset):
    import pictures

    require_gl()
    for env_id in ("FetchReach", "FetchReachImage"):
        picture = np.asarray(pictures.success_picture(env_id, reach_dataset.parent))
        assert picture.shape == (pictures.SIZE, pictures.SIZE, 3) and picture.std() > 10
    blocks = picture.reshape(64, 3, 64, 3, 3)  # the policy's pixels, each three by three
    assert (blocks == blocks[:, :1, :, :1]).all()

    copy = shutil.copytree(reach_dataset, tmp_path / reach_dataset.name)
    np.save(copy / "actions.npy", np.zeros_like(np.load(copy / "actions.npy")))
    with pytest.raises(common.UserError, match="cannot be played again"):
        pictures.success_picture("FetchReach", tmp_path)
    with pytest.raises(common.UserError, match="there is no dataset"):
        pictures.success_picture("FetchPush", tmp_path)


def test_occlusion_is_a_share_of_the_blocks_own_pixels():
    import occlusion

    require_gl()
    found = occlusion.shares(occlusion.robot_tasks.VIEWS["FetchPushImageOccluded"], 1)
    both = np.concatenate([found[True], found[False]])
    assert 0 < len(both) <= 51 and both.min() >= 0 and both.max() <= 1
