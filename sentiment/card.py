"""The model card of a fine-tuned model, in the Hub's format, written from its metadata."""

from typing import Any

import yaml

INTERVAL_FREE = ("accuracy", "f1", "f1_macro", "roc_auc", "loss")


def write(metadata: dict[str, Any]) -> str:
    """README.md: a YAML header as the Hub reads it, then what the model is, was made from, and scores."""
    return f"---\n{yaml.safe_dump(header(metadata), allow_unicode=True, sort_keys=False)}---\n\n{body(metadata)}"


def header(metadata: dict[str, Any]) -> dict[str, Any]:
    """The card's metadata: language, base model and its licence, where that is known, metrics on validation."""
    base, data = metadata["base"], metadata["data"]
    results = [{"type": name, "value": round(metadata["validation"][name], 4)} for name in INTERVAL_FREE]
    dataset = {"type": "reviews", "name": data["source"], "split": "validation"}
    return {
        "language": "pt",
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        **({"base_model": base["checkpoint"]} if base["checkpoint"] else {}),
        **({"license": base["licence"]} if base.get("licence") else {}),
        "tags": ["sentiment-analysis", "product-reviews", "bert"],
        "model-index": [
            {
                "name": "sentiment",
                "results": [{"task": {"type": "text-classification"}, "dataset": dataset, "metrics": results}],
            }
        ],
    }


def body(metadata: dict[str, Any]) -> str:
    """The card's text."""
    data, base, best = metadata["data"], metadata["base"], metadata["best_epoch"]
    origin = f"`{base['checkpoint']}`" + (f" at `{base['revision']}`" if base["revision"] else "")
    origin += f" (licence: {base['licence']})" if base.get("licence") else ""
    made = f"Fine-tuned from {origin if base['checkpoint'] else 'scratch (a small BERT)'}"
    if metadata["members"]:
        members = ", ".join(f"{each['model']} (weights `{each['sha256'][:12]}…`)" for each in metadata["members"])
        made = f"The average of the probabilities of {members}"
    labels, splits = ", ".join(metadata["labels"]), data["splits"]
    scores = "\n".join(f"| {name} | {metadata['validation'][name]:.4f} |" for name in INTERVAL_FREE)
    rows = "\n".join(
        f"| {row['epoch']} | {row['train_loss']:.4f} | {row['validation_loss']:.4f} | {row['validation_accuracy']:.4f} "
        f"| {row['validation_f1_macro']:.4f} | {row['seconds']:.1f} |"
        for row in metadata["history"]
    )
    history = f"""
## History
| epoch | training loss | validation loss | accuracy | macro-F1 | seconds |
|---|---|---|---|---|---|
{rows}
"""
    return f"""# Sentiment of Portuguese product reviews

Classifies a review as {labels}. {made};
{metadata["parameters_count"]:,} parameters; trained on {metadata["device"]} in {metadata["precision"]},
{metadata["training_seconds"]:.0f} s, {metadata["created"]}.

## Data
`{data["source"]}` (licence: {data["licence"]}; sha256 `{data["sha256"]}`): {splits["train"]["reviews"]} reviews to train on,
{splits["validation"]["reviews"]} for validation, {splits["test"]["reviews"]} for test; no text and no product in two of them.

## Scores on validation (calibrated{f"; epoch {best}" if best else ""})
| metric | value |
|---|---|
{scores}

Scores on the test split are in `metrics/test.json` of the commit that the model's tag names.
{history if rows else ""}
## Use
`inference.json` holds the temperature that the logits are divided by, the bias (if any) that is then added, and the threshold of
the last class. Written for
reviews of products in Brazilian Portuguese; other texts, and other sorts of opinion, were not measured.
`metadata.json` beside this file holds every parameter and version.
"""
