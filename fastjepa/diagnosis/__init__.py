"""What `fastjepa doctor` finds out about a machine, an installation and a configuration.

Facts are gathered apart from what is made of them: every check is a function from facts to a `Finding`,
and so is tested for machines that are not at hand.
"""
