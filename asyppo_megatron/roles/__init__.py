"""The models of a run as roles: groups, model, optimizer, schedule, and what each does in a step."""
