"""ORIL and PURL: reward losses, TD3+BC and its parts against independent computations; only the reward loss differs.

Their batches, encoders and learning rates are tested in test_laeo.py, with those of the other scripts.
"""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import traceable_dataset
from test_laeo import (
    BOUNDS,
    CHOSEN,
    IMAGE,
    add_gradients,
    features_of,
    log_density,
    make_data,
    make_encoder,
    parameters_of,
    perceptron,
    randomise,
    watch_shifts,
)

import common
import oril
import purl

DIM, ACTIONS, SIZE = 6, 3, 16


@pytest.fixture(params=["oril", "purl"])
def script(request):
    return {"oril": oril, "purl": purl}[request.param]


def make_networks(script=oril, shape=(DIM,), bounds=BOUNDS, hidden_dim=32, seed=0, random_shift=0):
    generator = torch.Generator().manual_seed(seed)
    encoders = [make_encoder(script, shape, generator, random_shift) for _ in range(2)]  # the policy's, the reward's
    return script.Networks(encoders, bounds, hidden_dim, generator)


def make_batch(script=oril, shape=(DIM,), seed=5, random_shift=0):
    generator = torch.Generator().manual_seed(seed)
    action = torch.rand(SIZE, ACTIONS, generator=generator) * 2 - 1
    if len(shape) == 1:
        states = [torch.randn(n, *shape, generator=generator) for n in (SIZE, SIZE, 9)]
    else:
        states = [torch.randint(256, (n, *shape), generator=generator, dtype=torch.uint8) for n in (SIZE, SIZE, 9)]
    noise = torch.randn(SIZE, ACTIONS, generator=torch.Generator().manual_seed(6))
    terminal = (torch.arange(SIZE) % 4 == 0).float()
    sizes = SIZE, SIZE, len(CHOSEN)
    shifts = [torch.randint(2 * random_shift + 1, (n, 2), generator=generator) for n in sizes]
    shifts = shifts if random_shift else [None] * 3
    return script.Batch(states[0], action, states[1], terminal, noise, CHOSEN, shifts), states[2]


def scatter_targets(networks, seed=9):
    """Move the target networks away from the others, so that confusing them shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in networks.targets.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def update(script, networks, optimizer, step, shape=(DIM,), **flags):
    batch, examples = make_batch(script, shape)
    script.update(batch, examples, networks, optimizer, script.Args(**flags), step)


def extra_flags(script):
    return {"eta": 0.2} if script is purl else {}


def reward_loss(script, examples, data):
    return script.reward_loss(examples, data, *extra_flags(script).values())


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
    reward = purl.Reward(make_encoder(purl, (8,), generator), 64, generator)
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


# ---------------------------------------------------------------------------------------------------------- networks


def test_twin_critics_take_features_and_scaled_actions(script):
    """Against numpy, with layer normalisation before each ReLU; actions weigh as much as all features of an image."""
    rng = np.random.default_rng(0)
    for shape, dim, scale in (((DIM,), DIM, 1.0), (IMAGE, 32, (32 / 3) ** 0.5)):
        critic = make_networks(script, shape).critic
        randomise(critic)
        features, action = rng.normal(size=(5, dim)), rng.uniform(-1, 1, (5, ACTIONS))
        q = critic(torch.from_numpy(features).float(), torch.from_numpy(action).float()).detach().numpy()
        assert q.shape == (2, 5) and len(critic.nets) == 2 and not np.allclose(q[0], q[1])
        for net, twin in zip(critic.nets, q):
            x = np.concatenate([features, scale * action], 1)
            for linear, norm in ((net[0], net[1]), (net[3], net[4]), (net[6], None)):
                x = x @ linear.weight.detach().double().numpy().T + linear.bias.detach().double().numpy()
                if norm is not None:
                    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
                    x = np.maximum(x * norm.weight.detach().double().numpy() + norm.bias.detach().double().numpy(), 0)
            np.testing.assert_allclose(twin, x[:, 0], rtol=1e-3, atol=1e-4)


def test_reward_has_features_of_its_own_and_actor_and_critic_share_theirs(script):
    networks, (batch, _) = make_networks(script, IMAGE, random_shift=2), make_batch(script, IMAGE, random_shift=2)
    randomise(networks)
    assert networks.actor.encoder is networks.critic.encoder is not networks.reward.encoder
    weights = [encoder.net[0].weight for encoder in (networks.critic.encoder, networks.reward.encoder)]
    assert not torch.equal(*weights)
    for shift in (None, batch.shifts[0]):
        x, y = (
            features_of(encoder, batch.observation, shift, 2).detach().double().numpy()
            for encoder in (networks.actor.encoder, networks.reward.encoder)
        )
        features = networks.actor.encoder(batch.observation, shift)
        mean, std = (x.detach() for x in networks.actor.distribution(features))
        output = perceptron(networks.actor.net, x)
        np.testing.assert_allclose(mean, output[:, :ACTIONS], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(std, np.logaddexp(0, output[:, ACTIONS:]) + 0.1, rtol=1e-3)
        logits = networks.reward(batch.observation, shift).detach()
        np.testing.assert_allclose(logits, perceptron(networks.reward.net, y)[:, 0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(DIM,), IMAGE])
def test_targets_begin_as_copies_that_no_gradient_reaches(script, shape):
    """One copy of the encoder, which they share as actor and critic do."""
    networks = make_networks(script, shape)
    assert set(networks.targets) == {"actor", "critic"}
    assert networks.targets.actor.encoder is networks.targets.critic.encoder is not networks.critic.encoder
    for target, network in (
        (networks.targets.actor, networks.actor),
        (networks.targets.critic, networks.critic),
    ):
        assert len(list(target.parameters())) == len(list(network.parameters())) >= 6
        for one, other in zip(target.parameters(), network.parameters()):
            assert torch.equal(one, other) and one is not other
            assert other.requires_grad and not one.requires_grad


# ------------------------------------------------------------------------------------------------------------- TD3+BC


def test_critic_loss_is_the_squared_error_of_both_twins_to_one_target(script):
    rng = np.random.default_rng(2)
    reward, next_q, q = rng.random(8), rng.normal(size=(2, 8)), rng.normal(size=(2, 8))
    terminal = np.array([0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    target = np.array([r if end else r + 0.9 * min(a, b) for r, end, a, b in zip(reward, terminal, *next_q)])
    loss = script.critic_loss(*(torch.from_numpy(x) for x in (q, reward, terminal, next_q)), 0.9)  # ends: nothing after
    assert loss.item() == pytest.approx(np.mean((q[0] - target) ** 2) + np.mean((q[1] - target) ** 2), rel=1e-12)


def test_policy_loss_is_normalised_and_its_normaliser_has_no_gradient(script):
    """With lambda = alpha / mean |Q|, minus lambda mean Q minus the mean log-likelihood."""
    rng = np.random.default_rng(3)
    q, log_prob = rng.normal(size=8) * 50, rng.normal(size=8)
    q_tensor, log_prob_tensor = (torch.from_numpy(x).requires_grad_(True) for x in (q, log_prob))
    loss = script.policy_loss(q_tensor, log_prob_tensor, 2.5)
    weight = 2.5 / np.abs(q).mean()
    assert loss.item() == pytest.approx(-weight * q.mean() - log_prob.mean(), rel=1e-12)
    loss.backward()
    np.testing.assert_allclose(q_tensor.grad, np.full(8, -weight / 8), rtol=1e-12)
    np.testing.assert_allclose(log_prob_tensor.grad, np.full(8, -1 / 8), rtol=1e-12)
    scaled = script.policy_loss(1000 * q_tensor, log_prob_tensor, 2.5)
    assert scaled.item() == pytest.approx(loss.item(), rel=1e-12)


class SeesActions(torch.nn.Module):
    """In the place of a target critic: its "Q" are the actions that it is asked about."""

    def __init__(self):
        super().__init__()
        self.encoder = lambda observation, shift: observation

    def forward(self, features, action):
        return action.T


def test_target_noise_is_drawn_for_each_number_and_clipped(script):
    networks, generator = make_networks(script), torch.Generator().manual_seed(0)
    actor, networks.targets.critic = networks.targets.actor, SeesActions()
    actor.net[-1].weight.zero_()
    actor.net[-1].bias.copy_(torch.tensor([0.1] * ACTIONS + [-2.0] * ACTIONS))
    observation, zeros = torch.zeros(5000, DIM), torch.zeros(5000)
    normal = torch.randn(5000, ACTIONS, generator=generator)
    nothing = torch.arange(0), [None] * 3  # no examples and no shifts
    batch = script.Batch(observation + 9, torch.zeros(5000, ACTIONS), observation, zeros, normal, *nothing)
    mode = actor.mode(observation[:1])
    noise = script.next_q(batch, networks, None).T - mode
    assert len(noise.unique(dim=0)) > 4900 and (noise[:, 0] - noise[:, 1]).abs().mean() > 0.1
    assert noise.std().item() == pytest.approx(0.2, rel=0.03) and noise.abs().max() <= 0.5 + 1e-6
    torch.testing.assert_close(noise, (0.2 * normal).clamp(-0.5, 0.5))
    actor.net[-1].bias[:ACTIONS] = 2.0
    action = script.next_q(batch, networks, None)
    assert action.max() == 1 and action.min() > 0.4


def losses_of(script, batch, examples, networks, alpha, pad, detached=True):
    """Return the losses of reward, critic and policy, from images that numpy has shifted, each encoded by itself.

    The policy's Q is a function of its action; with `detached` False of the state's features as well.
    """
    shift, next_shift, examples_shift = batch.shifts
    reward, actor, critic, targets = networks.reward, networks.actor, networks.critic, networks.targets

    def seen_by(network, observation, which):
        return features_of(network.encoder, observation, which, pad)

    logits = reward.net(seen_by(reward, batch.next_observation, next_shift)).squeeze(-1)
    logits_examples = reward.net(seen_by(reward, examples[CHOSEN], examples_shift)).squeeze(-1)
    loss = reward_loss(script, logits_examples, logits)
    if script is purl:  # its floor is not reached
        assert (F.softplus(logits).mean() - 0.2 * F.softplus(logits_examples).mean()).item() > 0.05
    mean, std = targets.actor.net(seen_by(targets.actor, batch.next_observation, next_shift)).chunk(2, -1)
    next_action = torch.tanh(mean)
    for _ in range(20):
        next_action = torch.tanh(mean + 2 * (F.softplus(std) + 0.1) ** 2 * next_action)
    next_action = (next_action + (0.2 * batch.noise).clamp(-0.5, 0.5)).clamp(-1, 1)
    next_q = targets.critic(seen_by(targets.critic, batch.next_observation, next_shift), next_action)
    next_q = torch.where(batch.terminal == 1, 0.0, 0.9 * torch.minimum(next_q[0], next_q[1]))
    target = (torch.sigmoid(logits) + next_q).detach()
    features = seen_by(critic, batch.observation, shift)
    q = critic(features, batch.action)
    q_loss = F.mse_loss(q[0], target) + F.mse_loss(q[1], target)
    mean, std = actor.net(seen_by(actor, batch.observation, shift)).chunk(2, -1)
    std = F.softplus(std) + 0.1
    q_policy = critic(features.detach() if detached else features, torch.tanh(mean + std * batch.noise))[0]
    log_prob = actor.log_prob(mean, std, batch.action)
    return loss, q_loss, -alpha * q_policy.mean() / q_policy.abs().mean().detach() - log_prob.mean()


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("shape, random_shift", [((DIM,), 0), (IMAGE, 0), (IMAGE, 2)])
def test_each_loss_reaches_only_its_own_network(script, shape, random_shift, step):
    """Each network goes along its own loss's gradient, the encoder of actor and critic along the sum of both.

    From the parameters before the step; nothing adds up over steps, though all of it is one backward pass. In an even
    step there is no policy's loss.
    """
    networks = make_networks(script, shape, random_shift=random_shift)
    randomise(networks)
    scatter_targets(networks)
    learned = [p for p in networks.parameters() if p.requires_grad]
    optimizer, rate = torch.optim.SGD(learned, lr=1e-3), 1e-3
    batch, examples = make_batch(script, shape, random_shift=random_shift)
    args = script.Args(alpha=1.7, discount=0.9, tau=0, random_shift=random_shift, **extra_flags(script))
    parts = [list(part.parameters()) for part in (networks.reward, networks.critic, networks.actor)]
    for _ in range(2):
        losses = losses_of(script, batch, examples, networks, 1.7, random_shift)
        gradients = add_gradients(*list(zip(losses, parts))[: 2 + step])
        before = {parameter: parameter.detach().clone() for parameter in learned}
        script.update(batch, examples, networks, optimizer, args, step)
        for parameter, old in before.items():
            if parameter in gradients:
                torch.testing.assert_close(parameter.grad, gradients[parameter], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(parameter.detach(), old - rate * gradients[parameter])
            else:
                assert parameter.grad is None and torch.equal(parameter, old)
        assert len(gradients) == len(learned) - (0 if step else 6)  # the actor's three layers
        assert sum(gradient.abs().sum() > 0 for gradient in gradients.values()) > len(gradients) - 4
    assert all(parameter.requires_grad for parameter in learned)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in networks.targets.parameters())


@pytest.mark.parametrize("alpha", [0.0, 50.0])
def test_value_and_cloning_reach_the_encoder_through_the_action_alone(script, alpha, monkeypatch):
    """And no layer of the critic: with a critic's loss of zero these have no gradient, whatever the policy's is."""
    networks = make_networks(script, IMAGE, random_shift=2)
    randomise(networks)
    batch, examples = make_batch(script, IMAGE, random_shift=2)
    losses = (losses_of(script, batch, examples, networks, alpha, 2, detached)[2] for detached in (True, False))
    own, encoder = list(networks.actor.net.parameters()), list(networks.actor.encoder.parameters())
    expected, through_features = (torch.autograd.grad(loss, own + encoder) for loss in losses)
    monkeypatch.setattr(script, "critic_loss", lambda q, *_: 0 * q.sum())
    args = script.Args(alpha=alpha, random_shift=2, **extra_flags(script))
    script.update(batch, examples, networks, torch.optim.SGD(parameters_of(networks), 0.0), args, 1)
    assert not any(parameter.grad.any() for parameter in networks.critic.nets.parameters())
    assert networks.critic.encoder is networks.actor.encoder and len(encoder) == 10
    for parameter, gradient in zip(own + encoder, expected):
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
    ways = [torch.allclose(a, b, rtol=0.05) for a, b in zip(expected[len(own) :], through_features[len(own) :])]
    assert not any(ways) if alpha else all(ways)  # cloning has no Q


def test_an_image_is_shifted_alike_for_all_networks_and_the_next_one_in_another_way(script, monkeypatch):
    """States for actor and critic, in one pass; what follows for reward and targets; of the examples those chosen."""
    networks = make_networks(script, IMAGE, random_shift=2)
    batch, examples = make_batch(script, IMAGE, random_shift=2)
    seen, args = watch_shifts(script, monkeypatch), script.Args(random_shift=2, **extra_flags(script))
    script.update(batch, examples, networks, torch.optim.SGD(parameters_of(networks), 0.0), args, 1)
    images = [*batch.observation, *batch.next_observation, *examples[[4, 0, 8, 2, 6, 5, 1]]]
    expected = [tuple(way) for shift in batch.shifts for way in shift.tolist()]
    times = [1] * SIZE + [2] * SIZE + [1] * 7
    assert seen == {image.numpy().tobytes(): n * [way] for image, way, n in zip(images, expected, times)}
    assert len(seen) == SIZE + SIZE + 7 and sum(a != b for a, b in zip(expected[:SIZE], expected[SIZE:])) > 12


@pytest.mark.parametrize("frequency", [1, 2, 3])
def test_policy_and_targets_move_in_one_of_so_many_steps(script, frequency):
    networks = make_networks(script)
    scatter_targets(networks)
    optimizer = torch.optim.Adam(networks.parameters(), 1e-2)
    for step in range(4):
        before = {name: value.clone() for name, value in networks.state_dict().items()}
        flags = {} if frequency == 2 else {"policy_frequency": frequency}  # 2 is the default
        update(script, networks, optimizer, step, **flags)
        for name, value in networks.state_dict().items():
            part, buffer = name.split(".")[0], "observation" in name or "bounds" in name
            delayed = step in {1: (0, 1, 2, 3), 2: (1, 3), 3: (2,)}[frequency]
            moves = not buffer and (part in ("critic", "reward") or delayed)
            assert torch.equal(value, before[name]) != moves, (step, name)


@pytest.mark.parametrize("shape", [(DIM,), IMAGE])
def test_targets_go_a_share_tau_of_the_way_to_the_new_networks(script, shape):
    """With the encoder of images, once."""
    networks = make_networks(script, shape)
    assert torch.equal(networks.targets.critic.nets[0][0].weight, networks.critic.nets[0][0].weight)  # they begin equal
    scatter_targets(networks)
    before = {name: value.clone().double() for name, value in networks.state_dict().items()}
    update(script, networks, torch.optim.Adam(networks.parameters(), 1e-2), step=1, shape=shape, tau=0.1)
    assert not any(target.requires_grad for target in networks.targets.parameters())  # and so no graph that grows
    after, compared = networks.state_dict(), set()
    for part in ("actor", "critic"):
        for name in after:
            if name.startswith(f"{part}.") and "observation" not in name:
                expected = 0.9 * before[f"targets.{name}"] + 0.1 * after[name].double()
                np.testing.assert_allclose(after[f"targets.{name}"], expected, atol=1e-6)
                compared.add(name.split(".")[1])
    assert compared == {"net", "nets", "action_bounds"} | ({"encoder"} if shape == IMAGE else set())


# ------------------------------------------------------------------------------------------------ batches and metrics


def test_next_observation_is_the_next_one_of_the_same_episode(script):
    data = make_data(script, traceable_dataset([3, 5, 1], [True, False, True]), [2, 0, 1])
    batch = script.sample(data, script.Args(batch_size=2000), 0)
    torch.testing.assert_close(10 * batch.action[:, 0], batch.observation[:, 0] + batch.observation[:, 1] / 10)
    assert torch.equal(batch.next_observation, batch.observation + torch.tensor([0.0, 1.0]))
    assert len(batch.observation.unique(dim=0)) == 9
    ends = {(0, 2), (2, 0)}  # episode 1 was cut off by a step limit
    expected = [float(tuple(x) in ends) for x in batch.observation.int().tolist()]
    assert batch.terminal.tolist() == expected and batch.terminal.dtype == torch.float32


@pytest.mark.parametrize("shape, random_shift", [((DIM,), 0), (IMAGE, 2)])
def test_metrics_against_an_independent_computation(script, shape, random_shift):
    networks = make_networks(script, shape, random_shift=random_shift)
    randomise(networks)
    scatter_targets(networks)
    batch, examples = make_batch(script, shape, random_shift=random_shift)
    encode = lambda network, x: network.encoder(x).detach()  # noqa: E731
    with torch.no_grad():  # which twin is the smaller one differs from state to state
        one, other = networks.critic(encode(networks.critic, batch.observation), batch.action)
        networks.critic.nets[1][-1].bias.add_((one - other).mean())
    metrics = script.measure(batch, examples, {}, networks, script.Args(discount=0.9, **extra_flags(script)))
    sigma = {name: torch.sigmoid(networks.reward(x)) for name, x in (("e", examples), ("d", batch.next_observation))}
    q = networks.critic(encode(networks.critic, batch.observation), batch.action).detach()
    if script is oril:
        loss = -(torch.log(sigma["e"]).mean() + torch.log(1 - sigma["d"]).mean()) / 2
    else:
        negative = -torch.log(1 - sigma["d"]).mean() + 0.2 * torch.log(1 - sigma["e"]).mean()
        assert negative > 0.05  # not at its floor
        loss = -0.2 * torch.log(sigma["e"]).mean() + negative
    expected = {"reward_loss": loss, "reward_examples": sigma["e"].mean(), "reward_data": sigma["d"].mean()}
    expected["q_data"] = torch.minimum(*q).mean()
    noise = (0.2 * batch.noise).clamp(-0.5, 0.5)
    following = encode(networks.targets.critic, batch.next_observation)
    next_action = (networks.targets.actor.mode(following) + noise).clamp(-1, 1)
    next_q = torch.minimum(*networks.targets.critic(following, next_action))
    target = sigma["d"] + 0.9 * torch.where(batch.terminal == 1, 0, next_q)
    expected["critic_loss"] = sum(((twin - target) ** 2).mean() for twin in q)
    action = networks.actor.mode(encode(networks.actor, batch.observation)).detach()
    q_policy = networks.critic(encode(networks.critic, batch.observation), action)
    assert not torch.equal(q[0] < q[1], torch.ones(SIZE, dtype=bool)) and (q[0] < q[1]).any()
    expected["q_policy"] = torch.minimum(*q_policy).mean()
    distribution = networks.actor.distribution(encode(networks.actor, batch.observation))
    mean, std = (x.detach().double().numpy() for x in distribution)
    expected["bc_loss"] = -log_density(batch.action.double().numpy(), mean, std).mean()
    expected = {name: value.item() for name, value in expected.items()}
    assert metrics == pytest.approx(expected, rel=1e-4) and all(type(x) is float for x in metrics.values())


@pytest.mark.parametrize("shape", [(DIM,), IMAGE])
def test_metrics_of_labelled_states_are_those_of_their_own_label(script, shape):
    networks, (batch, examples) = make_networks(script, shape), make_batch(script, shape)
    randomise(networks)
    scatter_targets(networks)
    states = {"success": examples[:5], "failure": batch.observation[:6], "start": batch.next_observation[:7]}
    args = script.Args(**extra_flags(script))
    without, metrics = (script.measure(batch, examples, x, networks, args) for x in ({}, states))
    expected = dict(without)
    for label, x in states.items():
        expected[f"reward_{label}"] = torch.sigmoid(networks.reward(x)).mean().item()
        q = networks.critic(networks.critic.encoder(x), networks.actor.mode(networks.actor.encoder(x)))
        expected[f"q_{label}"] = torch.minimum(*q).mean().item()
    assert len(expected) == len(without) + 6 and len(set(expected.values())) == len(expected)
    assert metrics == pytest.approx(expected, rel=1e-4) and all(type(x) is float for x in metrics.values())


def test_learned_reward_is_success_on_states_it_has_not_seen(script, reach_dataset, tmp_path):
    """On the real task, from 40 mixed episodes; that policies succeed is in tests/test_slow.py, it takes minutes."""
    settings = {"gradient_steps": 500, "batch_size": 128, "hidden_dim": 128, "eval_interval": 0, "eval_episodes": 1}
    settings |= {"num_success": 50, "holdout_fraction": 0.2, "reward_learning_rate": 3e-4}
    script.train(script.Args(dataset=reach_dataset, run_dir=tmp_path / "run", **settings))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "heldout/reward_success" in line][-1]
    assert last["heldout/reward_success"] > last["heldout/reward_failure"] + 0.3


# ------------------------------------------------------------------------------------------------------------- theory


class FixedReward(torch.nn.Module):
    """A reward that is what it is: the logit of a table over one-hot states."""

    def __init__(self, table):
        super().__init__()
        self.register_buffer("table", torch.logit(torch.tensor(table)).float())
        self.zero = torch.nn.Parameter(torch.zeros(()))  # the reward's loss has something to be differentiated by

    def forward(self, observation, shift=None):
        return observation @ self.table + 0 * self.zero


@pytest.mark.parametrize("learn_policy, end", [(False, None), (True, None), (False, 2)])
def test_td3_finds_the_exact_q_function_of_a_small_mdp(learn_policy, end):
    """A ring of five states, actions in [-1, 1] that go clockwise with probability (1 + a) / 2, a fixed reward.

    Once with a fixed policy, once with a learned one and hardly any cloning, and once with a state that truly ends the
    episode; Q against the solution of the policy's Bellman equation, and the learned policy against value iteration.
    Episodes have four steps at most: without bootstrapping through their ends, Q would be less than half of what it is.
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
    ended = states[:, 1:] == end if end is not None else np.zeros((episodes, steps), bool)
    lengths = np.where(ended.any(1), ended.argmax(1) + 1, steps).astype(np.int32)
    bounds = np.array([[-1], [1]], np.float32)
    dataset = common.Dataset(one_hot[states], actions[..., None], lengths, one_hot[:1], ended.any(1), bounds, "")
    data = make_data(oril, dataset, range(episodes))

    networks = make_networks(oril, (num_states,), torch.from_numpy(bounds), hidden_dim=64, seed=3)
    networks.reward = FixedReward(rewards)
    with torch.no_grad():
        networks.actor.net[0].weight.mul_(5)  # a policy that differs from state to state
    networks.targets.actor.load_state_dict(networks.actor.state_dict())
    learned = [*networks.critic.parameters(), *(networks.actor.parameters() if learn_policy else ())]
    optimizer, gradient_steps = torch.optim.Adam(learned, 2e-3), 1500
    args = oril.Args(batch_size=256, num_success=1, discount=discount, alpha=500.0, tau=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, gradient_steps)
    examples = torch.from_numpy(one_hot[:1])
    for step in range(gradient_steps):
        oril.update(oril.sample(data, args, step), examples, networks, optimizer, args, step)
        schedule.step()

    right, left = np.roll(np.eye(num_states), 1, axis=1), np.roll(np.eye(num_states), -1, axis=1)
    follows = np.arange(num_states) != (-1 if end is None else end)  # whether anything follows a state
    with torch.no_grad():
        noise = torch.special.ndtri((torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000)
        actions = networks.actor.mode(torch.from_numpy(one_hot)) + (0.2 * noise).clamp(-0.5, 0.5)
        policy = actions.clamp(-1, 1).mean(1, keepdim=True).numpy()  # all that counts is the mean action
    mix = lambda a: (1 + a) / 2 * right + (1 - a) / 2 * left  # noqa: E731
    if learn_policy:
        value = np.zeros(num_states)
        for _ in range(500):
            value = np.maximum(right @ (rewards + discount * value), left @ (rewards + discount * value))
        best = np.sign(right @ (rewards + discount * value) - left @ (rewards + discount * value))
        assert np.array_equal(np.sign(policy[:, 0]), best)
    kernel = mix(policy)
    value = np.linalg.solve(np.eye(num_states) - discount * kernel * follows, kernel @ rewards)
    assert np.ptp(policy) > 0.1
    grid = np.linspace(-1, 1, 5)
    exact = np.stack([mix(a) @ (rewards + discount * follows * value) for a in grid], 1)
    observation = torch.from_numpy(np.repeat(one_hot, 5, axis=0))
    with torch.no_grad():
        q = networks.critic(observation, torch.from_numpy(np.tile(grid, num_states).astype(np.float32))[:, None])
    for twin in q.numpy():
        np.testing.assert_allclose(twin.reshape(num_states, 5), exact, rtol=0.05)
    assert np.ptp(exact) > (0.5 if end is None else 0.2)
