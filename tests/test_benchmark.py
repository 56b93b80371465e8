"""The benchmark's launcher: results beside each other, resumed where it was stopped, and no failure swallowed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmark"))
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


def test_a_failed_run_fails_the_benchmark_and_what_is_done_stays_done(monkeypatch, tmp_path, reach_dataset, capsys):
    flags = ["--gradient-steps", "2", "--eval-interval", "0", "--eval-episodes", "1", "--dataset", str(reach_dataset)]
    commands = {"bad": ["bc.py", "--env-id", "Nope"], "good": ["bc.py", *flags]}
    assert launch(monkeypatch, tmp_path, commands) == 1
    assert "failed: python bc.py --env-id Nope" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["good.json"]
    result = json.loads((tmp_path / "x" / "good.json").read_text())
    assert result["gradient_steps"] == 2 and len(result["episodes"]["success"]) == 1

    (tmp_path / "x" / "good.json").write_text("{}")
    assert launch(monkeypatch, tmp_path, {"good": commands["good"]}, "--redo") == 0
    assert json.loads((tmp_path / "x" / "good.json").read_text())["gradient_steps"] == 2

    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("it ran again what is done"))
    assert launch(monkeypatch, tmp_path, {"good": commands["good"]}) == 0


def test_every_method_has_every_task_and_seed_with_the_same_steps():
    """But for LAEO on FetchReach, which the README names."""
    state = benchmark.experiments()["state"]
    assert len(state) == 4 * 4 * 3
    for name, command in state.items():
        method, task, seed = name.split("-")
        assert command[0] == f"{method}.py" and command[1:5] == ["--env-id", task, "--seed", seed]
        if name != f"laeo-FetchReach-{seed}":
            assert command[1:] == state[f"bc-{task}-{seed}"][1:]


def test_datasets_have_as_many_episodes_as_in_the_tables():
    results = {path.stem: json.loads(path.read_text()) for path in (benchmark.RESULTS / "data").glob("*.json")}
    commands = benchmark.experiments()["data"]
    assert set(benchmark.STATE_TASKS) <= set(results) <= set(commands)
    for task, metadata in results.items():
        command = commands[task]
        assert int(command[command.index("--num-episodes") + 1]) == metadata["num_episodes"]
        assert metadata["num_episodes"] == (2000 if task.startswith("Sawyer") else 4000)


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


def test_ctrl_c_waits_for_the_runs_and_says_one_sentence(tmp_path, reach_dataset):
    """The signal goes to the whole group of processes, as from a terminal."""
    flags = f"--gradient-steps 1000000 --eval-interval 0 --dataset {reach_dataset}".split()
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
    assert "interrupted at step" in next(tmp_path.glob("benchmark-*/long.log")).read_text()  # the run ended by itself


def test_rows_without_results_are_left_out(monkeypatch, tmp_path):
    rows = {name: table().splitlines()[2:] for name, table in report.TABLES.items()}
    (tmp_path / "state").mkdir()
    for seed in (0, 1, 2):
        path = Path("state") / f"oril-FetchPush-{seed}.json"
        (tmp_path / path).write_text((report.RESULTS / path).read_text())
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    partial = {name: table().splitlines()[2:] for name, table in report.TABLES.items()}
    assert partial.pop("behavior") == rows["behavior"]  # of the policies, not of results
    assert partial.pop("state") == [row for row in rows["state"] if row.startswith("| FetchPush | ORIL |")]
    assert partial == {name: [] for name in partial}
