"""Minutes of real training: run with `pytest -m slow`."""

import json

import pytest

import collect_data
import common
import contrastive_rl
import episodes
import laeo
import oril
import purl


@pytest.fixture(scope="module")
def push(tmp_path_factory):
    """FetchPush, a quarter of the standard dataset: its directory and its metadata."""
    path = tmp_path_factory.mktemp("datasets") / "FetchPush-medium"
    return path, collect_data.collect(collect_data.Args(env_id="FetchPush", num_episodes=1000, output=path))


@pytest.mark.slow
def test_laeo_pushes_better_than_its_data(push, tmp_path):
    """With a quarter of the gradient steps that the tables have."""
    path, data = push
    args = laeo.Args(env_id="FetchPush", dataset=path, run_dir=tmp_path / "run", gradient_steps=5000)
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
    """The command of behavior/FetchReach.pt, with fewer steps."""
    args = contrastive_rl.Args(
        env_id="FetchReach", train_steps=6000, calibration_episodes=20, behavior_dir=tmp_path / "behavior",
        run_dir=tmp_path / "run",
    )  # fmt: skip
    contrastive_rl.train(args)
    _, rates = episodes.load_behavior(tmp_path / "behavior" / "FetchReach.pt", "FetchReach")
    assert max(rates) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{"critic_loss": "nce"}, {"critic_loss": "c_learning"}, {"gcbc": True}], ids=str)
def test_goals_of_the_data_are_reached_offline(push, tmp_path, flags):
    """Better than the data, whose episodes were all played for the goal that is commanded."""
    path, data = push
    args = contrastive_rl.Args(env_id="FetchPush", dataset=path, run_dir=tmp_path, gradient_steps=10_000, **flags)
    assert contrastive_rl.train(args)["success_rate"] > data["success_rate"] + 0.05


@pytest.mark.slow
def test_learned_rewards_push_better_than_their_data(push, tmp_path):
    """The learned reward tells held-out successes from failures."""
    path, data = push
    for script in (oril, purl):
        run_dir = tmp_path / script.__name__
        args = script.Args(env_id="FetchPush", dataset=path, run_dir=run_dir, gradient_steps=10_000)
        assert script.train(args)["success_rate"] > data["success_rate"] + 0.05
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        last = [row for row in rows if "heldout/reward_success" in row][-1]
        assert last["heldout/reward_success"] > 5 * last["heldout/reward_failure"]
