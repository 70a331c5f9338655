"""One call through `register_attention`: what it refuses, and what it does not wait for."""

import pytest
import torch
import transformers as tf
from encoders import ENCODERS
from interface_cases import NAME, batch, make
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from neobert_kernels.patching import interface


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
