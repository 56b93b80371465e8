"""One small real dataset for all tests, 40 FetchReach episodes of the shipped policies, and one that can be traced."""

import os

import numpy as np
import pytest
import torch

import collect_data
import common

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start; two threads each would wait for
torch.set_num_threads(1)  # the threads of the other processes


def traceable_dataset(lengths, terminals=None):
    """Observation (episode, step), action episode + step / 10 in bounds -10 to 10, and -1 behind an episode's end.

    A batch holds actions scaled to [-1, 1]: a tenth of these.
    """
    observations = np.full((len(lengths), max(lengths) + 1, 2), -1, np.float32)
    actions = np.full((len(lengths), max(lengths), 1), -1, np.float32)
    for episode, length in enumerate(lengths):
        observations[episode, : length + 1] = [(episode, t) for t in range(length + 1)]
        actions[episode, :length, 0] = episode + np.arange(length) / 10
    terminals = np.zeros(len(lengths), bool) if terminals is None else np.array(terminals, bool)
    bounds = np.array([[-10], [10]], np.float32)
    examples, lengths = observations[:1, 0], np.array(lengths, np.int32)
    return common.Dataset(observations, actions, lengths, examples, terminals, bounds, "checksum")


@pytest.fixture(scope="session")
def reach_dataset(tmp_path_factory):
    output = tmp_path_factory.mktemp("datasets") / "FetchReach-medium"
    collect_data.collect(collect_data.Args(env_id="FetchReach", num_episodes=40, output=output))
    return output
