"""What a web app mounts."""
