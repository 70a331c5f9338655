"""attn_implementation="neobert_kernels": transformers' models, unpatched, on our attention."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers as tf
from encoders import ENCODERS, LENGTHS, VOCABULARY, padded, randomized
from interface_cases import (
    FAMILIES,
    FLASH,
    NAME,
    NATIVE,
    batch,
    config,
    families,
    make,
    names,
)
from parity import assert_same, assert_same_gradients
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import modeling_flash_attention_utils as flash

import neobert_kernels as nk
from neobert_kernels.patching import interface


def first_position(family):
    return ENCODERS[family].first_position if family in NATIVE else 0


def last(model, **inputs):
    return model(**inputs).last_hidden_state


def alone(model, ids, mask, family):
    """``[T, C]``: what an unpatched model says of each document by itself."""
    rows = [row[None, real == 1] for row, real in zip(ids, mask, strict=True)]
    start = first_position(family)
    outs = [
        last(model, input_ids=row, position_ids=torch.arange(row.shape[1])[None] + start)
        for row in rows
    ]
    return torch.cat([out[0] for out in outs])


def packed(family, ids, mask):
    """``(inputs, boundaries)`` of the same documents end to end."""
    packing = nk.unpad(mask)
    restarts = torch.cat([torch.arange(n) for n in LENGTHS])[None] + first_position(family)
    inputs = {"input_ids": packing.pack(ids)[None], "position_ids": restarts}
    bounds = {f"cu_seq_lens_{side}": packing.cu_seqlens for side in "qk"}
    return inputs, bounds | {f"max_length_{side}": packing.max_seqlen for side in "qk"}


@pytest.fixture
def model(family, registered):
    return make(family).eval()


@families
@names
@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_batches_equal_sdpa_on_real_tokens(family, model, name, side):
    ids, mask = batch(family, side)
    inputs = {"input_ids": ids, "attention_mask": mask}
    exact = last(copy.deepcopy(model).double(), **inputs)[mask == 1]
    rounded = last(model, **inputs)[mask == 1]
    model.set_attn_implementation(name)
    assert_same(last(model, **inputs)[mask == 1], rounded, exact)


@families
def test_without_padding(family, model):
    ids = torch.randint(4, VOCABULARY, (2, 13))
    exact = last(copy.deepcopy(model).double(), input_ids=ids)
    rounded = last(model, input_ids=ids)
    model.set_attn_implementation(NAME)
    plain = last(model, input_ids=ids)
    assert_same(plain, rounded, exact)
    assert torch.equal(last(model, input_ids=ids, attention_mask=torch.ones_like(ids)), plain)
    one = last(model, input_ids=ids[:1])
    assert_same(one, rounded[:1], exact[:1])


@families
@names
def test_packed_documents_equal_each_alone(family, model, name):
    ids, mask = batch(family)
    exact = alone(copy.deepcopy(model).double(), ids, mask, family)
    rounded = alone(model, ids, mask, family)
    model.set_attn_implementation(name)
    inputs, bounds = packed(family, ids, mask)
    assert_same(last(model, **inputs, **bounds)[0], rounded, exact)
    only_q = {key: value for key, value in bounds.items() if key.endswith("_q")}
    assert_same(last(model, **inputs, **only_q)[0], rounded, exact)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "modernbert"])
def test_restarting_positions_alone_also_separate_documents(family, model):
    ids, mask = batch(family)
    exact = alone(copy.deepcopy(model).double(), ids, mask, family)
    rounded = alone(model, ids, mask, family)
    model.set_attn_implementation(NAME)
    inputs, _ = packed(family, ids, mask)
    assert_same(last(model, **inputs)[0], rounded, exact)
    jumps = inputs | {"position_ids": inputs["position_ids"] * 2 - first_position(family)}
    with pytest.raises(ValueError, match=r"position_ids: expected .* from each restart"):
        last(model, **jumps)


@families
def test_a_document_never_sees_another(family, model):
    model.set_attn_implementation(NAME)
    ids, mask = batch(family)
    inputs, bounds = packed(family, ids, mask)
    before = last(model, **inputs, **bounds)[0]
    inputs["input_ids"][0, 10:27] = 5  # all of document 2
    after = last(model, **inputs, **bounds)[0]
    assert torch.equal(before[:10], after[:10])
    assert torch.equal(before[27:], after[27:])
    assert not torch.equal(before[10:27], after[10:27])


@families
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_every_gradient(family, registered, layout):
    model = make(family).eval()
    if family != "modernbert":  # attention dropout is 0 there, and out_drop an Identity
        assert all(m.p == 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))
    model.train()
    ids, mask = batch(family)
    inputs = {"input_ids": ids, "attention_mask": mask}
    exact, rounded = copy.deepcopy(model).double(), copy.deepcopy(model)
    model.set_attn_implementation(NAME)
    weights = torch.randn(sum(LENGTHS), model.config.hidden_size)
    outs = [last(each, **inputs)[mask == 1] for each in (rounded, exact)]
    if layout == "padded":
        outs.append(last(model, **inputs)[mask == 1])
    else:
        if family in NATIVE:
            outs = [alone(each, ids, mask, family) for each in (rounded, exact)]
        row, bounds = packed(family, ids, mask)
        outs.append(last(model, **row, **bounds)[0])
    for out in outs:
        (out * weights).sum().backward()
    assert_same_gradients(model, rounded, exact)


def test_loading_with_the_name(registered, tmp_path):
    make("bert").save_pretrained(tmp_path)
    ids, mask = batch("bert")
    outs = []
    for name in ("sdpa", NAME, FLASH):
        model = tf.AutoModel.from_pretrained(tmp_path, attn_implementation=name).eval()
        assert model.config._attn_implementation == name
        outs.append(last(model, input_ids=ids, attention_mask=mask)[mask == 1])
    torch.testing.assert_close(outs[1], outs[0])
    assert torch.equal(outs[1], outs[2])
    assert not nk.unpad(mask).unpack(outs[1])[mask == 0].any()


def test_our_own_model_takes_the_name(registered):
    model = randomized(ENCODERS["neobert"].base()).eval()
    ids, mask = padded("neobert")
    expected = last(model, input_ids=ids, attention_mask=mask)[mask == 1]
    model.set_attn_implementation(NAME)
    out = last(model, input_ids=ids, attention_mask=mask)[mask == 1]
    torch.testing.assert_close(out, expected)


# --- sentence-transformers

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "dogs",
    "ran",
    "over",
    "tall",
    "green",
    "trees",
]
TEXTS = ["the cat sat", "a", "dogs ran over tall green trees and the cat sat on a mat", "trees"]


def sentence_model(folder, family, name):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    base = modules.Transformer(str(folder), model_kwargs={"attn_implementation": name})
    pooling = modules.Pooling(base.get_embedding_dimension(), "mean")
    return SentenceTransformer(modules=[base, pooling], device="cpu")


@pytest.mark.parametrize("family", ["bert", "xlm_roberta", "modernbert"])
def test_sentence_transformers_packs_by_itself(family, registered, tmp_path):
    pytest.importorskip("sentence_transformers")
    make(family).save_pretrained(tmp_path)
    padding = config(family).pad_token_id
    special = ["[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    special.insert(padding, "[PAD]")
    (tmp_path / "vocab.txt").write_text("\n".join([*special, *WORDS]) + "\n")
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = tf.BertTokenizerFast(vocab=vocabulary, model_max_length=64)
    tokenizer.save_pretrained(tmp_path)
    seen = []
    outs = {}
    for name in ("sdpa", NAME, FLASH):
        model = sentence_model(tmp_path, family, name)
        model[0].model.get_input_embeddings().register_forward_pre_hook(
            lambda _, args: seen.append(tuple(args[0].shape))
        )
        outs[name] = model.encode(TEXTS, convert_to_tensor=True)
    tokens = sum(len(text.split()) + 2 for text in TEXTS)
    assert seen[0] == seen[1] == (4, 15)
    assert seen[2] == (1, tokens)
    torch.testing.assert_close(outs[NAME], outs["sdpa"])
    torch.testing.assert_close(outs[FLASH], outs["sdpa"])


# --- registering


def state():
    return (
        dict(AttentionInterface._global_mapping),
        dict(AttentionMaskInterface._global_mapping),
        {name: value for name, value in vars(flash).items() if not name.startswith("__")},
    )


def test_unregistering_restores_what_was_there(monkeypatch):
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    theirs = lambda *args, **kwargs: None  # noqa: E731
    AttentionInterface.register(NAME, theirs)
    try:
        before = state()
        nk.register_attention()
        during = state()
        nk.register_attention()
        assert state() == during != before
        assert AttentionInterface()[NAME] is interface.attention_forward
        model = make("bert")
        model.set_attn_implementation(FLASH)
        assert flash._loaded_implementation == FLASH
        nk.unregister_attention()
        assert state() == before
        nk.unregister_attention()
        assert AttentionInterface()[NAME] is theirs
    finally:
        del AttentionInterface._global_mapping[NAME]


def test_importing_and_loading_the_module_changes_nothing():
    code = """
import json
from transformers import AttentionInterface, modeling_flash_attention_utils as flash
before = list(AttentionInterface._global_mapping), flash._lazy_imports
import neobert_kernels
neobert_kernels.register_attention, neobert_kernels.patch
assert (list(AttentionInterface._global_mapping), flash._lazy_imports) == before
print(json.dumps(before[0]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert NAME not in json.loads(done.stdout.splitlines()[-1])


def test_without_the_alias_nothing_private_is_touched():
    before = flash._lazy_imports
    nk.register_attention(flash_alias=False)
    try:
        assert flash._lazy_imports is before
        assert FLASH not in AttentionInterface()
        nk.register_attention()
        assert flash._lazy_imports is not before
        assert FLASH in AttentionInterface()
    finally:
        nk.unregister_attention()
    assert flash._lazy_imports is before
    with pytest.raises(ValueError, match="flash_alias: expected True or False, got 'no'"):
        nk.register_attention(flash_alias="no")


def renamed(implementation_name):
    return flash._lazy_imports


@pytest.mark.parametrize("change", ["gone", "renamed", "unused"])
def test_a_transformers_that_changed_its_private_parts_is_named(change, monkeypatch):
    if change == "gone":
        monkeypatch.delattr(flash, "_lazy_imports")
    elif change == "renamed":
        monkeypatch.setattr(flash, "_lazy_imports", renamed)
    else:
        monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda implementation: None)
    before = state()
    with pytest.raises(ValueError, match=r"transformers: expected .*flash_alias=False.*, got \d"):
        nk.register_attention()
    assert state() == before
    nk.register_attention(flash_alias=False)
    nk.unregister_attention()


def test_a_later_replacement_is_not_undone_by_us(monkeypatch):
    nk.register_attention()
    ours = flash._lazy_imports
    flash._lazy_imports = renamed
    with pytest.raises(ValueError, match=r"_lazy_imports: expected the function that register_att"):
        nk.unregister_attention()
    assert flash._lazy_imports is renamed
    assert NAME in AttentionInterface()
    flash._lazy_imports = ours
    nk.unregister_attention()
    assert NAME not in AttentionInterface()


def test_other_names_still_reach_transformers(registered, monkeypatch):
    with pytest.raises((ImportError, ValueError, OSError)) as caught:
        flash._lazy_imports("flash_attention_3")
    assert "flash_attn_interface" in str(caught.value)


def test_the_varlen_function_behind_the_alias(registered):
    """Model code that calls transformers' flash helper itself gets the same numbers."""
    q, k, v = torch.randn(3, 4, 17, 3, 16).unbind()
    _, mask = batch("bert")
    out = flash._flash_attention_forward(
        q, k, v, mask.bool(), 17, False, attn_implementation=FLASH, sliding_window=5
    )
    module = torch.nn.Module()
    module.is_causal = False
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    expected, _ = interface.attention_forward(module, *rows, mask, sliding_window=5)
    torch.testing.assert_close(out, expected)
    for options, message in [
        ({"causal": True}, "causal: expected False"),
        ({"dropout_p": 0.1}, "dropout_p: expected 0, got 0.1"),
        ({"window_size": (4, 0)}, "window_size: expected the same distance"),
    ]:
        cu = torch.tensor([0, 17], dtype=torch.int32)
        with pytest.raises(ValueError, match=message):
            interface.varlen_attention(q[0], k[0], v[0], cu, cu, 17, 17, **options)
    with pytest.raises(ValueError, match=r"max_length_k: expected max_length_q .17., got 18"):
        interface.varlen_attention(q[0], k[0], v[0], cu, cu, 17, 18)
