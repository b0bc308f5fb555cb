# SPDX-License-Identifier: Apache-2.0
"""Running code that a model wrote: two confined processes, and nothing of theirs in this one. `box` has the way in.

The candidate's process holds the program and answers calls; the judge's process holds the tests and makes them. Between
them cross plain values of a closed grammar. Around each stand, in this order: namespaces where the system allows them,
another identity and no capability, limits, no-new-privileges, Landlock, and a list of allowed system calls. Where one
that is needed cannot be had, nothing is run. docs/evaluation.md says what this keeps out, and what it does not.
"""
