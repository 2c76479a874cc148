"""The pure part: values and decisions, with no I/O, threads, clock or logging."""
