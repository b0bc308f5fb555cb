# SPDX-License-Identifier: Apache-2.0
"""Whether a model's answer to a mathematical problem is right: what it answered, and whether that equals the solution.

extract   the answer in a text: the last balanced `\\boxed{}`, `####`, GSM8K's two rules
normal    one spelling for what is written in many
number    exact values of numbers
parts     lists, sets, tuples, intervals, matrices, taken apart
equal     the verdict, and the pool of workers that math-verify is asked in where the above do not decide
"""
