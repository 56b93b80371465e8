"""LAEO: its losses and batches against independent computations, its theory on a small MDP, and its gradient step."""

import json

import numpy as np
import pytest
import torch
from conftest import traceable_dataset

import common
import laeo


def make_networks(dim=6, action_dim=2, hidden_dim=32, repr_dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    encoders = [laeo.Encoder(torch.zeros(dim), torch.ones(dim), 4, generator) for _ in range(2)]
    actor = laeo.Actor(encoders[0], action_dim, hidden_dim, generator)
    critic = laeo.Critic(encoders[1], action_dim, hidden_dim, repr_dim, generator)
    return actor, critic


# ------------------------------------------------------------------------------------------------------------ losses


def test_critic_loss_is_eq_5_with_in_batch_negatives():
    generator = torch.Generator().manual_seed(1)
    phi = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    psi = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    total = 0.0
    for k in range(2):
        for i in range(7):
            for j in range(7):
                sigma = 1 / (1 + np.exp(-(phi[k, i].numpy() @ psi[k, j].numpy())))
                total -= np.log(sigma) if i == j else np.log(1 - sigma)
    assert laeo.critic_loss(phi, psi).item() == pytest.approx(total / (2 * 7 * 7), rel=1e-12)
    assert laeo.critic_loss(phi.float(), psi.float()).item() == pytest.approx(total / (2 * 7 * 7), rel=1e-5)


@pytest.mark.parametrize("objective", ["f", "exp_f", "log_exp_f"])
def test_policy_value_averages_the_smaller_twin_over_all_examples(objective):
    generator = torch.Generator().manual_seed(2)
    phi = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    psi = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
    expected = np.zeros(4)
    for i in range(4):
        f = [min(phi[k, i].numpy() @ psi[k, m].numpy() for k in range(2)) + np.log(9) for m in range(6)]
        expected[i] = np.mean(f) if objective == "f" else np.mean(np.exp(f))
    if objective == "log_exp_f":
        expected = np.log(expected)
    np.testing.assert_allclose(laeo.policy_value(phi, psi, 10, objective).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("objective", ["f", "exp_f"])
def test_exact_expectation_is_the_average_of_many_single_draws(objective):
    """The released code draws one success example per state: in expectation that is the same, and noisier."""
    generator = torch.Generator().manual_seed(3)
    phi = 0.5 * torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    psi = 0.5 * torch.randn(2, 8, 4, generator=generator, dtype=torch.float64)
    exact = laeo.policy_value(phi, psi, 2, objective)
    draws = torch.randint(8, (20_000,), generator=generator)
    singles = torch.stack([laeo.policy_value(phi, psi[:, m : m + 1], 2, objective) for m in range(8)])[draws]
    standard_error = singles.std(0) / len(draws) ** 0.5
    assert (standard_error > 1e-4).all()
    assert ((singles.mean(0) - exact).abs() < 4 * standard_error).all()


def test_policy_loss_is_eq_8():
    value, log_prob = torch.tensor([1.0, 3.0]), torch.tensor([-0.5, 0.1])
    assert laeo.policy_loss(value, log_prob, 0.05).item() == pytest.approx(-0.95 * 2.0 + 0.05 * 0.2, rel=1e-6)
    assert laeo.policy_loss(value, log_prob, 1.0).item() == pytest.approx(0.2, rel=1e-6)


def test_log_prob_is_the_derivative_of_the_distribution_function():
    """P(a <= x) = Phi((atanh x - mean) / std): its finite difference in float64 is the density."""
    actor, _ = make_networks(action_dim=1)
    mean, std = torch.tensor([[0.3]], dtype=torch.float64), torch.tensor([[0.7]], dtype=torch.float64)

    def cdf(x):
        return torch.special.ndtr((torch.atanh(torch.tensor(x, dtype=torch.float64)) - 0.3) / 0.7).item()

    for x in (-0.99, -0.5, 0.0, 0.3, 0.9, 0.998):
        density = (cdf(x + 1e-6) - cdf(x - 1e-6)) / 2e-6
        log_prob = actor.log_prob(mean, std, torch.tensor([[x]], dtype=torch.float64)).item()
        assert log_prob == pytest.approx(np.log(density), abs=1e-5)
    for x in (0.9995, 1.0):  # saturated actions: the average density of the tail
        log_prob = actor.log_prob(mean, std, torch.tensor([[x]], dtype=torch.float64)).item()
        assert log_prob == pytest.approx(np.log((1 - cdf(0.999)) / 0.001), abs=1e-6)
        log_prob = actor.log_prob(mean, std, torch.tensor([[-x]], dtype=torch.float64)).item()
        assert log_prob == pytest.approx(np.log(cdf(-0.999) / 0.001), abs=1e-6)


def test_log_prob_adds_up_over_dimensions_and_integrates_to_one():
    actor, _ = make_networks()
    mean, std = torch.tensor([[-1.5, 0.5]], dtype=torch.float64), torch.tensor([[0.4, 1.3]], dtype=torch.float64)
    x = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    x = (x[1:] + x[:-1]) / 2
    columns = []
    for dim in range(2):
        log_prob = actor.log_prob(mean[:, dim : dim + 1], std[:, dim : dim + 1], x[:, None])
        columns.append(log_prob)
        assert (log_prob.exp().mean() * 2).item() == pytest.approx(1.0, abs=1e-4)
    both = actor.log_prob(mean, std, torch.stack([x[5000:5001], x[15000:15001]], -1))
    assert both.item() == pytest.approx((columns[0][5000] + columns[1][15000]).item(), rel=1e-12)


def test_log_prob_has_finite_gradients_for_saturated_actions():
    actor, _ = make_networks()
    mean = torch.tensor([[-30.0, 30.0]], requires_grad=True)
    std = torch.tensor([[0.1, 0.1]], requires_grad=True)
    actor.log_prob(mean, std, torch.tensor([[1.0, -1.0]])).sum().backward()
    assert mean.grad.isfinite().all() and std.grad.isfinite().all()
    assert mean.grad[0, 0] > 0 > mean.grad[0, 1]  # both pull the mean towards the action


# ----------------------------------------------------------------------------------------------------------- batches


def test_future_states_follow_the_truncated_geometric_law():
    """Chi-square test of the joint law of transition and offset, on episodes of different length."""
    lengths, discount, draws = [1, 3, 8], 0.7, 200_000
    transitions = common.Transitions(traceable_dataset(lengths), np.arange(3), torch.device("cpu"))
    batch = laeo.sample(transitions, laeo.Args(batch_size=draws, discount=discount), torch.Generator().manual_seed(0))
    episode, t = batch.observation.long().unbind(-1)
    future_episode, future_t = batch.future.long().unbind(-1)
    assert torch.equal(episode, future_episode)
    assert (future_t > t).all() and (future_t <= torch.tensor(lengths)[episode]).all()
    statistic = cells = 0
    for e, length in enumerate(lengths):
        for start in range(length):
            law = discount ** np.arange(length - start)
            expected = draws / sum(lengths) * law / law.sum()
            for k, count in enumerate(expected):
                observed = ((episode == e) & (t == start) & (future_t == start + 1 + k)).sum().item()
                statistic += (observed - count) ** 2 / count
                cells += 1
    freedom = cells - 1
    assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)


def test_each_state_keeps_its_own_action():
    data = traceable_dataset([2, 5, 3])
    transitions = common.Transitions(data, np.array([2, 0, 1]), torch.device("cpu"))
    batch = laeo.sample(transitions, laeo.Args(batch_size=500), torch.Generator().manual_seed(0))
    episode, t = batch.observation.long().unbind(-1)
    assert np.array_equal(batch.action.numpy(), data.actions[episode, t])
    assert set(zip(episode.tolist(), t.tolist())) == {(e, t) for e, n in enumerate([2, 5, 3]) for t in range(n)}


def test_padding_behind_an_episodes_end_is_never_sampled():
    data = traceable_dataset([2, 6])
    data.observations[0, 3:] = 1e9
    transitions = common.Transitions(data, np.arange(2), torch.device("cpu"))
    assert transitions.states.max() < 1e3 and len(transitions.states) == 3 + 7


def test_rounding_never_crosses_an_episodes_end(monkeypatch):
    """The largest uniform number below one, and a discount near one, are the worst cases."""
    transitions = common.Transitions(traceable_dataset([50]), np.arange(1), torch.device("cpu"))
    largest = lambda *size, **_: torch.full(size[:1], 1 - 2.0**-53, dtype=torch.float64)  # noqa: E731
    monkeypatch.setattr(torch, "rand", largest)
    for discount in (1e-6, 0.5, 0.99, 1 - 1e-6):
        args = laeo.Args(batch_size=1000, discount=discount)
        batch = laeo.sample(transitions, args, torch.Generator().manual_seed(0))
        assert (batch.future[:, 1] > batch.observation[:, 1]).all() and (batch.future[:, 1] <= 50).all()


# ------------------------------------------------------------------------------------------------------------ theory


@pytest.fixture(scope="module")
def tabular():
    """A 6-state, 2-action MDP with a known behaviour policy, exact occupancies, and a critic trained on its episodes.

    Walks on a ring: action 1 moves clockwise with probability 0.9, action 0 with 0.1, otherwise the other way; in
    state 0 both stay with probability 0.5. The behaviour's preference for action 1 differs from state to state.
    """
    num_states, num_actions, discount, steps, episodes = 6, 2, 0.6, 200, 1000
    transition = np.zeros((num_states, num_actions, num_states))
    for s in range(num_states):
        for a, clockwise in enumerate((0.1, 0.9)):
            stay = 0.5 if s == 0 else 0.0
            transition[s, a, s] += stay
            transition[s, a, (s + 1) % num_states] += (1 - stay) * clockwise
            transition[s, a, (s - 1) % num_states] += (1 - stay) * (1 - clockwise)
    behaviour = np.stack([1 - np.linspace(0.2, 0.7, num_states), np.linspace(0.2, 0.7, num_states)], -1)
    state_transition = np.einsum("sa,sat->st", behaviour, transition)
    # Strictly future discounted occupancy, (1 - discount) sum_(k >= 1) discount^(k - 1) P(s_(t + k) | s, a).
    future = (1 - discount) * np.linalg.inv(np.eye(num_states) - discount * state_transition)
    occupancy = transition @ future
    values, vectors = np.linalg.eig(state_transition.T)
    marginal = np.real(vectors[:, np.argmax(np.real(values))])
    marginal /= marginal.sum()

    rng = np.random.default_rng(0)
    states = np.zeros((episodes, steps + 1), int)
    actions = np.zeros((episodes, steps), int)
    states[:, 0] = rng.choice(num_states, size=episodes, p=marginal)
    for t in range(steps):
        actions[:, t] = rng.random(episodes) < behaviour[states[:, t], 1]
        cumulative = transition[states[:, t], actions[:, t]].cumsum(-1)
        states[:, t + 1] = (rng.random((episodes, 1)) > cumulative).sum(-1)
    one_hot = np.eye(num_states, dtype=np.float32)
    data = common.Dataset(
        one_hot[states], actions[..., None].astype(np.float32), np.full(episodes, steps, np.int32), one_hot[:1]
    )
    transitions = common.Transitions(data, np.arange(episodes), torch.device("cpu"))
    _, critic = make_networks(num_states, 1, hidden_dim=32, repr_dim=16)
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    batch_size, gradient_steps = 128, 4000
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, gradient_steps)
    for _ in range(gradient_steps):
        batch = laeo.sample(transitions, laeo.Args(batch_size=batch_size, discount=discount), generator)
        loss = laeo.critic_loss(critic.phi(batch.observation, batch.action), critic.psi(batch.future))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    pairs = [(s, a) for s in range(num_states) for a in range(num_actions)]
    observation = torch.from_numpy(one_hot[[s for s, _ in pairs]])
    action = torch.tensor([[float(a)] for _, a in pairs])
    with torch.no_grad():
        phi, psi = critic.phi(observation, action), critic.psi(torch.from_numpy(one_hot))
    return {
        "phi": phi, "psi": psi, "batch_size": batch_size, "discount": discount, "marginal": marginal,
        "occupancy": occupancy, "state_transition": state_transition, "transition": transition,
    }  # fmt: skip


def test_learned_critic_is_the_occupancy_ratio_of_eq_6(tabular):
    """e^f against p(g | s, a) / p(g), for each twin: within 25 % everywhere, 6 % on average."""
    logits = (tabular["phi"] @ tabular["psi"].mT).numpy() + np.log(tabular["batch_size"] - 1)
    ratio = (tabular["occupancy"] / tabular["marginal"]).reshape(12, 6)
    assert ratio.max() / ratio.min() > 20  # there is something to learn
    for f in logits:
        error = np.abs(np.exp(f) / ratio - 1)
        assert error.max() < 0.25 and error.mean() < 0.06


def test_eq_7_ranks_and_scales_actions_as_the_exact_q_function(tabular):
    """Success examples from states 2 and 3, one to two; the reward they imply is c p*(s) / p(s), Eq. 3; within 15 %."""
    examples, c = [2, 3, 3], 0.6
    p_star = np.bincount(examples, minlength=6) / len(examples)
    reward = c * p_star / tabular["marginal"]
    # Q(s, a) = sum_(k >= 1) discount^(k - 1) E[r(s_(t + k))], from the Bellman equation and not from the occupancy
    value = np.linalg.solve(
        np.eye(6) - tabular["discount"] * tabular["state_transition"], tabular["state_transition"] @ reward
    )
    q = tabular["transition"] @ (reward + tabular["discount"] * value)  # [6, 2]
    learned = laeo.policy_value(tabular["phi"], tabular["psi"][:, examples], tabular["batch_size"], "exp_f")
    learned = (c / (1 - tabular["discount"]) * learned).reshape(6, 2).numpy()
    np.testing.assert_allclose(learned, q, rtol=0.15)
    clear = np.abs(q[:, 1] - q[:, 0]) > 0.1 * q.mean()
    assert clear.sum() >= 3
    assert np.array_equal(learned.argmax(1)[clear], q.argmax(1)[clear])
    log_value = laeo.policy_value(tabular["phi"], tabular["psi"][:, examples], tabular["batch_size"], "log_exp_f")
    np.testing.assert_allclose(
        log_value.exp().reshape(6, 2).numpy() * c / (1 - tabular["discount"]), learned, rtol=1e-5
    )


# ---------------------------------------------------------------------------------------------------------- training


def make_batch(size=16, dim=6, action_dim=2):
    generator = torch.Generator().manual_seed(5)
    action = torch.rand(size, action_dim, generator=generator) * 2 - 1
    states = [torch.randn(size, dim, generator=generator) for _ in range(2)]
    noise = torch.randn(size, action_dim, generator=torch.Generator().manual_seed(6))
    return laeo.Batch(states[0], action, states[1], noise), torch.randn(7, dim, generator=generator)


@pytest.mark.parametrize("objective", ["f", "exp_f", "log_exp_f"])
def test_each_loss_reaches_only_its_own_network(objective):
    """After one update the critic holds the gradient of the critic's loss alone, and the actor that of the policy's."""
    actor, critic = make_networks()
    batch, examples = make_batch()
    args = laeo.Args(policy_objective=objective, bc_coef=0.3)
    optimizer = torch.optim.SGD([*actor.parameters(), *critic.parameters()], lr=0.0)
    laeo.update(batch, examples, actor, critic, optimizer, args)
    loss = laeo.critic_loss(critic.phi(batch.observation, batch.action), critic.psi(batch.future))
    for parameter, gradient in zip(critic.parameters(), torch.autograd.grad(loss, list(critic.parameters()))):
        torch.testing.assert_close(parameter.grad, gradient)
    mean, std = actor(batch.observation)
    phi = critic.phi(batch.observation, torch.tanh(mean + std * batch.noise))
    value = laeo.policy_value(phi, critic.psi(examples).detach(), len(batch.action), objective)
    loss = laeo.policy_loss(value, actor.log_prob(mean, std, batch.action), 0.3)
    for parameter, gradient in zip(actor.parameters(), torch.autograd.grad(loss, list(actor.parameters()))):
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(parameter.grad, gradient)


def test_update_moves_both_networks_and_no_buffer():
    actor, critic = make_networks()
    batch, examples = make_batch()
    before = {k: v.clone() for k, v in [*actor.state_dict().items(), *critic.state_dict().items()]}
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], 1e-3)
    laeo.update(batch, examples, actor, critic, optimizer, laeo.Args(bc_coef=0.2))
    for name, value in [*actor.state_dict().items(), *critic.state_dict().items()]:
        assert torch.equal(value, before[name]) == ("observation" in name), name


def test_networks_standardise_observations():
    mean, std = torch.tensor([5.0, -2.0]), torch.tensor([0.5, 10.0])
    one, other = (
        laeo.Actor(laeo.Encoder(*statistics, 4, torch.Generator()), 1, 8, torch.Generator().manual_seed(0))
        for statistics in ((mean, std), (torch.zeros(2), torch.ones(2)))
    )
    observation = torch.tensor([[5.5, 8.0]])
    assert torch.equal(one.mode(observation), other.mode(torch.tensor([[1.0, 1.0]])))
    assert {"encoder.observation_mean", "encoder.observation_std"} <= set(one.state_dict())


def test_measure_against_an_independent_computation():
    actor, critic = make_networks()
    batch, examples = make_batch()
    metrics = laeo.measure(batch, examples, actor, critic, laeo.Args(batch_size=16))
    phi = critic.phi(batch.observation, batch.action).detach().double().numpy()
    psi = critic.psi(batch.future).detach().double().numpy()
    logits = np.einsum("kir,kjr->kij", phi, psi)
    diagonal = np.eye(16, dtype=bool)
    assert metrics["logits_positive"] == pytest.approx(logits[:, diagonal].mean(), rel=1e-4)
    assert metrics["logits_negative"] == pytest.approx(logits[:, ~diagonal].mean(), rel=1e-4)
    assert metrics["categorical_accuracy"] == pytest.approx((logits.argmax(-1) == np.arange(16)).mean())


def test_learns_to_reach_from_examples(reach_dataset, tmp_path):
    """The whole method on the real task: from 40 mixed episodes to success in a minute or less."""
    settings = {"gradient_steps": 600, "batch_size": 128, "hidden_dim": 128, "repr_dim": 32, "log_interval": 10}
    result = laeo.train(
        laeo.Args(dataset=reach_dataset, run_dir=tmp_path / "run", num_success=10, eval_episodes=2, **settings)
    )
    assert result["success_rate"] == 1.0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    heldout = [line for line in lines if "heldout/critic_loss" in line]
    assert heldout[-1]["heldout/critic_loss"] < heldout[0]["heldout/critic_loss"]
    assert heldout[-1]["heldout/logits_positive"] > heldout[-1]["heldout/logits_negative"] + 0.3
