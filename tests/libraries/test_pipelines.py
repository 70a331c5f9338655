"""transformers' pipelines on patched models, several texts at a time."""

import numpy as np
import pytest
import torch
import transformers as tf
from encoders import ENCODERS, randomized
from texts import TEXTS, tokenizer

import neobert_kernels as nk

FITTING = [text for text in TEXTS if text and len(text) < 60]
MASKED = ["a [MASK] c", "hello wor[MASK]d", "the cat sat on the [MASK]at."]
TASKS = {
    "fill-mask": ("mlm", MASKED, {}),
    "text-classification": ("sequence", FITTING, {"top_k": None}),
    "token-classification": ("token", FITTING, {}),
    "question-answering": ("question", [], {}),
}
QUESTIONS = {
    "question": ["who", "where"],
    "context": ["the cat sat", "the dog ran to the yard and the house."],
}


def build(task, family, kind):
    model = ENCODERS[family].base() if kind == "base" else ENCODERS[family].head(kind)
    return tf.pipeline(task, model=randomized(model), tokenizer=tokenizer(family), device="cpu")


def leaves(value):
    """``(numbers, everything else)`` of a nested result, in order."""
    numbers, others = [], []

    def walk(node):
        if isinstance(node, dict):
            walk(list(node.items()))
        elif isinstance(node, (list, tuple)):
            for item in node:
                walk(item)
        elif isinstance(node, (float, np.floating)):
            numbers.append(float(node))
        else:
            others.append(node)

    walk(value)
    return torch.tensor(numbers), others


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("task", TASKS)
def test_predictions_are_those_of_the_unpatched_pipeline(family, task):
    from transformers.pipelines import PIPELINE_REGISTRY

    kind, texts, options = TASKS[task]
    if task not in PIPELINE_REGISTRY.get_supported_tasks():
        pytest.skip(f"transformers {tf.__version__} has no {task} pipeline")
    if not ENCODERS[family].has(kind):
        pytest.skip(f"{family} has no such head")
    run = build(task, family, kind)
    arguments = ((texts,), options) if texts else ((), QUESTIONS)
    expected = leaves(run(*arguments[0], **arguments[1], batch_size=3))
    nk.patch(run.model)
    actual = leaves(run(*arguments[0], **arguments[1], batch_size=3))
    assert len(actual[0])
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
    assert actual[1] == expected[1]


@pytest.mark.parametrize("family", ENCODERS)
def test_features_of_real_tokens_are_those_of_the_unpatched_pipeline(family):
    """The pipeline returns padding's vectors too: those of a patched model are zero."""
    run = build("feature-extraction", family, "base")
    expected = run(FITTING, batch_size=len(FITTING))
    nk.patch(run.model)
    actual = run(FITTING, batch_size=len(FITTING))
    for text, one, other in zip(FITTING, actual, expected, strict=True):
        real = len(run.tokenizer(text)["input_ids"])
        a, b = torch.tensor(one[0]), torch.tensor(other[0])
        assert a.shape == b.shape
        assert not a[real:].any()
        assert (a[:real] - b[:real]).abs().max() <= 1e-5 * b.abs().max()
