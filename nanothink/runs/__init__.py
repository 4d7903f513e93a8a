"""The composition root: here settings meet data, models, training and checkpoints.

resuming.py    which run is meant, and the checkpoint it goes on from
preparing.py   what a run will consist of: data, tokenizer, precision
pretraining.py train an expert
expert_state_cache.py  the experts' states on the disk: whether, and for what
estimate.py    the same, only estimated: --dry-run
loading.py     a trained model as a Python object
evaluating.py  checkpoints side by side on held-out text
exporting.py   a checkpoint as a folder for other programs
"""
