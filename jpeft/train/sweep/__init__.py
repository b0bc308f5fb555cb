# SPDX-License-Identifier: Apache-2.0
"""`jpeft sweep`: many configurations of one training, those whose step is the same trained in one compiled step.

space.py    what is tried: a base configuration, what varies, and the points that this comes to
opening.py  what is looked at before the first trial
bayes.py    points that optuna proposes, given the scores of earlier ones
halving.py  when configurations are compared on the way, and which go on
groups.py   which trials are trained together
lanes.py    trials that are trained together, from one update to another
runner.py   makes what is not made yet, in a folder that can be gone on with
digest.py   all that a report shows, as one small file
report.py   the table, the plots, and the best configuration, ready for `jpeft train`
"""
