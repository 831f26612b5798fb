"""What the stages and the server share: parameters, text, tokens, batches, the classifier, the registry."""

import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("ITERATIVE_DO_NOT_TRACK", "1")  # gto and DVCLive
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
