"""deferlib beside other task queues: the same tasks, counted the same way, in one run on one machine."""
