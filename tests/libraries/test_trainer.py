"""The Trainer on a patched model: the unpatched model's curve, columns, metrics and checkpoints."""

import copy
import inspect

import pytest
import torch
import transformers as tf
from encoders import ENCODERS
from texts import TEXTS, tokenizer

import neobert_kernels as nk

# A head that divides by the Trainer's number of labels, and one that does not.
with_and_without_items = pytest.mark.parametrize("family", ["bert", "neobert"])
STEPS = 4


class Rows(torch.utils.data.Dataset):
    """Tokenized texts, every second token of each a label, and a column no model takes."""

    def __init__(self, family):
        self.rows = []
        for text in [text for text in TEXTS if text] * 3:
            row = dict(tokenizer(family)(text, truncation=True))
            ids = row["input_ids"]
            row["labels"] = [id if i % 2 else -100 for i, id in enumerate(ids)]
            self.rows.append(row | {"length": len(ids)})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return dict(self.rows[i])


def trainer(model, family, path, collate=None, callbacks=None, model_init=None, **options):
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    rows = Rows(family)
    return tf.Trainer(
        model=model,
        args=tf.TrainingArguments(output_dir=str(path), **(defaults | options)),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collate or tf.DataCollatorForTokenClassification(tokenizer(family)),
        callbacks=callbacks,
        model_init=model_init,
    )


def curve(run, **options):
    run.train(**options)
    assert run.state.global_step == STEPS
    return torch.tensor([entry["loss"] for entry in run.state.log_history if "loss" in entry])


def assert_same_curve(actual, expected, rtol=1e-5):
    assert len(actual) == len(expected) == STEPS
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=0)


OPTIONS = [
    {"gradient_accumulation_steps": 2},
    {"gradient_checkpointing": True},
    {"label_smoothing_factor": 0.1},
    {"bf16": True},
]


@pytest.mark.parametrize(
    ("family", "options"),
    [(family, {}) for family, encoder in ENCODERS.items() if encoder.has("mlm")]
    + [(family, options) for family in ("bert", "neobert") for options in OPTIONS],
    ids=str,
)
def test_training_follows_the_unpatched_model(family, options, tmp_path):
    model = ENCODERS[family].head("mlm")
    expected = curve(trainer(copy.deepcopy(model), family, tmp_path, **options))
    nk.patch(model)
    actual = curve(trainer(model, family, tmp_path, **options))
    assert_same_curve(actual, expected, 1e-3 if "bf16" in options else 1e-5)


@with_and_without_items
def test_columns_that_the_model_does_not_take_are_removed(family, tmp_path):
    model = ENCODERS[family].head("mlm")
    nk.patch(model)
    run = trainer(model, family, tmp_path)
    (batch, *_) = run.get_train_dataloader()
    taken = inspect.signature(type(model).forward).parameters
    assert set(batch) == (set(tokenizer(family).model_input_names) | {"labels"}) & set(taken)


@with_and_without_items
def test_evaluation_has_logits_and_the_same_loss(family, tmp_path):
    model = ENCODERS[family].head("mlm")
    expected = trainer(copy.deepcopy(model), family, tmp_path).predict(Rows(family))
    nk.patch(model)
    actual = trainer(model, family, tmp_path).predict(Rows(family))
    assert actual.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-5)
    labelled = torch.tensor(expected.label_ids) != -100
    logits = [torch.tensor(each.predictions)[labelled] for each in (actual, expected)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


@with_and_without_items
def test_a_checkpoint_resumes_and_loads_unpatched(family, tmp_path):
    model = ENCODERS[family].head("mlm")
    saving = {"save_strategy": "steps", "save_steps": 2, "seed": 3}
    start = copy.deepcopy(model)
    nk.patch(model)
    whole = curve(trainer(model, family, tmp_path, **saving))
    nk.patch(start)
    run = trainer(start, family, tmp_path, **saving)
    checkpoint = tmp_path / "checkpoint-2"
    assert_same_curve(curve(run, resume_from_checkpoint=str(checkpoint)), whole)
    run.save_model(str(tmp_path / "final"))
    for folder, trained in ((tmp_path / "final", start), (tmp_path / "checkpoint-4", start)):
        loaded = type(model).from_pretrained(folder)
        assert "forward" not in vars(loaded)
        state = trained.state_dict()
        assert all(torch.equal(value, state[k]) for k, value in loaded.state_dict().items())


def is_patched(model):
    return any("_neobert_kernels_options" in vars(module) for module in model.modules())


class Watch(tf.TrainerCallback):
    """Whether the model was patched, at every event."""

    def __init__(self):
        self.seen = {}

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def look(*args, model=None, **kwargs):
            self.seen.setdefault(name, set()).add(is_patched(model))

        return look


@with_and_without_items
@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=str)
def test_the_callback_trains_a_patched_model_and_hands_back_a_plain_one(
    family, precision, tmp_path
):
    """Twice: mixed precision leaves a wrapper around the model's forward after the first time."""
    model = ENCODERS[family].head("mlm")
    plain = trainer(copy.deepcopy(model), family, tmp_path / "plain", **precision)
    options = precision | {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps"}
    watch, callback = Watch(), nk.PatchCallback(labelled_rows_only=True)
    run = trainer(model, family, tmp_path, callbacks=[callback, watch], eval_steps=2, **options)
    assert is_patched(model)
    assert set(callback.report.families.values()) == {family}
    tolerance = 1e-3 if precision else 1e-5
    for _ in range(2):
        expected, actual = (curve(each) for each in (plain, run))
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=0)
        assert not is_patched(model)
        losses = [each.evaluate()["eval_loss"] for each in (run, plain)]
        assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    assert watch.seen["on_train_end"] == {False}
    assert watch.seen["on_evaluate"] == {True, False}  # while it trained, and afterwards
    assert watch.seen["on_step_end"] == watch.seen["on_save"] == {True}
    state = type(model).from_pretrained(tmp_path / "checkpoint-4").state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_callback_resumes_a_checkpoint(tmp_path):
    model = ENCODERS["bert"].head("mlm")
    saving = {"save_strategy": "steps", "save_steps": 2, "seed": 3}
    start = copy.deepcopy(model)
    whole = curve(trainer(model, "bert", tmp_path, **saving))
    run = trainer(start, "bert", tmp_path, callbacks=[nk.PatchCallback()], **saving)
    assert_same_curve(curve(run, resume_from_checkpoint=str(tmp_path / "checkpoint-2")), whole)
    assert not is_patched(start)


class Interrupt(tf.TrainerCallback):
    armed = True

    def on_step_end(self, *args, **kwargs):
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt


def test_the_callback_goes_on_after_an_interrupted_training(tmp_path):
    model = ENCODERS["bert"].head("mlm")
    run = trainer(model, "bert", tmp_path, callbacks=[nk.PatchCallback(), Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert is_patched(model)
    run.train()
    assert not is_patched(model)
    with nk.patched(model), pytest.raises(KeyboardInterrupt):
        trainer(model, "bert", tmp_path, callbacks=[Interrupt()], bf16=True).train()
    assert not is_patched(model)  # mixed precision's wrapper stays, around the plain forward
    run.train()


def test_the_callback_patches_what_model_init_makes(tmp_path):
    watch, models = Watch(), []

    def make():
        models.append(ENCODERS["bert"].head("mlm"))
        return models[-1]

    run = trainer(
        None, "bert", tmp_path, model_init=make, callbacks=[nk.PatchCallback(), watch], max_steps=1
    )
    run.train()
    assert len(models) == 2
    assert watch.seen["on_step_begin"] == {True}
    assert not is_patched(models[1])


def test_what_the_callback_refuses(tmp_path):
    model = ENCODERS["bert"].head("mlm")
    with pytest.raises(ValueError, match="mlm_logits: expected True or False, got 'no'"):
        nk.PatchCallback(mlm_logits="no")
    with pytest.raises(TypeError, match="window"):
        nk.PatchCallback(window=3)
    with (
        nk.patched(model),
        pytest.raises(ValueError, match="model: expected an unpatched model"),
    ):
        trainer(model, "bert", tmp_path, callbacks=[nk.PatchCallback()])
    run = trainer(model, "bert", tmp_path, callbacks=[callback := nk.PatchCallback()])
    run.args._n_gpu = 2
    with pytest.raises(ValueError, match=r"args.n_gpu: expected 1 .start one process a GPU, torch"):
        callback.on_train_begin(run.args, run.state, run.control, model=model)


@pytest.mark.parametrize("family", [f for f, e in ENCODERS.items() if e.has("token")])
@pytest.mark.parametrize("boundaries", [False, True])
def test_packed_batches_train_as_padded_ones(family, boundaries, tmp_path):
    """As transformers flattens documents; it drops the label of each document's first token."""
    model = ENCODERS[family].head("token", num_labels=97)
    expected = curve(trainer(copy.deepcopy(model), family, tmp_path, **{"seed": 5}))
    options = {"return_flash_attn_kwargs": boundaries}
    if ENCODERS[family].first_position:
        options = {"return_flash_attn_kwargs": True, "return_position_ids": False}
    collate = tf.DataCollatorWithFlattening(**options)
    nk.patch(model)
    actual = curve(trainer(model, family, tmp_path, keep(collate), **{"seed": 5}))
    assert_same_curve(actual, expected)


def keep(collate):
    """``collate`` without the columns that the flattening collator does not know."""

    def kept(rows):
        return collate([{k: row[k] for k in ("input_ids", "labels")} for row in rows])

    return kept


@pytest.mark.parametrize("family", [f for f, e in ENCODERS.items() if e.first_position])
@pytest.mark.parametrize("boundaries", [False, True])
def test_packed_positions_from_zero_are_refused(family, boundaries, tmp_path):
    model = ENCODERS[family].head("mlm")
    nk.patch(model)
    collate = tf.DataCollatorWithFlattening(return_flash_attn_kwargs=boundaries)
    with pytest.raises(ValueError, match=r"that start at position 2, .* got 3 that start at 0"):
        trainer(model, family, tmp_path, keep(collate)).train()


def test_a_batch_without_any_label_changes_no_weight(tmp_path):
    for family in ("bert", "neobert"):
        model = ENCODERS[family].head("mlm").train()
        nk.patch(model)
        ids = torch.randint(5, 97, (2, 7))
        model(input_ids=ids, labels=torch.full_like(ids, -100)).loss.backward()
        assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
