"""What a run tells the outside: metrics, a progress line, log files, a learning curve, seconds by phase."""
