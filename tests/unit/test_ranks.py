"""The rank runner reports failures and hangs with what every rank was doing."""

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RanksFailed, run_ranks

pytestmark = pytest.mark.thorough


def add_ranks(start):
    total = torch.tensor(float(dist.get_rank() + start))
    dist.all_reduce(total)
    return total.item()


def fail_on_rank_one():
    if dist.get_rank() == 1:
        raise ValueError("planted")
    dist.barrier()


def hang_on_rank_one():
    if dist.get_rank() == 1:
        time.sleep(1000)
    dist.barrier()


def die_on_rank_one():
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def what_rank_sees():
    return os.environ["CUDA_VISIBLE_DEVICES"], "tests.ranks_preload" in sys.modules


def test_more_ranks_than_devices_are_spawned_and_see_none(monkeypatch):
    """A fork of a process that has asked for CUDA devices cannot use them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert run_ranks(what_rank_sees, 2) == [("", False)] * 2
    assert run_ranks(what_rank_sees, 1) == [("5", False)]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"


def test_results_by_rank():
    assert run_ranks(add_ranks, 3, 10) == [33.0] * 3


def test_failure_shows_the_traceback():
    with pytest.raises(RanksFailed, match="planted"):
        run_ranks(fail_on_rank_one, 2)


def test_death_is_a_failure():
    with pytest.raises(RanksFailed, match="exit code 7"):
        run_ranks(die_on_rank_one, 2)


def test_hang_shows_every_stack():
    with pytest.raises(RanksFailed) as caught:
        run_ranks(hang_on_rank_one, 2, timeout_s=8)
    message = str(caught.value)
    assert "did not finish" in message
    assert message.count("hang_on_rank_one") >= 2
