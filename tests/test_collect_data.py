"""The data-collecting agent, its checkpoints, and the datasets that are rolled out from them."""

import dataclasses
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import collect_data
import common

SCRIPT = Path(collect_data.__file__)

STATE_TASKS = [env_id for env_id, task in common.TASKS.items() if task.state_task is None]


# ------------------------------------------------------------------------------------------- networks, losses, batches


def test_actor_density_is_the_normal_density_times_the_jacobian_of_tanh():
    actor = collect_data.Actor(4, 3, 2, 16, torch.Generator().manual_seed(0)).double()
    generator = torch.Generator().manual_seed(1)
    observation, goal, noise = (torch.randn(50, n, generator=generator, dtype=torch.float64) for n in (4, 3, 2))
    mean, std = actor(observation, goal)
    log_prob = collect_data.tanh_normal_log_prob(mean + std * noise, std, noise)
    normal = torch.distributions.Normal(mean, std)
    tanh_normal = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform())
    expected = tanh_normal.log_prob(actor.sample(observation, goal, noise)).sum(-1)
    torch.testing.assert_close(log_prob, expected, rtol=1e-8, atol=1e-8)


def test_losses_match_their_closed_forms():
    generator = torch.Generator().manual_seed(2)
    phi, psi = (torch.randn(2, 5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    log_prob = torch.randn(5, generator=generator, dtype=torch.float64)
    logits = np.einsum("kir,kjr->kij", phi.numpy(), psi.numpy())
    signs = np.where(np.eye(5), -1, 1)
    assert collect_data.critic_loss(phi, psi).item() == pytest.approx(
        np.log1p(np.exp(signs * logits)).mean(), rel=1e-12
    )
    value = [min(logits[0, i, i], logits[1, i, i]) for i in range(5)]
    loss = collect_data.actor_loss(phi, psi, log_prob, torch.tensor(0.3, dtype=torch.float64)).item()
    assert loss == pytest.approx(np.mean(0.3 * log_prob.numpy() - value), rel=1e-12)


def test_goals_come_from_the_truncated_geometric_law_of_the_same_episode():
    steps, discount, draws = 6, 0.7, 100_000
    replay = collect_data.ReplayBuffer(10, steps, 4, 2, slice(1, 4))
    observations = np.zeros((3, steps + 1, 4), np.float32)
    observations[..., 0] = observations[..., 1] = np.arange(steps + 1)
    observations[..., 2] = np.arange(3)[:, None]
    actions = np.arange(3 * steps * 2, dtype=np.float32).reshape(3, steps, 2)
    replay.add(observations[:2], actions[:2])
    replay.add(observations[2:], actions[2:])
    observation, action, goal = replay.sample(draws, discount, torch.Generator().manual_seed(0))
    episode, t, future = observation[:, 2].long(), observation[:, 0].long(), goal[:, 0].long()
    assert torch.equal(observation[:, 2], goal[:, 1])
    assert torch.equal(action, torch.from_numpy(actions)[episode, t])
    assert (future > t).all() and (future <= steps).all()
    statistic = cells = 0
    for start in range(steps):
        law = discount ** np.arange(steps - start)
        for k, expected in enumerate(draws / steps * law / law.sum()):
            statistic += (((t == start) & (future == start + 1 + k)).sum().item() - expected) ** 2 / expected
            cells += 1
    assert abs(statistic - (cells - 1)) < 4 * np.sqrt(2 * (cells - 1))


def test_each_loss_reaches_only_its_own_network():
    generator = torch.Generator().manual_seed(3)
    actor = collect_data.Actor(4, 3, 2, 16, generator)
    critic = collect_data.Critic(4, 3, 2, 16, 8, generator)
    log_alpha = torch.tensor(0.5, requires_grad=True)
    batch = tuple(torch.randn(9, n, generator=generator) for n in (4, 2, 3))
    optimizer = torch.optim.SGD([*actor.parameters(), *critic.parameters(), log_alpha], lr=0.0)
    args = collect_data.Args(target_entropy=0.7)
    collect_data.update(batch, actor, critic, log_alpha, optimizer, args, torch.Generator().manual_seed(4))
    observation, action, goal = batch
    loss = collect_data.critic_loss(critic.phi(observation, action), critic.psi(goal))
    for parameter, gradient in zip(critic.parameters(), torch.autograd.grad(loss, list(critic.parameters()))):
        torch.testing.assert_close(parameter.grad, gradient)
    noise = torch.randn(9, 2, generator=torch.Generator().manual_seed(4))
    mean, std = actor(observation, goal)
    log_prob = collect_data.tanh_normal_log_prob(mean + std * noise, std, noise)
    value = (
        (critic.phi(observation, actor.sample(observation, goal, noise)) * critic.psi(goal).detach()).sum(-1).amin(0)
    )
    loss = (log_alpha.detach().exp() * log_prob - value).mean()
    for parameter, gradient in zip(actor.parameters(), torch.autograd.grad(loss, list(actor.parameters()))):
        torch.testing.assert_close(parameter.grad, gradient)
    # The entropy coefficient grows while the entropy, -log_prob, is below its target.
    expected = log_alpha.exp().item() * (-log_prob.mean().item() - 0.7)
    assert log_alpha.grad.item() == pytest.approx(expected, rel=1e-5)


def test_random_goals_are_those_of_other_rows():
    """With a share of 0.5, the first half of the actor's goals is rolled by one row, and their representations too."""
    generator = torch.Generator().manual_seed(3)
    actor = collect_data.Actor(4, 3, 2, 16, generator)
    critic = collect_data.Critic(4, 3, 2, 16, 8, generator)
    log_alpha = torch.tensor(float("-inf"), requires_grad=True)
    batch = tuple(torch.randn(8, n, generator=generator) for n in (4, 2, 3))
    optimizer = torch.optim.SGD([*actor.parameters(), *critic.parameters(), log_alpha], lr=0.0)
    args = collect_data.Args(random_goals=0.5, entropy_coefficient=0.0)
    collect_data.update(batch, actor, critic, log_alpha, optimizer, args, torch.Generator().manual_seed(4))
    observation, _, goal = batch
    goal = torch.cat([goal[-1:], goal[:3], goal[4:]])
    noise = torch.randn(8, 2, generator=torch.Generator().manual_seed(4))
    value = (critic.phi(observation, actor.sample(observation, goal, noise)) * critic.psi(goal)).sum(-1).amin(0)
    for parameter, gradient in zip(actor.parameters(), torch.autograd.grad(-value.mean(), list(actor.parameters()))):
        torch.testing.assert_close(parameter.grad, gradient)
    assert log_alpha.grad is None  # a fixed coefficient stays


# ------------------------------------------------------------------------------------------------------------ the agent


@pytest.mark.parametrize("env_id", STATE_TASKS)
def test_scripted_controller_solves_the_task(env_id):
    task, env = common.TASKS[env_id], common.make_env(env_id)
    solved = 0
    for seed in range(8):
        observation, _ = env.reset(seed=seed)
        for _ in range(task.max_episode_steps):
            action = collect_data.scripted_action(env_id, observation, np.array(task.desired_goal))
            assert action.shape == (4,) and np.abs(action).max() <= 1
            observation, _, _, _, info = env.step(action.astype(np.float32))
        solved += info["success"]
    assert solved >= 7


@pytest.mark.parametrize("env_id", ["SawyerWindowOpen", "SawyerDrawerClose"])
def test_desired_goals_of_sawyer_are_where_the_solved_object_rests(env_id):
    task, env = common.TASKS[env_id], common.make_env(env_id)
    observation, _ = env.reset(seed=0)
    for _ in range(task.max_episode_steps):
        action = collect_data.scripted_action(env_id, observation, np.array(task.desired_goal))
        observation, _, _, _, info = env.step(action.astype(np.float32))
    assert info["success"]
    assert np.abs(observation[task.achieved_goal] - task.desired_goal).max() < 0.01


SMALL_AGENT = {"train_steps": 400, "warmup_steps": 10, "seed_episodes": 3, "num_envs": 2, "hidden_dim": 16}


@pytest.fixture(scope="module")
def small_agent():
    return collect_data.train_agent(collect_data.Args(env_id="FetchReach", **SMALL_AGENT))


def test_training_the_agent_gives_the_same_bits_again(small_agent):
    again = collect_data.train_agent(collect_data.Args(env_id="FetchReach", **SMALL_AGENT))
    other = collect_data.train_agent(collect_data.Args(env_id="FetchReach", seed=1, **SMALL_AGENT))
    one, two, three = (agent["checkpoints"][-1]["actor"] for agent in (small_agent, again, other))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["net.0.weight"], three["net.0.weight"])


def test_checkpoints_go_from_untrained_to_the_last_step(small_agent):
    steps = [checkpoint["gradient_steps"] for checkpoint in small_agent["checkpoints"]]
    assert steps[0] == 0 and steps[-1] == 10 + 400 // 2
    assert steps == sorted(set(steps)) and steps[-2] == steps[-1] // 2
    assert small_agent["checkpoints"][-1]["env_steps"] == 400
    first, last = (small_agent["checkpoints"][i]["actor"]["net.0.weight"] for i in (0, -1))
    assert first.dtype == torch.float16 and not torch.equal(first, last)


def test_the_papers_way_starts_from_random_actions_without_warm_up():
    settings = {**SMALL_AGENT, "seed_episodes": 0, "warmup_steps": 2000, "train_steps": 100}
    agent = collect_data.train_agent(collect_data.Args(env_id="FetchReach", **settings))
    assert agent["seed_episodes_success_rate"] == 0.0  # random actions do not reach; the controller does
    assert agent["checkpoints"][-1]["gradient_steps"] == 50


def test_train_flag_writes_weights_that_the_next_command_rolls_out(tmp_path):
    args = collect_data.Args(
        env_id="SawyerDrawerClose", behavior_dir=tmp_path / "behavior", calibration_episodes=4, num_episodes=4,
        output=tmp_path / "data", train=True, **{**SMALL_AGENT, "train_steps": 300},
    )  # fmt: skip
    try:
        collect_data.collect(args)
    except common.UserError as error:  # so short a training need not give policies good and bad enough to mix
        assert "no mixture of checkpoints" in str(error)
    behavior = common.load_weights(tmp_path / "behavior" / "SawyerDrawerClose.pt")
    assert all(0 <= checkpoint["success_rate"] <= 1 for checkpoint in behavior["checkpoints"])
    assert behavior["args"]["train_steps"] == 300 and behavior["versions"]["mujoco"] == "3.3.0"


# ---------------------------------------------------------------------------------------------------------- the mixture


def test_mixture_has_the_wanted_rate_and_prefers_better_policies_for_more():
    rates = [0.05, 0.1, 0.4, 0.9, 0.95]
    for target in (0.1, 0.475, 0.48, 0.9):
        weights = collect_data.mixture(rates, target)
        assert weights.sum() == pytest.approx(1) and (weights >= 0).all()
        assert weights @ rates == pytest.approx(target, abs=1e-6)
        order = np.diff(weights)
        assert (order >= 0).all() if target > np.mean(rates) else (order <= 0).all()
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


# ------------------------------------------------------------------------------------------------ the shipped policies


@pytest.mark.parametrize("env_id", STATE_TASKS)
def test_shipped_policies_can_make_both_qualities(env_id):
    behavior = common.load_weights(SCRIPT.parent / "behavior" / f"{env_id}.pt")
    assert behavior["env_id"] == env_id
    assert behavior["versions"]["mujoco"] == "3.3.0"
    rates = [checkpoint["success_rate"] for checkpoint in behavior["checkpoints"]]
    assert max(rates) >= 0.9
    for quality, target in collect_data.SUCCESS_RATES.items():
        weights = collect_data.mixture(rates, target)
        assert weights @ rates == pytest.approx(target, abs=1e-6), quality


def test_shipped_policies_are_small():
    assert sum(path.stat().st_size for path in (SCRIPT.parent / "behavior").glob("*.pt")) < 15e6


def test_shipped_policies_say_how_they_were_made_and_not_where():
    for env_id in STATE_TASKS:
        args = common.load_weights(SCRIPT.parent / "behavior" / f"{env_id}.pt")["args"]
        assert args["env_id"] == env_id and args["train"] is True and args["seed"] == 0
        assert not {"output", "behavior_dir"} & set(args)


@pytest.mark.parametrize("env_id", STATE_TASKS)
def test_best_shipped_policy_is_as_good_as_its_file_says(env_id):
    behavior = common.load_weights(SCRIPT.parent / "behavior" / f"{env_id}.pt")
    best = max(behavior["checkpoints"], key=lambda checkpoint: checkpoint["success_rate"])
    env, actor = common.make_env(env_id), collect_data.load_actor(best)
    episodes = 20
    solved = sum(collect_data.roll_out(env, env_id, actor, seed)[2][1:].any() for seed in range(episodes))
    assert solved / episodes > best["success_rate"] - 4 * (0.1 / episodes) ** 0.5


# ----------------------------------------------------------------------------------------------------------- datasets


def read_files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_same_command_gives_the_same_bytes_with_any_number_of_workers(reach_dataset, tmp_path):
    for workers in (1, 3):
        args = collect_data.Args(num_episodes=40, output=tmp_path / str(workers), num_workers=workers)
        collect_data.collect(args)
        assert read_files(tmp_path / str(workers)) == read_files(reach_dataset)


def test_other_seed_and_other_quality_give_other_episodes(reach_dataset, tmp_path):
    common_args = collect_data.Args(num_episodes=12)
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
    assert arrays["observations"].shape == (40, 51, 10) and arrays["actions"].shape == (40, 50, 4)
    assert (arrays["lengths"] == 50).all()
    successes = arrays["successes"]
    assert metadata["success_rate"] == successes[:, 1:].any(1).mean()
    assert metadata["final_success_rate"] == successes[:, -1].mean()
    assert metadata["initial_success_rate"] == successes[:, 0].mean() == 0
    assert 0.15 < metadata["success_rate"] < 0.8  # 0.475 within four standard errors
    assert sum(metadata["behavior"]["episodes"]) == 40
    # FetchReach succeeds where the gripper, the first three numbers, is within 5 cm of the goal.
    distance = np.linalg.norm(arrays["observations"][..., :3] - (1.3, 0.3, 0.9), axis=-1)
    assert np.array_equal(distance < 0.05, successes)
    examples = arrays["success_examples"]
    assert (np.linalg.norm(examples[:, :3] - (1.3, 0.3, 0.9), axis=-1) < 0.05).all()
    assert len(examples) == metadata["num_success_examples"] == min(1000, successes[:, 1:].sum())


def test_stored_actions_lead_from_one_stored_observation_to_the_next(reach_dataset):
    """Replaying an episode's actions in a new environment from its seed gives its observations, to the bit."""
    observations, actions = (np.load(reach_dataset / f"{name}.npy") for name in ("observations", "actions"))
    env = common.make_env("FetchReach")
    for episode in (0, 7):
        observation, _ = env.reset(seed=common.episode_seed("dataset", 0, episode))
        assert np.array_equal(observation, observations[episode, 0])
        for t, action in enumerate(actions[episode]):
            observation, *_ = env.step(action)
            assert np.array_equal(observation, observations[episode, t + 1])


def test_existing_dataset_is_kept_unless_told_otherwise(reach_dataset, tmp_path):
    target = tmp_path / "data"
    shutil.copytree(reach_dataset, target)
    with pytest.raises(common.UserError, match="data exists; add --overwrite"):
        collect_data.collect(collect_data.Args(num_episodes=12, output=target))
    assert read_files(target) == read_files(reach_dataset)
    collect_data.collect(collect_data.Args(num_episodes=12, output=target, overwrite=True))
    assert common.read_metadata(target)["num_episodes"] == 12


def test_directory_that_is_no_dataset_is_never_replaced(tmp_path):
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(common.UserError, match="is not a dataset, so it is not replaced"):
        collect_data.collect(collect_data.Args(num_episodes=12, output=tmp_path, overwrite=True))
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"env_id": "FetchPsh"}, "there is no task 'FetchPsh'; did you mean FetchPush"),
        ({"quality": "easy"}, "there is no quality 'easy'; choose one of medium, hard"),
        ({"num_episodes": 0}, "--num-episodes is 0; it must be 1 or more"),
        ({"train_steps": -1}, "--train-steps is -1"),
        ({"seed": -1}, "--seed is -1; it must be from 0 to 4294967295"),
        ({"behavior_dir": Path("nowhere")}, "nowhere/FetchReach.pt is damaged or missing"),
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


def test_interrupted_collection_leaves_nothing_behind(tmp_path):
    command = [sys.executable, str(SCRIPT), "--env-id", "FetchReach", "--output", str(tmp_path / "data")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.time() + 60
    while not list(tmp_path.glob(".data.*")) and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(5)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches every process of the terminal
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert error.splitlines()[-1] == f"interrupted: nothing was written to {tmp_path / 'data'}."
    assert "Traceback" not in error
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
