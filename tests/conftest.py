"""One small real dataset for all tests, 40 FetchReach episodes of the shipped policies, and one that can be traced."""

import numpy as np
import pytest

import collect_data
import common


def traceable_dataset(lengths):
    """Observation (episode, step), action episode + step / 10, and -1 behind an episode's end."""
    observations = np.full((len(lengths), max(lengths) + 1, 2), -1, np.float32)
    actions = np.full((len(lengths), max(lengths), 1), -1, np.float32)
    for episode, length in enumerate(lengths):
        observations[episode, : length + 1] = [(episode, t) for t in range(length + 1)]
        actions[episode, :length, 0] = episode + np.arange(length) / 10
    return common.Dataset(observations, actions, np.array(lengths, np.int32), observations[:1, 0])


@pytest.fixture(scope="session")
def reach_dataset(tmp_path_factory):
    output = tmp_path_factory.mktemp("datasets") / "FetchReach-medium"
    collect_data.collect(collect_data.Args(env_id="FetchReach", num_episodes=40, output=output))
    return output
