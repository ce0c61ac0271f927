"""What can go wrong here and a person can cure."""


class DeployError(Exception):
    """The message names what is wrong, and the cure."""
