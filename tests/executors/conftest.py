"""What tests of the executors share."""

import pytest


@pytest.fixture(scope="module")
def quick_workers():
    """Clusters that the module's tests and their commands start have workers at once."""
    from tests.helpers.nursery import nursery

    with nursery():
        yield
