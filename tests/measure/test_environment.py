"""The environment names the machine; its fingerprint ignores what changes from run to run."""

import json
import subprocess
from pathlib import Path

import torch

from vitnas.measure import environment, fingerprint, git_commit


def test_environment_is_json_and_names_versions_and_cpu() -> None:
    found = json.loads(json.dumps(environment()))
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 2**20
    for name in ("vitnas", "python", "timm", "onnx", "onnxruntime", "optuna", "os", "cpu"):
        assert isinstance(found[name], str)
        assert found[name]
    assert (found["gpu"] is None) == (not torch.cuda.is_available())


def test_fingerprint_follows_the_machine_and_not_the_moment() -> None:
    here = environment()
    assert fingerprint(here) == fingerprint({**here, "threads": 99, "memory_bytes": 1, "optuna": "0"})
    assert fingerprint(here) != fingerprint({**here, "cpu": "another"})
    assert fingerprint(here) != fingerprint({**here, "onnxruntime": "0"})


def test_git_commit_is_none_outside_and_marks_changes(tmp_path: Path) -> None:
    assert git_commit(tmp_path / "missing") is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert git_commit(tmp_path) is None
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    commit = git_commit(tmp_path)
    assert commit is not None
    assert len(commit) == 40
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == f"{commit}-dirty"
