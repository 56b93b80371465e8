"""LAEO: its losses and batches against independent computations, its theory on a small MDP, and its gradient step.

What all scripts have (encoder, standardisation, batches, learning rate) is tested here for each of them.
"""

import json

import numpy as np
import pytest
import torch
from conftest import traceable_dataset

import bc
import common
import laeo
import oril
import purl
import tailo

SCRIPTS = {"laeo": laeo, "bc": bc, "oril": oril, "purl": purl, "tailo": tailo}
CPU = torch.device("cpu")
BOUNDS = torch.tensor([[-2.0, 0.1, -1.0], [2.0, 0.7, 1.0]])
NETWORKS = ("Actor", "Critic")
IMAGE = (8, 16, 3)  # height and width differ, so that confusing them shows


@pytest.fixture(params=SCRIPTS)
def script(request):
    return SCRIPTS[request.param]


def make_encoder(script=laeo, shape=(6,), generator=None, random_shift=0, channels=4):
    mean = torch.zeros(shape) if len(shape) == 1 else torch.linspace(50, 200, int(np.prod(shape))).view(shape)
    std = torch.full(shape, 1.0 if len(shape) == 1 else 70.0)
    args = script.Args(random_shift=random_shift, channels=channels)
    return script.Encoder(mean, std, args, generator or torch.Generator().manual_seed(0))


def make_networks(shape=(6,), bounds=BOUNDS, hidden_dim=32, repr_dim=8, seed=0, random_shift=0):
    generator = torch.Generator().manual_seed(seed)
    encoder = make_encoder(laeo, shape, generator, random_shift)  # of both
    actor = laeo.Actor(encoder, bounds, hidden_dim, generator)
    critic = laeo.Critic(encoder, bounds.shape[1], hidden_dim, repr_dim, generator)
    return actor, critic


def make_actor(script, bounds=BOUNDS, hidden_dim=32, shape=(6,)):
    generator = torch.Generator().manual_seed(0)
    return script.Actor(make_encoder(script, shape, generator), bounds, hidden_dim, generator)


def make_data(script, dataset, training, heldout=()):
    observations, training = torch.from_numpy(dataset.observations).flatten(0, 1), np.array(training)
    uses = training, training[: len(heldout)], np.array(heldout, int)
    ratio = [np.arange(len(observations), dtype=np.float32)] if script in (laeo, tailo) else []  # that of row r is r
    return script.Data(observations, *(common.transitions(dataset, episodes) for episodes in uses), CPU, *ratio)


def image_dataset(lengths, shape=IMAGE):
    data = traceable_dataset(lengths)
    images = np.random.default_rng(0).integers(0, 256, (*data.observations.shape[:2], *shape), np.uint8)
    return data._replace(observations=images, success_examples=images[:1, 0])


def shift_with_numpy(images, mean, std, shift, pad):
    """Standardise, then pad by repeating the edge, then cut out; nothing of the scripts' code is in it."""
    x = (images.numpy().astype(np.float32) - mean.numpy()) / std.numpy()
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
    height, width = images.shape[1:3]
    cut = [image[row : row + height, column : column + width] for image, (row, column) in zip(x, shift.tolist())]
    return np.moveaxis(np.stack(cut), -1, 1)


def features_of(encoder, observation, shift, pad):
    """Return the encoder's features of images that numpy has shifted."""
    if shift is None:
        return encoder(observation)
    x = shift_with_numpy(observation, encoder.observation_mean, encoder.observation_std, shift, pad)
    return encoder.net(torch.from_numpy(np.ascontiguousarray(x)))


def parameters_of(*networks):
    """Return all parameters, those of an encoder that two networks share once."""
    return list(torch.nn.ModuleList(networks).parameters())


def add_gradients(*losses):
    """Return {parameter: gradient} of the sum of losses, each of them given with the parameters that it may reach.

    Each loss is differentiated by itself, as if there were no other.
    """
    found = {}
    for loss, parameters in losses:
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True)):
            found[parameter] = found.get(parameter, 0) + gradient
    return found


def encoded(encoder, images):
    """Return an encoder's features of images in float64, by numpy, from its weights alone."""
    layers, mean = list(encoder.net), encoder.observation_mean.double().numpy()
    weights = [[p.detach().double().numpy() for p in layer.parameters()] for layer in layers]
    x = np.moveaxis((images.double().numpy() - mean) / encoder.observation_std.double().numpy(), -1, 1)
    for (weight, bias), stride, pad in zip(weights[:6:2], (4, 2, 1), (2, 1, 1)):
        x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], (2, 3))[:, :, ::stride, ::stride]
        x = np.maximum(np.einsum("nchwij,ocij->nohw", windows, weight) + bias[:, None, None], 0)
    linear, norm = weights[7:9]
    x = x.reshape(len(x), -1) @ linear[0].T + linear[1]
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    return np.tanh(x * norm[0] + norm[1])


def perceptron(net, x):
    """Return a ReLU network's output in float64, by numpy."""
    layers = [layer for layer in net if isinstance(layer, torch.nn.Linear)]
    for layer in layers:
        x = x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
        x = np.maximum(x, 0) if layer is not layers[-1] else x
    return x


def log_density(action, mean, std):
    """Return the log-density of tanh-normal distributions [B], by numpy; beyond 0.999 that of 0.999."""
    inside = action.clip(-0.999, 0.999)
    log_prob = -(((np.arctanh(inside) - mean) / std) ** 2) / 2 - np.log(std * np.sqrt(2 * np.pi) * (1 - inside**2))
    return log_prob.sum(-1)


def randomise(*networks, seed=11):
    """Make every parameter count: biases begin at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (parameter for network in networks for parameter in network.parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        for critic in (network for network in networks if isinstance(network, laeo.Critic)):
            critic.queue.copy_(torch.randn(critic.queue.shape, generator=generator))


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
    value = laeo.policy_value(phi, psi, torch.zeros(6), 10, objective)
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-12)


def test_weighted_policy_value_is_the_smaller_twins_normalised_mean_of_the_ratios():
    """Ratios above 10 count as 10; an action cannot gain by raising all logits, nor beyond the largest ratio."""
    generator = torch.Generator().manual_seed(2)
    phi = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    psi = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
    ratio = np.array([0.0, 1e-3, 0.5, 3.0, 9.9, 50.0])
    expected = np.zeros(4)
    for i in range(4):
        twins = []
        for k in range(2):
            e_f = np.exp([phi[k, i].numpy() @ psi[k, m].numpy() for m in range(6)])
            twins.append(np.sum(e_f / e_f.sum() * np.minimum(ratio, 10)))
        expected[i] = np.log(min(twins))
    with np.errstate(divide="ignore"):
        log_ratio = torch.from_numpy(np.log(ratio))
    value = laeo.policy_value(phi, psi, log_ratio, 10, "weighted")
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-12)
    psi = torch.cat([psi, torch.ones(2, 6, 1)], -1)
    for logit in (0.0, 30.0):
        higher = torch.cat([phi, torch.full((2, 4, 1), logit)], -1)
        np.testing.assert_allclose(laeo.policy_value(higher, psi, log_ratio, 10, "weighted"), expected, rtol=1e-9)
    assert laeo.policy_value(1e3 * phi, psi[..., :3], log_ratio, 10, "weighted").max() <= np.log(10) + 1e-12


def test_classifier_loss_is_least_where_the_logits_are_the_log_ratio_of_the_frequencies():
    """Four states, in the success examples and in the data as often as these numbers say."""
    p_star, p = np.array([0.5, 0.25, 0.25, 0.0]), np.array([0.125, 0.25, 0.5, 0.125])
    logits = torch.tensor([*np.log(p_star[:3] / p[:3]), -40.0], requires_grad=True)
    examples, data = np.repeat(np.arange(4), (8 * p_star).astype(int)), np.repeat(np.arange(4), (8 * p).astype(int))
    loss = laeo.classifier_loss(logits[examples], logits[data])
    expected = -(p_star @ np.log(p_star / (p_star + p) + 1e-300)) - (p @ np.log(p / (p_star + p)))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert logits.grad.abs().max() < 1e-7
    assert laeo.classifier_loss(torch.zeros(3), torch.zeros(5)).item() == pytest.approx(2 * np.log(2), rel=1e-6)


def gaussian_data(num_examples):
    """200 episodes of states from N(0, 1), with a number that never says anything, and examples from N(1, 0.5^2)."""
    rng = np.random.default_rng(0)
    data = traceable_dataset([49] * 200)._replace(observations=rng.normal(size=(200, 50, 2)).astype(np.float32))
    examples = np.stack([rng.normal(1, 0.5, num_examples), rng.normal(size=num_examples)], -1)
    return make_data(laeo, data, range(200)), torch.from_numpy(examples).float()


def fit_log_ratio(data, examples, seed=0, **flags):
    generator = torch.Generator().manual_seed(seed)
    encoder = laeo.Encoder(torch.zeros(2), torch.ones(2), laeo.Args(), generator)
    return laeo.fit_log_ratio(encoder, data, examples, laeo.Args(batch_size=256, **flags), generator)


def test_log_ratio_is_learned_from_examples_and_data():
    """Within 0.35 of the logarithm of N(x; 1, 0.25) / N(x; 0, 1) where both have samples; rows in the file's order."""
    data, examples = gaussian_data(2000)
    state = torch.get_rng_state()
    found = fit_log_ratio(data, examples, classifier_noise=0.0)
    assert torch.equal(torch.get_rng_state(), state) and found.shape == (10_000,) and found.dtype == np.float32
    x = data.observations[:, 0].numpy()
    exact = np.log(2) - (x - 1) ** 2 / 0.5 + x**2 / 2
    middle = (x > 0) & (x < 1.8) & (data.observations[:, 1].abs().numpy() < 1.5)
    assert np.abs(found - exact)[middle].mean() < 0.15 and np.quantile(np.abs(found - exact)[middle], 0.95) < 0.35
    assert np.array_equal(found, fit_log_ratio(data, examples, classifier_noise=0.0))
    assert not np.array_equal(found, fit_log_ratio(data, examples, seed=1, classifier_noise=0.0))


@pytest.mark.parametrize(
    ("size", "deviation", "noise", "variance"),
    [
        (2000, 0.5, 1.0, 0.25),  # the examples' own
        (2000, 0.5, 0.5, 0.0625),
        (2000, 2.0, 1.0, 1.0),  # no more than the data's
        (5, 0.2, 1.0, 0.04 + 1 / 25),  # and, for five examples, a fifth of the data's
        (1, 0.0, 1.0, 1.0),  # all of it for a single one
        (1, 0.0, 0.5, 0.25),
    ],
)
def test_log_ratio_is_of_states_with_noise_in_deviations_of_the_examples(size, deviation, noise, variance):
    """The examples' density is a mean of normal densities around each, of this variance; the data's is N(0, 1 + it)."""
    data, _ = gaussian_data(1)
    examples = np.random.default_rng(1).normal(size=(size, 2))
    examples = 0.7 + deviation * (examples - examples.mean(0)) / (examples.std(0) if size > 1 else 1)
    found = fit_log_ratio(data, torch.from_numpy(examples).float(), classifier_noise=noise)
    states = data.observations.numpy()[::5].astype(float)
    squares = np.square(states[:, None] - examples).sum(-1)
    exact = np.log(np.exp(-squares / (2 * variance)).mean(1) / variance)
    exact += np.square(states).sum(1) / (2 * (1 + variance)) + np.log(1 + variance)
    middle = (np.abs(states - 0.7) < (deviation**2 + variance) ** 0.5).all(1)
    error, tolerance = np.abs(found[::5] - exact)[middle], 0.15 if size > 5 else 0.3
    assert middle.sum() > 80 and error.mean() < tolerance and np.quantile(error, 0.95) < 2.5 * tolerance


def test_log_ratio_is_finite_for_an_example_far_from_all_data():
    data, _ = gaussian_data(1)
    assert np.isfinite(fit_log_ratio(data, torch.full((1, 2), 100.0))).all()


def test_log_ratio_is_to_the_datas_states_and_not_to_futures():
    """State t of an episode is t / 10. Examples as often from every t have the ratio 1, futures are mostly late."""
    states = np.stack([np.tile(np.arange(51) / 10, (200, 1)), np.zeros((200, 51))], -1).astype(np.float32)
    data = make_data(laeo, traceable_dataset([50] * 200)._replace(observations=states), range(200))
    futures = laeo.sample(data, laeo.Args(batch_size=10_000), 0).future
    assert (futures[:, 0] > 2.5).float().mean() > 0.7
    found = fit_log_ratio(data, torch.from_numpy(states[0, :50]), classifier_noise=0.1)
    assert np.abs(found.reshape(200, 51)[0, 2:48]).max() < 0.25


@pytest.mark.parametrize("objective", ["f", "exp_f"])
def test_exact_expectation_is_the_average_of_many_single_draws(objective):
    """The released code draws one success example per state: in expectation that is the same, and noisier."""
    generator = torch.Generator().manual_seed(3)
    phi = 0.5 * torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    psi = 0.5 * torch.randn(2, 8, 4, generator=generator, dtype=torch.float64)
    exact = laeo.policy_value(phi, psi, torch.zeros(8), 2, objective)
    draws = torch.randint(8, (20_000,), generator=generator)
    singles = torch.stack([laeo.policy_value(phi, psi[:, m : m + 1], torch.zeros(1), 2, objective) for m in range(8)])
    singles = singles[draws]
    standard_error = singles.std(0) / len(draws) ** 0.5
    assert (standard_error > 1e-4).all()
    assert ((singles.mean(0) - exact).abs() < 4 * standard_error).all()


def test_policy_loss_is_eq_8():
    value, log_prob, alike = torch.tensor([1.0, 3.0]), torch.tensor([-0.5, 0.1]), torch.full((2,), -0.7)
    assert laeo.policy_loss(value, log_prob, alike, 0.05).item() == pytest.approx(-0.95 * 2.0 + 0.05 * 0.2, rel=1e-6)
    assert laeo.policy_loss(value, log_prob, alike, 1.0).item() == pytest.approx(0.2, rel=1e-6)


def test_cloning_weighs_actions_by_their_q_values():
    """Weights 0.5, 2 and, instead of e^30, 10, divided by their mean."""
    log_prob, advantage = torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([np.log(0.5), np.log(2.0), 30.0])
    expected = (0.5 * 1 + 2 * 2 + 10 * 4) / (0.5 + 2 + 10)
    assert laeo.policy_loss(torch.zeros(3), log_prob, advantage, 1.0).item() == pytest.approx(expected, rel=1e-6)
    assert laeo.policy_loss(torch.ones(3), log_prob, advantage, 0.3).item() == pytest.approx(-0.7 + 0.3 * expected)


# ------------------------------------------------------------------------------------------ the policy's distribution


@pytest.mark.parametrize("script", [laeo, bc])
def test_log_prob_is_the_derivative_of_the_distribution_function(script):
    """P(a <= x) = Phi((atanh x - mean) / std): its finite difference in float64 is the density."""
    actor = make_actor(script)
    mean, std = torch.tensor([[0.3]], dtype=torch.float64), torch.tensor([[0.7]], dtype=torch.float64)

    def cdf(x):
        return torch.special.ndtr((torch.atanh(torch.tensor(x, dtype=torch.float64)) - 0.3) / 0.7).item()

    for x in (-0.998, -0.99, -0.5, 0.0, 0.3, 0.9, 0.998):
        density = (cdf(x + 1e-6) - cdf(x - 1e-6)) / 2e-6
        log_prob = actor.log_prob(mean, std, torch.tensor([[x]], dtype=torch.float64)).item()
        assert log_prob == pytest.approx(np.log(density), abs=1e-5)
    for edge in (-0.999, 0.999):  # and is constant beyond
        x = torch.tensor([[edge], [1.0005 * edge], [edge / 0.999]], dtype=torch.float64)
        log_prob = actor.log_prob(mean, std, x).numpy()
        assert log_prob[0] == log_prob[1] == log_prob[2]
        density = (cdf(edge + 1e-6) - cdf(edge - 1e-6)) / 2e-6
        assert log_prob[0] == pytest.approx(np.log(density), abs=1e-3)


@pytest.mark.parametrize("script", [laeo, bc])
def test_log_prob_adds_up_over_dimensions_and_integrates_to_one(script):
    actor = make_actor(script)
    mean, std = torch.tensor([[-1.5, 0.5]], dtype=torch.float64), torch.tensor([[0.4, 1.3]], dtype=torch.float64)
    x = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    x = (x[1:] + x[:-1]) / 2
    columns = []
    for dim in range(2):
        log_prob = actor.log_prob(mean[:, dim : dim + 1], std[:, dim : dim + 1], x[:, None])
        columns.append(log_prob)
        assert (log_prob.exp().mean() * 2).item() == pytest.approx(1.0, abs=1e-3)  # constant beyond 0.999
    both = actor.log_prob(mean, std, torch.stack([x[5000:5001], x[15000:15001]], -1))
    assert both.item() == pytest.approx((columns[0][5000] + columns[1][15000]).item(), rel=1e-12)


@pytest.mark.parametrize("script", [laeo, bc])
def test_log_prob_has_finite_gradients_for_saturated_actions(script):
    actor = make_actor(script)
    mean = torch.tensor([[-30.0, 30.0]], requires_grad=True)
    std = torch.tensor([[0.1, 0.1]], requires_grad=True)
    log_prob = actor.log_prob(mean, std, torch.tensor([[1.0, -1.0]]))
    log_prob.sum().backward()
    assert log_prob.isfinite().all() and mean.grad.isfinite().all() and std.grad.isfinite().all()
    assert mean.grad[0, 0] > 0 > mean.grad[0, 1]  # both pull the mean towards the action
    for broken in ((np.nan, 0.0), (0.0, np.nan)):  # what is not a number goes on to the training loop, which says so
        mean, action = (torch.full((1, 2), value) for value in broken)
        assert actor.log_prob(mean, torch.ones(1, 2), action).isnan().all()


@pytest.mark.parametrize("script", [laeo, bc])
def test_distribution_is_the_networks_mean_and_a_deviation_above_a_tenth(script):
    actor = make_actor(script)
    randomise(actor)
    x = np.random.default_rng(0).normal(size=(5, 6))
    output = perceptron(actor.net, x)
    mean, std = (x.detach().numpy() for x in actor.distribution(torch.from_numpy(x).float()))
    np.testing.assert_allclose(mean, output[:, :3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(std, np.log1p(np.exp(output[:, 3:])) + 0.1, rtol=1e-4)
    with torch.no_grad():
        actor.net[-1].weight.zero_()
        actor.net[-1].bias.copy_(torch.tensor([0.0, 0.0, 0.0, -50.0, 0.0, 50.0]))
        _, std = actor.distribution(torch.zeros(3, 6))
    torch.testing.assert_close(std, torch.tensor([[0.1, np.log(2) + 0.1, 50.1]]).float().expand(3, -1))


def test_played_actions_are_the_mode_within_the_bounds_and_exactly_these_at_saturation(script):
    """The mode is the maximum of the density, where a grid finds it."""
    actor = make_actor(script)
    randomise(actor)
    low, high = BOUNDS.numpy()
    x = np.random.default_rng(1).normal(size=(20, 6))
    output = perceptron(actor.net, x)
    mean, std, median = output[:, :3, None], np.logaddexp(0, output[:, 3:, None]) + 0.1, np.tanh(output[:, :3])
    assert std.min() < 0.4 and std.max() > 1
    density = lambda x: -(((x - mean) / std) ** 2) / 2 + 2 * np.log(np.cosh(x))  # noqa: E731
    grid = np.linspace(-10, 10, 100_001)
    mode = np.tanh(grid[density(grid).argmax(-1)])
    assert (np.abs(mode) > np.abs(median)).all() and np.abs(mode - median).max() > 0.1
    with torch.no_grad():
        played = 2 * (actor(torch.from_numpy(x).float()).double().numpy() - low) / (high - low) - 1
    found, best = (np.arctanh(a[..., None].clip(-1 + 1e-6, 1 - 1e-6)) for a in (played, mode))
    assert (density(best) - density(found)).max() < 1e-3
    mode = np.where(std[..., 0] ** 2 < 0.4, mode, played)  # near 0.5 many actions have nearly the largest density
    with torch.no_grad():
        actions = actor(torch.from_numpy(x).float()).numpy()
        np.testing.assert_allclose(actions, low + (mode + 1) / 2 * (high - low), rtol=1e-4, atol=1e-4)
        assert np.ptp(mode) > 1 and (actions >= low).all() and (actions <= high).all()
        actor.net[-1].weight.zero_()
        for sign, edge in ((-1, low), (1, high)):
            actor.net[-1].bias[:3] = sign * 50.0
            assert np.array_equal(actor(torch.zeros(1, 6))[0].numpy(), edge)


# -------------------------------------------------------------------------------------- what all scripts' networks are


def test_networks_are_glorot_uniform_and_draw_from_their_own_generator_alone(script):
    state = torch.get_rng_state()
    one, other, different = (script.mlp([30, 50, 70, 2], torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    linear = [layer for layer in one if isinstance(layer, torch.nn.Linear)]
    assert [type(layer).__name__ for layer in one] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert [tuple(layer.weight.shape) for layer in linear] == [(50, 30), (70, 50), (2, 70)]
    for layer in linear:
        limit = (6 / sum(layer.weight.shape)) ** 0.5
        assert 0.9 * limit < layer.weight.abs().max() <= limit and not layer.bias.any()
        assert layer.weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
    assert not torch.equal(one[0].weight, different[0].weight)
    one, other = (make_encoder(script, IMAGE, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


def test_networks_standardise_observations(script):
    mean, std = torch.tensor([5.0, -2.0]), torch.tensor([0.5, 10.0])
    one, other = (
        script.Actor(
            script.Encoder(*statistics, script.Args(), torch.Generator()),
            torch.tensor([[-1.0], [1.0]]),
            8,
            torch.Generator().manual_seed(0),
        )
        for statistics in ((mean, std), (torch.zeros(2), torch.ones(2)))
    )
    observation = torch.tensor([[5.5, 8.0]])
    assert torch.equal(one(observation), other(torch.tensor([[1.0, 1.0]])))
    assert torch.equal(one.encoder(observation), torch.tensor([[1.0, 1.0]])) and one.encoder.dim == 2
    assert {"encoder.observation_mean", "encoder.observation_std", "action_bounds"} <= set(one.state_dict())
    mean += 1
    std += 1
    assert torch.equal(one(observation), other(torch.tensor([[1.0, 1.0]])))  # the network has numbers of its own


@pytest.mark.parametrize("height, width", [(8, 8), (64, 84)])
def test_encoder_is_convolutions_and_a_normalised_linear_layer_on_standardised_images(script, height, width):
    """Three convolutions, one layer to 8 * channels features, layer normalisation, tanh; against numpy in float64."""
    encoder = make_encoder(script, (height, width, 2), channels=5)
    layers = ["Conv2d", "ReLU"] * 3 + ["Flatten", "Linear", "LayerNorm", "Tanh"]
    assert [type(layer).__name__ for layer in encoder.net] == layers
    flat = {(8, 8): 1, (64, 84): 8 * 10}[height, width]
    shapes = [(5, 2, 8, 8), (10, 5, 4, 4), (10, 10, 3, 3), (40, 10 * flat)]
    assert [tuple(layer.weight.shape) for layer in (*encoder.net[:6:2], encoder.net[7])] == shapes
    for layer in (*encoder.net[:6:2], encoder.net[7]):
        assert not layer.bias.any()
        fan_in, fan_out = (layer.weight[0, 0].numel() * size for size in layer.weight.shape[1::-1])
        assert 0.9 < layer.weight.abs().max() / (6 / (fan_in + fan_out)) ** 0.5 <= 1
    assert (encoder.net[8].weight == 1).all() and not encoder.net[8].bias.any()
    images = torch.randint(0, 256, (3, height, width, 2), dtype=torch.uint8)
    for _ in range(2):
        features = encoder(images).detach().numpy()
        np.testing.assert_allclose(features, encoded(encoder, images), rtol=1e-3, atol=1e-4)
        assert features.shape == (3, encoder.dim) == (3, 40) and 0.1 < np.abs(features).max() < 1
        randomise(encoder)  # the second time every parameter counts


@pytest.mark.parametrize("shape", [(6,), IMAGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_standardising_changes_no_observation_and_no_statistic(script, shape, dtype):
    """It is done in place, in memory of its own: as (x - mean) / std in float64, to float32's precision."""
    encoder, generator = make_encoder(script, shape), torch.Generator().manual_seed(2)
    encoder.net = torch.nn.Identity()
    encoder.observation_mean.copy_(200 * torch.rand(shape, generator=generator))
    encoder.observation_std.copy_(1 + 50 * torch.rand(shape, generator=generator))
    statistics = [x.clone() for x in encoder.buffers()]
    observation = (256 * torch.rand(9, *shape, generator=generator)).to(dtype)
    before = observation.clone()
    with torch.inference_mode():
        features = encoder(observation)
    expected = (before.double().numpy() - statistics[0].double().numpy()) / statistics[1].double().numpy()
    expected = np.moveaxis(expected, -1, 1) if len(shape) == 3 else expected
    assert features.dtype == torch.float32 and np.abs(expected).max() > 3
    np.testing.assert_allclose(features.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(observation, before) and observation.dtype == dtype
    assert all(map(torch.equal, encoder.buffers(), statistics))


def test_images_are_standardised_first_and_then_shifted(script):
    """To the bit what numpy's padding and cutting make of the standardised images."""
    encoder = make_encoder(script, IMAGE, random_shift=2)
    images = torch.randint(0, 256, (25, *IMAGE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([(row, column) for row in range(5) for column in range(5)])
    encoder.net = torch.nn.Identity()
    expected = shift_with_numpy(images, encoder.observation_mean, encoder.observation_std, shift, 2)
    assert np.array_equal(encoder(images, shift).numpy(), expected)
    assert torch.equal(encoder(images, torch.full((25, 2), 2)), encoder(images))  # the middle


def test_what_never_moves_is_exactly_zero_wherever_an_image_is_shifted(script):
    encoder = make_encoder(script, IMAGE, random_shift=3)
    encoder.net = torch.nn.Identity()
    images = torch.randint(0, 256, IMAGE, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    encoder.observation_mean.copy_(images)
    shift = torch.tensor([(row, column) for row in range(7) for column in range(7)])
    assert not encoder(images.expand(49, *IMAGE), shift).any()


def test_twin_critics_take_features_and_scaled_actions():
    """Beside the features of an image, actions weigh as much as all of these; beside a state's numbers as one."""
    rng = np.random.default_rng(0)
    for shape, scale in (((6,), 1.0), (IMAGE, (32 / 3) ** 0.5)):
        _, critic = make_networks(shape)
        randomise(critic)
        assert len(critic.phi_nets) == len(critic.psi_nets) == 2
        dim = critic.encoder.dim
        assert dim == (6 if shape == (6,) else 8 * 4)
        features, action = rng.normal(size=(5, dim)), rng.uniform(-1, 1, (5, 3))
        phi = critic.phi(torch.from_numpy(features).float(), torch.from_numpy(action).float()).detach().numpy()
        psi = critic.psi(torch.from_numpy(features).float()).detach().numpy()
        for k in range(2):
            expected = perceptron(critic.phi_nets[k], np.concatenate([features, scale * action], 1))
            np.testing.assert_allclose(phi[k], expected, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(psi[k], perceptron(critic.psi_nets[k], features), rtol=1e-3, atol=1e-4)
        assert phi.shape == psi.shape == (2, 5, 8) and not np.allclose(phi[0], phi[1])


# ----------------------------------------------------------------------------------------------------------- batches


def batch_equal(one, other):
    flat = [[x for field in batch for x in (field if isinstance(field, list) else [field])] for batch in (one, other)]
    return all(torch.equal(a, b) for a, b in zip(*flat) if a is not None)


def test_batch_depends_on_seed_stream_and_step_alone(script):
    data = make_data(script, image_dataset([6, 9, 4, 8]), [3, 0, 2], [1])
    args = script.Args(batch_size=64, random_shift=2, seed=7)
    batch, state = script.sample(data, args, 5), torch.get_rng_state()
    for step, use in ((4, "batches"), (5, "heldout"), (0, "train")):
        script.sample(data, args, step, use)
    torch.manual_seed(123)
    assert batch_equal(script.sample(data, args, 5), batch)
    assert not batch_equal(script.sample(data, args, 6), batch)
    assert not batch_equal(script.sample(data, script.Args(batch_size=64, random_shift=2, seed=8), 5), batch)
    torch.set_rng_state(state)
    for use, stream in (("batches", "batches"), ("train", "metrics"), ("heldout", "metrics")):
        transitions, batch = getattr(data, use), script.sample(data, args, 5, use)
        i = np.random.default_rng(common.seed_sequence(7, stream, 5)).integers(len(transitions.row), size=64)
        assert np.array_equal(batch.action.numpy(), transitions.action[i])
        assert torch.equal(batch.observation, data.observations[transitions.row[i]])
        assert batch.observation.dtype == torch.uint8 and batch.action.dtype == torch.float32


def test_each_use_has_its_own_episodes(script):
    data = make_data(script, traceable_dataset([2, 5, 3, 4]), [2, 0, 1], [3])
    args, lengths = script.Args(batch_size=500), [2, 5, 3, 4]
    for use, episodes in (("batches", (2, 0, 1)), ("train", (2,)), ("heldout", (3,))):
        batch = script.sample(data, args, 1, use)
        found = {tuple(x) for x in batch.observation.int().tolist()}
        assert found == {(e, t) for e in episodes for t in range(lengths[e])}


def test_each_state_keeps_its_own_action_and_padding_is_never_sampled(script):
    lengths = [2, 5, 3]
    dataset = traceable_dataset(lengths)
    for episode, length in enumerate(lengths):
        dataset.observations[episode, length + 1 :] = 1e9
        dataset.actions[episode, length:] = 9.9
    batch = script.sample(make_data(script, dataset, [2, 0, 1]), script.Args(batch_size=5000), 0)
    episode, t = batch.observation.long().unbind(-1)
    assert np.array_equal((10 * batch.action).numpy().round(3), dataset.actions[episode, t].round(3))
    pairs, counts = batch.observation.unique(dim=0, return_counts=True)
    assert {tuple(x) for x in pairs.int().tolist()} == {(e, t) for e, n in enumerate(lengths) for t in range(n)}
    expected = 5000 / 10  # each of the 2 + 5 + 3 transitions equally often
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(statistic - 9) < 4 * np.sqrt(2 * 9)
    for states in [x for x in batch if torch.is_tensor(x) and x.shape == batch.observation.shape]:
        assert states.max() < 10


@pytest.mark.parametrize("script", [laeo, oril, purl])
def test_noise_is_standard_normal_and_independent(script):
    data = make_data(script, traceable_dataset([20] * 4)._replace(actions=np.zeros((4, 20, 3), np.float32)), range(4))
    noise = script.sample(data, script.Args(batch_size=40_000), 0).noise
    assert noise.shape == (40_000, 3) and noise.dtype == torch.float32
    torch.testing.assert_close(noise.T.cov(), torch.eye(3), atol=0.03, rtol=0)
    assert noise.mean(0).abs().max() < 0.02 and 3.5 < noise.abs().max() < 6.5


def shifts_of(batch):
    """Return the shifts of observations, of what follows them, and of success examples, where a method has these."""
    if isinstance(batch, laeo.Batch):  # whose states and futures are encoded in one pass
        both, examples = batch.shifts
        return [None, None, examples] if both is None else [*both.split(len(batch.action)), examples]
    return batch.shifts if hasattr(batch, "shifts") else [batch.shift]


def test_shifts_are_uniform_and_drawn_for_each_image(script):
    """Of observations, of what follows them and of success examples; with a chi-square test for each of these."""
    args = script.Args(batch_size=4000, random_shift=2, **({} if script is bc else {"num_success": 900}))
    data = make_data(script, image_dataset([3, 2]), [0, 1])
    shifts = shifts_of(script.sample(data, args, 3))
    assert [x.shape for x in shifts] == [(n, 2) for n in ([4000] if script in (bc, tailo) else [4000, 4000, 900])]
    for shift in shifts:
        assert shift.min() == 0 and shift.max() == 4
        counts = np.bincount(5 * shift[:, 0] + shift[:, 1], minlength=25)
        statistic = ((counts - len(shift) / 25) ** 2 / (len(shift) / 25)).sum()
        assert abs(statistic - 24) < 4 * np.sqrt(2 * 24)
    for one, other in zip(shifts[:1], shifts[1:2]):
        assert 0.02 < (one == other).all(-1).float().mean() < 0.06  # 1/25: one has nothing to do with the other


@pytest.mark.parametrize("given", [{}, {"random_shift": 0}])
def test_zero_shift_is_none(script, given):
    data = make_data(script, image_dataset([3, 2]), [0, 1])
    batch = script.sample(data, script.Args(batch_size=4, **given), 3)
    shifts = shifts_of(batch)
    assert len(shifts) == (1 if script in (bc, tailo) else 3) and all(shift is None for shift in shifts)
    assert script in (bc, tailo) or len(batch.shifts) == (2 if script is laeo else 3)


@pytest.mark.parametrize("script", [laeo, oril, purl])
def test_all_success_examples_are_used_if_they_fit_in_a_batch_and_a_batch_of_them_else(script):
    """In order in the one case; in the other without replacement, all of them alike, by seed and step alone."""
    data = make_data(script, image_dataset([6, 9, 4, 8]), [3, 0, 2], [1])
    for num_success, size in ((5, 8), (8, 8), (1, 2)):
        for step in (0, 7):
            batch = script.sample(data, script.Args(batch_size=size, num_success=num_success, random_shift=2), step)
            assert batch.chosen.tolist() == list(range(num_success))
            assert batch.chosen.dtype == torch.int64 and shifts_of(batch)[-1].shape == (num_success, 2)
    args, counts, firsts = script.Args(batch_size=8, num_success=20, random_shift=2, seed=3), np.zeros(20), set()
    for step in range(500):
        batch = script.sample(data, args, step)
        assert len(set(batch.chosen.tolist())) == len(batch.chosen) == 8 == len(shifts_of(batch)[-1])
        counts[batch.chosen.numpy()] += 1  # and no other index is possible
        firsts.add(int(batch.chosen[0]))
    expected, variance = 500 * 8 / 20, 500 * 0.4 * 0.6
    assert firsts == set(range(20)) and np.abs(counts - expected).max() < 4 * np.sqrt(variance)
    again = script.sample(data, script.Args(batch_size=8, num_success=20, random_shift=2, seed=3, discount=0.5), 499)
    assert torch.equal(again.chosen, batch.chosen)
    other = script.sample(data, script.Args(batch_size=8, num_success=20, random_shift=2, seed=4), 499)
    assert not torch.equal(other.chosen, batch.chosen)
    assert not torch.equal(script.sample(data, args, 498).chosen, batch.chosen)
    few = script.sample(data, script.Args(batch_size=8, num_success=6, random_shift=2, seed=3), 499)
    for name in ("observation", "action", "noise"):  # of which the number of examples changes nothing
        assert torch.equal(getattr(few, name), getattr(batch, name))


def test_future_states_have_the_truncated_geometric_distribution():
    """Chi-square test of the joint distribution of transition and offset, on episodes of different length."""
    lengths, discount, draws = [1, 3, 8], 0.7, 200_000
    data = make_data(laeo, traceable_dataset(lengths), range(3))
    batch = laeo.sample(data, laeo.Args(batch_size=draws, discount=discount), 0)
    episode, t = batch.observation.long().unbind(-1)
    future_episode, future_t = batch.future.long().unbind(-1)
    assert torch.equal(episode, future_episode)
    assert (future_t > t).all() and (future_t <= torch.tensor(lengths)[episode]).all()
    statistic = cells = 0
    for e, length in enumerate(lengths):
        for start in range(length):
            weights = discount ** np.arange(length - start)
            expected = draws / sum(lengths) * weights / weights.sum()
            for k, count in enumerate(expected):
                observed = ((episode == e) & (t == start) & (future_t == start + 1 + k)).sum().item()
                statistic += (observed - count) ** 2 / count
                cells += 1
    freedom = cells - 1
    assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)


class Fixed:
    """A generator whose uniform numbers are all the same."""

    def __init__(self, rng, value):
        self.rng, self.value = rng, value

    def __getattr__(self, name):
        return getattr(self.rng, name)

    def random(self, size):
        return np.full(size, self.value)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_rounding_never_crosses_an_episodes_end(uniform, monkeypatch):
    """The smallest and the largest uniform number below one, and a discount near one, are the worst cases."""
    data, default_rng = make_data(laeo, traceable_dataset([50]), [0]), np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: Fixed(default_rng(seed), uniform))
    for discount in (1e-6, 0.5, 0.9, 0.99, 1 - 1e-6):
        batch = laeo.sample(data, laeo.Args(batch_size=1000, discount=discount), 0)
        offset = batch.future[:, 1] - batch.observation[:, 1]
        assert (offset >= 1).all() and (batch.future[:, 1] <= 50).all() and (batch.future[:, 0] == 0).all()
        if uniform == 0:
            assert (offset == 1).all()
        elif discount > 0.9:
            assert (batch.future[:, 1] >= 49).all()  # the last one, but for rounding


# ----------------------------------------------------------------------------------------------------- gradient step


CHOSEN = torch.tensor([4, 0, 8, 2, 6, 5, 1])  # of nine success examples


def make_batch(shape=(6,), size=16, random_shift=0):
    generator = torch.Generator().manual_seed(5)
    action = torch.rand(size, 3, generator=generator) * 2 - 1
    action[0, 0], action[1, 1] = 1, -1  # saturated
    if len(shape) == 1:
        states = [torch.randn(n, *shape, generator=generator) for n in (size, size, 9)]
    else:
        states = [torch.randint(256, (n, *shape), generator=generator, dtype=torch.uint8) for n in (size, size, 9)]
    noise = torch.randn(size, 3, generator=generator)
    shifts = [torch.randint(2 * random_shift + 1, (n, 2), generator=generator) for n in (2 * size, len(CHOSEN))]
    log_ratio = torch.randn(size, generator=generator)
    shifts = shifts if random_shift else [None] * 2
    return laeo.Batch(states[0], action, states[1], log_ratio, noise, CHOSEN, shifts), states[2]


def near_examples(queue, psi, share=0.2):
    """Whether each state of the queue [2, N, R] is in the share nearest to the examples' psi [2, M, R], in float64."""
    queue, psi = (np.asarray(x.detach(), np.float64) for x in (queue, psi))
    distance = [min(np.square(queue[:, [i]] - psi).sum((0, 2))) for i in range(queue.shape[1])]
    return np.argsort(np.argsort(distance)) < round(share * len(distance))


def losses_of(batch, examples, actor, critic, objective, bc_coef, pad, detached=True):
    """Return the critic's loss and the policy's, from images shifted by numpy, each encoded by itself.

    The policy's value is a function of its action; with `detached` False of the state's features as well.
    """
    shift, future_shift, examples_shift = shifts_of(batch)
    features, future, positive = (
        features_of(critic.encoder, x, s, pad)
        for x, s in ((batch.observation, shift), (batch.future, future_shift), (examples[CHOSEN], examples_shift))
    )
    of_critic = laeo.critic_loss(critic.phi(features, batch.action), critic.psi(future))
    mean, std = actor.net(features_of(actor.encoder, batch.observation, shift, pad)).chunk(2, -1)
    std = torch.nn.functional.softplus(std) + 0.1
    phi = critic.phi(features.detach() if detached else features, torch.tanh(mean + std * batch.noise))
    psi, log_ratio = critic.psi(future if objective == "weighted" else positive).detach(), batch.log_ratio
    if objective == "nearest":
        log_ratio = torch.from_numpy(np.where(near_examples(critic.queue, psi), 0, -np.inf).astype(np.float32))
        psi = critic.queue
    value = laeo.policy_value(phi, psi, log_ratio, len(batch.action), objective)
    log_prob, weight = actor.log_prob(mean, std, batch.action), torch.ones(len(value))
    if objective == "weighted":
        of_data = laeo.policy_value(critic.phi(features, batch.action), psi, batch.log_ratio, 2, objective)
        weight = (of_data - value).detach().exp()
        assert 0.01 < weight.min() < weight.max() < 10
    return of_critic, -(1 - bc_coef) * value.mean() - bc_coef * (weight / weight.sum() * log_prob).sum()


@pytest.mark.parametrize(
    "objective, shape, random_shift",
    [
        *((objective, (6,), 0) for objective in ("weighted", "nearest", "f", "exp_f", "log_exp_f")),
        *((objective, IMAGE, shift) for objective in ("weighted", "nearest", "log_exp_f") for shift in (0, 2)),
    ],
)
def test_each_loss_reaches_only_its_own_network(objective, shape, random_shift):
    """Actor and critic go along their own loss's gradient, the encoder that they share along the sum of both.

    From the parameters before the step; nothing adds up over steps, though all of it is one backward pass.
    """
    actor, critic = make_networks(shape, random_shift=random_shift)
    randomise(actor.net, critic)
    batch, examples = make_batch(shape, random_shift=random_shift)
    args = laeo.Args(policy_objective=objective, bc_coef=0.3, random_shift=random_shift)
    parameters = parameters_of(actor, critic)
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    for _ in range(2):
        of_critic, of_actor = losses_of(batch, examples, actor, critic, objective, 0.3, random_shift)
        gradients = add_gradients((of_critic, list(critic.parameters())), (of_actor, list(actor.parameters())))
        before = [parameter.detach().clone() for parameter in parameters]
        laeo.update(batch, examples, actor, critic, optimizer, args)
        assert set(gradients) == set(parameters) and all(parameter.requires_grad for parameter in parameters)
        for parameter, old in zip(parameters, before):
            gradient = gradients[parameter]
            assert gradient.abs().sum() > 0
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(parameter.detach(), old - 1e-3 * gradient)


@pytest.mark.parametrize("objective", ["weighted", "nearest", "log_exp_f"])
@pytest.mark.parametrize("bc_coef", [0.0, 1.0])
def test_value_and_cloning_reach_the_encoder_through_the_action_alone(objective, bc_coef, monkeypatch):
    """And no layer of the critic: with a critic's loss of zero these have no gradient, whatever the policy's is."""
    actor, critic = make_networks(IMAGE, random_shift=2)
    randomise(actor.net, critic)
    batch, examples = make_batch(IMAGE, random_shift=2)
    losses = (
        losses_of(batch, examples, actor, critic, objective, bc_coef, 2, detached)[1] for detached in (True, False)
    )
    own, encoder = list(actor.net.parameters()), list(actor.encoder.parameters())
    expected, through_features = (torch.autograd.grad(loss, own + encoder) for loss in losses)
    monkeypatch.setattr(laeo, "critic_loss", lambda phi, psi: 0 * (phi.sum() + psi.sum()))
    args = laeo.Args(policy_objective=objective, bc_coef=bc_coef, random_shift=2)
    laeo.update(batch, examples, actor, critic, torch.optim.SGD(parameters_of(actor, critic), 0.0), args)
    assert not any(p.grad.any() for net in (*critic.phi_nets, *critic.psi_nets) for p in net.parameters())
    assert actor.encoder is critic.encoder and len(encoder) == 10
    for parameter, gradient in zip(own + encoder, expected):
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    ways = [torch.allclose(a, b, rtol=0.05) for a, b in zip(expected[len(own) :], through_features[len(own) :])]
    assert not any(ways) if bc_coef == 0 else all(ways)  # cloning has no value


def watch_shifts(script, monkeypatch):
    """Return {image: how it is shifted at each time that it is encoded}, which is filled from now on."""
    seen, forward = {}, script.Encoder.forward

    def encode(encoder, observation, shift=None):
        assert len(shift) == len(observation)
        for image, way in zip(observation, shift):
            seen.setdefault(image.numpy().tobytes(), []).append(tuple(way.tolist()))
        return forward(encoder, observation, shift)

    monkeypatch.setattr(script.Encoder, "forward", encode)
    return seen


def test_a_state_is_shifted_alike_for_both_networks_and_its_future_in_another_way(monkeypatch):
    """Each is encoded once, with the batch's shifts, and so is each of the chosen examples; the others are not."""
    (batch, examples), seen = make_batch(IMAGE, random_shift=2), watch_shifts(laeo, monkeypatch)
    actor, critic = make_networks(IMAGE, random_shift=2)
    args = laeo.Args(policy_objective="log_exp_f", random_shift=2)
    laeo.update(batch, examples, actor, critic, torch.optim.SGD(parameters_of(actor, critic), 0.0), args)
    images = [*batch.observation, *batch.future, *examples[[4, 0, 8, 2, 6, 5, 1]]]
    expected = [tuple(way) for shift in batch.shifts for way in shift.tolist()]
    assert seen == {image.numpy().tobytes(): [way] for image, way in zip(images, expected)}
    assert len(seen) == 16 + 16 + 7 and sum(a != b for a, b in zip(expected[:16], expected[16:32])) > 12


def test_nearest_states_are_a_share_of_the_queue():
    """Two states near the two examples, in both representations together, of twenty; the share has at least one."""
    queue = torch.arange(20.0)[None, :, None] * torch.tensor([1.0, -1.0])[:, None, None] * torch.ones(3)
    examples = torch.stack([1.05 * queue[:, 4], 0.99 * queue[:, 13]], 1)
    for share, expected in ((0.1, {4, 13}), (0.0, {13}), (0.15, {4, 5, 13}), (1.0, set(range(20)))):
        args = laeo.Args(policy_objective="nearest", nearest_share=share)
        psi, log_ratio = laeo.value_states(examples, torch.randn(7), queue, args)
        assert psi is queue and set(log_ratio.isfinite().nonzero().flatten().tolist()) == expected
        assert set(log_ratio.tolist()) <= {0.0, -np.inf}
    given = torch.randn(7)
    assert laeo.value_states(examples, given, queue, laeo.Args(policy_objective="log_exp_f")) == (examples, given)


@pytest.mark.parametrize("objective", ["nearest", "log_exp_f"])
def test_queue_has_the_last_futures_and_no_state_meets_its_own(objective, monkeypatch):
    """The value of a step is made from the queue before it; then psi of the batch's futures, shifted, is appended."""
    actor, critic = make_networks(IMAGE, random_shift=2)
    seen, states = [], laeo.value_states
    monkeypatch.setattr(laeo, "value_states", lambda *given: seen.append(given[2].clone()) or states(*given))
    monkeypatch.setattr(laeo, "QUEUE", 40)
    critic.queue = torch.zeros(2, 40, critic.queue.shape[2])
    (batch, examples), args = make_batch(IMAGE, random_shift=2), laeo.Args(policy_objective=objective, random_shift=2)
    queue, optimizer = critic.queue, torch.optim.SGD(parameters_of(actor, critic), 1e-2)
    for _ in range(4):
        psi = critic.psi(features_of(critic.encoder, batch.future, shifts_of(batch)[1], 2)).detach()
        laeo.update(batch, examples, actor, critic, optimizer, args)
        assert torch.equal(seen.pop(), queue) and critic.queue.is_contiguous() and not critic.queue.requires_grad
        queue = torch.cat([queue, psi], 1)[:, -40:] if objective == "nearest" else queue
        torch.testing.assert_close(critic.queue, queue, rtol=1e-4, atol=1e-5)
        queue = critic.queue


@pytest.mark.parametrize("shape", [(6,), IMAGE])
def test_update_moves_both_networks_and_no_buffer(shape):
    actor, critic = make_networks(shape)
    batch, examples = make_batch(shape)
    before = {k: v.clone() for k, v in [*actor.state_dict().items(), *critic.state_dict().items()]}
    optimizer = torch.optim.Adam(parameters_of(actor, critic), 1e-3)
    laeo.update(batch, examples, actor, critic, optimizer, laeo.Args(bc_coef=0.2))
    for name, value in [*actor.state_dict().items(), *critic.state_dict().items()]:
        buffer = "observation" in name or "bounds" in name or "queue" in name
        assert torch.equal(value, before[name]) == buffer, name


@pytest.mark.parametrize("objective", ["weighted", "nearest", "f", "exp_f", "log_exp_f"])
@pytest.mark.parametrize("shape, random_shift", [((6,), 0), (IMAGE, 2)])
def test_measure_against_an_independent_computation(objective, shape, random_shift):
    """All metrics in float64, by numpy; those of images are measured without the random shift."""
    actor, critic = make_networks(shape, random_shift=random_shift)
    randomise(actor.net, critic)
    batch, examples = make_batch(shape, random_shift=random_shift)
    metrics = laeo.measure(batch, examples, actor, critic, laeo.Args(batch_size=16, policy_objective=objective))
    features, future, positive, own = (
        net(x).detach().double().numpy()
        for net, x in (
            (critic.encoder, batch.observation),
            (critic.encoder, batch.future),
            (critic.encoder, examples),
            (actor.encoder, batch.observation),
        )
    )

    def phi(action):
        x = np.concatenate([features, critic.action_scale * action], 1)
        return np.stack([perceptron(net, x) for net in critic.phi_nets])

    psi, psi_examples = (np.stack([perceptron(net, x) for net in critic.psi_nets]) for x in (future, positive))
    action = batch.action.double().numpy()
    logits = np.einsum("kir,kjr->kij", phi(action), psi)
    diagonal = np.eye(16, dtype=bool)
    expected = {"critic_loss": np.logaddexp(0, np.where(diagonal, -logits, logits)).mean()}
    expected["categorical_accuracy"] = (logits.argmax(-1) == np.arange(16)).mean()
    expected["logits_positive"] = logits[:, diagonal].mean()
    expected["logits_negative"] = logits[:, ~diagonal].mean()
    mean, std = np.split(perceptron(actor.net, own), 2, axis=1)
    std, played = np.logaddexp(0, std) + 0.1, np.tanh(mean)
    for _ in range(20):
        played = np.tanh(mean + 2 * std**2 * played)
    expected["bc_loss"] = -log_density(action, mean, std).mean()
    expected["policy_std"] = std.mean()
    for name, actions in (("value_data", action), ("value_policy", played)):
        f = np.einsum("kir,kjr->kij", phi(actions), psi_examples).min(0) + np.log(15)
        averages = {"f": f.mean(-1), "exp_f": np.exp(f).mean(-1), "log_exp_f": np.log(np.exp(f).mean(-1))}
        e_f = np.exp(np.einsum("kir,kjr->kij", phi(actions), psi))
        means = (e_f * np.exp(batch.log_ratio.double().numpy()).clip(max=10)).sum(-1) / e_f.sum(-1)
        averages["weighted"] = np.log(means.min(0))
        e_f = np.exp(np.einsum("kir,kjr->kij", phi(actions), critic.queue.double().numpy()))
        near = near_examples(critic.queue, torch.from_numpy(psi_examples))
        averages["nearest"] = np.log((e_f[..., near].sum(-1) / e_f.sum(-1)).min(0))
        expected[name] = averages[objective].mean()
    assert 0 < expected["categorical_accuracy"] < 1
    assert expected["categorical_accuracy"] != (logits.argmax(1) == np.arange(16)).mean()
    assert metrics == pytest.approx(expected, rel=1e-3) and all(type(x) is float for x in metrics.values())


# ------------------------------------------------------------------------------------------------------ training loop


class Stopped(Exception):
    """The training loop has done all its steps."""


def save_small_dataset(path, shape, integer):
    rng = np.random.default_rng(0)
    make = (lambda n: rng.integers(0, 256, (n, *shape))) if integer else (lambda n: rng.normal(size=(n, *shape)))
    actions = [rng.uniform(-2, 2, (5, 3)) for _ in range(4)]
    common.save_dataset(path, [make(6) for _ in range(4)], actions, make(3))


def follow_training(script, tmp_path, monkeypatch, shape=(3,), gradient_steps=4, **flags):
    """Return what `update` is called with at each step, and the learning rates of that moment, without any update."""
    save_small_dataset(tmp_path / "data", shape, integer=len(shape) == 3)
    calls = []

    def update(*arguments):
        optimizer = next(x for x in arguments if isinstance(x, torch.optim.Optimizer))
        calls.append((arguments, [group["lr"] for group in optimizer.param_groups]))
        if len(calls) == gradient_steps:
            raise Stopped

    monkeypatch.setattr(script, "update", update)
    flags |= {"hidden_dim": 8, "batch_size": 4, "gradient_steps": gradient_steps, "eval_episodes": 0, "device": "cpu"}
    flags |= {} if script is bc else {"num_success": 2}
    flags |= {"classifier_steps": 3} if script is tailo else {}
    with pytest.raises(Stopped):
        script.train(script.Args(env_id="Own", dataset=tmp_path / "data", run_dir=tmp_path / "run", **flags))
    return calls


def test_learning_rates_fall_linearly_to_zero(script, tmp_path, monkeypatch):
    rates = {"learning_rate": 0.01} | ({"reward_learning_rate": 0.3} if script in (oril, purl) else {})
    calls = follow_training(script, tmp_path, monkeypatch, **rates)
    for step, (_, found) in enumerate(calls):
        assert found == pytest.approx([rate * (1 - step / 4) for rate in rates.values()], rel=1e-12)


@pytest.mark.parametrize("shape", [(3,), (8, 8, 1)])
def test_training_takes_the_batches_of_its_steps_and_adam(script, shape, tmp_path, monkeypatch):
    ratios, name, field = [], *(("fit_weights", "weight") if script is tailo else ("fit_log_ratio", "log_ratio"))
    fit = getattr(script, name, None)
    monkeypatch.setattr(script, name, lambda *given: ratios.append(fit(*given)) or ratios[0], raising=False)
    calls = follow_training(script, tmp_path, monkeypatch, shape, seed=3)
    args = script.Args(env_id="Own", dataset=tmp_path / "data", eval_episodes=0, batch_size=4, seed=3)
    args = args if script is bc else script.replace(args, num_success=2)
    args = script.replace(args, classifier_steps=3) if script is tailo else args
    dataset, data, mean, std, *examples = script.load_data(args, CPU)
    assert len(ratios) == (script is tailo or (script is laeo and shape == (3,)))
    if ratios:
        assert not getattr(data, field).any() and ratios[0].any()
        data = data._replace(**{field: ratios[0]})
    for step, ((batch, *arguments), _) in enumerate(calls):
        assert batch_equal(batch, script.sample(data, args, step))
        if examples and script is not tailo:  # whose policy is shown none
            assert torch.equal(arguments[0], examples[0])
    optimizer = next(x for x in arguments if isinstance(x, torch.optim.Optimizer))
    assert type(optimizer) is torch.optim.Adam and optimizer.defaults["eps"] == 1e-7
    networks = [x for x in arguments if isinstance(x, torch.nn.Module)]
    learned = {id(p) for network in networks for p in network.parameters() if p.requires_grad}
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert sorted(sum(groups, [])) == sorted(learned) and len(groups) == (2 if script in (oril, purl) else 1)
    parts = [part for network in networks for part in network.modules()]
    actor, critic = ([part for part in parts if isinstance(part, getattr(script, name, ()))] for name in NETWORKS)
    assert all(one.encoder is actor[0].encoder for one in [*actor[:1], *critic[:1]])  # those of the targets follow
    assert script in (bc, tailo) or len(actor) == len(critic) == (1 if script is laeo else 2)
    if len(groups) == 2:
        assert set(groups[1]) == {id(p) for p in networks[0].reward.parameters()}
    for network in networks:
        for encoder in (x for x in network.modules() if isinstance(x, script.Encoder)):
            assert torch.equal(encoder.observation_mean, mean) and torch.equal(encoder.observation_std, std)
    buffers = [value for network in networks for name, value in network.named_buffers() if "bounds" in name]
    assert buffers and all(np.array_equal(value, dataset.action_bounds) for value in buffers)


def test_weighted_objective_is_refused_for_images(tmp_path):
    save_small_dataset(tmp_path / "data", (8, 8, 1), integer=True)
    flags = {"dataset": tmp_path / "data", "run_dir": tmp_path / "run", "eval_episodes": 0, "num_success": 2}
    with pytest.raises(common.UserError, match="^--policy-objective weighted is for states, and these are images; "):
        laeo.train(laeo.Args(env_id="Own", policy_objective="weighted", device="cpu", **flags))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "shape, few, given, expected",
    [
        ((3,), 2, "auto", "weighted"),
        ((3,), 3, "auto", "weighted"),
        ((8, 8, 1), 2, "auto", "log_exp_f"),
        ((8, 8, 1), 3, "auto", "nearest"),
        ((3,), 3, "f", "f"),
        ((8, 8, 1), 3, "log_exp_f", "log_exp_f"),
        ((8, 8, 1), 2, "nearest", "nearest"),
    ],
)
def test_default_objective_depends_on_images_and_examples(shape, few, given, expected, tmp_path, monkeypatch):
    """There are two examples."""
    monkeypatch.setattr(laeo, "FEW", few)
    (((batch, *_, args), _),) = follow_training(
        laeo, tmp_path, monkeypatch, shape, gradient_steps=1, policy_objective=given
    )
    assert args.policy_objective == expected
    assert bool(batch.log_ratio.any()) == (expected == "weighted")  # and learned only where it is needed


def test_statistics_are_those_of_the_training_episodes_without_padding(script, tmp_path):
    """A deviation of each number of a state, at least 0.001, and one deviation of all numbers of an image."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 12)
    for shape, integer in (((3,), False), ((8, 8, 2), True)):
        make = rng.integers if integer else rng.uniform
        observations = [make(0, 256, (n + 1, *shape)) for n in lengths]
        for episode in observations if not integer else ():
            episode[:, 1] = 0.25  # never moves
        name = "images" if integer else "states"
        actions = [rng.uniform(-2, 2, (n, 2)) for n in lengths]
        common.save_dataset(tmp_path / name, observations, actions, make(0, 256, (5, *shape)))
        flags = {"dataset": tmp_path / name, "eval_episodes": 0, "holdout_fraction": 0.25, "seed": 5}
        args = script.Args(env_id="Own", **flags, **({} if script is bc else {"num_success": 1}))
        dataset, data, mean, std, *found = script.load_data(args, CPU)
        split = np.random.default_rng(common.seed_sequence(5, "split"))
        training, heldout, examples = common.split_dataset(dataset, 0.25, 0 if script is bc else 1, split)
        x = np.concatenate([observations[episode] for episode in training])
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-5)
        if integer:
            expected = np.full(shape, np.sqrt(((x - x.mean(0)) ** 2).mean()))
        else:
            expected = np.maximum(x.std(0, ddof=1), 1e-3)
            assert std[1] == np.float32(1e-3)
        np.testing.assert_allclose(std, expected, rtol=1e-5)
        assert all(np.array_equal(examples, x) for x in found[:1])
        rows = [np.unique(getattr(data, use).row // (lengths.max() + 1)) for use in ("batches", "train", "heldout")]
        assert len(heldout) == 3 and np.array_equal(np.sort(training), rows[0])
        assert np.array_equal(np.sort(training[:3]), rows[1]) and np.array_equal(np.sort(heldout), rows[2])


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
    lengths, bounds = np.full(episodes, steps, np.int32), np.array([[-1], [1]], np.float32)
    data = common.Dataset(
        one_hot[states], actions[..., None].astype(np.float32), lengths, one_hot[:1], lengths < 0, bounds, ""
    )
    data = make_data(laeo, data, range(episodes))
    _, critic = make_networks((num_states,), torch.from_numpy(bounds), hidden_dim=32, repr_dim=16)
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
    batch_size, gradient_steps = 128, 4000
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, gradient_steps)
    for step in range(gradient_steps):
        batch = laeo.sample(data, laeo.Args(batch_size=batch_size, discount=discount), step)
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
    states = tabular["psi"][:, examples], torch.zeros(3), tabular["batch_size"]
    learned = laeo.policy_value(tabular["phi"], *states, "exp_f")
    learned = (c / (1 - tabular["discount"]) * learned).reshape(6, 2).numpy()
    np.testing.assert_allclose(learned, q, rtol=0.15)
    clear = np.abs(q[:, 1] - q[:, 0]) > 0.1 * q.mean()
    assert clear.sum() >= 3
    assert np.array_equal(learned.argmax(1)[clear], q.argmax(1)[clear])
    log_value = laeo.policy_value(tabular["phi"], *states, "log_exp_f")
    np.testing.assert_allclose(
        log_value.exp().reshape(6, 2).numpy() * c / (1 - tabular["discount"]), learned, rtol=1e-5
    )
    # As an expectation over the data's states instead, weighted by p*/p: the same function, within 10 %.
    drawn = np.repeat(np.arange(6), np.round(20_000 * tabular["marginal"]).astype(int))
    with np.errstate(divide="ignore"):
        log_ratio = torch.from_numpy(np.log(p_star / tabular["marginal"])[drawn])
    weighted = laeo.policy_value(tabular["phi"], tabular["psi"][:, drawn], log_ratio, 2, "weighted")
    weighted = weighted.exp().reshape(6, 2).numpy() * c / (1 - tabular["discount"])
    np.testing.assert_allclose(weighted, q, rtol=0.1)
    assert np.array_equal(weighted.argmax(1)[clear], q.argmax(1)[clear])
