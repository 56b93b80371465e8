"""ORIL and PURL: reward losses, TD3+BC and its parts against independent computations; only the reward loss differs."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import traceable_dataset

import common
import oril
import purl

DIM, ACTIONS, SIZE = 6, 2, 16


def make_networks(dim=DIM, action_dim=ACTIONS, hidden_dim=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    encoders = [oril.Encoder(torch.zeros(dim), torch.ones(dim), 4, generator) for _ in range(3)]
    return oril.Networks(encoders, action_dim, hidden_dim, generator)


def make_batch(seed=5):
    generator = torch.Generator().manual_seed(seed)
    action = torch.rand(SIZE, ACTIONS, generator=generator) * 2 - 1
    states = [torch.randn(SIZE, DIM, generator=generator) for _ in range(2)]
    noise = torch.randn(SIZE, ACTIONS, generator=torch.Generator().manual_seed(6))
    return oril.Batch(states[0], action, states[1], torch.randn(7, DIM, generator=generator), noise)


def scatter_targets(networks, seed=9):
    """Move the target networks away from the others, so that confusing them shows."""
    generator = torch.Generator().manual_seed(seed)
    for target in (networks.target_actor, networks.target_critic):
        for parameter in target.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def update(networks, optimizer, step, **flags):
    batch = make_batch()
    oril.update(batch, networks, optimizer, oril.Args(**flags), step)
    return batch


# ------------------------------------------------------------------------------------------------------ reward losses


def test_orils_reward_loss_is_the_balanced_binary_cross_entropy():
    rng = np.random.default_rng(0)
    examples, data = rng.normal(2, 3, 5), rng.normal(-1, 3, 40)
    loss = oril.reward_loss(torch.from_numpy(examples), torch.from_numpy(data))
    sigma = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    closed_form = -0.5 * np.log(sigma(examples)).mean() - 0.5 * np.log(1 - sigma(data)).mean()
    assert loss.item() == pytest.approx(closed_form, rel=1e-12)
    logits, labels = (torch.from_numpy(x) for x in (np.concatenate([examples, data]), np.repeat([1.0, 0.0], [5, 40])))
    weights = torch.from_numpy(np.repeat([1 / 10, 1 / 80], [5, 40]))
    library = F.binary_cross_entropy_with_logits(logits, labels, weights, reduction="sum")
    assert loss.item() == pytest.approx(library.item(), rel=1e-12)
    large = oril.reward_loss(torch.tensor([-1e4, 1e4]), torch.tensor([1e4, -1e4]))
    assert large.item() == pytest.approx(5e3)  # and no overflow


def test_purls_reward_loss_is_the_risk_of_the_classifier_that_knows_all_labels():
    """If a share eta of the data are the examples, the unlabelled estimate is exact: compare with the labelled risk."""
    rng = np.random.default_rng(1)
    positives, negatives = rng.normal(1, 2, 30), rng.normal(-1, 2, 70)
    data = torch.from_numpy(np.concatenate([positives, negatives]))
    loss = purl.reward_loss(torch.from_numpy(positives), data, 0.3)
    labelled = (np.log1p(np.exp(-positives)).sum() + np.log1p(np.exp(negatives)).sum()) / 100
    assert loss.item() == pytest.approx(labelled, rel=1e-12)


def test_purls_negative_part_stops_at_zero():
    examples, data = torch.full((4,), 8.0, dtype=torch.float64), torch.full((9,), -8.0, dtype=torch.float64)
    examples.requires_grad_(True), data.requires_grad_(True)
    loss = purl.reward_loss(examples, data, 0.5)
    assert loss.item() == pytest.approx(0.5 * np.log1p(np.exp(-8.0)), rel=1e-12)  # the raw one is about -4
    loss.backward()
    assert data.grad.abs().max() == 0
    torch.testing.assert_close(examples.grad, torch.full_like(examples, -0.5 / (1 + np.exp(8.0)) / 4))


@pytest.mark.parametrize("name, eta", [("oril", None), ("purl", 0.2)])
def test_learned_reward_is_the_optimum_that_theory_gives(name, eta):
    """Six states, exact expectations, one free logit for each: p*/(p* + p) for ORIL, eta p*/p for PURL."""
    p_star, p = np.array([0, 0, 0.1, 0.2, 0.3, 0.4]), np.array([0.3, 0.2, 0.2, 0.1, 0.1, 0.1])
    examples = torch.from_numpy(np.repeat(np.arange(6), (10 * p_star).astype(int)))
    data = torch.from_numpy(np.repeat(np.arange(6), (10 * p + 0.5).astype(int)))
    logits = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.05)
    for _ in range(3000):
        optimizer.zero_grad()
        extra = () if eta is None else (eta,)
        {"oril": oril, "purl": purl}[name].reward_loss(logits[examples], logits[data], *extra).backward()
        optimizer.step()
    optimum = p_star / (p_star + p) if eta is None else eta * p_star / p
    np.testing.assert_allclose(logits.detach().sigmoid().numpy(), optimum, atol=0.01)


def raw_positive_unlabelled_loss(examples, data, eta):
    """The same risk without its floor, with the released code's mean over examples and data together."""
    return (eta * (F.softplus(-examples) - F.softplus(examples)).mean() + F.softplus(data).mean()) / 2


@pytest.mark.parametrize("raw", [True, False])
def test_raw_risk_falls_without_end_and_ours_does_not(raw):
    """Five examples, a network that can tell each of them apart, 1,000 steps."""
    generator = torch.Generator().manual_seed(0)
    examples, data = torch.randn(5, 8, generator=generator) + 1, torch.randn(200, 8, generator=generator)
    reward = purl.Reward(purl.Encoder(torch.zeros(8), torch.ones(8), 4, generator), 64, generator)
    optimizer, losses = torch.optim.Adam(reward.parameters(), 1e-3), []
    loss_function = raw_positive_unlabelled_loss if raw else purl.reward_loss
    for _ in range(1000):
        optimizer.zero_grad()
        loss = loss_function(reward(examples), reward(data), 0.5)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if raw:
        assert losses[-1] < losses[500] - 1 < -2  # and goes on falling
    else:
        assert min(losses) >= 0 and reward(examples).max() < 30


# ------------------------------------------------------------------------------------------------------------- TD3+BC


def test_critic_target_and_losses_against_numpy():
    rng = np.random.default_rng(2)
    reward, next_q, q = rng.random(8), rng.normal(size=(2, 8)), rng.normal(size=(2, 8))
    target = oril.critic_target(torch.from_numpy(reward), torch.from_numpy(next_q), 0.9).numpy()
    np.testing.assert_allclose(target, [r + 0.9 * min(a, b) for r, a, b in zip(reward, *next_q)], rtol=1e-12)
    loss = oril.critic_loss(torch.from_numpy(q), torch.from_numpy(target))
    assert loss.item() == pytest.approx(np.mean((q[0] - target) ** 2) + np.mean((q[1] - target) ** 2), rel=1e-12)


def test_policy_loss_is_normalised_and_its_normaliser_has_no_gradient():
    """With lambda = alpha / mean |Q|, minus lambda mean Q plus the mean squared error."""
    rng = np.random.default_rng(3)
    q, action, data = rng.normal(size=8) * 50, rng.uniform(-1, 1, (8, 2)), rng.uniform(-1, 1, (8, 2))
    q_tensor, action_tensor = (torch.from_numpy(x).requires_grad_(True) for x in (q, action))
    loss = oril.policy_loss(q_tensor, action_tensor, torch.from_numpy(data), 2.5)
    weight = 2.5 / np.abs(q).mean()
    assert loss.item() == pytest.approx(-weight * q.mean() + ((action - data) ** 2).mean(), rel=1e-12)
    loss.backward()
    np.testing.assert_allclose(q_tensor.grad, np.full(8, -weight / 8), rtol=1e-12)
    np.testing.assert_allclose(action_tensor.grad, 2 * (action - data) / 16, rtol=1e-12)
    scaled = oril.policy_loss(1000 * q_tensor, action_tensor, torch.from_numpy(data), 2.5)
    assert scaled.item() == pytest.approx(loss.item(), rel=1e-12)


def test_target_noise_is_drawn_for_each_number_and_clipped():
    actor, generator = make_networks().actor, torch.Generator().manual_seed(0)
    observation = torch.zeros(5000, DIM)
    mode, normal = actor.mode(observation[:1]), torch.randn(5000, ACTIONS, generator=generator)
    noise = oril.target_action(actor, observation, normal, oril.Args()) - mode
    assert len(noise.unique(dim=0)) > 4900 and (noise[:, 0] - noise[:, 1]).abs().mean() > 0.1
    assert noise.std().item() == pytest.approx(0.2, rel=0.03) and noise.abs().max() <= 0.5 + 1e-6
    clipped = oril.target_action(actor, observation, normal, oril.Args(policy_noise=0.2, noise_clip=0.1)) - mode
    assert clipped.abs().max() <= 0.1 + 1e-6 and ((clipped.abs() - 0.1).abs() < 1e-6).float().mean() > 0.5
    wild = oril.target_action(actor, observation, normal, oril.Args(policy_noise=5.0, noise_clip=9.0))
    assert wild.abs().max() == 1
    still = oril.target_action(actor, observation, normal, oril.Args(policy_noise=0.0))
    assert torch.equal(still, mode.expand(5000, -1))


def test_each_loss_reaches_only_its_own_network():
    """With a learning rate of zero, an update leaves each network with the gradient of its own loss."""
    networks = make_networks()
    scatter_targets(networks)
    optimizer = torch.optim.SGD(networks.parameters(), lr=0.0)
    batch = update(networks, optimizer, step=1, alpha=1.7, discount=0.9, tau=0)
    reward, actor, critic = networks.reward, networks.actor, networks.critic

    loss = oril.reward_loss(reward(batch.examples), reward(batch.next_observation))
    noise = (0.2 * batch.noise).clamp(-0.5, 0.5)
    next_action = (networks.target_actor.mode(batch.next_observation) + noise).clamp(-1, 1)
    next_q = networks.target_critic(batch.next_observation, next_action)
    target = (torch.sigmoid(reward(batch.next_observation)) + 0.9 * torch.minimum(next_q[0], next_q[1])).detach()
    q = critic(batch.observation, batch.action)
    q_loss = F.mse_loss(q[0], target) + F.mse_loss(q[1], target)
    action = actor.mode(batch.observation)
    q_policy = critic(batch.observation, action)[0]
    policy_loss = -1.7 * q_policy.mean() / q_policy.abs().mean().detach() + F.mse_loss(action, batch.action)
    for network, own in ((reward, loss), (critic, q_loss), (actor, policy_loss)):
        for parameter, gradient in zip(
            network.parameters(), torch.autograd.grad(own, list(network.parameters()), retain_graph=True)
        ):
            torch.testing.assert_close(parameter.grad, gradient)
    targets = [*networks.target_actor.parameters(), *networks.target_critic.parameters()]
    assert all(parameter.grad is None for parameter in targets)


def test_policy_and_targets_move_in_every_second_step_only():
    networks = make_networks()
    scatter_targets(networks)
    optimizer = torch.optim.Adam(networks.parameters(), 1e-2)
    for step in range(4):
        before = {name: value.clone() for name, value in networks.state_dict().items()}
        update(networks, optimizer, step)
        for name, value in networks.state_dict().items():
            part = name.split(".")[0]
            moves = "observation" not in name and (part in ("critic", "reward") or step % 2 == 1)
            assert torch.equal(value, before[name]) != moves, (step, name)


def test_targets_go_a_share_tau_of_the_way_to_the_new_networks():
    networks = make_networks()
    assert torch.equal(networks.target_critic.nets[0][0].weight, networks.critic.nets[0][0].weight)  # they begin equal
    scatter_targets(networks)
    before = {name: value.clone().double() for name, value in networks.state_dict().items()}
    update(networks, torch.optim.Adam(networks.parameters(), 1e-2), step=1, tau=0.1)
    after = networks.state_dict()
    for part in ("actor", "critic"):
        for name in after:
            if name.startswith(f"{part}.") and "observation" not in name:
                expected = 0.9 * before[f"target_{name}"] + 0.1 * after[name].double()
                np.testing.assert_allclose(after[f"target_{name}"], expected, atol=1e-6)


class FixedReward(torch.nn.Module):
    """A reward that is what it is: the logit of a table over one-hot states."""

    def __init__(self, table):
        super().__init__()
        self.register_buffer("table", torch.logit(torch.tensor(table)).float())
        self.zero = torch.nn.Parameter(torch.zeros(()))  # the reward's loss has something to be differentiated by

    def forward(self, observation):
        return observation @ self.table + 0 * self.zero


@pytest.mark.parametrize("learn_policy", [False, True])
def test_td3_finds_the_exact_q_function_of_a_small_mdp(learn_policy):
    """A ring of five states, actions in [-1, 1] that go clockwise with probability (1 + a) / 2, a fixed reward.

    Once with a fixed policy and once with a learned one and hardly any cloning; Q against the solution of the policy's
    Bellman equation, and the learned policy against value iteration. Episodes have four steps: without bootstrapping
    through their ends, Q would be less than half of what it is.
    """
    num_states, discount, rewards = 5, 0.9, np.array([0.05, 0.1, 0.9, 0.3, 0.05])
    rng = np.random.default_rng(0)
    episodes, steps = 16_000, 4
    states, actions = np.zeros((episodes, steps + 1), int), rng.uniform(-1, 1, (episodes, steps)).astype(np.float32)
    states[:, 0] = rng.integers(num_states, size=episodes)
    for t in range(steps):
        clockwise = rng.random(episodes) < (1 + actions[:, t]) / 2
        states[:, t + 1] = (states[:, t] + np.where(clockwise, 1, -1)) % num_states
    one_hot = np.eye(num_states, dtype=np.float32)
    lengths = np.full(episodes, steps, np.int32)
    data = common.Dataset(one_hot[states], actions[..., None], lengths, one_hot[:1])
    transitions = common.Transitions(data, np.arange(episodes), torch.device("cpu"))

    networks = make_networks(num_states, 1, hidden_dim=64, seed=3)
    networks.reward = FixedReward(rewards)
    learned = [*networks.critic.parameters(), *(networks.actor.parameters() if learn_policy else ())]
    optimizer, gradient_steps = torch.optim.Adam(learned, 2e-3), 3000
    args = oril.Args(discount=discount, alpha=50.0, policy_noise=0.0, tau=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, gradient_steps)
    generator = torch.Generator().manual_seed(0)
    examples = torch.from_numpy(one_hot[:1])
    for step in range(gradient_steps):
        batch = oril.sample(transitions, examples, args, generator)
        oril.update(batch, networks, optimizer, args, step)
        schedule.step()

    right, left = np.roll(np.eye(num_states), 1, axis=1), np.roll(np.eye(num_states), -1, axis=1)
    with torch.no_grad():
        policy = networks.actor.mode(torch.from_numpy(one_hot)).double().numpy()
    mix = lambda a: (1 + a) / 2 * right + (1 - a) / 2 * left  # noqa: E731
    if learn_policy:
        value = np.zeros(num_states)
        for _ in range(500):
            value = np.maximum(right @ (rewards + discount * value), left @ (rewards + discount * value))
        best = np.sign(right @ (rewards + discount * value) - left @ (rewards + discount * value))
        assert np.array_equal(np.sign(policy[:, 0]), best)
    kernel = mix(policy)
    value = np.linalg.solve(np.eye(num_states) - discount * kernel, kernel @ rewards)
    assert np.ptp(policy) > 0.1
    grid = np.linspace(-1, 1, 5)
    exact = np.stack([mix(a) @ (rewards + discount * value) for a in grid], 1)
    observation = torch.from_numpy(np.repeat(one_hot, 5, axis=0))
    with torch.no_grad():
        q = networks.critic(observation, torch.from_numpy(np.tile(grid, num_states).astype(np.float32))[:, None])
    for twin in q.numpy():
        np.testing.assert_allclose(twin.reshape(num_states, 5), exact, rtol=0.05)
    assert np.ptp(exact) > 0.5


# ------------------------------------------------------------------------------------------------ batches and the task


def test_next_observation_is_the_next_one_of_the_same_episode():
    data = traceable_dataset([3, 5, 1])
    transitions = common.Transitions(data, np.array([2, 0, 1]), torch.device("cpu"))
    batch = oril.sample(transitions, torch.zeros(1, 2), oril.Args(batch_size=2000), torch.Generator().manual_seed(0))
    torch.testing.assert_close(batch.action[:, 0], batch.observation[:, 0] + batch.observation[:, 1] / 10)
    assert torch.equal(batch.next_observation, batch.observation + torch.tensor([0.0, 1.0]))
    assert len(batch.observation.unique(dim=0)) == 9


@pytest.mark.parametrize("script", [oril, purl])
def test_metrics_against_an_independent_computation(script):
    networks, batch = make_networks(), make_batch()
    scatter_targets(networks)
    args = script.Args(discount=0.9, policy_noise=0.0, **({"eta": 0.2} if script is purl else {}))
    metrics = script.measure(batch, networks, args)
    sigma = {
        name: torch.sigmoid(networks.reward(x)) for name, x in (("e", batch.examples), ("d", batch.next_observation))
    }
    assert metrics["reward_examples"] == pytest.approx(sigma["e"].mean().item())
    assert metrics["reward_data"] == pytest.approx(sigma["d"].mean().item())
    q = networks.critic(batch.observation, batch.action).detach()
    assert metrics["q_data"] == pytest.approx(torch.minimum(*q).mean().item())
    if script is oril:
        loss = -(torch.log(sigma["e"]).mean() + torch.log(1 - sigma["d"]).mean()) / 2
    else:
        negative = -torch.log(1 - sigma["d"]).mean() + 0.2 * torch.log(1 - sigma["e"]).mean()
        assert negative > 0.1  # not at its floor
        loss = -0.2 * torch.log(sigma["e"]).mean() + negative
    assert metrics["reward_loss"] == pytest.approx(loss.item(), rel=1e-5)
    next_action = networks.target_actor.mode(batch.next_observation)
    next_q = torch.minimum(*networks.target_critic(batch.next_observation, next_action))
    loss = sum(((twin - sigma["d"] - 0.9 * next_q) ** 2).mean() for twin in q)
    assert metrics["critic_loss"] == pytest.approx(loss.item(), rel=1e-5)
    action = networks.actor.mode(batch.observation).detach()
    assert metrics["q_policy"] == pytest.approx(
        torch.minimum(*networks.critic(batch.observation, action)).mean().item()
    )
    assert metrics["bc_error"] == pytest.approx(((action - batch.action) ** 2).mean().item())
    states = {"success": batch.examples, "failure": batch.observation, "start": batch.next_observation}
    labelled = script.measure_labelled(states, networks)
    assert labelled["reward_success"] == pytest.approx(sigma["e"].mean().item())
    assert labelled["reward_failure"] == pytest.approx(torch.sigmoid(networks.reward(batch.observation)).mean().item())
    start = batch.next_observation
    q_start = torch.minimum(*networks.critic(start, networks.actor.mode(start))).mean().item()
    assert labelled["q_start"] == pytest.approx(q_start)
    without = script.measure_labelled({**states, "success": batch.examples[:0]}, networks)
    assert set(without) == {"reward_failure", "q_start"}  # no such state, no such metric


@pytest.mark.parametrize("script", [oril, purl])
def test_learned_reward_is_success_on_states_it_has_not_seen(script, reach_dataset, tmp_path):
    """On the real task, from 40 mixed episodes; that policies succeed is in tests/test_slow.py, it takes minutes."""
    settings = {"gradient_steps": 500, "batch_size": 128, "hidden_dim": 128, "eval_interval": 0, "eval_episodes": 1}
    settings |= {"num_success": 50, "holdout_fraction": 0.2, "reward_learning_rate": 3e-4}
    script.train(script.Args(dataset=reach_dataset, run_dir=tmp_path / "run", **settings))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "heldout/reward_success" in line][-1]
    assert last["heldout/reward_success"] > last["heldout/reward_failure"] + 0.3
