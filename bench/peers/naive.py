"""What most tutorials show: Flask under gunicorn, one text at a time, padded to 512 tokens, torch in fp32.

Started by bench/serve.py as: gunicorn --workers 1 bench.peers.naive:app
"""

import os
from pathlib import Path
from typing import Any

import torch
from flask import Flask, request
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bench.peers import Reader
from sentiment import engines, text

PADDED = 512  # tokens, or as many as the model has positions
folder = Path(os.environ["BENCH_MODEL"])
torch.set_num_threads(engines.cores())
reader = Reader.load(folder)
tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
length = min(PADDED, model.config.max_position_embeddings)
app = Flask(__name__)


@app.get("/health")
def health() -> str:
    """Whether the model is loaded."""
    return "ok"


@app.post("/predict")
def predict() -> dict[str, Any]:
    """The label of one text."""
    cleaned = text.clean(request.get_json()["text"], reader.inference["case"], reader.inference.get("emoji"))
    inputs = tokenizer(cleaned, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**inputs).logits
    return reader.answers(logits.numpy())[0]
