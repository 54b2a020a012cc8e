"""The comparison that every export ends with: it must notice differences."""

import copy

import pytest
import torch
from export_help import images, tiny_timm
from torch import Tensor, nn

from vitnas.errors import UserError
from vitnas.exporting import ExportError, compare, verify
from vitnas.exporting.verify import example_images


def test_equal_logits_pass_and_the_record_says_on_what() -> None:
    model = tiny_timm()
    agreement = verify(model, copy.deepcopy(model).eval(), images(9), name="a copy", real_images=True)
    assert agreement.passed
    assert agreement.max_abs_diff == 0
    assert agreement.top1_agreement == 1
    assert agreement.to_json()["batch_sizes"] == [1, 3, 5]
    assert agreement.n_images == 9
    assert model.training


def test_a_single_image_is_repeated_to_fill_two_batch_sizes() -> None:
    model = tiny_timm()
    agreement = verify(model, copy.deepcopy(model).eval(), images(1), name="a copy", real_images=True)
    assert agreement.batch_sizes == (1, 3)


def test_one_changed_weight_fails() -> None:
    model = tiny_timm()
    changed = copy.deepcopy(model).eval()
    with torch.no_grad():
        changed.blocks[0].mlp.fc1.weight[0, 0] += 1.0
    with pytest.raises(
        ExportError,
        match=r"a copy differs from the Model by .* on 4 images \(top-1 agreement .*%\); the tolerance",
    ):
        verify(model, changed, images(4), name="a copy", real_images=True)


def test_a_run_that_works_only_for_one_batch_size_fails() -> None:
    model = tiny_timm()
    right = copy.deepcopy(model).eval()

    def run(batch: Tensor) -> Tensor:
        return right(batch) if len(batch) == 1 else right(batch).flip(0)

    with pytest.raises(ExportError, match="differs from the Model"):
        verify(model, run, images(6), name="a file", real_images=True)
    assert verify(model, run, images(6), name="a file", real_images=True, dynamic_batch=False).passed


def test_the_tolerance_grows_with_large_logits_only() -> None:
    want = torch.tensor([[1000.0, 1.0]])
    assert compare(want, want + 0.05, tolerance=1e-4).passed
    assert not compare(want / 1000, want / 1000 + 0.05, tolerance=1e-4).passed
    assert compare(want, want.flip(1), tolerance=1e-4).top1_agreement == 0


def test_values_that_are_not_finite_never_pass() -> None:
    want = torch.tensor([[1.0, 2.0]])
    assert not compare(want, torch.tensor([[1.0, torch.nan]]), tolerance=1e9).passed
    model = tiny_timm()
    with torch.no_grad():
        model.head.bias[0] = torch.inf
    with pytest.raises(ExportError, match=r"logits are not finite"):
        verify(model, copy.deepcopy(model).eval(), images(4), name="a copy", real_images=True)


def test_another_shape_is_named() -> None:
    with pytest.raises(ExportError, match=r"output has shape \(1, 3\); the Model's has \(1, 2\)"):
        compare(torch.zeros(1, 2), torch.zeros(1, 3), tolerance=1)


def test_images_are_checked_and_noise_is_admitted() -> None:
    model = tiny_timm()
    noise, real = example_images(model, None)
    assert noise.shape == (8, 3, 16, 16)
    assert not real
    assert example_images(model, images(2))[1]
    for bad in (images(1)[0], images(0), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)):
        with pytest.raises(UserError, match=r"images have shape .* at least one preprocessed float image"):
            example_images(model, bad)
    with pytest.raises(UserError, match=r"Linear does not say which images it takes"):
        example_images(nn.Linear(1, 1), None)
