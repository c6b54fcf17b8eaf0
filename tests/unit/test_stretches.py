"""Stretches are shared out so that each is computed by one process, whatever is there already."""

import random

import pytest

from streamswav.transfer.extraction.stretches import End, Stretch, first_of_each, list_tasks, share_out

SIZES = [10_000, 300, 90_000, 10_000, 0]
COUNTS = [4, 1, 9, 3, 1]  # stretches of each shard


def known(done):
    """The ends of stretches that are there; stretch n begins at byte 100 n."""
    return {Stretch(s, n): End(100 * (n + 1), n == COUNTS[s] - 1) for s, n in done}


def walk(task, count):
    """The stretches that a process computes of a shard with so many, reading as the loader does."""
    number, start = task.begin()
    assert start == 100 * number
    computed = []
    while number < count:
        if task.wants(number):
            computed.append((task.shard, number))
        number += 1
        if not task.wants_from(number):
            break
    return computed


@pytest.mark.parametrize("processes", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_each_stretch_that_is_missing_is_computed_by_one_process(processes, share):
    whole = [(shard, number) for shard, count in enumerate(COUNTS) for number in range(count)]
    for seed in range(20):
        done = {each for each in whole if random.Random(f"{seed} {each}").random() < share}
        tasks = list_tasks(known(done), stops=[None] * len(SIZES))
        shares = share_out(tasks, SIZES, processes=processes)
        assert len(shares) == processes
        computed = [each for own in shares for task in own for each in walk(task, COUNTS[task.shard])]
        assert sorted(computed) == sorted(set(whole) - done)


def test_nothing_is_read_of_shards_that_are_done():
    whole = [(shard, number) for shard, count in enumerate(COUNTS) for number in range(count)]
    assert list_tasks(known(whole), stops=[None] * len(SIZES)) == []
    (task,) = list_tasks(known(set(whole) - {(2, 5)}), stops=[None] * len(SIZES))
    assert task.begin() == (5, 500)
    assert walk(task, COUNTS[2]) == [(2, 5)]
    assert not task.wants_from(6)


def test_many_shards_are_not_read_twice_and_balanced_by_their_bytes():
    sizes = [1000] * 9 + [9000]
    tasks = list_tasks({}, stops=[None] * len(sizes))
    shares = share_out(tasks, sizes, processes=2)
    assert sorted(sum(sizes[task.shard] for task in own) for own in shares) == [9000, 9000]
    assert sorted(task.shard for own in shares for task in own) == list(range(10))


def test_a_limit_is_shared_by_the_shards():
    assert first_of_each(7, 3) == [2, 2, 3]
    assert first_of_each(2, 4) == [0, 1, 0, 1]
    assert first_of_each(None, 2) == [None, None]
    assert [task.shard for task in list_tasks({}, stops=[0, 1, 0, 1])] == [1, 3]
