"""TAILO: its losses, weights and stages against closed forms, an independent computation, and bc.py.

Its batches, encoder, distribution and learning rate are tested in test_laeo.py, with those of the other scripts.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import traceable_dataset
from test_laeo import BOUNDS, IMAGE, features_of, image_dataset, log_density, make_actor, perceptron, randomise

import bc
import common
import purl
import tailo

CPU = torch.device("cpu")


def make_data(dataset, training, heldout=()):
    observations, training = torch.from_numpy(dataset.observations).flatten(0, 1), np.array(training)
    uses = training, training[: len(heldout)], np.array(heldout, int)
    weight = np.zeros(len(observations), np.float32)
    return tailo.Data(observations, *(common.transitions(dataset, episodes) for episodes in uses), CPU, weight)


def small_args(**kwargs):
    defaults = {"batch_size": 16, "hidden_dim": 16, "channels": 4, "random_shift": 0, "classifier_steps": 5}
    return tailo.Args(**(defaults | kwargs))


def encoders_for(dataset, args, seed=3):
    shape = dataset.observations.shape[2:]
    image, generator = len(shape) == 3, torch.Generator().manual_seed(seed)
    mean, std = torch.full(shape, 120.0 if image else 0.0), torch.full(shape, 70.0 if image else 1.0)
    return [tailo.Encoder(mean, std, args, generator) for _ in "12"]


def fit(dataset, training, args, seed=3, encoders=None, examples=None):
    examples = torch.from_numpy(dataset.success_examples) if examples is None else examples
    encoders, generator = encoders or encoders_for(dataset, args, seed), torch.Generator().manual_seed(seed + 1)
    return tailo.fit_weights(encoders, dataset, make_data(dataset, training), examples, args, generator)


# ------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("eta", [0.0, 0.2, 0.5, 1.0])
def test_unlabelled_loss_of_zero_logits_is_log_2(eta):
    """eta log 2 + max(log 2 - eta log 2, 0) = log 2: examples weigh eta and, as negatives, are taken off eta times."""
    loss = tailo.unlabelled_loss(torch.zeros(3, dtype=torch.float64), torch.zeros(7, dtype=torch.float64), eta)
    assert loss.item() == pytest.approx(np.log(2), rel=1e-12)


@pytest.mark.parametrize("shift, floor", [(1.5, False), (-6.0, True)])
def test_unlabelled_loss_against_the_closed_form_and_purls(shift, floor):
    rng, eta = np.random.default_rng(0), 0.4
    examples, data = rng.normal(2, 1, 5), rng.normal(shift, 1, 40)
    loss = tailo.unlabelled_loss(torch.from_numpy(examples), torch.from_numpy(data), eta).item()
    sigma = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    negative = -np.log(1 - sigma(data)).mean() + eta * np.log(1 - sigma(examples)).mean()
    assert (negative < 0) == floor
    assert loss == pytest.approx(-eta * np.log(sigma(examples)).mean() + max(negative, 0), rel=1e-12)
    assert loss == purl.reward_loss(torch.from_numpy(examples), torch.from_numpy(data), eta).item()


def test_second_classifiers_optimum_is_the_log_ratio_of_examples_to_safe_negatives():
    """Four states, exact expectations, one free logit for each."""
    p_star, p_safe = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.4, 0.4, 0.1, 0.1])
    examples, data = (torch.from_numpy(np.repeat(np.arange(4), (10 * p + 0.5).astype(int))) for p in (p_star, p_safe))
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = tailo.classifier_loss(logits[examples], logits[data])
        loss.backward()
        return loss

    assert closure().item() == pytest.approx(2 * np.log(2), rel=1e-12)
    optimizer.step(closure)
    np.testing.assert_allclose(logits.detach(), np.log(p_star / p_safe), atol=1e-4)


def test_policy_loss_by_hand():
    weight, log_prob = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([-2.0, 4.0, 100.0])
    assert tailo.policy_loss(weight, log_prob).item() == pytest.approx(-(-2 + 2) / 3)
    assert tailo.policy_loss(weight, log_prob + 3).item() == pytest.approx(-(1 + 3.5) / 3)


# --------------------------------------------------------------------------------------------------- gradient penalty


def test_gradient_penalty_of_a_linear_classifier():
    """The gradient is w everywhere: (|w| - 1)^2 in each row, whose own gradient is 2 (|w| - 1) w / |w|."""
    generator = torch.Generator().manual_seed(0)
    net = torch.nn.Linear(5, 1).double()
    with torch.no_grad():
        net.weight.copy_(torch.randn(1, 5, generator=generator, dtype=torch.float64))
    examples, data = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (3, 8))
    penalty = tailo.gradient_penalty(net, examples, data, torch.rand(8, 1, generator=generator, dtype=torch.float64))
    w = net.weight.detach().numpy()[0]
    norm = np.sqrt((w**2).sum())
    assert abs(norm - 1) > 0.2
    assert penalty.item() == pytest.approx((norm - 1) ** 2, rel=1e-12)
    penalty.backward()
    np.testing.assert_allclose(net.weight.grad[0], 2 * (norm - 1) * w / norm, rtol=1e-10)


def test_gradient_penalty_against_finite_differences():
    """A tanh network in float64. Mixtures are of each state with an example, which come round in turn."""
    generator = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.Tanh(), torch.nn.Linear(9, 1)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    examples, data = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (3, 7))
    mix = torch.rand(7, 1, generator=generator, dtype=torch.float64)
    examples.requires_grad_(True), data.requires_grad_(True)
    penalty = tailo.gradient_penalty(net, examples, data, mix)

    a, c, b, d = (parameter.detach().numpy() for parameter in net.parameters())
    f = lambda x: np.tanh(x @ a.T + c) @ b.T + d  # noqa: E731
    expected = []
    for i in range(7):
        s, e, u = data[i].detach().numpy(), examples[i % 3].detach().numpy(), mix[i].item()
        x = (1 - u) * s + u * e
        gradient = [(f(x + h) - f(x - h)).item() / 2e-6 for h in 1e-6 * np.eye(4)]
        expected.append((np.linalg.norm(gradient) - 1) ** 2)
    assert np.std(expected) > 0.1
    assert penalty.item() == pytest.approx(np.mean(expected), rel=1e-7)

    penalty.backward()  # reaches the classifier, and not the encoder that made its features
    assert examples.grad is None and data.grad is None
    with torch.no_grad():
        for parameter in net.parameters():
            before, slope = parameter.flatten()[1 % parameter.numel()].item(), 1e-6
            values = []
            for x in (before + slope, before - slope):
                parameter.view(-1)[1 % parameter.numel()] = x
                with torch.enable_grad():
                    values.append(tailo.gradient_penalty(net, examples, data, mix).item())
            parameter.view(-1)[1 % parameter.numel()] = before
            found = 0.0 if parameter.grad is None else parameter.grad.flatten()[1 % parameter.numel()].item()
            assert found == pytest.approx((values[0] - values[1]) / (2 * slope), rel=1e-5, abs=1e-7)


def test_gradient_penalty_of_a_constant_classifier_is_one_and_its_gradient_finite():
    net = tailo.mlp([3, 8, 1], torch.Generator().manual_seed(0))
    with torch.no_grad():
        net[-1].weight.zero_()
    penalty = tailo.gradient_penalty(net, torch.ones(2, 3), torch.zeros(4, 3), torch.full((4, 1), 0.5))
    assert penalty.item() == 1
    penalty.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in net.parameters())


# ---------------------------------------------------------------------------------------------------------- weights


def test_safe_negatives_by_hand():
    """Mean logits -1, 3, 0 and 2; what follows the end of an episode does not count, and its last state does."""
    logits = np.array([[-3, 1, 500], [2, 3, 4], [0, 0, 0], [4, 0, -900]], np.float32)
    lengths = np.array([1, 2, 2, 1], np.int32)
    assert tailo.safe_negatives(logits, lengths, 0.5).tolist() == [True, False, True, False]  # up to 1
    assert tailo.safe_negatives(logits, lengths, 0.9).tolist() == [True, False, True, True]  # up to 2.7
    assert tailo.safe_negatives(logits, lengths, 0.0).tolist() == [True, False, False, False]  # never none
    assert tailo.safe_negatives(logits, lengths, 1.0).all()
    assert tailo.safe_negatives(np.zeros((3, 2)), np.ones(3, int), 0.3).all()  # all alike: none is safer


def test_weights_of_an_episode_of_three_steps_by_hand():
    """R = 1, 2, 3, 4 and discount 0.5: 4 / (1 - 0.5) = 8, 3 + 4 = 7, 2 + 3.5 = 5.5, 1 + 2.75 = 3.75."""
    logits, lengths, one = np.log([[1, 2, 3, 4]]), np.array([3]), np.array([0])
    expected = np.array([[3.75, 5.5, 7, 8]]) / 8
    np.testing.assert_allclose(tailo.weigh(logits, lengths, one, 1.0, 0.5), expected, rtol=1e-12)
    expected = np.array([[1 + 8.25, 4 + 12.5, 9 + 16, 32]]) / 32  # R = 1, 4, 9, 16
    np.testing.assert_allclose(tailo.weigh(logits, lengths, one, 2.0, 0.5), expected, rtol=1e-12)


def test_weights_of_ragged_episodes_by_hand():
    """Beside it one of one step with R = 2, 1: 1 / (1 - 0.5) = 2 and 2 + 1 = 3. What follows its end does not count."""
    logits = np.log([[1, 2, 3, 4], [2, 1, 1e9, 1e-9]])
    for training, most in (([0], 8), ([1], 3), ([0, 1], 8)):
        weights = tailo.weigh(logits, np.array([3, 1]), np.array(training), 1.0, 0.5)
        np.testing.assert_allclose(weights[0], np.array([3.75, 5.5, 7, 8]) / most, rtol=1e-12)
        np.testing.assert_allclose(weights[1, :2], np.array([3, 2]) / most, rtol=1e-12)


def test_weights_are_infinite_sums_with_the_last_state_for_ever():
    rng = np.random.default_rng(0)
    logits, lengths = rng.normal(size=(6, 9)), np.array([8, 1, 5, 3, 8, 2])
    weights = tailo.weigh(logits, lengths, np.arange(6), 1.3, 0.9)
    rewards = [np.exp(1.3 * np.concatenate([x[:n], np.repeat(x[n], 400)])) for x, n in zip(logits, lengths)]
    sums = [[(r[t:] * 0.9 ** np.arange(len(r) - t)).sum() for t in range(n + 1)] for r, n in zip(rewards, lengths)]
    most = max(max(x) for x in sums)
    for mine, expected, n in zip(weights, sums, lengths):
        np.testing.assert_allclose(mine[: n + 1], np.array(expected) / most, rtol=1e-10)
    assert weights.max() == 1


def test_weights_do_not_depend_on_the_level_of_the_logits_and_overflow_nowhere():
    rng = np.random.default_rng(0)
    logits, lengths, training = rng.normal(size=(4, 6)), np.array([5, 2, 3, 5]), np.arange(4)
    weights = tailo.weigh(logits, lengths, training, 2.0, 0.99)
    np.testing.assert_allclose(tailo.weigh(logits + 5000, lengths, training, 2.0, 0.99), weights, rtol=1e-8)
    wide = tailo.weigh(1000 * logits, lengths, training, 2.0, 0.99)
    assert np.isfinite(wide).all() and wide.max() == 1 and wide.min() < 1e-9


# -------------------------------------------------------------------------------------------- a constant reward is BC


@pytest.mark.parametrize("scale", [0.0, 1.25])
def test_a_constant_reward_is_behavioural_cloning(scale):
    """With every weight 1 a step has bc.py's gradient; R is constant if the logits are, or with a scale of zero."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 6)) if scale == 0 else np.full((4, 6), -2.5)
    weights = tailo.weigh(logits, np.array([5, 2, 3, 1]), np.arange(4), scale, 0.9)
    np.testing.assert_allclose(weights, 1, rtol=1e-12)

    generator = torch.Generator().manual_seed(5)
    observation, action = torch.randn(16, 6, generator=generator), torch.rand(16, 3, generator=generator) * 2 - 1
    actor, clone = make_actor(tailo), make_actor(bc)
    randomise(actor)
    clone.load_state_dict(actor.state_dict())
    weight = torch.from_numpy(weights.astype(np.float32).flatten()[:16])
    tailo.update(tailo.Batch(observation, action, weight, None), actor, torch.optim.SGD(actor.parameters(), 0.0))
    bc.update(bc.Batch(observation, action, None), clone, torch.optim.SGD(clone.parameters(), 0.0))
    for parameter, other in zip(actor.parameters(), clone.parameters()):
        assert other.grad.abs().sum() > 0
        torch.testing.assert_close(parameter.grad, other.grad)


# ------------------------------------------------------------------------------------------------------------- stages


class Watch:
    """Records what fit_weights hands to the losses, and what its encoders are at that time."""

    def __init__(self, monkeypatch, encoders=()):
        self.calls, self.penalties, self.encoders = [], [], encoders
        for name in ("unlabelled_loss", "classifier_loss", "gradient_penalty"):
            monkeypatch.setattr(tailo, name, self.wrap(name, getattr(tailo, name)))

    def wrap(self, name, original):
        def call(*args):
            now = [[p.detach().clone() for p in encoder.parameters()] for encoder in self.encoders]
            (self.penalties if name == "gradient_penalty" else self.calls).append((name, args, now))
            return original(*args)

        return call


@pytest.mark.parametrize("images", [False, True], ids=["states", "images"])
def test_the_unlabelled_classifier_comes_first_and_the_second_is_a_fresh_one(images, monkeypatch):
    dataset = image_dataset([5, 3, 4, 5]) if images else traceable_dataset([5, 3, 4, 5])
    args = small_args(eta=0.35, random_shift=2 if images else 0, penalty_coef=3.0)
    watch, made, mlp = Watch(monkeypatch), [], tailo.mlp
    monkeypatch.setattr(tailo, "mlp", lambda sizes, generator: made.append(mlp(sizes, generator)) or made[-1])
    encoders = encoders_for(dataset, args)
    made.clear()  # an encoder of images has a layer of its own
    fit(dataset, [0, 1, 2, 3], args, encoders=encoders)
    assert [name for name, _, _ in watch.calls] == 5 * ["unlabelled_loss"] + 5 * ["classifier_loss"]
    assert all(arguments[2] == 0.35 for name, arguments, _ in watch.calls if name == "unlabelled_loss")
    assert [arguments[0] for _, arguments, _ in watch.penalties] == 5 * [made[0]] + 5 * [made[1]] and len(made) == 2
    assert not torch.equal(made[0][0].weight, made[1][0].weight)
    for _, (_, examples, data, mix), _ in watch.penalties:  # of features, which are made of images by an encoder
        dim = 8 * 4 if images else 2
        assert examples.shape == (1, dim) and data.shape == (16, dim) and encoders[0].dim == dim
        assert mix.shape == (16, 1) and 0 <= mix.min() < 0.3 and 0.7 < mix.max() <= 1
        assert examples.requires_grad == images
    assert len({arguments[3].sum().item() for _, arguments, _ in watch.penalties}) == 10


def test_each_stage_reaches_only_its_own_networks(monkeypatch):
    """The policy's encoder is not touched by the classifiers, theirs not by each other, nor by the policy's step."""
    dataset, args = image_dataset([5, 3, 4, 5]), small_args(random_shift=2)
    encoders, actor = encoders_for(dataset, args), make_actor(tailo, shape=IMAGE)
    watch = Watch(monkeypatch, [*encoders, actor])
    fit(dataset, [0, 1, 2, 3], args, encoders=encoders)
    start, between = (watch.calls[i][2] for i in (0, 5))
    end = [[p.detach().clone() for p in network.parameters()] for network in (*encoders, actor)]
    same = lambda one, other: [all(map(torch.equal, a, b)) for a, b in zip(one, other)]  # noqa: E731
    assert same(start, between) == [False, True, True] and same(between, end) == [True, False, True]
    assert not same([start[0]], [start[1]])[0]  # and they begin with other weights

    generator = torch.Generator().manual_seed(0)
    batch = tailo.Batch(torch.randint(256, (8, *IMAGE), generator=generator, dtype=torch.uint8),
                        torch.rand(8, 3, generator=generator), torch.rand(8, generator=generator), None)  # fmt: skip
    tailo.update(batch, actor, torch.optim.Adam(actor.parameters(), 1e-2))
    after = [[p.detach().clone() for p in network.parameters()] for network in (*encoders, actor)]
    assert same(end, after) == [True, True, False]


class Spy(torch.nn.Module):
    """An encoder of states that remembers what it is trained on."""

    net, dim = torch.nn.Identity(), 2

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, observation, shift=None):
        if torch.is_grad_enabled():
            self.seen.append([tuple(x) for x in observation.int().tolist()])
        return observation


def test_what_each_classifier_is_trained_on(monkeypatch):
    """All states of training episodes, the last ones too, in the first; in the second those of the safe negatives.

    No padding (-1, -1) and no state of a held-out episode in either; every example in every batch, in the first place.
    """
    lengths, training = [4, 2, 6, 3, 5, 1], [5, 0, 2, 3]
    dataset, examples = traceable_dataset(lengths), torch.tensor([[9.0, 0], [9, 1], [9, 2]])
    asked, original = [], tailo.safe_negatives

    def safe_negatives(logits, lengths, quantile):
        asked.append((logits, lengths, quantile))
        return original(logits, lengths, quantile)

    monkeypatch.setattr(tailo, "safe_negatives", safe_negatives)
    spies, args = [Spy(), Spy()], small_args(classifier_steps=60, safe_quantile=0.4)
    fit(dataset, training, args, encoders=spies, examples=examples)
    [(logits, of_lengths, quantile)] = asked
    assert quantile == 0.4 and of_lengths.tolist() == [4, 6, 3, 1] and logits.shape == (4, 7)  # episodes 0, 2, 3, 5
    safe = np.array([0, 2, 3, 5])[original(logits, of_lengths, quantile)]
    assert 0 < len(safe) < 4
    for spy, episodes in zip(spies, ([0, 2, 3, 5], safe)):
        assert len(spy.seen) == 60
        assert all(sorted(states[:3]) == [(9, 0), (9, 1), (9, 2)] and len(states) == 19 for states in spy.seen)
        found = {state for states in spy.seen for state in states[3:]}
        assert found == {(e, t) for e in episodes for t in range(lengths[e] + 1)}


def test_more_examples_than_a_batch_holds_take_turns():
    examples, spies = torch.tensor([[9.0, i] for i in range(40)]), [Spy(), Spy()]
    fit(traceable_dataset([4, 2, 6]), [0, 1, 2], small_args(classifier_steps=40), encoders=spies, examples=examples)
    for spy in spies:
        assert all(len(set(states[:16])) == 16 and len(states) == 32 for states in spy.seen)
        assert {state for states in spy.seen for state in states[:16]} == {(9, i) for i in range(40)}


def two_ways(lengths, good, seed=0):
    """Points that walk from the origin to (2, 0), if good, or to (-2, 0), with noise; examples are near the former."""
    rng = np.random.default_rng(seed)
    dataset = traceable_dataset(lengths)
    for e, n in enumerate(lengths):
        way = np.linspace(0, 2 if good[e] else -2, n + 1)[:, None] * [1, 0]
        dataset.observations[e, : n + 1] = way + 0.1 * rng.standard_normal((n + 1, 2))
        dataset.observations[e, n + 1 :] = [2, 0] if not good[e] else [-2, 0]  # padding that would mislead
    examples = ([2, 0] + 0.1 * rng.standard_normal((20, 2))).astype(np.float32)
    return dataset._replace(success_examples=examples)


def test_episodes_that_arrive_where_the_examples_are_weigh_more(monkeypatch):
    """Half of them do. Those that do not are the safe negatives, and all of their weights are the smaller ones."""
    good = np.arange(24) % 2 == 0
    dataset = two_ways(np.random.default_rng(1).integers(4, 12, 24), good)
    found, original = [], tailo.safe_negatives
    monkeypatch.setattr(tailo, "safe_negatives", lambda *args: found.append(original(*args)) or found[-1])
    args = small_args(batch_size=64, hidden_dim=32, classifier_steps=150, discount=0.9, penalty_coef=0.1)
    weights = fit(dataset, range(24), args).reshape(24, -1)
    assert np.array_equal(found[0], ~good)
    assert weights.shape == dataset.observations.shape[:2] and weights.dtype == np.float32 and weights.max() == 1
    last = weights[np.arange(24), dataset.lengths]
    assert last[good].min() > 20 * last[~good].max()
    assert weights[good, 0].min() > 3 * weights[~good, 0].max()
    assert all(np.diff(weights[e, : dataset.lengths[e] + 1][-3:]).min() > 0 for e in np.nonzero(good)[0])


def test_true_ends_count_as_the_last_state_for_ever_too():
    """The same weights, whether or not something other than a step limit ended the episodes."""
    dataset, args = two_ways([4, 6, 5, 4], [True, False, True, False]), small_args()
    ended = dataset._replace(terminals=np.ones(4, bool))
    assert np.array_equal(fit(dataset, range(4), args), fit(ended, range(4), args))


@pytest.mark.parametrize("images", [False, True], ids=["states", "images"])
def test_weights_depend_on_the_seed_alone(images):
    dataset = image_dataset([5, 3, 4, 5]) if images else traceable_dataset([5, 3, 4, 5])
    args = small_args(random_shift=2 if images else 0)
    torch.manual_seed(0)
    one = fit(dataset, [0, 1, 2], args)
    torch.manual_seed(1)
    assert np.array_equal(one, fit(dataset, [0, 1, 2], args))
    assert not np.array_equal(one, fit(dataset, [0, 1, 2], args, seed=4))


def test_heldout_episodes_change_no_weight_of_the_others():
    """Also where their logits are far larger than all others, so that they would be the maximum."""
    dataset, args = two_ways([4, 6, 5, 4], [True, False, True, True]), small_args(classifier_steps=50)
    changed = dataset._replace(observations=dataset.observations.copy())
    changed.observations[3] += [40, 0]
    one, other = (fit(x, [0, 1, 2], args).reshape(4, -1) for x in (dataset, changed))
    assert np.array_equal(one[:3], other[:3]) and one[:3].max() == 1 < other[3].max()


# --------------------------------------------------------------------------------------------------- batches and steps


def test_a_batch_has_the_weights_of_its_own_states():
    dataset = traceable_dataset([3, 5, 1])
    data = make_data(dataset, [2, 0, 1], [1])
    data = data._replace(weight=np.arange(len(data.observations), dtype=np.float32))
    for use in ("batches", "train", "heldout"):
        batch = tailo.sample(data, small_args(batch_size=200), 4, use)
        assert torch.equal(batch.weight, 6 * batch.observation[:, 0] + batch.observation[:, 1])
        assert len(batch.weight.unique()) == {"batches": 9, "train": 1, "heldout": 5}[use]


def make_batch(shape=(6,), size=16, random_shift=0):
    generator = torch.Generator().manual_seed(5)
    action, weight = torch.rand(size, 3, generator=generator) * 2 - 1, torch.rand(size, generator=generator)
    if len(shape) == 1:
        return tailo.Batch(torch.randn(size, *shape, generator=generator), action, weight, None)
    images = torch.randint(256, (size, *shape), generator=generator, dtype=torch.uint8)
    shift = torch.randint(2 * random_shift + 1, (size, 2), generator=generator)
    return tailo.Batch(images, action, weight, shift)


@pytest.mark.parametrize("shape, random_shift", [((6,), 0), (IMAGE, 2)])
def test_update_goes_along_the_gradient_of_the_weighted_and_shifted_batch(shape, random_shift):
    """Twice, so that gradients that added up would show."""
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.full(shape, 100.0 if random_shift else 0.0), torch.full(shape, 70.0 if random_shift else 1.0)
    encoder = tailo.Encoder(mean, std, small_args(random_shift=random_shift), generator)
    actor, batch = tailo.Actor(encoder, BOUNDS, 32, generator), make_batch(shape, random_shift=random_shift)
    randomise(actor)
    optimizer, parameters = torch.optim.SGD(actor.parameters(), 1e-3), list(actor.parameters())
    for _ in range(2):
        mean, std = actor.net(features_of(actor.encoder, batch.observation, batch.shift, random_shift)).chunk(2, -1)
        log_prob = torch.distributions.Normal(mean, F.softplus(std) + 0.1).log_prob(torch.atanh(batch.action))
        log_prob = (log_prob - torch.log(1 - batch.action**2)).sum(-1)
        gradients = torch.autograd.grad(-(batch.weight * log_prob).mean(), parameters)
        before = [parameter.detach().clone() for parameter in parameters]
        tailo.update(batch, actor, optimizer)
        for parameter, gradient, old in zip(parameters, gradients, before):
            assert gradient.abs().sum() > 0
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(parameter.detach(), old - 1e-3 * gradient)


@pytest.mark.parametrize("shape, random_shift", [((6,), 0), (IMAGE, 2)])
def test_measure_against_an_independent_computation(shape, random_shift):
    """In float64, by numpy; metrics of images are measured without the random shift."""
    actor, batch = make_actor(tailo, shape=shape), make_batch(shape, random_shift=random_shift)
    randomise(actor)
    features = actor.encoder(batch.observation).detach().double().numpy()
    mean, std = np.split(perceptron(actor.net, features), 2, axis=1)
    std, w = np.logaddexp(0, std) + 0.1, batch.weight.double().numpy()
    log_prob = log_density(batch.action.double().numpy(), mean, std)
    expected = {"policy_loss": -(w * log_prob).sum() / w.sum(), "bc_loss": -log_prob.mean(), "weight": w.mean()}
    expected |= {"effective_share": w.sum() ** 2 / (w**2).sum() / len(w), "policy_std": std.mean()}
    assert abs(expected["policy_loss"] - expected["bc_loss"]) > 0.01
    metrics = tailo.measure(batch, actor)
    assert metrics == pytest.approx(expected, rel=1e-3) and all(type(x) is float for x in metrics.values())


def test_equal_weights_are_all_effective_and_one_of_sixteen_is_a_sixteenth():
    actor, batch = make_actor(tailo), make_batch()
    for weight, share in ((torch.full((16,), 0.3), 1), (torch.eye(16)[3], 1 / 16), (torch.ones(16) * 1e-12, 1)):
        assert tailo.measure(batch._replace(weight=weight), actor)["effective_share"] == pytest.approx(share)


def test_solved_episodes_of_a_real_dataset_weigh_more(reach_dataset, tmp_path, monkeypatch):
    """What the policy is trained with, in a run from the command's function; the flags are read by this test alone."""
    found, original = [], tailo.fit_weights
    monkeypatch.setattr(tailo, "fit_weights", lambda *args: found.append((original(*args), args[2])) or found[-1][0])
    settings = {"gradient_steps": 20, "batch_size": 64, "hidden_dim": 64, "classifier_steps": 300, "num_success": 50}
    used, sample = [], tailo.sample
    monkeypatch.setattr(tailo, "sample", lambda data, *rest: used.append(data.weight) or sample(data, *rest))
    tailo.train(tailo.Args(dataset=reach_dataset, run_dir=tmp_path / "run", eval_episodes=0, **settings))
    [(weights, data)] = found
    assert used and all(weight is weights for weight in used)
    solved = np.load(reach_dataset / "successes.npy")[:, -1]
    training = np.unique(data.batches.row // 51)
    starts = weights.reshape(40, 51)[:, 0]
    assert 5 < solved[training].sum() < len(training) - 5
    assert np.median(starts[training][solved[training]]) > 3 * np.median(starts[training][~solved[training]])
