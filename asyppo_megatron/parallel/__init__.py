"""Which rank does what: layouts, process groups, the exchange between roles, seeds."""
