"""`tolaria drill`: trains a real model under injected faults, clean, unguarded and guarded side by side.

`workloads` says what is trained, `faults` what goes wrong and when; `runs` has the training loops, `score` says what
counts as recovered, `picture` and `show` are for people, and `command` is one drill from seed to exit code.
"""
