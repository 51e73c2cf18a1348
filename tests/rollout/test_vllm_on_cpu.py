"""What CPU engines get from this machine."""

import os

import pytest

from openrlhf_sgpo.rollout.vllm_on_cpu import threads_of


@pytest.mark.parametrize(("cores", "engines", "threads"), [(2, 1, "2"), (8, 3, "2"), (2, 4, "1")])
def test_engines_share_the_cores(cores, engines, threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads_of(engines) == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads_of(engines) == "5"
