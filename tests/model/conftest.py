"""What the model tests share: published folders, and a ragged batch with its exact results."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import neobert_oracle as oracle
import pytest
import torch
from neobert_oracle import Shape
from transformers.utils import logging

import neobert

logging.disable_progress_bar()

LENGTHS = (9, 16, 1, 5)


@pytest.fixture(scope="session")
def weights() -> dict[str, torch.Tensor]:
    return oracle.draw(Shape())


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, torch.Tensor]) -> Path:
    """A NeoBERT checkpoint in the published form: config.json, model.safetensors, vocab.txt."""
    return oracle.write(tmp_path_factory.mktemp("published"), Shape(), weights)


@pytest.fixture(scope="session")
def head_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The same for any head: "none", "lm", "classes" or "answer"."""
    root = tmp_path_factory.mktemp("heads")
    return lambda head: oracle.write(root / head, Shape(), oracle.draw(Shape(), head))


@pytest.fixture
def model(folder: Path) -> neobert.NeoBERTForMaskedLM:
    return neobert.NeoBERTForMaskedLM.from_pretrained(folder).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    """``[4, 16]`` tokens, padded with 0 on the right; lengths 9, 16, 1 and 5."""
    ids = torch.randint(1, Shape().vocab, (len(LENGTHS), max(LENGTHS)))
    for row, length in zip(ids, LENGTHS, strict=True):
        row[length:] = 0
    return ids


@pytest.fixture
def mask(ids: torch.Tensor) -> torch.Tensor:
    return (ids != 0).long()


@pytest.fixture
def packed(ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    """The same documents end to end, as `forward` takes them."""
    ends = torch.tensor(LENGTHS).cumsum(0)
    return {
        "input_ids": ids[mask.bool()][None],
        "cu_seq_lens_q": torch.cat([torch.zeros(1), ends]).int(),
        "max_length_q": max(LENGTHS),
    }


@pytest.fixture
def exact(
    weights: dict[str, torch.Tensor], ids: torch.Tensor, mask: torch.Tensor
) -> dict[str, Any]:
    """What the padded batch gives in float64."""
    return oracle.forward(weights, Shape(), ids, mask)


@pytest.fixture
def rounded(
    weights: dict[str, torch.Tensor], ids: torch.Tensor, mask: torch.Tensor
) -> dict[str, Any]:
    """The oracle's arithmetic in float32: the measure of the error budget."""
    return oracle.forward(weights, Shape(), ids, mask, torch.float32)
