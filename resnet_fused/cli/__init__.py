"""The command `resnet-fused`. Commands import torch when they run, so that `--help` is quick."""

from __future__ import annotations

import click

from resnet_fused.cli._errors import Group
from resnet_fused.cli.bench import bench
from resnet_fused.cli.evaluate import evaluate
from resnet_fused.cli.explain import explain
from resnet_fused.cli.info import info
from resnet_fused.cli.paper import paper
from resnet_fused.cli.predict import predict
from resnet_fused.cli.train import train
from resnet_fused.cli.tune import tune
from resnet_fused.cli.verify import verify

__all__ = ["main"]


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="resnet_fused")
def main() -> None:
    """ResNet layers in one pass over memory: look, check, measure, use.

    Exit codes: 0 all is well, 1 a check failed, 2 something given cannot be used.
    """


for command in (info, verify, bench, tune, explain, predict, train, evaluate, paper):
    main.add_command(command)
