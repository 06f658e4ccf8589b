"""A real S3 server for the tests: Ceph RADOS Gateway, run by hand (no systemd) on loopback.

    python tests/s3/server.py install                                          # the packages only; needs root
    python tests/s3/server.py start [--port 17480] [--home DIR] [--install]    # prints the server as JSON
    python tests/s3/server.py stop  [--port 17480] [--home DIR]

Only the installation needs root. One server is three processes (monitor, OSD, gateway) with all their state in HOME.
It takes the ports
PORT to PORT+9, so several can run side by side. `export ACTCACHE_TEST_S3="$(python tests/s3/server.py start)"` makes the tests use it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, NamedTuple

HOST = "127.0.0.1"
PORTS = 10  # S3, monitor, then the OSD's four (and a few to spare)
TIMEOUT = 60.0
PACKAGES = ("ceph-mon", "ceph-osd", "radosgw", "ceph-common")
PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "ceph-authtool", "monmaptool")
# pid file: program, in stopping order
DAEMONS = {"client.rgw.a": "radosgw", "osd.0": "ceph-osd", "mon.a": "ceph-mon"}

CONF_NAME = "actcache-test-s3.conf"  # also the mark of a folder that `start` may replace
CONF = """\
[global]
fsid = {fsid}
mon_host = {monitor}
public_addr = {host}
cluster_addr = {host}
ms_bind_msgr1 = false
ms_bind_port_min = {osd_min}
ms_bind_port_max = {osd_max}
auth_allow_insecure_global_id_reclaim = false
keyring = {home}/keyring
run_dir = {home}/run
pid_file = {home}/run/$name.pid
admin_socket =
crash_dir = {home}/log
log_file = {home}/log/$name.log
log_to_stderr = false
mon_cluster_log_file = {home}/log/cluster.log
# a single copy on a single disk
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pgp_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
mon_data_avail_warn = 1
mon_data_avail_crit = 1

[mon]
mon_data = {home}/mon
paxos_propose_interval = 0.05
paxos_min_wait = 0.01

[osd]
osd_data = {home}/osd
osd_objectstore = bluestore
osd_memory_target = 1Gi
bluestore_block_create = true
bluestore_block_size = 8Gi
bluestore_block_db_create = false
bluestore_block_wal_create = false
osd_class_load_list = *
osd_class_default_list = *

[client.rgw.a]
rgw_frontends = beast endpoint={host}:{port} tcp_nodelay=1
rgw_run_sync_thread = false
rgw_enable_usage_log = false
debug_rgw = 1
"""


class ServerError(RuntimeError):
    """The server could not be installed, started or asked."""


class Key(NamedTuple):
    user: str
    access: str
    secret: str


@dataclass(frozen=True)
class Server:
    home: Path
    endpoint: str
    log: Path
    """The gateway's log. Each request leaves one line with " beast: " in it: user, request line, status, bytes, range."""
    access_key: str = "writerkey"
    secret_key: str = "writersecret"
    reader_key: str = "readerkey"
    reader_secret: str = "readersecret"
    bucket: str = "actcache-test"
    """Owned by the user "writer"; the user "reader" may get and list."""
    public_bucket: str = "actcache-public"
    """Owned by the user "writer"; anybody may get and list."""
    region: str = "us-east-1"

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Server:
        fields = json.loads(text)
        return cls(**{**fields, "home": Path(fields["home"]), "log": Path(fields["log"])})

    def add_user(self, name: str, access: str, secret: str) -> Key:
        """Give the user this key; a user that is not there yet is created (and may do nothing until a policy says so)."""
        admin = ("radosgw-admin", f"--uid={name}", f"--access-key={access}", f"--secret-key={secret}")
        try:
            _run(self.home, *admin, "key", "create", "--key-type=s3")
        except ServerError:
            _run(self.home, *admin, "user", "create", f"--display-name={name}")
        return Key(name, access, secret)

    def remove_key(self, access: str) -> Key:
        """Revoke a key, at once. What comes back is for `restore_key`."""
        info = json.loads(_run(self.home, "radosgw-admin", "user", "info", f"--access-key={access}"))
        secret = next(key["secret_key"] for key in info["keys"] if key["access_key"] == access)
        key = Key(info["user_id"], access, secret)
        _run(self.home, "radosgw-admin", "key", "rm", f"--uid={key.user}", "--key-type=s3", f"--access-key={access}")
        return key

    def restore_key(self, key: Key) -> None:
        self.add_user(*key)

    @contextlib.contextmanager
    def revoked(self, access: str) -> Iterator[None]:
        """Without this key, for the time of a `with` block."""
        key = self.remove_key(access)
        try:
            yield
        finally:
            self.restore_key(key)


def available() -> str | None:
    """None if a server can be started here as things are, else what stands in the way."""
    if importlib.util.find_spec("botocore") is None:
        return "no botocore in this Python"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if not missing:
        return None
    hint = f"not installed: {', '.join(missing)}"
    if (reason := _cannot_install()) is not None:
        return f"{hint}, and cannot be: {reason}"
    return f"{hint}; as root, `python tests/s3/server.py install` or ACTCACHE_TEST_S3_INSTALL=1 installs them"


def _cannot_install() -> str | None:
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    if "debian" not in f"{release.get('ID', '')} {release.get('ID_LIKE', '')}".split() or not shutil.which("apt-get"):
        return "no Debian or Ubuntu with apt-get"
    return None if os.geteuid() == 0 else "not root"


def install() -> None:
    """Install the machine's own Ceph packages, if they are not there (about 60 MB to download)."""
    if available() is None:
        return
    if (reason := _cannot_install()) is not None:
        raise ServerError(f"the Ceph packages cannot be installed: {reason}")
    with tempfile.TemporaryFile("w+") as log:
        for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(
                ["apt-get", "-q", *command],
                check=False,
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            if done.returncode:
                raise ServerError(f"apt-get {command[0]} failed ({done.returncode}):\n{_tail(log)}")
    if (reason := available()) is not None:
        raise ServerError(reason)


def free_port() -> int:
    """A port from which on all those that a server needs are free, below the range of the outgoing connections."""
    for port in random.sample(range(17500, 32000, PORTS), 100):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for number in range(port, port + PORTS):
                stack.enter_context(socket.socket()).bind((HOST, number))
            return port
    raise ServerError("no free ports")


def start(home: Path, port: int) -> Server:
    """Start a new, empty server with all its state in `home`, which is replaced if an earlier server left it."""
    home = home.absolute()
    if (reason := available()) is not None:
        raise ServerError(reason)
    for name in DAEMONS:
        with _process(home, name) as process:
            if process is not None:
                raise ServerError(f"a server runs already in {home}")
    if (home / CONF_NAME).exists():
        shutil.rmtree(home)
    home.mkdir(parents=True, exist_ok=True)
    if any(home.iterdir()):
        raise ServerError(f"{home} is not empty")
    try:
        return _start(home, port)
    except BaseException:
        stop(home)
        raise


def _start(home: Path, port: int) -> Server:
    for name in ("mon", "osd", "log", "run"):
        (home / name).mkdir()
    conf, fsid, monitor = home / CONF_NAME, uuid.uuid4(), f"[v2:{HOST}:{port + 1}]"
    osd_ports = {"osd_min": port + 2, "osd_max": port + PORTS - 1}
    conf.write_text(CONF.format(fsid=fsid, home=home, host=HOST, port=port, monitor=monitor, **osd_ports))
    keyring = home / "keyring"
    keyring.touch(0o600)
    for name, caps in {
        "mon.": {"mon": "allow *"},
        "client.admin": {"mon": "allow *", "osd": "allow *", "mgr": "allow *"},
        "osd.0": {"mon": "allow profile osd", "osd": "allow *", "mgr": "allow profile osd"},
        "client.rgw.a": {"mon": "allow rw", "osd": "allow rwx", "mgr": "allow rw"},
    }.items():
        options = [word for cap in caps.items() for word in ("--cap", *cap)]
        _run(home, "ceph-authtool", str(keyring), "--gen-key", "--name", name, *options)
    _run(home, "monmaptool", "--create", "--fsid", str(fsid), "--addv", "a", monitor, str(home / "monmap"))
    _run(home, "ceph-mon", "-i", "a", "--mkfs", "--monmap", str(home / "monmap"), "--keyring", str(keyring))
    _run(home, "ceph-mon", "-i", "a")
    disk = str(uuid.uuid4())
    _run(home, "ceph", "osd", "new", disk, "0")
    _run(home, "ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
    _run(home, "ceph-osd", "-i", "0")
    server = Server(home, f"http://{HOST}:{port}", home / "log" / "client.rgw.a.log")
    server.add_user("writer", server.access_key, server.secret_key)  # waits for the OSD
    server.add_user("reader", server.reader_key, server.reader_secret)
    _run(home, "radosgw", "-n", "client.rgw.a")
    _wait(server)
    for bucket, principal in {
        server.bucket: {"AWS": ["arn:aws:iam:::user/reader"]},
        server.public_bucket: "*",
    }.items():
        statement = {
            "Effect": "Allow",
            "Principal": principal,
            "Action": ["s3:GetObject", "s3:ListBucket"],
            "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"],
        }
        _put(server, bucket)
        _put(server, f"{bucket}?policy", json.dumps({"Version": "2012-10-17", "Statement": [statement]}))
    return server


def stop(home: Path) -> None:
    """End the processes that `start` started there, and no others. The files stay."""
    home = home.absolute()
    for name in DAEMONS:
        with _process(home, name) as process, contextlib.suppress(ProcessLookupError):
            for number in (signal.SIGTERM, signal.SIGKILL):
                if process is not None:
                    signal.pidfd_send_signal(process, number)
                    if _ended(process):
                        break
        (home / "run" / f"{name}.pid").unlink(missing_ok=True)


@contextlib.contextmanager
def _process(home: Path, name: str) -> Iterator[int | None]:
    """The process named in a pid file, as a file descriptor, if it is indeed the one that was started there."""
    try:
        pid = int((home / "run" / f"{name}.pid").read_text())
        process = os.pidfd_open(pid)
    except (OSError, ValueError):
        yield None
        return
    try:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
        except OSError:
            command = [""]
        ours = Path(command[0]).name == DAEMONS[name] and str(home / CONF_NAME) in command
        yield process if ours and not _ended(process, 0) else None
    finally:
        os.close(process)


def _ended(process: int, timeout: float = 20.0) -> bool:
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def _run(home: Path, program: str, *arguments: str) -> str:
    """Run one of Ceph's programs; daemons go to the background by themselves."""
    conf = [] if program in ("ceph-authtool", "monmaptool") else ["-c", str(home / CONF_NAME)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("CEPH_", "PYTHON", "LD_"))}
    # files, not pipes: a daemon may hold on to them
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        try:
            done = subprocess.run(
                [program, *conf, *arguments],
                check=False,
                cwd=home,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                timeout=TIMEOUT,
            )
        except subprocess.TimeoutExpired as error:
            raise ServerError(f"{program} {' '.join(arguments)}: no end after {TIMEOUT} s\n{_tail(errors)}") from error
        if done.returncode:
            raise ServerError(f"{program} {' '.join(arguments)}: failed ({done.returncode})\n{_tail(errors)}")
        output.seek(0)
        return output.read()


def _tail(log: IO[str]) -> str:
    log.seek(0)
    return "".join(log.readlines()[-20:])


# no proxy, whatever the environment says: the server is on loopback
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _wait(server: Server) -> None:
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            _opener.open(server.endpoint, timeout=TIMEOUT).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                tail = "".join(server.log.read_text().splitlines(keepends=True)[-20:]) if server.log.exists() else ""
                raise ServerError(f"the gateway does not answer: {error}\n{tail}") from error
            time.sleep(0.1)


def _put(server: Server, path: str, body: str = "") -> None:
    from botocore.auth import S3SigV4Auth  # type: ignore[import-untyped, unused-ignore]
    from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped, unused-ignore]
    from botocore.credentials import Credentials  # type: ignore[import-untyped, unused-ignore]

    request = AWSRequest("PUT", f"{server.endpoint}/{path}", data=body.encode())
    S3SigV4Auth(Credentials(server.access_key, server.secret_key), "s3", server.region).add_auth(request)
    headers = {**request.headers, "Content-Type": "application/octet-stream"}
    signed = urllib.request.Request(request.url, body.encode(), headers, method="PUT")
    try:
        _opener.open(signed, timeout=TIMEOUT).close()
    except urllib.error.HTTPError as error:
        raise ServerError(f"PUT {path}: {error}\n{error.read().decode(errors='replace')}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description="A real S3 server (Ceph RADOS Gateway) on loopback, for tests.")
    parser.add_argument("action", choices=["install", "start", "stop"])
    parser.add_argument("--port", type=int, default=17480, help="the first of ten ports (default: %(default)s)")
    parser.add_argument("--home", type=Path, help="where its state is (default: ac-s3-PORT in the temporary folder)")
    parser.add_argument("--install", action="store_true", help="install the packages if they are missing (needs root)")
    options = parser.parse_args()
    home = options.home or Path(tempfile.gettempdir(), f"ac-s3-{options.port}")
    try:
        if options.install or options.action == "install":
            install()
        if options.action == "start":
            print(start(home, options.port).to_json())
        elif options.action == "stop":
            stop(home)
    except ServerError as error:
        sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    main()
