"""Fine-tuning: a classifier, packed batches, the paper's schedule; ``glue`` has its nine tasks."""
