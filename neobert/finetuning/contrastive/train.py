"""The run: a sentence encoder trained on pairs by the paper's recipe, and the folder it ends in."""

import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import neobert_kernels as nk
from neobert import files
from neobert.finetuning.classifier import ATTENTION_DROPOUT
from neobert.finetuning.contrastive.data import QUERY, PairSet
from neobert.finetuning.contrastive.recipe import Recipe
from neobert.loading import digest, model_family
from neobert.readers import InputError

KIND, VERSION = "neobert contrastive", 1
LAST_OF_CHECKPOINT = "trainer_state.json"  # what the trainer writes after everything else


def train(
    folder: Path,
    model: str,
    pairs: Sequence[PairSet],
    recipe: Recipe,
    output: Path,
    *,
    device: str | None = None,
    patched: bool = True,
    instructions: Mapping[str, str] | None = None,
    restart: bool = False,
    quiet: bool = False,
) -> Path:
    """Train and write ``output/final``, which sentence-transformers and `neobert encode` load.

    Args:
        folder: The model's files.
        model: What the user calls it, for the model card.
        pairs: The data sets; at least one.
        recipe: How.
        output: Folder of the run; one that was begun in the same way goes on from its newest
            checkpoint.
        device: Where; None for sentence-transformers' choice.
        patched: Run on our operators.
        instructions: By data set, what is put before its queries.
        restart: Throw away what is there.
        quiet: No progress, no losses.

    Raises:
        InputError: The output holds something else, or an argument breaks a rule.
    """
    instructions = dict(instructions or {})
    _check(pairs, recipe, instructions)
    model_family(folder, patched)
    identity = {
        "model": model,
        "model_files": digest(folder),
        "data": {each.name: [len(each), each.fingerprint] for each in pairs},
        "recipe": recipe.record(),
        "instructions": instructions,
        "patched": patched,
    }
    # Before the folder: its width is an argument's limit.
    encoder = _load(folder, recipe, device)
    # Under torchrun the first process keeps the folder; the others only look whether it is done.
    is_first = int(os.environ.get("RANK", "0")) == 0
    if is_first:
        _begin(output, identity, restart)
    final = output / "final"
    if final.exists() and (is_first or not restart):
        return final
    if patched:
        nk.patch(encoder)
    resume = not restart and any(
        (output / "checkpoints").glob(f"checkpoint-*/{LAST_OF_CHECKPOINT}")
    )
    _fit(encoder, pairs, recipe, output, instructions, resume, quiet)
    if is_first:
        if patched:
            nk.unpatch(encoder)
        staged = output / "final.new"
        shutil.rmtree(staged, ignore_errors=True)
        encoder.save(str(staged))
        _extend_card(staged / "README.md", identity)
        os.replace(staged, final)
        files.sync_folder(output)
    return final


def _check(pairs: Sequence[PairSet], recipe: Recipe, instructions: Mapping[str, str]) -> None:
    names = [each.name for each in pairs]
    if len(set(names)) < len(names):
        raise InputError(f"data: expected data sets of different names, got {', '.join(names)}")
    for name in instructions:
        if name not in names:
            raise InputError(f"instructions: expected names of {', '.join(names)}, got {name!r}")
    for each in pairs:
        if len(each) < 2:
            raise InputError(f"data: expected at least 2 pairs in {each.name}, got {len(each)}")
    if recipe.temperature <= 0:
        raise InputError(f"temperature: expected over 0, got {recipe.temperature}")


def _begin(output: Path, identity: Mapping[str, Any], restart: bool) -> None:
    identity = json.loads(json.dumps(identity))
    if output.exists() and not output.is_dir():
        raise InputError(f"output: expected a folder, got the file {output}")
    output.mkdir(parents=True, exist_ok=True)
    path = output / "run.json"
    if restart and path.exists():
        for name in ("checkpoints", "final", "final.new"):
            shutil.rmtree(output / name, ignore_errors=True)
        path.unlink()
    if not path.exists():
        if any(output.iterdir()):
            raise InputError(f"output: expected an empty folder or an earlier run, got {output}")
        content = {"kind": KIND, "version": VERSION, **identity}
        files.write_object(path, content)
        return
    try:
        before = dict(json.loads(path.read_bytes()))
    except (TypeError, ValueError):
        before = {}
    if before.get("kind") != KIND:
        raise InputError(f"{path}: expected a run of neobert finetune contrastive, got another")
    changed = files.differences(before, identity)
    if changed:
        raise InputError(
            f"output: expected the run that began {output}, got {'; '.join(changed)} "
            "(--restart discards it; or choose another --output)"
        )
    for checkpoint in (output / "checkpoints").glob("checkpoint-*"):
        if not (checkpoint / LAST_OF_CHECKPOINT).exists():  # killed while it was written
            shutil.rmtree(checkpoint)


def _load(folder: Path, recipe: Recipe, device: str | None) -> Any:
    from sentence_transformers import SentenceTransformer
    from transformers import AutoConfig

    import neobert  # noqa: F401  (registers NeoBERT)

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    off = {name: 0.0 for name in ATTENTION_DROPOUT if getattr(config, name, 0)}
    encoder = SentenceTransformer(
        str(folder),
        device=device,
        config_kwargs=off,
        model_kwargs={"use_safetensors": True},
        local_files_only=True,
    )
    width = encoder.get_embedding_dimension()
    for dim in recipe.matryoshka:
        if width is not None and dim > width:  # None where its last module does not say
            raise InputError(
                f"matryoshka: expected at most {width} (the model's dimensions), got {dim}"
            )
    if recipe.max_length is not None:
        encoder.max_seq_length = recipe.max_length
    return encoder


def _fit(
    encoder: Any,
    pairs: Sequence[PairSet],
    recipe: Recipe,
    output: Path,
    instructions: Mapping[str, str],
    resume: bool,
    quiet: bool,
) -> None:
    from datasets import Dataset, DatasetDict
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.sampler import BatchSamplers
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
    from transformers import PrinterCallback

    from neobert.finetuning.contrastive.loss import CachedInfoNCELoss
    from neobert.finetuning.contrastive.sampling import SquareRootBatchSampler

    arguments = SentenceTransformerTrainingArguments(
        str(output / "checkpoints"),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.lr,
        weight_decay=recipe.weight_decay,
        warmup_steps=round(recipe.warmup * recipe.steps),
        bf16=recipe.precision == "bfloat16",
        use_cpu=encoder.device.type == "cpu",
        seed=recipe.seed,
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        multi_dataset_batch_sampler=SquareRootBatchSampler,
        prompts={name: {QUERY: text} for name, text in instructions.items()} or None,
        save_steps=max(1, min(500, recipe.steps // 4)),
        save_total_limit=2,
        logging_steps=max(1, recipe.steps // 100),
        report_to="none",
        disable_tqdm=quiet,
        dataloader_pin_memory=encoder.device.type == "cuda",
    )
    loss: Any = CachedInfoNCELoss(encoder, recipe.temperature, recipe.mini_batch_tokens)
    if recipe.matryoshka:
        loss = MatryoshkaLoss(encoder, loss, recipe.matryoshka)
    # The model card's examples have a bar that no option hides.
    with redirect_stderr(io.StringIO()) if quiet else nullcontext():
        trainer = SentenceTransformerTrainer(
            encoder,
            arguments,
            train_dataset=DatasetDict(
                {each.name: Dataset.from_dict(each.columns) for each in pairs}
            ),
            loss=loss,
        )
    if quiet:
        trainer.remove_callback(PrinterCallback)  # stands in for the bar
    trainer.train(resume_from_checkpoint=resume or None)


def _extend_card(card: Path, identity: Mapping[str, Any]) -> None:
    """Behind sentence-transformers' own model card: what was run, to the last setting."""
    data = "\n".join(f"- {name}: {size:,} pairs" for name, (size, _) in identity["data"].items())
    dims = identity["recipe"].get("matryoshka")
    shown = ", ".join(map(str, dims or ()))
    matryoshka = f", each at the first {shown} dimensions (Matryoshka)" if dims else ""
    settings = json.dumps({k: identity[k] for k in ("recipe", "instructions")}, indent=1)
    text = (
        f"\n## How it was made\n\n`neobert finetune contrastive` from `{identity['model']}`: "
        f"InfoNCE on cosine similarity over in-batch and hard negatives{matryoshka}, every batch "
        f"from one data set, drawn with p ~ n^0.5.\n\n{data}\n\n```json\n{settings}\n```\n"
    )
    files.write_atomically(card, card.read_text("utf-8") + text)
