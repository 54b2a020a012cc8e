"""What `benchmarks/gpu.sh` needs on a machine without a network, as files that can be carried there.

    python benchmarks/gpu_pack.py [--data FOLDER] [--train 50000] [--test 5000] [--weights FILE.safetensors] [--wheels]

Into `.gpu/` go: data/, as many images of CIFAR-10's parquet files; weights.safetensors in float16; wheels/ of the
packages that an image with PyTorch may lack, for Python 3.12 on Linux. What is not asked for is left as it is.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

WHEELS = (
    "alembic colorlog datasets dill jsonargparse mako multiprocess optuna plotly sqlalchemy timm torch-pruning"
).split()


def pack_data(source: Path, target: Path, counts: dict[str, int]) -> None:
    """The first images of each split; their order is random."""
    import pyarrow.parquet as parquet

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for split, count in counts.items():
        table = parquet.read_table(source / f"{split}.parquet").slice(0, count)
        # JPEG does not shrink again, and dictionaries of bytes that differ only cost.
        parquet.write_table(table, target / f"{split}.parquet", compression="none", use_dictionary=False)


def pack_wheels(target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    platforms = [f"--platform={name}_x86_64" for name in ("manylinux2014", "manylinux_2_28")]
    command = [
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version=3.12",
        *platforms,
    ]
    subprocess.run([sys.executable, *command, "-d", str(target), *WHEELS], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path)
    parser.add_argument("--train", type=int, default=50_000)
    parser.add_argument("--test", type=int, default=5_000)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--wheels", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(".gpu"))
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    if options.data:
        pack_data(options.data, options.out / "data", {"train": options.train, "test": options.test})
    if options.weights:
        state = {name: tensor.half() for name, tensor in load_file(options.weights).items()}
        save_file(state, options.out / "weights.safetensors")
    if options.wheels:
        pack_wheels(options.out / "wheels")
    for path in sorted(options.out.iterdir()):
        size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")))
        print(f"{path}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
