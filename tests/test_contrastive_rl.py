"""The data-collecting agent: its losses, its batches, its checkpoints and the files that hold them."""

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import scipy.stats
import torch

import collect_data
import common
import contrastive_rl
import episodes
import evaluate

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


def softplus(x):
    return np.logaddexp(0, x)


def random_representations(seed, rows=5):
    generator = torch.Generator().manual_seed(seed)
    phi, psi = (torch.randn(2, rows, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    return phi, psi, np.einsum("kir,kjr->kij", phi.numpy(), psi.numpy()), generator


def test_nce_is_the_cross_entropy_of_all_pairs():
    phi, psi, logits, _ = random_representations(2)
    expected = np.log1p(np.exp(np.where(np.eye(5), -1, 1) * logits)).mean()
    assert contrastive_rl.nce_loss(phi, psi).item() == pytest.approx(expected, rel=1e-12)


def test_cpc_is_the_cross_entropy_of_rows_with_a_penalty_on_their_normalisers():
    phi, psi, logits, _ = random_representations(3)
    terms = []
    for k in range(2):
        for i in range(5):
            normaliser = np.log(np.exp(logits[k, i]).sum())
            terms.append(-np.log(np.exp(logits[k, i, i]) / np.exp(logits[k, i]).sum()) + 0.01 * normaliser**2)
    assert contrastive_rl.cpc_loss(phi, psi).item() == pytest.approx(np.mean(terms), rel=1e-12)


def test_cpc_of_two_rows_by_hand():
    """Logits [[log 3, 0], [0, log 2]] in both critics: the right goals have the probabilities 3/4 and 2/3."""
    phi = torch.tensor([[np.log(3.0), 0.0], [0.0, np.log(2.0)]], dtype=torch.float64).expand(2, 2, 2)
    psi = torch.eye(2, dtype=torch.float64).expand(2, 2, 2)
    expected = (np.log(4 / 3) + 0.01 * np.log(4) ** 2 + np.log(3 / 2) + 0.01 * np.log(3) ** 2) / 2
    assert contrastive_rl.cpc_loss(phi, psi).item() == pytest.approx(expected, rel=1e-12)
    # Columns are no distributions: the transposed logits would give another loss.
    assert contrastive_rl.cpc_loss(psi, phi + torch.tensor([0.0, 1.0])).item() != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("with_futures", [False, True])
def test_c_learning_is_its_three_cross_entropies(with_futures):
    phi, psi, logits, generator = random_representations(4)
    ratio = torch.rand(5, generator=generator, dtype=torch.float64) * 20
    discount = torch.tensor([0.9, 0.9, 0.0, 0.9, 0.9], dtype=torch.float64)  # the third one ends its episode
    terms = []
    for k in range(2):
        for i in range(5):
            positive, negative = logits[k, i, i], logits[k, i, (i + 1) % 5]
            gamma, w = discount[i].item(), ratio[i].item()
            term = (1 - gamma) * softplus(-positive) + gamma * w * softplus(-negative) + softplus(negative)
            terms.append(term + with_futures * (softplus(-positive) + softplus(negative)))
    loss = contrastive_rl.c_learning_loss(phi, psi, ratio, discount, with_futures).item()
    assert loss == pytest.approx(np.mean(terms), rel=1e-12)


def test_ratio_of_the_smaller_critic_is_clipped_at_20():
    """sigmoid(f) / (1 - sigmoid(f)), also where this overflows."""
    phi = torch.tensor([[1.0, 3.0, 4.0, 500.0, -500.0], [2.0, 2.9, 5.0, 400.0, 1.0]], dtype=torch.float64)[..., None]
    ratio = contrastive_rl.future_ratio(phi, torch.ones_like(phi)).numpy()
    sigmoid = 1 / (1 + np.exp(-np.array([1.0, 2.9])))
    np.testing.assert_allclose(ratio[:2], sigmoid / (1 - sigmoid), rtol=1e-9)
    np.testing.assert_allclose(ratio[2:], [20, 20, 0], rtol=1e-9, atol=1e-12)


def test_policy_and_entropy_losses_match_their_closed_forms():
    generator = torch.Generator().manual_seed(2)
    value, log_prob, clone = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(3))
    alpha = torch.tensor(0.3, dtype=torch.float64)
    loss = contrastive_rl.policy_loss(value, log_prob, alpha, clone, 0.2).item()
    expected = np.mean(0.8 * (0.3 * log_prob.numpy() - value.numpy()) - 0.2 * clone.numpy())
    assert loss == pytest.approx(expected, rel=1e-12)
    loss = contrastive_rl.entropy_loss(torch.tensor(-0.2, dtype=torch.float64), log_prob, 0.7).item()
    assert loss == pytest.approx(np.exp(-0.2) * (-log_prob.mean().item() - 0.7), rel=1e-12)


# ------------------------------------------------------------------------------------------------------------- batches


def traceable_data(lengths, terminal=()):
    """Observation (episode, step, episode + step), goal (step, episode), action (episode, step)."""
    data = contrastive_rl.Data(sum(lengths) + 5, (3, 2, 2))
    for episode, length in enumerate(lengths):
        steps = np.arange(length + 1)
        observations = np.stack([np.full(length + 1, episode), steps, episode + steps], 1)
        goals, actions = observations[:, 1::-1], observations[:-1, :2]
        data.add(list(observations), list(goals), list(actions), episode in terminal)
    return data


def test_batches_are_transitions_of_episodes_of_any_length():
    data = traceable_data([3, 1, 6], terminal=[1])
    assert data.size == 10 and data.ends == [3, 5, 12]
    args = contrastive_rl.Args(batch_size=2000, discount=0.9)
    batch = contrastive_rl.sample(data, args, 0)
    episode, t = batch.observation[:, 0], batch.observation[:, 1]
    assert torch.equal(batch.action, batch.observation[:, :2])
    assert torch.equal(batch.next_observation[:, 0], episode) and torch.equal(batch.next_observation[:, 1], t + 1)
    assert torch.equal(batch.next_goal, torch.stack([t + 1, episode], 1))
    assert torch.equal(batch.future[:, 1], episode)
    length = torch.tensor([3.0, 1.0, 6.0])[episode.long()]
    assert (batch.future[:, 0] > t).all() and (batch.future[:, 0] <= length).all()
    assert torch.equal(batch.terminal, ((episode == 1) & (t + 1 == length)).float())
    counts = np.unique(np.stack([episode, t]), axis=1, return_counts=True)[1]
    assert len(counts) == 10 and (abs(counts - 200) < 4 * np.sqrt(200)).all()  # every transition alike
    assert all(x.dtype == torch.float32 for x in batch)


def test_goals_come_from_the_truncated_geometric_distribution_of_the_same_episode():
    steps, discount, draws = 6, 0.7, 100_000
    args = contrastive_rl.Args(batch_size=draws, discount=discount)
    batch = contrastive_rl.sample(traceable_data([steps] * 3), args, 0)
    t, future = batch.observation[:, 1].long(), batch.future[:, 0].long()
    statistic = cells = 0
    for start in range(steps):
        geometric = discount ** np.arange(steps - start)
        for k, expected in enumerate(draws / steps * geometric / geometric.sum()):
            statistic += (((t == start) & (future == start + 1 + k)).sum().item() - expected) ** 2 / expected
            cells += 1
    assert abs(statistic - (cells - 1)) < 4 * np.sqrt(2 * (cells - 1))


def test_batches_depend_on_seed_step_and_stream_alone():
    data, args = traceable_data([4, 7]), contrastive_rl.Args(batch_size=8)
    first = contrastive_rl.sample(data, args, 3)
    assert all(torch.equal(x, y) for x, y in zip(first, contrastive_rl.sample(data, args, 3)))
    for other in (
        contrastive_rl.sample(data, args, 4),
        contrastive_rl.sample(data, args, 3, "metrics"),
        contrastive_rl.sample(data, dataclasses.replace(args, seed=1), 3),
    ):
        assert not torch.equal(first.noise, other.noise) and not torch.equal(first.action, other.action)
    assert not torch.equal(first.noise, first.next_noise)


# -------------------------------------------------------------------------------------------------------------- update

LOSSES = ("nce", "cpc", "c_learning", "nce_c_learning")


def small_networks(rows=9, **flags):
    """Networks of dims (4, 3, 2), the target another critic, an optimiser that moves nothing, and a batch."""
    generator = torch.Generator().manual_seed(3)
    actor = contrastive_rl.Actor((4, 3, 2), 16, generator)
    critic, target = (contrastive_rl.Critic((4, 3, 2), 16, 8, generator) for _ in range(2))
    log_alpha = torch.tensor(0.5, requires_grad=True)
    sizes = {"observation": 4, "action": 2, "next_observation": 4, "next_goal": 3, "future": 3}
    batch = {name: torch.randn(rows, n, generator=generator) for name, n in sizes.items()}
    batch["action"] = torch.tanh(batch["action"])
    batch |= {name: torch.randn(rows, 2, generator=generator) for name in ("noise", "next_noise")}
    batch["terminal"] = (torch.arange(rows) == 4).float()
    args = contrastive_rl.Args(**{"target_entropy": 0.7, "bc_coef": 0.0, **flags})
    optimizer = torch.optim.SGD([*actor.parameters(), *critic.parameters(), log_alpha], lr=0.0)
    return (actor, critic, target.requires_grad_(False), log_alpha), optimizer, args, contrastive_rl.Batch(**batch)


def gradients(module, loss):
    return torch.autograd.grad(loss, list(module.parameters()))


def assert_gradients(module, expected):
    for parameter, gradient in zip(module.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def expected_critic_loss(networks, batch, args):
    """From the definition, with next actions and ratios of the target network, row by row."""
    actor, critic, target, _ = networks
    phi = critic.phi(batch.observation, batch.action)
    if args.critic_loss == "nce":
        return contrastive_rl.nce_loss(phi, critic.psi(batch.future))
    if args.critic_loss == "cpc":
        return contrastive_rl.cpc_loss(phi, critic.psi(batch.future))
    mixed, goal = args.critic_loss == "nce_c_learning", batch.next_goal.clone()
    if mixed:  # with a discount of 0.5 a third of the rows
        goal[3:] = batch.future[3:]
    loss = 0
    for i in range(9):
        j = (i + 1) % 9
        action = actor.sample(batch.next_observation[[i]], goal[[j]], batch.next_noise[[i]])
        f = (target.phi(batch.next_observation[[i]], action) * target.psi(goal[[j]])).sum(-1).min()
        w, discount = f.exp().clamp(max=20).detach(), args.discount * (1 - batch.terminal[i])
        positive, negative = ((phi[:, i] * critic.psi(goal[[n]])[:, 0]).sum(-1) for n in (i, j))
        binary = torch.nn.functional.binary_cross_entropy_with_logits
        one, zero = torch.ones(2), torch.zeros(2)
        loss = loss + ((2 if mixed else 1) - discount) * binary(positive, one)
        loss = loss + discount * w * binary(negative, one) + (2 if mixed else 1) * binary(negative, zero)
    return loss / 9


@pytest.mark.parametrize("critic_loss", LOSSES)
def test_each_loss_reaches_only_its_own_network(critic_loss):
    networks, optimizer, args, batch = small_networks(critic_loss=critic_loss, discount=0.5)
    actor, critic, target, log_alpha = networks
    expected = gradients(critic, expected_critic_loss(networks, batch, args))  # before the target network moves
    contrastive_rl.update(batch, *networks, optimizer, args)
    assert_gradients(critic, expected)
    mean, std = actor(batch.observation, batch.future)
    log_prob = contrastive_rl.tanh_normal_log_prob(mean, std, mean + std * batch.noise)
    phi = critic.phi(batch.observation, actor.sample(batch.observation, batch.future, batch.noise))
    value = (phi * critic.psi(batch.future)).sum(-1).amin(0)
    assert_gradients(actor, gradients(actor, (log_alpha.detach().exp() * log_prob - value).mean()))
    # The entropy coefficient grows while the entropy, -log_prob, is below its target.
    expected = log_alpha.exp().item() * (-log_prob.mean().item() - 0.7)
    assert log_alpha.grad.item() == pytest.approx(expected, rel=1e-5)
    assert all(parameter.grad is None for parameter in target.parameters())


@pytest.mark.parametrize("critic_loss", LOSSES)
def test_target_network_follows_the_critic_slowly_where_it_is_used(critic_loss):
    networks, optimizer, args, batch = small_networks(critic_loss=critic_loss)
    _, critic, target, _ = networks
    before = [parameter.clone() for parameter in target.parameters()]
    contrastive_rl.update(batch, *networks, optimizer, args)
    rate = 0.005 if "c_learning" in critic_loss else 0.0
    for old, new, goal in zip(before, target.parameters(), critic.parameters()):
        torch.testing.assert_close(new, old + rate * (goal - old))


@pytest.mark.parametrize("critic_loss", LOSSES)
def test_the_ratio_is_the_target_networks_and_clipped(critic_loss):
    """Scaled target representations change C-learning's loss until all ratios are clipped; NCE and CPC never look."""
    networks, _, args, batch = small_networks(critic_loss=critic_loss, discount=0.5)
    actor, critic, target, _ = networks
    losses = []
    for scale in (1, 3, 1e6, 1e8):
        scaled = contrastive_rl.Critic((4, 3, 2), 16, 8, torch.Generator())
        scaled.load_state_dict(target.state_dict())
        for net in scaled.phi_nets:
            net[-1].weight.data *= scale
        losses.append(contrastive_rl.critic_loss(batch, actor, critic, scaled, args).item())
    if "c_learning" in critic_loss:
        assert abs(losses[0] - losses[1]) > 1e-3 and losses[3] < 100
        assert losses[2] == pytest.approx(losses[3], rel=1e-4)
    else:
        assert len(set(losses)) == 1


def test_random_goals_are_those_of_other_rows_and_are_not_cloned():
    """With a share of 0.5, the first half of the actor's goals is rolled by one row, and their representations too."""
    flags = {"random_goals": 0.5, "entropy_coefficient": 0.0, "bc_coef": 0.25}
    (actor, critic, target, _), optimizer, args, batch = small_networks(rows=8, **flags)
    log_alpha = torch.tensor(float("-inf"), requires_grad=True)
    contrastive_rl.update(batch, actor, critic, target, log_alpha, optimizer, args)
    goal = torch.cat([batch.future[-1:], batch.future[:3], batch.future[4:]])
    phi = critic.phi(batch.observation, actor.sample(batch.observation, goal, batch.noise))
    value = (phi * critic.psi(goal)).sum(-1).amin(0)
    clone = contrastive_rl.tanh_normal_log_prob(*actor(batch.observation, goal), torch.atanh(batch.action))
    assert_gradients(actor, gradients(actor, -0.75 * value.mean() - 0.25 * clone[4:].sum() / 8))
    assert log_alpha.grad is None  # a fixed coefficient stays


def test_goal_conditioned_cloning_trains_the_policy_alone():
    networks, optimizer, args, batch = small_networks(gcbc=True)
    actor, critic, target, log_alpha = networks
    contrastive_rl.update(batch, *networks, optimizer, args)
    clone = contrastive_rl.tanh_normal_log_prob(*actor(batch.observation, batch.future), torch.atanh(batch.action))
    assert_gradients(actor, gradients(actor, -clone.mean()))
    assert all(parameter.grad is None for parameter in [*critic.parameters(), *target.parameters(), log_alpha])


def test_actions_at_their_bounds_are_cloned_as_0_999():
    networks, optimizer, args, batch = small_networks(gcbc=True)
    batch = batch._replace(action=torch.ones_like(batch.action))
    contrastive_rl.update(batch, *networks, optimizer, args)
    x = torch.full_like(batch.action, 0.999).atanh()
    actor = networks[0]
    clone = contrastive_rl.tanh_normal_log_prob(*actor(batch.observation, batch.future), x)
    assert_gradients(actor, gradients(actor, -clone.mean()))


@pytest.mark.parametrize("critic_loss", ["c_learning", "nce_c_learning"])
def test_c_learning_recovers_the_discounted_occupancy_of_another_policy(critic_loss, monkeypatch):
    """A chain of five states; the data move left and right alike, the policy to the right with probability 0.8.

    e^f p(g) is then the occupancy of g after (s, a) to within 0.05; occupancies are up to 0.7. With futures of the data
    it is what the loss says: half the data's occupancy, half of one that goes on with itself. (The data's own, without
    temporal differences, would be off by 0.28 and by 0.07.)
    """
    states, discount, right, size, steps = 5, 0.7, 0.8, 128, 1200
    monkeypatch.setattr(contrastive_rl, "TARGET_RATE", 0.02)
    generator, rng, hot = torch.Generator().manual_seed(0), np.random.default_rng(0), torch.eye(states)
    move = np.zeros((2, states, states))  # left, right
    move[0, range(states), np.maximum(np.arange(states) - 1, 0)] = 1
    move[1, range(states), np.minimum(np.arange(states) + 1, states - 1)] = 1

    def occupancy(probability, share=1.0, other=0.0):
        """Of g after (s, a), for later moves to the right with this probability; `share` of it, else `other`."""
        now = share * (1 - discount) * move + (1 - share) * other
        first, step = ((1 - probability) * x[0] + probability * x[1] for x in (now, move))
        return now + share * discount * move @ np.linalg.solve(np.eye(states) - share * discount * step, first)

    data = occupancy(0.5)
    power = sum((1 - discount) * discount**k * np.linalg.matrix_power(move.mean(0), k) for k in range(100))
    np.testing.assert_allclose(data, move @ power, atol=1e-9)  # the definition: from the next state on
    actor = contrastive_rl.Actor((states, states, 1), 8, generator)
    for parameter in actor.net[-1].parameters():
        parameter.data.zero_()
    actor.net[-1].bias.data[:] = torch.tensor([30 * scipy.stats.norm.ppf(right), 30.0])  # mean, and softplus(30) = 30
    critic = contrastive_rl.Critic((states, states, 1), 32, 16, generator)
    networks = actor, critic, copy.deepcopy(critic).requires_grad_(False), torch.tensor(0.0)
    optimizer = torch.optim.Adam(critic.parameters())  # the policy stays
    args = contrastive_rl.Args(critic_loss=critic_loss, discount=discount, entropy_coefficient=0.0, bc_coef=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / steps)
        s, a = rng.integers(states, size=size), rng.integers(2, size=size)
        after = move[a, s].argmax(-1)
        future = (data[a, s].cumsum(-1) > rng.random(size)[:, None]).argmax(-1)
        action, noise = torch.from_numpy(2.0 * a - 1).float()[:, None], rng.standard_normal((2, size, 1), np.float32)
        noise = torch.from_numpy(noise)
        batch = contrastive_rl.Batch(hot[s], action, hot[after], hot[after], hot[future], torch.zeros(size), *noise)
        contrastive_rl.update(batch, *networks, optimizer, args)
    with torch.no_grad():
        f = torch.stack([critic.phi(hot, torch.full((states, 1), a)) @ critic.psi(hot).mT for a in (-1.0, 1.0)]).mean(1)
    nearest, expected = move.mean((0, 1)), occupancy(right)  # how common a goal is among next states
    if critic_loss == "nce_c_learning":
        share = int(size * (1 - discount) / (2 - discount)) / size
        nearest, expected = share * nearest + (1 - share) * data.mean((0, 1)), occupancy(right, 0.5, data)
    assert np.abs(expected - data).max() > 0.06
    np.testing.assert_allclose(f.exp().numpy() * nearest, expected, atol=0.05)


# ------------------------------------------------------------------------------------------------------------ the agent


@pytest.mark.parametrize("env_id", STATE_TASKS)
def test_scripted_controller_solves_the_task(env_id):
    task, env = common.TASKS[env_id], common.make_env(env_id)
    solved = 0
    for seed in range(8):
        observation, _ = env.reset(seed=seed)
        for _ in range(task.max_episode_steps):
            action = episodes.scripted_action(env_id, observation, np.array(task.desired_goal))
            assert action.shape == (4,) and np.abs(action).max() <= 1
            observation, _, _, _, info = env.step(action.astype(np.float32))
        solved += info["success"]
    assert solved >= 7


@pytest.mark.parametrize("env_id", ["SawyerWindowOpen", "SawyerDrawerClose"])
def test_desired_goals_of_sawyer_are_where_the_solved_object_rests(env_id):
    task, env = common.TASKS[env_id], common.make_env(env_id)
    observation, _ = env.reset(seed=0)
    for _ in range(task.max_episode_steps):
        action = episodes.scripted_action(env_id, observation, np.array(task.desired_goal))
        observation, _, _, _, info = env.step(action.astype(np.float32))
    assert info["success"]
    assert np.abs(observation[task.achieved_goal] - task.desired_goal).max() < 0.01


SMALL = {"hidden_dim": 16, "repr_dim": 8, "batch_size": 32, "eval_interval": 0, "eval_episodes": 2, "log_interval": 50}
SMALL_AGENT = SMALL | {"train_steps": 400, "warmup_steps": 10, "seed_episodes": 3, "num_envs": 2}


def load_metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def small_agent(tmp_path_factory):
    """The directory of a run on SawyerDrawerClose, and in it its behavior/."""
    path = tmp_path_factory.mktemp("agent")
    args = contrastive_rl.Args(
        env_id="SawyerDrawerClose", run_dir=path, behavior_dir=path / "behavior", calibration_episodes=2, **SMALL_AGENT
    )
    contrastive_rl.train(args)
    return path


def test_training_the_agent_gives_the_same_bits_again(small_agent, tmp_path):
    torch.manual_seed(7)  # the global generator has no influence, nor does training have one on it
    state = torch.get_rng_state()
    flags = SMALL_AGENT | {"env_id": "SawyerDrawerClose", "eval_episodes": 1, "eval_interval": 100}
    for seed in (0, 1):
        contrastive_rl.train(contrastive_rl.Args(seed=seed, run_dir=tmp_path / str(seed), **flags))
    assert torch.equal(torch.get_rng_state(), state)
    one, two, three = (
        [line for line in load_metrics(path) if "train/critic_loss" in line]
        for path in (small_agent, tmp_path / "0", tmp_path / "1")
    )
    assert one == two != three and len(one) == 4  # evaluations on the way change nothing


def test_checkpoints_go_from_untrained_to_the_last_step(small_agent):
    checkpoints = torch.load(small_agent / "behavior" / "SawyerDrawerClose.pt", weights_only=True)["checkpoints"]
    steps = [checkpoint["gradient_steps"] for checkpoint in checkpoints]
    assert steps[0] == 0 and steps[-1] == 10 + 400 // 2
    assert steps == sorted(set(steps)) and steps[-2] == steps[-1] // 2
    assert [checkpoint["env_steps"] for checkpoint in checkpoints][-2:] == [190, 400]  # two for a gradient step
    first, last = (checkpoints[i]["actor"]["net.0.weight"] for i in (0, -1))
    assert first.dtype == torch.float16 and not torch.equal(first, last)


def test_training_writes_weights_that_collect_data_rolls_out(small_agent):
    path = small_agent / "behavior" / "SawyerDrawerClose.pt"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    behavior = torch.load(path, weights_only=True)
    assert all(0 <= checkpoint["success_rate"] <= 1 for checkpoint in behavior["checkpoints"])
    assert behavior["args"]["train_steps"] == 400 and behavior["versions"]["mujoco"] == "3.3.0"
    assert not {"behavior_dir", "run_dir"} & set(behavior["args"])
    actors, rates = episodes.load_behavior(path, "SawyerDrawerClose")
    # A checkpoint's rate is that of its calibration episodes.
    env = common.make_env("SawyerDrawerClose")
    seeds = [common.episode_seed(0, "calibration", 2 * (len(actors) - 1) + i) for i in range(2)]
    successes = [episodes.roll_out(env, "SawyerDrawerClose", actors[-1], seed)[2] for seed in seeds]
    assert rates[-1] == np.mean([episode[1:].any() for episode in successes])


def test_first_episodes_are_scripted_or_random():
    for n, least, most in ((3, 0.9, 1), (0, 0, 0.5)):
        args = contrastive_rl.Args(env_id="SawyerDrawerClose", seed_episodes=n, random_steps=450)
        data = contrastive_rl.Data(1000, (6, 3, 4))
        following = episodes.first_episodes(args, data, np.random.default_rng(0))
        assert data.size == 450 and len(data.ends) == 3 and following == 5
        positions = data.goals[data.ends]
        closed = np.linalg.norm(positions - common.TASKS["SawyerDrawerClose"].desired_goal, axis=-1) < 0.02
        assert least <= closed.mean() <= most
        np.testing.assert_array_equal(data.goals[:453], data.observations[:453, 3:6])
        assert np.abs(data.transitions.action[:450]).max() <= 1 and data.transitions.action[:450].std() > 0.3
        assert not data.transitions.terminal.any()


# -------------------------------------------------------------------------------------------------- goals of every kind

POINT_MASS = '''
"""A point mass with a goal drawn for each episode, which ends when it is reached if `terminates`."""

import gymnasium as gym
import numpy as np


class PointMass(gym.Env):
    def __init__(self, terminates=False):
        box, self.terminates = gym.spaces.Box(-1, 1, (2,), np.float64), terminates
        spaces = {"observation": gym.spaces.Box(-1, 1, (3,), np.float64), "achieved_goal": box, "desired_goal": box}
        self.observation_space = gym.spaces.Dict(spaces)
        self.action_space = gym.spaces.Box(-3, 3, (2,), np.float32)

    def observe(self):
        observation = np.array([0.5, *self.position])  # its first number says nothing
        return {"observation": observation, "achieved_goal": self.position.copy(), "desired_goal": self.goal.copy()}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.goal = self.np_random.uniform(-1, 1, (2, 2))
        return self.observe(), {"is_success": False}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.position = np.clip(self.position + action / 20, -1, 1)
        solved = bool(np.linalg.norm(self.position - self.goal) < 0.2)
        return self.observe(), float(solved) - 1, solved and self.terminates, False, {"is_success": solved}


class Blind(PointMass):
    observation_space = gym.spaces.Box(-1, 1, (3,), np.float64)

    def __init__(self):
        self.action_space = gym.spaces.Box(-3, 3, (2,), np.float32)


gym.register("GoalPointMass-v0", PointMass, max_episode_steps=25)
gym.register("GoalPointMassEnds-v0", PointMass, max_episode_steps=25, kwargs={"terminates": True})
gym.register("NoGoals-v0", Blind, max_episode_steps=25)
'''


@pytest.fixture(scope="module")
def point_mass(tmp_path_factory):
    directory = tmp_path_factory.mktemp("module")
    (directory / "goalpoint.py").write_text(POINT_MASS)
    sys.path.insert(0, str(directory))
    yield "goalpoint:GoalPointMass-v0"
    sys.path.remove(str(directory))
    for name in ("GoalPointMass-v0", "GoalPointMassEnds-v0", "NoGoals-v0"):
        gym.registry.pop(name, None)


POINT_FLAGS = SMALL | {"hidden_dim": 32, "batch_size": 64, "learning_rate": 3e-3, "eval_episodes": 40}
POINT_FLAGS |= {"random_steps": 1000, "train_steps": 2400, "discount": 0.9}


@pytest.mark.parametrize("critic_loss", LOSSES)
def test_a_goalenv_of_ones_own_is_learned_with_every_loss(point_mass, tmp_path, critic_loss):
    """Goals are drawn for each episode. With terminating episodes these have lengths of their own."""
    env_id = point_mass.replace("-v0", "Ends-v0") if critic_loss in ("cpc", "c_learning") else point_mass
    args = contrastive_rl.Args(env_id=env_id, critic_loss=critic_loss, run_dir=tmp_path / "run", **POINT_FLAGS)
    result = contrastive_rl.train(args)
    assert result["success_rate"] >= 0.8
    assert len(set(result["episodes"]["episode"])) == 40
    policy = torch.export.load(tmp_path / "run" / "policy.pt2").module()
    env, successes = gym.make(env_id), []
    for seed in result["episodes"]["seed"][:5]:
        state, success, done = env.reset(seed=seed)[0], False, False
        while not done:
            x = (torch.from_numpy(state[name][None]).float() for name in ("observation", "desired_goal"))
            state, _, terminated, truncated, info = env.step(policy(*x)[0].numpy())
            success, done = success or info["is_success"], terminated or truncated
        successes.append(success)
    assert successes == result["episodes"]["success"][:5]


def test_fetch_with_drawn_goals_is_a_goalenv(tmp_path, capfd):
    flags = SMALL | {"env_id": "gymnasium_robotics:FetchReach-v4", "random_steps": 100, "train_steps": 100}
    result = contrastive_rl.train(contrastive_rl.Args(run_dir=tmp_path / "run", **flags))
    assert len(set(result["episodes"]["episode"])) == 2 and result["success_rate"] <= 1
    assert result["args"]["seed_episodes"] == 0 and result["gradient_steps"] == 50


def test_tasks_have_the_goal_of_the_project_and_pass_as_goalenvs():
    for env_id in STATE_TASKS:
        env, task = episodes.make_env(env_id), common.TASKS[env_id]
        for state in (env.reset(seed=0)[0], env.step(env.action_space.sample())[0]):
            assert env.observation_space.contains(state)
            np.testing.assert_array_equal(state["achieved_goal"], state["observation"][task.achieved_goal])
            np.testing.assert_array_equal(state["desired_goal"], np.array(task.desired_goal, np.float32))
        env.close()


def test_half_of_the_episodes_command_where_earlier_ones_ended(point_mass):
    args = contrastive_rl.Args(env_id=point_mass, num_envs=4)
    data, commanded = contrastive_rl.Data(1000, (3, 2, 2)), []
    data.add([np.zeros(3)] * 2, [np.zeros(2), np.full(2, 0.25)], [np.zeros(2)], False)
    player = episodes.Player(args, data, 4, np.random.default_rng(0), 1)
    player.step(lambda observations, goals: commanded.append(goals) or np.zeros((4, 2), np.float32))
    (goals,) = commanded
    assert (goals[1::2] == 0.25).all()
    own = [env.unwrapped.goal for env in player.envs]
    np.testing.assert_allclose(goals[::2], own[::2], rtol=1e-6)
    assert player.steps == 4


# ------------------------------------------------------------------------------------------------------------- offline


@pytest.mark.parametrize("flags", [{"critic_loss": loss} for loss in LOSSES] + [{"gcbc": True}], ids=str)
def test_offline_learning_commands_the_tasks_goal(reach_dataset, tmp_path, flags):
    steps = {"gradient_steps": 60, "log_interval": 30}
    args = contrastive_rl.Args(
        env_id="FetchReach", dataset=reach_dataset, run_dir=tmp_path, **{**SMALL, **steps}, **flags
    )
    result = contrastive_rl.train(args)
    assert {"bc_coef": 0.2, "entropy_coefficient": 0.0, "seed_episodes": 0}.items() <= result["args"].items()
    assert json.loads((tmp_path / "result.json").read_text()) == result
    lines = load_metrics(tmp_path)
    kinds = {name for line in lines for name in line if name.startswith(("train/", "heldout/"))}
    expected = GCBC_METRICS if "gcbc" in flags else METRICS
    assert kinds == {f"{use}/{name}" for use in ("train", "heldout") for name in expected}
    train = [line["train/bc_loss"] for line in lines if "train/bc_loss" in line]
    assert len(train) == 2 and train[1] < train[0]
    # The exported policy knows the goal: it is played and measured like those of the other methods.
    act, _ = evaluate.load_policy(tmp_path)
    played, _ = evaluate.play(act, "FetchReach", 2, 0)
    assert played["success"] == result["episodes"]["success"] and played["return"] == result["episodes"]["return"]


def test_offline_data_are_the_datasets_transitions(reach_dataset):
    args = contrastive_rl.Args(env_id="FetchReach", dataset=reach_dataset, batch_size=500, holdout_fraction=0.5)
    uses, checksum = contrastive_rl.load_data(args, (10, 3, 4))
    arrays = {name: np.load(reach_dataset / f"{name}.npy") for name in ("observations", "actions")}
    assert checksum and uses["train"].size == uses["heldout"].size == 20 * 50
    known = {
        o.tobytes(): (e, t) for e, t, o in ((e, t, arrays["observations"][e, t]) for e in range(40) for t in range(51))
    }
    seen = {"train": set(), "heldout": set()}
    for use, data in uses.items():
        batch = contrastive_rl.sample(data, args, 0)
        for i in range(1, 500):
            place = known[batch.next_observation[i].numpy().tobytes()]
            e, t = place
            if t > 1:  # all episodes of FetchReach start in one state
                seen[use].add(e)
                np.testing.assert_array_equal(batch.observation[i], arrays["observations"][e, t - 1])
                np.testing.assert_allclose(batch.action[i], arrays["actions"][e, t - 1].clip(-1, 1), atol=1e-6)
                np.testing.assert_array_equal(batch.next_goal[i], arrays["observations"][e, t, :3])
                later = arrays["observations"][e, t:, :3]
                assert (later == batch.future[i].numpy()).all(-1).any()
    assert not seen["train"] & seen["heldout"] and len(seen["train"]) == len(seen["heldout"]) == 20


GCBC_METRICS = {"bc_loss", "policy_std"}
METRICS = GCBC_METRICS | {
    "critic_loss", "categorical_accuracy", "logits_positive", "logits_negative", "value_data", "value_policy",
    "entropy", "entropy_coefficient",
}  # fmt: skip


def test_metrics_match_their_definitions():
    networks, _, args, batch = small_networks()
    actor, critic, target, log_alpha = networks
    metrics = contrastive_rl.measure(batch, *networks, args)
    assert set(metrics) == METRICS
    with torch.no_grad():
        logits = critic.phi(batch.observation, batch.action) @ critic.psi(batch.future).mT
        mean, std = actor(batch.observation, batch.future)
    diagonal, other = np.eye(9, dtype=bool), ~np.eye(9, dtype=bool)
    assert metrics["logits_positive"] == pytest.approx(logits[:, diagonal].mean().item(), rel=1e-5)
    assert metrics["logits_negative"] == pytest.approx(logits[:, other].mean().item(), rel=1e-5)
    assert metrics["value_data"] == pytest.approx(logits[:, diagonal].amin(0).mean().item(), rel=1e-5)
    right = (logits.argmax(-1) == torch.arange(9)).float().mean().item()
    assert metrics["categorical_accuracy"] == pytest.approx(right, rel=1e-5)
    assert metrics["critic_loss"] == pytest.approx(expected_critic_loss(networks, batch, args).item(), rel=1e-5)
    assert metrics["policy_std"] == pytest.approx(std.mean().item(), rel=1e-5)
    clone = contrastive_rl.tanh_normal_log_prob(mean, std, batch.action.atanh()).mean().item()
    assert metrics["bc_loss"] == pytest.approx(-clone, rel=1e-5)
    log_prob = contrastive_rl.tanh_normal_log_prob(mean, std, mean + std * batch.noise).mean().item()
    assert metrics["entropy"] == pytest.approx(-log_prob, rel=1e-5)
    assert metrics["entropy_coefficient"] == pytest.approx(np.exp(0.5), rel=1e-6)
    with torch.no_grad():
        phi = critic.phi(batch.observation, torch.tanh(mean + std * batch.noise))
        value = (phi * critic.psi(batch.future)).sum(-1).amin(0).mean().item()
    assert metrics["value_policy"] == pytest.approx(value, rel=1e-5)


def test_played_action_has_the_largest_density_where_actions_are_cloned():
    actor = contrastive_rl.Actor((4, 3, 1), 16, torch.Generator().manual_seed(0), min_std=0.1)
    actor.net[-1].bias.data[1] = -1.5
    generator, bounds = torch.Generator().manual_seed(1), torch.tensor([[-2.0], [6.0]])
    observation, goal = torch.randn(20, 4, generator=generator), torch.randn(3, generator=generator)
    with torch.no_grad():
        dense, median = (contrastive_rl.Policy(actor, bounds, goal, density)(observation) for density in (True, False))
        mean, std = actor(observation, goal.expand(20, -1))
        torch.testing.assert_close(median, 2 + 4 * torch.tanh(mean))
        torch.testing.assert_close(
            median, contrastive_rl.Policy(actor, bounds, 0 * goal, False)(observation, goal.expand(20, -1))
        )
        grid = torch.linspace(-3.5, 3.5, 20_001).expand(20, -1)[..., None]
        density = contrastive_rl.tanh_normal_log_prob(mean[:, None], std[:, None], grid)
        inner = std.flatten() < 0.6  # else the density has two peaks, or its largest values at the bounds
        best = torch.tanh(grid[torch.arange(20), density.argmax(-1)])
    assert inner.sum() >= 10
    torch.testing.assert_close(dense[inner], (2 + 4 * best)[inner], rtol=0.01, atol=0.02)


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            {"env_id": "FetchPushImage"},
            "--env-id is FetchPushImage .*; the agent can be trained on FetchReach, FetchPush, ",
        ),
        ({"env_id": "FetchPsh"}, "--env-id is FetchPsh"),
        ({"train_steps": -1}, "--train-steps is -1; it must be from 1 to"),
        ({"num_envs": 1}, "--num-envs is 1; it must be from 2 to"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan"),
        ({"discount": 1.0}, "--discount is 1.0"),
        ({"entropy_coefficient": -0.1}, "--entropy-coefficient is -0.1"),
        ({"seed": -1}, "--seed is -1; it must be from 0 to 4294967295"),
        (
            {"critic_loss": "infonce"},
            "--critic-loss is infonce; it must be one of nce, cpc, c_learning, nce_c_learning",
        ),
        ({"bc_coef": 0.5}, "--behavior-dir is for what is trained online on a task without cloning"),
        ({"dataset": Path("nowhere"), "behavior_dir": None}, "there is no dataset nowhere"),
        ({"env_id": "goalpoint:GoalPointMass-v0"}, "--behavior-dir is for what is trained online on a task"),
        (
            {"env_id": "goalpoint:GoalPointMass-v0", "seed_episodes": 3, "behavior_dir": None},
            "no controller was written",
        ),
        ({"env_id": "goalpoint:GoalPointMass-v0", "dataset": Path("x"), "behavior_dir": None}, "is none of them"),
        ({"env_id": "goalpoint:NoGoals-v0"}, "is no GoalEnv with vectors"),
    ],
)
def test_mistakes_get_one_sentence(tmp_path, point_mass, flags, message):
    flags = {"behavior_dir": tmp_path / "behavior", "run_dir": tmp_path / "run"} | flags
    with pytest.raises(common.UserError, match=message) as caught:
        contrastive_rl.train(contrastive_rl.Args(**flags))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_script_ends_with_one_sentence_and_a_failure(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, str(SCRIPT), "--run-dir", str(tmp_path / "run")]
    command += ["--behavior-dir", str(tmp_path / "file" / "behavior")]
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
    flags = {"train_steps", "seed_episodes", "warmup_steps", "num_envs", "batch_size", "learning_rate", "discount"}
    flags |= {"hidden_dim", "repr_dim", "random_goals", "entropy_coefficient", "target_entropy"}
    assert flags <= {field.name for field in dataclasses.fields(contrastive_rl.Args)}
    for env_id in STATE_TASKS:
        args = load(env_id)["args"]
        assert args["env_id"] == env_id and args["seed"] == 0 and flags <= set(args)
        assert not {"output", "behavior_dir"} & set(args)


@pytest.mark.parametrize("env_id", STATE_TASKS)
def test_best_shipped_policy_is_as_good_as_its_file_says(env_id):
    actors, rates = episodes.load_behavior(BEHAVIOR / f"{env_id}.pt", env_id)
    best, env, n = int(np.argmax(rates)), common.make_env(env_id), 20
    successes = [episodes.roll_out(env, env_id, actors[best], seed)[2] for seed in range(n)]
    assert np.mean([flags[1:].any() for flags in successes]) > rates[best] - 4 * (0.1 / n) ** 0.5


def test_the_noise_of_an_episode_has_a_scale_of_its_own():
    """With the scale at 0 the mode is played: the closer it is to 0, the closer are the actions to the mode's."""
    (actor, *_), _ = episodes.load_behavior(BEHAVIOR / "FetchReach.pt", "FetchReach")
    env, goal = common.make_env("FetchReach"), torch.tensor(common.TASKS["FetchReach"].desired_goal)
    scales, deviations = [], []
    for seed in range(12):
        observations, actions, _ = episodes.roll_out(env, "FetchReach", actor, seed)
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
        episodes.load_behavior(tmp_path / "FetchReach.pt", "FetchReach")
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
        episodes.load_behavior(path, "FetchReach")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
