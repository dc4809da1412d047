"""Settings of all tests."""

import gc
import importlib.util
import sys

import pytest

from support.paths import SHARED
from support.skips import is_allowed, strictness


def _load_hypothesis_profile() -> None:
    """The same examples in every run, without a limit of time; `--hypothesis-profile=search` draws others."""
    if importlib.util.find_spec("hypothesis") is None:  # the environments of the app and of training do without it
        return
    from hypothesis import settings

    settings.register_profile("search", deadline=None)
    settings.register_profile("steady", deadline=None, derandomize=True)
    settings.load_profile("steady")


_load_hypothesis_profile()


def pytest_collection_modifyitems(config, items):
    """Leave out what is for the night, unless `-m` names it."""
    if "nightly" in config.option.markexpr:
        return
    nightly = [item for item in items if item.get_closest_marker("nightly")]
    if nightly:
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]


def pytest_collection_finish():
    """What is there before the tests stays: the collector need not walk through all modules and tests again."""
    gc.collect()
    gc.freeze()


def _without_silent_skips(report):
    """Under MOLMO2_STRICT a skip fails unless its reason is on the list."""
    if report.skipped and not hasattr(report, "wasxfail") and strictness():
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not is_allowed(reason, strictness()):
            report.outcome = "failed"
            report.longrepr = (
                f"MOLMO2_STRICT: skipped, which is not allowed here: {reason}\n"
                "Make the test run, or add the reason to tests/support/skips.py."
            )
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return _without_silent_skips((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return _without_silent_skips((yield))


@pytest.fixture(scope="session")
def shared():
    """The folder of reference data beside the checkout; tests that ask for it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("the reference data beside the checkout is not there")
    return SHARED


@pytest.fixture(scope="module", autouse=True)
def auto_classes_stay_as_they_are():
    """`molmo2.register()` in the process of the tests would change what the Auto classes give to all that follow."""
    yield
    auto = sys.modules.get("transformers.models.auto.configuration_auto")
    registered = auto and auto.CONFIG_MAPPING._extra_content.get("molmo2")
    assert not registered, "a test of this module called molmo2.register(); run it in a process of its own"


@pytest.fixture(scope="module", autouse=True)
def torch_keeps_its_threads():
    """More threads than processors wait for each other: a second becomes ten, in all tests that follow."""
    torch = sys.modules.get("torch")
    before = torch and torch.get_num_threads()
    yield
    assert torch is None or torch.get_num_threads() <= before, "a test of this module left torch more threads"
