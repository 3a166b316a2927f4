"""The nodes of a SLURM step: their names, the port where its ranks meet, and the way from one to another."""

import contextlib
import datetime
import fcntl
import socket
import struct
import subprocess
import time
from collections.abc import Mapping

FIRST_PORT = 20_000
NUM_PORTS = 20_000
SIOCGIFADDR = 0x8915
STOP_BEFORE_S = 120.0


def life(environ: Mapping[str, str]) -> str:
    """Which life of which job this is: "JOB.RESTARTS"; empty outside of a job."""
    return f"{environ['SLURM_JOB_ID']}.{environ.get('SLURM_RESTART_COUNT', '0')}" if "SLURM_JOB_ID" in environ else ""


def num_tasks(environ: Mapping[str, str]) -> str:
    """The ranks of this srun step. SLURM_NTASKS is the allocation's, where the step is an interactive shell."""
    return environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))


def seconds_to_stop(environ: Mapping[str, str]) -> float | None:
    """Seconds until this job should save and stop, DP4TL_STOP_BEFORE_S ahead of its limit; None without a limit."""
    end = environ.get("SLURM_JOB_END_TIME", "")
    try:
        if "SLURM_JOB_ID" in environ and not end:  # SLURM before 23.02 does not tell
            line = ["squeue", "--noheader", "--jobs", environ["SLURM_JOB_ID"], "--format", "%e"]
            told = subprocess.run(line, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
            end = str(datetime.datetime.fromisoformat(told).timestamp())
        return float(end) - time.time() - float(environ.get("DP4TL_STOP_BEFORE_S", STOP_BEFORE_S)) if end else None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None  # there is no limit, or SLURM's own signal tells of it


def slurm_port(environ: Mapping[str, str]) -> int:
    """A port keyed by job, step and restart count, so that a requeued job never meets its former self."""
    job, step = int(environ["SLURM_JOB_ID"]), int(environ["SLURM_STEP_ID"])
    restarts = int(environ.get("SLURM_RESTART_COUNT", "0"))
    return FIRST_PORT + (job * 37 + step * 7 + restarts) % NUM_PORTS


def expand_nodes(text: str) -> list[str]:
    """The hosts that a SLURM node list names: "a[1-3,7],b" -> a1 a2 a3 a7 b."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text + ","):
        depth += (char == "[") - (char == "]")
        if char == "," and depth == 0:
            parts.append((text + ",")[start:i])
            start = i + 1
    hosts = []
    for part in parts:
        head, bracket, rest = part.partition("[")
        if not bracket:
            hosts.append(part)
            continue
        inner, _, tail = rest.partition("]")
        for item in inner.split(","):
            low, _, high = item.partition("-")
            for number in range(int(low), int(high or low) + 1):
                hosts += [head + str(number).zfill(len(low)) + end for end in expand_nodes(tail) or [""]]
    return [host for host in hosts if host] if text else []


def peer_node(environ: Mapping[str, str]) -> str:
    """Another node of this srun step: the first, or for its own ranks the second. Empty where there is one alone."""
    nodes = expand_nodes(environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_NODELIST", "")))
    return nodes[int(environ.get("SLURM_NODEID", "0")) == 0] if len(nodes) > 1 else ""


def interface_towards(host: str) -> str:
    """The network interface that packets to `host` leave by; empty where that cannot be told.

    gloo takes the one that the machine's own name resolves to, which is often the loopback.
    """
    if not host:
        return ""
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, 9, socket.AF_INET, socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # of a datagram socket: nothing is sent
            own = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):  # an interface without an address
                    request = struct.pack("256s", name.encode()[:15])
                    if socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24]) == own:
                        return name
    except OSError:
        return ""
    return ""
