# SPDX-License-Identifier: Apache-2.0
"""`jpeft advise`: which method for a task and its circumstances, why, and a configuration with its plan."""

from ..advising.command import add_arguments as add_arguments
from ..advising.command import run as run

HELP = "which method for a task, why, and a configuration with its plan"
