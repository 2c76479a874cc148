"""The push-queue engine: takes due tasks from the store and delivers them."""
