"""One module per box of dvc.yaml, each run as `python -m stages.NAME`."""
