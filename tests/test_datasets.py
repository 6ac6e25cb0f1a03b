"""Data: fixed, stratified, disjoint splits in one form."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from sdlab.data.datasets import load_dataset
from sdlab.data.pixels import resize, to_model, to_uint8
from sdlab.errors import BadInput
from sdlab.settings import Settings


def digits(**more):
    return load_dataset(Settings.from_mapping({"experiment": "x", "dataset": "digits", "image_size": 8} | more))


def test_digits_are_the_real_scans_split_1000_297_500():
    data, scans = digits(), load_digits()
    assert [len(s) for s in data.splits.values()] == [1000, 297, 500]
    together = np.concatenate([s.images[:, 0].reshape(len(s), -1) for s in data.splits.values()])
    original = np.round(scans.data * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, together)) == sorted(map(bytes, original))  # every scan once: the splits are disjoint


def test_splits_are_stratified():
    data, share = digits(), np.bincount(load_digits().target) / 1797
    for split in data.splits.values():
        assert np.abs(np.bincount(split.labels) / len(split) - share).max() < 0.005


def test_splits_are_fixed():
    """A result is compared with others of the same split: this hash may not change without notice."""
    assert digits().fingerprint() == digits().fingerprint()
    assert digits().fingerprint()[:12] == "6f69c8aab75f"


def test_majority_line():
    data = digits()
    assert data.majority_share("test") == max(data.counts()["test"]) / 500


def test_unknown_names_are_refused():
    with pytest.raises(BadInput, match="Did you mean `digits`"):
        digits(dataset="digit")


def test_pixels_survive_the_way_to_the_model_and_back():
    images = digits().train.images[:20]
    assert np.array_equal(to_uint8(to_model(images, 8), 8), images)
    assert to_model(images, 32).shape == (20, 3, 32, 32)
    assert to_model(images, 32).min() >= -1 and to_model(images, 32).max() <= 1


def test_kept_images_are_contiguous():
    """safetensors writes a numpy array's memory, whatever its strides say."""
    import torch

    channels_last = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    assert to_uint8(channels_last, 8).flags["C_CONTIGUOUS"]
    assert np.array_equal(to_uint8(channels_last, 8), to_uint8(channels_last.contiguous(), 8))


def test_resizing_is_bilinear_without_antialiasing():
    """Two pixels' mean where a factor of four shrinks: the others are not looked at."""
    image = np.zeros((1, 3, 8, 8), np.uint8)
    image[..., 0, 0] = 200  # a corner that bilinear sampling at 1.5 never sees
    assert resize(image, 2).max() == 0


def test_bicubic_resizing_keeps_more_and_stays_in_range():
    images = digits().train.images[:200]
    there = {how: to_model(images, 32, how) for how in ("bilinear", "bicubic")}
    lost = {how: np.abs(to_uint8(pixels, 8, how).astype(int) - images).mean() for how, pixels in there.items()}
    assert lost["bicubic"] < lost["bilinear"] / 5
    assert there["bicubic"].min() == -1 and there["bicubic"].max() == 1  # it overshoots, and is cut
    assert np.array_equal(to_uint8(there["bilinear"], 8), to_uint8(there["bilinear"], 8, "bilinear"))


def test_the_classifiers_size_can_differ_from_the_scans():
    assert digits(image_size=16).train.images.shape == (1000, 3, 16, 16)
