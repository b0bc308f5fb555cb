# SPDX-License-Identifier: Apache-2.0
"""What checks annotations in `make typed`: beartype, for which a whole number is a `float` too, as PEP 484 says."""

import beartype

checked = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
