"""Measurement: the clock of latencies, peak memory, and the machine that they ran on."""

from vitnas.measure.environment import environment, fingerprint, git_commit
from vitnas.measure.latency import Latency, LatencyMeter, measure_latency
from vitnas.measure.memory import peak_activation_bytes, peak_process_bytes
from vitnas.measure.target import LatencyTarget, parse_target

__all__ = [
    "Latency",
    "LatencyMeter",
    "LatencyTarget",
    "environment",
    "fingerprint",
    "git_commit",
    "measure_latency",
    "parse_target",
    "peak_activation_bytes",
    "peak_process_bytes",
]
