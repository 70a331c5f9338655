"""Evaluation of pre-trained models; fine-tuned ones are judged where they are trained."""
