"""deferlib in other frameworks: each module needs only the framework it is for."""
