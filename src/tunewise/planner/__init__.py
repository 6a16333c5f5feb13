"""What should be done: every combination of methods predicted for a machine, and the best one chosen with reasons.

space        which combinations there are, as complete recipes, and which contradict themselves
load         how the data's documents fill rows, micro-batches and steps
footprint    bytes of a combination as a function of the tokens in a micro-batch, from few dry runs
roofline     seconds of operators on a machine
predict      bytes, seconds, cost and energy of every combination; traces are shared between combinations
choose       constraints, Pareto front, recommendation, and a reason for everything that was rejected
explain      what a single method changes in this case
calibration  what was measured on this machine before
plan         all of it in one call
"""
