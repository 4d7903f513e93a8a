"""The composition root: the only part where settings, data, models, training and checkpoints meet.

A run: resuming, parts, preparing, building, callbacks, saving, pretraining; estimate for ``--dry-run``.
A trained model: saved_model and trained_model; evaluating, exporting, reporting and the vector store use it.
"""
