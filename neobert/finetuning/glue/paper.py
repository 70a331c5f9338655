"""The paper's GLUE table (arXiv 2502.19587), dev sets, in percent.

The BERT rows are scores of the test server, as the paper took them over.
"""

from neobert.finetuning.glue.tasks import AVERAGED

_COLUMNS = ("MNLI", "QNLI", "QQP", "RTE", "SST-2", "MRPC", "CoLA", "STS-B")
_ROWS = {
    "BERT-base": (84.0, 90.5, 71.2, 66.4, 93.5, 88.9, 52.1, 85.8, 79.6),
    "RoBERTa-base": (87.6, 92.8, 91.9, 78.7, 94.8, 90.2, 63.6, 91.2, 86.4),
    "NomicBERT-2048": (86.0, 92.0, 92.0, 82.0, 93.0, 88.0, 50.0, 90.0, 84.0),
    "ModernBERT-base": (89.1, 93.9, 92.1, 87.4, 96.0, 92.2, 65.1, 91.8, 88.5),
    "NeoBERT-1024": (88.9, 93.9, 90.7, 91.0, 95.8, 93.4, 64.8, 92.1, 88.8),
    "NeoBERT-4096": (89.0, 93.7, 90.7, 91.3, 95.6, 93.4, 66.2, 91.8, 89.0),
    "BERT-large": (86.3, 92.7, 72.1, 70.1, 94.9, 89.3, 60.5, 86.5, 82.1),
    "RoBERTa-large": (90.2, 94.7, 92.2, 86.6, 96.4, 90.9, 68.0, 92.4, 88.9),
    "ModernBERT-large": (90.8, 95.2, 92.7, 92.1, 97.1, 91.7, 71.4, 92.8, 90.5),
}
AVERAGE = "average"
PAPER: dict[str, dict[str, float]] = {
    name: dict(zip((*_COLUMNS, AVERAGE), row, strict=True)) for name, row in _ROWS.items()
}
TEST_SERVER = ("BERT-base", "BERT-large")

# Hub ids of the models in the table.
NAMES = {
    "google-bert/bert-base-uncased": "BERT-base",
    "google-bert/bert-large-uncased": "BERT-large",
    "FacebookAI/roberta-base": "RoBERTa-base",
    "FacebookAI/roberta-large": "RoBERTa-large",
    "nomic-ai/nomic-bert-2048": "NomicBERT-2048",
    "answerdotai/ModernBERT-base": "ModernBERT-base",
    "answerdotai/ModernBERT-large": "ModernBERT-large",
    "chandar-lab/NeoBERT": "NeoBERT-4096",
}

assert set(_COLUMNS) == set(AVERAGED)
