"""Behavioural cloning against the closed form of its maximum, against LAEO's cloning term, and on real data.

Its batches, encoder, distribution and learning rate are tested in test_laeo.py, with those of the other scripts.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from test_laeo import BOUNDS, IMAGE, features_of, log_density, make_actor, make_networks, perceptron, randomise

import bc
import common
import laeo


def make_batch(shape=(6,), size=16, random_shift=0, edge=1):
    generator = torch.Generator().manual_seed(5)
    action = torch.rand(size, 3, generator=generator) * 2 - 1
    action[0, 0], action[1, 1] = edge, -edge
    if len(shape) == 1:
        return bc.Batch(torch.randn(size, *shape, generator=generator), action, None)
    images = torch.randint(256, (size, *shape), generator=generator, dtype=torch.uint8)
    return bc.Batch(images, action, torch.randint(2 * random_shift + 1, (size, 2), generator=generator))


def test_loss_is_minus_the_mean_log_likelihood():
    assert bc.bc_loss(torch.tensor([-1.5, 0.25, 2.0], dtype=torch.float64)).item() == pytest.approx(-0.25, rel=1e-12)


def test_update_finds_the_maximum_likelihood_policy_of_each_state():
    """Three states, tanh-normal actions: the maximum is the mean and the standard deviation of atanh(action)."""
    rng = np.random.default_rng(0)
    states = np.repeat(np.arange(3), 400)
    x = np.array([-0.5, 0.2, 1.0])[states] + np.array([0.3, 0.6, 0.4])[states] * rng.normal(size=1200)
    expected = [(x[states == s].mean(), x[states == s].std()) for s in range(3)]
    one_hot = torch.eye(3)
    actor = make_actor(bc, torch.tensor([[-1.0], [1.0]]), shape=(3,))
    optimizer = torch.optim.Adam(actor.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 800)
    batch = bc.Batch(one_hot[states], torch.from_numpy(np.tanh(x)).float()[:, None], None)
    for _ in range(800):
        bc.update(batch, actor, optimizer)
        schedule.step()
    with torch.no_grad():
        mean, std = actor.distribution(one_hot)
        np.testing.assert_allclose(torch.cat([mean, std], 1), expected, atol=0.01)
        a = actor(one_hot)  # where the density of tanh(x) is largest
        torch.testing.assert_close(torch.atanh(a), mean + 2 * std**2 * a, atol=1e-3, rtol=0)


def test_gradient_is_that_of_laeo_with_nothing_but_cloning():
    generator = torch.Generator().manual_seed(1)
    (actor, critic), clone = make_networks(), make_actor(bc)
    clone.load_state_dict(actor.state_dict())
    states = torch.randn(3, 8, 6, generator=generator)
    action = torch.rand(8, 3, generator=generator) * 2 - 1
    optimizer = torch.optim.SGD([*actor.parameters(), *critic.parameters(), *clone.parameters()], 0.0)
    noise = torch.randn(8, 3, generator=generator)
    batch = laeo.Batch(states[0], action, states[1], torch.zeros(8), noise, torch.arange(8), [None] * 2)
    laeo.update(batch, states[2], actor, critic, optimizer, laeo.Args(bc_coef=1.0, policy_objective="log_exp_f"))
    gradients = [parameter.grad.clone() for parameter in actor.parameters()]
    bc.update(bc.Batch(states[0], action, None), clone, optimizer)
    for parameter, gradient in zip(clone.parameters(), gradients):
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("shape, random_shift", [((6,), 0), (IMAGE, 2)])
def test_update_goes_along_the_gradient_of_the_shifted_batch(shape, random_shift):
    """Twice, so that gradients that added up would show."""
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.full(shape, 100.0 if random_shift else 0.0), torch.full(shape, 70.0 if random_shift else 1.0)
    encoder = bc.Encoder(mean, std, bc.Args(random_shift=random_shift, channels=4), generator)
    actor, batch = bc.Actor(encoder, BOUNDS, 32, generator), make_batch(shape, random_shift=random_shift, edge=0.99)
    randomise(actor)
    optimizer, parameters = torch.optim.SGD(actor.parameters(), 1e-3), list(actor.parameters())
    for _ in range(2):
        features = features_of(actor.encoder, batch.observation, batch.shift, random_shift)
        mean, std = actor.net(features).chunk(2, -1)
        std = torch.nn.functional.softplus(std) + 0.1
        x = torch.atanh(batch.action)
        log_prob = torch.distributions.Normal(mean, std).log_prob(x) - torch.log(1 - batch.action**2)
        gradients = torch.autograd.grad(-log_prob.sum(-1).mean(), parameters)
        before = [parameter.detach().clone() for parameter in parameters]
        bc.update(batch, actor, optimizer)
        for parameter, gradient, old in zip(parameters, gradients, before):
            assert gradient.abs().sum() > 0
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(parameter.detach(), old - 1e-3 * gradient)


@pytest.mark.parametrize("shape, random_shift", [((6,), 0), (IMAGE, 2)])
def test_measure_against_an_independent_computation(shape, random_shift):
    """In float64, by numpy; metrics of images are measured without the random shift."""
    actor, batch = make_actor(bc, shape=shape), make_batch(shape, random_shift=random_shift)
    randomise(actor)
    metrics = bc.measure(batch, actor)
    features = actor.encoder(batch.observation).detach().double().numpy()
    mean, std = np.split(perceptron(actor.net, features), 2, axis=1)
    std, action = np.logaddexp(0, std) + 0.1, batch.action.double().numpy()
    expected = {"bc_loss": -log_density(action, mean, std).mean(), "policy_std": std.mean()}
    expected["action_error"] = np.abs(np.tanh(mean) - action).mean()
    assert metrics == pytest.approx(expected, rel=1e-3) and all(type(x) is float for x in metrics.values())


def test_learns_what_the_data_do(reach_dataset, tmp_path):
    args = bc.Args(
        dataset=reach_dataset, run_dir=tmp_path / "run", gradient_steps=300, log_interval=50, eval_episodes=1
    )
    bc.train(args)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in lines if "heldout/bc_loss" in line]
    assert last["heldout/bc_loss"] < first["heldout/bc_loss"] - 0.1
    assert last["heldout/action_error"] < first["heldout/action_error"]


# ------------------------------------------------------------------------------------------------------------- oracle


def oracle_args(dataset, run_dir, **kwargs):
    settings = {"gradient_steps": 20, "batch_size": 32, "hidden_dim": 32, "eval_episodes": 0, "only_solved": True}
    return bc.Args(dataset=dataset, run_dir=run_dir, **(settings | kwargs))


def test_the_oracle_clones_all_training_episodes_that_end_solved_and_no_other(reach_dataset):
    """Also not those that were solved on the way; held-out episodes and the statistics stay those of all methods."""
    device = torch.device("cpu")
    _, plain, *statistics = bc.load_data(oracle_args(reach_dataset, None, only_solved=False), device)
    _, data, *others = bc.load_data(oracle_args(reach_dataset, None), device)
    flags, (trained, plainly) = np.load(reach_dataset / "successes.npy"), [x.batches.row // 51 for x in (data, plain)]
    assert set(trained) == {e for e in set(plainly) if flags[e, -1]} and 5 < len(set(trained)) < len(set(plainly)) - 5
    assert len(trained) == 50 * len(set(trained)) and set(data.train.row // 51) <= set(trained)
    assert np.array_equal(data.heldout.row, plain.heldout.row) and all(map(torch.equal, statistics, others))


def test_the_last_state_of_a_shorter_episode_decides():
    """Solved on the way, in the padding, at the end; of the last, which is not asked about, nothing is said."""
    lengths = np.array([2, 2, 3, 3], np.int32)
    observations = np.zeros((4, 4, 1), np.float32)
    dataset = common.Dataset(observations, np.zeros((4, 3, 1)), lengths, observations[:0, 0], None, None, "")
    flags = np.array([[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1]], bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_array", lambda path, types: flags)
        patch.setattr(bc.Path, "exists", lambda path: path.name == "successes.npy")
        assert bc.solved_episodes(bc.Path("data"), dataset, np.array([2, 0, 1])).tolist() == [2]


def test_the_oracle_has_the_weights_of_cloning_those_episodes(reach_dataset, tmp_path):
    """Its run is another one than BC's, and changes with the flags, which BC's does not."""
    turned = shutil.copytree(reach_dataset, tmp_path / "turned")
    np.save(turned / "successes.npy", ~np.load(turned / "successes.npy"))
    weights = {}
    for name, data, only_solved in (
        ("oracle", reach_dataset, True), ("turned", turned, True), ("bc", reach_dataset, False)
    ):  # fmt: skip
        bc.train(dataclasses.replace(oracle_args(data, tmp_path / name), only_solved=only_solved))
        checkpoint = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        assert checkpoint["args"]["only_solved"] == only_solved
        weights[name] = checkpoint["actor"]["net.0.weight"]
    assert not torch.equal(weights["oracle"], weights["turned"])
    assert not torch.equal(weights["oracle"], weights["bc"]) and not torch.equal(weights["turned"], weights["bc"])


def test_the_oracle_without_what_it_needs_gets_one_sentence(reach_dataset, tmp_path):
    data = shutil.copytree(reach_dataset, tmp_path / "data")
    flags = np.load(data / "successes.npy")
    cases = {"finds no training episode of .*data that ends solved; leave it out": flags & False}
    cases |= {"successes.npy has shape .*; the observations need": flags[:, 1:]}
    cases |= {"successes.npy has dtype": flags.astype(np.float32), r"needs .*successes\.npy, .*; leave it out": None}
    for message, content in cases.items():
        (data / "successes.npy").unlink()
        if content is not None:
            np.save(data / "successes.npy", content)
        with pytest.raises(common.UserError, match=message) as caught:
            bc.train(oracle_args(data, tmp_path / "run"))
        assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
    assert len(cases) == 4
    bc.train(oracle_args(data, tmp_path / "run", only_solved=False))


def test_the_flag_says_that_it_is_an_oracle():
    line = next(line for line in open(bc.__file__) if "only_solved: bool" in line)
    assert "oracle" in line.lower() and "oracle" in bc.__doc__ and "oracle" in bc.solved_episodes.__doc__
