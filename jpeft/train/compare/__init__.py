# SPDX-License-Identifier: Apache-2.0
"""`jpeft compare`: methods x models x tasks x seeds from one YAML, in a folder that can be gone on with, and a report.

study.py       what is compared, and the runs that it comes to
runner.py      makes the runs that are not made yet, each in a process of its own
measure.py     one run: trained, tested, timed, weighed; one JSON
judge.py       asks a model for its answers
writing.py     test rows that a model writes texts for, by a task of `jpeft eval`
outcomes.py    what a model did with every example
statistics.py  intervals over seeds and examples, paired tests
table.py       runs of one method put together: a row of the report
digest.py      all that a report shows, as one small file
report.py      Markdown, CSV and one HTML page
figures.py     the plots; radar.py the one of ranks
"""
