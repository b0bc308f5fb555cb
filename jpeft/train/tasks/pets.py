# SPDX-License-Identifier: Apache-2.0
"""Oxford-IIIT pets (Parkhi et al., 2012): which of 37 breeds of cats and dogs is on an image. 3,669 images."""

from ..sections.data import Source
from .kinds import Classify

TASK = Classify(
    source=Source("timm/oxford-iiit-pet", split="test"),
    columns={"image": "image", "label": "label"},
    form="image",
    names=None,
    published={},
    task="IMAGE_CLS",
)
