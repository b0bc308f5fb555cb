# SPDX-License-Identifier: Apache-2.0
"""What a prediction is worth: classes, texts, numbers and formulas, programs; each figure with its interval."""
