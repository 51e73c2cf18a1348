"""How ranks meet: at the address that is named, and nowhere else."""

from __future__ import annotations

import socket

import psutil
import pytest

from openrlhf_sgpo import ranks


def test_nothing_listens_beyond_this_machine(make_resources):
    make_resources()
    connections = psutil.Process().net_connections("inet")
    listening = {connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN}
    assert "127.0.0.1" in listening <= {"127.0.0.1", "::1"}


def test_several_machines_need_an_address_that_all_reach(monkeypatch):
    for name, value in {"WORLD_SIZE": "4", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match=r"--master_addr 127.0.0.1 is local to this machine: give an address that the other"
    ):
        ranks.listen_where_named()


def test_a_port_that_is_taken_is_a_sentence():
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ValueError, match="Address already in use.*another run has this port.*--master_port"),
    ):
        ranks._store("127.0.0.1", taken.getsockname()[1], is_master=True)


def test_an_error_that_cannot_be_sent_is_said_all_the_same():
    class Local(Exception):  # pickle does not find it
        pass

    assert str(ranks._portable(Local("no luck"))) == "Local: no luck"
    error = OSError(28, "No space left on device", "a file")
    assert ranks._portable(error) is error
