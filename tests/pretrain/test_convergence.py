"""Training on the operators takes the course of training on plain PyTorch, and it learns.

On a CPU the operators are the references, under ``TRITON_INTERPRET=1`` and on a GPU the kernels.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import training_runs as runs

from neobert.pretraining.recipe import Recipe
from neobert.pretraining.run import train
from neobert_kernels import _runtime

Small = Callable[..., Recipe]
STEPS = 100


# Few tokens, for the interpreter's sake.
SMALL = {
    # Padded batches, because plain PyTorch has packed ones only through our attention.
    "batch": {"layout": "padded", "tokens": 16, "max_length": 8, "bins": 1, "mask_rate": 0.3},
    "model": {"hidden_size": 16, "num_attention_heads": 1, "intermediate_size": 24},
}
LARGER = {
    "batch": {"layout": "padded", "tokens": 120, "max_length": 15, "bins": 1, "mask_rate": 0.3},
    "model": {"hidden_size": 32},
}


def course(small: Small, name: str, sizes: dict[str, Any], **settings: Any) -> Any:
    """The losses of 100 steps, and the scores in the end."""
    recipe = small(
        name,
        batch=sizes["batch"],
        model={"num_hidden_layers": 1, **sizes["model"]},
        data={"held_out": 0 if sizes is SMALL else 20},
        schedule={"lr": 2e-2, "warmup": 10, "steps": STEPS},
        log={"every": 1, "evaluate": 0},
        checkpoint={"every": STEPS},
        train=settings,
    )
    scores = train(recipe, quiet=True).scores
    losses = [record["loss"] for record in runs.records(recipe.train.run, "train")]
    return np.array(losses), scores


def test_a_hundred_steps_take_the_same_course(small: Small) -> None:
    plain, _ = course(small, "plain", SMALL, patch=False)
    ours, _ = course(small, "ours", SMALL)
    assert len(ours) == STEPS
    assert np.allclose(ours[:20], plain[:20], rtol=1e-4)
    # Rounding grows from step to step, in any two orders of summation.
    assert np.allclose(ours, plain, rtol=2e-2)


@pytest.mark.skipif(_runtime.INTERPRET, reason="takes minutes in the interpreter")
def test_a_hundred_steps_learn(small: Small) -> None:
    losses, scores = course(small, "ours", LARGER)
    assert losses[-10:].mean() < 0.7 * losses[0]
    assert scores.accuracy > 1.5 * scores.unigram_accuracy


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_hundred_steps_in_bfloat16_take_the_same_course(small: Small) -> None:
    plain, _ = course(small, "plain", LARGER, patch=False, precision="bfloat16")
    ours, scores = course(small, "ours", LARGER, precision="bfloat16")
    assert np.allclose(ours[:10], plain[:10], rtol=2e-2)
    assert ours[-10:].mean() == pytest.approx(plain[-10:].mean(), rel=0.05)
    assert scores.accuracy > 1.5 * scores.unigram_accuracy
