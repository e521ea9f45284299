from __future__ import annotations

import socket

import pytest

from infra.local import ports


@pytest.fixture
def listener():
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        yield server.getsockname()[1]


def test_a_port_with_a_listener_is_not_free(listener):
    assert not ports.is_free(listener)


def test_a_port_bound_on_all_interfaces_is_not_free():
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.bind(("", 0))
        server.listen(1)
        assert not ports.is_free(server.getsockname()[1])


def test_a_free_preferred_port_is_chosen():
    port = ports.choose_any(())
    assert ports.choose(port, ()) == port


def test_a_taken_port_moves_to_a_free_neighbour(listener):
    chosen = ports.choose(listener, ())
    assert chosen != listener
    assert ports.is_free(chosen)


def test_a_port_promised_to_another_server_is_not_chosen():
    port = ports.choose_any(())
    assert ports.choose(port, {port}) != port


def test_no_port_beyond_the_last():
    assert 0 < ports.choose(65535, {65535}) < 65535
