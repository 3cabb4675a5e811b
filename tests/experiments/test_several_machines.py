"""A sweep over two machines by their addresses: two hosts of the kernel's own, joined by a cable.

Each has a network namespace (its own addresses and ports) and a name; Ray is started on both as
docs/launchers.md says, with one GPU that it is told of. Needs root and `ip` (Debian's iproute2).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIRST, SECOND = ("10.203.114.1", "10.203.114.2")


def run(*command: str, **settings) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, check=True, **settings)


class Machine:
    """A namespace with one address; `start` runs a command there, under the machine's own name."""

    def __init__(self, name: str, interface: str, address: str) -> None:
        self.name, self.interface, self.address = name, interface, address
        run("ip", "netns", "add", name)

    def connect(self) -> None:
        run("ip", "link", "set", self.interface, "netns", self.name)
        inside = ("ip", "-n", self.name)
        run(*inside, "addr", "add", f"{self.address}/24", "dev", self.interface)
        run(*inside, "link", "set", "lo", "up")
        run(*inside, "link", "set", self.interface, "up")

    def start(self, *command: str, **settings) -> subprocess.CompletedProcess:
        named = ("sh", "-c", 'hostname "$0" && exec "$@"', self.name, *command)
        return run("ip", "netns", "exec", self.name, "unshare", "--uts", *named, **settings)

    def remove(self) -> None:
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True, check=False)


@pytest.fixture
def machines():
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "hostname"))):
        pytest.skip("needs root, and ip, unshare and hostname, to make hosts of its own")
    number = os.getpid() % 100_000
    made: list[Machine] = []
    try:
        ends = (f"va{number}", f"vb{number}")
        try:
            for letter, end, address in zip("ab", ends, (FIRST, SECOND), strict=True):
                made.append(Machine(f"machine-{letter}-{number}", end, address))
            run("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for machine in made:
                machine.connect()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"the kernel makes no hosts here: {error.stderr.strip()}")
        yield made
    finally:
        for machine in made:
            machine.remove()


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_sweep_by_addresses(machines, tiny, tmp_path):
    pytest.importorskip("ray")
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    first, second = machines
    (tmp_path / "token").write_text("0123456789abcdef" * 4)
    environment = {
        **{key: value for key, value in os.environ.items() if "proxy" not in key.lower()},
        "PYTHONPATH": str(ROOT),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # else whatever else is tested goes first
        # Ray asks its token of whoever joins a cluster, and the mode must be said on each machine.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
    }
    environment.pop("OMP_NUM_THREADS", None)
    ray = [str(Path(sys.executable).with_name("ray"))]
    resources = [
        "--num-cpus=1", "--num-gpus=1", "--object-store-memory=100000000",
        # Neither an autoscaler nor what carries logs to the driver: processes of Python each.
        "--no-monitor", "--include-log-monitor=false",
    ]  # fmt: skip
    head = f"{FIRST}:6379"
    settings = {"env": environment, "cwd": tmp_path, "timeout": 240}
    # Sockets have short names: a test's own folder can be too deep for them.
    scratch = Path("/tmp") / f"ray-{os.getpid()}"
    try:
        first.start(
            *ray, "start", "--head", "--port=6379", f"--node-ip-address={FIRST}",
            "--include-dashboard=false", f"--temp-dir={scratch}", *resources, **settings,
        )  # fmt: skip
        second.start(
            *ray, "start", f"--address={head}", f"--node-ip-address={SECOND}", *resources,
            **settings,
        )  # fmt: skip
        first.start(
            sys.executable, "-m", "experiments.train", "-m", *tiny, "init=kaiming,olora",
            "hydra/launcher=ray", f"hydra.launcher.ray.init.address={head}",
            "hydra.launcher.ray.remote.num_gpus=1", "hydra.launcher.ray.remote.num_cpus=1",
            **settings,
        )  # fmt: skip
    finally:
        for machine in (second, first):
            pids = run("ip", "netns", "pids", machine.name).stdout.split()
            subprocess.run(["kill", "-9", *pids], capture_output=True, check=False)
        shutil.rmtree(scratch, ignore_errors=True)
    paths = (tmp_path / "outputs" / "runs").glob("*/result.json")
    found = [json.loads(path.read_text()) for path in paths]
    assert sorted(run["method"] for run in found) == ["kaiming", "olora"]
    assert {run["environment"]["host"] for run in found} == {first.name, second.name}
    assert {run["environment"]["visible_devices"] for run in found} == {"0"}
