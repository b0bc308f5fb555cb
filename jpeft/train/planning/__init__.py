# SPDX-License-Identifier: Apache-2.0
"""`jpeft plan`: what a training step will take, before there is a machine to take it.

Two ways side by side. By shape (`estimate`): every array that stays, and every array that autodiff keeps for the
backward pass, counted on shapes. Compiled (`compiling`): the step that `jpeft train` runs, compiled ahead of time for
the device, which may be a TPU that is not there. Nothing is allocated in either.

  devices     what chips have: memory, peak rates, and where these figures are from; topologies by name
  request     what is asked
  subject     the adapted model, the optimizer's state and a batch as shapes in their places
  trace       products and kept arrays of a traced program
  estimate    memory, FLOPs and time by shape
  compiling   the same step compiled: memory, collectives, the program's text
  exchange    what devices say to each other in a compiled program, and what of it goes between slices
  advice      what to change where it does not fit
  table       what fits of many models, methods and machines
  report      all of it in lines
  command     the arguments of `jpeft plan`
"""
