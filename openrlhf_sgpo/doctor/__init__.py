"""``openrlhf-sgpo doctor``: what works on this machine, what does not, and the command that mends it.

Imports nothing beyond the standard library, so that it also runs where the packages that every other command needs are missing.
Other packages are imported in other processes, with a time limit: one that crashes or hangs is a line of the report.
"""
