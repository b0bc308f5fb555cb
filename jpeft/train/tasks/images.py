# SPDX-License-Identifier: Apache-2.0
"""Any images with classes: `--data` names a folder with a folder for each class, or a table of files and labels.

The classes are those of the model.
"""

from .kinds import Classify

TASK = Classify(source=None, columns={}, form="image", names=None, published={}, task="IMAGE_CLS")
