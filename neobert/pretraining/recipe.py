"""Recipes: nested dataclasses, read from YAML, changed by ``key=value``.

A section is a frozen dataclass whose fields are numbers, strings, tables of numbers, lists of
strings, or sections.
Unknown keys, wrong types and values outside a rule are errors before any work starts.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from neobert.pretraining.guard import Limits
from neobert.pretraining.optimizer import Optimizer
from neobert.pretraining.rules import at_least, error, one_of
from neobert.pretraining.schedule import Schedule
from neobert.readers import one_line

LAYOUTS = ("packed", "padded")
MASKINGS = ("mask", "bert")
PRECISIONS = ("bfloat16", "float32")
PARALLELS = ("ddp", "fsdp")
TRACKERS = ("tensorboard", "wandb")
SHORTEST = 3  # [CLS], one token, [SEP]

_KINDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


@dataclass(frozen=True)
class Data:
    """Where texts come from, and the store that holds their tokens, if any does.

    Attributes:
        path: A .txt, .jsonl or .parquet file, or a folder of them; or else
        dataset: the id (or local folder) of a Hugging Face data set, with its
        subset, split, revision: as `datasets.load_dataset` takes them.
        streaming: Read the data set without downloading it first.
        column: Name of the text in a data set, .jsonl or .parquet file.
        whole_files: Each .txt and .md file is one document; otherwise each line of a .txt is.
        errors: Invalid UTF-8: "strict" stops, "replace" puts U+FFFD.
        tokenizer: A local folder or a hub id, with its tokenizer_revision.
        store: Folder of the tokenised documents, made by ``--prepare``.
        on_the_fly: No store: read and tokenise the texts while training.
        lanes: On the fly: readers side by side, each with its share of the texts; a multiple of
            ranks x workers. Other lanes are another order.
        shard_tokens: A shard is closed by the document that reaches this many tokens.
        documents: Take only the first so many texts; None takes all.
        held_out: Documents, drawn evenly from the store, that training never sees; on the fly the
            first ones.
    """

    path: str | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    column: str = "text"
    whole_files: bool = False
    errors: str = "strict"
    tokenizer: str = "google-bert/bert-base-uncased"
    tokenizer_revision: str | None = None
    store: str = ""
    on_the_fly: bool = False
    lanes: int = 8
    # A mapping holds a file open: at 4 GiB of 16-bit ids 600 G tokens take 280 of them.
    shard_tokens: int = 1 << 31
    documents: int | None = None
    held_out: int = 0

    def __post_init__(self) -> None:
        if (self.path is None) == (self.dataset is None):
            given = "neither" if self.path is None else "both"
            raise error("data", "one of path and dataset", given)
        if not self.store and not self.on_the_fly:
            rule = "a folder for the tokenised documents (or data.on_the_fly)"
            raise error("data.store", rule, "none")
        if self.documents is not None and self.on_the_fly:
            raise error("data.documents", "none with data.on_the_fly", self.documents)
        at_least("data.lanes", self.lanes, 1)
        if self.errors not in ("strict", "replace"):
            raise error("data.errors", "'strict' or 'replace'", repr(self.errors))
        at_least("data.shard_tokens", self.shard_tokens, 1)
        at_least("data.held_out", self.held_out, 0)
        if self.documents is not None:
            at_least("data.documents", self.documents, 1)
        if self.dataset is None:
            for name in ("subset", "revision"):
                if getattr(self, name) is not None:
                    raise error(f"data.{name}", "none without data.dataset", getattr(self, name))


@dataclass(frozen=True)
class Batch:
    """How documents become batches.

    Attributes:
        max_length: Tokens kept of a document, [CLS] and [SEP] included.
        tokens: Token budget of one micro-batch (bin).
        bins: Micro-batches of one optimizer step, over all ranks.
        layout: "packed": documents end to end, no padding. "padded", the paper's: tokens //
            max_length documents in order, padded to the longest of them.
        mask_rate: Chance of each ordinary token to be labelled.
        masking: "mask": every labelled token becomes [MASK]. "bert": 80 % do, 10 % become a random
            ordinary token, 10 % stay.
        views: Chance of each view to give a step: "all", or ">=N" for documents of at least N
            tokens, [CLS] and [SEP] included.
        seed: Decides order, views and masks.
        workers: Processes that gather and mask; 0 works in the training process.
        prefetch: Micro-batches that each worker has ready.
    """

    max_length: int = 1024
    tokens: int = 16384
    bins: int = 128
    layout: str = "packed"
    mask_rate: float = 0.2
    masking: str = "mask"
    views: dict[str, float] = field(default_factory=lambda: {"all": 1.0})
    seed: int = 0
    workers: int = 2
    prefetch: int = 4

    def __post_init__(self) -> None:
        at_least("batch.max_length", self.max_length, SHORTEST)
        if self.tokens < self.max_length:
            raise error(
                "batch.tokens",
                f"at least batch.max_length ({self.max_length}), the longest sequence",
                self.tokens,
            )
        at_least("batch.bins", self.bins, 1)
        at_least("batch.workers", self.workers, 0)
        at_least("batch.prefetch", self.prefetch, 1)
        if not 0 <= self.seed < 1 << 64:
            raise error("batch.seed", "0 to 2**64 - 1", self.seed)
        one_of("batch.layout", self.layout, LAYOUTS)
        one_of("batch.masking", self.masking, MASKINGS)
        if not 0 < self.mask_rate < 1:
            raise error("batch.mask_rate", "a number between 0 and 1", self.mask_rate)
        for name, chance in self.views.items():
            view_minimum(name)
            if not 0 < chance <= 1:
                raise error(f"batch.views.{name}", "a chance over 0 and up to 1", chance)
        if not math.isclose(total := math.fsum(self.views.values()), 1, abs_tol=1e-9):
            raise error("batch.views", "chances that sum to 1", f"{total:g}")

    @property
    def rows(self) -> int:
        """Documents of a padded micro-batch."""
        return self.tokens // self.max_length


@dataclass(frozen=True)
class Model:
    """What is trained: a new NeoBERT, or one to go on with.

    Attributes:
        init_from: A run folder, a model folder or a hub id whose weights training starts from; None
            draws new ones.
        seed: Of the new weights.
        hidden_size, num_hidden_layers, ...: as in `NeoBERTConfig`. What is None comes from
            init_from, else it is the published 250M model's; vocab_size then is the tokenizer's,
            max_length batch.max_length.
    """

    init_from: str | None = None
    seed: int = 0
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    intermediate_size: int | None = None
    vocab_size: int | None = None
    max_length: int | None = None
    norm_eps: float | None = None
    rope_theta: float | None = None
    embedding_init_range: float | None = None
    decoder_init_range: float | None = None

    def __post_init__(self) -> None:
        at_least("model.seed", self.seed, 0)

    @property
    def shape(self) -> dict[str, Any]:
        """The fields of `NeoBERTConfig` that are set."""
        values = dataclasses.asdict(self)
        return {k: v for k, v in values.items() if k not in ("init_from", "seed") and v is not None}


@dataclass(frozen=True)
class Train:
    """How steps are computed. How many there are: schedule.steps.

    Attributes:
        run: The run's folder: checkpoints, log, and in the end final/.
        precision: "bfloat16": matrix products under autocast; weights are float32 in any case.
        patch: Run on the fused operators; otherwise on the model's own PyTorch code.
        gradient_checkpointing: Compute layers again in the backward pass instead of keeping them.
        compile: torch.compile every layer.
        parallel: "ddp": every rank has the model. "fsdp": FSDP2, every rank has a share.
    """

    run: str = ""
    precision: str = "bfloat16"
    patch: bool = True
    gradient_checkpointing: bool = False
    compile: bool = False
    parallel: str = "ddp"

    def __post_init__(self) -> None:
        one_of("train.precision", self.precision, PRECISIONS)
        one_of("train.parallel", self.parallel, PARALLELS)


@dataclass(frozen=True)
class Saving:
    """Checkpoints.

    Attributes:
        every: Steps between two.
        keep_last: How many of the newest stay.
        keep_every: Those of every so many steps stay for good; 0: none.
        background: Write while training goes on.
    """

    every: int = 1000
    keep_last: int = 2
    keep_every: int = 10_000
    background: bool = True

    def __post_init__(self) -> None:
        at_least("checkpoint.every", self.every, 1)
        at_least("checkpoint.keep_last", self.keep_last, 1)
        at_least("checkpoint.keep_every", self.keep_every, 0)


@dataclass(frozen=True)
class Watching:
    """What a run tells.

    Attributes:
        every: Steps between two records; the device is waited for only then.
        evaluate: Steps between two evaluations on data.held_out; 0: only at the end.
        trackers: "tensorboard", "wandb": also there, through accelerate.
    """

    every: int = 10
    evaluate: int = 1000
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least("log.every", self.every, 1)
        at_least("log.evaluate", self.evaluate, 0)
        for name in self.trackers:
            one_of("log.trackers", name, TRACKERS)


@dataclass(frozen=True)
class Recipe:
    """All settings of a run."""

    data: Data
    batch: Batch = field(default_factory=Batch)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    train: Train = field(default_factory=Train)
    checkpoint: Saving = field(default_factory=Saving)
    log: Watching = field(default_factory=Watching)
    guard: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.data.on_the_fly and set(self.batch.views) != {"all"}:
            rule = "a store for views of long documents, only 'all' with data.on_the_fly"
            raise error("batch.views", rule, ", ".join(map(repr, self.batch.views)))


def view_minimum(name: str) -> int:
    """Least length of a document of the view: 0 for "all", N for ">=N"."""
    if name == "all":
        return 0
    digits = name.removeprefix(">=")
    if digits == name or not (digits.isascii() and digits.isdigit()) or int(digits) < 1:
        raise error("batch.views", 'names like "all" or ">=1024"', repr(name))
    return int(digits)


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe file with ``section.key=value`` changes; a value is YAML.

    ``extends: other.yaml`` takes what the file does not set from another one beside it.

    Raises:
        InputError: Not YAML, an unknown key, or a value that breaks a rule.
        OSError: The file cannot be read.
    """
    content = _sections(Path(path))
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise error("override", "key=value", repr(override))
        _set(content, name, _yaml(text, name))
    return build(Recipe, content, "")


def _sections(path: Path, over: tuple[Path, ...] = ()) -> dict[Any, Any]:
    """A file's sections, over those of the file that it extends, key by key."""
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        raise error(str(path), "YAML", "bytes that are not UTF-8") from None
    content = _yaml(text, str(path))
    if not isinstance(content, dict):
        raise error(str(path), "sections with keys (a mapping)", type(content).__name__)
    base = content.pop("extends", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise error(f"{path}: extends", "a file name", _shown(base))
    other, over = path.parent / base, (*over, path.resolve())
    if other.resolve() in over:
        raise error(f"{path}: extends", "a file that does not lead back here", base)
    found = _sections(other, over)
    for name, section in content.items():
        both = isinstance(section, dict) and isinstance(found.get(name), dict)
        found[name] = {**found[name], **section} if both else section
    return found


def build(kind: type, content: object, name: str) -> Any:
    """A section from what YAML gave; ``name`` is its dotted place, "" for the whole recipe."""
    place = name or "recipe"
    if not isinstance(content, Mapping):
        raise error(place, "keys with values", _shown(content))
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in content:
        if key not in fields:
            raise error(place, f"one of the keys {', '.join(fields)}", repr(key))
    values = {
        key: _value(hints[key], value, f"{name}.{key}" if name else key)
        for key, value in content.items()
    }
    for f in fields.values():
        required = (
            f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        )  # fmt: skip
        if required and f.name not in values:
            raise error(place, f"a section {f.name!r}", "none")
    return kind(**values)


def _value(kind: Any, value: object, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return build(typing.cast(type, kind), value, name)
    if isinstance(kind, types.UnionType):
        options = [option for option in typing.get_args(kind) if option is not types.NoneType]
        return None if value is None else _value(options[0], value, name)
    if typing.get_origin(kind) is dict:
        if not isinstance(value, Mapping) or not value:
            raise error(name, "a table of names and values", _shown(value))
        of = typing.get_args(kind)[1]
        return {str(key): _value(of, item, f"{name}.{key}") for key, item in value.items()}
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise error(name, "a list", _shown(value))
        return tuple(_value(typing.get_args(kind)[0], item, name) for item in value)
    if kind is float:
        return _number(value, name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise error(name, _KINDS[kind], _shown(value))
    return value


def _number(value: object, name: str) -> float:
    """YAML 1.1 reads 6e-4, without a point, as a string."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
    except (ValueError, OverflowError):
        raise error(name, "a finite number", _shown(value)) from None
    return number


def _shown(value: object) -> str:
    return "nothing" if value is None else repr(value)


def _set(content: dict[Any, Any], name: str, value: object) -> None:
    """Set a dotted key; what it leads through must be a section."""
    *path, last = name.split(".")
    for depth, key in enumerate(path, 1):
        content = content.setdefault(key, {})
        if not isinstance(content, dict):
            raise error(name, "a key of a section", f"the value {'.'.join(path[:depth])}")
    content[last] = value


class _Loader(yaml.SafeLoader):
    """YAML lets the last of two equal keys win, and the first one's settings vanish."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"the key {key.value!r} twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _yaml(text: str, name: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as problem:
        raise error(name, "YAML", one_line(problem)) from None
