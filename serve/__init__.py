"""The HTTP predictor: Gunicorn's workers answer HTTP, one process beside them holds the model (see serve/supervisor.py)."""
