"""Who answers at ``ray.address``, and whether it lets us in. Asked before Ray itself, which would try for minutes.

    RAY_AUTH_TOKEN, or the file RAY_AUTH_TOKEN_PATH ──▶ every Ray process of the job reads it from its environment

The token is never written to a file, nor put on a command line. A private Ray gets one of its own, made for it, so that
other users of the machine cannot give it work; Ray alone would keep one for all in a file of the home directory.
"""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path

from r2vpo.job.settings import ConfigError

ANSWER_S = 5.0
"""Longest wait for an answer (seconds)."""
AUTO_FILE = Path("/tmp/ray/ray_current_cluster")
"""Where `ray start` leaves the address that `auto` stands for."""
CLUSTER_ID = "/ray.rpc.NodeInfoGcsService/GetClusterId"
"""The question that Ray's own client asks first."""
MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


def token_environment(address: str | None) -> dict[str, str]:
    """Variables that make Ray send a token: one of its own for a private Ray, for a cluster the one that was given."""
    if address is None:
        return {MODE: os.environ.get(MODE, "token"), TOKEN: os.environ.get(TOKEN) or secrets.token_hex(32)}
    given = bool(os.environ.get(TOKEN) or os.environ.get(TOKEN_PATH))
    return {MODE: "token"} if given and MODE not in os.environ else {}


def check_cluster(address: str) -> tuple[str, ...]:
    """A sentence if the cluster lets everybody in. ``ConfigError`` if nobody answers at ``address``, or not to us."""
    where = _resolved(address)
    if where is None:
        return ()
    what = f"ray.address={address}"
    try:
        socket.create_connection(where, timeout=ANSWER_S).close()
    except OSError as error:
        raise ConfigError(
            f"{what}: no Ray cluster answers there ({error.strerror or error}); check `ray status`, or set "
            "ray.address=null for a private one"
        ) from None
    if address.startswith("ray://"):
        return ()  # Ray's client port speaks another language
    if _lets_in(where, None):
        return (
            f"{what} asks for no token: whoever reaches its ports can run programs there; start the cluster with "
            f"{MODE}=token (see docs/cluster.md)",
        )
    token = _token(address)
    if token is None:
        raise ConfigError(
            f"{what} asks for a token, and none is given: put the cluster's into the environment as {TOKEN}, or its "
            f"file as {TOKEN_PATH}"
        )
    if not _lets_in(where, token):
        raise ConfigError(f"{what} refuses the token that {TOKEN} or {TOKEN_PATH} gives; take the cluster's own")
    return ()


def _resolved(address: str) -> tuple[str, int] | None:
    """Host and port; None for an ``auto`` that only Ray itself can find."""
    if address == "auto":
        found = os.environ.get("RAY_ADDRESS") or (AUTO_FILE.read_text() if AUTO_FILE.is_file() else "")
        return _resolved(found.strip()) if found.strip() not in ("", "auto") else None
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal() and int(port) < 1 << 16):
        raise ConfigError(f"ray.address={address} is neither `auto` nor HOST:PORT, such as 10.0.0.1:6379")
    return host.strip("[]"), int(port)


def _token(address: str) -> str | None:
    """The token that Ray would send, if it is told one."""
    if os.environ.get(MODE, "token") != "token":
        return None
    if token := os.environ.get(TOKEN):
        return token
    path = Path(os.environ.get(TOKEN_PATH) or Path.home() / ".ray" / "auth_token")
    if TOKEN_PATH not in os.environ and not path.is_file():
        return None
    if TOKEN_PATH not in os.environ and MODE not in os.environ and address != "auto":
        return None  # Ray does not give the token in the home directory to whatever address it is told
    try:
        return path.read_text().strip() or None
    except OSError as error:
        raise ConfigError(f"{TOKEN_PATH}={path} cannot be read: {error.strerror}") from None


def _lets_in(where: tuple[str, int], token: str | None) -> bool:
    """Whether the cluster answers a question that comes with ``token``. ``ConfigError`` if it is no Ray cluster."""
    import grpc  # comes with Ray, without being Ray

    host, port = where
    sent = (("authorization", f"Bearer {token}"),) if token is not None else ()
    with grpc.insecure_channel(f"[{host}]:{port}" if ":" in host else f"{host}:{port}") as channel:
        try:
            channel.unary_unary(CLUSTER_ID)(b"", timeout=ANSWER_S, metadata=sent)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()  # type: ignore[attr-defined]  # every error of a call has one
            if code == grpc.StatusCode.UNAUTHENTICATED:
                return False
            raise ConfigError(
                f"ray.address={host}:{port}: somebody listens there, but does not answer as a Ray cluster does "
                f"({code.name}); name the port of the head's GCS, such as 6379"
            ) from None
    return True
