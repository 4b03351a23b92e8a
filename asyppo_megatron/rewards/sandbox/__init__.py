"""Programs that nobody trusts, run in a jail. Standard library only: the supervisor needs nothing but these files."""
