# SPDX-License-Identifier: Apache-2.0
"""A ViT of a few thousand weights, and pictures of two colours that it can learn to tell apart."""

import json

import jax
import numpy as np
from PIL import Image

from jpeft import models
from jpeft.train import images

VIT = {
    "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": 8, "patch_size": 4, "num_channels": 3, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": 8, "image_mean": [0.4, 0.5, 0.6]}


def paint(root, count, seed):
    """Noisy pictures, more red or more blue, of various sizes: `count` of each in a folder of its own."""
    rng = np.random.default_rng(seed)
    for channel, name in ((2, "blue"), (0, "red")):
        (root / name).mkdir(parents=True)
        for at in range(count):
            values = rng.integers(0, 120, (*rng.integers(9, 20, 2), 3))
            values[..., channel] += 100
            Image.fromarray(values.astype(np.uint8)).save(root / name / f"{at}.png")
    return root


def write_vit(folder, task="FEATURE_EXTRACTION", **changes):
    """A folder with the ViT and its processor."""
    options = {} if task == "FEATURE_EXTRACTION" else {"num_labels": 2}
    models.save(models.build(VIT | changes, task, key=jax.random.key(0), **options), folder)
    (folder / images.FILE).write_text(json.dumps(PROCESSOR))
    return folder
