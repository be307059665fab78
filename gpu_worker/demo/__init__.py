"""The bundled demo model: its text (text/), its training (train.py), its weights (model/)."""
