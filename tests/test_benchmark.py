"""The benchmark's launcher: results beside each other, resumed where it was stopped, and no failure swallowed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmark"))
import run as benchmark


def launch(monkeypatch, tmp_path, commands):
    """Run `benchmark/run.py x` with these commands as experiment x; return its exit status."""
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmark, "experiments", lambda: {"x": commands})
    monkeypatch.setattr(sys, "argv", ["run.py", "x"])
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
