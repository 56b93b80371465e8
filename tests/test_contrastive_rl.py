"""The data-collecting agent: its losses, its batches, its checkpoints and the files that hold them."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import collect_data
import common
import contrastive_rl

SCRIPT = Path(contrastive_rl.__file__)
BEHAVIOR = SCRIPT.parent / "behavior"
STATE_TASKS = [env_id for env_id, task in common.TASKS.items() if task.state_task is None]


def load(env_id):
    return torch.load(BEHAVIOR / f"{env_id}.pt", weights_only=True)


# ------------------------------------------------------------------------------------------- networks, losses, batches


def test_actor_density_is_the_normal_density_times_the_jacobian_of_tanh():
    actor = contrastive_rl.Actor((4, 3, 2), 16, torch.Generator().manual_seed(0)).double()
    generator = torch.Generator().manual_seed(1)
    observation, goal, noise = (torch.randn(50, n, generator=generator, dtype=torch.float64) for n in (4, 3, 2))
    mean, std = actor(observation, goal)
    log_prob = contrastive_rl.tanh_normal_log_prob(mean, std, mean + std * noise)
    # By the definition of a density after a change of variables, in NumPy.
    x, std, noise = (mean + std * noise).detach().numpy(), std.detach().numpy(), noise.numpy()
    expected = -(noise**2) / 2 - np.log(std) - np.log(2 * np.pi) / 2 - np.log(1 - np.tanh(x) ** 2)
    np.testing.assert_allclose(log_prob.detach(), expected.sum(-1), rtol=1e-8, atol=1e-8)
    normal = torch.distributions.Normal(mean, torch.tensor(std))
    tanh_normal = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform())
    expected = tanh_normal.log_prob(actor.sample(observation, goal, torch.tensor(noise))).sum(-1)
    torch.testing.assert_close(log_prob, expected, rtol=1e-8, atol=1e-8)


def test_log_density_is_finite_where_tanh_is_saturated():
    x = torch.tensor([[-40.0, 40.0]], requires_grad=True)
    log_prob = contrastive_rl.tanh_normal_log_prob(torch.zeros(1, 2), torch.full((1, 2), 20.0), x)
    # log N(40; 0, 20) - log(1 - tanh(40)^2), twice; the last term is -2 (40 - log 2)
    expected = 2 * (-2 - np.log(20) - np.log(2 * np.pi) / 2 + 2 * (40 - np.log(2)))
    assert log_prob.item() == pytest.approx(expected, rel=1e-6)
    (gradient,) = torch.autograd.grad(log_prob.sum(), x)
    assert torch.isfinite(gradient).all()


def test_losses_match_their_closed_forms():
    generator = torch.Generator().manual_seed(2)
    phi, psi = (torch.randn(2, 5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    log_prob = torch.randn(5, generator=generator, dtype=torch.float64)
    logits = np.einsum("kir,kjr->kij", phi.numpy(), psi.numpy())
    signs = np.where(np.eye(5), -1, 1)
    loss = contrastive_rl.critic_loss(phi, psi).item()
    assert loss == pytest.approx(np.log1p(np.exp(signs * logits)).mean(), rel=1e-12)
    value = [min(logits[0, i, i], logits[1, i, i]) for i in range(5)]
    loss = contrastive_rl.actor_loss(phi, psi, log_prob, torch.tensor(0.3, dtype=torch.float64)).item()
    assert loss == pytest.approx(np.mean(0.3 * log_prob.numpy() - value), rel=1e-12)
    loss = contrastive_rl.entropy_loss(torch.tensor(-0.2, dtype=torch.float64), log_prob, 0.7).item()
    assert loss == pytest.approx(np.exp(-0.2) * (-log_prob.mean().item() - 0.7), rel=1e-12)


def test_goals_come_from_the_truncated_geometric_distribution_of_the_same_episode():
    steps, discount, draws = 6, 0.7, 100_000
    replay = contrastive_rl.ReplayBuffer(10, steps, 4, 2, slice(1, 4))
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
        geometric = discount ** np.arange(steps - start)
        for k, expected in enumerate(draws / steps * geometric / geometric.sum()):
            statistic += (((t == start) & (future == start + 1 + k)).sum().item() - expected) ** 2 / expected
            cells += 1
    assert abs(statistic - (cells - 1)) < 4 * np.sqrt(2 * (cells - 1))


def test_each_loss_reaches_only_its_own_network():
    generator = torch.Generator().manual_seed(3)
    actor = contrastive_rl.Actor((4, 3, 2), 16, generator)
    critic = contrastive_rl.Critic((4, 3, 2), 16, 8, generator)
    log_alpha = torch.tensor(0.5, requires_grad=True)
    batch = tuple(torch.randn(9, n, generator=generator) for n in (4, 2, 3))
    optimizer = torch.optim.SGD([*actor.parameters(), *critic.parameters(), log_alpha], lr=0.0)
    args = contrastive_rl.Args(target_entropy=0.7)
    contrastive_rl.update(batch, actor, critic, log_alpha, optimizer, args, torch.Generator().manual_seed(4))
    observation, action, goal = batch
    loss = contrastive_rl.critic_loss(critic.phi(observation, action), critic.psi(goal))
    for parameter, gradient in zip(critic.parameters(), torch.autograd.grad(loss, list(critic.parameters()))):
        torch.testing.assert_close(parameter.grad, gradient)
    noise = torch.randn(9, 2, generator=torch.Generator().manual_seed(4))
    mean, std = actor(observation, goal)
    log_prob = contrastive_rl.tanh_normal_log_prob(mean, std, mean + std * noise)
    phi = critic.phi(observation, actor.sample(observation, goal, noise))
    value = (phi * critic.psi(goal).detach()).sum(-1).amin(0)
    loss = (log_alpha.detach().exp() * log_prob - value).mean()
    for parameter, gradient in zip(actor.parameters(), torch.autograd.grad(loss, list(actor.parameters()))):
        torch.testing.assert_close(parameter.grad, gradient)
    # The entropy coefficient grows while the entropy, -log_prob, is below its target.
    expected = log_alpha.exp().item() * (-log_prob.mean().item() - 0.7)
    assert log_alpha.grad.item() == pytest.approx(expected, rel=1e-5)


def test_random_goals_are_those_of_other_rows():
    """With a share of 0.5, the first half of the actor's goals is rolled by one row, and their representations too."""
    generator = torch.Generator().manual_seed(3)
    actor = contrastive_rl.Actor((4, 3, 2), 16, generator)
    critic = contrastive_rl.Critic((4, 3, 2), 16, 8, generator)
    log_alpha = torch.tensor(float("-inf"), requires_grad=True)
    batch = tuple(torch.randn(8, n, generator=generator) for n in (4, 2, 3))
    optimizer = torch.optim.SGD([*actor.parameters(), *critic.parameters(), log_alpha], lr=0.0)
    args = contrastive_rl.Args(random_goals=0.5, entropy_coefficient=0.0)
    contrastive_rl.update(batch, actor, critic, log_alpha, optimizer, args, torch.Generator().manual_seed(4))
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
            action = contrastive_rl.scripted_action(env_id, observation, np.array(task.desired_goal))
            assert action.shape == (4,) and np.abs(action).max() <= 1
            observation, _, _, _, info = env.step(action.astype(np.float32))
        solved += info["success"]
    assert solved >= 7


@pytest.mark.parametrize("env_id", ["SawyerWindowOpen", "SawyerDrawerClose"])
def test_desired_goals_of_sawyer_are_where_the_solved_object_rests(env_id):
    task, env = common.TASKS[env_id], common.make_env(env_id)
    observation, _ = env.reset(seed=0)
    for _ in range(task.max_episode_steps):
        action = contrastive_rl.scripted_action(env_id, observation, np.array(task.desired_goal))
        observation, _, _, _, info = env.step(action.astype(np.float32))
    assert info["success"]
    assert np.abs(observation[task.achieved_goal] - task.desired_goal).max() < 0.01


SMALL_AGENT = {"train_steps": 400, "warmup_steps": 10, "seed_episodes": 3, "num_envs": 2, "hidden_dim": 16}


@pytest.fixture(scope="module")
def small_agent():
    return contrastive_rl.train_agent(contrastive_rl.Args(env_id="FetchReach", **SMALL_AGENT))


def test_training_the_agent_gives_the_same_bits_again(small_agent):
    torch.manual_seed(7)  # the global generator has no influence, nor does training have one on it
    state = torch.get_rng_state()
    again = contrastive_rl.train_agent(contrastive_rl.Args(env_id="FetchReach", **SMALL_AGENT))
    assert torch.equal(torch.get_rng_state(), state)
    other = contrastive_rl.train_agent(contrastive_rl.Args(env_id="FetchReach", seed=1, **SMALL_AGENT))
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


def test_the_papers_way_starts_from_random_actions_without_warm_up(small_agent):
    assert small_agent["seed_episodes_success_rate"] == 1.0
    settings = {**SMALL_AGENT, "seed_episodes": 0, "warmup_steps": 2000, "train_steps": 100}
    agent = contrastive_rl.train_agent(contrastive_rl.Args(env_id="SawyerWindowOpen", **settings))
    assert agent["seed_episodes_success_rate"] < 0.3  # 0.07, most of them starts that are solved
    assert agent["checkpoints"][-1]["gradient_steps"] == 150  # one round


def test_training_writes_weights_that_collect_data_rolls_out(tmp_path, capsys):
    args = contrastive_rl.Args(
        env_id="SawyerDrawerClose", behavior_dir=tmp_path / "new" / "behavior", calibration_episodes=4,
        **{**SMALL_AGENT, "train_steps": 300},
    )  # fmt: skip
    returned = contrastive_rl.train(args)
    path = tmp_path / "new" / "behavior" / "SawyerDrawerClose.pt"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    behavior = torch.load(path, weights_only=True)
    assert all(0 <= checkpoint["success_rate"] <= 1 for checkpoint in behavior["checkpoints"])
    assert behavior["args"]["train_steps"] == 300 and behavior["versions"]["mujoco"] == "3.3.0"
    assert "behavior_dir" not in behavior["args"]
    actors, rates = contrastive_rl.load_behavior(path, "SawyerDrawerClose")
    assert rates == [checkpoint["success_rate"] for checkpoint in returned["checkpoints"]]
    # A checkpoint's rate is that of its calibration episodes.
    env = common.make_env("SawyerDrawerClose")
    seeds = [common.episode_seed(0, "calibration", 4 * (len(actors) - 1) + i) for i in range(4)]
    successes = [contrastive_rl.roll_out(env, "SawyerDrawerClose", actors[-1], seed)[2] for seed in seeds]
    assert rates[-1] == np.mean([episode[1:].any() for episode in successes])
    assert f"wrote {path}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            {"env_id": "FetchPushImage"},
            "--env-id is FetchPushImage; the agent can be trained on FetchReach, FetchPush, ",
        ),
        ({"env_id": "FetchPsh"}, "--env-id is FetchPsh"),
        ({"train_steps": -1}, "--train-steps is -1; it must be from 1 to"),
        ({"num_envs": 1}, "--num-envs is 1; it must be from 2 to"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan"),
        ({"discount": 1.0}, "--discount is 1.0"),
        ({"entropy_coefficient": -0.1}, "--entropy-coefficient is -0.1"),
        ({"seed": -1}, "--seed is -1; it must be from 0 to 4294967295"),
    ],
)
def test_mistakes_get_one_sentence(tmp_path, flags, message):
    with pytest.raises(common.UserError, match=message) as caught:
        contrastive_rl.train(contrastive_rl.Args(behavior_dir=tmp_path / "behavior", **flags))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_script_ends_with_one_sentence_and_a_failure(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, str(SCRIPT), "--behavior-dir", str(tmp_path / "file" / "behavior")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 1
    assert process.stderr.startswith(f"error: cannot write {tmp_path / 'file' / 'behavior'}: ")
    assert process.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------ the shipped policies


@pytest.mark.parametrize("env_id", STATE_TASKS)
def test_shipped_policies_can_make_both_qualities(env_id):
    behavior = load(env_id)
    assert behavior["env_id"] == env_id
    assert behavior["versions"]["mujoco"] == "3.3.0"
    rates = [checkpoint["success_rate"] for checkpoint in behavior["checkpoints"]]
    assert max(rates) >= 0.9
    for quality, target in collect_data.SUCCESS_RATES.items():
        weights = collect_data.mixture(rates, target)
        assert weights @ rates == pytest.approx(target, abs=1e-6), quality


def test_shipped_policies_are_small():
    assert sum(path.stat().st_size for path in BEHAVIOR.glob("*.pt")) < 15e6


def test_shipped_policies_say_how_they_were_made_and_not_where():
    flags = {field.name for field in dataclasses.fields(contrastive_rl.Args)} - {"behavior_dir"}
    for env_id in STATE_TASKS:
        args = load(env_id)["args"]
        assert args["env_id"] == env_id and args["seed"] == 0 and flags <= set(args)
        assert not {"output", "behavior_dir"} & set(args)


@pytest.mark.parametrize("env_id", STATE_TASKS)
def test_best_shipped_policy_is_as_good_as_its_file_says(env_id):
    actors, rates = contrastive_rl.load_behavior(BEHAVIOR / f"{env_id}.pt", env_id)
    best, episodes = int(np.argmax(rates)), 20
    result = contrastive_rl.evaluate(common.make_env(env_id), env_id, actors[best], list(range(episodes)))
    assert result["success_rate"] > rates[best] - 4 * (0.1 / episodes) ** 0.5
    assert 0 <= result["final_success_rate"] <= result["success_rate"]


def test_the_noise_of_an_episode_has_a_scale_of_its_own():
    """With the scale at 0 the mode is played: the closer it is to 0, the closer are the actions to the mode's."""
    (actor, *_), _ = contrastive_rl.load_behavior(BEHAVIOR / "FetchReach.pt", "FetchReach")
    env, goal = common.make_env("FetchReach"), torch.tensor(common.TASKS["FetchReach"].desired_goal)
    scales, deviations = [], []
    for seed in range(12):
        observations, actions, _ = contrastive_rl.roll_out(env, "FetchReach", actor, seed)
        with torch.inference_mode():
            mean, std = actor(torch.from_numpy(observations[:-1]), goal.expand(len(actions), -1))
        noise = (torch.atanh(torch.from_numpy(actions).clamp(-0.9999, 0.9999)) - mean) / std
        scales.append(torch.rand((), generator=torch.Generator().manual_seed(seed)).item())
        deviations.append(noise.std().item())
    assert np.ptp(scales) > 0.5
    np.testing.assert_allclose(deviations, scales, atol=0.15)


# ------------------------------------------------------------------------------------------------ files that do not fit


def rename(checkpoint):
    checkpoint["actor"] = {name.replace("net", "network"): value for name, value in checkpoint["actor"].items()}


def widen(checkpoint):
    checkpoint["actor"]["net.2.weight"] = torch.zeros(256, 257)


def of_another_robot(checkpoint):
    checkpoint["actor"] = contrastive_rl.Actor((11, 3, 4), 8, torch.Generator()).state_dict()


CHANGES = {
    "other parameter names": lambda content: [rename(checkpoint) for checkpoint in content["checkpoints"]],
    "another shape": lambda content: widen(content["checkpoints"][-1]),
    "another robot": lambda content: of_another_robot(content["checkpoints"][2]),
    "no checkpoints": lambda content: content.pop("checkpoints"),
    "an empty list of them": lambda content: content["checkpoints"].clear(),
    "checkpoints that are none": lambda content: content.update(checkpoints=[3, 4]),
    "no success rates": lambda content: content["checkpoints"][0].pop("success_rate"),
    "another task": lambda content: content.update(env_id="FetchPush"),
    "no task": lambda content: content.pop("env_id"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_wrong_behavior_file_gets_one_sentence(tmp_path, change):
    content = load("FetchReach")
    CHANGES[change](content)
    torch.save(content, tmp_path / "FetchReach.pt")
    with pytest.raises(common.UserError, match="holds no policies of FetchReach .*; make it with: python") as caught:
        contrastive_rl.load_behavior(tmp_path / "FetchReach.pt", "FetchReach")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "cut off", "a list", "a directory", "code"])
def test_damaged_behavior_file_gets_one_sentence(tmp_path, kind):
    path = tmp_path / "FetchReach.pt"
    if kind == "a list":
        torch.save([1, 2], path)
    elif kind == "code":  # which weights_only=True does not run
        torch.save(subprocess.Popen, path)
    elif kind == "a directory":
        path.mkdir()
    elif kind != "missing":
        content = {"empty": b"", "text": b"hello\n", "cut off": (BEHAVIOR / "FetchReach.pt").read_bytes()[:-1000]}
        path.write_bytes(content[kind])
    with pytest.raises(common.UserError, match="FetchReach.pt is damaged or missing") as caught:
        contrastive_rl.load_behavior(path, "FetchReach")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
