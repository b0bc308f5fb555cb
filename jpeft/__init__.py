# SPDX-License-Identifier: Apache-2.0
"""Parameter-efficient fine-tuning for JAX: functions on pytrees.

model = jpeft.adapt(model, jpeft.LoRA(rank=16, targets=["q_proj", "v_proj"]), key=key)
graphdef, trainable, frozen = jpeft.partition(model)
grads = jax.grad(lambda t: loss(jpeft.combine(graphdef, t, frozen), batch))(trainable)
"""

# models
from . import seams as seams
from ._adapt import adapt as adapt
from ._adapt import merge as merge
from ._adapt import strip as strip
from ._masks import labels as labels
from ._masks import mask as mask
from ._masks import optimizer as optimizer
from ._method import AdapterConstant as AdapterConstant
from ._method import AdapterParam as AdapterParam
from ._method import Method as Method
from ._partition import GraphDef as GraphDef
from ._partition import combine as combine
from ._partition import partition as partition
from ._scope import dropout_key as dropout_key
from ._summary import summary as summary
from ._walk import sites as sites
from .methods import METHODS as METHODS
from .methods import LoRA as LoRA
from .seams import register as register

__version__ = "0.1.0"
