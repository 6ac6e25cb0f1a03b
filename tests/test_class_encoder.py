"""The Class-Encoder: affine, nothing else, and a diffusers model."""

import pytest
import torch

from sdlab.class_encoder import ClassEncoder, ClassTable


def test_it_is_affine_and_shaped_as_told():
    encoder = ClassEncoder(4, tokens=6, width=10, hidden=20)
    torch.nn.init.normal_(encoder.linear_in.bias)
    a, b = torch.randn(2, 4), torch.randn(2, 4)
    assert encoder(a).shape == (2, 6, 10)
    torch.testing.assert_close(encoder(a) + encoder(b), encoder(a + b) + encoder(torch.zeros(2, 4)))
    assert encoder.linear_out.bias is None


def test_full_size_has_39_million_parameters():
    """docs/method.md, item 19: 77 x 1024 for SD 2.0."""
    assert ClassEncoder(10).num_parameters() == 10 * 500 + 500 + 500 * 77 * 1024 == 39_429_500


def test_the_null_condition_begins_as_zeros():
    assert not ClassEncoder(4, 6, 10, 20).table()[-1].any()


def test_its_table_answers_the_same_in_a_fraction_of_the_numbers(tmp_path):
    """0.9 M numbers instead of 39.4 M for ten classes of SD 2.0's condition."""
    encoder = ClassEncoder(4, 6, 10, 20)
    encoder.tabulated().save_pretrained(tmp_path)
    assert torch.equal(encoder.table(), ClassTable.from_pretrained(tmp_path).table())
    assert ClassTable(10).num_parameters() == 11 * 77 * 1024


def test_saved_and_loaded(tmp_path):
    encoder = ClassEncoder(4, 6, 10, 20)
    encoder.save_pretrained(tmp_path)
    assert torch.equal(encoder.table(), ClassEncoder.from_pretrained(tmp_path).table())


def test_effective_rank():
    """C - 1 for classes in equally many equally long directions, 1 if they differ along one line."""
    encoder = ClassEncoder(4, tokens=1, width=8, hidden=4)
    with torch.no_grad():
        encoder.linear_in.weight.copy_(torch.eye(4))
        encoder.linear_out.weight.copy_(torch.eye(8, 4))
        assert encoder.tabulated().effective_rank() == pytest.approx(3, abs=1e-4)
        encoder.linear_out.weight.copy_(torch.outer(torch.arange(8.0), torch.arange(4.0)))
        assert encoder.tabulated().effective_rank() == pytest.approx(1, abs=1e-4)
