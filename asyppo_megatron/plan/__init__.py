"""What a configuration needs before anything runs: memory of every rank, work of every phase, who talks to whom."""
