"""echo4o train configs/tiny_cpu.yaml --lr 2e-5    ·    echo4o generate runs/tiny_bagel --prompt "A red disc"

The verbs. Everything here parses and delegates.
"""

from __future__ import annotations

import typer

from echo4o.cli import data, evaluation, folders, generation, training
from echo4o.cli.training import run_training

__all__ = ["app", "main", "run_training"]

app = typer.Typer(
    name="echo4o",
    help="Fine-tune BAGEL on several reference images, and generate with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verbs in (training, generation, folders):
    app.add_typer(verbs.verbs)
app.add_typer(data.verbs, name="data")
app.add_typer(evaluation.verbs, name="eval")


def main() -> None:
    app()
