"""What a run starts from: new weights, those of another run, or its own checkpoint.

A resumed run must be the run that was stopped. What may change freely does not touch the numbers;
what ``--allow-change`` lets pass changes them from here on; a change of shape or data is refused.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers.processors import TemplateProcessing

from neobert import files, loading
from neobert.config import NeoBERTConfig
from neobert.heads import NeoBERTForMaskedLM
from neobert.pretraining.checkpoint import Checkpoints, Notice, Saved
from neobert.pretraining.prepare import Tokenizer
from neobert.pretraining.recipe import Recipe
from neobert.pretraining.rules import error
from neobert.pretraining.store import Corpus, Store
from neobert.pretraining.stream import Stream
from neobert.readers import InputError, one_line

CHECKPOINTS, FINAL = "checkpoints", "final"
SHOWN_TOKENS = 32
# The shape, which a checkpoint's tensors have; the rest of the model's settings are not compared.
_SHAPE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "pad_token_id", "norm_eps", "rope_theta",
)  # fmt: skip
_COMPARED = ("optimizer", "schedule", "guard", "train", "model")
_FREE = {"train.run", *(f"model.{name}" for name in _SHAPE)}


def settings(recipe: Recipe) -> dict[str, Any]:
    """What a resumed run is compared by, beside its shape and its data, by dotted name."""
    return {
        name: value
        for name, value in all_settings(recipe).items()
        if name.partition(".")[0] in _COMPARED and name not in _FREE
    }


def all_settings(recipe: Recipe) -> dict[str, Any]:
    """Every setting by its dotted name."""
    return {
        f"{name}.{key}": value
        for name, section in dataclasses.asdict(recipe).items()
        for key, value in section.items()
    }


def require_same(before: Mapping[str, Any], recipe: Recipe, allow_change: bool) -> list[str]:
    """Refuse changed settings; where they are allowed, name them.

    Raises:
        InputError: Naming what changed.
    """
    changed = files.differences(before, settings(recipe))
    if changed and not allow_change:
        hint = " (--allow-change goes on)"
        raise error("resume", "the settings of the checkpoint", "; ".join(changed) + hint)
    return changed


def source_folder(recipe: Recipe, notice: Notice) -> Path | None:
    """The folder with the weights that ``model.init_from`` names; None for new ones.

    Raises:
        InputError: No model is there.
    """
    name = recipe.model.init_from
    if name is None:
        return None
    run = Path(name)
    if recipe.train.run and run.resolve() == Path(recipe.train.run).resolve():
        raise error("model.init_from", "another run than train.run (or --resume)", name)
    if (run / FINAL).is_dir():
        return run / FINAL
    if (run / CHECKPOINTS).is_dir():
        found = Checkpoints(run / CHECKPOINTS).newest(notice)
        if found is None:
            raise error("model.init_from", "a run with a whole checkpoint", f"none in {name}")
        return found.folder
    try:
        return loading.model_folder(name, None)
    except OSError as problem:
        rule = "a run, a model folder or a hub id"
        raise error("model.init_from", rule, f"{name!r} ({one_line(problem)})") from None


def config_in(folder: Path) -> NeoBERTConfig:
    """The config of a NeoBERT model folder.

    Raises:
        InputError: It is another model's, or damaged.
    """
    if loading.model_family(folder, patched=False) != NeoBERTConfig.model_type:
        family = loading.model_family(folder, patched=False)
        raise error("model.init_from", "a NeoBERT model", f"{family} in {folder}")
    return NeoBERTConfig.from_pretrained(folder)


def model_config(recipe: Recipe, store: Corpus, base: NeoBERTConfig | None) -> NeoBERTConfig:
    """The shape that a recipe asks for, over that of the weights it starts from.

    Raises:
        InputError: Sizes that do not fit together, or other ones than the weights have.
    """
    wanted, longest = recipe.model.shape, recipe.batch.max_length
    most = wanted.setdefault("max_length", max(longest, base.max_length if base else 0))
    if most < longest:
        raise error("model.max_length", f"at least batch.max_length ({longest})", most)
    if base is not None:
        kept = {key: value for key, value in wanted.items() if key in _SHAPE}
        _require(vars(base), kept, "model.init_from", "weights of the recipe's shape")
        config = NeoBERTConfig.from_dict({**base.to_dict(), **wanted})
    else:
        wanted.setdefault("vocab_size", store.vocabulary.size)
        try:
            config = NeoBERTConfig(pad_token_id=store.vocabulary.pad, **wanted)
        except ValueError as problem:
            raise InputError(f"model.{problem}") from None
    store.require_vocabulary(config.vocab_size)
    return config


def _require(before: Mapping[str, Any], now: Mapping[str, Any], name: str, rule: str) -> None:
    if changed := files.differences(before, now):
        raise error(name, rule, "; ".join(f"model.{text}" for text in changed))


def store_tokenizer(recipe: Recipe, store: Store) -> Any:
    """The tokenizer that the store was made with.

    Raises:
        InputError: The recipe names another one.
    """
    tokenizer = Tokenizer(recipe.data)
    if tokenizer.digest != store.index["tokenizer"]:
        got = f"another one in {recipe.data.tokenizer}"
        raise error("data.tokenizer", f"the tokenizer of {store.folder}", got)
    return tokenizer.fast


def described(
    recipe: Recipe, store: Store | Stream, documents: np.ndarray
) -> dict[str, dict[int, str]]:
    """The first words of documents by their number, for whom a number tells nothing; on the fly
    their files and lines instead."""
    if isinstance(store, Stream):
        return {"places": store.places(documents)}
    ids, lengths = store.beginnings(documents, SHOWN_TOKENS)
    texts = store_tokenizer(recipe, store).batch_decode(np.split(ids, np.cumsum(lengths)[:-1]))
    return {"beginnings": dict(zip(documents.tolist(), texts, strict=True))}


def frame_texts(tokenizer: Any) -> None:
    """Let a tokenizer that does not yet do so put [CLS] and [SEP] around texts, as batches do."""
    cls, sep = tokenizer.cls_token, tokenizer.sep_token
    ids = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    if tokenizer("")["input_ids"] != ids:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=[cls, "$A", sep],
            pair=[cls, "$A", sep, "$B", sep],
            special_tokens=[(cls, ids[0]), (sep, ids[1])],
        )


def require_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Refuse weights whose tokens mean something else.

    Raises:
        InputError: The model's folder has another vocabulary than ``tokenizer``.
    """
    if not (folder / "tokenizer_config.json").is_file():
        return  # a checkpoint, or a model published without one
    found = loading.load_tokenizer(folder, None, "model.init_from").get_vocab()
    if found != tokenizer.get_vocab():
        rule = "the vocabulary of data.tokenizer"
        raise error("model.init_from", rule, f"another one in {folder}")


def config_text(config: NeoBERTConfig) -> str:
    """``config.json``, as `save_pretrained` writes it beside the model's tensors."""
    config.architectures = [NeoBERTForMaskedLM.__name__]
    return config.to_json_string()


def new_model(recipe: Recipe, config: NeoBERTConfig, folder: Path | None) -> NeoBERTForMaskedLM:
    """A float32 model with the weights in ``folder``, or new ones of the recipe's seed."""
    if folder is not None:
        return _load(folder, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.model.seed)
        return NeoBERTForMaskedLM(config)


def resumed_model(recipe: Recipe, store: Corpus, saved: Saved) -> NeoBERTForMaskedLM:
    """The model of a checkpoint of this run.

    Raises:
        InputError: The recipe asks for another shape.
    """
    base = config_in(saved.folder)
    config = model_config(recipe, store, None if recipe.model.init_from is None else base)
    shape = {key: getattr(config, key) for key in _SHAPE}
    _require(vars(base), shape, "resume", "the model of the checkpoint")
    return _load(saved.folder, config)


def _load(folder: Path, config: NeoBERTConfig) -> NeoBERTForMaskedLM:
    with loading.quiet_loading():
        return NeoBERTForMaskedLM.from_pretrained(folder, config=config, dtype=torch.float32)
