"""The pre-training pipeline: texts without labels into a BERT to fine-tune."""
