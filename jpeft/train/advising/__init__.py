# SPDX-License-Identifier: Apache-2.0
"""`jpeft advise`: which method, with the reason, what was measured, a configuration, and its plan.

needs       what is asked: memory, examples, kind of task, latency, tenants
candidates  what may be advised, and what is known of each without a measurement
rules       one function a rule: what it says of a candidate, and why
evidence    what was measured, from `evidence.json`, which benchmarks/evidence.py writes from docs/results/data
advice      candidates in order, those that fit, and those that are out
report      all of it in lines, as JSON, and as a configuration
command     the arguments of `jpeft advise`
"""
