"""Reading ahead: the same items, made while earlier ones are in use; errors and early leavers included."""

import threading
import time

import pytest

from molmo2.video.read_ahead import read_ahead


def counted(made, number=5, error=None):
    for item in range(number):
        made.append(item)
        yield item
    if error is not None:
        raise error


def wait_for(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("It did not come to that within five seconds.")


def test_items_come_in_order():
    assert list(read_ahead(iter(range(100)), 3)) == list(range(100))
    assert list(read_ahead(iter([None, None]), 1)) == [None, None]
    assert list(read_ahead(iter([]), 1)) == []


def test_it_runs_ahead_by_so_many():
    made: list[int] = []
    items = read_ahead(counted(made, 20), 3)
    assert next(items) == 0
    wait_for(lambda: made == [0, 1, 2, 3, 4])  # one read, three wait, one wants to
    time.sleep(0.05)
    assert len(made) == 5
    assert list(items) == list(range(1, 20))


def test_an_error_comes_after_the_items_before_it():
    items = read_ahead(counted([], 2, ValueError("broken")), 5)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(ValueError, match="broken"):
        next(items)


@pytest.mark.parametrize("count", [1, 3])
def test_a_reader_that_leaves_stops_the_thread(count):
    made: list[int] = []
    items = read_ahead(counted(made, 10**6), count)
    next(items)
    items.close()
    found = len(made)
    assert not [thread for thread in threading.enumerate() if thread.name == "molmo2-read-ahead"]
    assert found == len(made) <= count + 2
