"""Sweeps with Ray Tune: `python -m tune.yolo` trains YOLO with other hyperparameters in each trial."""
