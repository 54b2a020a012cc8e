"""A private PostgreSQL server on a loopback port: `python postgres_server.py COMMAND...` runs a command beside it.

The command finds its URL in VITNAS_POSTGRES, and can restart the server by `restart`, as its folder is in
VITNAS_POSTGRES_DATA.
"""

from __future__ import annotations

import glob
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def program(name: str) -> str | None:
    """Where `initdb` or `pg_ctl` is; Debian keeps them off the path."""
    found = sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"))
    return shutil.which(name) or (found[-1] if found else None)


def owner() -> str | None:
    """Who runs the server: it refuses root."""
    if os.geteuid():
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def control(data: Path, *words: str) -> None:
    """Let pg_ctl do something with the server of a folder, and wait for it."""
    command = [
        str(program("pg_ctl")),
        "-D",
        str(data),
        "-w",
        "-t",
        "60",
        "-l",
        str(data / "server.log"),
        *words,
    ]
    subprocess.run(command, check=True, user=owner(), stdout=subprocess.DEVNULL, cwd="/")


def restart() -> None:
    """Stop the server at once, as a crash does, and start it again."""
    data = Path(os.environ["VITNAS_POSTGRES_DATA"])
    control(data, "-m", "immediate", "stop")
    control(data, "start")


@contextmanager
def server() -> Iterator[dict[str, str]]:
    """A server with a user that has a password; the environment that leads to it."""
    folder = Path(tempfile.mkdtemp(prefix="vitnas-postgres-"))
    data = folder / "data"
    (folder / "password").write_text("se@cr/et")
    if owner() is not None:
        for path in (folder, folder / "password"):
            shutil.chown(path, owner())
    command = [str(program("initdb")), "-D", str(data), "-U", "vitnas", "-A", "scram-sha-256"]
    command += ["--pwfile", str(folder / "password"), "--no-sync", "-E", "UTF8", "--locale", "C"]
    subprocess.run(command, check=True, user=owner(), stdout=subprocess.DEVNULL, cwd="/")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with open(data / "postgresql.conf", "a") as conf:
        conf.write(f"port = {port}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = ''\n")
        conf.write("max_connections = 200\nfsync = off\n")
    control(data, "start")
    try:
        url = f"postgresql://vitnas@127.0.0.1:{port}/postgres"
        yield {
            "VITNAS_POSTGRES": url,
            "VITNAS_POSTGRES_DATA": str(data),
            "VITNAS_STORAGE_PASSWORD": "se@cr/et",
        }
    finally:
        control(data, "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def main(command: list[str]) -> int:
    """Run a command beside a server."""
    if program("initdb") is None or program("pg_ctl") is None:
        print("NOT CHECKED on PostgreSQL: there is no initdb; install it (apt-get install postgresql).")
        return 0
    with server() as found:
        return subprocess.run(command, env={**os.environ, **found}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
