"""What becomes of requests while servers die, stop and lose their connections."""
