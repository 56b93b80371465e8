"""Minutes of real training: run with `pytest -m slow`."""

import json

import pytest

import collect_data
import common
import laeo
import oril
import purl


@pytest.mark.slow
def test_laeo_pushes_better_than_its_data(tmp_path):
    """FetchPush, a quarter of the data and half of the steps that the README measures."""
    data = collect_data.collect(collect_data.Args(env_id="FetchPush", num_episodes=1000, output=tmp_path / "data"))
    args = laeo.Args(env_id="FetchPush", dataset=tmp_path / "data", run_dir=tmp_path / "run", gradient_steps=5000)
    result = laeo.train(args)
    assert result["success_rate"] > data["success_rate"] + 0.15
    assert result["final_success_rate"] > data["final_success_rate"] + 0.1


@pytest.mark.slow
def test_hard_data_succeed_as_often_as_promised(tmp_path):
    data = collect_data.collect(
        collect_data.Args(env_id="FetchPush", quality="hard", num_episodes=1000, output=tmp_path / "d")
    )
    assert 0.07 < data["success_rate"] < 0.13
    assert common.read_metadata(tmp_path / "d")["quality"] == "hard"


@pytest.mark.slow
def test_training_the_agent_solves_reaching(tmp_path):
    """The command of behavior/FetchReach.pt, with a third of its steps."""
    args = collect_data.Args(env_id="FetchReach", train_steps=6000, calibration_episodes=20)
    behavior = collect_data.train_agent(args)
    collect_data.calibrate(args, behavior["checkpoints"])
    assert max(checkpoint["success_rate"] for checkpoint in behavior["checkpoints"]) >= 0.9


@pytest.mark.slow
def test_learned_rewards_push_better_than_their_data(tmp_path):
    """FetchPush, a quarter of the data; the learned reward tells held-out successes from failures."""
    data = collect_data.collect(collect_data.Args(env_id="FetchPush", num_episodes=1000, output=tmp_path / "data"))
    for script in (oril, purl):
        run_dir = tmp_path / script.__name__
        args = script.Args(env_id="FetchPush", dataset=tmp_path / "data", run_dir=run_dir, gradient_steps=10_000)
        assert script.train(args)["success_rate"] > data["success_rate"] + 0.05
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        last = [row for row in rows if "heldout/reward_success" in row][-1]
        assert last["heldout/reward_success"] > 5 * last["heldout/reward_failure"]
