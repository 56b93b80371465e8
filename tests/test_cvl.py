"""CVL: its estimators against exact values on a small MDP, whose reward is whose, frozen critics, other goals."""

import json

import numpy as np
import pytest
import torch
from conftest import traceable_dataset

import common
import cvl
import evaluate

CPU = torch.device("cpu")
DISCOUNT, ACTIONS = 0.6, 2
REWARDS = np.array([0.0, 1.0, 0.0, 0.0, 0.3, 0.0])


# --------------------------------------------------------------------------------------------------- a small, known MDP


class Ring:
    """Six states in a ring; action 1 moves clockwise with probability 0.9, action 0 with 0.1, and state 0 holds half.

    `ratio` [12, 6] is p(g | s, a) / p(g) of the futures of a policy that prefers another action in each state, `q` [12]
    the Q-function of REWARDS, from the Bellman equation.
    """

    def __init__(self, steps=200, episodes=1000):
        states, transition = np.arange(6), np.zeros((6, ACTIONS, 6))
        for s in states:
            for a, clockwise in enumerate((0.1, 0.9)):
                stay = 0.5 * (s == 0)
                transition[s, a, s] += stay
                transition[s, a, (s + 1) % 6] += (1 - stay) * clockwise
                transition[s, a, (s - 1) % 6] += (1 - stay) * (1 - clockwise)
        policy = np.stack([1 - np.linspace(0.2, 0.7, 6), np.linspace(0.2, 0.7, 6)], -1)
        chain = np.einsum("sa,sat->st", policy, transition)
        self.marginal = np.linalg.matrix_power(chain, 1000)[0]
        occupancy = transition @ ((1 - DISCOUNT) * np.linalg.inv(np.eye(6) - DISCOUNT * chain))
        self.occupancy = occupancy.reshape(12, 6)
        self.ratio = self.occupancy / self.marginal
        value = np.linalg.solve(np.eye(6) - DISCOUNT * chain, chain @ REWARDS)
        self.q = (transition @ (REWARDS + DISCOUNT * value)).reshape(12)

        rng = np.random.default_rng(0)
        walked, played = np.zeros((episodes, steps + 1), int), np.zeros((episodes, steps), int)
        walked[:, 0] = rng.choice(6, size=episodes, p=self.marginal)
        for t in range(steps):
            played[:, t] = rng.random(episodes) < policy[walked[:, t], 1]
            cumulative = transition[walked[:, t], played[:, t]].cumsum(-1)
            walked[:, t + 1] = (rng.random((episodes, 1)) > cumulative).sum(-1)
        one_hot, lengths = np.eye(6, dtype=np.float32), np.full(episodes, steps, np.int32)
        arrays = one_hot[walked], played[..., None].astype(np.float32), lengths, one_hot[:1], lengths < 0
        self.dataset = common.Dataset(*arrays, np.array([[0], [1]], np.float32), "")
        uses = [common.transitions(self.dataset, np.arange(episodes))] * 3
        observations = torch.from_numpy(self.dataset.observations).flatten(0, 1)
        self.data = cvl.Data(observations, *uses, CPU, REWARDS[walked].ravel().astype(np.float32))
        self.observation = torch.from_numpy(np.repeat(one_hot, ACTIONS, 0))  # of the 12 pairs
        self.action = torch.tensor([[-1.0], [1.0]]).repeat(6, 1)
        self.states = torch.from_numpy(one_hot)


@pytest.fixture(scope="module")
def ring():
    return Ring()


def train_on(ring, **flags):
    """Return args, critic and random features after 2,500 updates of the script's own, and a large batch."""
    args = cvl.Args(batch_size=128, discount=DISCOUNT, hidden_dim=32, repr_dim=16, **flags)
    generator = torch.Generator().manual_seed(0)
    encoder = cvl.Encoder(torch.zeros(6), torch.ones(6))
    actor = cvl.Actor(encoder, torch.tensor([[-1.0], [1.0]]), 8, generator)
    critic, kernel = cvl.Critic(encoder, 1, args, generator), cvl.RandomFeatures(args, generator)
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2500)
    for step in range(2500):
        cvl.update(cvl.sample(ring.data, args, step), actor, critic, kernel, optimizer, args)
        schedule.step()
    return args, critic, kernel, cvl.sample(ring.data, cvl.replace(args, batch_size=12 * 500), 0, "heldout")


@pytest.fixture(scope="module")
def marginal(ring):
    return train_on(ring)


@pytest.fixture(scope="module")
def rff(ring):
    """The critic does not depend on the features, so that it is trained with few; their error is small with many."""
    args, critic, _, batch = train_on(ring, estimator="rff", temperature=0.5, random_features=16)
    args = cvl.replace(args, random_features=200_000)
    return args, critic, cvl.RandomFeatures(args, torch.Generator().manual_seed(1)), batch


@torch.no_grad()
def values(ring, trained, reward=None):
    """Return (1 - discount) Q of the 12 pairs, each the mean over 500 rows of a batch whose futures are the data's."""
    args, critic, kernel, batch = trained
    phi, reward = critic.phi(ring.observation, ring.action), batch.reward if reward is None else reward
    if args.estimator == "rff":  # xi over the same futures, state by state
        mean = torch.stack([reward[batch.future[:, s] == 1].sum() for s in range(6)]) / len(reward)
        kernel.xi.copy_(mean @ kernel(critic.psi(ring.states)))
        return cvl.policy_value(phi, None, None, kernel, "rff").double().numpy()
    phi = phi.repeat(1, 500, 1)
    value = cvl.policy_value(phi, critic.psi(batch.future), reward, kernel, args.estimator)
    return value.view(500, 12).mean(0).double().numpy()


def exact_critic(ring, rows):
    """Return phi of the pairs `rows` and psi of all states as one-hot products: their f is exactly log ratio."""
    phi = torch.from_numpy(np.log(ring.ratio)[rows])
    return phi.expand(2, -1, -1), torch.eye(6, dtype=torch.float64).expand(2, -1, -1)


# ---------------------------------------------------------------------------------------------------------- estimators


def test_marginal_is_the_weighted_mean_of_the_other_rows_rewards_by_the_smaller_twin():
    generator = torch.Generator().manual_seed(0)
    phi, psi = (torch.randn(2, 7, 4, generator=generator, dtype=torch.float64) for _ in "12")
    reward = torch.rand(7, generator=generator, dtype=torch.float64)
    value = cvl.policy_value(phi, psi, reward, None, "marginal")
    for i in range(7):
        twins = []
        for k in range(2):
            weights = {j: np.exp(float(phi[k, i] @ psi[k, j])) for j in range(7) if j != i}
            twins.append(sum(w * float(reward[j]) for j, w in weights.items()) / sum(weights.values()))
        assert value[i].item() == pytest.approx(min(twins), rel=1e-12)
    reward[3] += 5  # of its own future row 3 has no use, and all others have
    moved = cvl.policy_value(phi, psi, reward, None, "marginal") != value
    assert moved.tolist() == [i != 3 for i in range(7)]


def test_released_is_the_mean_of_e_f_of_own_futures_by_the_smaller_twin_times_their_rewards():
    generator = torch.Generator().manual_seed(1)
    phi, psi = (torch.randn(2, 5, 4, generator=generator, dtype=torch.float64) for _ in "12")
    reward = torch.rand(5, generator=generator, dtype=torch.float64)
    value = cvl.policy_value(phi, psi, reward, None, "released")
    expected = [np.exp(min(float(phi[k, i] @ psi[k, i]) for k in range(2))) * float(reward[i]) for i in range(5)]
    assert value.tolist() == pytest.approx(5 * [np.mean(expected)], rel=1e-12)


def test_released_is_finite_for_an_outlier_without_reward():
    """e^200 is infinite in float32, and a reward of 0 times that would be NaN: a block that flew away."""
    phi, psi = torch.ones(2, 3, 1), torch.tensor([0.5, 200.0, 1.0]).view(3, 1).expand(2, 3, 1)
    value = cvl.policy_value(phi, psi, torch.tensor([1.0, 0.0, 0.5]), None, "released")
    torch.testing.assert_close(value, torch.full((3,), (np.exp(0.5) + 0.5 * np.e) / 3))


def test_random_features_expect_the_exponential_kernel():
    """E[F(x)^T F(y)] = e^(x^T y) at three temperatures, with the error that falls as one over the features' root."""
    for temperature in (0.5, 1.0, 4.0):
        args = cvl.Args(estimator="rff", temperature=temperature, random_features=400_000, repr_dim=3)
        kernel = cvl.RandomFeatures(args, torch.Generator().manual_seed(0))
        x = torch.nn.functional.normalize(torch.randn(6, 3, generator=torch.Generator().manual_seed(1)), dim=-1)
        x = x / temperature**0.5
        exact, features = (x @ x.mT).exp(), kernel(x)
        assert exact.max() / exact.min() > np.exp(1 / temperature)
        bound = 5 * np.exp(1 / temperature) / args.random_features**0.5  # five standard deviations
        assert (features @ features.mT - exact).abs().max() < bound < 0.5 * exact.mean()


def test_vectors_have_the_length_that_the_random_features_are_for():
    args = cvl.Args(estimator="rff", temperature=0.25, hidden_dim=32, repr_dim=4)
    generator = torch.Generator().manual_seed(0)
    critic = cvl.Critic(cvl.Encoder(torch.zeros(3), torch.ones(3)), 2, args, generator)
    x = torch.randn(9, 3, generator=generator)
    for vectors in (critic.phi(x, torch.randn(9, 2, generator=generator)), critic.psi(x)):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.full((2, 9), 2.0))


def test_critic_loss_is_least_where_e_f_is_1_if_nothing_is_to_be_told():
    """Of logits that are free and all alike: with one positive in every row of 8 that is f = 0, whatever 8 is."""
    for size in (2, 8, 100):
        f = torch.zeros((), dtype=torch.float64) + 0.3
        for _ in range(60):  # Newton's method
            f.requires_grad_()
            phi = torch.ones(2, size, 1, dtype=torch.float64) * f
            slope = torch.autograd.grad(cvl.critic_loss(phi, torch.ones_like(phi)), f, create_graph=True)[0]
            f = (f - slope / torch.autograd.grad(slope, f)[0]).detach()
        assert f.item() == pytest.approx(0, abs=1e-9)


def test_mean_of_e_f_over_the_data_is_1_at_the_optimum(ring, marginal, rff):
    """Of each pair, within 10 %, for both kinds of critics; e^f itself is not 1."""
    for _, critic, _, batch in (marginal, rff):
        with torch.no_grad():
            f = (critic.phi(ring.observation, ring.action) @ critic.psi(batch.future).mT).numpy()
        assert abs(np.exp(f).mean(-1) - 1).max() < 0.1
        assert np.exp(f).std() > 0.3


@pytest.mark.parametrize("name, tolerance", [("marginal", 0.1), ("rff", 0.15)])
def test_q_is_the_exact_q_function_of_the_mdp(name, tolerance, ring, request):
    """Also its order of actions, wherever they differ by 15 %; there is something to learn, and no other estimator."""
    q = values(ring, request.getfixturevalue(name)) / (1 - DISCOUNT)
    np.testing.assert_allclose(q, ring.q, rtol=tolerance)
    assert ring.q.max() / ring.q.min() > 2
    pairs, exact = q.reshape(6, 2), ring.q.reshape(6, 2)
    clear = np.abs(exact[:, 1] - exact[:, 0]) > 0.15 * exact.mean()
    assert clear.sum() >= 3 and np.array_equal(pairs.argmax(1)[clear], exact.argmax(1)[clear])
    assert set(exact.argmax(1)[clear]) == {0, 1}


@pytest.mark.parametrize("name, tolerance", [("marginal", 1e-5), ("rff", 0.1)])
def test_a_constant_added_to_the_reward_moves_q_by_that_over_1_minus_the_discount(name, tolerance, ring, request):
    trained = request.getfixturevalue(name)
    moved = values(ring, trained, trained[-1].reward + 2) - values(ring, trained)
    np.testing.assert_allclose(moved / (1 - DISCOUNT), 2 / (1 - DISCOUNT), rtol=tolerance)


def test_xi_is_a_moving_average_of_the_features_times_the_reward(ring):
    """Of the critic before each of two updates, by 0.01; with another estimator it is left alone."""
    for estimator in ("rff", "marginal"):
        flags = {"estimator": estimator, "random_features": 32, "repr_dim": 4, "hidden_dim": 8, "batch_size": 16}
        args, generator = cvl.Args(**flags), torch.Generator().manual_seed(0)
        encoder = cvl.Encoder(torch.zeros(6), torch.ones(6))
        actor = cvl.Actor(encoder, torch.tensor([[-1.0], [1.0]]), 8, generator)
        critic, kernel = cvl.Critic(encoder, 1, args, generator), cvl.RandomFeatures(args, generator)
        optimizer, expected = torch.optim.Adam([*actor.parameters(), *critic.parameters()], 1e-2), torch.zeros(2, 32)
        for step in range(2):
            batch = cvl.sample(ring.data, args, step)
            with torch.no_grad():
                mean = (kernel(critic.psi(batch.future)) * batch.reward[:, None]).mean(1)
            expected = expected + 0.01 * (mean - expected) if estimator == "rff" else expected
            cvl.update(batch, actor, critic, kernel, optimizer, args)
        torch.testing.assert_close(kernel.xi, expected)
        assert kernel.xi.any() == (estimator == "rff")


def test_released_estimator_is_biased_and_marginal_is_not(ring):
    """With the exact critic, so that no learning is at fault: futures are weighed by p(g | s, a) a second time.

    In state 3 the released estimator prefers the wrong action.
    """
    rng, released = np.random.default_rng(0), np.zeros(12)
    for pair, p in enumerate(ring.occupancy):
        own, (phi, psi) = rng.choice(6, size=10_000, p=p / p.sum()), exact_critic(ring, [pair] * 10_000)
        rewards = torch.from_numpy(REWARDS[own])
        released[pair] = cvl.policy_value(phi, psi[:, own], rewards, None, "released")[0]
    true, biased = (1 - DISCOUNT) * ring.q, (ring.occupancy * ring.ratio) @ REWARDS
    np.testing.assert_allclose(released, biased, rtol=0.1)
    assert np.abs(biased / true - 1).max() > 2  # nowhere near
    assert released[7] > 1.3 * released[6] and true[6] > true[7]

    drawn = np.searchsorted(ring.marginal.cumsum(), (rng.permutation(6000) + 0.5) / 6000)  # as often as p(g) says
    phi, psi = exact_critic(ring, np.arange(12).repeat(500))
    marginal = cvl.policy_value(phi, psi[:, drawn], torch.from_numpy(REWARDS[drawn]), None, "marginal")
    np.testing.assert_allclose(marginal.view(12, 500).mean(1).numpy(), true, rtol=0.01)


def test_the_own_future_would_count_too_much(ring):
    """Batches of 16 with the exact critic: without the own future the mean is the true one, with it far above."""
    rng, pair = np.random.default_rng(0), 2 * 5 + 1  # state 5, clockwise
    phi, psi = exact_critic(ring, [pair] * 16)
    found, with_own = [], []
    for _ in range(4000):
        drawn = rng.choice(6, size=16, p=ring.marginal)
        drawn[0] = 1  # its own future, which is solved
        found.append(cvl.policy_value(phi, psi[:, drawn], torch.from_numpy(REWARDS[drawn]), None, "marginal")[0].item())
        weights = ring.ratio[pair][drawn]
        with_own.append(weights @ REWARDS[drawn] / weights.sum())
    true = (1 - DISCOUNT) * ring.q[pair]
    assert np.mean(found) == pytest.approx(true, rel=0.1) and np.mean(with_own) > 1.15 * true


def own_value(phi, psi, reward, kernel, estimator):
    """(1 - discount) Q of rows with phi, by loops over twins and rows."""
    if estimator == "rff":
        return torch.stack([(kernel(phi)[k] * kernel.xi[k]).sum(-1) for k in range(2)]).amin(0)
    rows = range(len(reward))
    f = torch.stack([torch.stack([torch.stack([x @ y for y in psi[k]]) for x in phi[k]]) for k in range(2)])
    if estimator == "released":
        return torch.stack([f[:, i, i].amin().exp() * reward[i] for i in rows]).mean().repeat(len(reward))
    others = [[j for j in rows if j != i] for i in rows]
    twins = [[(f[k, i, o].exp() @ reward[o]) / f[k, i, o].exp().sum() for i, o in enumerate(others)] for k in range(2)]
    return torch.stack([torch.stack(values) for values in twins]).amin(0)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("estimator", ["marginal", "rff", "released"])
def test_update_goes_along_the_gradients_of_both_losses(estimator, frozen):
    """The actor's: log Q of its own actions, at least log 0.001, and cloning by Q. The critic's: without reward."""
    flags = {"hidden_dim": 8, "repr_dim": 4, "random_features": 64, "batch_size": 6, "bc_coef": 0.3}
    args = cvl.Args(estimator=estimator, critic="run" if frozen else "", **flags)
    generator = torch.Generator().manual_seed(0)
    encoder = cvl.Encoder(torch.tensor([0.5, 0.0, 1.0]), torch.tensor([1.0, 2.0, 3.0]))
    actor = cvl.Actor(encoder, torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), 8, generator)
    critic, kernel = cvl.Critic(encoder, 2, args, generator), cvl.RandomFeatures(args, generator)
    x, future = torch.randn(2, 6, 3, generator=generator)
    action, noise = torch.rand(6, 2, generator=generator) - 0.5, torch.randn(6, 2, generator=generator)
    reward = torch.tensor([0.0, 0, 0, 1, 0, 0])  # row 3 has no other that is rewarded
    cvl.update(
        cvl.Batch(x, future, action, reward, noise),
        actor,
        critic,
        kernel,
        torch.optim.SGD(actor.parameters(), 0.0),
        args,
    )
    found = {name: p.grad for name, p in (*actor.named_parameters(), *critic.named_parameters())}
    assert all(p.requires_grad != frozen for p in critic.parameters())
    critic.requires_grad_(True)

    phi, psi = critic.phi(encoder(x), action), critic.psi(encoder(future))
    logits, mask = phi @ psi.mT - np.log(5), torch.eye(6, dtype=torch.bool)
    loss = (torch.nn.functional.softplus(torch.where(mask, -logits, logits))).mean()
    own = torch.autograd.grad(loss, critic.parameters())
    for (name, _), gradient in zip(critic.named_parameters(), own):
        assert gradient.abs().sum() > 0
        assert found[name] is None if frozen else torch.allclose(found[name], gradient, atol=1e-6), name

    mean, std = actor.net(encoder(x)).chunk(2, -1)
    std = torch.nn.functional.softplus(std) + 0.1
    states = psi.detach(), reward, kernel, estimator
    value = own_value(critic.phi(encoder(x), torch.tanh(mean + std * noise)), *states)
    of_data = own_value(phi.detach(), *states)
    assert estimator != "marginal" or value[3] < 1e-6 < 1e-3 < value[[0, 1, 2, 4, 5]].min()
    value, of_data = (torch.log(torch.where(v > 1e-3, v, 1e-3)) for v in (value, of_data))
    weight = (of_data - value.detach()).exp().clamp(max=10)
    before = torch.atanh(action)
    log_prob = (torch.distributions.Normal(mean, std).log_prob(before) - torch.log(1 - action**2)).sum(-1)
    loss = -0.7 * value.mean() - 0.3 * (weight / weight.mean() * log_prob).mean()
    for (name, parameter), gradient in zip(actor.named_parameters(), torch.autograd.grad(loss, actor.parameters())):
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
        assert gradient.abs().sum() > 0 and parameter.requires_grad


# -------------------------------------------------------------------------------------------------------------- rewards


def save_traceable(path, lengths=(5, 3, 4, 5, 5, 2), flags=True):
    """Write traceable observations, rewards 10 episode + t of the transition from step t, and flags of odd steps."""
    data = traceable_dataset(lengths)
    pairs = [(data.observations[e, : n + 1], data.actions[e, :n]) for e, n in enumerate(lengths)]
    rewards = [10.0 * e + np.arange(n) for e, n in enumerate(lengths)]
    common.save_dataset(path, *zip(*pairs), [], rewards=rewards)
    if flags:
        np.save(path / "successes.npy", data.observations[..., 1] % 2 == 1)
    return path


def load(dataset, **flags):
    args = cvl.Args(env_id="Own", dataset=dataset, eval_episodes=0, **flags)
    return cvl.load_data(args, CPU)[1], args


@pytest.mark.parametrize("reward", ["success", "rewards"])
def test_a_reward_is_that_of_the_state_that_a_transition_arrives_in(reward, tmp_path):
    data, args = load(save_traceable(tmp_path / "data"), reward=reward, batch_size=512)
    heldout = {int(row) // 6 for row in data.heldout.row}
    trained = [(e, t) for e, n in enumerate((5, 3, 4, 5, 5, 2)) for t in range(1, n + 1) if e not in heldout]
    of = {state: state[1] % 2 if reward == "success" else 10 * state[0] + state[1] - 1 for state in trained}
    low, high = min(of.values()), max(of.values())
    batch = cvl.sample(data, args, 0)
    futures = [tuple(x) for x in batch.future.int().tolist()]
    assert set(futures) == set(trained)  # never a first state, which has no reward
    np.testing.assert_allclose(batch.reward, [(of[state] - low) / (high - low) for state in futures], atol=1e-6)
    assert batch.reward.min() == 0 and batch.reward.max() == 1 and (reward == "success" or high - low > 20)


def test_another_file_of_rewards_or_of_flags_may_be_named(tmp_path):
    dataset = save_traceable(tmp_path / "data")
    np.save(tmp_path / "other.npy", -np.load(dataset / "rewards.npy"))
    np.save(tmp_path / "flags.npy", ~np.load(dataset / "successes.npy"))
    own, flags = load(dataset, reward="rewards")[0].rewards, load(dataset)[0].rewards
    inside = np.flatnonzero(np.load(dataset / "observations.npy").reshape(-1, 2)[:, 1] > 0)
    other = load(dataset, reward=str(tmp_path / "other.npy"))[0].rewards
    np.testing.assert_allclose(other[inside], 1 - own[inside], atol=1e-6)
    turned = load(dataset, reward=str(tmp_path / "flags.npy"))[0].rewards
    np.testing.assert_allclose(turned[inside], 1 - flags[inside], atol=1e-6)


def test_the_commanded_goal_as_reward_goal_is_the_success_flag(reach_dataset):
    goal = common.TASKS["FetchReach"].desired_goal
    settings = {"env_id": "FetchReach", "dataset": reach_dataset, "eval_episodes": 0}
    by_goal, by_flag = (
        cvl.load_data(cvl.Args(**settings, **flags), CPU)[1].rewards for flags in ({"reward_goal": goal}, {})
    )
    assert 0 < by_flag.sum() < len(by_flag) and np.array_equal(by_goal, by_flag)
    assert np.array_equal(by_flag, np.load(reach_dataset / "successes.npy").ravel())
    away = (goal[0], goal[1] + 0.1, goal[2])
    other = cvl.load_data(cvl.Args(**settings, reward_goal=away), CPU)[1].rewards
    positions = np.load(reach_dataset / "observations.npy").reshape(-1, 10)[:, :3]
    assert np.array_equal(other, np.linalg.norm(positions - away, axis=1) < 0.05) and 0 < other.sum()


def test_heldout_episodes_do_not_scale_the_reward(tmp_path):
    dataset = save_traceable(tmp_path / "data")
    data, args = load(dataset, reward="rewards")
    rewards, heldout = np.load(dataset / "rewards.npy"), int(data.heldout.row[0]) // 6
    rewards[heldout] = 1e6
    np.save(dataset / "rewards.npy", rewards)
    changed = load(dataset, reward="rewards")[0].rewards.reshape(6, 6)
    kept = [e for e in range(6) if e != heldout]
    assert np.array_equal(changed[kept, 1:], data.rewards.reshape(6, 6)[kept, 1:]) and changed[heldout].max() > 100


# ------------------------------------------------------------------------------------- a frozen critic and another goal


def run_args(dataset, run_dir, **flags):
    settings = {"gradient_steps": 30, "batch_size": 32, "hidden_dim": 16, "repr_dim": 8, "random_features": 64}
    settings |= {"log_interval": 10, "eval_interval": 0, "eval_episodes": 0, "device": "cpu"}
    return cvl.Args(dataset=dataset, run_dir=run_dir, **{**settings, **flags})


def weights(run_dir, part):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)[part]


PARTS_OF_FROZEN = ("first", "critic"), ("second", "critic"), ("second", "actor")


@pytest.mark.parametrize("estimator", ["marginal", "rff", "released"])
def test_a_frozen_critic_stays_equal_to_the_bit_and_the_policy_learns(estimator, reach_dataset, tmp_path):
    flags = {"estimator": estimator}
    cvl.train(run_args(reach_dataset, tmp_path / "first", **flags))
    frozen = {"critic": str(tmp_path / "first"), "reward_goal": (1.3, 0.6, 0.7)}
    cvl.train(run_args(reach_dataset, tmp_path / "second", **flags, **frozen))
    first, second, actor = (weights(tmp_path / name, part) for name, part in PARTS_OF_FROZEN)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert any("phi_nets.0" in name for name in first)
    generator = torch.Generator().manual_seed(int(common.seed_sequence(0, "weights").generate_state(1)[0]))
    encoder = cvl.Encoder(*(first[f"encoder.observation_{name}"] for name in ("mean", "std")))
    start = cvl.Actor(encoder, actor["action_bounds"], 16, generator).state_dict()
    assert start.keys() == actor.keys()
    assert not any(torch.equal(actor[name], start[name]) for name in actor if name.startswith("net."))  # it has learned
    optimizer = weights(tmp_path / "second", "optimizer")
    assert len(optimizer["state"]) == sum(name.startswith("net.") for name in actor) == 6


@pytest.mark.parametrize("estimator", ["marginal", "rff"])
def test_a_frozen_run_resumes_without_the_other_run(estimator, reach_dataset, tmp_path):
    """To the bit, also the mean of random features, which is no weight."""
    cvl.train(run_args(reach_dataset, tmp_path / "first", estimator=estimator))
    frozen = {"critic": str(tmp_path / "first"), "estimator": estimator, "checkpoint_minutes": 0}
    cvl.train(run_args(reach_dataset, tmp_path / "whole", **frozen))
    original, calls = cvl.update, []

    def update(*arguments):
        if len(calls) == 17:
            raise KeyboardInterrupt
        calls.append(original(*arguments))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cvl, "update", update)
        with pytest.raises(KeyboardInterrupt):
            cvl.train(run_args(reach_dataset, tmp_path / "stopped", **frozen))
    (tmp_path / "first").rename(tmp_path / "gone")
    cvl.train(cvl.Args(resume=tmp_path / "stopped"))
    for part in ("actor", "critic", "kernel"):
        one, other = (weights(tmp_path / name, part) for name in ("whole", "stopped"))
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert weights(tmp_path / "whole", "kernel")["xi"].any() == (estimator == "rff")


def test_a_file_of_rewards_is_found_again_from_another_directory(tmp_path, monkeypatch):
    dataset, args = save_traceable(tmp_path / "data"), {"env_id": "Own", "checkpoint_minutes": 0}
    (tmp_path / "rewards.npy").write_bytes((dataset / "rewards.npy").read_bytes())
    monkeypatch.chdir(tmp_path)
    result = cvl.train(run_args(dataset, tmp_path / "run", reward="rewards.npy", **args))
    assert result["args"]["reward"] == str(tmp_path / "rewards.npy")
    monkeypatch.chdir("/")
    assert cvl.train(cvl.Args(resume=tmp_path / "run"))["args"]["reward"] == str(tmp_path / "rewards.npy")


class Still(torch.nn.Module):
    def forward(self, observation):
        return torch.zeros(1, 4)


def test_success_is_measured_for_the_goal_of_the_reward(reach_dataset, tmp_path):
    """Where the gripper starts, a policy that keeps still succeeds; at the commanded goal it does not."""
    start = tuple(np.load(reach_dataset / "observations.npy")[0, 0, :3].tolist())
    assert cvl.evaluate(Still(), "FetchReach", 1, 0, CPU, goal=start)["final_success_rate"] == 1
    assert cvl.evaluate(Still(), "FetchReach", 1, 0, CPU)["final_success_rate"] == 0
    result = cvl.train(run_args(reach_dataset, tmp_path / "run", reward_goal=start, eval_episodes=1, gradient_steps=2))
    assert result["initial_success_rate"] == 1
    played = evaluate.evaluate(evaluate.Args(tmp_path / "run", episodes=1, seed=0))
    assert played["success_rate"] == result["success_rate"] and played["initial_success_rate"] == 1
    assert json.loads((tmp_path / "run" / "result.json").read_text())["args"]["reward_goal"] == list(start)
    assert (
        evaluate.evaluate(evaluate.Args(tmp_path / "run", episodes=1, env_id="FetchReach"))["initial_success_rate"] == 0
    )


# ---------------------------------------------------------------------------------------------------- one sentence each


def refuse(args, message):
    with pytest.raises(common.UserError, match=message) as caught:
        cvl.train(args)
    assert "\n" not in str(caught.value) and not args.run_dir.exists()


def test_images_get_one_sentence(tmp_path):
    rng = np.random.default_rng(0)
    observations, actions = rng.integers(0, 256, (8, 6, 16, 20, 3)), rng.uniform(-2, 2, (8, 5, 2))
    common.save_dataset(tmp_path / "data", observations, actions, [], rewards=rng.normal(size=(8, 5)))
    args = run_args(tmp_path / "data", tmp_path / "run", env_id="Own", reward="rewards")
    refuse(args, "^cvl.py is for states, and .*data holds images; laeo.py takes both.$")


def test_bad_rewards_get_one_sentence(reach_dataset, tmp_path):
    dataset, run = save_traceable(tmp_path / "data", flags=False), tmp_path / "run"
    own = {"env_id": "Own"}
    refuse(run_args(dataset, run, **own), "data/successes.npy is damaged or missing")
    refuse(run_args(dataset, run, **own, reward="sucess"), "sucess is damaged or missing")
    refuse(run_args(reach_dataset, run, reward="rewards"), "rewards.npy is damaged or missing")
    flags = np.zeros((6, 6), bool)
    for array, message in (
        (flags[:, 1:], r"other.npy has shape \(6, 5\); .*data needs \(6, 6\)\.$"),
        (flags.astype(np.float32), r"other.npy has shape \(6, 6\); .*data needs \(6, 5\)\.$"),
        (flags, "all rewards of the episodes to train on are 0; there is nothing to maximise"),
        (np.full((6, 5), np.nan, np.float32), "other.npy holds a value that is not finite"),
        (np.zeros((6, 5)), "other.npy has dtype <f8; it must be"),
    ):
        np.save(tmp_path / "other.npy", array)
        refuse(run_args(dataset, run, **own, reward=str(tmp_path / "other.npy")), message)
    np.savez(tmp_path / "other.npz", flags)
    refuse(run_args(dataset, run, **own, reward=str(tmp_path / "other.npz")), "other.npz is damaged or missing")
    goal = {"dataset": reach_dataset, "run_dir": run, "reward_goal": (1.3, 0.6, 0.7)}
    for settings in (
        {**own, "dataset": dataset},
        {"dataset": dataset},  # which holds no positions
        {"reward_goal": (1.0, np.nan, 1.0)},
        {"reward": "rewards"},
    ):
        refuse(
            run_args(**{**goal, **settings}),
            "^--reward-goal is for Fetch tasks of states: finite numbers, and no --rew",
        )
    far = run_args(reach_dataset, run, reward_goal=(9.0, 9.0, 9.0))
    refuse(far, "all rewards of the episodes to train on are 0")


def test_critic_of_another_method_dataset_or_setting_gets_one_sentence(reach_dataset, tmp_path):
    first, dataset = tmp_path / "first", save_traceable(tmp_path / "data")
    cvl.train(run_args(reach_dataset, first, gradient_steps=2))

    def refused(message, data=reach_dataset, critic=first, **flags):
        args = run_args(data, tmp_path / "run", critic=str(critic), **flags)
        refuse(args, rf"^--critic .* cannot be used \(.*{message}.*\)\.$")

    refused("FileNotFoundError", critic=tmp_path / "nowhere")
    refused("its dataset is .*, not", dataset, env_id="Own")
    refused("its estimator is marginal, not rff", estimator="rff")
    refused("its discount is 0.99, not 0.9", discount=0.9)
    refused("its hidden_dim is 16, not 32", hidden_dim=32)
    refused("its seed is 0, not 1", seed=1)
    checkpoint = torch.load(first / "checkpoint.pt", weights_only=True)
    others = {name: x for name, x in checkpoint["args"].items() if name not in ("estimator", "temperature", "discount")}
    for change, message in (
        ({"method": "bc", "args": others}, "its method is bc, not cvl"),
        ({"step": 1}, "its finished is False, not True"),
        ({"critic": {}}, "RuntimeErr"),
    ):
        (tmp_path / "changed").mkdir(exist_ok=True)
        torch.save(checkpoint | change, tmp_path / "changed" / "checkpoint.pt")
        refused(message, critic=tmp_path / "changed")
