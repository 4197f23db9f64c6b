"""`tolaria drill`: trains a real model under injected faults, clean, unguarded and guarded side by side.

    workloads  what is trained           faults  what goes wrong, and when
    runs       the training loops        score   what counts as recovered
    picture, show                        what a person sees
    command                              one drill from seed to exit code
"""
