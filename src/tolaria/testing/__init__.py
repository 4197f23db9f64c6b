"""Tools that show whether snapshots and rollbacks are safe: of tolaria itself, and of other people's code.

    world, device, simulator     a machine made of values, on which protocols run
    explorer                     every schedule, or some at random; one again
    programs, alter              what threads run; the same with something changed
    scenarios, catalog           the programs that are checked
    mutants, designs, limits     with an edge less; other protocols; what is not covered
    checks                       all of these by name, and replay tokens
    timeline, races, recording   a schedule as a picture; which accesses nothing orders
    recorder, taps               the same of a real run, and where that listens
    stress, gates                real threads; gates that hold work back on a CUDA device
    picture, trials              what stands behind them; races forced there
    tags, turbulence             tensors that tell whether they are torn; threads and streams at work on them
    thread_gate, faults          host threads held where a test says; plans of what goes wrong in a training
    device_contract, bench       whether a device port keeps its contract, and what stands around it
    detector_contract, curves    whether a detector does; made loss curves
    contract                     what such a check finds
    plugin                       fixtures for pytest
    verify, golden               the command; the pages that tell of it

Nothing is imported here: take what you need from its module. What touches tensors needs torch.
"""
