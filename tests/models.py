"""Tiny data and models for the tests: made here, trained in a second or not at all."""

import numpy as np
import torch

from sentiment import checkpoint, params, tokens
from sentiment.classifier import Inference

GOOD = ["adorei o produto", "chegou antes do prazo", "muito bom", "recomendo a todos", "excelente qualidade", "funciona bem"]
BAD = ["não gostei", "veio quebrado", "péssimo atendimento", "não recomendo", "quero meu dinheiro", "parou de funcionar"]
THINGS = ["da panela", "do celular", "da cadeira", "do livro", "do relógio", "da mochila", "do fogão", "do tênis"]


def reviews(number=160, seed=0):
    """Texts and labels (0 bad, 1 good) put together at random."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, number)
    pick = lambda options: options[rng.integers(len(options))]  # noqa: E731
    return [" ".join(pick(GOOD if y else BAD) + " " + pick(THINGS) for _ in range(rng.integers(1, 4))) for y in labels], labels


def settings(**changes):
    """The shipped parameters made tiny; `changes` go to the train section."""
    values = params.load().model_dump()
    tiny = {"checkpoint": None, "vocab_size": 300, "hidden_size": 32, "layers": 1, "heads": 2, "intermediate_size": 64}
    values["model"] |= tiny
    values["tokenize"]["max_length"] = 32
    short = {"device": "cpu", "precision": "fp32", "epochs": 2, "batch_tokens": 256, "log_every": 3, "checkpoint_every": 4}
    values["train"] |= short | {"lr": 0.003, "layer_decay": 1.0} | changes
    return params.check(values)


def tokenizer_in(folder, texts, vocab_size=300):
    """A tokenizer learnt from the texts, saved to the folder and read back."""
    checkpoint.save_word_piece(checkpoint.word_piece(texts, vocab_size), folder)
    return tokens.load_tokenizer(folder, 32)


def model_folder(folder, labels=("negativo", "positivo"), seed=0, **inference):
    """A model folder as the train stage writes it, with random weights."""
    texts, _ = reviews()
    tokenizer = tokenizer_in(folder, texts)
    torch.manual_seed(seed)
    checkpoint.load_model(settings().model, labels, tokenizer, 32).save_pretrained(folder)
    fixed = {"max_length": 32, "case": "truecase", "emoji": "pt", "text": ["text"], "temperature": 1.0, "threshold": None}
    Inference(**fixed | inference).save(folder)
    return folder
