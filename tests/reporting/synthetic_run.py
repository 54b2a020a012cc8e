"""A finished run folder made of invented numbers, for tests of the report. File contents are dummies."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from vitnas.arch import Arch, Block, Stage
from vitnas.runs import write_atomic, write_json

# Text that a page must escape, as a data set could carry it.
NASTY = "</script><script>window.injected=1</script><b>cats & dogs</b>"


def make_arch(depth: int = 12, embed_dim: int = 192, seed: int = 0) -> Arch:
    """An AutoFormer-like Arch with differing blocks."""
    rng = random.Random(seed)
    blocks = tuple(
        Block(
            num_heads=(heads := rng.choice((3, 4))),
            head_dim=64,
            mlp_hidden=int(embed_dim * rng.choice((3, 3.5, 4))),
        )
        for _ in range(depth)
    )
    assert heads
    return Arch(
        image_size=64,
        patch_size=8,
        in_chans=3,
        num_classes=10,
        stages=(Stage(embed_dim=embed_dim, blocks=blocks),),
    )


def make_run_folder(path: Path, *, num_trials: int = 300, num_pairs: int = 8, depth: int = 12) -> Path:
    """Write every file that the report reads and return `path`."""
    rng = random.Random(1)
    archs = [make_arch(max(1, depth - 2 + i % 4), 192 if i % 2 else 216, seed=i) for i in range(6)]
    chosen = make_arch(depth)
    write_json(path / "manifest.json", _manifest())
    write_json(
        path / "test_reads.json",
        [{"when": "2026-03-02T10:04:00", "num_images": 360, "purpose": "final report"}],
    )
    write_atomic(path / "run.yaml", "recipe: digits\n")
    genes = [{"name": "depth", "options": [10, 11, 12]}]
    genes += [{"name": f"blocks.{i}.num_heads", "options": [3, 4]} for i in range(4)]
    write_json(path / "space.json", {"name": "autoformer", "genes": genes})
    write_json(path / "feasibility.json", _feasibility())
    write_atomic(path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in _metrics(rng)))
    write_json(path / "search.json", _search(rng, archs, chosen, num_trials))
    for arch in [*archs, chosen]:
        _model(path / "front" / arch.id, arch)
    _models(path, archs, chosen)
    _export(path)
    write_json(path / "correlation.json", _correlation(rng, archs, chosen, num_pairs))
    write_json(path / "results.json", _results(archs, chosen))
    for name in ("supernet.safetensors", "study.db"):
        write_atomic(path / name, b"\0" * 40_000)
    return path


def _manifest() -> dict[str, Any]:
    return {
        "vitnas": "0.1.0",
        "python": "3.12.3",
        "torch": "2.15.0",
        "timm": "1.0.31",
        "host": {"cpu": "Some CPU @ 2.0GHz", "cores": 2, "gpu": None, "os": "Linux"},
        "seed": 0,
        "git": None,
        "data": {
            "name": NASTY,
            "counts": {"train": [126] * 10, "holdout": [18] * 10, "test": [36] * 10},
            "sha256": "0f" * 32,
            "corrupt": 0,
            "classes": ["0", "1", "<i>2</i>"],
        },
        "command": "vitnas run digits budget='macs<=1.3G and params<=6M' seed=0",
        "started": "2026-03-02T10:00:00+00:00",
    }


def _feasibility() -> list[dict[str, Any]]:
    return [
        {
            "quantity": "macs",
            "unit": "MACs",
            "space_min": 4.1e8,
            "space_max": 2.1e9,
            "requested": "macs<=1.3G",
            "share_feasible": 0.42,
            "n": 10000,
            "note": "",
        },
        {
            "quantity": "params",
            "unit": "",
            "space_min": 2.9e6,
            "space_max": 1.1e7,
            "requested": "params<=6M",
            "share_feasible": 0.37,
            "n": 10000,
            "note": "",
        },
        {
            "quantity": "all",
            "unit": "",
            "space_min": None,
            "space_max": None,
            "requested": "both",
            "share_feasible": 0.31,
            "n": 10000,
            "note": "95 % CI 30.1-31.9 %",
        },
    ]


def _metrics(rng: random.Random) -> list[dict[str, Any]]:
    total, lines = 1500, []
    for step in range(total):
        share = step / total
        lines.append(
            {
                "stage": "supernet",
                "step": step,
                "epoch": 60 * share,
                "images_per_s": 900.0,
                "loss": 2.3 * math.exp(-4 * share) + 0.12 + rng.gauss(0, 0.05),
                "lr": 1e-3 * min(1, share / 0.08) * 0.5 * (1 + math.cos(math.pi * share)),
            },
        )
        if step % 150 == 149:
            archs = [
                {
                    "role": role,
                    "arch_id": f"{role}-{top}",
                    "macs": 1_000_000,
                    "accuracy": top * (1 - math.exp(-5 * share)),
                }
                for role, top in (
                    ("smallest", 0.90),
                    ("middle", 0.94),
                    ("largest", 0.96),
                    ("random", 0.93),
                    ("random", 0.92),
                )
            ]
            lines.append(
                {"stage": "supernet", "event": "monitor", "step": step, "epoch": 60 * share, "archs": archs},
            )
    text = "the largest Arch is 0.4 points better than ten epochs ago; the Supernet has not converged."
    lines.append({"stage": "supernet", "event": "warning", "step": total, "epoch": 60.0, "text": text})
    for role, start in (("chosen", 0.9), ("hand_scaled", 2.3), ("random_search", 1.0)):
        for step in range(200):
            share = step / 200
            line = {"stage": f"retrain/{role}", "step": step, "epoch": 20 * share, "lr": 5e-4 * (1 - share)}
            lines.append({**line, "loss": start * math.exp(-3 * share) + 0.1 + rng.gauss(0, 0.03)})
            if step % 20 == 19:
                lines.append(
                    {**line, "event": "eval", "accuracy": 0.98 - 0.15 * start * math.exp(-4 * share)}
                )
    return lines


def _search(rng: random.Random, archs: list[Arch], chosen: Arch, num_trials: int) -> dict[str, Any]:
    trials = []
    for number in range(num_trials):
        macs = rng.uniform(0.5e9, 1.3e9)
        accuracy = 0.90 + 0.05 * (macs / 1.3e9) ** 0.7 + rng.gauss(0, 0.006) + 0.01 * number / num_trials
        trials.append(
            {
                "number": number,
                "arch_id": f"d192-l11-{number:08x}",
                "genes": [1, 0, 1, 0, 1],
                "values": {"accuracy": accuracy, "macs": macs},
                "costs": {"macs": macs, "params": int(macs / 220), "memory": 2_000_000},
                "state": "scored",
                "reasons": [],
                "generation": number // 50,
            }
        )
    trials += [
        {
            "number": num_trials + i,
            "arch_id": f"r{i}",
            "genes": [],
            "values": {},
            "costs": {},
            "state": "rejected",
            "reasons": ["macs"],
            "generation": 0,
        }
        for i in range(5)
    ]
    front: list[str] = []
    best = -1.0
    for trial in sorted(trials[:num_trials], key=lambda t: t["values"]["macs"]):
        if trial["values"]["accuracy"] > best:
            best = trial["values"]["accuracy"]
            front.append(trial["arch_id"])
    last = next((t for t in trials if front and t["arch_id"] == front[-1]), None)
    if last is not None:
        last["arch_id"] = front[-1] = chosen.id
        last["costs"] = {"macs": 1_281_000_000, "params": 5_912_000, "memory": 2_210_000, "latency_ms": 7.4}
        last["values"]["macs"] = 1_281_000_000
    return {
        "objectives": [
            {"name": "accuracy", "direction": "maximize"},
            {"name": "macs", "direction": "minimize"},
        ],
        "budget": "macs<=1.3G and params<=6M",
        "num_scored": num_trials,
        "num_rejected": 161,
        "rejections": {"macs are above 1.3G": 120, "params are above 6M": 41},
        "trials": trials,
        "front": front,
        "chosen": chosen.id,
        "seconds": 48.2,
        "hypervolume": [[n, 0.62 * (1 - math.exp(-n / 60))] for n in range(1, num_trials + 1, 3)],
    }


def _model(folder: Path, arch: Arch) -> None:
    write_json(folder / "arch.json", arch.to_json())
    write_json(folder / "config.json", {"architecture": "vitnas"})
    write_atomic(folder / "model.safetensors", b"\0" * 20_000)


def _models(path: Path, archs: list[Arch], chosen: Arch) -> None:
    numbers = (
        ("chosen", chosen, 352, 1_281_000_000, 5_912_000),
        ("hand_scaled", archs[1], 344, 1_290_000_000, 5_600_000),
        ("random_search", archs[2], 348, 1_250_000_000, 5_800_000),
    )
    for role, arch, correct, macs, params in numbers:
        _model(path / "models" / role, arch)
        write_json(
            path / "models" / role / "result.json",
            {
                "role": role,
                "arch_id": arch.id,
                "macs": macs,
                "params": params,
                "memory_bytes": 2_210_000,
                "holdout_accuracy": 0.98,
                "test_accuracy": correct / 360,
                "n_test": 360,
                "epochs": 20,
                "seconds": 31.0,
                "from": "scratch" if role == "hand_scaled" else "inherited",
                "supernet_accuracy": None if role == "hand_scaled" else 0.962,
            },
        )


def _export(path: Path) -> None:
    write_atomic(path / "export" / "model.onnx", b"\0" * 90_000)
    write_atomic(path / "export" / "model.pt2", b"\0" * 91_000)
    write_json(
        path / "export" / "export.json",
        {
            "onnx": {
                "path": "export/model.onnx",
                "opset": 20,
                "exported_params": 5_912_000,
                "max_abs_diff": 3.1e-6,
                "top1_agreement": 1.0,
                "n_images": 64,
                "params": 5_912_000,
            },
            "torch_export": {
                "path": "export/model.pt2",
                "max_abs_diff": 0.0,
                "top1_agreement": 1.0,
                "n_images": 64,
                "params": 5_912_000,
            },
            "timm": {
                "path": "models/chosen",
                "max_abs_diff": 0.0,
                "top1_agreement": 1.0,
                "n_images": 64,
                "params": 5_912_000,
            },
        },
    )
    rows = []
    for runtime in ("onnxruntime", "torch"):
        for batch, median in ((1, 7.41), (32, 181.0)):
            rows.append(
                {
                    "runtime": runtime,
                    "device": "Some CPU @ 2.0GHz",
                    "batch": batch,
                    "threads": 1,
                    "dtype": "float32",
                    "warmup": 10,
                    "runs": 50,
                    "median_ms": median,
                    "p05_ms": median * 0.96,
                    "p95_ms": median * 1.25,
                    "p25_ms": median * 0.98,
                    "p75_ms": median * (1.04 if batch == 1 else 1.14),
                    "ratio_to_reference": 0.81,
                    "trusted": batch == 1,
                }
            )
    write_json(path / "export" / "latency.json", {"rows": rows})


def _correlation(rng: random.Random, archs: list[Arch], chosen: Arch, num_pairs: int) -> dict[str, Any]:
    points = []
    for i in range(num_pairs):
        arch_id = chosen.id if i == 0 else f"{archs[i % len(archs)].id}-{i}"
        score = 0.93 + 0.004 * i
        points.append(
            {
                "arch_id": arch_id,
                "macs": 1_200_000_000,
                "supernet_accuracy": score,
                "trained_accuracy": score + 0.02 + rng.gauss(0, 0.004),
            }
        )
    return {
        "n": num_pairs,
        "kendall_tau": 0.714,
        "spearman": 0.833,
        "how": "Each was trained for 5 epochs.",
        "points": points,
    }


def _results(archs: list[Arch], chosen: Arch) -> dict[str, Any]:
    rows = []
    for role, arch, latency in (
        ("chosen", chosen, 7.41),
        ("hand_scaled", archs[1], 7.3),
        ("random_search", archs[2], 7.2),
    ):
        rows.append(
            {
                "name": role,
                "arch_id": arch.id,
                "latency_ms": {"median_ms": latency, "p10_ms": latency - 0.2, "p90_ms": latency + 0.4},
            }
        )
    return {"rows": rows, "files": {}, "chosen": chosen.id}


def read(path: Path) -> Any:
    """Read JSON, for tests that change one file of the folder."""
    return json.loads(path.read_text())
