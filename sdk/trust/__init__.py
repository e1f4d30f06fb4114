"""Which servers this machine trusts: pins by name, and how they change when a server's key does."""
