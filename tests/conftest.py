"""Settings of all tests."""

import importlib.util

import pytest

from support.paths import SHARED


def _load_hypothesis_profile() -> None:
    """The same examples in every run, without a limit of time; `--hypothesis-profile=search` draws others."""
    if importlib.util.find_spec("hypothesis") is None:  # the environments of the app and of training do without it
        return
    from hypothesis import settings

    settings.register_profile("search", deadline=None)
    settings.register_profile("steady", deadline=None, derandomize=True)
    settings.load_profile("steady")


_load_hypothesis_profile()


@pytest.fixture(scope="session")
def shared():
    """The folder of reference data beside the checkout; tests that ask for it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("the reference data beside the checkout is not there")
    return SHARED
