"""What `fastjepa` can be asked for, a file for each command.

Each has `add_to(commands)`, which describes it, and `run(options)`, whose result is the exit status; but
`plan`, which takes overrides as `train` does, has a parser and a `main(arguments)` of its own. They import
what needs an extra when they run, so that `fastjepa --help` and `train` need none of the others'.
"""
