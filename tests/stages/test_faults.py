"""Full disks, damaged files, bad images, missing parts: one sentence, status 2, and nothing that was good is lost."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from pretrain_help import pretrain_words
from slim_help import ARCH, save, slim_words
from stage_help import Warm, refused, words

from vitnas.cli import main
from vitnas.data.images import Store
from vitnas.errors import UserError
from vitnas.exporting.card import CARD, Card, write_card
from vitnas.model import build
from vitnas.records import Manifest, Results
from vitnas.runs import append_jsonl, write_atomic
from vitnas.searching import SearchRecord
from vitnas.stages import results
from vitnas.supernet import Supernet
from vitnas.train import loop
from vitnas.train.checkpoint import load_checkpoint

SHORT = {
    "search__num_trials": "2",
    "retrain__baselines": "[]",
    "retrain__rank_archs": "0",
    "export__formats": "[]",
    "export__latency": "[]",
}


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A finished run that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own, that can be filled."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", mount], capture_output=True)
    if done.returncode:
        pytest.skip("NOT CHECKED on a real full disk: this user may not mount one.")
    yield mount
    subprocess.run(["umount", "--lazy", mount], check=True)


def fill(disk: Path) -> Path:
    """Write until nothing fits."""
    ballast = disk / "ballast"
    with open(ballast, "wb", buffering=0) as stream:
        for size in (65536, 4096, 1):
            try:
                while True:
                    stream.write(b"\0" * size)
            except OSError:
                continue
    return ballast


def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_goes_on(
    disk: Path, finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = disk / "run"
    save, calls = loop.save_checkpoint, []

    def save_and_fill(path: Path, *rest: object) -> None:
        calls.append(path)
        if len(calls) == 4:
            fill(disk)
        save(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "save_checkpoint", save_and_fill)
    error = refused(words(folder), capsys)
    assert "cannot be written" in error
    assert "No space left" in error
    assert "free space" in error
    _, meta = load_checkpoint(folder / "checkpoints" / "supernet.safetensors")
    assert meta["step"] == 3
    assert not list(folder.rglob(".*")), "what was written in part is taken away"
    assert "No space left" in refused(words(folder), capsys), "still full"
    (disk / "ballast").unlink()
    monkeypatch.undo()
    assert main(["train", str(folder)]) == 0
    assert (folder / "supernet.safetensors").read_bytes() == (finished / "supernet.safetensors").read_bytes()


def test_a_full_disk_in_the_search_is_one_sentence(
    disk: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = disk / "run"
    folder.mkdir()
    for name in ("run.yaml", "supernet.safetensors"):
        shutil.copy(finished / name, folder)
    ballast = fill(disk)
    assert "study.db" in refused(["search", str(folder)], capsys)
    ballast.unlink()
    assert main(["search", str(folder)]) == 0
    assert SearchRecord.read(folder).chosen == SearchRecord.read(finished).chosen


def test_a_read_only_disk_is_one_sentence(
    disk: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, disk / "run")
    (disk / "run" / "supernet.safetensors").unlink()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert "Read-only file system" in refused(words(disk / "run"), capsys)
    assert "Read-only file system" in refused(words(disk / "other"), capsys)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"data__image_size": "100000"}, "image_size is 100000; a side must be at most 32768 pixels."),
        ({"data__batch_size": "1000000000"}, "batch_size is 1000000000; it must be at most 1048576."),
        ({"space__num_heads": f"[{'9' * 30}]"}, "an option is at most 1,000,000. Give smaller ones."),
        ({"space__embed_dims": "[800000]", "budget": ""}, "GiB at the least, and cpu has"),
    ],
)
def test_what_no_machine_holds_is_refused_before_it_begins(
    fields: dict[str, str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(words(tmp_path / "run", **fields), capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "argv",
    [
        lambda folder: words(folder, data__image_size="1040"),
        lambda folder: slim_words(save(build(ARCH), folder.parent / "net"), folder),
        lambda folder: pretrain_words(folder, data__image_size="1040"),
        lambda folder: pretrain_words(folder, model="vit_tiny_patch16_224", data__image_size="1040"),
        lambda folder: pretrain_words(folder, model="resnet10t", data__image_size="1040"),
    ],
    ids=["run", "slim", "pretrain", "pretrain a ViT", "pretrain another"],
)
def test_images_too_large_are_refused_before_any_is_read(
    argv: Callable[[Path], list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = argv(tmp_path / "run")
    small = psutil.virtual_memory()._replace(total=10**5)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: small)
    monkeypatch.setattr(Store, "load", lambda *_: pytest.fail("images were read"))
    assert "GiB at the least, and cpu has" in refused(given, capsys)
    assert not (tmp_path / "run").exists()


def test_a_size_too_large_to_go_on_at_is_refused(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = psutil.virtual_memory()._replace(total=10**5)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: small)
    said = refused(["finetune", str(finished), "image_size=1040"], capsys)
    assert "batches of 2 images of 1040 pixels needs" in said
    assert not (finished / "models" / "chosen-1040px").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 15 GiB"
        ),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_names_what_to_lower_and_keeps_the_last_checkpoint(
    error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, forward, calls = tmp_path / "run", Supernet.forward, []

    def fails_late(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > 4:
            raise error
        return forward(*args, **options)

    monkeypatch.setattr(Supernet, "forward", fails_late)
    argv = words(folder, **SHORT, supernet__monitor_every="0")
    said = refused(argv, capsys)
    assert "too little memory" in said
    assert "Lower data.batch_size (supernet.accumulate and retrain.train.accumulate make up for it)" in said
    assert ("the accelerator" in said) == isinstance(error, torch.OutOfMemoryError)
    _, meta = load_checkpoint(folder / "checkpoints" / "supernet.safetensors")
    assert meta["step"] >= 3
    assert not (folder / "run.lock").exists()
    monkeypatch.setattr(Supernet, "forward", forward)
    assert main(["train", str(folder)]) == 0


@pytest.fixture
def own_warm(tmp_path: Path) -> Iterator[Warm]:
    """A server of commands whose surroundings a test may change."""
    server = Warm(tmp_path / "log.txt")
    yield server
    server.close()


NOWHERE = "/proc/nowhere"  # not even root can make a folder there
HOMES: dict[str, str | None] = {"HOME": NOWHERE, "XDG_CACHE_HOME": NOWHERE, "XDG_CONFIG_HOME": NOWHERE, "TMPDIR": None,
         "TORCH_HOME": NOWHERE, "HF_HOME": NOWHERE, "MPLCONFIGDIR": NOWHERE,
         "SCIKIT_LEARN_DATA": NOWHERE}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("home", [NOWHERE, None])
def test_a_user_without_a_home_or_caches_can_run_all(
    home: str | None, own_warm: Warm, tmp_path: Path
) -> None:
    own_warm.environment = {**HOMES, "HOME": home}
    argv = words(
        tmp_path / "run", **{**SHORT, "export__formats": "[onnx]", "export__latency": "[onnxruntime]"}
    )
    own_warm.run(argv)
    assert "Traceback" not in own_warm.log.read_text()
    assert Results.read(tmp_path / "run").rows


def test_more_workers_than_open_files_let_work_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (95, 95))
    said = refused(words(tmp_path / "run", data__workers="2"), capsys)
    assert "data.workers is 2 where this process may open 95 files; so many need 96. Raise the limit" in said


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_too_few_open_files_are_one_sentence_and_the_run_goes_on(
    workers: str, own_warm: Warm, tmp_path: Path
) -> None:
    argv = words(tmp_path / "run", **SHORT, data__workers=workers)
    statuses = []
    for limit in (10, 12, 15, 20):
        process = own_warm.start(argv)
        resource.prlimit(process, resource.RLIMIT_NOFILE, (limit, limit))
        statuses.append(int(own_warm._line()))
        said = " ".join(own_warm.log.read_text().split())
        if statuses[-1]:
            assert said.count("vitnas: ") == 1, said
            assert "Raise the limit (`ulimit -n 4096`)" in said
            assert "Traceback" not in said
    assert statuses[0] == 2
    assert set(statuses) <= {0, 2}
    own_warm.run(argv)
    assert Results.read(tmp_path / "run").rows


@pytest.mark.slow
def test_what_ends_between_the_two_records_of_a_test_leaves_both_to_be_made(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("results.json", "test_scores.json", "evaluation.json"):
        (copy / name).unlink()
    with monkeypatch.context() as patched:
        patched.setattr(results, "examine", lambda *given, **more: (_ for _ in ()).throw(MemoryError))
        assert "too little memory" in refused(["evaluate", str(copy)], capsys)
    assert main(["evaluate", str(copy)]) == 0
    assert (copy / "evaluation.json").exists()


def test_a_file_where_the_folder_should_be_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    error = refused(words(tmp_path / "file"), capsys)
    assert f"{tmp_path}/file is a file. Give another folder" in error
    assert "is not a folder" in refused(["train", str(tmp_path / "file")], capsys)


def test_permissions_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root reads everything, so the refusal is made up."""

    def denied(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", denied)
    assert f"{tmp_path}: Permission denied" in refused(["train", str(tmp_path)], capsys)


def half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path: Path) -> None:
    """One bit of the last tensor."""
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def garbage(path: Path) -> None:
    path.write_bytes(b"\x93\x00garbage" * 500)


def empty_json(path: Path) -> None:
    path.write_text("{}")


def bad_line(path: Path) -> None:
    path.write_text("{}\nnone\n{}\n")


DAMAGES: list[tuple[str, Callable[[Path], None], tuple[str, ...], str]] = [
    ("run.yaml", garbage, ("supernet.safetensors",), "cannot be read as YAML"),
    ("run.yaml", lambda path: path.write_text("seed: ["), (), "cannot be read as YAML"),
    ("feasibility.json", half, (), "cannot be read"),
    ("supernet.safetensors", half, ("search.json",), "delete it and run `vitnas train` again"),
    ("supernet.safetensors", garbage, ("search.json",), "delete it and run `vitnas train` again"),
    ("supernet.safetensors", flip, ("search.json",), "its bytes are not those that were written"),
    (
        "checkpoints/supernet.safetensors",
        flip,
        ("supernet.safetensors",),
        "its bytes are not those that were written",
    ),
    ("models/chosen/model.safetensors", flip, ("export",), "its bytes are not those that were written"),
    ("chosen.json", half, (), "chosen.json cannot be read"),
    ("correlation.json", half, (), "correlation.json cannot be read"),
    ("ranking.json", half, (), "ranking.json cannot be read"),
    ("results.json", half, (), "results.json cannot be read"),
    ("study.db", garbage, ("models", "search.json"), "study.db"),
    ("study.db", half, ("models", "search.json"), "study.db"),
    ("search.json", half, ("models",), "cannot be read"),
    ("search.json", empty_json, ("models",), "Delete it to make it anew"),
    (
        "checkpoints/supernet.safetensors",
        half,
        ("supernet.safetensors",),
        "Delete it to start that stage anew",
    ),
    (
        "metrics.jsonl",
        bad_line,
        ("supernet.safetensors",),
        "Delete the bad lines",
    ),
    ("models/chosen/model.safetensors", half, ("export", "results.json"), "models/chosen"),
    ("models/chosen/result.json", half, ("results.json",), "cannot be read"),
]


@pytest.mark.parametrize(
    ("name", "damage", "missing", "remedy"),
    DAMAGES,
    ids=[f"{name}-{i}" for i, (name, *_) in enumerate(DAMAGES)],
)
def test_a_damaged_file_is_named_with_its_remedy(
    name: str,
    damage: Callable[[Path], None],
    missing: tuple[str, ...],
    remedy: str,
    copy: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`missing` is taken away, so that the damaged file is needed again."""
    for other in missing:
        path = copy / other
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    damage(copy / name)
    error = refused(words(copy), capsys)
    assert Path(name).name in error or name.rpartition("/")[0] in error
    assert remedy in error


def test_a_card_that_is_no_text_is_named(tmp_path: Path) -> None:
    """Its licence is looked up before a card is written anew."""
    garbage(tmp_path / CARD)
    with pytest.raises(UserError, match=r"README\.md cannot be read .* must be text. Delete it"):
        write_card(tmp_path, Card(title="a title", about="of it"))


def test_a_study_that_was_deleted_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "study.db").unlink()
    shutil.rmtree(copy / "models")
    assert "the study does not hold" in refused(["retrain", str(copy)], capsys)


def test_a_line_of_metrics_cut_short_is_taken_away(copy: Path) -> None:
    """A kill may cut the last line; glued to the next it would spoil the file."""
    path = copy / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"stage": "supernet", "st')
    for name in ("supernet.safetensors", "checkpoints/supernet.safetensors"):
        (copy / name).unlink()
    assert main(["train", str(copy)]) == 0
    lines = path.read_text().splitlines()
    assert len(lines) == len(whole.splitlines())
    assert all(line.endswith("}") for line in lines)


def test_a_loss_that_is_no_number_ends_the_run_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = words(tmp_path / "run", supernet__lr="1e20", supernet__clip_grad="null", supernet__ema="null")
    error = refused(argv, capsys)
    assert "the loss of Arch" in error
    assert "The weights are those before this step" in error
    _, meta = load_checkpoint(tmp_path / "run" / "checkpoints" / "supernet.safetensors")
    assert meta["step"] >= 1
    assert not (tmp_path / "run" / "supernet.safetensors").exists()


def picture(path: Path, rng: np.random.Generator, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (rng.integers(0, 60, (8, 8)) + shade).astype(np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of grey 8x8 pictures, in train and test."""
    rng, root = np.random.default_rng(0), tmp_path / "pictures"
    for split, count in (("train", 40), ("test", 10)):
        for shade, name in ((0, "dark"), (180, "light")):
            for number in range(count):
                picture(root / split / name / f"{number}.png", rng, shade)
    return root


def on(pictures: Path, folder: Path, **changes: str) -> list[str]:
    return words(folder, data__dataset=str(pictures), data__max_images="null", **{**SHORT, **changes})


def test_corrupt_pictures_are_named_and_the_run_finishes(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    half(pictures / "train" / "dark" / "7.png")
    garbage(pictures / "train" / "light" / "9.png")
    half(pictures / "test" / "light" / "3.png")
    assert main(on(pictures, tmp_path / "run")) == 0
    assert "2 of 80 images cannot be read and are skipped" in caplog.text
    corrupt = Manifest.read(tmp_path / "run").data.corrupt
    assert sorted(Path(name).name for name in corrupt) == ["7.png", "9.png"]
    assert Results.read(tmp_path / "run").rows[0].n_test == 19
    assert "7.png cannot be read" in refused(on(pictures, tmp_path / "no", data__on_corrupt="raise"), capsys)
    assert not (tmp_path / "no" / "run.yaml").exists()


def test_bad_folders_are_refused_before_any_work(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused(on(tmp_path / "empty", tmp_path / "run"), capsys)
    (pictures / "test" / "light").rename(pictures / "test" / "bright")
    assert "bright" in refused(on(pictures, tmp_path / "run"), capsys)
    for split in ("train", "test"):
        for other in ("light", "bright"):
            shutil.rmtree(pictures / split / other, ignore_errors=True)
    assert "class" in refused(on(pictures, tmp_path / "run"), capsys)
    assert not (tmp_path / "run").exists()


def test_missing_parts_say_what_to_install(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    for module in ("optuna_dashboard", "torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "datasets" else found(name, *rest)
    )
    assert "pip install 'vitnas[dashboard]'" in refused(["dashboard", str(copy)], capsys)
    for tracker in ("tensorboard", "wandb"):
        error = refused(words(tmp_path / "new", trackers=f"[{tracker}]"), capsys)
        assert tracker in error
        assert "pip install 'vitnas[track]'" in error
    error = refused(words(tmp_path / "new", data__dataset="hfds/cifar10"), capsys)
    assert "pip install 'vitnas[data]'" in error
    assert not (tmp_path / "new" / "run.yaml").exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no disk can be mounted: the file system says so when it flushes."""
    import os

    from vitnas.errors import UserError

    path = tmp_path / "file.json"
    write_atomic(path, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"file\.json cannot be written \(No space left on device\)"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="cannot be written"):
        append_jsonl(path / "metrics.jsonl", {})
