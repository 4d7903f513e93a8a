"""People who come from other programs are told the command, option or setting that they mean."""

from __future__ import annotations

import shlex

import pytest

from nanothink.cli.app import run


@pytest.mark.parametrize(
    ("typed", "advice"),
    [
        (
            "pretrain transformer --lr 1e-3 --preset tiny",
            "--set train_expert.lr=1e-3 --preset tiny`",
        ),
        ("pretrain diffuser --batch=4", "pretrain diffuser --set train_diffuser.batch_size=4`"),
        ("pretrain transformer --block_size 64", "pretrain transformer --set model.max_seq_len=64`"),
        ("train-mla --num_train_epochs 3", "`nanothink train-mla --max-epochs 3`"),
        ("pretrain transformer --set train_mla.learning_rate=1", "Did you mean 'train_mla.lr'?"),
        ("pretrain transformer --set epochs=1", "Did you mean 'train_expert.max_epochs'?"),
        ("pretrain transformer --set train_expert.drop=1", "Did you mean 'train_expert.dropout'?"),
        ("export", "`nanothink checkpoints export --help`"),
        ("export a.pt --to b", "`nanothink checkpoints export a.pt --to b`"),
        ("import", "`nanothink data import --help` or `nanothink checkpoints import --help`"),
        ("train-transformer", "`nanothink pretrain transformer`"),
        ("finetune", "`nanothink pretrain --help`"),
        ("chat", "`nanothink generate`"),
        ("evall", "Did you mean 'eval'?"),
    ],
)
def test_what_was_meant_is_named(typed: str, advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(shlex.split(typed)) == 2
    assert advice in " ".join(capsys.readouterr().err.split())
