"""One small real dataset for all tests: 40 FetchReach episodes of the shipped policies."""

import pytest

import collect_data


@pytest.fixture(scope="session")
def reach_dataset(tmp_path_factory):
    output = tmp_path_factory.mktemp("datasets") / "FetchReach-medium"
    collect_data.collect(collect_data.Args(env_id="FetchReach", num_episodes=40, output=output))
    return output
