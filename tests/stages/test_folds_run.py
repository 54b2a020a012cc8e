"""A search that scores Archs on several parts of train, each by a supernet that has not seen it."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean

import pytest
from stage_help import refused, words
from torch.utils.data import DataLoader

from vitnas.cli import main
from vitnas.cli.fields import open_run
from vitnas.data import DataConfig, open_data
from vitnas.data.folds import fold
from vitnas.records import Result, TrainedSupernet
from vitnas.searching import SearchRecord
from vitnas.space import autoformer
from vitnas.stages.context import Context
from vitnas.stages.searching import SupernetEvaluator, fold_folder
from vitnas.supernet import Supernet


@pytest.mark.slow
def test_scores_are_of_all_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    changes = {"search__num_trials": "4", "retrain__baselines": "[]", "export__formats": "[]"}
    assert main(words(folder, search__folds="3", **changes)) == 0
    found = SearchRecord.read(folder)
    context = Context(open_run(folder), folder)
    held = len(context.data.holdout)
    assert found.num_images == 3 * held
    with context.searches.open() as study:
        trial = study.scored()[0]
    each = []
    for number in range(3):
        supernet = context.inherited._trained(number)
        other = fold(context.data, number)
        each.append(
            SupernetEvaluator(supernet, context.images.batches(other.holdout))(trial.arch)["accuracy"]
        )
        assert TrainedSupernet.read(fold_folder(folder, number)).spent.learned > 0
    assert len({*each}) > 1, "they are three supernets"
    assert trial.values["accuracy"] == pytest.approx(fmean(each))
    spent = Result.read(folder / "models" / "chosen").spent
    assert spent is not None
    learned = sum(TrainedSupernet.read(fold_folder(folder, number)).spent.learned for number in range(3))
    assert spent.learned > learned > 0
    said = capsys.readouterr().out
    assert set(re.findall(r"on (\d+) held-out images are off by", said)) <= {str(3 * held)}
    assert main(["search", str(folder)]) == 0, "and is done"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"search__folds": "0"}, "search.folds is 0"),
        ({"search__folds": "2", "search__searcher": "halving"}, "this search trains no supernet"),
        ({"search__folds": "2", "sampler__kind": "focus"}, "a sampler learns from one"),
    ],
)
def test_folds_that_cannot_be_are_refused(
    changes: dict[str, str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refused(words(tmp_path / "run", **changes), capsys)
    assert not (tmp_path / "run").exists()


def test_archs_are_scored_on_any_loader() -> None:
    """A DataLoader of held-out images, as well as EvalBatches."""
    data = open_data(DataConfig(dataset="digits", max_images=60))
    supernet = Supernet(autoformer("micro", image_size=8, patch_size=4, in_chans=1, num_classes=10))
    batches, arch = data.holdout.batches(4), supernet.space.smallest()
    pairs = [(image, target) for some in batches for image, target in zip(*some, strict=True)]
    loader = DataLoader(pairs, batch_size=4)  # type: ignore[arg-type]
    assert SupernetEvaluator(supernet, loader)(arch) == SupernetEvaluator(supernet, batches)(arch)
