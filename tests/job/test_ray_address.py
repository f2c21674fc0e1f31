"""Who answers at ``ray.address``: a real gRPC server, which asks for a token as Ray's GCS does."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from r2vpo.job import ray_address
from r2vpo.job.ray_address import check_cluster, token_environment
from r2vpo.job.settings import ConfigError

TOKEN = "the-token-of-this-cluster"


class Head(grpc.GenericRpcHandler):
    """Answers the question for the cluster's id, to everybody or to those with the token."""

    def __init__(self, token: str | None) -> None:
        self.token = token

    def service(self, details):
        if details.method != ray_address.CLUSTER_ID:
            return None
        return grpc.unary_unary_rpc_method_handler(self.answer)

    def answer(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        sent = dict(context.invocation_metadata()).get("authorization")
        if self.token is not None and sent != f"Bearer {self.token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return b""


def serve(*heads: Head) -> tuple[grpc.Server, str]:
    server = grpc.server(ThreadPoolExecutor(2), handlers=heads)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, f"127.0.0.1:{port}"


@pytest.fixture(autouse=True)
def _no_token_from_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(ray_address, "AUTO_FILE", tmp_path / "ray_current_cluster")


@pytest.fixture
def guarded() -> Iterator[str]:
    server, address = serve(Head(TOKEN))
    yield address
    server.stop(None)


@pytest.fixture
def open_to_all() -> Iterator[str]:
    server, address = serve(Head(None))
    yield address
    server.stop(None)


def test_a_cluster_that_wants_a_token_gets_the_one_in_the_environment(guarded, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert check_cluster(guarded) == ()
    assert token_environment(guarded) == {"RAY_AUTH_MODE": "token"}, "without the mode Ray would not send it"


def test_or_the_one_in_the_file_that_the_environment_names(guarded, monkeypatch, tmp_path):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert check_cluster(guarded) == ()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"RAY_AUTH_TOKEN_PATH=.*none cannot be read: No such file"):
        check_cluster(guarded)


def test_without_a_token_it_is_said_how_to_give_one(guarded):
    with pytest.raises(ConfigError, match=f"ray.address={guarded} asks for a token, and none is given: put the"):
        check_cluster(guarded)
    assert token_environment(guarded) == {}


def test_a_wrong_token_is_refused_without_being_repeated(guarded, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-another-cluster")
    with pytest.raises(ConfigError, match="refuses the token that RAY_AUTH_TOKEN") as caught:
        check_cluster(guarded)
    assert "of-another-cluster" not in str(caught.value)


def test_the_token_in_the_home_directory_goes_where_ray_itself_would_send_it(guarded, monkeypatch, tmp_path):
    (tmp_path / "home" / ".ray").mkdir(parents=True)
    (tmp_path / "home" / ".ray" / "auth_token").write_text(TOKEN)
    with pytest.raises(ConfigError, match="none is given"):
        check_cluster(guarded)
    (tmp_path / "ray_current_cluster").write_text(guarded)
    assert check_cluster("auto") == ()
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert check_cluster(guarded) == ()


def test_a_cluster_that_lets_everybody_in_is_pointed_out(open_to_all):
    [note] = check_cluster(open_to_all)
    assert "asks for no token: whoever reaches its ports can run programs there" in note


def test_nobody_who_answers_is_said_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ConfigError, match=f"ray.address={address}: no Ray cluster answers there .Connection refused"):
        check_cluster(address)


def test_somebody_else_is_no_cluster():
    server, address = serve()
    with pytest.raises(ConfigError, match=r"does not answer as a Ray cluster does \(UNIMPLEMENTED\)"):
        check_cluster(address)
    server.stop(None)


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:port", "head:99999", "ray://head"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ConfigError, match=r"is neither `auto` nor HOST:PORT"):
        check_cluster(address)


def test_an_automatic_address_that_nobody_left_is_for_ray_to_find():
    assert check_cluster("auto") == ()


def test_every_private_ray_has_a_token_of_its_own(monkeypatch):
    one, two = token_environment(None), token_environment(None)
    assert one["RAY_AUTH_MODE"] == two["RAY_AUTH_MODE"] == "token"
    assert len(one["RAY_AUTH_TOKEN"]) == 64
    assert one["RAY_AUTH_TOKEN"] != two["RAY_AUTH_TOKEN"]
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert token_environment(None)["RAY_AUTH_MODE"] == "disabled"
