# SPDX-License-Identifier: Apache-2.0
"""Where rows come from: local files of several kinds, read line by line, and data sets of the hub or a folder."""

from .opening import Opened, digest, holds_rows, open_source

__all__ = ["Opened", "digest", "holds_rows", "open_source"]
