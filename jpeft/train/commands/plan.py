# SPDX-License-Identifier: Apache-2.0
"""`jpeft plan`: memory, FLOPs and time of a training step, before there is a machine."""

from ..planning.command import add_arguments as add_arguments
from ..planning.command import run as run

HELP = "memory, FLOPs and time of a training step, before there is a machine"
