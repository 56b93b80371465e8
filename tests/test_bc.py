"""Behavioural cloning against the closed form of its maximum, against LAEO's cloning term, and on real data."""

import json

import numpy as np
import torch
from conftest import traceable_dataset

import bc
import common
import laeo


def test_update_finds_the_maximum_likelihood_policy_of_each_state():
    """Three states, actions from tanh-normal laws: the maximum is the mean and the deviation of atanh(action)."""
    rng = np.random.default_rng(0)
    states = np.repeat(np.arange(3), 400)
    x = np.array([-0.5, 0.2, 1.0])[states] + np.array([0.3, 0.6, 0.4])[states] * rng.normal(size=1200)
    expected = [(x[states == s].mean(), x[states == s].std()) for s in range(3)]
    one_hot = torch.eye(3)
    generator = torch.Generator().manual_seed(0)
    actor = bc.Actor(bc.Encoder(torch.zeros(3), torch.ones(3), 4, generator), 1, 32, generator)
    optimizer = torch.optim.Adam(actor.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 800)
    batch = bc.Batch(one_hot[states], torch.from_numpy(np.tanh(x)).float()[:, None])
    for _ in range(800):
        bc.update(batch, actor, optimizer)
        schedule.step()
    with torch.no_grad():
        mean, std = actor(one_hot)
    np.testing.assert_allclose(torch.cat([mean, std], 1), expected, atol=0.01)
    torch.testing.assert_close(actor.mode(one_hot), torch.tanh(mean))


def test_gradient_is_that_of_laeo_with_nothing_but_cloning():
    generator = torch.Generator().manual_seed(1)
    sizes, encoders = (2, 16), [laeo.Encoder(torch.zeros(6), torch.ones(6), 4, generator) for _ in range(3)]
    actor, critic = laeo.Actor(encoders[0], *sizes, generator), laeo.Critic(encoders[1], *sizes, 4, generator)
    clone = bc.Actor(encoders[2], *sizes, generator)
    clone.load_state_dict(actor.state_dict())
    states = torch.randn(3, 8, 6, generator=generator)
    action = torch.rand(8, 2, generator=generator) * 2 - 1
    optimizer = torch.optim.SGD([*actor.parameters(), *critic.parameters(), *clone.parameters()], 0.0)
    args = laeo.Args(bc_coef=1.0)
    noise = torch.randn(8, 2, generator=generator)
    laeo.update(laeo.Batch(states[0], action, states[1], noise), states[2], actor, critic, optimizer, args)
    gradients = [parameter.grad.clone() for parameter in actor.parameters()]
    bc.update(bc.Batch(states[0], action), clone, optimizer)
    for parameter, gradient in zip(clone.parameters(), gradients):
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(parameter.grad, gradient)


def test_each_state_keeps_its_own_action_and_padding_is_never_seen():
    data = traceable_dataset([3, 5, 1])
    transitions = common.Transitions(data, np.array([2, 0, 1]), torch.device("cpu"))
    batch = bc.sample(transitions, bc.Args(batch_size=2000), torch.Generator().manual_seed(0))
    torch.testing.assert_close(batch.action[:, 0], batch.observation[:, 0] + batch.observation[:, 1] / 10)
    pairs, counts = batch.observation.unique(dim=0, return_counts=True)
    assert len(pairs) == 9 and counts.min() > 150  # each of the 3 + 5 + 1 transitions, equally often
    assert len(transitions.states) == 12  # the last states count for the mean and the standard deviation


def test_learns_what_the_data_do(reach_dataset, tmp_path):
    args = bc.Args(
        dataset=reach_dataset, run_dir=tmp_path / "run", gradient_steps=300, log_interval=50, eval_episodes=1
    )
    bc.train(args)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in lines if "heldout/bc_loss" in line]
    assert last["heldout/bc_loss"] < first["heldout/bc_loss"] - 0.1
    assert last["heldout/action_error"] < first["heldout/action_error"]
