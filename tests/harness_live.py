# SPDX-License-Identifier: Apache-2.0
"""lm-eval's own model of transformers beside `jpeft.train.harness`, on one folder: prints what both say, as JSON.

python tests/harness_live.py FOLDER    # in an environment with lm-eval, torch, transformers and jpeft
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

PAIRS = [
    ("the film was", " good"),
    ("", "a dull plot"),
    ("good film ", "fine cast"),
    ("the a is was and the", " poor film the"),
]
#: Of 82 tokens with the first one, and without a period: lm-eval takes windows of equal tokens for one another.
LONG = " ".join(
    random.Random(0).choices("good great fine bad poor dull film plot cast scene the a is was and".split(), k=81)
)
TEXTS = ["good", LONG, "a scene"]
WRITES = [("the film was", {"until": ["good"], "max_gen_toks": 6}), ("a plot", {"until": [], "max_gen_toks": 4})]


def asked(kind, arguments):
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def answers(model):
    """What a model says to all of it."""
    return {
        "pairs": model.loglikelihood([asked("loglikelihood", pair) for pair in PAIRS]),
        "texts": model.loglikelihood_rolling([asked("loglikelihood_rolling", (text,)) for text in TEXTS]),
        "writes": model.generate_until([asked("generate_until", write) for write in WRITES]),
    }


if __name__ == "__main__":
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    from jpeft.train.harness import Jpeft

    theirs = HFLM(pretrained=sys.argv[1], device="cpu", dtype="float32", batch_size=2, max_length=32)
    ours = Jpeft(model=sys.argv[1], batch_size=3, max_length=32)
    print(json.dumps({"theirs": answers(theirs), "ours": answers(ours)}))
