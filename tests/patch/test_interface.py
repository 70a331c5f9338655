"""attn_implementation="neobert_kernels": transformers' models, unpatched, on our attention."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers as tf
from encoders import ENCODERS, LENGTHS, VOCABULARY, padded, randomized
from parity import assert_same, assert_same_gradients
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import modeling_flash_attention_utils as flash

import neobert_kernels as nk
from neobert_kernels.patching import interface

NAME, FLASH = "neobert_kernels", "neobert_kernels_flash"
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OTHERS = {
    "nomic_bert": lambda: tf.NomicBertConfig(**SIZES, max_position_embeddings=64),
    # A window of 4 to each side: shorter than the longest text.
    "modernbert": lambda: tf.ModernBertConfig(
        **SIZES, max_position_embeddings=64, local_attention=8, cls_token_id=1, sep_token_id=2
    ),
    "eurobert": lambda: tf.EuroBertConfig(
        **(SIZES | {"hidden_size": 64, "num_attention_heads": 4}),
        num_key_value_heads=2,
        max_position_embeddings=64,
        mask_token_id=3,
    ),
}
NATIVE = ("bert", "roberta", "xlm_roberta")
FAMILIES = (*NATIVE, *OTHERS)
families = pytest.mark.parametrize("family", FAMILIES)
names = pytest.mark.parametrize("name", [NAME, FLASH])


def config(family):
    return OTHERS[family]() if family in OTHERS else ENCODERS[family].config()


def make(family):
    return randomized(tf.AutoModel.from_config(config(family), attn_implementation="sdpa"))


def batch(family, side="right"):
    return padded(family if family in ENCODERS else "bert", side=side)


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
def registered():
    nk.register_attention()
    yield
    nk.unregister_attention()


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


# --- one call


class Attention(torch.nn.Module):
    is_causal = False


ROW = torch.randn(1, 3, 5, 16)
ROWS = torch.randn(2, 3, 5, 16)
CU = torch.tensor([0, 2, 5], dtype=torch.int32)


def changed(**attributes):
    module = Attention()
    module.__dict__.update(attributes)
    return module


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (ROWS, {"dropout": 0.1}, "attention dropout: expected 0 while training .*, got 0.1"),
        (ROWS, {"is_causal": True}, "is_causal: expected False"),
        (ROWS, {"module": changed(is_causal=True)}, "is_causal: expected False"),
        (ROWS, {"module": torch.nn.Module()}, "is_causal: expected False"),
        (ROWS, {"softcap": 30.0}, "softcap: expected None .*, got 30.0"),
        (ROWS, {"s_aux": torch.zeros(3)}, "s_aux: expected None .*, got Tensor"),
        (ROWS, {"head_mask": torch.ones(3)}, "head_mask: expected None"),
        (ROWS, {"position_bias": torch.zeros(3)}, "position_bias: expected None"),
        (ROWS, {"output_attentions": True}, "output_attentions: expected None .*, got True"),
        (
            ROWS,
            {"module": changed(config=tf.BertConfig(is_encoder_decoder=True))},
            "config.is_encoder_decoder: expected False",
        ),
        (ROWS, {"key": ROWS[:, :, :4]}, "key: expected the 5 tokens of query in each of 2 rows"),
        (ROWS, {"key": ROWS[:1]}, "key: expected the 5 tokens"),
        (ROWS[0], {}, "query: expected 4 dimensions"),
        (ROWS, {"sliding_window": 0}, "sliding_window: expected None or an int of at least 1"),
        (ROWS, {"attention_mask": torch.ones(2, 1, 5, 5)}, "attention_mask: expected 2 dim"),
        (ROWS, {"attention_mask": torch.ones(2, 4)}, r"attention_mask: expected shape \(2, 5\)"),
        (ROWS, {"attention_mask": torch.zeros(2, 5)}, "attention_mask: expected dtype bool"),
        (
            ROWS,
            {
                "attention_mask": torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]]),
                "sliding_window": 2,
            },
            "attention_mask: expected padding before or after .* got padding between tokens",
        ),
        (ROW, {"cu_seq_lens_q": CU}, "max_length_q: expected a value beside"),
        (ROW, {"cu_seq_lens_k": CU, "max_length_k": 3}, "cu_seq_lens_k: expected None without"),
        (
            ROW,
            {"cu_seq_lens_q": CU, "max_length_q": 2},
            "max_length_q: expected at least the longest document .3., got 2",
        ),
        (
            ROW,
            {"cu_seq_lens_q": CU[:2], "max_length_q": 3},
            "cu_seq_lens_q: expected a last element equal to the number of tokens .5., got 2",
        ),
        (
            ROW,
            {
                "cu_seq_lens_q": CU,
                "max_length_q": 3,
                "cu_seq_lens_k": torch.tensor([0, 3, 5], dtype=torch.int32),
            },
            "cu_seq_lens_k: expected the documents of cu_seq_lens_q",
        ),
        (ROWS, {"cu_seq_lens_q": CU, "max_length_q": 3}, "expected one row when packed"),
        (
            ROW,
            {"cu_seq_lens_q": CU, "max_length_q": 3, "attention_mask": torch.ones(1, 5)},
            "attention_mask: expected None when packed",
        ),
        (ROW, {"seq_idx": torch.tensor([[0, 0, 1, 1, 1]])}, "cu_seq_lens_q: expected the docum"),
        (ROW, {"position_ids": torch.zeros(1, 4)}, "position_ids: expected shape"),
    ],
)
def test_what_would_be_ignored_or_does_not_fit_is_refused(x, options, message):
    module = options.get("module", Attention())
    key = options.get("key", x)
    rest = {n: v for n, v in options.items() if n not in ("module", "key", "attention_mask")}
    with pytest.raises(ValueError, match=message):
        interface.attention_forward(module, x, key, x, options.get("attention_mask"), **rest)


def test_a_models_own_mask_function_is_refused(registered):
    model = make("bert")
    model.set_attn_implementation(NAME)
    from transformers.masking_utils import create_bidirectional_mask

    x = torch.randn(2, 5, 48)
    arguments = {"config": model.config, "inputs_embeds": x, "attention_mask": None}
    assert create_bidirectional_mask(**arguments) is None
    with pytest.raises(ValueError, match="attention_mask: expected no mask besides padding"):
        create_bidirectional_mask(**arguments, and_mask_function=lambda b, h, q, k: q >= k)


def test_attention_dropout_in_training_is_refused(registered):
    changes = {"attention_probs_dropout_prob": 0.1}
    model = tf.AutoModel.from_config(ENCODERS["bert"].config(**changes), attn_implementation=NAME)
    ids, mask = batch("bert")
    with pytest.raises(ValueError, match="attention dropout: expected 0"):
        model.train()(ids, attention_mask=mask)
    model.eval()(ids, attention_mask=mask)


def test_decoders_are_refused(registered):
    model = tf.AutoModel.from_config(
        ENCODERS["bert"].config(is_decoder=True), attn_implementation=NAME
    )
    with pytest.raises(ValueError, match="is_causal: expected False"):
        model(batch("bert")[0])


def test_output_attentions_is_refused_not_left_out(registered):
    model = make("bert")
    model.set_attn_implementation(NAME)
    ids, _ = batch("bert")
    with pytest.raises(ValueError, match="output_attentions: expected"):
        model(ids, output_attentions=True)
    model.config._output_attentions = True  # its setter allows eager only
    with pytest.raises(ValueError, match="output_attentions: expected"):
        model(ids)


def test_packed_calls_read_nothing_back_from_a_gpu():
    """Fake CUDA tensors have no values: whatever waits for one raises."""
    with FakeTensorMode():
        one = torch.empty(1, 3, 30, 16, device="cuda", dtype=torch.bfloat16)
        cu = torch.empty(4, dtype=torch.int32, device="cuda")
        lengths = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu.clone(), "max_length_q": 12}
        positions = torch.empty(1, 30, dtype=torch.int64, device="cuda")
        out, _ = interface.attention_forward(
            Attention(), one, one, one, None, sliding_window=3, position_ids=positions, **lengths
        )
        assert out.shape == (1, 30, 3, 16)
        q = torch.empty(2, 3, 30, 16, device="cuda", dtype=torch.bfloat16)
        out, _ = interface.attention_forward(Attention(), q, q, q, None)
        assert out.shape == (2, 30, 3, 16)
        with pytest.raises((DataDependentOutputException, RuntimeError)):  # restarts are looked for
            interface.attention_forward(Attention(), one, one, one, None, position_ids=positions)
